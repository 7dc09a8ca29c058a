"""The command as a process: how it starts, refuses and ends."""

import http.client as http_client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_service.testing import free_port


@contextmanager
def command(*arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    environment = {f"ICOS_FL_BRIDGE_{name}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "icos_fl_otlp_bridge", *arguments],
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


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--config", 2)])
def test_it_takes_no_arguments_and_says_where_settings_come_from(argument, status):
    with command(argument) as process:
        printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed.splitlines()[-1]) == (
        status,
        "Settings come from ICOS_FL_BRIDGE_* variables.",
    )


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


LINES: list[str] = []
"""Of all logs that were waited for."""


def wait_for_line(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    """The next line of the log with that event."""
    assert process.stderr is not None
    for line in process.stderr:
        LINES.append(line)
        said: dict[str, object] = json.loads(line)
        if said["event"] == event:
            return said
    raise AssertionError(f"the bridge ended and never said {event!r}")


COLUMNS = "columns:\n  a: {sources: [{terms: [{metric: m}]}]}\n"


def test_sighup_takes_a_new_configuration_over_and_refuses_a_bad_one(tmp_path: Path):
    config, tokens = tmp_path / "bridge.yaml", tmp_path / "tokens"
    config.write_text(COLUMNS)
    tokens.write_text("a-token-of-some-length\n")
    tokens.chmod(0o600)
    with command(CONFIG=str(config), TOKENS=str(tokens), LISTEN_ADDRESS="127.0.0.1:0") as process:
        port = wait_for_line(process, "bridge serves")["port"]
        config.write_text(COLUMNS + "  b: {sources: [{terms: [{metric: n}]}]}\n")
        process.send_signal(signal.SIGHUP)
        taken = wait_for_line(process, "new configuration taken over")
        assert taken["columns"] == ["a", "b"]
        tokens.write_text("short\n")
        process.send_signal(signal.SIGHUP)
        refused = wait_for_line(process, "new configuration refused, the old one goes on")
        assert str(refused["reason"]).startswith(f"{tokens}, line 1: a token of 5 characters")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            export = channel.unary_unary(
                "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
            )
            metadata = (("authorization", "Bearer a-token-of-some-length"),)
            with pytest.raises(grpc.RpcError) as no_store:  # and not UNAUTHENTICATED
                export(b"", timeout=20, metadata=metadata)
            assert no_store.value.code() == grpc.StatusCode.UNAVAILABLE
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_certificate_without_its_key_is_one_line(tmp_path: Path):
    with command(TLS__CERTIFICATE=str(tmp_path / "server.pem")) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "CERTIFICATE and KEY need each other" in errors
    assert "Traceback" not in errors


def test_no_token_is_in_the_log_at_any_level(tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-of-some-length\n")
    tokens.chmod(0o600)
    address, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    wrong = "another-token-of-some-length"
    with command(
        TOKENS=str(tokens), LISTEN_ADDRESS=address, HTTP_LISTEN_ADDRESS=http, LOG_LEVEL="DEBUG"
    ) as process:
        wait_for_line(process, "bridge serves")
        for token in ("a-token-of-some-length", wrong):
            metadata = (("authorization", f"Bearer {token}"),)
            with grpc.insecure_channel(address) as channel:
                export = channel.unary_unary(
                    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
                )
                with pytest.raises(grpc.RpcError):
                    export(b"", timeout=20, metadata=metadata, wait_for_ready=True)
            connection = http_client.HTTPConnection(http, timeout=20)
            connection.request("POST", "/v1/metrics", b"x", {"authorization": f"Bearer {token}"})
            assert connection.getresponse().status >= 400
            connection.close()
        tokens.write_text(f"{wrong} in two words\n")
        process.send_signal(signal.SIGHUP)
        wait_for_line(process, "new configuration refused, the old one goes on")
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    said = "".join(map(str, (out, errors, *LINES)))
    assert "refused" in said
    for secret in ("a-token-of-some-length", wrong):
        assert secret not in said
