"""``icos-fl simulate``, from its options to its table."""

import importlib.util
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from icos_fl_timeseries_store import InvalidRows
from icos_fl_timeseries_store.names import checked_name
from rich.console import Console

from icos_fl_local import run, run_config, traces, up
from icos_fl_local.deployment import Deployment, assign_ports, module, script, serving, tcp
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.progress import Progress, to
from icos_fl_local.run_config import Value
from icos_fl_local.simulation import results
from icos_fl_local.simulation.memory import PeakMemory
from icos_fl_local.simulation.parts import virtual_nodes
from icos_fl_local.simulation.settings import (
    RUNS_MAX,
    Setting,
    combinations,
    each_value_once,
    parse_sweeps,
)
from icos_fl_local.state import StateFolder
from icos_fl_local.supervisor import Component, ComponentDied, Supervisor, TaskFailed

NODES_MAX = 5_000
SEEDS_MAX = 100
_COMPONENTS = ("processor", "superlink")
_OBJECT_STORE_BYTES = 512 << 20
_WORKER_BYTES = 1 << 30
# Virtual nodes wait for each other: what is patience with one node is not with a thousand.
_ANSWER_SECONDS, _ROUND_SECONDS = 2.0, 30.0
_TIMEOUT_SECONDS_MAX = 86_400.0
_RUN_ENDS_SECONDS = 60.0
_LOOK_SECONDS = 0.1
# Flower looks for a plain ``app`` in the app's own folder.
_APP_FILE = "from icos_fl_local.simulation.{} import app as _app\n\napp = _app\n"


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything starts."""

    folder: Path
    nodes: tuple[traces.Trace, ...]
    metrics: tuple[str, ...]
    overrides: dict[str, Value]
    sampling_seconds: float
    settings: list[Setting]
    seeds: tuple[int, ...]

    def config(self, setting: Mapping[str, Value], seed: int) -> dict[str, Value]:
        """The run configuration of one run but for its folder and the processor's address."""
        count = len(self.nodes)
        patience: dict[str, Value] = {
            "node-timeout": min(max(120.0, count * _ANSWER_SECONDS), _TIMEOUT_SECONDS_MAX),
            "round-timeout": min(max(600.0, count * _ROUND_SECONDS), _TIMEOUT_SECONDS_MAX),
        }
        chosen = patience | self.overrides | {"seed": seed} | dict(setting)
        return run_config.complete(chosen, self.metrics, count, self.sampling_seconds, "")


