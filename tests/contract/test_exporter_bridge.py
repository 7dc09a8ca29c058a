"""The OpenTelemetry SDK's own exporter and the bridge: real gRPC, nothing built by hand."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc import Compression
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge import Server, default_config
from icos_fl_timeseries_store import DEFAULT_CAPACITY_ROWS, MemoryStore, StoreUnavailable, Window
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[], MemoryStore]], Server]]:
    """Starts bridges on free ports; all are stopped at the end."""
    servers: list[Server] = []

    def start(connect: Callable[[], MemoryStore]) -> Server:
        server = Server(default_config(), connect, "127.0.0.1:0")
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop(1)


@pytest.fixture
def metered() -> Iterator[Callable[..., MeterProvider]]:
    """Makes providers that export, when they are told to, to a bridge as node ``a``."""
    providers: list[MeterProvider] = []

    def make(server: Server, compression: Compression = Compression.NoCompression) -> MeterProvider:
        exporter = OTLPMetricExporter(
            f"127.0.0.1:{server.port}", insecure=True, timeout=30, compression=compression
        )
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=float("inf"))
        provider = MeterProvider([reader], Resource({"host.name": "a"}))
        providers.append(provider)
        return provider

    yield make
    for provider in providers:
        provider.shutdown()


def newest(store: MemoryStore) -> dict[str, float]:
    rows = store.window("a").read(last=1)
    return dict(zip(rows.columns, rows.values_tf[0].tolist(), strict=True))


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_what_the_sdk_exports_is_stored(serve, metered, compression):
    store = MemoryStore()
    provider = metered(serve(lambda: store), compression)
    meter = provider.get_meter("system metrics")
    idle = [
        Observation(0.5, {"cpu": 0, "cpu.mode": "idle"}),
        Observation(1.0, {"cpu.mode": "idle"}),
    ]
    busy = Observation(0.25, {"cpu": 0, "cpu.mode": "user"})
    meter.create_observable_gauge("system.cpu.utilization", [lambda _: [*idle, busy]])
    memory = meter.create_up_down_counter("system.memory.usage")
    memory.add(5 << 20, {"system.memory.state": "used"})
    memory.add(9 << 20, {"system.memory.state": "free"})
    meter.create_gauge("hw.host.power", "W").set(20.5)
    meter.create_histogram("http.server.request.duration").record(0.1)
    assert provider.force_flush()
    assert newest(store) == {"power_consumption": 20.5, "cpu_usage": 25.0, "memory_usage": 5.0}


def test_what_the_sdk_names_a_counter_is_a_column_too(serve, metered):
    store = MemoryStore()
    provider = metered(serve(lambda: store))
    provider.get_meter("scaphandre").create_up_down_counter("scaph_host_power_microwatts").add(
        146_830_000
    )
    assert provider.force_flush()
    assert newest(store) == {"power_consumption": 146.83}


class RefusesOnce(MemoryStore):
    """A MemoryStore whose first ``create_window`` fails."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = 0

    def create_window(self, node: str, capacity_rows: int = DEFAULT_CAPACITY_ROWS) -> Window:
        if not self.refused:
            self.refused += 1
            raise StoreUnavailable("the store does not answer")
        return super().create_window(node, capacity_rows)


def test_the_sdk_sends_again_what_was_refused_for_now(serve, metered):
    store = RefusesOnce()
    server = serve(lambda: store)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True
        )
        next(a for a in watch if a.status == health_pb2.HealthCheckResponse.SERVING)
        watch.cancel()
    provider = metered(server)
    provider.get_meter("scaphandre").create_gauge("scaph_host_power_microwatts").set(1_000_000)
    assert provider.force_flush(40_000)
    assert store.refused == 1
    assert newest(store) == {"power_consumption": 1.0}
