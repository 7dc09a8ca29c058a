"""Whatever comes, the answer is one that an exporter understands, and nothing false is stored."""

import gzip
import http.client
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import status_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_otlp_bridge import Server, envelope, json_request
from icos_fl_otlp_bridge.bridge import Bridge, Outcome
from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.errors import TooLarge, Undecodable
from icos_fl_otlp_bridge.inflate import gunzip
from icos_fl_timeseries_store import MemoryStore
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from prometheus_client import REGISTRY

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
    assert outcome.points + outcome.rejected.total() == wanted_points(request_)
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


EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
PROTOBUF, JSON = "application/x-protobuf", "application/json"


@dataclass
class Wire:
    """A bridge that listens, and connections to it."""

    store: MemoryStore
    channel: grpc.Channel
    connection: http.client.HTTPConnection


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    store = MemoryStore()
    server = Server(CONFIG, lambda: store, "127.0.0.1:0", http_listen_address="127.0.0.1:0")
    server.start()
    assert server.http_port is not None
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        while told(Wire(store, channel, connection), Sent("grpc", b""))[0] == "UNAVAILABLE":
            pass  # the store has not been asked yet
        yield Wire(store, channel, connection)
    connection.close()
    server.stop(0)


@dataclass(frozen=True)
class Sent:
    """What an exporter puts on the wire."""

    transport: str
    body: bytes
    content_type: str = PROTOBUF
    encoding: str = "identity"
    request: ExportMetricsServiceRequest | None = None
    """What it means; None if that is anybody's guess."""


def told(wire: Wire, sent: Sent) -> tuple[str, Any]:
    """The code or status of the answer, and the message that came with it."""
    if sent.transport == "grpc":
        try:
            answer = wire.channel.unary_unary(
                EXPORT, response_deserializer=ExportMetricsServiceResponse.FromString
            )(sent.body, timeout=20)
        except grpc.RpcError as error:
            return error.code().name, rpc_status.from_call(error)
        return "OK", answer
    headers = {"content-type": sent.content_type, "content-encoding": sent.encoding}
    wire.connection.request("POST", "/v1/metrics", sent.body, headers)
    response = wire.connection.getresponse()
    kind = ExportMetricsServiceResponse if response.status == 200 else status_pb2.Status
    body = response.read()
    # In the request's type, if that is one of the two.
    if sent.content_type.startswith(JSON):
        assert response.headers["content-type"] == JSON
        return str(response.status), json_format.Parse(body, kind())
    assert response.headers["content-type"] == PROTOBUF
    return str(response.status), kind.FromString(body)


@st.composite
def valid(draw: Any) -> Sent:
    request = draw(requests())
    transport = draw(st.sampled_from(["grpc", "http", "http+json"]))
    body = request.SerializeToString()
    if transport == "http+json":
        body = json.dumps(json_format.MessageToDict(request, use_integers_for_enums=True)).encode()
    gzipped = draw(st.booleans())
    return Sent(
        transport.removesuffix("+json"),
        gzip.compress(body) if gzipped else body,
        JSON if transport == "http+json" else PROTOBUF,
        "gzip" if gzipped else "identity",
        request,
    )


@st.composite
def broken(draw: Any) -> Sent:
    sent = draw(valid())
    body = bytearray(draw(st.just(sent.body) | st.binary(max_size=60)))
    if body and draw(st.booleans()):
        del body[draw(st.integers(0, len(body) - 1)) :]
    if body and draw(st.booleans()):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    content_type = st.just(sent.content_type) | st.sampled_from(
        [PROTOBUF, JSON, "text/plain", "", "application/json; charset=utf-8"]
    )
    encoding = st.just(sent.encoding) | st.sampled_from(["", "gzip", "GZIP", "br", "identity"])
    return Sent(sent.transport, bytes(body), draw(content_type), draw(encoding))


def taken() -> float:
    return REGISTRY.get_sample_value("icos_fl_bridge_points_taken_total") or 0.0


@settings(max_examples=200)
@given(sent=valid())
def test_over_the_wire_every_wanted_point_is_taken_or_rejected_and_twice_is_once(wire, sent):
    before = taken()
    code, first = told(wire, sent)
    assert code in ("OK", "200")
    rejected = first.partial_success.rejected_data_points
    assert taken() - before + rejected == wanted_points(sent.request)
    rows = stored(wire.store)
    _, second = told(wire, sent)
    assert second.partial_success.rejected_data_points == rejected
    assert stored(wire.store) == rows


@settings(max_examples=400)
@given(sent=broken())
def test_over_the_wire_whatever_is_sent_has_an_answer_that_the_specification_knows(wire, sent):
    code, message = told(wire, sent)
    assert code in ("OK", "INVALID_ARGUMENT", "200", "400", "413", "415")
    if code not in ("OK", "200"):
        assert message.message
    again, _ = told(wire, sent)
    assert again == code
