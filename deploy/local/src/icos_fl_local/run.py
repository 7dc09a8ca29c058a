"""One federated run: submit it to the SuperLink, follow its history, judge what came out."""

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icos_fl_local.deployment import Deployment, module, script
from icos_fl_local.errors import Interrupted, LocalError, Quiesced, UsageError
from icos_fl_local.progress import Progress
from icos_fl_local.run_config import FLOWER_APP, Value, to_toml
from icos_fl_local.supervisor import Supervisor, Task, log_tail

_POLL_SECONDS = 0.5
# A ServerApp that dies cannot write it in the history, so the SuperLink is asked: when the log that
# is followed ends, and after a silence.
_SILENCE_SECONDS = 45.0
_LOST = "Run ID not found"  # a SuperLink forgets its runs when it ends
_COMPLAINTS_MAX = 8  # at once
_SUBMITTED = re.compile(r"Successfully started run (\d+)")
WAITING = "training: waiting for nodes"
OVER = ("finished", "failed", "quiesced")
"""States of a run that has ended."""


def train(
    deployment: Deployment,
    supervisor: Supervisor,
    config: Mapping[str, Value],
    progress: Progress,
    *,
    stop_if_interrupted: bool = False,
    app: Path = FLOWER_APP,
    federation: str = "",
) -> dict[str, Any]:
    """Run the Flower app with *config* to its end; return its history.

    Raises LocalError, with the run's own reason, if it fails, and Quiesced. *stop_if_interrupted*
    is for a deployment that goes on without this process, *federation* what Flower's simulation
    runtime is told of the virtual nodes.
    """
    result_folder = Path(str(config["result-dir"]))
    result_folder.mkdir(parents=True, exist_ok=True)
    config_file = result_folder / "run-config.toml"
    config_file.write_text(to_toml(config))
    _write_connection(deployment)
    waiting = "training: Ray starts its workers" if federation else WAITING
    progress.training(waiting)
    with supervisor.meanwhile("flwr-run", _submission(app, config_file, federation)) as submission:
        run_id = _run_id(submission)
        try:
            path = result_folder / "history.json"
            history = _follow(supervisor, submission, run_id, path, progress, waiting)
        except Interrupted:
            if stop_if_interrupted:
                supervisor.call("flwr-stop", (*script("flwr"), "stop", run_id, "local"))
            raise
    if history["state"] == "quiesced":
        raise Quiesced(f"the run is quiesced: {history['reason']}")
    if history["state"] == "failed":
        raise LocalError(
            f"the run failed: {history['reason']}; log: {supervisor.log_path('superlink')}"
        )
    return history


def check(config: Mapping[str, Value]) -> None:
    """Ask server and client whether they take *config*, before anything starts.

    Raises UsageError with the first one's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(config))
        file.flush()
        asked = [
            subprocess.Popen(
                (*module(name), "check", file.name),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("icos_fl_server", "icos_fl_client")
        ]
        answers = [(process.communicate()[1], process.returncode) for process in asked]
    for said, status in answers:
        if status:
            raise UsageError(said.strip().splitlines()[-1])


def judge(
    deployment: Deployment, supervisor: Supervisor, what: str, metrics: list[str]
) -> dict[str, Any]:
    """What ``icos-fl-client`` says of the global model; *what*: ``backtest`` or ``forecast``."""
    with judging(deployment, supervisor, what, metrics) as answer:
        return answer()


@contextlib.contextmanager
def judging(
    deployment: Deployment, supervisor: Supervisor, what: str, metrics: list[str]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """The same meanwhile: call what it gives for the answer.

    With nothing to judge it fails, and its answer says why: a young window has no part yet that is
    long enough for it.
    """
    command = client_command(deployment, what, metrics=metrics, as_json=True)
    with supervisor.meanwhile(what, command) as asking:

        def answer() -> dict[str, Any]:
            asking.wait_for_end()
            found: dict[str, Any] = json.loads(asking.printed or asking.wait())
            return found

        yield answer


def client_command(
    deployment: Deployment,
    what: str,
    *,
    nodes: tuple[str, ...] = (),
    metrics: list[str],
    as_json: bool,
) -> tuple[str, ...]:
    """The command line of ``icos-fl-client``."""
    return (
        *script("icos-fl-client"),
        what,
        *("--processor", deployment.address("processor")),
        *("--store", deployment.address("metadata")),
        *(part for node in nodes for part in ("--node", node)),
        *(part for metric in metrics for part in ("--metric", metric)),
        *(("--json",) if as_json else ()),
    )


def read_history(path: Path) -> dict[str, Any] | None:
    """A run's history; None while there is none."""
    try:
        history: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return history


