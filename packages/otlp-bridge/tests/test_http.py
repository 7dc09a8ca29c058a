"""OTLP over HTTP: what an exporter is told, and what is stored by then."""

import gzip
import http.client
import json
import threading

import pytest
from google.protobuf import json_format
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from icos_fl_otlp_bridge import ListenError, Server, default_config, http_server
from icos_fl_timeseries_store import MemoryStore

POWER = "scaph_host_power_microwatts"
PROTOBUF, JSON = "application/x-protobuf", "application/json"
TYPES = pytest.mark.parametrize("content_type", [PROTOBUF, JSON])
START = 1_699_999_998 * 10**9


def document(**point) -> dict:
    """A request for node a with one point of power at START."""
    points = [{"timeUnixNano": str(START), **point}]
    node = {"key": "host.name", "value": {"stringValue": "a"}}
    metrics = [{"name": POWER, "gauge": {"dataPoints": points}}]
    return {
        "resourceMetrics": [
            {"resource": {"attributes": [node]}, "scopeMetrics": [{"metrics": metrics}]}
        ]
    }


# Checklist, HTTP: application/x-protobuf and application/json on one port; the response has the
# request's type. Content-Encoding: gzip.
@TYPES
@pytest.mark.parametrize("content_encoding", ["identity", "gzip"])
def test_full_success_is_200_with_partial_success_unset(
    bridge, export, content_type, content_encoding
):
    answer = bridge.post(
        export().gauge(POWER, (0, 146_830_000)), content_type, content_encoding=content_encoding
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == content_type
    assert not answer.response.HasField("partial_success")
    assert bridge.rows() == {0: {"power_consumption": 146.83}}


@TYPES
def test_an_empty_request_is_200(bridge, export, content_type):
    empty = export()
    empty.request.Clear()
    assert not bridge.post(empty, content_type).response.HasField("partial_success")


# Checklist, HTTP: 200 for full and partial success.
@TYPES
def test_partial_success_is_200_and_says_how_many_and_why(bridge, export, content_type):
    batch = export().gauge(POWER, (0, 1_000_000), (3, None)).resource(None).gauge(POWER, (0, 1))
    partial = bridge.post(batch, content_type).response.partial_success
    assert partial.rejected_data_points == 2
    assert partial.error_message == "rejected data points: no_node: 1, no_value: 1"
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


# Checklist, HTTP: 400 for what will never work.
@TYPES
def test_what_will_never_work_is_400_with_a_status(bridge, content_type):
    answer = bridge.request(b"\xff\xff\xff", content_type)
    assert answer.status == 400
    assert answer.headers["content-type"] == content_type
    assert answer.refusal.code == code_pb2.INVALID_ARGUMENT
    (detail,) = answer.refusal.details
    assert detail.Is(BadRequest.DESCRIPTOR)
    assert "3 bytes" in answer.refusal.message


@pytest.mark.parametrize("broken", [b"no gzip", gzip.compress(b"x" * 100, mtime=0)[:20]])
def test_broken_gzip_is_400(bridge, broken):
    answer = bridge.request(broken, content_encoding="gzip")
    assert (answer.status, answer.refusal.code) == (400, code_pb2.INVALID_ARGUMENT)


# Checklist, HTTP: retryable only 429, 502, 503, 504, with Retry-After where known.
@TYPES
def test_a_store_that_does_not_answer_is_503_with_retry_after(bridge, export, store, content_type):
    store.answers = False
    answer = bridge.post(export().gauge(POWER, (0, 1_000_000)), content_type)
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.refusal.code == code_pb2.UNAVAILABLE
    (detail,) = answer.refusal.details
    assert detail.Is(RetryInfo.DESCRIPTOR)


def test_an_unexpected_error_is_503_with_retry_after(bridge, export, store):
    def fail(*_):
        raise ValueError("odd")

    store.create_window = fail
    answer = bridge.post(export().gauge(POWER, (0, 1_000_000)))
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")


# Checklist, HTTP: the body of every 4xx and 5xx is a Status message.
@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"path": "/v1/traces"}, 404),
        ({"path": "/"}, 404),
        ({"method": "GET"}, 405),
        ({"content_type": "text/plain"}, 415),
        ({"content_encoding": "br"}, 415),
    ],
    ids=str,
)
def test_what_is_no_export_has_a_status_too(bridge, change, status):
    answer = bridge.request(b"", **change)
    assert answer.status == status
    assert answer.refusal.message


