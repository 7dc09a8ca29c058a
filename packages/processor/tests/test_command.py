"""The command as a process: how it starts, refuses and ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_service.testing import free_port


@contextmanager
def command(*arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    environment = {f"ICOS_FL_PROCESSOR_{name}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "icos_fl_processor", *arguments],
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


def test_bad_settings_are_listed_each_with_its_variable():
    with command(WATCHERS_MAX="0", LISTEN_ADDRES="x", STORE__PORT="99999") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "ICOS_FL_PROCESSOR_LISTEN_ADDRES: no such setting" in errors
    assert "did you mean ICOS_FL_PROCESSOR_LISTEN_ADDRESS?" in errors
    assert "ICOS_FL_PROCESSOR_WATCHERS_MAX='0'" in errors
    assert "ICOS_FL_PROCESSOR_STORE__PORT='99999'" in errors
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with command(LISTEN_ADDRESS=address) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    said = f"icos-fl-processor: cannot listen on {address}: the port is taken"
    assert errors.splitlines()[-1].startswith(said)
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
