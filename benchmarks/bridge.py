"""What an export through the bridge costs, against servers that store nothing.

    uv run python benchmarks/bridge.py [--json]

Every server is a process of its own, and takes the same two batches of Scaphandre's series from one
client, over gRPC and then over HTTP. The ways take turns, so that what else the machine does falls
on all of them:

acknowledge  a bare gRPC server that parses the request and answers OK
collector    the OpenTelemetry Collector's own OTLP receiver, with an exporter that does nothing;
             built by deploy/build-sources if it is not there
memory       the bridge with a store in its own memory
dataclay     the bridge as it is started, with a dataClay of its own on free ports: OK when the rows
             are on disk

Every batch is newer than the one before it, so the windows fill, and then let the oldest rows go.
CPU seconds are those of the server's process, without the store's. Then twenty nodes export small
batches at once, each on a connection of its own, against one alone: the ratio is what an export
costs when twenty come at once to what it costs alone.

The large batch may cost less through the bridge than to acknowledge: gRPC parses all of it, the
bridge only the metrics that a column names.

All Python servers have the allocator keep freed memory. Left alone, it keeps or returns a request's
10 MB and more as the rest of the process happens to lie in memory, and who returns them pays
thousands of page faults for the next request. That doubles what acknowledging costs, and flatters
the ratio.
"""

import argparse
import http.client
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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_otlp_bridge import Server, default_config
from icos_fl_service import logs
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import MemoryStore, connect
from icos_fl_timeseries_store.testing import running_store
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
BRIDGES = ("memory", "dataclay")
NODES = 20
EXPORTS_A_NODE = 10
MESSAGE_BYTES_MAX = 64 << 20
TARGET_RATIO_OF_LARGE = 1.4
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

DEPLOY = Path(__file__).parents[1] / "deploy"
COLLECTOR_CONFIG = """
receivers:
  otlp:
    protocols:
      grpc: {{endpoint: "{grpc}", max_recv_msg_size_mib: 64}}
      http: {{endpoint: "{http}", max_request_body_size: 67108864}}
exporters: {{nop: }}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines: {{metrics: {{receivers: [otlp], exporters: [nop]}}}}
"""

Export = Callable[[bytes], None]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A server under test; each address is host:port."""

    pid: int
    grpc: str
    http: str | None = None

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
    pipe.send((port,))
    pipe.recv()
    server.stop(0)


def bridge_in_memory(pipe: Connection) -> None:
    """A process: sends its ports, ends at the first message."""
    logs.configure("ERROR")
    server = Server(
        default_config(),
        MemoryStore,
        "127.0.0.1:0",
        MESSAGE_BYTES_MAX,
        http_listen_address="127.0.0.1:0",
    )
    server.start()
    pipe.send((server.port, server.http_port))
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
        yield Running(process.pid or 0, *(f"127.0.0.1:{port}" for port in ours.recv()))
    finally:
        ours.send("end")
        process.join()


@contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[int]:
    """Its pid; it is ended with the block."""
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def bridge_on_dataclay() -> Iterator[Running]:
    """The bridge's command, with a dataClay of its own that must hold rows then."""
    grpc_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with tempfile.TemporaryDirectory() as folder, running_store(Path(folder)) as settings:
        environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": grpc_address,
            "ICOS_FL_BRIDGE_HTTP_LISTEN_ADDRESS": http_address,
            "ICOS_FL_BRIDGE_STORE__PORT": str(settings.port),
            "ICOS_FL_BRIDGE_LOG_LEVEL": "ERROR",
        }
        command = tied(sys.executable, "-m", "icos_fl_otlp_bridge")
        with ended(subprocess.Popen(command, env={**os.environ, **environment})) as pid:
            yield Running(pid, grpc_address, http_address)
            with connect(settings) as store:
                stored = store.window("benchmark").info()
            if stored.rows != stored.capacity_rows or "power_consumption" not in stored.columns:
                raise RuntimeError(f"the window is not full after all exports: {stored}")


@contextmanager
def collector(program: str) -> Iterator[Running]:
    """The Collector's OTLP receiver."""
    grpc_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(COLLECTOR_CONFIG.format(grpc=grpc_address, http=http_address))
        log = (Path(folder) / "log").open("wb")
        command = [program, f"--config={config}"]
        with log, ended(subprocess.Popen(command, stdout=log, stderr=log)) as pid:
            yield Running(pid, grpc_address, http_address)