POST = b"POST /v1/metrics HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\n"


@pytest.mark.parametrize(
    ("text", "content_type"),
    [
        (b"no HTTP\r\n\r\n", PROTOBUF),
        (b"GET  / HTTP/1.1\r\nhost: x\r\n\r\n", PROTOBUF),
        (b"GET / HTTP/1.1\r\n\r\n", PROTOBUF),  # no host
        (POST % JSON.encode() + b"x: " + b"a" * 200_000, PROTOBUF),
        (POST % JSON.encode() + b"content-length: x\r\n\r\n", PROTOBUF),
        (POST % JSON.encode() + b"transfer-encoding: chunked\r\n\r\nx\r\n", JSON),
        (POST % PROTOBUF.encode() + b"transfer-encoding: chunked\r\n\r\n-1\r\n", PROTOBUF),
    ],
    ids=lambda value: value[-40:],
)
def test_what_is_no_http_has_a_status_too(bridge, text, content_type):
    answer = bridge.raw(text)
    assert (answer.status, answer.headers["content-type"]) == (400, content_type)
    assert answer.headers["connection"] == "close"
    assert answer.refusal.code == code_pb2.INVALID_ARGUMENT
    assert answer.refusal.message


def test_more_connections_than_the_limit_are_503_with_a_status(bridge, monkeypatch):
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 1)
    first = http.client.HTTPConnection("127.0.0.1", bridge.server.http_port, timeout=20)
    first.request("GET", "/")
    first.getresponse().read()
    answer = bridge.raw(b"")
    first.close()
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert answer.refusal.message == "there are 1 connections, which is the limit"


# Checklist, HTTP: too large is 413.
@TYPES
@pytest.mark.parametrize("content_encoding", ["identity", "gzip"])
def test_too_large_is_413_that_names_size_and_limit(run, export, content_type, content_encoding):
    bridge = run(max_message_bytes=100_000)
    batch = export(filler="x" * 150_000).gauge(POWER, (0, 1))
    answer = bridge.post(batch, content_type, content_encoding=content_encoding)
    assert answer.status == 413
    assert answer.refusal.code == code_pb2.RESOURCE_EXHAUSTED
    assert not answer.refusal.details
    assert "limit of 100000" in answer.refusal.message
    assert "150" in answer.refusal.message
    assert bridge.store.nodes() == []


def test_chunks_without_a_length_are_limited_too(run):
    bridge = run(max_message_bytes=100_000)
    answer = bridge.request(iter([b"x" * 60_000] * 2))
    assert answer.status == 413
    assert "120000 bytes" in answer.refusal.message


def test_a_gzip_bomb_is_inflated_no_further_than_it_must(run):
    bridge = run(max_message_bytes=100_000)
    answer = bridge.request(gzip.compress(bytes(50_000_000)), content_encoding="gzip")
    assert answer.status == 413
    assert "more than" in answer.refusal.message


def test_a_connection_serves_one_export_after_another(bridge, export):
    connection = http.client.HTTPConnection("127.0.0.1", bridge.server.http_port, timeout=20)
    for seconds in (0, 3):
        body = export().gauge(POWER, (seconds, 1_000_000)).request.SerializeToString()
        connection.request("POST", "/v1/metrics", body, {"content-type": PROTOBUF})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
    connection.close()
    assert sorted(bridge.rows()) == [0, 3]


def test_who_leaves_in_mid_request_does_no_harm(bridge, export):
    connection = http.client.HTTPConnection("127.0.0.1", bridge.server.http_port, timeout=20)
    connection.putrequest("POST", "/v1/metrics")
    connection.putheader("content-type", PROTOBUF)
    connection.putheader("content-length", "1000")
    connection.endheaders(b"some")
    connection.close()
    assert bridge.post(export().gauge(POWER, (0, 1))).status == 200


