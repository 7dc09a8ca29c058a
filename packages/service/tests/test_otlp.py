"""Prometheus' metrics over OTLP: what becomes of each kind, and a real export."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import grpc
import pytest
from icos_fl_service.otlp import Export, metrics_of
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.sdk.metrics import export
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

START, NOW = 1_000, 2_000


def of(registry: CollectorRegistry) -> dict[str, export.Metric]:
    return {metric.name: metric for metric in metrics_of(registry.collect(), START, NOW)}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_counter_is_a_monotonic_sum_without_total(registry):
    rows = Counter("rows", "Rows that came", ["result"], registry=registry)
    rows.labels("added").inc(3)
    rows.labels("merged").inc()
    data = of(registry)["rows"].data
    assert data.is_monotonic
    assert data.aggregation_temporality is export.AggregationTemporality.CUMULATIVE
    assert [(p.attributes, p.value) for p in data.data_points] == [
        ({"result": "added"}, 3),
        ({"result": "merged"}, 1),
    ]
    assert {(p.start_time_unix_nano, p.time_unix_nano) for p in data.data_points} == {(START, NOW)}


def test_a_gauge_is_a_gauge(registry):
    Gauge("ready", "Is it?", registry=registry).set(0.5)
    (point,) = of(registry)["ready"].data.data_points
    assert (point.value, point.time_unix_nano) == (0.5, NOW)


def test_a_histogram_counts_each_value_in_one_bucket(registry):
    seconds = Histogram(
        "call_seconds", "Time", ["call"], buckets=(0.1, 1), registry=registry
    ).labels("read")
    for value in (0.05, 0.1, 0.5, 7):
        seconds.observe(value)
    metric = of(registry)["call_seconds"]
    (point,) = metric.data.data_points
    # A bound belongs to the bucket below it, in both formats.
    assert list(point.explicit_bounds) == [0.1, 1]
    assert list(point.bucket_counts) == [2, 1, 1]
    assert (point.count, point.sum) == (4, pytest.approx(7.65))
    assert (point.attributes, metric.unit) == ({"call": "read"}, "s")


def test_a_kind_that_has_no_counterpart_is_left_out(registry):
    Summary("time", "Time", registry=registry).observe(1)
    assert of(registry) == {}


class Receiver(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what exporters send."""

    def __init__(self) -> None:
        self.requests: SimpleQueue[metrics_service_pb2.ExportMetricsServiceRequest] = SimpleQueue()

    def Export(self, request, context):  # noqa: N802
        self.requests.put(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextlib.contextmanager
def receiver():
    server = grpc.server(ThreadPoolExecutor(1))
    found = Receiver()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield found.requests, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_what_there_is_at_the_start_and_at_the_end_arrives_over_grpc(registry):
    counter = Counter("rows", "Rows that came", registry=registry)
    Histogram("call_seconds", "Time", buckets=(1,), registry=registry).observe(0.5)
    with receiver() as (requests, endpoint):
        export = Export(registry, endpoint, "icos-fl-service")
        begun = requests.get(timeout=10)
        counter.inc(3)
        export.close()
        request = requests.get(timeout=10)
    assert begun.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0].as_double == 0
    (resource,) = request.resource_metrics
    names = {attribute.key: attribute.value for attribute in resource.resource.attributes}
    assert names["service.name"].string_value == "icos-fl-service"
    rows, seconds = resource.scope_metrics[0].metrics
    assert (rows.name, rows.sum.data_points[0].as_double) == ("rows", 3)
    (point,) = seconds.histogram.data_points
    assert list(point.bucket_counts) == [1, 0]
    assert not point.HasField("min")