def simulate(
    options: up.Options, sweeps: Sequence[str], seeds: int, scratch: Path, *, as_json: bool
) -> int:
    """Do it all; return the exit status. Raises LocalError, TraceError and Interrupted.

    *scratch* is for what Ray keeps; its path must be short, and the caller removes it.
    """
    plan = make_plan(options, sweeps, seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    state = StateFolder(options.state_folder / "simulation")
    with state.lock(), Progress(to(as_json)) as progress, PeakMemory() as memory:
        names = tuple(trace.node for trace in plan.nodes)
        deployment = Deployment(state, names, assign_ports(_COMPONENTS, {}))
        supervisor = Supervisor(state.logs, _env(deployment, scratch), progress.component)
        with supervisor:
            supervisor.start(_components(deployment, plan))
            session = _Session(plan, deployment, supervisor, memory, progress, options.out)
            progress.stage("start")
            session.run(_app(scratch))
            progress.stage("simulate")
        progress.release()
        session.tell(as_json=as_json)
        progress.stage("stop")
        progress.say(progress.timing())
    return 0


def make_plan(options: up.Options, sweeps: Sequence[str], seeds: int) -> Plan:
    """Read and check everything. Raises UsageError, LocalError and TraceError."""
    if importlib.util.find_spec("ray") is None:
        raise LocalError(
            "simulate needs Flower's simulation runtime: pip install 'icos-fl[simulation]'"
        )
    overrides = up.overrides_of(options)
    swept = parse_sweeps(sweeps, overrides)
    if not 1 <= seeds <= SEEDS_MAX:
        raise UsageError(f"--seeds {seeds}: 1 to {SEEDS_MAX} are possible")
    runs = seeds * math.prod(map(len, swept.values()))
    if runs > RUNS_MAX:
        raise UsageError(f"{runs:,} runs; {RUNS_MAX:,} are the limit")
    folder = options.traces or traces.SHIPPED
    nodes = _nodes(folder, options.nodes)
    columns = [traces.column_of(column) for trace in nodes for column in trace.columns]
    metrics = run_config.choose_metrics(up.asked_metrics(options, overrides), columns)
    first = int({**run_config.defaults(), **overrides}["seed"])
    plan = Plan(
        folder, nodes, tuple(metrics), overrides,
        max(trace.interval_seconds for trace in nodes),
        combinations(swept), tuple(range(first, first + seeds)),
    )  # fmt: skip
    for setting in each_value_once(swept):
        run.check(plan.config(setting, first))
    return plan


def _nodes(folder: Path, wanted: int | None) -> tuple[traces.Trace, ...]:
    loaded = traces.load(folder)
    count = min(len(loaded), up.NODES_DEFAULT) if wanted is None else wanted
    if not 1 <= count <= NODES_MAX:
        raise UsageError(f"--nodes {count}: 1 to {NODES_MAX:,} are possible")
    nodes = virtual_nodes(loaded, count)
    for trace in nodes:
        try:
            checked_name(trace.node)
        except InvalidRows as error:
            raise UsageError(f"{folder}: {error}; rename the file") from None
    return tuple(nodes)


class _Session:
    """All runs of one simulation, one after the other."""

    def __init__(
        self,
        plan: Plan,
        deployment: Deployment,
        supervisor: Supervisor,
        memory: PeakMemory,
        progress: Progress,
        out: Path,
    ) -> None:
        self._plan = plan
        self._deployment = deployment
        self._supervisor = supervisor
        self._memory = memory
        self._progress = progress
        self._out = out
        self._outcomes: list[results.Outcome] = []
        self._files: list[Path] = []

    def run(self, app: Path) -> None:
        """Results are written after each run: an interruption leaves those that there are."""
        plan = self._plan
        runs = [(setting, seed) for setting in plan.settings for seed in plan.seeds]
        lasting = _lasting(self._supervisor)
        for number, (setting, seed) in enumerate(runs, start=1):
            if len(runs) > 1:
                words = _words({**setting, "seed": seed})
                self._progress.say(f"run {number} of {len(runs)}: {words}")
            self._outcomes.append(self._one(setting, seed, app, alone=len(runs) == 1))
            _wait_until_gone(_descendants() - lasting)
            self._files = results.write(self._out, self._facts(), self._outcomes, self._rows())

    def tell(self, *, as_json: bool) -> None:
        """Print the table, or everything as JSON."""
        rows = self._rows()
        if as_json:
            print(json.dumps(results.as_json(self._facts(), self._outcomes, rows)), flush=True)
        else:
            console = Console(file=sys.stdout)
            wide = console if console.is_terminal else Console(file=sys.stdout, width=160)
            for table in self._tables(rows):
                wide.print(table, markup=False, highlight=False)
        for row in rows:
            if row.reason:
                self._progress.say(f"{_words(row.setting)}: {row.reason}")
        self._progress.say(f"results: {', '.join(str(file) for file in self._files)}")

    def _one(self, setting: Setting, seed: int, app: Path, *, alone: bool) -> results.Outcome:
        folder = self._deployment.state.new_run()
        config = self._plan.config(setting, seed) | {
            "result-dir": str(folder),
            "processor-address": self._deployment.address("processor"),
        }
        self._memory.restart()
        try:
            history = run.train(
                self._deployment, self._supervisor, config, self._progress,
                app=app, federation=_federation(len(self._plan.nodes)),
            )  # fmt: skip
        except (ComponentDied, TaskFailed):
            raise
        except LocalError as error:  # such as a learning rate that no run survives
            if alone:
                raise
            return results.Outcome(setting, seed, str(folder), str(error).splitlines()[0])
        return results.outcome(setting, seed, folder, history, self._memory.peak_mib)

    def _rows(self) -> list[results.Row]:
        return results.rows(self._outcomes, self._plan.metrics)

    def _facts(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "traces": str(plan.folder),
            "nodes": len(plan.nodes),
            "rows": sum(len(trace.times_s) for trace in plan.nodes),
            "metrics": list(plan.metrics),
            "run_config": plan.config({}, plan.seeds[0]),
        }

    def _tables(self, rows: list[results.Row]) -> list[Any]:
        if len(self._plan.settings) > 1:
            return [results.sweep_table(rows)]
        row = rows[0]
        cost = f"{row.seconds_a_round} s a round, peak memory {row.peak_memory_mib:,} MiB"
        return [
            results.rounds_table(self._outcomes, self._plan.metrics),
            results.errors_table(row),
            f"{len(self._plan.nodes):,} nodes: {cost}",
        ]


def _words(setting: Mapping[str, Value]) -> str:
    return " ".join(f"{key}={value}" for key, value in setting.items())


def _components(deployment: Deployment, plan: Plan) -> list[Component]:
    ports = deployment.ports
    processor = (
        *module("icos_fl_local.simulation.processor"),
        *(deployment.address("processor"), str(plan.folder.absolute()), str(len(plan.nodes))),
    )
    superlink = (
        *script("flower-superlink"),
        *("--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(ports["superlink"])),
        "--disable-runtime-dependency-installation",
    )
    probes = (lambda: serving(ports["processor"]), lambda: tcp(ports["superlink"]))
    return [
        Component("processor", processor, port=ports["processor"], ready=probes[0]),
        Component("superlink", superlink, port=ports["superlink"], ready=probes[1]),
    ]


def _env(deployment: Deployment, scratch: Path) -> dict[str, str]:
    """Ray takes what Flower has no setting for from the environment.

    Its processes listen on all addresses, and run whatever one sends them: they need a token.
    """
    return deployment.env() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(_OBJECT_STORE_BYTES),
    }


def _app(scratch: Path) -> Path:
    """The Flower app of a deployment, with what is needed around its apps in a simulation."""
    app = scratch / "app"
    shutil.copytree(run_config.FLOWER_APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "client_app.py").write_text(_APP_FILE.format("virtual_node"))
    (app / "server_app.py").write_text(_APP_FILE.format("virtual_server"))
    with (app / "pyproject.toml").open("a") as stream:  # its last table is the run configuration
        stream.write('processor-address = ""\n')
    return app


def _federation(nodes: int) -> str:
    """A worker a core, where memory suffices."""
    room = psutil.virtual_memory().available // _WORKER_BYTES
    workers = max(1, min(len(os.sched_getaffinity(0)), nodes, room))
    settings = {
        "num-supernodes": nodes,
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": 0.0,
        "init-args-num-cpus": workers,
        "init-args-log-to-driver": "false",
    }
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _lasting(supervisor: Supervisor) -> set[psutil.Process]:
    """The components, and the SuperExec that the SuperLink starts a moment later."""
    superlink = psutil.Process(supervisor.pids["superlink"])
    while not superlink.children():
        supervisor.check()
        time.sleep(_LOOK_SECONDS)
    return _descendants()


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _wait_until_gone(processes: set[psutil.Process]) -> None:
    """Ray ends a moment after the run; the next run would have to share the machine with it."""
    deadline = time.monotonic() + _RUN_ENDS_SECONDS
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
