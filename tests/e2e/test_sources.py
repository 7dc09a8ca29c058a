"""Scaphandre, the Collector, the bridge and the store, all of them real, and what a crash costs."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import grpc
import numpy as np
import pytest
import trustme
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import StoreSettings, UnknownNode, connect
from icos_fl_timeseries_store.contract import Rows
from icos_fl_timeseries_store.testing import running_store
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

DEPLOY = Path(__file__).parents[2] / "deploy"
COLLECTOR = DEPLOY / "otel-collector"
PEER = """
receivers: {{otlp: {{protocols: {{grpc: {{endpoint: "{address}"}}}}}}}}
service:
  extensions: [bearertokenauth]
  telemetry: {{metrics: {{level: none}}}}
  pipelines: {{metrics: {{receivers: [otlp], exporters: [otlphttp]}}}}
"""
NODES = itertools.count(10)
TOKEN, NEW_TOKEN = "a-token-of-some-length", "another-token-of-some-length"
# The first test builds what is not in the cache.
pytestmark = pytest.mark.timeout(2400)

# A kernel without loadable modules has no /proc/modules, and Scaphandre ends without that file. So
# it gets a /proc of its own: links to the real one, and an empty list of modules.
WITH_MODULES = """
mount --rbind /proc "$1" && mount -t tmpfs tmpfs /proc && cd "$1" || exit 1
for entry in *; do ln -s "$1/$entry" "/proc/$entry"; done
: > /proc/modules
shift
exec "$@"
"""
PATIENCE_SECONDS = 240.0
"""Of a busy machine; what is waited for comes within 30 s on one that has nothing else to do."""
POWER = re.compile(r"^scaph_host_power_microwatts(?:\{.*\})? (\d+)$", re.MULTILINE)


def did_not_run(reason: str) -> None:
    message = f"THE REAL SOURCES WERE NOT TESTED: {reason}"
    warnings.warn(message, stacklevel=2)
    pytest.skip(message)


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """Paths of the Collectors and Scaphandre, built if they are not in the cache."""
    toolchains = {"otelcol": "go", "otelcol-peer": "go", "scaphandre": "cargo"}
    command = [DEPLOY / "build-sources", *toolchains]
    looked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    paths = dict(line.split("=", 1) for line in looked.stdout.splitlines())
    for program, toolchain in toolchains.items():
        if program not in paths:
            if shutil.which(toolchain) is None:
                did_not_run(f"no {program}, and no {toolchain} to build it with")
            pytest.fail(f"{DEPLOY / 'build-sources'} did not build {program}")
    return paths


@contextlib.contextmanager
def process(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block; its log is shown if the test fails."""
    with log.open("ab") as stream:
        running = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=stream, stderr=stream
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:g} s: {what}"
        time.sleep(0.2)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@dataclass
class Sensor:
    """A powercap tree whose counter goes on, never twice at the same pace."""

    folder: Path
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Sensor":
        zone = self.folder / "intel-rapl:0"
        zone.mkdir(parents=True)
        (zone / "name").write_text("package-0\n")
        self._write(1_000_000)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        energy_uj = 1_000_000
        for step in itertools.count():
            if self._stop.wait(0.1):
                return
            energy_uj += 2_000_000 + 7_919 * (step % 211)  # some 20 to 37 W
            self._write(energy_uj)

    def _write(self, energy_uj: int) -> None:
        # Replaced, not rewritten: Scaphandre never finds it empty.
        new = self.folder.parent / "energy_uj"
        new.write_text(f"{energy_uj}\n")
        new.replace(self.folder / "intel-rapl:0" / "energy_uj")


