"""What an export through the bridge costs, against a server that only acknowledges.

    uv run python benchmarks/bridge.py [--json]

Every server is a process of its own, and takes the same two batches of Scaphandre's series from one
client. The ways take turns, so that what else the machine does falls on all of them:

acknowledge  a bare gRPC server that parses the request and answers OK
memory       the bridge with a store in its own memory
dataclay     the bridge as it is started, with a dataClay of its own on free ports: OK when the rows
             are on disk

Every batch is newer than the one before it, so the windows fill, and then let the oldest rows go.
Then twenty nodes export small batches at once, each on a connection of its own, against one alone:
the ratio is what an export costs when twenty come at once to what it costs alone.

The large batch may cost less through the bridge than to acknowledge: gRPC parses all of it, the
bridge only the metrics that a column names.

All servers have the allocator keep freed memory. Left alone, it keeps or returns a request's 10 MB
and more as the rest of the process happens to lie in memory, and who returns them pays thousands of
page faults for the next request. That doubles what acknowledging costs, and flatters the ratio.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge import Server, default_config
from icos_fl_service import logs
from icos_fl_timeseries_store import MemoryStore, connect
from icos_fl_timeseries_store.testing import free_port, running_store
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as pb_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint

SCRAPES = 60
INTERVAL_NS = 3_000_000_000
START_NS = 1_699_999_998_000_000_000
PROCESSES = {"small": 0, "large": 200}
HOST_SERIES = (
    "scaph_host_power_microwatts",
    "scaph_host_energy_microjoules",
    "scaph_host_memory_total_bytes",
    "scaph_host_memory_available_bytes",
    "scaph_host_load_avg_one",
    "scaph_host_load_avg_five",
    "scaph_host_load_avg_fifteen",
    "scaph_host_cpu_frequency",
    "scaph_host_disk_total_bytes",
    "scaph_host_disk_available_bytes",
    "scaph_host_swap_total_bytes",
    "scaph_host_swap_free_bytes",
    "scaph_self_memory_bytes",
    "scaph_self_cpu_usage_percent",
)
DESCRIPTION = "as Scaphandre describes it to whom scrapes it"
PROCESS_SERIES = (
    "scaph_process_power_consumption_microwatts",
    "scaph_process_cpu_usage_percentage",
    "scaph_process_memory_bytes",
    "scaph_process_memory_virtual_bytes",
    "scaph_process_disk_read_bytes",
    "scaph_process_disk_write_bytes",
)
RUNS = {"small": 100, "large": 25}
WARM_UP = 3
NODES = 20
EXPORTS_A_NODE = 10
MESSAGE_BYTES_MAX = 64 << 20
TARGET_RATIO_OF_LARGE = 1.4
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

Seconds = dict[str, dict[str, list[float]]]
Figures = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Running:
    """A server under test."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """What its process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batch(processes: int, node: str = "benchmark") -> pb.ExportMetricsServiceRequest:
    """SCRAPES scrapes of a host and its processes, each a resource, as the Collector sends them."""
    request = pb.ExportMetricsServiceRequest()
    for scrape in range(SCRAPES):
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = node
        metrics = resource.scope_metrics.add().metrics
        for number, name in enumerate(HOST_SERIES):
            metric = metrics.add(name=name, description=f"{name}, {DESCRIPTION}")
            metric.gauge.data_points.add(as_double=1e8 + scrape * 1e5 - number)
        for name in PROCESS_SERIES if processes else ():
            points = metrics.add(name=name, description=f"{name}, {DESCRIPTION}").gauge.data_points
            for process in range(processes):
                point = points.add(as_double=1e5 + scrape * 1e3 + process)
                for key, value in {
                    "pid": str(10_000 + process),
                    "exe": f"service-{process}",
                    "cmdline": f"/usr/bin/service-{process} --quiet",
                }.items():
                    point.attributes.add(key=key).value.string_value = value
    return request


def points_of(request: pb.ExportMetricsServiceRequest) -> Iterator[tuple[NumberDataPoint, int]]:
    """Every point with the number of its scrape."""
    for scrape, resource in enumerate(request.resource_metrics):
        for metric in resource.scope_metrics[0].metrics:
            for point in metric.gauge.data_points:
                yield point, scrape


class Acknowledge(pb_grpc.MetricsServiceServicer):
    """Says OK to whatever it can parse."""

    def Export(  # noqa: N802 - the service's name
        self, _request: pb.ExportMetricsServiceRequest, _context: grpc.ServicerContext
    ) -> pb.ExportMetricsServiceResponse:
        return pb.ExportMetricsServiceResponse()


