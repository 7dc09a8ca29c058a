"""More than the bridge can hold: what is refused, how, and that it goes on."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from icos_fl_otlp_bridge.memory import DECODED_BYTES_MAX
from prometheus_client import REGISTRY

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
POWER = "scaph_host_power_microwatts"


class Gate:
    """Holds up every append of node ``a`` until it is opened."""

    def __init__(self, store: Any) -> None:
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)
        window = store.create_window("a")
        append = window.append

        def gated(*args: Any) -> Any:
            self.entered.release()
            assert self._open.wait(60)
            return append(*args)

        window.append = gated

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(store: Any) -> Iterator[Gate]:
    gate = Gate(store)
    yield gate
    gate.open()


def in_hand(bridge: Any) -> int:
    count: int = bridge.server._receiver.exports.in_hand
    return count


def fill(bridge: Any, export: Any, gate: Gate, until: Any) -> list[Any]:
    """One export in hand and one that waits, where no more may."""
    calls = [bridge.export_to.Export.future(export().gauge(POWER, (0, 1_000_000)).request)]
    assert gate.entered.acquire(timeout=20)
    calls.append(bridge.export_to.Export.future(export().gauge(POWER, (3, 1_000_000)).request))
    until(lambda: in_hand(bridge) == 2)
    return calls


@pytest.fixture
def full(run: Callable[..., Any], export: Any, gate: Gate, until: Any) -> tuple[Any, list[Any]]:
    bridge = run(max_concurrent_exports=1, max_waiting_exports=1)
    return bridge, fill(bridge, export, gate, until)


def test_too_many_calls_are_unavailable_with_a_delay(full, export, gate):
    bridge, calls = full
    error = bridge.refusal(export().gauge(POWER, (6, 1_000_000)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "2 exports are in hand, the limit is 2"
    (detail,) = rpc_status.from_call(error).details
    assert detail.Is(RetryInfo.DESCRIPTOR)
    gate.open()
    for call in calls:
        call.result(20)
    bridge.export(export().gauge(POWER, (6, 1_000_000)))
    assert sorted(bridge.rows()) == [0, 3, 6]


def test_http_and_grpc_share_the_limit(full, export, gate):
    bridge, _ = full
    answer = bridge.post(export().gauge(POWER, (6, 1)))
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert answer.refusal.message == "2 exports are in hand, the limit is 2"


def test_health_answers_while_exports_wait(full):
    bridge, _ = full
    answer = bridge.health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_large_message_is_refused_before_it_is_read(full, export):
    bridge, _ = full
    error = bridge.refusal(export(filler="x" * (8 << 20)).gauge(POWER, (6, 1)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


def test_a_call_that_gave_up_waiting_leaves_its_place(full, export, gate, until):
    bridge, calls = full
    calls[1].cancel()
    gate.open()
    calls[0].result(20)
    bridge.export(export().gauge(POWER, (6, 1_000_000)))
    until(lambda: in_hand(bridge) == 0)


def test_a_body_that_never_ends_gives_its_worker_back(run, export, monkeypatch):
    from icos_fl_otlp_bridge import http_app

    monkeypatch.setattr(http_app, "REQUEST_SECONDS_MAX", 0.2)
    bridge = run(max_concurrent_exports=1)
    with socket.create_connection(("127.0.0.1", bridge.server.http_port), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/metrics HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
            b"content-length: 100\r\n\r\nsome"
        )
        assert slow.recv(1000).startswith(b"HTTP/1.1 503 ")
    monkeypatch.undo()
    assert bridge.post(export().gauge(POWER, (0, 1))).status == 200


def test_a_call_that_sends_no_message_gives_its_worker_back(run, export, monkeypatch):
    from icos_fl_otlp_bridge import server, servicer

    monkeypatch.setattr(servicer, "REQUEST_SECONDS_MAX", 1.0)
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.1)
    bridge = run(max_concurrent_exports=1)
    call = bridge.channel.stream_unary(EXPORT)
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    silent = call.future(nothing(), timeout=60)
    bridge.export(export().gauge(POWER, (0, 1_000_000)))
    assert silent.code() == grpc.StatusCode.CANCELLED  # an exporter sends again
    never.set()


def test_a_call_that_ends_without_a_message_is_no_request(bridge):
    with pytest.raises(grpc.RpcError) as caught:
        bridge.channel.stream_unary(EXPORT)(iter([]), timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_self_metrics_count_what_was_taken_refused_and_rejected(bridge, export, store):
    def values() -> dict[str, float]:
        samples: dict[str, tuple[str, dict[str, str]]] = {
            "taken": ("points_taken", {}),
            "rejected": ("points_rejected", {"reason": "no_value"}),
            "rows": ("rows", {}),
            "refused": ("exports_refused", {"transport": "grpc", "code": "UNAVAILABLE"}),
            "store errors": ("store_errors", {"reason": "unavailable"}),
        }
        return {
            name: REGISTRY.get_sample_value(f"icos_fl_bridge_{sample}_total", labels) or 0
            for name, (sample, labels) in samples.items()
        }

    before = values()
    bridge.export(export().gauge(POWER, (0, 1_000_000), (3, 1), (6, None)))
    store.answers = False
    bridge.refusal(export().gauge(POWER, (0, 1)))
    change = {name: value - before[name] for name, value in values().items()}
    assert change == {"taken": 2, "rejected": 1, "rows": 2, "refused": 1, "store errors": 1}


def test_ordinary_exports_do_not_wait_for_large_ones_and_few_of_these_wait(run, export, until):
    bridge = run(max_concurrent_exports=4)
    turns = bridge.server._receiver.turns
    large = export().gauge(POWER, *((0, 1_000_000) for _ in range(20_000)))
    ordinary = export().gauge(POWER, *((3 * i, 1_000_000) for i in range(60)))
    ordinary.gauge("other", *((0, 1.0, {"pid": str(i)}) for i in range(100_000)))  # 5 MB
    with turns.of(DECODED_BYTES_MAX):
        waiting = bridge.export_to.Export.future(large.request, timeout=60)
        until(lambda: turns.large == 2)
        error = bridge.refusal(large)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "2 large requests are in hand, which is the limit"
        assert bridge.post(large).status == 503
        bridge.export(ordinary)
        assert not waiting.done()
    waiting.result()
    assert len(bridge.rows()) == 60