class Tap:
    """Hands the Collector's scrapes on to Scaphandre, and keeps the power that each one got."""

    def __init__(self, scaphandre_port: int) -> None:
        self.exposed: list[tuple[float, int]] = []
        """When, in seconds since 1970, and microwatts."""
        self._open = True
        self._refused = 0
        tap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked_s = time.time()
                if not tap._open:
                    tap._refused += 1
                    self.send_error(503)
                    return
                try:
                    url = f"http://127.0.0.1:{scaphandre_port}{self.path}"
                    with urllib.request.urlopen(url, timeout=2) as answer:
                        body = answer.read()
                except OSError:
                    self.send_error(502)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)
                found = POWER.search(body.decode())
                if found:
                    tap.exposed.append((asked_s, int(found[1])))

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Tap":
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Within the block nothing is exposed, and all that was is in the Collector's queue.

        The Collector asks again only when what it got before is there.
        """
        self._open = False
        already = self._refused
        wait_until(lambda: self._refused > already, "the Collector comes and is refused")
        yield
        self._open = True


@dataclass(frozen=True)
class Secrets:
    """Certificates and tokens in files, where the bridge and the Collector read them."""

    folder: Path

    def issue(self) -> None:
        """Certificates of new authorities for the bridge and the node."""
        for owner, host in {"bridge": "127.0.0.1", "node": "edge"}.items():
            authority = trustme.CA()
            issued = authority.issue_cert(host)
            authority.cert_pem.write_to_path(self.folder / f"{owner}-ca.pem")
            issued.private_key_pem.write_to_path(self.folder / f"{owner}.key")
            (self.folder / f"{owner}.key").chmod(0o600)
            issued.cert_chain_pems[0].write_to_path(self.folder / f"{owner}.pem")

    def accept(self, *tokens: str) -> None:
        """The bridge's tokens, once it reads them."""
        (self.folder / "tokens").write_text("\n".join(tokens))
        (self.folder / "tokens").chmod(0o600)

    def present(self, token: str) -> None:
        """The Collector's token."""
        new = self.folder / "new-token"
        new.write_text(token)
        new.replace(self.folder / "token")

    @property
    def of_bridge(self) -> dict[str, str]:
        return {
            "ICOS_FL_BRIDGE_TLS__CERTIFICATE": str(self.folder / "bridge.pem"),
            "ICOS_FL_BRIDGE_TLS__KEY": str(self.folder / "bridge.key"),
            "ICOS_FL_BRIDGE_TLS__CLIENT_CA": str(self.folder / "node-ca.pem"),
            "ICOS_FL_BRIDGE_TOKENS": str(self.folder / "tokens"),
        }

    @property
    def of_collector(self) -> dict[str, str]:
        return {
            "ICOS_FL_COLLECTOR_CA_FILE": str(self.folder / "bridge-ca.pem"),
            "ICOS_FL_COLLECTOR_CERT_FILE": str(self.folder / "node.pem"),
            "ICOS_FL_COLLECTOR_KEY_FILE": str(self.folder / "node.key"),
            "ICOS_FL_COLLECTOR_TOKEN_FILE": str(self.folder / "token"),
        }


