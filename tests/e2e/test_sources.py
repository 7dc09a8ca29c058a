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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from icos_fl_timeseries_store import StoreSettings, UnknownNode, connect
from icos_fl_timeseries_store.contract import Rows
from icos_fl_timeseries_store.testing import free_port, running_store

DEPLOY = Path(__file__).parents[2] / "deploy"
COLLECTOR = DEPLOY / "otel-collector"
NODE = "edge-1"
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
POWER = re.compile(r"^scaph_host_power_microwatts(?:\{.*\})? (\d+)$", re.MULTILINE)


def did_not_run(reason: str) -> None:
    message = f"THE REAL SOURCES WERE NOT TESTED: {reason}"
    warnings.warn(message, stacklevel=2)
    pytest.skip(message)


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """Paths of the Collector and Scaphandre, built if they are not in the cache."""
    looked = subprocess.run([DEPLOY / "build-sources"], stdout=subprocess.PIPE, text=True)
    paths = dict(line.split("=", 1) for line in looked.stdout.splitlines())
    for program, toolchain in {"otelcol": "go", "scaphandre": "cargo"}.items():
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


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
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
        tap = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked_s = time.time()
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

    def settled(self) -> bool:
        """Was the last scrape long enough ago to be in the Collector's queue, the next not yet?"""
        return bool(self.exposed) and 1.0 < time.time() - self.exposed[-1][0] < 2.0


@dataclass
class Node:
    """An edge node; its parts are started and killed by the test."""

    folder: Path
    programs: dict[str, str]
    store: StoreSettings
    bridge_port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)
    scaphandre_port: int = field(default_factory=free_port)

    def scaphandre(self) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
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
        return process(command, share, self.folder / "scaphandre.log")

    def bridge(self) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
        # A row a second, so that each scrape has a row of its own however late it comes.
        config = self.folder / "bridge.yaml"
        config.write_text("interval_seconds: 1\nwindow_rows: 100000\n")
        environment = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": f"127.0.0.1:{self.bridge_port}",
            "ICOS_FL_BRIDGE_CONFIG": str(config),
            "ICOS_FL_BRIDGE_STORE__HOST": self.store.host,
            "ICOS_FL_BRIDGE_STORE__PORT": str(self.store.port),
        }
        command = [sys.executable, "-m", "icos_fl_otlp_bridge"]
        return process(command, environment, self.folder / "bridge.log")

    def collector(
        self, tap: Tap | None = None
    ) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
        environment = {
            "ICOS_FL_NODE": NODE,
            "ICOS_FL_BRIDGE_ADDRESS": f"127.0.0.1:{self.bridge_port}",
            "ICOS_FL_COLLECTOR_STATE_DIR": str(self.folder / "queue"),
            "ICOS_FL_COLLECTOR_HEALTH_ADDRESS": f"127.0.0.1:{self.health_port}",
            "ICOS_FL_COLLECTOR_BATCH_TIMEOUT": "5s",
            "ICOS_FL_SCAPHANDRE_ADDRESS": f"127.0.0.1:{tap.port if tap else 1}",
        }
        files = ["config.yaml", "power.yaml"] if tap else ["config.yaml"]
        command = [self.programs["otelcol"], *(f"--config={COLLECTOR / name}" for name in files)]
        return process(command, environment, self.folder / "collector.log")

    def rows(self) -> Rows | None:
        """The node's window, if there is one."""
        with connect(self.store) as store, contextlib.suppress(UnknownNode):
            return store.window(NODE).read()
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


@pytest.fixture
def node(programs: dict[str, str], tmp_path: Path) -> Iterator[Node]:
    with running_store(tmp_path / "store") as store:
        yield Node(tmp_path, programs, store)


def healthy(node: Node) -> bool:
    with contextlib.suppress(OSError):
        url = f"http://127.0.0.1:{node.health_port}/"
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status == 200
    return False


