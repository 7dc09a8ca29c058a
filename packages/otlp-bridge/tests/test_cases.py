"""Inputs that broke neighbouring systems, over every transport."""

import gzip
import threading
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from grpc_status import rpc_status
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

POWER = "scaph_host_power_microwatts"
SECOND = 1_000_000_000
START = 1_699_999_998 * SECOND
MIB = 1 << 20
WAYS = ("grpc", "grpc+gzip", "http", "http+gzip")


def send(bridge: Any, way: str, serialized: bytes) -> tuple[bool, str]:
    """Whether it is OK, and the partial success's or the refusal's message.

    Over gRPC on a connection of its own, as an exporter has.
    """
    if way.startswith("grpc"):
        compression = grpc.Compression.Gzip if way.endswith("gzip") else None
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{bridge.server.port}", options) as channel:
            call = channel.unary_unary(
                "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
                response_deserializer=pb.ExportMetricsServiceResponse.FromString,
            )
            try:
                response: Any = call(serialized, timeout=60, compression=compression)
            except grpc.RpcError as error:
                return _refused(error)
            return True, response.partial_success.error_message
    gzipped = way.endswith("gzip")
    body = gzip.compress(serialized, 1) if gzipped else serialized
    answer = bridge.request(body, content_encoding="gzip" if gzipped else "identity")
    if answer.status == 200:
        return True, answer.response.partial_success.error_message
    assert answer.status == 413
    assert answer.refusal.code == code_pb2.RESOURCE_EXHAUSTED
    return False, answer.refusal.message


def _refused(error: Any) -> tuple[bool, str]:
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)
    assert status is None or not status.details  # no RetryInfo
    return False, error.details()


@pytest.fixture(scope="module")
def scrapes() -> bytes:
    """60 scrapes of a host with 200 processes, as Scaphandre tells them: 8 MB."""
    request = pb.ExportMetricsServiceRequest()
    for scrape in range(60):
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = "a"
        metrics = resource.scope_metrics.add().metrics
        time = START + 3 * scrape * SECOND
        power = metrics.add(name=POWER).gauge.data_points
        power.add(time_unix_nano=time, as_int=scrape * 1_000_000)
        for number in range(6):
            points = metrics.add(name=f"scaph_process_{number}").gauge.data_points
            for process in range(200):
                point = points.add(time_unix_nano=time, as_double=process)
                for key in ("pid", "exe", "cmdline"):
                    text = f"/usr/bin/service-{process}-{key}"
                    point.attributes.add(key=key).value.string_value = text
    return request.SerializeToString()


@pytest.mark.parametrize("way", WAYS)
def test_case_3_60_scrapes_of_200_processes_are_stored(bridge, scrapes, way):
    assert len(scrapes) > 8_000_000
    assert send(bridge, way, scrapes) == (True, "")
    assert bridge.column("power_consumption") == {3.0 * n: float(n) for n in range(60)}


@pytest.mark.parametrize("way", WAYS)
def test_case_3_65_mib_are_refused_with_size_and_limit_and_hold_nobody_up(bridge, export, way):
    filler = export(filler="x" * (65 * MIB)).request.SerializeToString()
    refused: list[tuple[bool, str]] = []
    sending = threading.Thread(target=lambda: refused.append(send(bridge, way, filler)))
    sending.start()
    for seconds in range(0, 30, 3):
        bridge.export(export().gauge(POWER, (seconds, 1_000_000)))
    sending.join(60)
    ((taken, message),) = refused
    assert not taken
    assert str(len(filler)) in message
    assert str(64 * MIB) in message
    assert len(bridge.rows()) == 10


RATE = "columns:\n  c: {sources: [{terms: [{metric: m, rate: true}]}]}\n"
UNSPECIFIED, DELTA, CUMULATIVE = 0, 1, 2


def since(seconds: float) -> dict[str, int]:
    return {"start_time_unix_nano": START + round(seconds * SECOND)}


def test_case_6_deltas_out_of_order_then_cumulative_then_unspecified(run, config, export):
    bridge = run(config(RATE))
    bridge.export(export().sum("m", DELTA, (6, 12, {}, since(3)), monotonic=True))
    bridge.export(export().sum("m", DELTA, (3, 6, {}, since(0)), monotonic=True))
    big = 10**12
    for seconds in (9, 12):
        point = (seconds, big + seconds, {}, since(-1000))
        bridge.export(export().sum("m", CUMULATIVE, point, monotonic=True))
    partial = bridge.export(export().sum("m", UNSPECIFIED, (15, 1), (18, 2))).partial_success
    assert partial.rejected_data_points == 2
    assert partial.error_message == "rejected data points: unspecified_temporality: 2"
    assert bridge.column("c") == {3: 2.0, 6: 4.0, 12: 1.0}


def mixed(export: Any) -> Any:
    exponential, summary = Metric(name="e"), Metric(name="s")
    exponential.exponential_histogram.aggregation_temporality = DELTA
    exponential.exponential_histogram.data_points.add(
        time_unix_nano=START, count=2, zero_count=2, sum=5
    )
    point = summary.summary.data_points.add(time_unix_nano=START, count=4, sum=8)
    point.quantile_values.add(quantile=0.99, value=7.5)
    return export().gauge("g", (0, 1.5)).metric(exponential).metric(summary)


@pytest.mark.parametrize("content_type", ["application/x-protobuf", "application/json"])
def test_case_7_a_gauge_is_stored_and_the_unsupported_are_told(run, config, export, content_type):
    terms = "{metric: g}", "{metric: e}", "{metric: s}"
    columns = (f"  c{n}: {{sources: [{{terms: [{t}]}}]}}\n" for n, t in enumerate(terms))
    bridge = run(config("columns:\n" + "".join(columns)))
    partial = bridge.post(mixed(export), content_type).response.partial_success
    assert partial.rejected_data_points == 2
    assert partial.error_message == "rejected data points: unsupported_type: 2"
    assert bridge.rows() == {0: {"c0": 1.5}}


def test_case_7_distributions_fill_their_configured_columns(run, config, export):
    terms = (
        "{metric: g}",
        "{metric: e, take: mean}",
        "{metric: s, take: quantile, quantile: 0.99}",
    )
    columns = (f"  c{n}: {{sources: [{{terms: [{t}]}}]}}\n" for n, t in enumerate(terms))
    bridge = run(config("columns:\n" + "".join(columns)))
    assert not bridge.export(mixed(export)).HasField("partial_success")
    assert bridge.rows() == {0: {"c0": 1.5, "c1": 2.5, "c2": 7.5}}


def test_case_7_bucket_counts_that_are_not_bounds_plus_1_are_invalid(run, config, export):
    bridge = run(config("columns:\n  c: {sources: [{terms: [{metric: h, take: count}]}]}\n"))
    histogram = Metric(name="h")
    histogram.histogram.aggregation_temporality = CUMULATIVE
    histogram.histogram.data_points.add(
        time_unix_nano=START, count=3, bucket_counts=[1, 2], explicit_bounds=[1, 2]
    )
    partial = bridge.export(export().metric(histogram)).partial_success
    assert partial.error_message == "rejected data points: invalid_histogram: 1"
