"""What can be asked of a deployment that runs."""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil

from icos_fl_local import run, run_config
from icos_fl_local.deployment import FORECASTER, HOST, METRICS, Deployment, module
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.processor_client import ProcessorClient
from icos_fl_local.progress import Progress, to
from icos_fl_local.state import UV_RUN, StateFolder
from icos_fl_local.supervisor import Supervisor, log_tail
from icos_fl_local.up import (
    Options,
    asked_metrics,
    new_config,
    overrides_of,
    tell,
    train_and_judge,
)

_DOWN_SECONDS = 90.0
_LOG_LINES = 20
_LOOK_SECONDS = 0.5
_WATCH_SECONDS = 30.0


def watch(state: StateFolder, arguments: Sequence[str]) -> int:
    """Hand over to ``icos-fl-store watch`` of this deployment; does not return."""
    return store_command(state, ["watch", *_judged_by(state, state.read_running()), *arguments])


def store_command(state: StateFolder, arguments: Sequence[str]) -> int:
    """Hand over to ``icos-fl-store`` of this deployment; does not return."""
    deployment = _deployment(state, state.read_running())
    command = (*module("icos_fl_timeseries_store"), *arguments)
    return _become(deployment, command, _store_env(deployment))


def forecast(state: StateFolder, node: str | None, *, as_json: bool) -> int:
    """What comes next: by the deployment's forecaster. Needs no SuperLink.

    Without one it hands over to ``icos-fl-client forecast``, and does not return.
    """
    description = state.read_running()
    deployment = _deployment(state, description)
    nodes = deployment.nodes if node is None else (_known(node, deployment.nodes, "node"),)
    if FORECASTER in deployment.ports:
        from icos_fl_local import forecasts

        return forecasts.tell(deployment.address(FORECASTER), nodes, as_json=as_json)
    metrics = description["metrics"]
    command = run.client_command(
        deployment, "forecast", nodes=nodes, metrics=metrics, as_json=as_json
    )
    return _become(deployment, command, {})


def train(
    state: StateFolder, overrides: Sequence[str], rounds: int | None, out: Path, *, as_json: bool
) -> int:
    """Another run on the windows as they are now, from where the one before ended."""
    description = state.read_running()
    deployment = _deployment(state, description)
    options = Options(state.folder, out, rounds=rounds, overrides=tuple(overrides))
    asked = overrides_of(options)
    merged = {**description["overrides"], **asked}
    merged.pop("result-dir", None)
    with ProcessorClient(deployment.address("processor")) as processor:
        columns = [name for window in processor.windows().values() for name in window.columns]
    metrics = run_config.choose_metrics(
        asked_metrics(options, asked) or description["metrics"], columns
    )
    merged["metric"] = ",".join(metrics)
    if "resume" not in asked:
        merged.pop("resume", None)
        if checkpoints := state.last_checkpoints(description["started_unix_s"], metrics):
            merged["resume"] = str(checkpoints)
    last = state.last_run(description["started_unix_s"])
    history = run.read_history(last / "history.json") if last else None
    if history and history["state"] == "quiesced" and "num-server-rounds" not in asked:
        merged["num-server-rounds"] = run.rounds_left(history)
    if "result-dir" in asked:
        merged["result-dir"] = asked["result-dir"]
    with Progress(to(as_json)) as progress, Supervisor(state.logs, deployment.env()) as supervisor:
        config = new_config(deployment, merged, metrics, description["sampling_seconds"])
        run.check(config)
        state.quiesced.unlink(missing_ok=True)
        result = train_and_judge(
            deployment,
            supervisor,
            config,
            description["source"],
            progress,
            stop_if_interrupted=True,
        )
        tell(result, out, progress, as_json=as_json)
        progress.say(progress.timing())
    return 0


