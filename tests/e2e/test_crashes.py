"""Every process of the data layer is killed in turn, or hangs, and its disk fills up, under load.

Exporters retry as OTLP's specification says. At the end the windows must hold every point that was
acknowledged, once. ``uv run pytest tests/e2e/test_crashes.py -m slow -s`` is the long run.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from icos_fl_service.shim import tied
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.services import SERVICES, Service
from icos_fl_timeseries_store.testing import (
    SmallDisk,
    StoreProcesses,
    free_port,
    small_disk,
    store_processes,
)
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

SECOND = 1_000_000_000
INTERVAL_NS = 3 * SECOND
START = 1_699_999_998 * SECOND
ROWS_A_BATCH = 4
ATTEMPT_SECONDS = 5.0
STORE_SECONDS = 3
"""How long a call of the bridge to the store may take."""
HANG_SECONDS = 7.0
RETRIED = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
SEED = 20261125


@dataclass(frozen=True)
class Refusal:
    """Of an attempt, which is made again."""

    at: float
    code: grpc.StatusCode
    details: str
    delay_seconds: float
    """What the server asked for; 0 if nothing."""


@dataclass
class Exporter:
    """Sends a node's rows in batches, the next when the last is acknowledged."""

    node: str
    address: str
    stopping: threading.Event
    rows_a_batch: int = ROWS_A_BATCH
    delay_seconds_max: float = 60.0
    """It waits no longer before it tries again, whatever the server asks for."""
    acknowledged: int = 0
    """Rows, from the first on: a batch is sent until it is."""
    when: list[float] = field(default_factory=list)
    """When each batch was acknowledged."""
    refusals: list[Refusal] = field(default_factory=list)
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
                    delay = delay_seconds(error)
                    self.refusals.append(
                        Refusal(time.monotonic(), error.code(), str(error.details()), delay)
                    )
                    backoff_seconds = min(2 * backoff_seconds, 2.0)
                    self.stopping.wait(min(delay or backoff_seconds, self.delay_seconds_max))
                    continue
                if answer.HasField("partial_success"):
                    self.faults.append(answer.partial_success.error_message)
                    return
                self.acknowledged += self.rows_a_batch
                self.when.append(time.monotonic())
                backoff_seconds = 0.1
                self.stopping.wait(0.02)

    def refused_since(self, when: float) -> list[Refusal]:
        return [refusal for refusal in self.refusals if refusal.at > when]

    def _batch(self) -> pb.ExportMetricsServiceRequest:
        request = pb.ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = self.node
        metric = resource.scope_metrics.add().metrics.add(name="scaph_host_power_microwatts")
        for row in range(self.acknowledged, self.acknowledged + self.rows_a_batch):
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
            "ICOS_FL_BRIDGE_STORE__TIMEOUT_SECONDS": str(STORE_SECONDS),
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

    def process(self, name: str) -> subprocess.Popen[bytes]:
        process = self.bridge if name == "bridge" else self.store.processes[service(name)]
        assert process is not None
        assert process.poll() is None, f"{name} ended by itself: {process.returncode}"
        return process

    def kill(self, name: str) -> None:
        process = self.process(name)
        process.kill()
        process.wait()

    @contextmanager
    def hanging(self, name: str) -> Iterator[None]:
        process = self.process(name)
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def start(self, name: str) -> None:
        if name == "bridge":
            self.start_bridge()
        else:
            self.store.start(service(name))


def service(name: str) -> Service:
    return next(each for each in SERVICES if each == name)


@contextmanager
def pipeline(folder: Path, within: tuple[str, ...] = ()) -> Iterator[Pipeline]:
    with store_processes(folder / "store", within) as store:
        running = Pipeline(store, folder)
        running.start_bridge()
        try:
            yield running
        finally:
            if running.bridge is not None:
                running.bridge.kill()
                running.bridge.wait()


@contextmanager
def exporting(running: Pipeline, number: int = 3, **how: Any) -> Iterator[list[Exporter]]:
    """Exporters that have begun, and have ended when the block has."""
    stopping = threading.Event()
    exporters = [Exporter(f"node-{i}", running.address, stopping, **how) for i in range(number)]
    threads = [threading.Thread(target=exporter.run) for exporter in exporters]
    for thread in threads:
        thread.start()
    try:
        until_all_go_on(exporters, time.monotonic(), 60)
        yield exporters
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


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


def compared(store: StoreProcesses, exporters: list[Exporter]) -> tuple[int, int, int]:
    """How many acknowledged rows the windows lack, hold twice, and hold with another value."""
    missing = doubled = wrong = 0
    with connect(store.settings) as connected:
        for exporter in exporters:
            rows = connected.window(exporter.node).read()
            places = (rows.times_ns_t - START) // INTERVAL_NS
            missing += len(set(range(exporter.acknowledged)) - set(places.tolist()))
            doubled += len(places) - len(set(places.tolist()))
            wrong += int((rows.values_tf[:, 0] != places).sum())
            # Beside what was acknowledged, the batch that was on its way at the end at most.
            assert len(places) <= exporter.acknowledged + exporter.rows_a_batch
            assert np.array_equal(places, np.sort(places))
    return missing, doubled, wrong


def kill(running: Pipeline, name: str, chance: random.Random, _: list[Exporter]) -> None:
    running.kill(name)
    time.sleep(chance.uniform(0.0, 1.0))
    running.start(name)


