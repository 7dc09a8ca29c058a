"""Whatever comes, the answer is one that an exporter understands, and nothing false is stored."""

import gzip
import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_otlp_bridge import envelope, json_request
from icos_fl_otlp_bridge.bridge import Bridge, Outcome
from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.errors import TooLarge, Undecodable
from icos_fl_otlp_bridge.inflate import gunzip
from icos_fl_timeseries_store import MemoryStore
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

SECOND = 1_000_000_000
START = 1_699_999_998 * SECOND
TAKES = ("value", "count", "sum", "mean", "quantile")


def term(take: str, rate: bool) -> dict[str, Any]:
    quantile = {"quantile": 0.5} if take == "quantile" else {}
    return {"metric": "m", "take": take, "rate": rate, **quantile}


CONFIG = BridgeConfig.model_validate(
    {
        "columns": {
            f"{take}{'_rate' if rate else ''}": {"sources": [{"terms": [term(take, rate)]}]}
            for take in TAKES
            for rate in (False, True)
            if not (rate and take in ("mean", "quantile"))
        }
    }
)

WANTED = frozenset({"m"})

numbers = st.floats() | st.sampled_from([0.0, 1.0, 1e308, -1e308])
counts = st.integers(0, 5) | st.sampled_from([2**63, 2**64 - 1])
times = st.integers(0, 60).map(lambda s: START + s * SECOND) | st.sampled_from(
    [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
)


@st.composite
def points(draw: Any, kind: str) -> dict[str, Any]:
    point: dict[str, Any] = {
        "time_unix_nano": draw(times),
        "start_time_unix_nano": draw(times),
        "flags": draw(st.sampled_from([0, 1, 2, 3])),
    }
    if kind in ("gauge", "sum"):
        value = draw(st.none() | numbers | st.integers(-(2**63), 2**63 - 1))
        if value is not None:
            point["as_int" if isinstance(value, int) else "as_double"] = value
        return point
    point |= {"count": draw(counts), "sum": draw(numbers)}
    if kind == "histogram":
        point["bucket_counts"] = draw(st.lists(counts, max_size=4))
        point["explicit_bounds"] = draw(st.lists(numbers, max_size=3))
    elif kind == "exponential_histogram":
        point["scale"] = draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 5))
        point["zero_count"] = draw(counts)
        for side in ("positive", "negative"):
            offset = draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 5))
            buckets = draw(st.lists(counts, max_size=3))
            point[side] = {"offset": offset, "bucket_counts": buckets}
    else:
        pairs = st.fixed_dictionaries({"quantile": numbers, "value": numbers})
        point["quantile_values"] = draw(st.lists(pairs, max_size=2))
    return point


@st.composite
def requests(draw: Any) -> ExportMetricsServiceRequest:
    request = ExportMetricsServiceRequest()
    for node in draw(st.lists(st.sampled_from(["a", "b", "", None, "no name"]), max_size=3)):
        resource = request.resource_metrics.add()
        if node is not None:
            resource.resource.attributes.add(key="host.name").value.string_value = node
        scope = resource.scope_metrics.add()
        kinds = ["gauge", "sum", "histogram", "exponential_histogram", "summary"]
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=3)):
            data: dict[str, Any] = {"data_points": draw(st.lists(points(kind), max_size=4))}
            if kind not in ("gauge", "summary"):
                data["aggregation_temporality"] = draw(st.sampled_from([0, 1, 2, 3]))
            if kind == "sum":
                data["is_monotonic"] = draw(st.booleans())
            scope.metrics.append(Metric(name=draw(st.sampled_from(["m", "other"])), **{kind: data}))
    return request


def wanted_points(request: ExportMetricsServiceRequest) -> int:
    """Points of the configured metric, but for those that say that there is nothing."""
    return sum(
        not point.flags & 1
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "m" and metric.WhichOneof("data")
        for point in getattr(metric, metric.WhichOneof("data")).data_points
    )


