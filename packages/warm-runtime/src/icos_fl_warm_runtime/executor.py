"""A Flower executor that has its tasks forked by a warm worker, and tells their deaths at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.supercore import log
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from icos_fl_warm_runtime import metrics
from icos_fl_warm_runtime.flower import tasks
from icos_fl_warm_runtime.pace import Pace
from icos_fl_warm_runtime.worker import ENTRY_POINTS, START, ending, told_by

TAKEN_SECONDS = 120.0
"""Until a worker that has to import everything must have taken a task."""

HEARTBEAT_SECONDS = 10.0
"""A token that nobody has used for 30 s is taken back."""

_POLL_SECONDS_MAX = 1.0
"""As often as Flower's SuperExec asks a host that does not hold its requests."""


class ForkExecutor(SubprocessExecutor):
    """ServerApps and ClientApps from a warm worker each; whatever else as Flower starts it."""

    def __init__(self) -> None:
        metrics.begin(map(_kind, ENTRY_POINTS))
        self._workers: dict[str, _Worker] = {}
        self._refused: set[str] = set()
        self._pace = Pace(_POLL_SECONDS_MAX)
        self._kept = Path(tempfile.mkdtemp(prefix="icos-fl-"))

    def reconcile(self) -> None:
        """Called before each question for a task, which a warm host holds."""
        self._pace.sleep()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Have the task forked. Raises nothing: what cannot be forked starts as Flower does it."""
        self._pace.start_again()
        command = tasks.command_of(spec)
        if command not in ENTRY_POINTS or command in self._refused:
            return self._launch_cold(spec)
        refusal = ""
        for _ in range(2):  # a worker may end of idleness just as the task comes
            worker = self._workers.get(command)
            if worker is None or worker.is_over:
                worker = self._workers[command] = _Worker(command, self._kept)
            if worker.take(spec):
                metrics.STARTED.labels(_kind(command), "warm").inc()
                return LaunchResult.accepted()
            refusal = worker.refusal
            if refusal:
                break
        if refusal:  # which the next worker would say, too
            self._refused.add(command)
        log(
            WARNING,
            "The warm worker of %s: %s. %s started cold",
            command,
            refusal or "it ended before it had a task",
            "From now on its tasks are" if refusal else "This task is",
        )
        return self._launch_cold(spec)

    def _launch_cold(self, spec: ExecutionSpec) -> LaunchResult:
        metrics.STARTED.labels(_kind(tasks.command_of(spec)), "cold").inc()
        return super().launch(spec)

    def close(self) -> None:
        """End the workers, and with them their tasks."""
        for worker in self._workers.values():
            worker.close()
        shutil.rmtree(self._kept, ignore_errors=True)


class _Worker:
    """A worker process, and the tasks that it has."""

    def __init__(self, command: str, kept: Path) -> None:
        self.refusal = ""
        """Why it takes no task."""
        self.is_over = False
        self._ordered: dict[int, ExecutionSpec] = {}
        self._running: dict[int, ExecutionSpec] = {}
        self._began: dict[int, float] = {}
        self._kind, self._kept = _kind(command), kept
        self._changed = threading.Condition()
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", START),
                    *(str(theirs.fileno()), command, str(kept)),
                ],
                pass_fds=[theirs.fileno()],
                # One thread until it forks: numpy's pool would be a second one.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        metrics.WORKERS.labels(self._kind).inc()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self, spec: ExecutionSpec) -> bool:
        """Give it a task; False if it ends or refuses before it has forked one."""
        order = {
            "task_id": spec.task_id,
            "arguments": tasks.arguments_of(spec),
            "quiet": spec.suppress_output,
        }
        with self._changed:
            self._ordered[spec.task_id] = spec
            self._began[spec.task_id] = time.monotonic()
            with suppress(OSError):  # it is ending, which the listener finds out
                self._connection.sendall(json.dumps(order).encode() + b"\n")
        deadline = time.monotonic() + TAKEN_SECONDS
        while not self._answered(spec, HEARTBEAT_SECONDS) and time.monotonic() < deadline:
            tasks.report_start(spec)
        with self._changed:
            is_taken = self._ordered.pop(spec.task_id, None) is None
        if not is_taken:
            self._process.kill()  # it might take the task yet, which now starts elsewhere
        return is_taken

    def _answered(self, spec: ExecutionSpec, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: spec.task_id not in self._ordered or self.is_over, seconds
            )

    def close(self) -> None:
        """End it, if it is not over; its tasks are told to end."""
        self._running.clear()
        with suppress(OSError):  # Flower closes twice, and the listener closes when it is over
            self._connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with self._connection, self._connection.makefile("rb") as lines:
            try:
                for line in lines:
                    self._hear(json.loads(line))
            except (OSError, ValueError):
                pass  # cut off in mid-line by its death
        status = self._process.wait()
        with self._changed:
            lost, self._running = self._running, {}
            self.is_over = True
            self._changed.notify_all()
        for spec in lost.values():
            self._count(spec, "died")
            tasks.report_death(spec, f"the worker that it was forked from: {ending(status)}")

    def _hear(self, fact: dict[str, Any]) -> None:
        with self._changed:
            if "refused" in fact:
                self.refusal = fact["refused"]
            elif "taken" in fact:
                if spec := self._ordered.pop(fact["taken"], None):
                    self._running[spec.task_id] = spec
                self._changed.notify_all()
            elif "ended" in fact:
                spec = self._running.pop(fact["ended"], None)
        if "ended" in fact and spec is not None:
            self._count(spec, fact["outcome"])
            if fact["how"]:
                tasks.report_death(spec, fact["how"])

    def _count(self, spec: ExecutionSpec, outcome: str) -> None:
        """The end of a task, and what it has counted itself."""
        seconds = time.monotonic() - self._began.pop(spec.task_id)
        metrics.SECONDS.labels(self._kind, outcome).observe(seconds)
        told = told_by(spec.task_id, self._kept)
        with suppress(OSError, ValueError):  # none is there, or it was cut off in mid-line
            metrics.TASK_COUNTS.add(told.read_text())
        told.unlink(missing_ok=True)


def _kind(command: str) -> str:
    """``clientapp`` or ``serverapp``."""
    return command.removeprefix("flwr-")