def quiesce(state: StateFolder, timeout_seconds: float) -> int:
    """Have no run begin, and the one under way end with the round in hand; wait for it."""
    state.read_running()
    until = time.monotonic() + timeout_seconds
    state.quiesced.touch()
    folder = None
    while under_way := state.run_under_way():
        folder = under_way
        with contextlib.suppress(FileNotFoundError):  # the ServerApp has not begun
            (folder / "run.lock").write_text("quiesce\n")
        if time.monotonic() > until:
            raise LocalError(
                f"the round in hand has not ended within {timeout_seconds:g} s; "
                "the run still ends with it"
            )
        time.sleep(_LOOK_SECONDS)
    history = run.read_history(folder / "history.json") if folder else None
    how = f"run {history['state']}: {history['reason'] or 'all rounds are done'}" if history else ""
    how = how or "no run was under way"
    print(f"quiesced; {how}; go on with '{UV_RUN}icos-fl train{state.option}'")
    return 0


def logs(state: StateFolder, component: str | None, *, follow: bool) -> int:
    """Print a component's log, or the end of all logs."""
    files = {path.stem: path for path in sorted(state.logs.glob("*.log"))}
    if not files:
        raise LocalError(f"{state.logs}: no logs there")
    chosen = files if component is None else {component: files[_known(component, files, "log")]}
    with contextlib.ExitStack() as opened:
        streams = {
            name: opened.enter_context(path.open(errors="replace")) for name, path in chosen.items()
        }
        if component is None:
            for name, stream in streams.items():
                for line in log_tail(files[name], _LOG_LINES):
                    print(f"{name} | {line}")
                stream.seek(0, os.SEEK_END)
        else:
            moved = files[component].with_suffix(".log.1")
            if moved.exists():
                print(moved.read_text(errors="replace"), end="")
            shutil.copyfileobj(streams[component], sys.stdout)
        sys.stdout.flush()
        if follow:
            _follow(streams, prefix=component is None)
    return 0


def down(state: StateFolder) -> int:
    """End the deployment, and wait until it has ended."""
    description = state.read_running()
    pid = int(description["pid"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _DOWN_SECONDS
    while state.is_running() or psutil.pid_exists(pid):
        if time.monotonic() > until:
            raise LocalError(
                f"pid {pid} has not ended within {_DOWN_SECONDS:g} s; try kill -9 {pid}"
            )
        time.sleep(0.1)
    print("stopped")
    return 0


def _deployment(state: StateFolder, description: dict[str, Any]) -> Deployment:
    ports = {name: facts["port"] for name, facts in description["components"].items()}
    ports |= {f"{METRICS}{name}": port for name, port in description["metrics_ports"].items()}
    return Deployment(state, tuple(description["nodes"]), ports)


def _judged_by(state: StateFolder, description: dict[str, Any]) -> list[str]:
    """Options of watch. Rows of a replay are as old as its traces: that is no fault of theirs."""
    recorded = ["--recorded"] if description["source"] == "replay" else []
    file = ["--expectations", str(state.expectations)] if state.expectations.exists() else []
    return [*recorded, *file]


def _store_env(deployment: Deployment) -> dict[str, str]:
    return {
        "ICOS_FL_STORE_HOST": HOST,
        "ICOS_FL_STORE_METADATA_PORT": str(deployment.ports["metadata"]),
    }


def _known(name: str, names: Sequence[str] | dict[str, Path], what: str) -> str:
    if name not in names:
        raise UsageError(f"no {what} {name!r}; there are: {', '.join(names)}")
    return name


def _become(deployment: Deployment, command: tuple[str, ...], env: dict[str, str]) -> int:
    sys.stdout.flush()
    os.execve(command[0], list(command), deployment.env() | env)  # noqa: S606 - our own commands


def _follow(streams: Mapping[str, TextIO], *, prefix: bool) -> None:
    while True:
        quiet = True
        for name, stream in streams.items():
            if os.fstat(stream.fileno()).st_size < os.lseek(stream.fileno(), 0, os.SEEK_CUR):
                stream.seek(0)  # it was moved away
            for line in stream:
                quiet = False
                print(f"{name} | {line}" if prefix else line, end="", flush=True)
        if quiet:
            time.sleep(0.2)
