"""The command as a process: how it starts, refuses and ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def command(**settings: str) -> Iterator[subprocess.Popen[str]]:
    environment = {f"ICOS_FL_BRIDGE_{name}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "icos_fl_otlp_bridge"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_case_14_bad_settings_are_listed_each_with_its_variable_and_value():
    with command(MAX_MESSAGE_BYTES="1e6", LISTEN_ADDRES="x", STORE__PORT="99999") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "ICOS_FL_BRIDGE_LISTEN_ADDRES: no such setting" in errors
    assert "did you mean ICOS_FL_BRIDGE_LISTEN_ADDRESS?" in errors
    assert "ICOS_FL_BRIDGE_MAX_MESSAGE_BYTES='1e6'" in errors
    assert "ICOS_FL_BRIDGE_STORE__PORT='99999'" in errors
    assert "Traceback" not in errors


def test_case_14_a_bad_configuration_is_one_line_with_file_line_and_key(tmp_path: Path):
    file = tmp_path / "bridge.yaml"
    file.write_text("columns:\n  a: {sources: [{terms: [{metric: m}]}]}\nwindow_rows: 1_000\n")
    with command(CONFIG=str(file), LISTEN_ADDRESS="127.0.0.1:0") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == (
        f"icos-fl-otlp-bridge: {file}, line 3: window_rows: write the number without "
        "underscores; read: '1_000'"
    )
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with command(LISTEN_ADDRESS=address) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(
        f"icos-fl-otlp-bridge: cannot listen on {address}: the port is taken"
    )
    assert "Traceback" not in errors


def test_it_serves_without_a_store_says_so_and_ends_at_sigterm():
    address = f"127.0.0.1:{free_port()}"
    with (
        command(LISTEN_ADDRESS=address, STORE__PORT=str(free_port())) as process,
        grpc.insecure_channel(address) as channel,
    ):
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True
        )
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
