"""Many times the normal load for minutes: is memory flat, is nothing refused, is every row there?

    uv run python benchmarks/soak.py [--minutes 10] [--speed 50] [--nodes 20] [--json]

Normal is what a node's Collector does: a scrape of Scaphandre's 14 host series every 3 s, and an
export of 60 scrapes every 180 s. All processes are real: a store, the bridge and the processor as
they are started, with the bridge's packaged columns. Each node exports on a connection of its own,
and sends again what is refused for now, as OTLP says. Every window is watched through the
processor, and twice a second a node's sequences are taken.

Before that each node sends a backlog of 28 hours as fast as it is taken. So windows are full, and
their files near the size at which they are written anew, when the measuring begins; of memory its
first fifth is left out. A process's growth is the slope of a line through the rest, told as it
would be in a day of normal load.

The exit status is 1 if anything is over its limit.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from bridge import INTERVAL_NS, MESSAGE_BYTES_MAX, SCRAPES, batch, points_of, wait_until_serving
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from grpc_status import rpc_status
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import StoreSettings, connect
from icos_fl_timeseries_store.durable import JOURNAL_BYTES_MIN, JOURNAL_FACTOR
from icos_fl_timeseries_store.testing import StoreProcesses, store_processes

EXPORT_SECONDS = SCRAPES * INTERVAL_NS / 1e9
BACKLOG_EXPORTS = 560
LOOK_SECONDS = 2.0
ATTEMPT_SECONDS = 10.0
RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
POWER = "scaph_host_power_microwatts"
FRAME_BYTES_MAX = 16 << 10
"""Of one export in a file."""
LIMIT_GROWTH_MB_A_DAY = 5.0

Figures = dict[str, Any]


@dataclass
class Node:
    """Exports rows from a start on, INTERVAL_NS apart, each with its number as its power."""

    name: str
    address: str
    start_ns: int
    rows: int = 0
    """That were acknowledged."""
    watched: int = 0
    """That the processor told, since the backlog."""
    refusals: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """What each export took, with all its attempts."""

    def __post_init__(self) -> None:
        self._request = batch(0, self.name)
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(self.address, options)
        self._export: Callable[..., bytes] = self._channel.unary_unary(
            "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
        )

    def send_backlog(self) -> None:
        for _ in range(BACKLOG_EXPORTS):
            self.export()

    def send_until(self, ended: threading.Event, every_seconds: float, after: float) -> None:
        due = time.monotonic() + after
        while not ended.wait(max(0.0, due - time.monotonic())):
            began = time.monotonic()
            self.export()
            self.seconds.append(time.monotonic() - began)
            due += every_seconds

    def export(self) -> None:
        """The next SCRAPES rows, until they are acknowledged."""
        for point, scrape in points_of(self._request):
            point.time_unix_nano = self.start_ns + (self.rows + scrape) * INTERVAL_NS
        for scrape, resource in enumerate(self._request.resource_metrics):
            point = resource.scope_metrics[0].metrics[0].gauge.data_points[0]
            point.as_double = 1e6 * (self.rows + scrape)
        serialized = self._request.SerializeToString()
        while True:
            try:
                if answer := self._export(serialized, timeout=ATTEMPT_SECONDS):
                    self.refusals.append(f"not wholly taken: {answer!r}")
                break
            except grpc.RpcError as error:
                if error.code() not in RETRIED:
                    raise
                self.refusals.append(f"{error.code().name}: {error.details()}")
                time.sleep(delay_seconds(error))
        self.rows += SCRAPES

    def watch(self, processor: grpc.Channel, begun: threading.Event) -> None:
        """Count what the processor tells, until the channel is closed."""
        watching = pb_grpc.ProcessorServiceStub(processor).WatchWindow(  # type: ignore[no-untyped-call]
            pb.WatchWindowRequest(node=self.name)
        )
        try:
            next(watching)
            begun.set()
            for change in watching:
                self.watched += change.changed_rows
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.CANCELLED:
                self.refusals.append(f"watch: {error.code().name}: {error.details()}")
            begun.set()


def delay_seconds(error: grpc.RpcError) -> float:
    """What the server asked for; a second if nothing."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return 1.0


@dataclass
class Watched:
    """A process: what it has in memory of its own, look by look."""

    pid: int
    megabytes: list[float] = field(default_factory=list)

    def look(self) -> None:
        status = Path(f"/proc/{self.pid}/status").read_text()
        kibibytes = status.partition("RssAnon:")[2].split()[0]
        self.megabytes.append(int(kibibytes) * 1024 / 1e6)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Files:
    """The files of the windows: how large the largest was, and how often they were written anew."""

    folder: Path
    largest_bytes: int = 0
    written_anew: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        for path in self.folder.glob("*.state"):
            found = path.stat()
            self.largest_bytes = max(self.largest_bytes, found.st_size)
            if self._numbers.setdefault(path.name, found.st_ino) != found.st_ino:
                self._numbers[path.name] = found.st_ino
                self.written_anew += 1


