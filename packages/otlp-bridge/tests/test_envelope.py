"""What is left out before a request is parsed, and that nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_otlp_bridge import envelope
from icos_fl_otlp_bridge.errors import TooLarge, Undecodable
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

NAMES = st.sampled_from(["wanted", "also wanted", "other", ""])
WANTED = frozenset({"wanted", "also wanted"})


def request_of(resources: list[list[list[str]]]) -> ExportMetricsServiceRequest:
    """Resources of scopes of metrics' names, each with what OTLP may say about it."""
    request = ExportMetricsServiceRequest()
    for number, scopes in enumerate(resources):
        resource = request.resource_metrics.add(schema_url="https://resource.example")
        resource.resource.attributes.add(key="host.name").value.string_value = f"node-{number}"
        resource.resource.dropped_attributes_count = 7
        for names in scopes:
            scope = resource.scope_metrics.add(schema_url="https://scope.example")
            scope.scope.name = f"scope-{number}"
            for name in names:
                metric = scope.metrics.add(name=name, description="d", unit="1")
                metric.sum.aggregation_temporality = 2  # type: ignore[assignment]
                metric.sum.is_monotonic = True
                point = metric.sum.data_points.add(time_unix_nano=5, as_int=-3, flags=2)
                point.attributes.add(key="cpu").value.int_value = number
                point.exemplars.add(span_id=b"12345678", as_double=0.5)
    return request


@given(st.lists(st.lists(st.lists(NAMES, max_size=5), max_size=3), max_size=3))
def test_the_wanted_metrics_and_all_about_them_stay_as_they_were(resources):
    expected = request_of([[[n for n in s if n in WANTED] for s in r] for r in resources])
    assert envelope.parse(request_of(resources).SerializeToString(), WANTED) == expected


@pytest.mark.parametrize("serialized", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x03\x1a\x01\xfe"])
def test_bytes_that_are_no_request_are_undecodable(serialized):
    with pytest.raises(Undecodable):
        envelope.parse(serialized, WANTED)


def broken(name: bytes) -> bytes:
    """A request whose one metric has a gauge of one byte that is no gauge."""
    metric = b"\x0a" + bytes([len(name)]) + name + b"\x2a\x01\xff"
    scope = b"\x12" + bytes([len(metric)]) + metric
    resource = b"\x12" + bytes([len(scope)]) + scope
    return b"\x0a" + bytes([len(resource)]) + resource


def test_a_wanted_metric_that_cannot_be_parsed_is_undecodable():
    with pytest.raises(Undecodable):
        envelope.parse(broken(b"wanted"), WANTED)


def test_a_metric_that_nobody_wants_is_not_looked_into():
    (resource,) = envelope.parse(broken(b"other"), WANTED).resource_metrics
    assert [list(scope.metrics) for scope in resource.scope_metrics] == [[]]


@pytest.mark.parametrize("parts", ["resources", "scopes", "metrics"])
def test_more_parts_than_the_limit_are_too_large(parts, monkeypatch):
    monkeypatch.setattr(envelope, "PARTS_MAX", 3)
    shapes = {"resources": [[], [], [], []], "scopes": [[[], [], []]], "metrics": [[["other"] * 2]]}
    with pytest.raises(TooLarge, match="has 4 or more resources, scopes and metrics"):
        envelope.parse(request_of(shapes[parts]).SerializeToString(), WANTED)