def collector_program() -> str | None:
    """Where the Collector is, built if need be; None, with the reason on standard error, if not."""
    command = [str(DEPLOY / "build-sources"), "otelcol-peer"]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode != 0:
        print("THE COLLECTOR WAS NOT MEASURED: the lines above say why", file=sys.stderr)
        return None
    return built.stdout.strip().partition("=")[2]


def wait_until_serving(channel: grpc.Channel) -> None:
    request = health_pb2.HealthCheckRequest()
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120, wait_for_ready=True)
    next(answer for answer in watch if answer.status == health_pb2.HealthCheckResponse.SERVING)
    watch.cancel()


def checked(response: pb.ExportMetricsServiceResponse) -> None:
    # The Collector sets an empty one on full success.
    if response.partial_success != pb.ExportMetricsPartialSuccess():
        raise RuntimeError(response.partial_success.error_message)


def grpc_export(channel: grpc.Channel) -> Export:
    """Exports by gRPC; raises unless all is taken."""
    export: Callable[..., pb.ExportMetricsServiceResponse] = channel.unary_unary(
        "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
        response_deserializer=pb.ExportMetricsServiceResponse.FromString,
    )
    return lambda serialized: checked(export(serialized, timeout=60, wait_for_ready=True))


def http_export(connection: http.client.HTTPConnection) -> Export:
    """Exports by HTTP; raises unless all is taken."""

    def export(serialized: bytes) -> None:
        headers = {"content-type": "application/x-protobuf"}
        connection.request("POST", "/v1/metrics", serialized, headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"HTTP status {answer.status}")
        checked(pb.ExportMetricsServiceResponse.FromString(body))

    return export


@dataclass
class Client:
    """Sends one batch after another, each newer than the one before."""

    sent: int = 0

    def turn(
        self, exports: dict[str, Export], request: pb.ExportMetricsServiceRequest
    ) -> dict[str, float]:
        """Seconds that each way took for the next batch."""
        for point, scrape in points_of(request):
            point.time_unix_nano = START_NS + (self.sent * SCRAPES + scrape) * INTERVAL_NS
        self.sent += 1
        serialized = request.SerializeToString()
        seconds = {}
        ways = list(exports)
        first = self.sent % len(ways)
        for way in ways[first:] + ways[:first]:
            start = time.perf_counter()
            exports[way](serialized)
            seconds[way] = time.perf_counter() - start
        return seconds


def small_batches(node: str) -> list[bytes]:
    """One after another, each newer than the one before."""
    request = batch(PROCESSES["small"], node)
    serialized = []
    for number in range(1 + EXPORTS_A_NODE):
        for point, scrape in points_of(request):
            point.time_unix_nano = START_NS + (number * SCRAPES + scrape) * INTERVAL_NS
        serialized.append(request.SerializeToString())
    return serialized


