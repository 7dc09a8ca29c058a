"""The OpenTelemetry SDK's own exporters and the bridge: nothing built by hand."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge import BridgeConfig, Server, default_config, load_config
from icos_fl_service.security import Security, TlsSettings, load_security
from icos_fl_timeseries_store import DEFAULT_CAPACITY_ROWS, MemoryStore, StoreUnavailable, Window
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
    OTLPMetricExporter as GrpcMetricExporter,
)
from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
    OTLPMetricExporter as HttpMetricExporter,
)
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

TRANSPORTS = pytest.mark.parametrize("transport", ["grpc", "http"])
TOKEN = "a-token-of-some-length"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts bridges on free ports; all are stopped at the end."""
    servers: list[Server] = []

    def start(
        connect: Callable[[], MemoryStore],
        config: BridgeConfig | None = None,
        security: Security | None = None,
    ) -> Server:
        server = Server(
            config or default_config(),
            connect,
            "127.0.0.1:0",
            http_listen_address="127.0.0.1:0",
            security=security,
        )
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

    def make(
        server: Server,
        transport: str,
        gzip: bool = False,
        root: Path | None = None,
        headers: dict[str, str] | None = None,
        deltas: bool = False,
    ) -> MeterProvider:
        options: dict[str, Any] = {"timeout": 30, "headers": headers}
        if deltas:
            delta = AggregationTemporality.DELTA
            options["preferred_temporality"] = {Counter: delta, Histogram: delta}
        exporter: GrpcMetricExporter | HttpMetricExporter
        if transport == "grpc":
            exporter = GrpcMetricExporter(
                f"localhost:{server.port}",
                insecure=root is None,
                credentials=root and grpc.ssl_channel_credentials(root.read_bytes()),
                compression=grpc.Compression.Gzip if gzip else grpc.Compression.NoCompression,
                **options,
            )
        else:
            exporter = HttpMetricExporter(
                f"http{'s' if root else ''}://localhost:{server.http_port}/v1/metrics",
                certificate_file=str(root) if root else None,
                compression=HttpCompression.Gzip if gzip else HttpCompression.NoCompression,
                **options,
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


def wait_until_serving(server: Server, root: Path | None = None) -> None:
    address = f"localhost:{server.port}"
    channel = (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(root.read_bytes()))
        if root
        else grpc.insecure_channel(address)
    )
    with channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True
        )
        next(a for a in watch if a.status == health_pb2.HealthCheckResponse.SERVING)
        watch.cancel()


@TRANSPORTS
@pytest.mark.parametrize("gzip", [False, True])
def test_what_the_sdk_exports_is_stored(serve, metered, transport, gzip):
    store = MemoryStore()
    server = serve(lambda: store)
    wait_until_serving(server)
    provider = metered(server, transport, gzip)
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


@TRANSPORTS
def test_what_the_sdk_names_a_counter_is_a_column_too(serve, metered, transport):
    store = MemoryStore()
    server = serve(lambda: store)
    wait_until_serving(server)
    provider = metered(server, transport)
    provider.get_meter("scaphandre").create_up_down_counter("scaph_host_power_microwatts").add(
        146_830_000
    )
    assert provider.force_flush()
    assert newest(store) == {"power_consumption": 146.83}


DISTRIBUTIONS = """
interval_seconds: 0.001
columns:
  mean: {sources: [{terms: [{metric: duration, take: mean}]}]}
  median: {sources: [{terms: [{metric: duration, take: quantile, quantile: 0.5}]}]}
  count: {sources: [{terms: [{metric: duration, take: count}]}]}
  rate: {sources: [{terms: [{metric: requests, rate: true}]}]}
"""


@TRANSPORTS
@pytest.mark.parametrize("deltas", [False, True])
def test_histograms_and_rates_of_the_sdk_fill_columns(serve, metered, tmp_path, transport, deltas):
    file = tmp_path / "bridge.yaml"
    file.write_text(DISTRIBUTIONS)
    store = MemoryStore()
    server = serve(lambda: store, load_config(file))
    wait_until_serving(server)
    provider = metered(server, transport, deltas=deltas)
    meter = provider.get_meter("m")
    durations, requests = meter.create_histogram("duration"), meter.create_counter("requests")
    for _ in range(2):
        for seconds in (10.0, 20.0, 30.0):
            durations.record(seconds)
        requests.add(1_000_000)
        assert provider.force_flush()
    rows = store.window("a").read()
    columns = {name: rows.values_tf[:, place] for place, name in enumerate(rows.columns)}
    assert columns["mean"][-1] == 20.0
    assert columns["count"][-1] == (3 if deltas else 6)
    assert 10.0 <= columns["median"][-1] <= 25.0
    assert columns["rate"][-1] > 0


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


@TRANSPORTS
def test_the_sdk_sends_again_what_was_refused_for_now(serve, metered, transport):
    store = RefusesOnce()
    server = serve(lambda: store)
    wait_until_serving(server)
    provider = metered(server, transport)
    provider.get_meter("scaphandre").create_gauge("scaph_host_power_microwatts").set(1_000_000)
    assert provider.force_flush(40_000)
    assert store.refused == 1
    assert newest(store) == {"power_consumption": 1.0}


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Security, Path]:
    """What a bridge asks for, and the root that its clients trust."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # they would win over the exporter's root
        monkeypatch.delenv(name, raising=False)
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    certificate, key, root = tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "root.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(root)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    for secret in (key, tokens):
        secret.chmod(0o600)
    return load_security(TlsSettings(certificate=certificate, key=key), tokens), root


@TRANSPORTS
def test_the_sdk_exports_over_tls_with_a_token(serve, metered, secured, transport):
    security, root = secured
    store = MemoryStore()
    server = serve(lambda: store, security=security)
    wait_until_serving(server, root)
    provider = metered(server, transport, root=root, headers={"authorization": f"Bearer {TOKEN}"})
    provider.get_meter("scaphandre").create_gauge("scaph_host_power_microwatts").set(1_000_000)
    assert provider.force_flush()
    assert newest(store) == {"power_consumption": 1.0}


@TRANSPORTS
def test_the_sdk_without_a_token_stores_nothing(serve, metered, secured, transport):
    security, root = secured
    store = MemoryStore()
    server = serve(lambda: store, security=security)
    wait_until_serving(server, root)
    provider = metered(server, transport, root=root)
    provider.get_meter("scaphandre").create_gauge("scaph_host_power_microwatts").set(1_000_000)
    provider.force_flush()
    assert store.nodes() == []


@TRANSPORTS
def test_no_export_of_the_sdk_is_lost_while_configurations_are_taken_over(
    serve, metered, transport, tmp_path
):
    file = tmp_path / "bridge.yaml"
    file.write_text("interval_seconds: 0.001\nwindow_rows: 1000\n")
    config = load_config(file)
    store = MemoryStore()
    server = serve(lambda: store, config)
    wait_until_serving(server)
    provider = metered(server, transport)
    gauge = provider.get_meter("scaphandre").create_gauge("hw.host.power")
    done = threading.Event()

    def take_over() -> None:
        while not done.wait(0.002):
            server.take_over(config, Security())

    taking = threading.Thread(target=take_over)
    taking.start()
    try:
        for watts in range(40):
            gauge.set(float(watts))
            assert provider.force_flush()
            time.sleep(0.002)  # else two exports may be of one row
    finally:
        done.set()
        taking.join()
    stored = store.window("a").read().values_tf[:, 0].tolist()
    assert stored == [float(watts) for watts in range(40)]
