"""Every process of the data layer is killed in turn, at random moments, under load.

Exporters retry as OTLP's specification says. At the end the windows must hold every point that was
acknowledged, once. ``uv run pytest tests/e2e/test_crashes.py -m slow -s`` is the long run.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from icos_fl_service.shim import tied
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.services import SERVICES, Service
from icos_fl_timeseries_store.testing import StoreProcesses, free_port, store_processes
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

SECOND = 1_000_000_000
INTERVAL_NS = 3 * SECOND
START = 1_699_999_998 * SECOND
ROWS_A_BATCH = 4
ATTEMPT_SECONDS = 5.0
RETRIED = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
SEED = 20261125


@dataclass
class Exporter:
    """Sends a node's rows in batches, the next when the last is acknowledged."""

    node: str
    address: str
    stopping: threading.Event
    acknowledged: int = 0
    """Rows, from the first on: a batch is sent until it is."""
    when: list[float] = field(default_factory=list)
    """When each batch was acknowledged."""
    faults: list[str] = field(default_factory=list)

    def run(self) -> None:
        options = [("grpc.max_reconnect_backoff_ms", 1000)]
        with grpc.insecure_channel(self.address, options) as channel:
            stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
            backoff_seconds = 0.1
            while not self.stopping.is_set():
                try:
                    answer = stub.Export(self._batch(), timeout=ATTEMPT_SECONDS)
                except grpc.RpcError as error:
                    if error.code() not in RETRIED:
                        self.faults.append(f"{error.code()}: {error.details()}")
                        return
                    backoff_seconds = min(2 * backoff_seconds, 2.0)
                    self.stopping.wait(delay_seconds(error) or backoff_seconds)
                    continue
                if answer.HasField("partial_success"):
                    self.faults.append(answer.partial_success.error_message)
                    return
                self.acknowledged += ROWS_A_BATCH
                self.when.append(time.monotonic())
                backoff_seconds = 0.1
                self.stopping.wait(0.02)

    def _batch(self) -> pb.ExportMetricsServiceRequest:
        request = pb.ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = self.node
        metric = resource.scope_metrics.add().metrics.add(name="scaph_host_power_microwatts")
        for row in range(self.acknowledged, self.acknowledged + ROWS_A_BATCH):
            metric.gauge.data_points.add(
                time_unix_nano=START + row * INTERVAL_NS, as_int=row * 1_000_000
            )
        return request


def delay_seconds(error: grpc.RpcError) -> float:
    """What the server asked for; 0 if nothing."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return 0.0


class Pipeline:
    """A store and a bridge, each process of which can be killed and started again."""

    def __init__(self, store: StoreProcesses, folder: Path) -> None:
        self.store = store
        self.address = f"127.0.0.1:{free_port()}"
        config = folder / "bridge.yaml"
        config.write_text("window_rows: 100000\n")
        self._environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": self.address,
            "ICOS_FL_BRIDGE_STORE__PORT": str(store.settings.port),
            "ICOS_FL_BRIDGE_STORE__TIMEOUT_SECONDS": "3",
            "ICOS_FL_BRIDGE_CONFIG": str(config),
        }
        self._log = (folder / "bridge.log").open("ab")
        self.bridge: subprocess.Popen[bytes] | None = None

    def start_bridge(self) -> None:
        self.bridge = subprocess.Popen(
            tied(sys.executable, "-m", "icos_fl_otlp_bridge"),
            env={**os.environ, **self._environment},
            stdout=self._log,
            stderr=self._log,
        )

    def kill(self, name: str) -> None:
        process = self.bridge if name == "bridge" else self.store.processes[service(name)]
        assert process is not None
        assert process.poll() is None, f"{name} ended by itself: {process.returncode}"
        process.kill()
        process.wait()

    def start(self, name: str) -> None:
        if name == "bridge":
            self.start_bridge()
        else:
            self.store.start(service(name))


def service(name: str) -> Service:
    return next(each for each in SERVICES if each == name)


@contextmanager
def pipeline(folder: Path) -> Iterator[Pipeline]:
    with store_processes(folder / "store") as store:
        running = Pipeline(store, folder)
        running.start_bridge()
        try:
            yield running
        finally:
            if running.bridge is not None:
                running.bridge.kill()
                running.bridge.wait()


def until_all_go_on(exporters: list[Exporter], since: float, patience_seconds: float) -> float:
    """Seconds from *since* until every exporter has had a batch acknowledged that came after."""
    while True:
        faults = [fault for exporter in exporters for fault in exporter.faults]
        assert not faults
        first = [next((t for t in each.when[-500:] if t > since), None) for each in exporters]
        if all(first):
            return max(t for t in first if t is not None) - since
        assert time.monotonic() < since + patience_seconds, "the pipeline does not run on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "rounds",
    [
        3,
        pytest.param(12, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_no_acknowledged_point_is_lost_or_doubled_whatever_is_killed(
    tmp_path: Path, rounds: int, capsys: pytest.CaptureFixture[str]
):
    chance = random.Random(SEED)
    stopping = threading.Event()
    longest: dict[str, float] = {}
    with pipeline(tmp_path) as running:
        exporters = [Exporter(f"node-{i}", running.address, stopping) for i in range(3)]
        threads = [threading.Thread(target=exporter.run) for exporter in exporters]
        for thread in threads:
            thread.start()
        try:
            until_all_go_on(exporters, time.monotonic(), 60)
            for _ in range(rounds):
                for name in chance.sample(["bridge", *SERVICES], 5):
                    time.sleep(chance.uniform(0.1, 0.6))
                    running.kill(name)
                    time.sleep(chance.uniform(0.0, 1.0))
                    running.start(name)
                    seconds = until_all_go_on(exporters, time.monotonic(), 60)
                    longest[name] = max(seconds, longest.get(name, 0.0))
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        missing = doubled = wrong = 0
        with connect(running.store.settings) as store:
            for exporter in exporters:
                rows = store.window(exporter.node).read()
                places = (rows.times_ns_t - START) // INTERVAL_NS
                missing += len(set(range(exporter.acknowledged)) - set(places.tolist()))
                doubled += len(places) - len(set(places.tolist()))
                wrong += int((rows.values_tf[:, 0] != places).sum())
                # Beside what was acknowledged, the batch that was on its way at the end at most.
                assert len(places) <= exporter.acknowledged + ROWS_A_BATCH
                assert np.array_equal(places, np.sort(places))
    sent = sum(exporter.acknowledged for exporter in exporters)
    with capsys.disabled():
        recoveries = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest.items())
        print(
            f"\n{rounds} rounds, {sent} rows acknowledged: {missing} missing, {doubled} doubled;"
            f" longest recovery after a start: {recoveries}"
        )
    assert (missing, doubled, wrong) == (0, 0, 0)
