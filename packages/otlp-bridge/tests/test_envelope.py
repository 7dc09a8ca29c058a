"""What is left out before a request is parsed, that nothing else is, and what the rest may take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_otlp_bridge import envelope
from icos_fl_otlp_bridge.errors import TooLarge, Undecodable
from icos_fl_otlp_bridge.memory import DECODED_BYTES_MAX, SMALL_BYTES
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

NAMES = st.sampled_from(["wanted", "also wanted", "other", "", "long " * 40])
WANTED = frozenset({"wanted", "also wanted"})


def request_of(resources: list[list[list[str]]]) -> ExportMetricsServiceRequest:
    """Resources of scopes of metrics' names, each with what a row may need to know about it."""
    request = ExportMetricsServiceRequest()
    for number, scopes in enumerate(resources):
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = f"node-{number}"
        resource.resource.dropped_attributes_count = 7
        for names in scopes:
            scope = resource.scope_metrics.add()
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


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


@given(st.binary(max_size=300), st.integers(5, 1000), st.integers(0, 2**64 - 1))
def test_unknown_fields_change_nothing(payload, number, value):
    numbers = varint(number << 3) + varint(value) + varint(number << 3 | 1) + bytes(8)
    unknown = field(number, payload) + numbers + varint(number << 3 | 5) + bytes(4)
    expected = request_of([[["wanted"]]])
    (resource,) = expected.resource_metrics
    (scope,) = resource.scope_metrics
    scopes = field(2, unknown + scope.SerializeToString() + unknown)
    resources = field(1, unknown + scopes + field(1, resource.resource.SerializeToString()))
    assert envelope.parse(unknown + resources + unknown, WANTED) == expected


@pytest.mark.parametrize(
    "serialized",
    [
        b"\xff\xff\xff",
        b"\x0a\x05ab",  # ends too early
        b"\x0a\x02\x12\x05",  # a scope that is longer than its resource
        b"\x0a\x02\x08\x80\x0a\x00",  # a number that ends in the next resource
        b"\x0a\x03\x09ab",  # 8 bytes, of which 2 are there
        b"\x0a\x03\x0dab",  # 4 bytes
        b"\x02\x00",  # field 0
        b"\x0b\x0c",  # a group
        b"\x0a" + b"\xff" * 10,  # a length without end
        b"\x0a\x04\x0a\x02\x0a\x05",  # an attribute that is longer than its resource
    ],
    ids=bytes.hex,
)
def test_bytes_that_are_no_request_are_undecodable(serialized):
    with pytest.raises(Undecodable):
        envelope.parse(serialized, WANTED)


def of(metric: bytes) -> bytes:
    """A request of one metric."""
    return field(1, field(2, field(2, metric)))


def broken(name: bytes) -> bytes:
    """A request whose one metric has a gauge of one byte that is no gauge."""
    return of(field(1, name) + b"\x2a\x01\xff")


def test_a_wanted_metric_that_cannot_be_parsed_is_undecodable():
    with pytest.raises(Undecodable):
        envelope.parse(broken(b"wanted"), WANTED)


def test_a_metric_that_nobody_wants_is_not_looked_into():
    (resource,) = envelope.parse(broken(b"other"), WANTED).resource_metrics
    assert [list(scope.metrics) for scope in resource.scope_metrics] == [[]]


def test_a_name_need_not_come_first():
    metric = b"\x12\x01d" + field(1, b"wanted")
    (resource,) = envelope.parse(of(metric), WANTED).resource_metrics
    assert [metric.description for metric in resource.scope_metrics[0].metrics] == ["d"]


EMPTY = b"\x0a\x00" * 3_000_000
VALUES = field(5, EMPTY)  # an array of empty values
MANY = {
    "resources": EMPTY,
    "attributes of a resource": field(1, field(1, EMPTY)),
    "scopes": field(1, b"\x12\x00" * 3_000_000),
    "metrics": field(1, field(2, b"\x12\x00" * 3_000_000)),
    "attributes of a scope": field(1, field(2, field(1, b"\x1a\x00" * 3_000_000))),
    "points": of(field(1, b"wanted") + field(5, EMPTY)),
    "attributes of a point": of(field(1, b"wanted") + field(5, field(1, b"\x3a\x00" * 3_000_000))),
    "values of an attribute": field(1, field(1, field(1, field(2, VALUES)))),
    "buckets": of(
        field(1, b"wanted") + field(10, field(1, field(8, field(2, b"\x01" * 20_000_000))))
    ),
}


@pytest.mark.parametrize("what", MANY)
def test_what_would_take_too_much_is_too_large(what):
    with pytest.raises(TooLarge, match=f"over the limit of {DECODED_BYTES_MAX}"):
        envelope.decoded_bytes(MANY[what], WANTED)


def test_millions_of_points_that_nobody_wants_take_little():
    assert envelope.decoded_bytes(of(field(1, b"other") + field(5, EMPTY)), WANTED) <= SMALL_BYTES