def hang(running: Pipeline, name: str, _: random.Random, exporters: list[Exporter]) -> None:
    """For longer than any call may take, and see what exporters are told meanwhile."""
    began = time.monotonic()
    with running.hanging(name):
        time.sleep(HANG_SECONDS)
        for exporter in exporters:
            told = {refusal.code for refusal in exporter.refused_since(began)}
            match name:
                case "bridge":
                    assert told == {grpc.StatusCode.DEADLINE_EXCEEDED}
                case "backend":
                    assert told == {grpc.StatusCode.UNAVAILABLE}
                case _:  # not needed for what goes to windows that are known
                    assert exporter.when[-1] > began + HANG_SECONDS - 1


Fault = Callable[[Pipeline, str, random.Random, list[Exporter]], None]


def slow(fault: Fault, rounds: int) -> Any:
    return pytest.param(fault, rounds, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])


@pytest.mark.parametrize(
    ("fault", "rounds"),
    [(kill, 2), (hang, 1), slow(kill, 12), slow(hang, 12)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_no_acknowledged_point_is_lost_or_doubled_whatever_fails(
    tmp_path: Path, fault: Fault, rounds: int, capsys: pytest.CaptureFixture[str]
):
    chance = random.Random(SEED)
    longest: dict[str, float] = {}
    with pipeline(tmp_path) as running:
        with exporting(running) as exporters:
            for _ in range(rounds):
                for name in chance.sample(["bridge", *SERVICES], 5):
                    time.sleep(chance.uniform(0.1, 0.6))
                    fault(running, name, chance, exporters)
                    seconds = until_all_go_on(exporters, time.monotonic(), 60)
                    longest[name] = max(seconds, longest.get(name, 0.0))
        missing, doubled, wrong = compared(running.store, exporters)
    sent = sum(exporter.acknowledged for exporter in exporters)
    with capsys.disabled():
        recoveries = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest.items())
        print(
            f"\n{fault.__name__}, {rounds} rounds, {sent} rows acknowledged: {missing} missing,"
            f" {doubled} doubled; longest recovery after it: {recoveries}"
        )
    assert (missing, doubled, wrong) == (0, 0, 0)


def did_not_run(why: OSError) -> NoReturn:
    warnings.warn(f"DID NOT RUN: {why}", stacklevel=2)
    pytest.skip(f"DID NOT RUN: {why}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """An ext4 for the state of the store."""
    with ExitStack() as stack:
        try:
            small = stack.enter_context(small_disk(tmp_path / "store", 24, tmp_path / "image"))
        except OSError as error:
            did_not_run(error)
        yield small


def megabytes(process: subprocess.Popen[bytes]) -> float:
    """What *process* has in memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def until(condition: Callable[[], bool], patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


Trouble = Callable[[SmallDisk], AbstractContextManager[None]]


@contextmanager
def full(disk: SmallDisk) -> Iterator[None]:
    disk.fill()
    yield
    disk.make_room()


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(full, "No space left on device"), (SmallDisk.frozen, f"did not answer in {STORE_SECONDS} s")],
    ids=["full", "hanging"],
)
def test_while_the_disk_is_of_no_use_exporters_are_told_to_wait_and_readers_go_on(
    tmp_path: Path, disk: SmallDisk, trouble: Trouble, reason: str
):
    with pipeline(tmp_path, disk.within) as running, connect(running.store.settings) as store:
        processes = [running.process(name) for name in ("bridge", "backend")]
        with exporting(running, delay_seconds_max=0.1) as exporters:
            with trouble(disk):
                began = time.monotonic()
                until(lambda: all(each.refused_since(began) for each in exporters), 20)
                before = [megabytes(process) for process in processes]
                time.sleep(2 * HANG_SECONDS)
                grown = [
                    megabytes(process) - mb for process, mb in zip(processes, before, strict=True)
                ]
                for exporter in exporters:
                    stored = len(store.window(exporter.node).read().times_ns_t)
                    assert exporter.acknowledged <= stored
                    for refusal in exporter.refused_since(began):
                        assert refusal.code == grpc.StatusCode.UNAVAILABLE
                        assert reason in refusal.details
                        assert refusal.delay_seconds > 0
            until_all_go_on(exporters, time.monotonic(), 60)
        assert compared(running.store, exporters) == (0, 0, 0)
    assert max(grown) < 10


def large_request(node: str) -> bytes:
    """Half a megabyte of points that are all wanted."""
    return Exporter(node, "", threading.Event(), rows_a_batch=20_000)._batch().SerializeToString()


def insist(address: str, request: bytes, stopping: threading.Event, told: Counter[Any]) -> None:
    """Send *request* on a connection of its own, again as soon as there is an answer."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        export: Callable[..., bytes] = channel.unary_unary(EXPORT)
        while not stopping.is_set():
            try:
                export(request, timeout=ATTEMPT_SECONDS)
                told["OK"] += 1
            except grpc.RpcError as error:
                told[error.code()] += 1


def test_a_store_that_hangs_does_not_fill_the_bridges_memory(tmp_path: Path):
    told: Counter[Any] = Counter()
    stopping = threading.Event()
    with pipeline(tmp_path) as running, exporting(running) as exporters:
        insisting = [
            threading.Thread(
                target=insist, args=(running.address, large_request(f"large-{i}"), stopping, told)
            )
            for i in range(40)
        ]
        bridge = running.process("bridge")
        idle = megabytes(bridge)
        with running.hanging("backend"):
            for thread in insisting:
                thread.start()
            time.sleep(2 * HANG_SECONDS)
            grown = megabytes(bridge) - idle
            stopping.set()
            for thread in insisting:
                thread.join()
        until_all_go_on(exporters, time.monotonic(), 60)
    assert set(told) <= RETRIED
    assert grown < 400  # 16 requests are worked on, which takes about as many MB for each