@dataclass
class Node:
    """An edge node; its parts are started and killed by the test."""

    name: str
    folder: Path
    programs: dict[str, str]
    store: StoreSettings
    bridge_port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)
    scaphandre_port: int = field(default_factory=free_port)

    @contextlib.contextmanager
    def power(self) -> Iterator[tuple[Tap, "subprocess.Popen[bytes]"]]:
        """A sensor, the Scaphandre that reads it, and the tap before it."""
        command = [
            *(self.programs["scaphandre"], "--vm", "prometheus"),
            *("--address", "127.0.0.1", "--port", str(self.scaphandre_port)),
        ]
        if not Path("/proc/modules").exists():
            if os.getuid() != 0:
                did_not_run("there is no /proc/modules, and only root can lay one over it")
            proc = self.folder / "proc"
            proc.mkdir(exist_ok=True)
            own = ["unshare", "--mount", "--propagation", "private"]
            command = [*own, "sh", "-c", WITH_MODULES, "sh", str(proc), *command]
        share = {"SCAPHANDRE_POWERCAP_PATH": str(self.folder / "powercap")}
        with (
            Sensor(self.folder / "powercap"),
            process(command, share, self.folder / "scaphandre.log") as scaphandre,
        ):
            wait_until(lambda: answers(self.scaphandre_port), "Scaphandre listens")
            with Tap(self.scaphandre_port) as tap:
                yield tap, scaphandre

    def bridge(
        self, settings: Mapping[str, str] = MappingProxyType({})
    ) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
        # A row a second, so that each scrape has a row of its own however late it comes.
        config = self.folder / "bridge.yaml"
        config.write_text("interval_seconds: 1\nwindow_rows: 100000\n")
        environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": f"127.0.0.1:{self.bridge_port}",
            "ICOS_FL_BRIDGE_CONFIG": str(config),
            "ICOS_FL_BRIDGE_STORE__HOST": self.store.host,
            "ICOS_FL_BRIDGE_STORE__PORT": str(self.store.port),
            **settings,
        }
        command = [sys.executable, "-m", "icos_fl_otlp_bridge"]
        return process(command, environment, self.folder / "bridge.log")

    def collector(
        self, tap: Tap | None = None, *options: str, secrets: Secrets | None = None
    ) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
        environment = {
            "ICOS_FL_NODE": self.name,
            "ICOS_FL_COLLECTOR_BRIDGE": f"127.0.0.1:{self.bridge_port}",
            "ICOS_FL_COLLECTOR_STATE_DIR": str(self.folder / "queue"),
            "ICOS_FL_COLLECTOR_HEALTH_ADDRESS": f"127.0.0.1:{self.health_port}",
            "ICOS_FL_COLLECTOR_BATCH_TIMEOUT": "5s",
            "ICOS_FL_SCAPHANDRE_ADDRESS": f"127.0.0.1:{tap.port if tap else 1}",
            **(secrets.of_collector if secrets else {}),
        }
        files = [
            "config.yaml",
            *(["power.yaml"] if tap else []),
            *(["tls.yaml", "token.yaml"] if secrets else []),
        ]
        configs = [f"--config={COLLECTOR / name}" for name in files]
        command = [self.programs["otelcol"], *configs, *options]
        return process(command, environment, self.folder / "collector.log")

    def wait_for_rows(self, count: int) -> None:
        """Returns when there are as many rows of power."""
        wait_until(lambda: len(self.column("power_consumption")) >= count, f"{count} rows of power")

    def newest_s(self, column: str) -> float:
        """Seconds since 1970 of the newest row that has the column; 0 without one."""
        return max((time_s for time_s, _ in self.column(column)), default=0)

    def said(self, part: str, text: str) -> int:
        """How often the log of *part* has the text."""
        return (self.folder / f"{part}.log").read_text(errors="replace").count(text)

    def rows(self) -> Rows | None:
        """The node's window, if there is one."""
        with connect(self.store) as store, contextlib.suppress(UnknownNode):
            return store.window(self.name).read()
        return None

    def column(self, name: str) -> list[tuple[float, float]]:
        """Seconds since 1970 and value of each row that has one in the column."""
        rows = self.rows()
        if rows is None or name not in rows.columns:
            return []
        values = rows.values_tf[:, rows.columns.index(name)]
        there = ~np.isnan(values)
        times_s = rows.times_ns_t[there] / 1e9
        return list(zip(times_s.tolist(), values[there].tolist(), strict=True))


@pytest.fixture(scope="module")
def store(
    programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreSettings]:
    with running_store(tmp_path_factory.mktemp("store")) as settings:
        yield settings


@pytest.fixture
def node(programs: dict[str, str], store: StoreSettings, tmp_path: Path) -> Node:
    """A node of its own, with a name that a reader of YAML would take for another number."""
    return Node(f"0{next(NODES)}", tmp_path, programs, store)


def healthy(node: Node) -> bool:
    with contextlib.suppress(OSError):
        url = f"http://127.0.0.1:{node.health_port}/"
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status == 200
    return False


def assert_every_scrape_is_a_row(node: Node, tap: Tap) -> list[tuple[float, float]]:
    """Returns the rows of power, which have what Scaphandre exposed and when."""
    power = node.column("power_consumption")
    assert [watts for _, watts in power] == [microwatts / 1e6 for _, microwatts in tap.exposed]
    late_s = [row_s - asked_s for (row_s, _), (asked_s, _) in zip(power, tap.exposed, strict=True)]
    assert min(late_s) > -3  # not when it was sent
    assert max(late_s) < 0.5
    return power


