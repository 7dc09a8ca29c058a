"""A real bridge on a MemoryStore, and requests as exporters send them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge import BridgeConfig, Server, default_config, load_config
from icos_fl_timeseries_store import MemoryStore, StoreUnavailable
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

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

    def sum(self, name: str, temporality: int, *points: Any) -> "Export":
        metric = self._metrics.add(name=name)
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
        server = Server(config or default_config(), connect, "127.0.0.1:0", **settings)
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
