"""A real bridge on a MemoryStore, and requests as exporters send them."""

import gzip
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import settings
from icos_fl_otlp_bridge import BridgeConfig, Server, default_config, load_config
from icos_fl_timeseries_store import MemoryStore, StoreUnavailable
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

# How long an example takes says how busy the machine is.
settings.register_profile("bridge", deadline=None)
settings.load_profile("bridge")

SECOND = 1_000_000_000
START = 1_699_999_998 * SECOND  # a multiple of the default interval


class SwitchableStore(MemoryStore):
    """A MemoryStore that can be made unavailable."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = True

    def _check(self) -> None:
        if not self.answers:
            raise StoreUnavailable("the store at nowhere:1 does not answer")

    def nodes(self) -> list[str]:
        self._check()
        return super().nodes()

    def create_window(self, node: str, capacity_rows: int = 300) -> Any:
        self._check()
        window: Any = super().create_window(node, capacity_rows)
        if not hasattr(window, "plain_append"):
            window.plain_append = window.append

            def append(*args: Any) -> Any:
                self._check()
                return window.plain_append(*args)

            window.append = append
        return window


class Export:
    """Builds a request: ``Export("a").gauge(...).sum(...).request``."""

    def __init__(self, node: str | None = "a", **attributes: Any) -> None:
        self.request = pb.ExportMetricsServiceRequest()
        self.resource(node, **attributes)

    def resource(self, node: str | None, **attributes: Any) -> "Export":
        """Begin another resource."""
        added = self.request.resource_metrics.add()
        if node is not None:
            attributes["host.name"] = node
        _set(added.resource.attributes, attributes)
        self._metrics = added.scope_metrics.add().metrics
        return self

    def gauge(self, name: str, *points: Any) -> "Export":
        """Points: (seconds after START, value) and, if need be, attributes and more fields."""
        self._metrics.add(name=name).gauge.data_points.extend(map(_point, points))
        return self

    def sum(self, name: str, temporality: int, *points: Any, monotonic: bool = False) -> "Export":
        metric = self._metrics.add(name=name)
        metric.sum.is_monotonic = monotonic
        metric.sum.aggregation_temporality = temporality  # type: ignore[assignment]
        metric.sum.data_points.extend(map(_point, points))
        return self

    def metric(self, metric: Metric) -> "Export":
        self._metrics.append(metric)
        return self


def _point(given: Any) -> NumberDataPoint:
    seconds, value, attributes, fields = (*given, {}, {})[:4]
    point = NumberDataPoint(time_unix_nano=START + round(seconds * SECOND), **fields)
    if isinstance(value, int):
        point.as_int = value
    elif value is not None:
        point.as_double = value
    _set(point.attributes, attributes)
    return point


def _set(attributes: Any, values: dict[str, Any]) -> None:
    kinds = {str: "string_value", int: "int_value", float: "double_value", bool: "bool_value"}
    for key, value in values.items():
        setattr(attributes.add(key=key).value, kinds[type(value)], value)


PROTOBUF, JSON = "application/x-protobuf", "application/json"


@dataclass
class Answer:
    """What an HTTP server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    def message(self, kind: Any) -> Any:
        """The body as a message of *kind*, by its own content type."""
        if self.headers["content-type"] == JSON:
            return json_format.Parse(self.body, kind())
        assert self.headers["content-type"] == PROTOBUF
        return kind.FromString(self.body)

    @property
    def response(self) -> pb.ExportMetricsServiceResponse:
        assert self.status == 200, self.body
        found: pb.ExportMetricsServiceResponse = self.message(pb.ExportMetricsServiceResponse)
        return found

    @property
    def refusal(self) -> status_pb2.Status:
        assert self.status >= 400
        return self.message(status_pb2.Status)


def _answer(response: http.client.HTTPResponse) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