@pytest.mark.parametrize("seconds_away", [20.0, pytest.param(240.0, marks=pytest.mark.slow)])
def test_no_row_is_missing_though_the_collector_is_killed_and_the_bridge_is_away(
    node: Node, seconds_away: float
) -> None:
    with contextlib.ExitStack() as parts:
        tap, _ = parts.enter_context(node.power())
        with node.bridge() as bridge:
            collector = parts.enter_context(node.collector(tap))
            node.wait_for_rows(2)
            bridge.kill()
            bridge.wait()
        away_since = time.monotonic()

        taken = len(tap.exposed)
        wait_until(lambda: len(tap.exposed) >= taken + 3, "three scrapes")
        with tap.closed():
            collector.kill()
            collector.wait()
        # What was exposed since the bridge went is on the disk alone now.
        killed_s = time.time()
        collector = parts.enter_context(node.collector(tap))
        wait_until(lambda: len(tap.exposed) >= taken + 5, "scrapes after the crash")
        time.sleep(max(0, away_since + seconds_away - time.monotonic()))

        parts.enter_context(node.bridge())
        node.wait_for_rows(len(tap.exposed))
        with tap.closed():
            collector.terminate()
            assert collector.wait(PATIENCE_SECONDS) == 0

        power = assert_every_scrape_is_a_row(node, tap)
        assert len({watts for _, watts in power}) == len(power)

        memory_mib = node.column("memory_usage")
        assert min(value for _, value in memory_mib) > 0
        gaps = [
            (start_s, end_s)
            for (start_s, _), (end_s, _) in itertools.pairwise(memory_mib)
            if end_s - start_s > 8
        ]
        # The one time without a Collector, and no other.
        assert all(start_s <= killed_s <= end_s for start_s, end_s in gaps)
        cpu_percent = [value for _, value in node.column("cpu_usage")]
        assert len(cpu_percent) >= len(memory_mib) - 2  # not with the first scrape after a start
        assert all(0 <= value <= 100 for value in cpu_percent)


def take_over(node: Node, bridge: "subprocess.Popen[bytes]") -> None:
    """Returns when the bridge goes by its files as they are now."""
    taken_over = "new configuration taken over"
    before = node.said("bridge", taken_over)
    bridge.send_signal(signal.SIGHUP)
    wait_until(lambda: node.said("bridge", taken_over) > before, taken_over)


@contextlib.contextmanager
def secured(
    node: Node, secrets: Secrets
) -> Iterator[tuple[Tap, "subprocess.Popen[bytes]", "subprocess.Popen[bytes]"]]:
    """All parts of the node with TLS both ways and a token: the tap, the bridge, the Collector."""
    with (
        node.power() as (tap, _),
        node.bridge(secrets.of_bridge) as bridge,
        node.collector(tap, secrets=secrets) as collector,
    ):
        yield tap, bridge, collector


def test_no_row_is_missing_though_certificates_and_tokens_change_in_mid_stream(node: Node) -> None:
    secrets = Secrets(node.folder)
    secrets.issue()
    secrets.accept(TOKEN)
    secrets.present(TOKEN)
    with secured(node, secrets) as (tap, bridge, collector):
        node.wait_for_rows(2)
        secrets.issue()
        secrets.accept(TOKEN, NEW_TOKEN)
        take_over(node, bridge)
        secrets.present(NEW_TOKEN)
        wait_until(lambda: node.said("collector", "refresh token"), "the Collector's new token")
        secrets.accept(NEW_TOKEN)
        take_over(node, bridge)
        node.wait_for_rows(len(tap.exposed) + 1)
        with tap.closed():
            started = node.said("collector", "Everything is ready")
            collector.send_signal(signal.SIGHUP)
            wait_until(
                lambda: node.said("collector", "Everything is ready") > started, "it is ready"
            )
        node.wait_for_rows(len(tap.exposed) + 1)
        with tap.closed():
            collector.terminate()
            assert collector.wait(PATIENCE_SECONDS) == 0
        assert_every_scrape_is_a_row(node, tap)


