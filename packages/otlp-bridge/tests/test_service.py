"""The service over real gRPC: what an exporter is told, and what is stored by then."""

import gzip
import math
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from icos_fl_otlp_bridge import ListenError, Server, default_config
from icos_fl_timeseries_store import MemoryStore, StoreDamaged, StoreFull, StoreUnavailable
from prometheus_client import REGISTRY

POWER = "scaph_host_power_microwatts"
TOTAL = "scaph_host_memory_total_bytes"
AVAILABLE = "scaph_host_memory_available_bytes"
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def details(error: grpc.RpcError) -> Any:
    status = rpc_status.from_call(error)
    return status.details if status is not None else []


def retry_seconds(error: grpc.RpcError) -> float:
    (detail,) = details(error)
    retry = RetryInfo()
    assert detail.Unpack(retry)
    return retry.retry_delay.ToTimedelta().total_seconds()


# Checklist, gRPC: full success, and an empty request: OK, partial_success unset.
def test_full_success_leaves_partial_success_unset(bridge, export):
    response = bridge.export(export().gauge(POWER, (0, 146_830_000)))
    assert not response.HasField("partial_success")
    assert bridge.rows() == {0: {"power_consumption": 146.83}}


def test_an_empty_request_is_ok(bridge, export):
    empty = export()
    empty.request.Clear()
    assert not bridge.export(empty).HasField("partial_success")
    assert bridge.store.nodes() == []


# Checklist, gRPC: accepts none and gzip.
def test_gzip_is_accepted(bridge, export):
    bridge.export(export().gauge(POWER, (0, 1_000_000)), compression=grpc.Compression.Gzip)
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


