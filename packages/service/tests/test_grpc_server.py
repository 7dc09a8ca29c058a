"""The life of a gRPC service: health, a store that comes and goes, calls counted, an end."""

import socket
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_service import probe
from icos_fl_service.grpc_server import GrpcServer, ListenError
from prometheus_client import REGISTRY

SERVICE = "a.b.Service"


class Away(Exception):
    """What is needed does not answer."""


class Needed:
    """What a service needs, and that can be away."""

    def __init__(self) -> None:
        self.error: Exception | None = Away("it is away")
        self.asked = threading.Event()

    def ask(self) -> None:
        self.asked.set()
        if self.error:
            raise self.error


def add(server: grpc.Server) -> None:
    def echo(request, context):
        if request == b"bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad")
        return request

    def count(request, context):
        for number in range(int(request)):
            yield str(number).encode()

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Count": grpc.unary_stream_rpc_method_handler(count),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])


def make(needed: Needed, address: str = "127.0.0.1:0", probe_seconds: float = 0.05) -> GrpcServer:
    return GrpcServer(
        SERVICE,
        address,
        add,
        needed.ask,
        expected=Away,
        threads=4,
        receive_bytes_max=1 << 20,
        probe_seconds=probe_seconds,
    )


@pytest.fixture
def needed(monkeypatch):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.05)
    return Needed()


@pytest.fixture
def server(needed):
    server = make(needed)
    server.start()
    yield server
    server.stop(0)


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


def statuses(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=20):
        yield health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_follows_what_is_needed(needed, server, channel, service):
    told = statuses(channel, service)
    assert next(told) == "NOT_SERVING"
    needed.error = None
    assert next(told) == "SERVING"
    needed.error = Away("it is away again")
    assert next(told) == "NOT_SERVING"
    assert server.why_not == "it is away again"


def test_what_answers_may_be_asked_less_often_than_what_does_not(needed):
    server = make(needed, probe_seconds=600.0)
    server.start()
    for _ in range(3):  # away
        needed.asked.clear()
        assert needed.asked.wait(20)
    needed.error = None
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert "SERVING" in statuses(channel)
    needed.asked.clear()
    assert not needed.asked.wait(10 * probe.PROBE_SECONDS)
    server.stop(0)


def test_readiness_and_failed_probes_are_told_to_prometheus(needed, server, channel):
    failed = sample("icos_fl_service_probe_failures_total")
    told = statuses(channel)
    next(told)
    needed.asked.clear()
    assert needed.asked.wait(20)
    assert sample("icos_fl_service_ready") == 0
    needed.error = None
    assert next(told) == "SERVING"
    assert sample("icos_fl_service_ready") == 1
    assert sample("icos_fl_service_probe_failures_total") > failed


def test_an_error_that_nobody_expected_does_not_end_the_probe(needed, server, channel):
    needed.error = ZeroDivisionError("unexpected")
    needed.asked.clear()
    assert needed.asked.wait(20)
    needed.error = None
    assert "SERVING" in statuses(channel)


def test_calls_are_counted_by_method_and_status(server, channel):
    echo = channel.unary_unary(f"/{SERVICE}/Echo")
    before = {
        code: sample("icos_fl_grpc_calls_total", method="Echo", code=code)
        for code in ("OK", "INVALID_ARGUMENT")
    }
    assert echo(b"x", timeout=20) == b"x"
    with pytest.raises(grpc.RpcError):
        echo(b"bad", timeout=20)
    assert list(channel.unary_stream(f"/{SERVICE}/Count")(b"3", timeout=20)) == [b"0", b"1", b"2"]
    for code, count in before.items():
        assert sample("icos_fl_grpc_calls_total", method="Echo", code=code) == count + 1
    assert sample("icos_fl_grpc_calls_total", method="Count", code="OK") >= 1
    assert sample("icos_fl_grpc_call_seconds_count", method="Echo") >= 2
    assert sample("icos_fl_grpc_calls_under_way", method="Echo") == 0


def test_an_address_in_use_is_said(needed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {address}: the port is taken"):
            make(needed, address)


def test_a_stop_refuses_calls_and_sets_stopping(needed):
    server = make(needed)
    server.start()
    server.stop(0)
    assert server.stopping.is_set()
    with (
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(f"/{SERVICE}/Echo")(b"x", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