def acknowledge(pipe: Connection) -> None:
    """A process: sends its port, ends at the first message."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    server = grpc.server(ThreadPoolExecutor(16), options=options)
    pb_grpc.add_MetricsServiceServicer_to_server(Acknowledge(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(port)
    pipe.recv()
    server.stop(0)


def bridge_in_memory(pipe: Connection) -> None:
    """A process: sends its port, ends at the first message."""
    logs.configure("ERROR")
    server = Server(default_config(), MemoryStore, "127.0.0.1:0", MESSAGE_BYTES_MAX)
    server.start()
    pipe.send(server.port)
    pipe.recv()
    server.stop(0)


@contextmanager
def spawned(serve: Callable[[Connection], None]) -> Iterator[Running]:
    """*serve* in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    try:
        yield Running(f"127.0.0.1:{ours.recv()}", process.pid or 0)
    finally:
        ours.send("end")
        process.join()


@contextmanager
def bridge_on_dataclay() -> Iterator[Running]:
    """The bridge's command, with a dataClay of its own that must hold rows then."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder, running_store(Path(folder)) as settings:
        environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": address,
            "ICOS_FL_BRIDGE_STORE__PORT": str(settings.port),
            "ICOS_FL_BRIDGE_LOG_LEVEL": "ERROR",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "icos_fl_otlp_bridge"], env={**os.environ, **environment}
        )
        try:
            yield Running(address, process.pid)
            with connect(settings) as store:
                stored = store.window("benchmark").info()
            if stored.rows != stored.capacity_rows or "power_consumption" not in stored.columns:
                raise RuntimeError(f"the window is not full after all exports: {stored}")
        finally:
            process.terminate()
            process.wait()


def wait_until_serving(channel: grpc.Channel) -> None:
    request = health_pb2.HealthCheckRequest()
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120, wait_for_ready=True)
    next(answer for answer in watch if answer.status == health_pb2.HealthCheckResponse.SERVING)
    watch.cancel()


class Client:
    """Sends one serialized batch after another to every address, each newer than the one before."""

    def __init__(self, channels: dict[str, grpc.Channel]) -> None:
        self._export: dict[str, Callable[..., pb.ExportMetricsServiceResponse]] = {
            way: channel.unary_unary(
                "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
                response_deserializer=pb.ExportMetricsServiceResponse.FromString,
            )
            for way, channel in channels.items()
        }
        self._sent = 0

    def turn(self, request: pb.ExportMetricsServiceRequest) -> dict[str, float]:
        """Seconds that each way took for the next batch."""
        for point, scrape in points_of(request):
            point.time_unix_nano = START_NS + (self._sent * SCRAPES + scrape) * INTERVAL_NS
        self._sent += 1
        serialized = request.SerializeToString()
        seconds = {}
        ways = list(self._export)
        first = self._sent % len(ways)
        for way in ways[first:] + ways[:first]:
            start = time.perf_counter()
            response = self._export[way](serialized, timeout=60)
            seconds[way] = time.perf_counter() - start
            if response.HasField("partial_success"):
                raise RuntimeError(f"{way}: {response.partial_success.error_message}")
        return seconds


def small_batches(node: str) -> list[bytes]:
    """One after another, each newer than the one before."""
    request = batch(PROCESSES["small"], node)
    serialized = []
    for number in range(EXPORTS_A_NODE):
        for point, scrape in points_of(request):
            point.time_unix_nano = START_NS + (number * SCRAPES + scrape) * INTERVAL_NS
        serialized.append(request.SerializeToString())
    return serialized


def export_all(address: str, batches: list[bytes]) -> None:
    """On a connection of its own; gRPC would share one of the same address."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        export: Callable[..., pb.ExportMetricsServiceResponse] = channel.unary_unary(
            "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
            response_deserializer=pb.ExportMetricsServiceResponse.FromString,
        )
        for serialized in batches:
            response = export(serialized, timeout=60, wait_for_ready=True)
            if response.HasField("partial_success"):
                raise RuntimeError(response.partial_success.error_message)