@dataclass
class Running:
    """A bridge, and channels to it."""

    server: Server
    store: SwitchableStore
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.export_to = MetricsServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def export(self, export: Export, **call: Any) -> pb.ExportMetricsServiceResponse:
        response: pb.ExportMetricsServiceResponse = self.export_to.Export(
            export.request, timeout=20, **call
        )
        return response

    def refusal(self, export: Export, **call: Any) -> Any:
        """The error of an export that must not be OK."""
        with pytest.raises(grpc.RpcError) as caught:
            self.export(export, **call)
        return caught.value

    def request(
        self,
        body: Any,
        content_type: str = PROTOBUF,
        path: str = "/v1/metrics",
        method: str = "POST",
        tls: ssl.SSLContext | None = None,
        host: str = "localhost",
        **headers: str,
    ) -> Answer:
        """One HTTP request on a connection of its own; headers with _ for -."""
        assert self.server.http_port is not None
        place = (host, self.server.http_port)
        connection = (
            http.client.HTTPSConnection(*place, timeout=60, context=tls)
            if tls
            else http.client.HTTPConnection(*place, timeout=60)
        )
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {"content-type": content_type, **named})
            return _answer(connection.getresponse())
        finally:
            connection.close()

    def raw(self, sent: bytes) -> Answer:
        """What comes back on a connection of its own."""
        address = ("127.0.0.1", self.server.http_port)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(sent)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return _answer(response)

    def post(self, export: Export, content_type: str = PROTOBUF, **headers: str) -> Answer:
        """An export over HTTP, compressed if a content_encoding says so."""
        body = export.request.SerializeToString()
        if content_type == JSON:
            body = otlp_json(export.request)
        if headers.get("content_encoding") == "gzip":
            body = gzip.compress(body)
        return self.request(body, content_type, **headers)

    def rows(self, node: str = "a") -> dict[float, dict[str, float]]:
        """Values by seconds after START and column; without those that are not there."""
        rows = self.store.window(node).read()
        return {
            (int(time) - START) / SECOND: {
                column: float(value)
                for column, value in zip(rows.columns, values, strict=True)
                if value == value
            }
            for time, values in zip(rows.times_ns_t, rows.values_tf, strict=True)
        }

    def column(self, column: str, node: str = "a") -> dict[float, float]:
        return {time: row[column] for time, row in self.rows(node).items() if column in row}

    def wait_for_health(self, status: str) -> None:
        """Returns when health is *status*; each change is told by the server."""
        wanted = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
        watch = self.health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        for answer in watch:
            if answer.status == wanted:
                watch.cancel()
                return


def otlp_json(request: pb.ExportMetricsServiceRequest) -> bytes:
    """As OTLP writes it: enums as integers."""
    document = json_format.MessageToDict(request, use_integers_for_enums=True)
    return json.dumps(document).encode()


def until(condition: Callable[[], bool], timeout_seconds: float = 20) -> None:
    """Returns when *condition* holds."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s"
        time.sleep(0.001)


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until


@pytest.fixture
def store() -> SwitchableStore:
    return SwitchableStore()


@pytest.fixture
def export() -> type[Export]:
    return Export


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], BridgeConfig]:
    """The configuration of a YAML text."""

    def load(text: str) -> BridgeConfig:
        file = tmp_path / "bridge.yaml"
        file.write_text(text)
        return load_config(file)

    return load


@pytest.fixture
def run(store: SwitchableStore) -> Iterator[Callable[..., Running]]:
    """Starts bridges on free ports; all are stopped at the end."""
    started: list[Running] = []

    def start(config: BridgeConfig | None = None, ready: bool = True, **settings: Any) -> Running:
        connect = settings.pop("connect", lambda: store)
        server = Server(
            config or default_config(),
            connect,
            "127.0.0.1:0",
            http_listen_address="127.0.0.1:0",
            **settings,
        )
        server.start()
        running = Running(server, store)
        started.append(running)
        if ready:
            running.wait_for_health("SERVING")
        return running

    yield start
    for running in started:
        running.channel.close()
        running.server.stop(0)


@pytest.fixture
def bridge(run: Callable[..., Running]) -> Running:
    """A bridge with the packaged configuration."""
    return run()
