"""The resident memory of a real bridge under the requests that cost it most."""

import gzip
import http.client
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge.memory import DECODED_BYTES_MAX
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store.testing import running_store

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
PROTOBUF, JSON = "application/x-protobuf", "application/json"
MIB = 1 << 20
AT_ONCE = 4
SIZE = 64 * MIB
RSS_MAX = (1 << 30) + AT_ONCE * SIZE
"""What the README states."""
START = 1_699_999_998 * 10**9
CONFIG = """
nodes_max: 10
columns:
  gauge: {sources: [{terms: [{metric: g}]}]}
  rate: {sources: [{terms: [{metric: r, rate: true}]}]}
  quantile: {sources: [{terms: [{metric: q, take: quantile, quantile: 0.5}]}]}
"""


@dataclass
class Running:
    """A bridge's process."""

    process: subprocess.Popen[bytes]
    port: int
    http_port: int

    def peak_bytes(self) -> int:
        """The most memory that was resident since ``forget_peak``."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = (line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def export(self, body: bytes, compression: grpc.Compression | None = None) -> str:
        """Over gRPC, on a connection of its own; the code of the answer."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{self.port}", options) as channel:
            try:
                channel.unary_unary(EXPORT)(body, timeout=200, compression=compression)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

    def post(self, body: bytes, content_type: str = PROTOBUF, encoding: str = "identity") -> int:
        """Over HTTP, on a connection of its own; the status of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=200)
        headers = {"content-type": content_type, "content-encoding": encoding}
        try:
            connection.request("POST", "/v1/metrics", body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bridge")
    (folder / "bridge.yaml").write_text(CONFIG)
    port, http_port = free_port(), free_port()
    with running_store(folder / "store") as store:
        environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": f"127.0.0.1:{port}",
            "ICOS_FL_BRIDGE_HTTP_LISTEN_ADDRESS": f"127.0.0.1:{http_port}",
            "ICOS_FL_BRIDGE_STORE__PORT": str(store.port),
            "ICOS_FL_BRIDGE_CONFIG": str(folder / "bridge.yaml"),
            "ICOS_FL_BRIDGE_MAX_MESSAGE_BYTES": str(SIZE),
            "ICOS_FL_BRIDGE_MAX_CONCURRENT_EXPORTS": str(AT_ONCE),
            "ICOS_FL_BRIDGE_LOG_LEVEL": "ERROR",
        }
        process = subprocess.Popen(
            tied(sys.executable, "-m", "icos_fl_otlp_bridge"), env={**os.environ, **environment}
        )
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(), timeout=120, wait_for_ready=True
                )
                next(a for a in watch if a.status == health_pb2.HealthCheckResponse.SERVING)
                watch.cancel()
            yield Running(process, port, http_port)
        finally:
            process.terminate()
            process.wait()


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def attribute(key: bytes, value: bytes) -> bytes:
    return field(1, key) + field(2, field(1, value))


def request(metric: bytes, *attributes: bytes) -> bytes:
    """Of node a."""
    resource = b"".join(field(1, one) for one in (attribute(b"host.name", b"a"), *attributes))
    return field(1, field(1, resource) + field(2, field(2, metric)))


GAUGE, SUM, HISTOGRAM, EXPONENTIAL = 5, 7, 9, 10


def metric(name: bytes, kind: int, points: bytes) -> bytes:
    """Cumulative, and monotonic, where that is said."""
    return field(1, name) + field(kind, points + (b"" if kind == GAUGE else b"\x10\x02\x18\x01"))


def point(second: int, more: bytes = b"") -> bytes:
    numbers = struct.pack("<BQBq", 3 << 3 | 1, START + second * 10**9, 6 << 3 | 1, second)
    return field(1, numbers + more)


def distribution(count: int, more: bytes) -> bytes:
    return field(1, struct.pack("<BQBQ", 3 << 3 | 1, START, 4 << 3 | 1, count) + more)


def histogram(bounds: int) -> bytes:
    counts = field(6, struct.pack("<Q", 1) * (bounds + 1))
    values = field(7, struct.pack(f"<{bounds}d", *range(bounds)))
    return request(metric(b"q", HISTOGRAM, distribution(bounds + 1, counts + values)))


def buckets(count: int) -> bytes:
    """Of an exponential histogram, in a byte each."""
    negative = field(9, field(2, b"\x01" * count))
    return request(metric(b"q", EXPONENTIAL, distribution(count, negative)))


def wide(size: int) -> bytes:
    """Text of which one character takes four bytes, and so all do."""
    return "😀".encode() + b"a" * size


POINTS = DECODED_BYTES_MAX // 520
ONE_RATE = metric(b"r", SUM, point(0))
HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty points": lambda: request(metric(b"g", GAUGE, b"\x0a\x00" * (SIZE // 2 - 100))),
    "empty resources": lambda: b"\x0a\x00" * (SIZE // 2),
    "points of one counter, the newest first": lambda: request(
        metric(b"r", SUM, b"".join(map(point, range(POINTS, 0, -1))))
    ),
    "a series a point": lambda: request(
        metric(
            b"g",
            GAUGE,
            b"".join(point(0, field(7, attribute(b"k", b"%d" % n))) for n in range(POINTS // 2)),
        )
    ),
    "a node a point": lambda: b"".join(
        request(metric(b"g", GAUGE, point(0)), attribute(b"host.name", b"%d" % n))
        for n in range(POINTS // 4)
    ),
    "a histogram of millions of bounds": lambda: histogram(SIZE // 16 - 100),
    "a bucket a byte": lambda: buckets(SIZE - 100),
    "fewer buckets": lambda: buckets(DECODED_BYTES_MAX // 65),
    "wide text": lambda: request(ONE_RATE, attribute(b"k", wide(SIZE - 200))),
    "a metric that nobody wants": lambda: request(metric(b"x", GAUGE, bytes(SIZE - 200))),
}


def beside(bridge: Running, send: Callable[[], list[object]]) -> tuple[list[object], set[str]]:
    """What *send* returns, and what an exporter of small batches is told until then."""
    done = threading.Event()
    told = set()

    def export() -> None:
        while not done.is_set():
            told.add(bridge.export(request(metric(b"g", GAUGE, point(0)))))

    exporting = threading.Thread(target=export)
    exporting.start()
    try:
        return send(), told
    finally:
        done.set()
        exporting.join()


def at_once(*sends: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(sends)) as exporters:
        return list(exporters.map(lambda send: send(), sends))


def check(bridge: Running, *sends: Callable[[], object]) -> None:
    """Send all at once."""
    bridge.forget_peak()
    answers, good = beside(bridge, lambda: at_once(*sends))
    peak = bridge.peak_bytes()
    print(f"{peak / MIB:.0f} of {RSS_MAX / MIB:.0f} MiB, answers {answers}")
    assert set(answers) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", 200, 400, 413, 503}
    assert good == {"OK"}
    assert peak <= RSS_MAX


# Half a minute each, and decoded as "a node a point" is.
LONG = {"points of one counter, the newest first", "a series a point", "fewer buckets"}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=pytest.mark.slow if what in LONG else ()) for what in HOSTILE],
)
def test_protobuf_stays_below_the_stated_memory(bridge, what):
    body = HOSTILE[what]()
    ways = (bridge.export, bridge.post) * (AT_ONCE // 2)
    check(bridge, *(lambda way=way: way(body) for way in ways))


@pytest.mark.parametrize("what", ["wide text", "a metric that nobody wants"])
def test_gzip_of_a_few_kilobytes_stays_below_it(bridge, what):
    body = HOSTILE[what]()
    compressed = gzip.compress(body, 6)
    check(
        bridge,
        *[lambda: bridge.export(body, grpc.Compression.Gzip)] * (AT_ONCE // 2),
        *[lambda: bridge.post(compressed, encoding="gzip")] * (AT_ONCE // 2),
    )


def in_gauge(points: bytes) -> bytes:
    """JSON of node a and a wanted gauge of these points."""
    node = b'{"attributes":[{"key":"host.name","value":{"stringValue":"a"}}]}'
    metrics = b'[{"name":"g","gauge":{"dataPoints":[' + points + b"]}}]"
    scope = b'[{"resource":' + node + b',"scopeMetrics":[{"metrics":' + metrics + b"}]}]"
    return b'{"resourceMetrics":' + scope + b"}"


def many(value: bytes, size: int = SIZE - 1000) -> bytes:
    return b",".join([value] * (size // (len(value) + 1)))


POINT = b'{"timeUnixNano":"1700000000000000000","asInt":"1"}'
DOCUMENTS: dict[str, Callable[[], bytes]] = {
    "objects that nobody knows": lambda: b'{"x":[' + many(b'{"a":1}') + b"]}",
    "lists that nobody knows": lambda: b'{"x":[' + many(b"[]") + b"]}",
    "empty metrics": lambda: (
        b'{"resourceMetrics":[{"scopeMetrics":[{"metrics":[' + many(b"{}") + b"]}]}]}"
    ),
    "metrics of three kinds": lambda: (
        b'{"resourceMetrics":[{"scopeMetrics":[{"metrics":['
        + many(b'{"sum":1,"gauge":1,"summary":1}', SIZE * 3 // 4)
        + b"]}]}]}"
    ),
    "empty points": lambda: in_gauge(many(b"{}")),
    "lists in a point": lambda: in_gauge(b'{"x":[' + many(b"[]", 6 * MIB) + b"]}"),
    "objects in a point": lambda: in_gauge(b'{"x":[' + many(b'{"a":1}', 8 * MIB) + b"]}"),
    "wanted points": lambda: in_gauge(many(POINT, 24 * MIB)),
    "wide text": lambda: in_gauge(b'{"x":"' + wide(37 * MIB) + b'"}'),
    "deep lists": lambda: b'{"x":' + b"[" * (SIZE - 100),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_json_stays_below_it(bridge, what):
    body = DOCUMENTS[what]()
    check(bridge, *[lambda: bridge.post(body, JSON)] * AT_ONCE)


def test_what_rates_remember_of_long_attributes_stays_below_it(bridge):
    for number in range(10):
        body = request(ONE_RATE, attribute(b"k", wide(16 * MIB) + b"%d" % number))
        check(bridge, *[lambda body=body: bridge.export(body)] * AT_ONCE)
