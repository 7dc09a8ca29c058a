"""``icos-fl-health`` and servers that are healthy, that say they are not, or are not there."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer, SimpleHTTPRequestHandler

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from icos_fl_service import health
from icos_fl_service.metrics import Metrics
from icos_fl_service.probe import Probe


@contextlib.contextmanager
def probed(ask: Callable[[], None]) -> Iterator[int]:
    """Port of the metrics of a process whose probe asks *ask*, and has its first answer."""
    answered = threading.Event()
    probe = Probe(ask, lambda _: answered.set())
    metrics = Metrics("icos-fl-service", "127.0.0.1:0")
    probe.start()
    assert answered.wait(10)
    assert metrics.port is not None
    yield metrics.port
    probe.stop(5)
    metrics.close()


@contextlib.contextmanager
def serving(status: "health_pb2.HealthCheckResponse.ServingStatus") -> Iterator[int]:
    """Port of a gRPC server that tells *status* of the service ``a.b.Service``."""
    servicer = HealthServicer()
    servicer.set("a.b.Service", status)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A port on which the first line of the first client gets *answer*."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def away() -> None:
    raise OSError("away")


def test_a_service_whose_store_answers_is_healthy():
    with probed(lambda: None) as port:
        health.ask(f"http://127.0.0.1:{port}/health")


def test_what_is_answered_is_printed(capsys):
    with probed(lambda: None) as port:
        health.ask(f"http://127.0.0.1:{port}/status")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["health"] == "healthy"


def test_a_long_answer_is_printed_whole(capsys):
    text = "icos_fl_forecast_error 1.0\n" * 10_000
    with answering(b"HTTP/1.0 200 OK\r\n\r\n" + text.encode()) as port:
        health.ask(f"http://127.0.0.1:{port}/metrics")
    assert capsys.readouterr().out == text


def test_a_longer_answer_than_can_be_is_told(monkeypatch):
    monkeypatch.setattr(health, "BODY_BYTES_MAX", 10)
    with (
        answering(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 11) as port,
        pytest.raises(health.Unhealthy, match="more than 10 bytes"),
    ):
        health.ask(f"http://127.0.0.1:{port}/metrics")


def test_a_service_whose_store_is_away_is_not():
    with probed(away) as port, pytest.raises(health.Unhealthy, match="503 what it needs"):
        health.ask(f"http://127.0.0.1:{port}/health")


def test_the_metrics_are_still_there():
    with probed(lambda: None) as port:
        health.ask(f"http://127.0.0.1:{port}/metrics")


def test_a_service_with_tls_is_asked_whoever_signed_its_certificate():
    certificate = trustme.CA().issue_cert("superlink.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        health.ask(f"https://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_grpc_service_that_serves_is_healthy():
    with serving(health_pb2.HealthCheckResponse.SERVING) as port:
        health.ask(f"grpc://127.0.0.1:{port}/a.b.Service")


def test_a_grpc_service_that_says_it_does_not_serve_is_not():
    with (
        serving(health_pb2.HealthCheckResponse.NOT_SERVING) as port,
        pytest.raises(health.Unhealthy, match="NOT_SERVING"),
    ):
        health.ask(f"grpc://127.0.0.1:{port}/a.b.Service")


def test_a_grpc_service_of_another_name_is_not():
    with (
        serving(health_pb2.HealthCheckResponse.SERVING) as port,
        pytest.raises(health.Unhealthy, match="NOT_FOUND"),
    ):
        health.ask(f"grpc://127.0.0.1:{port}/another.Service")


def test_a_key_value_store_that_answers_a_ping_is_healthy():
    with answering(b"+PONG\r\n") as port:
        health.ask(f"valkey://127.0.0.1:{port}")


def test_a_key_value_store_that_still_reads_its_files_is_not():
    with (
        answering(b"-LOADING reading the dataset\r\n") as port,
        pytest.raises(health.Unhealthy, match="-LOADING"),
    ):
        health.ask(f"valkey://127.0.0.1:{port}")


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "valkey", "tcp"])
def test_what_does_not_listen_is_unhealthy(scheme, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("sys.argv", ["icos-fl-health", f"{scheme}://127.0.0.1:{port}"])
    with pytest.raises(SystemExit) as caught:
        health.main()
    assert str(caught.value).startswith(f"icos-fl-health: {scheme}://127.0.0.1:{port}: ")


@pytest.mark.parametrize("url", ["", "ftp://127.0.0.1:21", "http://127.0.0.1", "tcp://:1"])
def test_what_cannot_be_asked_is_refused(url):
    with pytest.raises(ValueError, match="not of the form"):
        health.ask(url)
