"""Replay against a server that keeps what it is sent, over real gRPC."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_local import replay, traces
from icos_fl_local.traces import POWER_METRIC, Trace, unit_of
from icos_fl_otlp_bridge.config import load_config
from icos_fl_otlp_bridge.rows import Converter
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from ruamel.yaml import YAML


@dataclass
class Refusal:
    """How the server answers one export instead of OK."""

    code: grpc.StatusCode
    details: str = ""
    retry_after_seconds: float | None = None


@dataclass
class Receiver(MetricsServiceServicer):
    """Keeps the requests that it acknowledges."""

    requests: list[pb.ExportMetricsServiceRequest] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    answer: pb.ExportMetricsServiceResponse = field(default_factory=pb.ExportMetricsServiceResponse)
    endpoint: str = ""

    def Export(self, request, context):  # noqa: N802
        if self.refusals:
            refusal = self.refusals.pop(0)
            if refusal.retry_after_seconds is not None:
                detail = Any()
                delay = Duration()
                delay.FromMilliseconds(int(1000 * refusal.retry_after_seconds))
                detail.Pack(RetryInfo(retry_delay=delay))
                status = Status(code=refusal.code.value[0], details=[detail])
                context.set_trailing_metadata(
                    [("grpc-status-details-bin", status.SerializeToString())]
                )
            context.abort(refusal.code, refusal.details)
        self.requests.append(request)
        return self.answer


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(2))
    service = Receiver()
    add_MetricsServiceServicer_to_server(service, server)
    service.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


def trace_of(node: str, times_s: list[int], **columns: list[float]) -> Trace:
    return Trace(
        node=node,
        columns=tuple(columns),
        units=tuple(unit_of(column) for column in columns),
        times_s=np.array(times_s, dtype=np.int64),
        values_tf=np.array(list(columns.values()), dtype=np.float64).T,
    )


def ramp(node: str, rows: int) -> Trace:
    return trace_of(node, list(range(1, rows + 1)), cpu_percent=[float(i) for i in range(rows)])


def send(receiver: Receiver, *traces: Trace) -> list[tuple[str, int, int]]:
    progress: list[tuple[str, int, int]] = []
    replay.send(traces, receiver.endpoint, lambda *step: progress.append(step))
    return progress


def node_of(request: pb.ExportMetricsServiceRequest) -> str:
    (attribute,) = request.resource_metrics[0].resource.attributes
    assert attribute.key == "host.name"
    return attribute.value.string_value


def points_of(receiver: Receiver, metric: str) -> list[tuple[int, int | float]]:
    return [
        (point.time_unix_nano, getattr(point, point.WhichOneof("value")))
        for request in receiver.requests
        for found in request.resource_metrics[0].scope_metrics[0].metrics
        if found.name == metric
        for point in found.gauge.data_points
    ]


def test_power_is_sent_as_scaphandre_sends_it(receiver):
    send(receiver, trace_of("a", [100, 102], power_w=[146.83, 20.0]))
    assert points_of(receiver, "scaph_host_power_microwatts") == [
        (100 * 10**9, 146_830_000),
        (102 * 10**9, 20_000_000),
    ]


def test_other_columns_are_gauges_of_their_own_name_and_unit(receiver):
    send(receiver, trace_of("a", [100, 102], memory_used_mib=[424.5, 434.1]))
    (metric,) = receiver.requests[0].resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("memory_used_mib", "MiB")
    assert points_of(receiver, "memory_used_mib") == [(100 * 10**9, 424.5), (102 * 10**9, 434.1)]


def test_power_finer_than_a_microwatt_keeps_every_digit(receiver):
    send(receiver, trace_of("a", [1, 2], power_w=[0.123456789, 1.0]))
    assert points_of(receiver, "power_w") == [(10**9, 0.123456789), (2 * 10**9, 1.0)]


@given(st.decimals(0, 100_000, places=6))
def test_watts_of_six_decimals_come_back_from_microwatts(watts):
    trace = trace_of("a", [1], power_w=[float(watts)])
    request = replay.request(trace, 0, 1)
    (metric,) = request.resource_metrics[0].scope_metrics[0].metrics
    assert metric.name == POWER_METRIC
    assert metric.gauge.data_points[0].as_int / 1e6 == float(watts)


def test_a_request_carries_sixty_scrapes_of_one_node(receiver):
    send(receiver, ramp("a", 150))
    lengths = [
        len(request.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points)
        for request in receiver.requests
    ]
    assert lengths == [60, 60, 30]
    assert {node_of(request) for request in receiver.requests} == {"a"}


def test_every_row_is_sent_once_in_order(receiver):
    send(receiver, ramp("a", 150))
    expected = [(second * 10**9, second - 1.0) for second in range(1, 151)]
    assert points_of(receiver, "cpu_percent") == expected


def test_windows_fill_side_by_side_whatever_their_lengths(receiver):
    send(receiver, ramp("long", 600), ramp("short", 120))
    order = [(node, len(list(group))) for node, group in groupby(map(node_of, receiver.requests))]
    assert order == [("long", 5), ("short", 1), ("long", 5), ("short", 1)]


def test_progress_tells_what_is_acknowledged(receiver):
    assert send(receiver, ramp("a", 90)) == [("a", 60, 90), ("a", 90, 90)]


def test_an_endpoint_that_is_away_for_a_moment_gets_every_row_once(receiver):
    receiver.refusals = [Refusal(grpc.StatusCode.UNAVAILABLE, "store away")] * 2
    send(receiver, ramp("a", 61))
    assert len(points_of(receiver, "cpu_percent")) == 61


def test_a_full_endpoint_that_says_when_is_asked_again(receiver):
    receiver.refusals = [Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 0.05)]
    send(receiver, ramp("a", 1))
    assert len(receiver.requests) == 1


def test_a_refused_request_ends_the_replay_with_the_endpoints_words(receiver):
    receiver.refusals = [Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no such metric")]
    with pytest.raises(replay.ReplayError) as error:
        send(receiver, ramp("node-a", 1))
    assert str(error.value) == (
        f"{receiver.endpoint} did not take rows of node-a: INVALID_ARGUMENT: no such metric"
    )


def test_refused_points_end_the_replay_with_number_and_reason(receiver):
    receiver.answer.partial_success.rejected_data_points = 3
    receiver.answer.partial_success.error_message = "too old"
    with pytest.raises(replay.ReplayError, match="refused 3 data points of a: too old"):
        send(receiver, ramp("a", 5))


def test_a_warning_without_refused_points_is_no_error(receiver):
    receiver.answer.partial_success.error_message = "a warning"
    assert send(receiver, ramp("a", 5)) == [("a", 5, 5)]


def test_an_endpoint_that_stays_away_ends_the_replay(monkeypatch):
    monkeypatch.setattr(replay, "_GIVE_UP_SECONDS", 0.3)
    with pytest.raises(replay.ReplayError, match=r"127.0.0.1:1 did not take .*UNAVAILABLE"):
        replay.send([ramp("a", 1)], "127.0.0.1:1", lambda *_: None)


def test_shipped_traces_come_out_of_the_bridge_value_by_value(tmp_path):
    shipped = traces.load(traces.SHIPPED)
    with (tmp_path / "bridge.yaml").open("w") as stream:
        YAML().dump(traces.bridge_config(shipped), stream)
    converter = Converter(load_config(tmp_path / "bridge.yaml"))
    for trace in shipped:
        total = len(trace.times_s)
        requests = [
            replay.request(trace, first, min(first + replay.ROWS_PER_REQUEST, total))
            for first in range(0, total, replay.ROWS_PER_REQUEST)
        ]
        rows = [converter.convert(request).rows[trace.node] for request in requests]
        places = [converter.columns.index(traces.column_of(column)) for column in trace.columns]
        times_ns = np.concatenate([found.times_ns_t for found in rows])
        values = np.concatenate([found.values_tf for found in rows])
        assert np.array_equal(times_ns, trace.times_s * 10**9)
        assert np.array_equal(values[:, places], trace.values_tf)