def at_once(running: Running) -> dict[str, float]:
    """Milliseconds an export, of one node alone and of NODES at once."""
    one, *nodes = (small_batches(f"node-{number}") for number in range(1 + NODES))
    export_all(running.address, small_batches("warm-up"))
    start = time.perf_counter()
    export_all(running.address, one)
    alone = (time.perf_counter() - start) / EXPORTS_A_NODE
    start = time.perf_counter()
    with ThreadPoolExecutor(NODES) as exporters:
        list(exporters.map(export_all, [running.address] * NODES, nodes))
    together = (time.perf_counter() - start) / (NODES * EXPORTS_A_NODE)
    return {
        "alone_ms": round(1e3 * alone, 2),
        "at_once_ms": round(1e3 * together, 2),
        "ratio": round(together / alone, 2),
    }


def measure(batches: dict[str, pb.ExportMetricsServiceRequest]) -> tuple[Seconds, Figures]:
    """Seconds of each export, by batch and way; CPU seconds of a million points, and NODES."""
    seconds: Seconds = {}
    others: Figures = {"cpu_seconds_a_million_points": {}, "nodes_at_once": {}}
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(started)
            for way, started in {
                "acknowledge": spawned(acknowledge),
                "memory": spawned(bridge_in_memory),
                "dataclay": bridge_on_dataclay(),
            }.items()
        }
        options = [("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]
        channels = {
            way: stack.enter_context(grpc.insecure_channel(server.address, options))
            for way, server in servers.items()
        }
        for way in ("memory", "dataclay"):
            wait_until_serving(channels[way])
        client = Client(channels)
        for size, request in batches.items():
            before = {way: server.cpu_seconds() for way, server in servers.items()}
            turns = [client.turn(request) for _ in range(WARM_UP + RUNS[size])]
            seconds[size] = {way: [turn[way] for turn in turns[WARM_UP:]] for way in channels}
            millions = len(turns) * sum(1 for _ in points_of(request)) / 1e6
            others["cpu_seconds_a_million_points"][size] = {
                way: round((server.cpu_seconds() - before[way]) / millions, 3)
                for way, server in servers.items()
            }
        for way, server in servers.items():
            others["nodes_at_once"][way] = at_once(server)
    return seconds, others


def run() -> Figures:
    """By batch: its size, milliseconds of each way, ratios, and rows stored a second."""
    os.environ.update(ALLOCATOR)  # the servers' processes inherit it
    batches = {size: batch(processes) for size, processes in PROCESSES.items()}
    seconds, figures = measure(batches)
    for size, ways in seconds.items():
        median = {way: statistics.median(times) for way, times in ways.items()}
        bridges = [way for way in ways if way != "acknowledge"]
        # Of neighbours in one turn: what the machine does in between falls on both.
        ratios = {
            way: [a / b for a, b in zip(ways[way], ways["acknowledge"], strict=True)]
            for way in bridges
        }
        figures[size] = {
            "batch": {
                "megabytes": round(batches[size].ByteSize() / 1e6, 2),
                "points": sum(1 for _ in points_of(batches[size])),
                "exports": RUNS[size],
            },
            "median_ms": {way: round(1e3 * value, 2) for way, value in median.items()},
            "ratio": {way: round(statistics.median(ratios[way]), 2) for way in bridges},
            "rows_a_second": {way: round(SCRAPES / median[way]) for way in bridges},
        }
    return figures


def main() -> int:
    """Print the figures, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    as_json = parser.parse_args().json
    figures = run()
    if as_json:
        print(json.dumps({"target_ratio_of_large": TARGET_RATIO_OF_LARGE, **figures}))
        return 0
    for size in PROCESSES:
        found = figures[size]
        shape = found["batch"]
        print(
            f"{size}: {shape['megabytes']} MB, {shape['points']:,} points, {shape['exports']} times"
        )
        for way, value in found["median_ms"].items():
            line = f"  {way:12} median {value:8.2f} ms"
            if way in found["ratio"]:
                rows = found["rows_a_second"][way]
                line += f", {rows:>7,} rows/s, ratio to acknowledge {found['ratio'][way]:.2f}"
                line += f" (target <= {TARGET_RATIO_OF_LARGE})" if size == "large" else ""
            cpu = figures["cpu_seconds_a_million_points"][size][way]
            print(f"{line}, {cpu:.2f} CPU s a million points")
    print(f"{NODES} nodes at once, small batches, {EXPORTS_A_NODE} of each:")
    for way, cost in figures["nodes_at_once"].items():
        line = f"  {way:12} {cost['at_once_ms']:8.2f} ms an export, alone {cost['alone_ms']:.2f} ms"
        print(f"{line}, ratio {cost['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