@pytest.mark.parametrize("seconds_away", [20.0, pytest.param(240.0, marks=pytest.mark.slow)])
def test_no_row_is_missing_though_the_collector_is_killed_and_the_bridge_is_away(
    node: Node, seconds_away: float
) -> None:
    with contextlib.ExitStack() as parts:
        parts.enter_context(Sensor(node.folder / "powercap"))
        parts.enter_context(node.scaphandre())
        wait_until(lambda: answers(node.scaphandre_port), 30, "Scaphandre listens")
        tap = parts.enter_context(Tap(node.scaphandre_port))
        with node.bridge() as bridge:
            collector = parts.enter_context(node.collector(tap))
            wait_until(lambda: len(node.column("power_consumption")) >= 2, 90, "two rows of power")
            bridge.kill()
            bridge.wait()
        away_since = time.monotonic()

        taken = len(tap.exposed)
        wait_until(lambda: len(tap.exposed) >= taken + 3 and tap.settled(), 60, "three scrapes")
        collector.kill()
        collector.wait()
        # What was exposed since the bridge went is on the disk alone now.
        killed_s = time.time()
        collector = parts.enter_context(node.collector(tap))
        wait_until(lambda: len(tap.exposed) >= taken + 5, 60, "scrapes after the crash")
        back = away_since + seconds_away
        wait_until(lambda: time.monotonic() >= back, seconds_away, "the bridge's time away")

        parts.enter_context(node.bridge())
        expected = len(tap.exposed)
        wait_until(
            lambda: len(node.column("power_consumption")) >= expected, 120, "all rows of power"
        )
        wait_until(tap.settled, 10, "the last scrape is in the queue")
        collector.terminate()
        assert collector.wait(30) == 0

        power = node.column("power_consumption")
        assert [watts for _, watts in power] == [microwatts / 1e6 for _, microwatts in tap.exposed]
        late_s = [
            row_s - asked_s for (row_s, _), (asked_s, _) in zip(power, tap.exposed, strict=True)
        ]
        assert min(late_s) > -1.5
        assert max(late_s) < 0.5
        assert len({watts for _, watts in power}) == len(power)

        memory_mib = node.column("memory_usage")
        assert min(value for _, value in memory_mib) > 0
        gaps = [
            (start_s, end_s)
            for (start_s, _), (end_s, _) in itertools.pairwise(memory_mib)
            if end_s - start_s > 5
        ]
        # The one time without a Collector, and no other.
        assert all(start_s <= killed_s <= end_s for start_s, end_s in gaps)
        cpu_percent = [value for _, value in node.column("cpu_usage")]
        assert len(cpu_percent) >= len(memory_mib) - 2  # not with the first scrape after a start
        assert all(0 <= value <= 100 for value in cpu_percent)


def test_a_node_whose_scaphandre_ends_goes_on_with_cpu_and_memory(node: Node) -> None:
    with contextlib.ExitStack() as parts:
        parts.enter_context(Sensor(node.folder / "powercap"))
        scaphandre = parts.enter_context(node.scaphandre())
        wait_until(lambda: answers(node.scaphandre_port), 30, "Scaphandre listens")
        tap = parts.enter_context(Tap(node.scaphandre_port))
        parts.enter_context(node.bridge())
        parts.enter_context(node.collector(tap))
        wait_until(lambda: node.column("power_consumption"), 90, "power")
        scaphandre.kill()
        scaphandre.wait()
        ended_s = time.time()
        wait_until(
            lambda: node.column("cpu_usage")[-1][0] > ended_s + 6, 60, "CPU after Scaphandre's end"
        )
        assert node.column("memory_usage")[-1][0] > ended_s + 3
        assert node.column("power_consumption")[-1][0] < ended_s + 1


def test_a_node_without_power_has_cpu_and_memory(node: Node) -> None:
    with node.bridge(), node.collector():
        wait_until(lambda: healthy(node), 30, "the Collector's health check")
        wait_until(lambda: len(node.column("cpu_usage")) >= 2, 60, "two rows of CPU")
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
        timeout=30,
    )
    assert ended.returncode != 0
    assert "host.name" in ended.stderr or "resource" in ended.stderr


def test_up_takes_the_collector_as_its_source(programs: dict[str, str], tmp_path: Path) -> None:
    def icos_fl(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "icos_fl_local", *arguments]

    def rows() -> dict[str, int]:
        ended = subprocess.run(
            icos_fl("status", "--json"), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        if ended.returncode != 0:
            return {}
        found = json.loads(ended.stdout)
        assert found["source"] == "collector"
        assert found["components"]["collector"]["up"]
        return dict(found["rows"])

    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            icos_fl("up", "--source", "collector"), cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: any(count >= 3 for count in rows().values()), 120, "three rows")
        up.send_signal(signal.SIGINT)
        assert up.wait(90) == 130
    finally:
        up.kill()
        up.wait()
        print((tmp_path / "up.log").read_text())
