"""``icos-fl up``: from nothing to a judged forecast, and back to nothing."""

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from icos_fl_local import (
    doctor,
    guard,
    host,
    monitoring,
    replay,
    run,
    run_config,
    sources,
    traces,
)
from icos_fl_local.backtest.combined import Replays, of_forecaster
from icos_fl_local.deployment import (
    CONTROLLER_PAGE,
    FORECASTER,
    METRICS,
    PAGE,
    RUN,
    SERVICES,
    STORE,
    Deployment,
    assign_ports,
    component_names,
    metrics_names,
    parse_ports,
)
from icos_fl_local.errors import LocalError, Quiesced, UsageError
from icos_fl_local.processor_client import ProcessorClient
from icos_fl_local.progress import Progress, to
from icos_fl_local.run_config import Value
from icos_fl_local.state import UV_RUN, StateFolder
from icos_fl_local.supervisor import Supervisor

NODES_DEFAULT = 4
STORE_VERSION = version("icos-fl-timeseries-store")
"""Of its parts, most of which do not tell it themselves."""
_WINDOW_ROWS_MIN, _WINDOW_ROWS_MAX = 300, 100_000
_HOST_SAMPLING_SECONDS_MAX = 5.0
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Options:
    """The command line of ``up``."""

    state_folder: Path
    out: Path
    source: str = "replay"
    traces: Path | None = None
    nodes: int | None = None
    rounds: int | None = None
    metrics: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    bridge_config: Path | None = None
    json: bool = False
    keep: bool = False
    runtime: str = "warm"


@dataclass(frozen=True)
class Source:
    """Where the rows come from."""

    name: str
    nodes: tuple[str, ...]
    columns: tuple[str, ...]
    """Of all nodes; empty if they are known only when they come."""
    sampling_seconds: float
    """Of the coarsest node."""
    bridge: Mapping[str, Any]
    """The bridge's configuration."""
    recorded: tuple[traces.Trace, ...] = ()
    programs: sources.Sources | None = None
    """That measure, if they are components of the deployment."""

    @property
    def is_live(self) -> bool:
        """Do rows come as time goes by?"""
        return not self.recorded


def overrides_of(options: Options) -> dict[str, Value]:
    """The run configuration that the user asks for; raises UsageError."""
    overrides = run_config.parse(options.overrides)
    if options.rounds is not None:
        if "num-server-rounds" in overrides:
            raise UsageError("--rounds and -c num-server-rounds=… are the same: give one of them")
        overrides["num-server-rounds"] = options.rounds
    if int(overrides.get("num-server-rounds", 1)) < 1:
        raise UsageError(f"--rounds {overrides['num-server-rounds']}: at least 1 is needed")
    if options.metrics and "metric" in overrides:
        raise UsageError("--metric and -c metric=… are the same: give one of them")
    return overrides


def asked_metrics(options: Options, overrides: Mapping[str, Value]) -> list[str]:
    """The metrics that the user names, by --metric or by -c."""
    if options.metrics:
        return list(options.metrics)
    return [name.strip() for name in str(overrides.get("metric", "")).split(",") if name.strip()]


def open_source(options: Options, overrides: Mapping[str, Value]) -> Source:
    """Read the traces, or get ready to measure; raises UsageError or TraceError."""
    if options.nodes is not None and options.nodes < 1:
        raise UsageError(f"--nodes {options.nodes}: at least 1 is needed")
    if options.source != "replay":
        return _live_source(options, overrides)
    folder = options.traces or traces.SHIPPED
    loaded = traces.load(folder, options.nodes)
    if options.nodes is None:
        loaded = loaded[:NODES_DEFAULT]
    for trace in loaded:
        if not trace.node.isprintable() or set(trace.node) & set('"\\'):
            raise UsageError(f"{folder}: {trace.node!r} cannot be the name of a node; rename it")
    rows = max(len(trace.times_s) for trace in loaded)
    if rows > _WINDOW_ROWS_MAX:
        raise LocalError(f"{folder}: a trace has {rows} rows, {_WINDOW_ROWS_MAX} are the limit")
    columns = sorted({traces.column_of(name) for trace in loaded for name in trace.columns})
    return Source(
        "replay",
        tuple(trace.node for trace in loaded),
        tuple(columns),
        max(trace.interval_seconds for trace in loaded),
        traces.bridge_config(loaded),
        tuple(loaded),
    )


