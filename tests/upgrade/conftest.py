"""Environments of today's packages and of the last releases, and a pipeline with parts of either.

The pipeline is that of ``icos-fl up``, with Flower as a federated deployment has it: in process
isolation, with a database.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icos_fl_local import replay, run, run_config, traces
from icos_fl_local.deployment import (
    Deployment,
    assign_ports,
    component_names,
    metrics_names,
)
from icos_fl_local.progress import Progress
from icos_fl_local.state import StateFolder
from icos_fl_local.supervisor import Component, Supervisor
from icos_fl_local.traces import Trace
from icos_fl_service.shim import tied
from icos_fl_timeseries_store import StoreSettings, connect
from packaging.requirements import Requirement
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
LAUNCHER = "icos-fl"
"""Starts the pipeline, and is no part of it."""
NODES = ("a", "b")
METRIC = "cpu_usage"
STEP_SECONDS = 15
START_S = 1_700_000_010
ROWS = 240
SMALL = {"time-step": 10, "horizon": 4, "local-epochs": 1, "node-timeout": 240.0}
GRACE_SECONDS = 10.0
READY_SECONDS = 240.0
PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


def uv(*command: object) -> str:
    done = subprocess.run(
        ["uv", *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheels(
    last_releases: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """By side (``old``: the last release, ``new``: today's) and package, its wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    found: dict[str, dict[str, Path]] = {"old": {}, "new": {}}
    for package, release in last_releases.items():
        if package == LAUNCHER:
            continue
        sources = {"old": release.extract(folder / package), "new": ROOT / release.folder}
        for side, source in sources.items():
            out = folder / side / package
            uv("build", "--quiet", "--wheel", source, "--out-dir", out)
            (found[side][package],) = out.glob("*.whl")
    return found


def refuse_what_bounds_refuse(chosen: Iterable[Path], *, mixed: bool) -> None:
    """Skip a test of *mixed* wheels that pip would not install together, by what they ask of each
    other. Those of one side it has to."""
    command = ["uv", "pip", "install", "--dry-run", "--python", sys.executable, *map(str, chosen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if mixed and "unsatisfiable" in done.stderr:
        pytest.skip(f"not to be mixed in one environment: {' '.join(done.stderr.split())}")
    assert done.returncode == 0, done.stderr


def with_needs(
    package: str, wheels: Mapping[str, Mapping[str, Path]], side: str
) -> dict[str, Path]:
    """The wheel of *package* of the other side, and of those siblings of which that of *side* does
    not do for it: what pip installs for whoever upgrades the package."""
    found = {package: wheels[opposite(side)][package]}
    for requirement in map(Requirement, distribution(found[package]).requires or ()):
        there = wheels[side].get(requirement.name)
        if there and distribution(there).version not in requirement.specifier:
            found |= with_needs(requirement.name, wheels, side)
    return found


def distribution(wheel: Path) -> Distribution:
    (found,) = distributions(path=[str(wheel)])
    return found


def opposite(side: str) -> str:
    return "new" if side == "old" else "old"


@pytest.fixture(scope="session")
def environment(
    wheels: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """environment(side, other=""): the Python of an environment with the wheels of *side*, but with
    that of the package *other* of the other side, and what it needs of that. What is not ours is
    what is installed here, which is what uv.lock has."""
    folder = tmp_path_factory.mktemp("environments")
    made: dict[tuple[str, str], Path] = {}

    def make(side: str, other: str = "") -> Path:
        if (side, other) not in made:
            chosen = wheels[side] | (with_needs(other, wheels, side) if other else {})
            python = folder / f"{side}-{other}" / "bin/python"
            refuse_what_bounds_refuse(chosen.values(), mixed=bool(other))
            uv("venv", "--quiet", python.parents[1])
            install = ("pip", "install", "--quiet", "--python", python, "--no-deps")
            uv(*install, *chosen.values())
            ours, here = (
                subprocess.check_output([each, "-c", PURELIB], text=True).strip()
                for each in (python, sys.executable)
            )
            # Its own .pth files, by which our packages are installed here, are not read from there.
            (Path(ours) / "others.pth").write_text(here)
            made[side, other] = python
        return made[side, other]

    return make


def trace(node: str, first: int, rows: int) -> Trace:
    """Rows *first* to *first* + *rows* of a node: its load goes up and down, with noise."""
    steps = np.arange(first, first + rows)
    noise = np.random.default_rng(sum(node.encode())).normal(0, 3, first + rows)[first:]
    values = np.round(50 + 30 * np.sin(steps / 15) + noise, 3)
    return Trace(node, ("cpu_percent",), ("%",), START_S + steps * STEP_SECONDS, values[:, None])


@dataclass
class Load:
    """An exporter of a node's rows, which sends each batch until it is stored."""

    node: str
    endpoint: str
    stopping: threading.Event = field(default_factory=threading.Event)
    acknowledged: int = 0
    problem: Exception | None = None

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                replay.send([trace(self.node, self.acknowledged, 4)], self.endpoint, _silent)
                self.acknowledged += 4
                self.stopping.wait(0.05)
        except Exception as error:
            self.problem = error


def _silent(*_: object) -> None:
    """Nobody needs to know."""


class _Tasks(Supervisor):
    """Commands that are run while a pipeline is looked at."""

    def __init__(self, logs: Path, env: Mapping[str, str], look: Callable[[], None]) -> None:
        super().__init__(logs, env)
        self._look = look

    def check(self) -> None:
        super().check()
        self._look()


class Pipeline:
    """The processes of a deployment; each can be stopped, and started of another version."""

    def __init__(self, folder: Path, side: str, python: Path) -> None:
        """*python* is the one of *side*, with which everything begins."""
        self.side, self.python = side, python
        self.folder = folder
        state = StateFolder(folder)
        with state.lock():
            pass  # its folders are there now
        names = component_names(NODES)
        ports = assign_ports([*names, *metrics_names(names)], {})
        self.deployment = Deployment(state, NODES, ports)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._abandoned = False
        config = folder / "bridge.yaml"
        with config.open("w") as stream:
            YAML().dump(traces.bridge_config([trace("", 0, 100_000)]), stream)
        made = self.deployment.components(config, recorded=True)
        self.components = {each.name: each for each in self._isolated(made)}
        self._tasks = _Tasks(state.logs, self.deployment.env(), self.check)
        self.settings = StoreSettings(port=self.deployment.ports["metadata"])

    def _isolated(self, components: list[Component]) -> Iterator[Component]:
        for component in components:
            if not component.name.startswith("super"):
                yield component
                continue
            database = ("--database", str(self.folder / "superlink.db"))
            options = (
                "--isolation",
                "process",
                *(database if component.name == "superlink" else ()),
            )
            yield replace(component, command=(*component.command, *options))
            serving = self.deployment.address(component.name)
            command = (sys.executable, "-m", "icos_fl_warm_runtime", "superexec", "--insecure")
            yield replace(
                component,
                name=f"{component.name}-exec",
                after=(component.name,),
                command=(*command, "--runtime-api-address", serving),
                env={},
                ready=lambda: True,
            )

    def start(self, names: Iterable[str], python: Path) -> None:
        """Start processes, each when what it comes after is ready; return when all are."""
        path = f"{python.parent}{os.pathsep}{self.deployment.env()['PATH']}"
        for name in names:
            component = self.components[name]
            for before in component.after:
                self._wait_until_ready(before)
            with (self.deployment.state.logs / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    tied(str(python), *component.command[1:]),
                    env=self.deployment.env() | dict(component.env) | {"PATH": path},
                    stdout=log,
                    stderr=log,
                )
        for name in names:
            self._wait_until_ready(name)

    def _wait_until_ready(self, name: str) -> None:
        until = time.monotonic() + READY_SECONDS
        while not self.components[name].ready():
            self.check()
            assert time.monotonic() < until, f"{name} is not ready: {self.log(name)}"
            time.sleep(0.1)

    def check(self) -> None:
        """Nothing has ended by itself, and a run that is followed is still waited for."""
        assert not self._abandoned, "the test has failed while a run was under way"
        for name, process in list(self.processes.items()):
            assert process.poll() is None, f"{name} died: {self.log(name)}"

    def stop(self, names: Iterable[str]) -> None:
        """End processes as an upgrade of containers does, the last first: by SIGTERM, and after
        ten seconds by SIGKILL."""
        for name in reversed(list(names)):
            if process := self.processes.pop(name, None):
                process.terminate()
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def replace(self, names: Iterable[str], python: Path) -> None:
        """Stop processes, and start them with *python*."""
        self.stop(names)
        self.start(names, python)

    def log(self, name: str) -> str:
        return (self.deployment.state.logs / f"{name}.log").read_text()[-3000:]

    def feed(self) -> None:
        """Give the nodes their windows."""
        replay.send(
            [trace(node, 0, ROWS) for node in NODES], self.deployment.address("bridge"), _silent
        )

    @contextmanager
    def under_load(self, node: str) -> Iterator[Load]:
        """An exporter of *node* that sends while the block lasts."""
        load = Load(node, self.deployment.address("bridge"))
        thread = threading.Thread(target=load.run)
        thread.start()
        try:
            yield load
        finally:
            load.stopping.set()
            thread.join()
        assert load.problem is None

    def train(self, rounds: int) -> dict[str, Any]:
        """A federated run; its history."""
        config = run_config.complete(
            {**SMALL, "num-server-rounds": rounds},
            [METRIC],
            len(NODES),
            STEP_SECONDS,
            self.deployment.address("metadata"),
        )
        config["result-dir"] = str(self.deployment.state.new_run())
        with (self.folder / "progress.log").open("a") as stream:
            return run.train(self.deployment, self._tasks, config, Progress(stream))

    @contextmanager
    def training(self, rounds: int) -> Iterator["Future[dict[str, Any]]"]:
        """A run whose first round has ended when the block begins."""
        history = self.deployment.state.new_run() / "history.json"
        try:
            with ThreadPoolExecutor(1) as threads:
                future = threads.submit(self.train, rounds)
                while not ((run.read_history(history) or {}).get("rounds") or future.done()):
                    time.sleep(0.1)
                assert not future.done(), future.result()
                try:
                    yield future
                finally:
                    self._abandoned = not future.done()
        finally:
            self._abandoned = False

    def forecast(self, python: Path) -> dict[str, list[float]]:
        """What the nodes' own client, started with *python*, says comes next, by node."""
        command = run.client_command(self.deployment, "forecast", metrics=[METRIC], as_json=True)
        done = subprocess.run(
            [python, "-m", "icos_fl_client", *command[2:]],
            env=self.deployment.env(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {entry["node"]: entry["yhat"] for entry in json.loads(done.stdout)["forecasts"]}

    def lost(self, acknowledged: Mapping[str, int]) -> int:
        """How many of the nodes' acknowledged rows their windows lack, or hold otherwise."""
        missing = 0
        with connect(self.settings) as store:
            for node, rows in acknowledged.items():
                stored = store.window(node).read()
                values = dict(zip(stored.times_ns_t, stored.values_tf[:, 0], strict=True))
                sent = trace(node, 0, rows)
                missing += sum(
                    values.get(time_s * 10**9) != value
                    for time_s, value in zip(sent.times_s, sent.values_tf[:, 0], strict=True)
                )
        return missing


@pytest.fixture(scope="module", params=["old", "new"])
def running(
    request: pytest.FixtureRequest,
    environment: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pipeline]:
    """A pipeline all of one version, with windows that are filled."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = Pipeline(folder, request.param, environment(request.param))
    try:
        pipeline.start(pipeline.components, pipeline.python)
        pipeline.feed()
        yield pipeline
    finally:
        pipeline.stop(pipeline.processes)