def export_all(address: str, batches: list[bytes]) -> None:
    """On a connection of its own; gRPC would share one of the same address."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        export = grpc_export(channel)
        for serialized in batches:
            export(serialized)


def at_once(running: Running) -> Figures:
    """Milliseconds an export, of one node alone and of NODES at once."""
    one, *nodes = (small_batches(f"node-{number}") for number in range(1 + NODES))
    for batches in (one, *nodes):
        export_all(running.grpc, [batches.pop(0)])  # which makes the node's window
    start = time.perf_counter()
    export_all(running.grpc, one)
    alone = (time.perf_counter() - start) / EXPORTS_A_NODE
    start = time.perf_counter()
    with ThreadPoolExecutor(NODES) as exporters:
        list(exporters.map(export_all, [running.grpc] * NODES, nodes))
    together = (time.perf_counter() - start) / (NODES * EXPORTS_A_NODE)
    return {
        "alone_ms": round(1e3 * alone, 2),
        "at_once_ms": round(1e3 * together, 2),
        "ratio": round(together / alone, 2),
    }


def measured(
    client: Client,
    servers: dict[str, Running],
    exports: dict[str, Export],
    request: pb.ExportMetricsServiceRequest,
    runs: int,
) -> Figures:
    """What one export of the batch costs, by way."""
    before = {way: servers[way].cpu_seconds() for way in exports}
    turns = [client.turn(exports, request) for _ in range(WARM_UP + runs)]
    millions = len(turns) * sum(1 for _ in points_of(request)) / 1e6
    cpu = {way: (servers[way].cpu_seconds() - before[way]) / millions for way in exports}
    figures: Figures = {}
    for way in exports:
        median = statistics.median(turn[way] for turn in turns[WARM_UP:])
        figures[way] = {
            "median_ms": round(1e3 * median, 2),
            "cpu_seconds_a_million_points": round(cpu[way], 2),
        }
        if way not in BRIDGES:
            continue
        figures[way]["rows_a_second"] = round(SCRAPES / median)
        if "acknowledge" in exports:
            # Of neighbours in one turn: what the machine does in between falls on both.
            ratios = [turn[way] / turn["acknowledge"] for turn in turns[WARM_UP:]]
            figures[way]["ratio_to_acknowledge"] = round(statistics.median(ratios), 2)
        if "collector" in exports:
            figures[way]["cpu_ratio_to_collector"] = round(cpu[way] / cpu["collector"], 2)
    return figures


def run() -> Figures:
    """By transport, batch and way what an export costs; and NODES at once, by way."""
    os.environ.update(ALLOCATOR)  # the servers' processes inherit it
    starting = {"acknowledge": spawned(acknowledge)}
    program = collector_program()
    if program is not None:
        starting["collector"] = collector(program)
    starting |= {"memory": spawned(bridge_in_memory), "dataclay": bridge_on_dataclay()}
    batches = {size: batch(processes) for size, processes in PROCESSES.items()}
    figures: Figures = {"grpc": {}, "http": {}}
    with ExitStack() as stack:
        servers = {way: stack.enter_context(started) for way, started in starting.items()}
        options = [("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]
        channels = {
            way: stack.enter_context(grpc.insecure_channel(server.grpc, options))
            for way, server in servers.items()
        }
        for way in BRIDGES:
            wait_until_serving(channels[way])
        connections = {
            way: stack.enter_context(closing(http.client.HTTPConnection(server.http, timeout=60)))
            for way, server in servers.items()
            if server.http
        }
        exports = {
            "grpc": {way: grpc_export(channel) for way, channel in channels.items()},
            "http": {way: http_export(connection) for way, connection in connections.items()},
        }
        client = Client()
        for transport, ways in exports.items():
            for size, request in batches.items():
                figures[transport][size] = measured(client, servers, ways, request, RUNS[size])
        figures["nodes_at_once"] = {way: at_once(server) for way, server in servers.items()}
    figures["batches"] = {
        size: {
            "megabytes": round(request.ByteSize() / 1e6, 2),
            "points": sum(1 for _ in points_of(request)),
            "exports": RUNS[size],
        }
        for size, request in batches.items()
    }
    return figures


def print_table(figures: Figures) -> None:
    """For people."""
    for transport, size in product(("grpc", "http"), PROCESSES):
        shape = figures["batches"][size]
        print(
            f"{transport}, {size}: {shape['megabytes']} MB, {shape['points']:,} points, "
            f"{shape['exports']} times"
        )
        for way, cost in figures[transport][size].items():
            line = f"  {way:12} median {cost['median_ms']:8.2f} ms"
            if way in BRIDGES:
                line += f", {cost['rows_a_second']:>7,} rows/s"
            if "ratio_to_acknowledge" in cost:
                line += f", ratio to acknowledge {cost['ratio_to_acknowledge']:.2f}"
                line += f" (target <= {TARGET_RATIO_OF_LARGE})" if size == "large" else ""
            line += f", {cost['cpu_seconds_a_million_points']:.2f} CPU s a million points"
            if "cpu_ratio_to_collector" in cost:
                line += f", CPU ratio to collector {cost['cpu_ratio_to_collector']:.2f}"
            print(line)
    print(f"{NODES} nodes at once, small batches over gRPC, {EXPORTS_A_NODE} of each:")
    for way, cost in figures["nodes_at_once"].items():
        line = f"  {way:12} {cost['at_once_ms']:8.2f} ms an export, alone {cost['alone_ms']:.2f} ms"
        print(f"{line}, ratio {cost['ratio']:.2f}")


def main() -> int:
    """Print the figures, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    as_json = parser.parse_args().json
    figures = run()
    if as_json:
        print(json.dumps({"target_ratio_of_large": TARGET_RATIO_OF_LARGE, **figures}))
    else:
        print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