# Checklist, HTTP: JSON: trace and span ids in hex, 64-bit integers as string or number, unknown
# fields ignored.
@pytest.mark.parametrize(
    ("point", "watts"),
    [
        ({"asInt": "42000000"}, 42),
        ({"asInt": 42_000_000}, 42),
        ({"asInt": 42_000_000.0}, 42),
        ({"asDouble": "1500000"}, 1.5),
        ({"asDouble": 1_500_000}, 1.5),
        ({"asInt": 42_000_000, "timeUnixNano": START}, 42),
        ({"asInt": 42_000_000, "unknownField": {"a": [1, {}]}, "unknown_too": None}, 42),
        ({"asInt": 42_000_000, "time_unix_nano": "7", "unknown": 10**400}, 42),
        ({"asInt": 42_000_000, "exemplars": [{"traceId": "5b8efff798038103d269b633813fc60c"}]}, 42),
        ({"asInt": 42_000_000, "exemplars": [{"spanId": "eee19b7ec3c1b17", "asInt": "x"}]}, 42),
    ],
    ids=str,
)
def test_case_2_json_numbers_ids_and_unknown_fields(bridge, point, watts):
    answer = bridge.request(json.dumps(document(**point)).encode(), JSON)
    assert not answer.response.HasField("partial_success")
    assert bridge.rows() == {0: {"power_consumption": watts}}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_case_2_a_json_number_that_is_not_finite_is_a_counted_point(bridge, number):
    answer = bridge.request(json.dumps(document(asDouble=number)).encode(), JSON)
    partial = answer.response.partial_success
    assert partial.error_message == "rejected data points: non_finite: 1"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(document(asDouble=float("nan"))),
        json.dumps(document(asInt=42.5)),
        json.dumps(document(asInt=2**63)),
        json.dumps(document(asInt="forty-two")),
        json.dumps(document(asInt=True)),
        json.dumps(document(timeUnixNano="-1", asInt=1)),
        '{"resourceMetrics": 1}',
        '{"resourceMetrics": [1]}',
        '{"resourceMetrics": [{"scopeMetrics": {"metrics": []}}]}',
        "[]",
        "null",
        "",
        "{",
        "[" * 100_000,
        "{" + '"a":[' * 10_000,
        json.dumps(document(asInt=1, flags=[[]])),
    ],
    ids=lambda text: text[-60:],
)
def test_case_2_json_that_is_no_request_is_400_with_a_status(bridge, text):
    answer = bridge.request(text.encode(), JSON)
    assert answer.status == 400
    assert answer.refusal.code == code_pb2.INVALID_ARGUMENT
    assert answer.headers["content-type"] == JSON
    assert bridge.store.nodes() == []


# Checklist, HTTP: JSON: lowerCamelCase keys.
def test_json_has_no_keys_as_protobuf_writes_them(bridge):
    body = json.dumps({"resource_metrics": document(asInt=1)["resourceMetrics"]}).encode()
    assert bridge.request(body, JSON).status == 200
    assert bridge.store.nodes() == []


def test_json_says_counts_as_texts_and_enums_as_integers(bridge):
    answer = bridge.request(json.dumps(document()).encode(), JSON)
    assert json.loads(answer.body) == {
        "partialSuccess": {
            "rejectedDataPoints": "1",
            "errorMessage": "rejected data points: no_value: 1",
        }
    }


# Checklist, HTTP: JSON: enums as integers.
def test_a_sum_of_json_has_its_temporality_as_an_integer(bridge, export):
    batch = export().sum(POWER, 2, (0, 1_000_000))
    assert (
        b'"aggregationTemporality": 2'
        in json.dumps(
            json_format.MessageToDict(batch.request, use_integers_for_enums=True)
        ).encode()
    )
    assert not bridge.post(batch, JSON).response.HasField("partial_success")
    assert bridge.rows() == {0: {"power_consumption": 1.0}}


def test_a_port_of_http_that_is_taken_is_said(bridge):
    address = f"127.0.0.1:{bridge.server.http_port}"
    with pytest.raises(ListenError, match=f"cannot listen on {address}"):
        Server(default_config(), MemoryStore, "127.0.0.1:0", http_listen_address=address)


def test_a_stopping_bridge_ends_the_http_exports_in_hand(run, export, store):
    bridge = run()
    appending, go_on = threading.Event(), threading.Event()
    window = store.create_window("a")
    append = window.append

    def slow_append(*args):
        appending.set()
        assert go_on.wait(20)
        return append(*args)

    window.append = slow_append
    answers = []
    batch = export().gauge(POWER, (0, 1_000_000))
    exporting = threading.Thread(target=lambda: answers.append(bridge.post(batch)))
    exporting.start()
    assert appending.wait(20)
    stopping = threading.Thread(target=bridge.server.stop, args=(20,))
    stopping.start()
    go_on.set()
    stopping.join(30)
    exporting.join(20)
    assert [answer.status for answer in answers] == [200]
    assert bridge.rows() == {0: {"power_consumption": 1.0}}