def export(bridge: Bridge, request: ExportMetricsServiceRequest) -> Outcome:
    return bridge.store(bridge.convert(request))


def stored(store: MemoryStore) -> dict[str, Any]:
    rows = {node: store.window(node).read() for node in store.nodes()}
    return {
        node: (of.columns, of.times_ns_t.tolist(), of.values_tf.tobytes())
        for node, of in rows.items()
    }


@settings(max_examples=150)
@given(requests())
def test_every_point_is_taken_or_rejected_and_only_finite_values_are_stored(request_):
    store = MemoryStore()
    outcome = export(Bridge(CONFIG, store), request_)
    # A distribution in which nothing was observed is neither.
    assert outcome.points + outcome.rejected.total() <= wanted_points(request_)
    if not outcome.rejected and not outcome.without_rate:
        assert bool(outcome.rows) == bool(outcome.points)
    for node in store.nodes():
        rows = store.window(node).read()
        assert not any(math.isinf(value) for value in rows.values_tf.flat)


@settings(max_examples=100)
@given(requests())
def test_any_request_that_comes_twice_changes_nothing(request_):
    store = MemoryStore()
    bridge = Bridge(CONFIG, store)
    first = export(bridge, request_)
    before = stored(store)
    second = export(bridge, request_)
    assert stored(store) == before
    assert second.rejected == first.rejected


@settings(max_examples=100)
@given(requests())
def test_protobuf_and_json_say_the_same(request_):
    text = json.dumps(json_format.MessageToDict(request_, use_integers_for_enums=True)).encode()
    from_json, from_protobuf = MemoryStore(), MemoryStore()
    told = [
        export(Bridge(CONFIG, from_json), json_request.parse(text, WANTED)),
        export(Bridge(CONFIG, from_protobuf), envelope.parse(request_.SerializeToString(), WANTED)),
    ]
    assert told[0] == told[1]
    assert stored(from_json) == stored(from_protobuf)


@settings(max_examples=200)
@given(requests().map(lambda r: bytearray(r.SerializeToString())), st.data())
def test_damaged_bytes_are_a_request_or_undecodable(serialized, data):
    for _ in range(data.draw(st.integers(1, 3))):
        if serialized:
            place = data.draw(st.integers(0, len(serialized) - 1))
            serialized[place] = data.draw(st.integers(0, 255))
    try:
        request = envelope.parse(bytes(serialized), WANTED)
    except Undecodable:
        return
    export(Bridge(CONFIG, MemoryStore()), request)


KEYS = (
    "resourceMetrics resource attributes key value stringValue scopeMetrics metrics name gauge sum "
    "histogram dataPoints asInt asDouble timeUnixNano flags exemplars"
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(any_json | st.text() | st.binary(), st.booleans())
def test_any_json_is_a_request_or_undecodable(document, shaped):
    if isinstance(document, str | bytes):
        text = document if isinstance(document, bytes) else document.encode(errors="replace")
    else:
        metric = {"name": "m", "gauge": {"dataPoints": [document]}}
        inner = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}
        text = json.dumps(inner if shaped else document).encode()
    try:
        request = json_request.parse(text, WANTED)
    except Undecodable:
        return
    export(Bridge(CONFIG, MemoryStore()), request)


@given(st.binary(max_size=2000), st.integers(0, 3000))
def test_gunzip_undoes_gzip_within_the_limit(data, limit):
    compressed = gzip.compress(data)
    if len(data) <= limit:
        assert gunzip(compressed, limit) == data
    else:
        with pytest.raises(TooLarge):
            gunzip(compressed, limit)


@given(st.binary(max_size=200))
def test_what_is_no_gzip_is_undecodable(data):
    with pytest.raises(Undecodable):
        gunzip(b"\x1f\x8b" + data, 100)


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_gzip_that_is_cut_is_undecodable(data, draw):
    compressed = gzip.compress(data)
    with pytest.raises(Undecodable):
        gunzip(compressed[: draw.draw(st.integers(0, len(compressed) - 1))], 2000)