@contextmanager
def service(module: str, log: Path, environment: dict[str, str]) -> Iterator[Watched]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            tied(sys.executable, "-m", module),
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
        )
    try:
        yield Watched(process.pid)
    finally:
        process.terminate()
        process.wait()


def complaints(folder: Path) -> list[str]:
    """Lines of the services' logs that tell of something wrong."""
    found = []
    for log in folder.glob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            try:
                wrong = json.loads(line)["level"] not in ("debug", "info")
            except (ValueError, KeyError, TypeError):
                wrong = "Traceback" in line
            if wrong:
                found.append(f"{log.stem}: {line[:300]}")
    return found


def take_sequences(processor: grpc.Channel, nodes: list[Node], ended: threading.Event) -> None:
    """As those who train do, of one node after another."""
    stub = pb_grpc.ProcessorServiceStub(processor)  # type: ignore[no-untyped-call]
    chance = random.Random(1)
    while not ended.wait(0.5):
        node = chance.choice(nodes)
        series = pb.SeriesSpec(
            node=node.name,
            features=["power_consumption", "memory_usage"],
            targets=["power_consumption"],
            lookback=60,
            horizon=20,
            train_fraction=0.8,
        )
        try:
            taken = sum(1 for _ in stub.GetSequences(pb.GetSequencesRequest(series=series)))
            if taken < 2:
                node.refusals.append("no sequences")
        except grpc.RpcError as error:
            node.refusals.append(f"sequences: {error.code().name}: {error.details()}")


@dataclass
class Soak:
    """All that is running."""

    store: StoreProcesses
    processes: dict[str, Watched]
    nodes: list[Node]
    processor: grpc.Channel
    files: Files

    def run(self, minutes: float, speed: float) -> dict[str, float]:
        """Send the backlog, then soak; returns the CPU seconds of each process in the soak."""
        with ThreadPoolExecutor(2 * len(self.nodes) + 1) as threads:
            list(threads.map(Node.send_backlog, self.nodes))
            backlog = [node.rows for node in self.nodes]
            for node in self.nodes:
                begun = threading.Event()
                threads.submit(node.watch, self.processor, begun)
                begun.wait(60)
            ended = threading.Event()
            before = {name: process.cpu_seconds() for name, process in self.processes.items()}
            every = EXPORT_SECONDS / speed
            sending = [
                threads.submit(node.send_until, ended, every, every * place / len(self.nodes))
                for place, node in enumerate(self.nodes)
            ]
            sending.append(threads.submit(take_sequences, self.processor, self.nodes, ended))
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                for process in self.processes.values():
                    process.look()
                self.files.look()
                time.sleep(LOOK_SECONDS)
            cpu = {n: process.cpu_seconds() - before[n] for n, process in self.processes.items()}
            ended.set()
            for each in sending:
                each.result()
            patience = time.monotonic() + 30
            for node, rows in zip(self.nodes, backlog, strict=True):
                while node.watched < node.rows - rows and time.monotonic() < patience:
                    time.sleep(0.1)
                node.watched += rows
            self.processor.close()
        return cpu


@contextmanager
def started(folder: Path, number: int, start_ns: int) -> Iterator[Soak]:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("bridge", "processor")}
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    with ExitStack() as stack:
        store = stack.enter_context(store_processes(folder))
        processes = {str(name): Watched(each.pid) for name, each in store.processes.items()}
        channels = {}
        for name, module in (
            ("bridge", "icos_fl_otlp_bridge"),
            ("processor", "icos_fl_processor"),
        ):
            prefix = f"ICOS_FL_{name.upper()}"
            environment = {
                f"{prefix}_LISTEN_ADDRESS": addresses[name],
                f"{prefix}_STORE__PORT": str(store.settings.port),
            }
            log = folder / f"{name}.log"
            processes[name] = stack.enter_context(service(module, log, environment))
            channels[name] = stack.enter_context(grpc.insecure_channel(addresses[name], options))
            wait_until_serving(channels[name])
        nodes = [Node(f"node-{i:02}", addresses["bridge"], start_ns) for i in range(number)]
        files = Files(folder / "objects" / "windows")
        yield Soak(store, processes, nodes, channels["processor"], files)


def missing_rows(settings: StoreSettings, nodes: list[Node]) -> int:
    """Of the newest that each window should hold, with the power that they should have."""
    missing = 0
    with connect(settings) as store:
        for node in nodes:
            window = store.window(node.name)
            rows, capacity = window.read(), window.info().capacity_rows
            expected = np.arange(max(0, node.rows - capacity), node.rows)
            found = (rows.times_ns_t - node.start_ns) // INTERVAL_NS
            power = rows.values_tf[:, rows.columns.index("power_consumption")]
            right = found[power == found]
            missing += len(np.setdiff1d(expected, right))
    return missing