def describe(history: Mapping[str, Any], waiting: str = WAITING) -> str:
    """Where a run is, in one line; *waiting* before its first round."""
    rounds = history["rounds"]
    if history["state"] == "waiting" or not rounds:
        return waiting
    newest = rounds[-1]
    line = f"round {newest['round']} of {history['rounds_total']}: {newest['state']}"
    if newest["state"] == "skipped":
        return f"{line}, {newest['reason']}"
    # The loss of a round is known when the next one has returned.
    for judged in reversed(rounds):
        losses = {name: m.get("eval_loss") for name, m in judged["metrics"].items()}
        known = [f"{name} {loss:.4g}" for name, loss in losses.items() if loss is not None]
        if known:
            return f"{line}, loss of round {judged['round']}: {', '.join(known)}"
    losses = {name: m.get("train_loss") for name, m in newest["metrics"].items()}
    known = [f"{name} {loss:.4g}" for name, loss in losses.items() if loss is not None]
    return f"{line}, training loss: {', '.join(known)}" if known else line


def rounds_left(history: Mapping[str, Any]) -> int:
    """Of a run that ended before its last round."""
    return int(history["rounds_total"]) - len(history["rounds"])


def _follow(
    supervisor: Supervisor,
    submission: Task,
    run_id: str,
    path: Path,
    progress: Progress,
    waiting: str,
) -> dict[str, Any]:
    told: set[str] = set()
    seen: dict[str, Any] | None = None
    heard, is_over = time.monotonic(), False
    while True:
        supervisor.check()
        history = read_history(path)
        if history is not None and history != seen:
            seen, heard = history, time.monotonic()
            progress.training(describe(history, waiting))
            new = [line for line in dict.fromkeys(_complaints(history)) if line not in told]
            told.update(new)
            for complaint in new[:_COMPLAINTS_MAX]:
                progress.say(complaint)
            if len(new) > _COMPLAINTS_MAX:
                progress.say(f"and {len(new) - _COMPLAINTS_MAX} more of the kind: {path}")
            if history["state"] in OVER:
                return history
        # It follows the run's log, unless the SuperLink was away.
        over, is_over = is_over, submission.is_over
        if is_over is not over or time.monotonic() - heard > _SILENCE_SECONDS:
            _ensure_alive(supervisor, submission, run_id, path)
            heard = time.monotonic()
        time.sleep(_POLL_SECONDS)


def _complaints(history: Mapping[str, Any]) -> list[str]:
    """Nodes that could not take part as they should, each cause once."""
    causes = [(node, facts.get("cause", "")) for node, facts in history["nodes"].items()]
    for entry in history["rounds"]:
        causes += [(node, facts.get("cause", "")) for node, facts in entry["nodes"].items()]
    return [f"{node}: {cause}" for node, cause in causes if cause]


def _submission(app: Path, config_file: Path, federation: str) -> tuple[str, ...]:
    """A command that submits the run, prints its id, then its log, and ends with the run."""
    command = (*script("flwr"), "run", str(app), "local", "--stream")
    simulated = ("--federation-config", federation) if federation else ()
    return (*command, "--run-config", str(config_file), *simulated)


def _run_id(submission: Task) -> str:
    while not (found := _SUBMITTED.search(submission.printed)):
        if submission.is_over:
            raise LocalError(f"the SuperLink did not take the run: {submission.wait()[-300:]}")
        time.sleep(_POLL_SECONDS / 5)
    return found[1]


def _ensure_alive(supervisor: Supervisor, submission: Task, run_id: str, history: Path) -> None:
    """Raise LocalError if the SuperLink says that the run is over, or knows none like it."""
    command = (*script("flwr"), "list", "local", "--run-id", run_id, "--format", "json")
    answer = _json(supervisor.call("flwr-list", command))
    runs = answer.get("runs", [])
    facts = runs[0] if runs else {}
    status = str(facts.get("status", ""))
    lost = _LOST in answer.get("error-message", "")
    over = read_history(history)
    if not (lost or status.startswith("finished")) or (over and over["state"] in OVER):
        return
    log = supervisor.log_path("flwr-log")
    log.write_text(submission.printed)
    how = facts.get("status-details") or status or "the SuperLink was started again meanwhile"
    reason = f"it ended without a word: {how}"
    _note_failure(history, run_id, reason)
    last = "".join(f"\n  | {line[:300]}" for line in log_tail(log, 10) if line)
    raise LocalError(f"the run failed: {reason}; its last lines:{last}\nlog: {log}")


def _note_failure(path: Path, run_id: str, reason: str) -> None:
    """In the history, as the ServerApp could not."""
    history = read_history(path) or {
        "protocol": 1,
        "run": run_id,
        "metrics": [],
        "rounds_total": 0,
        "nodes": {},
        "rounds": [],
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**history, "state": "failed", "reason": reason}, indent=1))
    temporary.replace(path)


def _json(printed: str) -> dict[str, Any]:
    """The JSON object in what a Flower command printed, which may have lines around it."""
    start, end = printed.find("{"), printed.rfind("}")
    try:
        answer: dict[str, Any] = json.loads(printed[start : end + 1])
    except ValueError:
        raise LocalError(f"flwr answered something else than JSON: {printed[:300]!r}") from None
    return answer


def _write_connection(deployment: Deployment) -> None:
    """Tell the ``flwr`` command where the SuperLink is."""
    deployment.state.flower.mkdir(parents=True, exist_ok=True)
    (deployment.state.flower / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
        f'address = "{deployment.address("superlink")}"\ninsecure = true\n'
    )