def with_bridge_config(source: Source, path: Path | None) -> Source:
    """The source, with what the file says of the bridge beside what it needs itself.

    What is wrong with a column the bridge says when it starts. Raises UsageError.
    """
    if path is None:
        return source
    option = f"--bridge-config {path}"
    try:
        own = YAML().load(path)
    except OSError as error:
        raise UsageError(f"{option}: cannot be read: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        raise UsageError(f"{option}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(own, dict):
        raise UsageError(f"{option}: a mapping is needed, such as more_columns: …")
    if twice := sorted(own.keys() & source.bridge.keys()):
        raise UsageError(f"{option}: {twice[0]} is what --source {source.name} sets itself")
    return replace(source, bridge={**own, **source.bridge})


def _live_source(options: Options, overrides: Mapping[str, Value]) -> Source:
    """This machine, measured by this process or by a Collector beside it."""
    if options.traces:
        raise UsageError("--traces is for --source replay")
    if (options.nodes or 1) != 1:
        raise UsageError(
            f"--nodes {options.nodes}: --source {options.source} has one node, this machine"
        )
    step = float(overrides.get("interval", 0)) or 15.0
    programs = None
    sampling = min(_HOST_SAMPLING_SECONDS_MAX, step)
    if options.source == "collector":
        sampling = sources.SAMPLING_SECONDS
        if step < sampling:
            raise UsageError(f"-c interval={step:g}: the Collector measures every {sampling:g} s")
        programs = sources.find()
    lookback = int({**run_config.defaults(), **overrides}["time-step"])
    steps = lookback + int(overrides.get("horizon", run_config.FORECAST_SECONDS / step))
    rows = math.ceil(5 * steps * step / sampling)
    rows = min(max(rows, _WINDOW_ROWS_MIN), _WINDOW_ROWS_MAX)
    node = socket.gethostname() or "localhost"
    # The bridge's own columns take what the host sends, as they take it from a Collector.
    bridge = {"interval_seconds": sampling, "window_rows": rows}
    return Source(options.source, (node,), (), sampling, bridge, programs=programs)


def _ensure_ready(state_folder: Path, ports: Mapping[str, int]) -> None:
    """Raises LocalError in the words of ``doctor``."""
    bad = [check for check in doctor.examine(state_folder, ports) if not check.ok]
    if bad:
        raise LocalError("\n".join(check.line() for check in bad))


def _ensure_long_enough(
    recorded: Sequence[traces.Trace], metrics: Sequence[str], config: Mapping[str, Value]
) -> None:
    """Raises UsageError for a metric that no trace can have the steps to learn, gaps or none."""
    lookback, horizon = int(config["time-step"]), int(config["horizon"])
    share = float(config["train-test-split"])
    needed = math.ceil((lookback + horizon) / share - 1e-9)
    for metric in metrics:
        told, is_long_enough = [], False
        for trace in recorded:
            if metric in map(traces.column_of, trace.columns):
                interval_s = float(config["interval"]) or trace.interval_seconds
                span_s = int(trace.times_s[-1] - trace.times_s[0])
                most = min(len(trace.times_s), math.ceil(span_s / interval_s) + 1)
                told.append(f"{most} of {interval_s:g} s in {trace.node}")
                is_long_enough |= most >= needed
        if told and not is_long_enough:
            raise UsageError(
                f"no trace has the steps to learn {metric}: at most {', '.join(told)}; {needed} "
                f"are needed (lookback {lookback} + horizon {horizon}, in the {100 * share:g} % to "
                "train on)"
            )


def up(options: Options) -> int:
    """Do it all; return the exit status.

    Raises LocalError, TraceError, ReplayError and Interrupted.
    """
    overrides = overrides_of(options)
    given_ports = parse_ports(options.ports)
    state = StateFolder(options.state_folder)
    state.ensure_free()
    _ensure_ready(options.state_folder, {})  # ports later: a name that nothing has is told first
    source = with_bridge_config(open_source(options, overrides), options.bridge_config)
    metrics = asked_metrics(options, overrides)
    if source.columns:
        metrics = run_config.choose_metrics(metrics, source.columns)
    config = run_config.complete(
        overrides, metrics or ["cpu_usage"], len(source.nodes), source.sampling_seconds, ""
    )
    run.check(config)
    _ensure_long_enough(source.recorded, metrics, config)
    more = list(source.programs.names) if source.programs else []
    if options.keep or source.is_live:
        more += [FORECASTER, CONTROLLER_PAGE]
    names = component_names(source.nodes, more)
    page = [PAGE] if FORECASTER in names else []
    ports = assign_ports([*names, *page, *metrics_names(names)], given_ports)
    _ensure_ready(options.state_folder, given_ports)
    options.out.mkdir(parents=True, exist_ok=True)  # rather refused now than after the training
    # Forks, so before anything that starts a thread.
    replays = Replays(source.recorded, metrics, config) if source.recorded else None
    with replays or contextlib.nullcontext(), state.lock(), Progress(to(options.json)) as progress:
        deployment = Deployment(state, source.nodes, ports, options.runtime)
        state.quiesced.unlink(missing_ok=True)
        session = _Session(options, overrides, source, metrics, deployment, progress, replays)
        try:
            return session.run()
        except LocalError as error:
            if not isinstance(error, Quiesced):
                session.note("failed", str(error).splitlines()[0].removesuffix("; its last lines:"))
            raise
        finally:
            if session.state != "failed":
                session.note("stopped", "")


class _Session:
    """One ``up``, from the first process to the last."""

    def __init__(
        self,
        options: Options,
        overrides: dict[str, Value],
        source: Source,
        metrics: list[str],
        deployment: Deployment,
        progress: Progress,
        replays: Replays | None,
    ) -> None:
        self.options = options
        self.overrides = overrides
        self.source = source
        self.metrics = metrics
        self.deployment = deployment
        self.progress = progress
        self.replays = replays
        self.state = "starting"
        self._reason = ""
        self._is_noted = True
        self._started = time.time()
        self._supervisor = Supervisor(deployment.state.logs, deployment.env(), self._changed)

    def run(self) -> int:
        """Everything between the first component's start and the last one's end."""
        with self._supervisor:
            nodes = ", ".join(self.source.nodes)
            self.progress.say(
                f"{self.source.name} of {nodes}; Flower's runtime: {self.options.runtime}"
            )
            self._bring_up()
            if self.source.is_live:
                self._train_again_and_again()
            self._train_and_tell()
            if self.options.keep:
                self.progress.say(self.progress.timing())
                self._keep()
                while True:
                    self._look()
        self.progress.stage("stop")
        self.progress.release()
        self.progress.say(self.progress.timing())
        return 0

    def note(self, state: str, reason: str) -> None:
        """Write down where the deployment is, for the other commands.

        One that is kept goes on where that cannot be written, and tries again. Raises OSError.
        """
        self.state, self._reason = state, reason
        was_noted, self._is_noted = self._is_noted, False
        try:
            self.deployment.state.write(self._description())
            self._is_noted = True
        except OSError as error:
            if not self._supervisor.restarts:
                raise
            if was_noted:
                self.progress.say(f"{time.strftime('%F %T %Z')} status is out of date: {error}")

    def _description(self) -> dict[str, Any]:
        pids, ended = self._supervisor.pids, self._supervisor.ended
        return {
            "pid": os.getpid(),
            "state": self.state,
            "reason": self._reason,
            "source": self.source.name,
            "started_unix_s": self._started,
            "nodes": list(self.source.nodes),
            "metrics": self.metrics,
            "sampling_seconds": self.source.sampling_seconds,
            "overrides": self.overrides,
            "components": {
                name: {"pid": pids.get(name), "port": self.deployment.ports[name]}
                | ({"version": STORE_VERSION} if name in STORE else {})
                | ({"ended": asdict(ended[name])} if name in ended else {})
                for name in self.deployment.names
            },
            "metrics_ports": self.deployment.metrics_ports,
            "page": self.deployment.page,
            "controller_page": self.deployment.controller_page,
        }

    def _changed(self, name: str, state: str) -> None:
        self.progress.component(name, state)
        if state == "ended":
            ended, log = self._supervisor.ended[name], self._supervisor.log_path(name)
            self.progress.say(
                f"{time.strftime('%F %T %Z')} {name} died ({ended.how}); "
                f"it is started again in {ended.delay_seconds:g} s; log: {log}"
            )
        if state in ("starting", "ended"):
            self.note(self.state, "")

    def _bring_up(self) -> None:
        if not self.source.is_live:  # else rows of other traces would be among these
            shutil.rmtree(self.deployment.state.folder / "store", ignore_errors=True)
        bridge_config = self.deployment.state.folder / "bridge.yaml"
        with bridge_config.open("w") as stream:
            YAML().dump(dict(self.source.bridge), stream)
        monitoring.write(self.deployment, self.source.name)
        # Flower's parts start while the rows already flow.
        config = run_config.complete(
            self.overrides, ["?"], len(self.source.nodes), self.source.sampling_seconds, ""
        )
        components = self.deployment.components(
            bridge_config,
            recorded=not self.source.is_live,
            interval_seconds=float(config["interval"]) or self.source.sampling_seconds,
        )
        wanted = [*STORE, *SERVICES]
        if self.source.programs:
            self.progress.say(self.source.programs.power.found)
            components = [*self.source.programs.components(self.deployment), *components]
            wanted += self.source.programs.names
        later = self._supervisor.start(components, wait_for=wanted)
        self.progress.stage("start")
        if not self.source.is_live:
            self._replay()
            self.progress.stage("feed")
        self._supervisor.start(later, wait_for=self.deployment.names)
        self.progress.stage("start Flower")
        self.note("running", "")

    def _replay(self) -> None:
        endpoint = self.deployment.address("bridge")
        sent = self.progress.rows
        self._supervisor.during(lambda: replay.send(self.source.recorded, endpoint, sent))

    def _config(self) -> dict[str, Value]:
        """Of the next run, which goes on from the model of the run before."""
        overrides = dict(self.overrides)
        if last := self.deployment.state.last_checkpoints(self._started, self.metrics):
            overrides["resume"] = str(last)
        return new_config(self.deployment, overrides, self.metrics, self.source.sampling_seconds)

    def _train_and_tell(self) -> None:
        """A run. Of a deployment that goes on with another one it is no end if it is quiesced."""
        try:
            result = train_and_judge(
                self.deployment,
                self._supervisor,
                self._config(),
                self.source.name,
                self.progress,
                self.replays,
            )
        except Quiesced as quiesced:
            if not self.options.keep:
                raise
            self.progress.say(str(quiesced))
            return
        tell(result, self.options.out, self.progress, as_json=self.options.json)

    def _train_again_and_again(self) -> None:
        node = self.source.nodes[0]
        with contextlib.ExitStack() as measuring:
            if self.source.programs is None:
                source = host.start(
                    self.deployment.address("bridge"), node, self.source.sampling_seconds
                )
                measuring.callback(source.stop)
            while True:
                started = time.monotonic()
                try:
                    self._wait_for_rows(node)
                    started = time.monotonic()
                    self._train_and_tell()
                    self.progress.say(self.progress.timing())
                except (LocalError, OSError) as error:
                    if not self._supervisor.restarts:
                        raise
                    self.progress.say(f"{time.strftime('%F %T %Z')} {error}")
                if self.options.keep:
                    self._keep()
                # The model has been judged on the horizon before; learn again when it has passed.
                config = self._config()
                step_s = float(config["interval"]) or self.source.sampling_seconds
                self._pause(started + float(config["horizon"]) * step_s)
                self.progress.stages.clear()

    def _look(self) -> None:
        time.sleep(_LOOK_SECONDS)
        self._supervisor.check()
        if not self._is_noted:
            self.note(self.state, self._reason)

    def _pause(self, until: float) -> None:
        while time.monotonic() < until or self.deployment.state.quiesced.exists():
            self._look()
        self.progress.stage("pause")

    def _wait_for_rows(self, node: str) -> None:
        with ProcessorClient(self.deployment.address("processor")) as processor:
            while self._missing_rows(processor, node) != 0:
                self._look()

    def _missing_rows(self, processor: ProcessorClient, node: str) -> int | None:
        """Rows until every metric can be learned; None while there is no window."""
        window = processor.windows().get(node)
        if window is None or not window.columns:
            self.progress.training("waiting for the first rows")
            return None
        if not self.metrics or not set(self.metrics) <= set(window.columns):
            self.metrics = run_config.choose_metrics(self.metrics, window.columns)
        found = processor.readiness(node, self.metrics, self._config())
        missing = max(readiness.missing_rows for readiness in found.values())
        self.progress.rows(node, window.rows, window.rows + missing if missing else None)
        return missing

    def _keep(self) -> None:
        if self._supervisor.restarts:  # it is kept
            return
        self._supervisor.restarts = True
        self.progress.release()
        state = self.deployment.state
        given = f", each with{state.option}" if state.option else ""
        self.progress.say(
            f"left running in {state.folder}: "
            f"{UV_RUN}icos-fl status, watch, window, train, forecast, backtest, logs, down{given}"
        )
        self.progress.say(f"its nodes' page: {self.deployment.page}")
        self.progress.say(f"its controller's page: {self.deployment.controller_page}")
        guard.kept(self.deployment.state.logs / "launcher.log")


def new_config(
    deployment: Deployment,
    overrides: Mapping[str, Value],
    metrics: Sequence[str],
    sampling_seconds: float,
) -> dict[str, Value]:
    """The configuration of the next run, with a result-dir only if one is given."""
    metrics_address = deployment.address(f"{METRICS}{RUN}")
    config = run_config.complete(
        {"metrics-address": metrics_address, **overrides},
        metrics,
        len(deployment.nodes),
        sampling_seconds,
        deployment.address("metadata"),
    )
    if "result-dir" not in overrides:
        del config["result-dir"]
    return config


def train_and_judge(
    deployment: Deployment,
    supervisor: Supervisor,
    config: dict[str, Value],
    source: str,
    progress: Progress,
    replays: Replays | None = None,
    *,
    stop_if_interrupted: bool = False,
) -> dict[str, Any]:
    """A run, and what its model is worth: the result that ``report`` shows and --json prints.

    It has a result folder of its own unless *config* has one.

    What nodes say with it comes from *replays*, without which the forecaster is asked.
    """
    metrics = str(config["metric"]).split(",")
    given = str(Path(str(config["result-dir"])).absolute()) if "result-dir" in config else ""
    with deployment.state.one_run_at_a_time(given) as folder:
        config = {**config, "result-dir": folder}
        history = run.train(
            deployment, supervisor, config, progress, stop_if_interrupted=stop_if_interrupted
        )
    # Until the first round begins, the app is sent and tasks import what they need.
    rounds = history["rounds"]
    progress.stage("submit", time.time() - rounds[0]["started_unix_s"] if rounds else 0.0)
    progress.stage("rounds")
    with (
        run.judging(deployment, supervisor, "backtest", metrics) as backtest,
        run.judging(deployment, supervisor, "forecast", metrics) as forecast,
    ):
        if replays:
            checkpoints = Path(folder) / "checkpoints"
            combination = supervisor.during(lambda: replays.judge(checkpoints))
        elif FORECASTER in deployment.ports:
            alone = forecast().get("forecasts", []), backtest().get("results", [])
            combination = of_forecaster(deployment.address(FORECASTER), config, *alone)
        else:
            combination = {"results": [], "notes": ["No combination: there is no forecaster."]}
        answers = {"backtest": backtest(), "forecast": forecast(), "combination": combination}
    progress.stage("judge")
    return {
        "source": source,
        "nodes": list(deployment.nodes),
        "metrics": metrics,
        "run_config": config,
        "history": history,
        **answers,
        "stages": list(progress.stages),
    }


def tell(result: dict[str, Any], out: Path, progress: Progress, *, as_json: bool) -> None:
    """Write the report; print the table, or the result as JSON."""
    from icos_fl_local import report  # Matplotlib takes a second, which no refusal should wait for

    files = [str(file) for file in report.write(out, result)]
    progress.stage("report")
    if as_json:
        told = report.without_nan(result | {"stages": progress.stages, "report": files})
        print(json.dumps(told), flush=True)
    else:
        progress.release()
        console = Console(file=sys.stdout)
        wide = console if console.is_terminal else Console(file=sys.stdout, width=140)
        wide.print(report.table(result), markup=False, highlight=False)
    progress.say(f"report: {files[0] if files else out}")