def test_what_is_measured_under_a_wrong_certificate_is_sent_under_the_right_one(node: Node) -> None:
    secrets = Secrets(node.folder)
    secrets.issue()
    secrets.accept(TOKEN)
    secrets.present(TOKEN)
    right = (node.folder / "node-ca.pem").read_bytes()
    trustme.CA().cert_pem.write_to_path(node.folder / "node-ca.pem")
    hung_up = "error reading server preface"  # the bridge does, on whom it does not know
    with secured(node, secrets) as (tap, bridge, collector):
        wait_until(
            lambda: tap.exposed and node.said("collector", hung_up), "the Collector is refused"
        )
        (node.folder / "node-ca.pem").write_bytes(right)
        take_over(node, bridge)
        node.wait_for_rows(len(tap.exposed))
        with tap.closed():
            collector.terminate()
            assert collector.wait(PATIENCE_SECONDS) == 0
        assert_every_scrape_is_a_row(node, tap)


def test_a_wrong_token_costs_the_batches_that_are_sent_with_it_and_no_other(node: Node) -> None:
    secrets = Secrets(node.folder)
    secrets.issue()
    secrets.accept(NEW_TOKEN)
    secrets.present(TOKEN)
    dropped = "Exporting failed. Dropping data."
    with secured(node, secrets) as (tap, _, collector):
        wait_until(lambda: tap.exposed, "a scrape")
        # The first may be of a batch that began to be sent before that scrape.
        enough = node.said("collector", dropped) + 2
        wait_until(lambda: node.said("collector", dropped) >= enough, dropped)
        secrets.present(NEW_TOKEN)
        wait_until(lambda: node.said("collector", "refresh token"), "the Collector's new token")
        known = len(tap.exposed)
        wait_until(lambda: len(tap.exposed) >= known + 2, "two scrapes")
        with tap.closed():
            collector.terminate()
            assert collector.wait(PATIENCE_SECONDS) == 0
        watts = [microwatts / 1e6 for _, microwatts in tap.exposed]
        rows = [value for _, value in node.column("power_consumption")]
        assert node.said("collector", "Unauthenticated")
        assert 2 <= len(rows) < len(watts)
        assert rows == watts[-len(rows) :]


def test_a_full_queue_drops_what_is_newest_and_goes_on_when_there_is_room(node: Node) -> None:
    small = node.folder / "small.yaml"
    small.write_text(
        "exporters: {otlp_grpc: {retry_on_failure: {max_interval: 1s}, "
        "sending_queue: {queue_size: 4000, batch: {min_size: 1000}}}}"
    )
    full = "sending queue is full"
    with contextlib.ExitStack() as parts:
        tap, _ = parts.enter_context(node.power())
        collector = parts.enter_context(node.collector(tap, f"--config={small}"))
        wait_until(lambda: node.said("collector", full), full)
        known = len(tap.exposed)
        wait_until(lambda: len(tap.exposed) >= known + 2, "two scrapes with a full queue")
        parts.enter_context(node.bridge())
        node.wait_for_rows(1)
        known = len(tap.exposed)
        wait_until(lambda: len(tap.exposed) >= known + 2, "two scrapes with room for them")
        with tap.closed():
            collector.terminate()
            assert collector.wait(PATIENCE_SECONDS) == 0

    watts = [microwatts / 1e6 for _, microwatts in tap.exposed]
    rows = [value for _, value in node.column("power_consumption")]
    dropped = [value for value in watts if value not in rows]
    kept = watts.index(dropped[0])
    assert kept >= 2
    assert watts[kept : kept + len(dropped)] == dropped
    assert len(rows) - kept >= 2
    assert rows == [value for value in watts if value not in dropped]