def file_limit_bytes(capacity_rows: int, columns: int) -> int:
    """What a file may grow to before it is written anew, and what comes while that happens."""
    state = capacity_rows * 8 * (2 + columns) + FRAME_BYTES_MAX
    return state + max(JOURNAL_BYTES_MIN, JOURNAL_FACTOR * state) + 2 * FRAME_BYTES_MAX


def growth_mb_a_day(megabytes: list[float], speed: float) -> float:
    settled = np.array(megabytes[len(megabytes) // 5 :])
    slope = np.polyfit(np.arange(len(settled)) * LOOK_SECONDS, settled, 1)[0]
    return float(slope) * 86_400 / speed


def run(minutes: float, speed: float, number: int) -> Figures:
    """What the soak found; the keys of ``limits`` are those of what they limit."""
    seconds = BACKLOG_EXPORTS * EXPORT_SECONDS + 60 * minutes * speed
    start_ns = int((time.time() - seconds) * 1e9) // INTERVAL_NS * INTERVAL_NS
    with tempfile.TemporaryDirectory() as name, started(Path(name), number, start_ns) as soak:
        cpu = soak.run(minutes, speed)
        missing = missing_rows(soak.store.settings, soak.nodes)
        wrong = complaints(Path(name))
        with connect(soak.store.settings) as store:
            info = store.window(soak.nodes[0].name).info()
    took = [second for node in soak.nodes for second in node.seconds]
    refusals = [f"{node.name}: {refusal}" for node in soak.nodes for refusal in node.refusals]
    return {
        "exports": len(took),
        "rows": sum(node.rows for node in soak.nodes),
        "export_ms": {
            "median": round(1e3 * float(np.median(took)), 1),
            "p99": round(1e3 * float(np.quantile(took, 0.99)), 1),
        },
        "cpu_percent_of_a_core": {n: round(100 * s / (60 * minutes), 1) for n, s in cpu.items()},
        "megabytes": {
            name: round(float(np.median(process.megabytes)), 1)
            for name, process in soak.processes.items()
        },
        "growth_mb_a_day": {
            name: round(growth_mb_a_day(process.megabytes, speed), 2)
            for name, process in soak.processes.items()
        },
        "largest_file_bytes": soak.files.largest_bytes,
        "files_written_anew": soak.files.written_anew,
        "rows_missing_in_windows": missing,
        "rows_not_watched": sum(node.rows - node.watched for node in soak.nodes),
        "refusals": len(refusals),
        "complaints_in_logs": len(wrong),
        "what_was_said": (refusals + wrong)[:20],
        "limits": {
            "growth_mb_a_day": LIMIT_GROWTH_MB_A_DAY,
            "largest_file_bytes": file_limit_bytes(info.capacity_rows, len(info.columns)),
            "rows_missing_in_windows": 0,
            "rows_not_watched": 0,
            "refusals": 0,
            "complaints_in_logs": 0,
        },
    }


def over_limits(figures: Figures) -> list[str]:
    """Which figures are."""
    found = []
    for name, limit in figures["limits"].items():
        value = figures[name]
        values = value.items() if isinstance(value, dict) else [("", value)]
        found += [f"{name} {part}".strip() for part, number in values if number > limit]
    return found


def main() -> int:
    """Print the figures, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=50.0, help="times the normal load")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    figures = run(arguments.minutes, arguments.speed, arguments.nodes)
    over = over_limits(figures)
    if arguments.json:
        print(json.dumps({**figures, "over_limits": over}))
        return 1 if over else 0
    limits = figures["limits"]
    print(
        f"{arguments.nodes} nodes, {arguments.speed:g} times the normal load for"
        f" {arguments.minutes:g} minutes: {figures['exports']:,} exports, median"
        f" {figures['export_ms']['median']} ms, 99 % below {figures['export_ms']['p99']} ms"
    )
    for name, growth in figures["growth_mb_a_day"].items():
        megabytes, cpu = (figures[key][name] for key in ("megabytes", "cpu_percent_of_a_core"))
        print(
            f"  {name:10} {cpu:5.1f} % of a core, {megabytes:6.1f} MB, {growth:+6.2f} MB a day of"
            f" normal load (limit {limits['growth_mb_a_day']:g})"
        )
    print(
        f"  largest file of a window {figures['largest_file_bytes']:,} bytes (limit"
        f" {limits['largest_file_bytes']:,}), written anew {figures['files_written_anew']} times"
    )
    for name in ("rows_missing_in_windows", "rows_not_watched", "refusals", "complaints_in_logs"):
        print(f"  {name.replace('_', ' ')}: {figures[name]} (limit {limits[name]})")
    for line in figures["what_was_said"]:
        print(f"    {line}")
    print(f"over limits: {', '.join(over) or 'nothing'}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