# Checklist, gRPC: the size limit holds after decompression, is configurable, 64 MiB recommended;
# over it RESOURCE_EXHAUSTED without RetryInfo.
def test_a_request_over_the_limit_is_resource_exhausted_and_names_both_sizes(run, export):
    bridge = run(max_message_bytes=100_000)
    error = bridge.refusal(export(filler="x" * 200_000).gauge(POWER, (0, 1)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "100000" in error.details()
    assert details(error) == []
    assert bridge.store.nodes() == []


def test_the_limit_holds_after_decompression(run, export):
    bridge = run(max_message_bytes=100_000)
    large = export(filler="x" * 200_000).gauge(POWER, (0, 1))
    error = bridge.refusal(large, compression=grpc.Compression.Gzip)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error) == []
    assert bridge.store.nodes() == []


def test_more_than_grpcs_own_limit_of_4_mib_is_taken(bridge, export):
    bridge.export(export(filler="x" * (8 << 20)).gauge(POWER, (0, 1_000_000)))
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


# Checklist, gRPC: bad data: INVALID_ARGUMENT, with BadRequest.
def test_bytes_that_are_no_request_are_invalid_argument_with_bad_request(bridge):
    call = bridge.channel.unary_unary(EXPORT)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff", timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    (detail,) = details(caught.value)
    assert detail.Is(BadRequest.DESCRIPTOR)
    assert "3 bytes" in caught.value.details()


def test_a_wanted_metric_that_is_no_metric_is_invalid_argument_and_nothing_is_stored(bridge):
    metric = b"\x0a\x1b" + POWER.encode() + b"\xff"
    scope = b"\x12" + bytes([len(metric)]) + metric
    resource = b"\x12" + bytes([len(scope)]) + scope
    with pytest.raises(grpc.RpcError) as caught:
        bridge.channel.unary_unary(EXPORT)(b"\x0a" + bytes([len(resource)]) + resource, timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert bridge.store.nodes() == []


def test_deflate_is_refused(bridge, export):
    large = export(filler="x" * 10_000).gauge(POWER, (0, 1))
    error = bridge.refusal(large, compression=grpc.Compression.Deflate)
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("broken", [b"\x1f\x8b\x08broken", gzip.compress(b"", mtime=0)[:-4]])
def test_broken_gzip_is_invalid_argument(bridge, broken):
    with pytest.raises(grpc.RpcError) as caught:
        bridge.channel.unary_unary(EXPORT)(broken, timeout=20)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


# Checklist, gRPC: a warning: 0 with a message.
def test_a_first_point_without_a_rate_is_a_warning_that_rejects_nothing(run, config, export):
    bridge = run(config("columns:\n  c: {sources: [{terms: [{metric: m, rate: true}]}]}\n"))
    partial = bridge.export(export().sum("m", 2, (0, 1))).partial_success
    assert partial.rejected_data_points == 0
    assert partial.error_message == "first data points of their series, without a rate: 1"


# Checklist, gRPC: a passing fault is never UNKNOWN or INTERNAL.
@pytest.mark.parametrize("fault", [ValueError("odd"), KeyError("x"), MemoryError()])
def test_an_unexpected_error_is_unavailable_with_a_delay(bridge, export, store, fault):
    def fail(*_: Any) -> Any:
        raise fault

    store.create_window = fail
    error = bridge.refusal(export().gauge(POWER, (0, 1_000_000)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert retry_seconds(error) > 0


# Checklist, gRPC: store down or overloaded (test_overload.py): UNAVAILABLE, with RetryInfo.
def test_a_store_that_does_not_answer_is_unavailable_with_a_delay(bridge, export, store):
    store.answers = False
    error = bridge.refusal(export().gauge(POWER, (0, 1_000_000)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "the store at nowhere:1 does not answer" in error.details()
    assert retry_seconds(error) > 0


@pytest.mark.parametrize(
    ("fault", "reason"), [(StoreDamaged("a: broken"), "damaged"), (StoreFull("no room"), "full")]
)
def test_a_window_that_cannot_be_written_is_told_and_other_nodes_go_on(
    bridge, export, store, fault, reason
):
    def errors() -> float:
        found = REGISTRY.get_sample_value("icos_fl_bridge_store_errors_total", {"reason": reason})
        return found or 0.0

    def fail(*_: Any) -> Any:
        raise fault

    window = store.create_window("a")
    append, window.append = window.append, fail
    before = errors()
    error = bridge.refusal(export("a").gauge(POWER, (0, 1_000_000)))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, str(fault))
    assert retry_seconds(error) > 0
    assert errors() == before + 1
    answer = bridge.health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    bridge.export(export("b").gauge(POWER, (0, 1_000_000)))
    window.append = append
    bridge.export(export("a").gauge(POWER, (0, 1_000_000)))
    assert bridge.rows("a") == bridge.rows("b") == {0: {"power_consumption": 1.0}}


def test_of_one_request_the_nodes_beside_a_damaged_window_are_stored(bridge, export, store):
    def fail(*_: Any) -> Any:
        raise StoreDamaged("a: broken")

    store.create_window("a").append = fail
    batch = export("a").gauge(POWER, (0, 1)).resource("b").gauge(POWER, (0, 1_000_000))
    assert bridge.refusal(batch).details() == "a: broken"
    assert bridge.rows("b") == {0: {"power_consumption": 1.0}}


def test_what_was_refused_for_now_is_stored_when_it_comes_again(bridge, export, store):
    batch = export().gauge(POWER, (0, 1_000_000))
    store.answers = False
    bridge.refusal(batch)
    store.answers = True
    bridge.export(batch)
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


def test_health_follows_the_store(bridge, store):
    store.answers = False
    bridge.wait_for_health("NOT_SERVING")
    store.answers = True
    bridge.wait_for_health("SERVING")


def test_before_the_store_answers_health_and_exports_say_so(run, export):
    there = threading.Event()

    def connect() -> MemoryStore:
        if not there.is_set():
            raise StoreUnavailable("no store yet")
        return MemoryStore()

    bridge = run(ready=False, connect=connect)
    answer = bridge.health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    error = bridge.refusal(export().gauge(POWER, (0, 1)))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert retry_seconds(error) > 0
    there.set()
    bridge.wait_for_health("SERVING")
    bridge.export(export().gauge(POWER, (0, 1)))


def test_an_unexpected_error_of_the_store_does_not_freeze_health(run, export):
    there = threading.Event()

    def connect() -> MemoryStore:
        if not there.is_set():
            raise ValueError("not an error that a store should raise")
        return MemoryStore()

    bridge = run(ready=False, connect=connect)
    assert bridge.refusal(export().gauge(POWER, (0, 1))).code() == grpc.StatusCode.UNAVAILABLE
    there.set()
    bridge.wait_for_health("SERVING")
    bridge.export(export().gauge(POWER, (0, 1)))


def test_a_stopping_bridge_ends_the_exports_in_hand_and_is_not_serving(run, export, store):
    bridge = run()
    watch = bridge.health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    appending, go_on = threading.Event(), threading.Event()
    window = store.create_window("a")
    append = window.append

    def slow_append(*args: Any) -> Any:
        appending.set()
        assert go_on.wait(20)
        return append(*args)

    window.append = slow_append
    call = bridge.export_to.Export.future(export().gauge(POWER, (0, 1_000_000)).request, timeout=20)
    assert appending.wait(20)
    stopping = threading.Thread(target=bridge.server.stop, args=(20,))
    stopping.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    go_on.set()
    call.result()
    stopping.join(20)
    assert not stopping.is_alive()
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


# Checklist, gRPC: duplicates are tolerated.
# Checklist, Data: upsert on (series, time): a batch sent twice changes nothing.
def test_a_batch_that_comes_twice_changes_nothing(bridge, export):
    batch = export().gauge(POWER, (0, 1_000_000), (3, 2_000_000))
    bridge.export(batch)
    before = bridge.rows()
    assert not bridge.export(batch).HasField("partial_success")
    assert (
        bridge.rows()
        == before
        == {
            0: {"power_consumption": 1.0},
            3: {"power_consumption": 2.0},
        }
    )


def test_one_batch_sent_by_many_at_once_is_one_row_a_timestamp(bridge, export):
    batch = export().gauge(POWER, *((3 * i, i * 1_000_000) for i in range(100)))
    calls = [bridge.export_to.Export.future(batch.request, timeout=20) for _ in range(8)]
    for call in calls:
        assert not call.result().HasField("partial_success")
    assert bridge.column("power_consumption") == {3.0 * i: float(i) for i in range(100)}


# Checklist, gRPC: partly accepted: OK, rejected_data_points = N and an English error_message, kept
# short enough for a response of 4 MiB.
def test_refused_points_are_counted_by_reason_and_the_others_stored(bridge, export):
    batch = (
        export()
        .gauge(POWER, (0, 1_000_000), (3, float("nan")), (6, None), (9, float("-inf")))
        .resource(None)
        .gauge(POWER, (0, 1), (3, 1))
    )
    partial = bridge.export(batch).partial_success
    assert partial.rejected_data_points == 5
    assert partial.error_message == ("rejected data points: no_node: 2, no_value: 1, non_finite: 2")
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


def test_the_message_is_short_however_many_points_are_refused(bridge, export):
    batch = export()
    for number in range(1_000):
        batch.resource(f"{'long ' * 100}{number}").gauge(POWER, (0, None), (3, math.nan), (6, 1))
    partial = bridge.export(batch).partial_success
    assert partial.rejected_data_points == 3_000
    assert len(partial.error_message) < 200


def test_a_node_that_the_store_refuses_is_counted_and_the_others_are_stored(bridge, export, store):
    create_window = store.create_window

    def strict(node: str, capacity_rows: int) -> Any:
        from icos_fl_timeseries_store import InvalidRows

        if " " in node:
            raise InvalidRows(f"name {node!r}")
        return create_window(node, capacity_rows)

    store.create_window = strict
    batch = export("a b").gauge(POWER, (0, 1), (3, 1)).resource("a").gauge(POWER, (0, 1_000_000))
    partial = bridge.export(batch).partial_success
    assert (partial.rejected_data_points, partial.error_message) == (
        2,
        "rejected data points: invalid_node: 2",
    )
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


def test_nodes_beyond_the_limit_are_rejected_and_the_others_go_on(run, config, export):
    bridge = run(config("nodes_max: 2\ncolumns:\n  c: {sources: [{terms: [{metric: m}]}]}\n"))
    batch = export().gauge("m", (0, 1.0)).resource("b").gauge("m", (0, 1.0))
    batch.resource("c").gauge("m", (0, 1.0), (3, 1.0))
    partial = bridge.export(batch).partial_success
    assert partial.error_message == "rejected data points: too_many_nodes: 2"
    assert not bridge.export(export("b").gauge("m", (3, 1.0))).HasField("partial_success")
    assert bridge.store.nodes() == ["a", "b"]


def test_a_node_gets_no_column_that_it_never_reports(bridge, export):
    bridge.export(export().gauge(POWER, (0, 1_000_000)))
    window = bridge.store.window("a")
    assert window.info().columns == ("power_consumption",)
    bridge.export(export().gauge(TOTAL, (0, 2 << 20)).gauge(AVAILABLE, (0, 1 << 20)))
    assert window.info().columns == ("power_consumption", "memory_usage")
    assert window.info().units == ("W", "MiB")


def test_health_and_reflection_take_gzip_too(bridge):
    # The server does not inflate, and gRPC compresses no message that would grow.
    service = "opentelemetry.proto.collector.metrics.v1.MetricsService"
    gzipped = grpc.Compression.Gzip
    check = health_pb2.HealthCheckRequest(service=service)
    answer = bridge.health.Check(check, timeout=20, compression=gzipped)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(bridge.channel)
    ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
    (found,) = stub.ServerReflectionInfo(iter([ask]), timeout=20, compression=gzipped)
    assert found.HasField("file_descriptor_response")


def test_reflection_lists_the_service(bridge):
    stub = reflection_pb2_grpc.ServerReflectionStub(bridge.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=20)
    names = [service.name for service in answer.list_services_response.service]
    assert "opentelemetry.proto.collector.metrics.v1.MetricsService" in names


def test_a_port_that_is_taken_is_said(bridge):
    address = f"127.0.0.1:{bridge.server.port}"
    with pytest.raises(ListenError, match=f"cannot listen on {address}: the port is taken"):
        Server(default_config(), MemoryStore, address)


# Checklist, Data: late points inside the window are kept in order; older ones are counted and said.
def test_case_5_late_points_take_their_place_in_order(bridge, export):
    minutes = [(180, 3_000_000), (240, 4_000_000), (300, 5_000_000)]  # 10:03 to 10:05
    bridge.export(export().gauge(POWER, *minutes))
    for minute in (1, 2, 6):
        late = export().gauge(POWER, (60 * minute, minute * 1_000_000))
        assert not bridge.export(late).HasField("partial_success")
    assert list(bridge.column("power_consumption").items()) == [
        (60.0 * minute, float(minute)) for minute in range(1, 7)
    ]


def test_case_5_points_older_than_a_full_window_are_rejected_as_too_old(
    run: Callable[..., Any], config, export
):
    bridge = run(
        config(
            "window_rows: 3\n"
            "columns:\n  power: {sources: [{terms: [{metric: p}]}]}\n"
            "  load: {sources: [{terms: [{metric: q}]}]}\n"
        )
    )
    bridge.export(export().gauge("p", (180, 3.0), (240, 4.0), (300, 5.0)))
    batch = export().gauge("p", (60, 1.0), (120, 2.0), (360, 6.0)).gauge("q", (60, 1.0))
    partial = bridge.export(batch).partial_success
    assert partial.rejected_data_points == 3
    assert partial.error_message == "rejected data points: too_old: 3"
    assert bridge.column("power") == {240: 4.0, 300: 5.0, 360: 6.0}