def test_the_collector_sends_over_http_as_the_bridges_readme_says(node: Node) -> None:
    secrets = Secrets(node.folder)
    secrets.issue()
    secrets.accept(TOKEN)
    secrets.present(TOKEN)
    readme = (DEPLOY.parent / "packages" / "otlp-bridge" / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(extensions:\n.*?)```", readme, flags=re.DOTALL)
    http_port, otlp_port = free_port(), free_port()
    for given, here in {
        "https://edge-1:4318": f"https://127.0.0.1:{http_port}",
        "/etc/otelcol/token": secrets.of_collector["ICOS_FL_COLLECTOR_TOKEN_FILE"],
        "ca.pem": secrets.of_collector["ICOS_FL_COLLECTOR_CA_FILE"],
        "collector.pem": secrets.of_collector["ICOS_FL_COLLECTOR_CERT_FILE"],
        "collector.key": secrets.of_collector["ICOS_FL_COLLECTOR_KEY_FILE"],
    }.items():
        assert example.count(given) == 1
        example = example.replace(given, here)
    config = node.folder / "config.yaml"
    config.write_text(example + PEER.format(address=f"127.0.0.1:{otlp_port}"))
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="host.name").value.string_value = node.name
    power = resource.scope_metrics.add().metrics.add(name="scaph_host_power_microwatts")
    now_ns = time.time_ns()
    for watts in (20, 21, 22):
        power.gauge.data_points.add(as_int=watts * 10**6, time_unix_nano=now_ns + watts * 10**9)

    command = [node.programs["otelcol-peer"], f"--config={config}"]
    settings = secrets.of_bridge | {"ICOS_FL_BRIDGE_HTTP_LISTEN_ADDRESS": f"127.0.0.1:{http_port}"}
    with node.bridge(settings), process(command, {}, node.folder / "peer.log"):
        with grpc.insecure_channel(f"127.0.0.1:{otlp_port}") as channel:
            MetricsServiceStub(channel).Export(
                request, timeout=PATIENCE_SECONDS, wait_for_ready=True
            )
        node.wait_for_rows(3)
    assert [value for _, value in node.column("power_consumption")] == [20, 21, 22]


def test_a_node_whose_scaphandre_ends_goes_on_with_cpu_and_memory(node: Node) -> None:
    with contextlib.ExitStack() as parts:
        tap, scaphandre = parts.enter_context(node.power())
        parts.enter_context(node.bridge())
        parts.enter_context(node.collector(tap))
        node.wait_for_rows(1)
        scaphandre.kill()
        scaphandre.wait()
        ended_s = time.time()
        wait_until(lambda: node.newest_s("cpu_usage") > ended_s + 6, "CPU after Scaphandre's end")
        assert node.newest_s("memory_usage") > ended_s + 3
        assert node.newest_s("power_consumption") < ended_s + 1


def test_a_node_without_power_has_cpu_and_memory(node: Node) -> None:
    with node.bridge(), node.collector():
        wait_until(lambda: healthy(node), "the Collector's health check")
        wait_until(lambda: len(node.column("cpu_usage")) >= 2, "two rows of CPU")
        rows = node.rows()
        assert rows is not None
        assert dict(zip(rows.columns, rows.units, strict=True)) == {
            "cpu_usage": "%",
            "memory_usage": "MiB",
        }


def test_a_collector_without_a_node_name_does_not_start(programs: dict[str, str], tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "ICOS_FL_NODE"} | {
        "ICOS_FL_COLLECTOR_STATE_DIR": str(tmp_path / "queue"),
        "ICOS_FL_COLLECTOR_HEALTH_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    ended = subprocess.run(
        [programs["otelcol"], f"--config={COLLECTOR / 'config.yaml'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode != 0
    assert "host.name" in ended.stderr or "resource" in ended.stderr


def test_up_takes_the_collector_as_its_source(programs: dict[str, str], tmp_path: Path) -> None:
    def icos_fl(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "icos_fl_local", *arguments]

    output = tmp_path / "up.log"
    with output.open("wb") as log:
        up = subprocess.Popen(
            icos_fl("up", "--source", "collector"), cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        rows_came = re.compile(r"^window of \S+: [1-9]\d* of", re.MULTILINE)
        wait_until(lambda: rows_came.search(output.read_text()), "rows")
        ended = subprocess.run(
            icos_fl("status", "--json"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        found = json.loads(ended.stdout)
        assert found["source"] == "collector"
        assert found["components"]["collector"]["up"]
        assert any(found["rows"].values())
        up.send_signal(signal.SIGINT)
        assert up.wait(PATIENCE_SECONDS) == 130
    finally:
        up.kill()
        up.wait()
        print(output.read_text())
