"""The warm worker: imports what tasks need, then forks one process a task.

``python -c START SOCKET_FD COMMAND KEPT_FOLDER`` speaks lines of JSON over
the socket: a task's arguments come in, ``taken`` and ``ended`` go out. It never runs a torch
operation and has no second thread: what is forked from a process with threads may hang on a lock.
"""

import gc
import json
import logging
import mmap
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from ctypes import CDLL, c_ulong
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry, generate_latest

START = (
    "import sys; from icos_fl_warm_runtime import worker; "
    "worker.main(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
)
"""Imports this module by its name, so that tasks find the one that knows the kept folder."""

IDLE_SECONDS = 30.0
"""Without a task for so long, the worker ends: at rest a node pays for no warm imports."""

STOP_SECONDS = 3.0
"""Given to the tasks that still run when the SuperExec ends."""

ENTRY_POINTS = {"flwr-clientapp": "icos_fl.clientapp", "flwr-serverapp": "icos_fl.serverapp"}
"""Group of entry points that name the modules to import beforehand, by Flower's command."""

_PR_SET_PDEATHSIG = 1

TASK_REGISTRY = CollectorRegistry()
"""For a task's own metrics: they are added up over tasks, and served by its SuperExec. Gauges need
labels: the newest task that has set one counts."""

_kept: Path | None = None


def kept_folder() -> Path | None:
    """A private folder that outlives the task, for what the next one of this node can use again.

    None where tasks are not forked from a warm worker. Tasks of one node run one after the other.
    """
    return _kept


def told_by(task_id: int, kept: Path) -> Path:
    """Where a task leaves what it counted, in Prometheus' text format."""
    return kept / f"{task_id}.prom"


@dataclass
class _Task:
    task_id: int
    pid: int
    said_goodbye: mmap.mmap
    """One byte, shared: not 0 if the task ended by Flower's own exit, which has told its host."""


def main(socket_fd: int, command: str, kept: str) -> None:
    """Serve until the other end of the socket is closed, or for IDLE_SECONDS without a task."""
    global _kept
    _kept = Path(kept)
    with socket.socket(fileno=socket_fd) as connection:
        if refusal := _preload(command):
            _tell(connection, {"refused": refusal})
            return
        gc.collect()
        gc.freeze()  # collecting in a task would touch, and so copy, every page
        _Server(connection, command).run()


def _preload(command: str) -> str:
    """Import what *command* and the installed packages name for it; a reason to refuse, or none."""
    from icos_fl_warm_runtime.flower.logs import tell_in_json
    from icos_fl_warm_runtime.flower.names import NAMES, changed
    from icos_fl_warm_runtime.flower.tasks import warm_tasks

    if found := changed(NAMES[command]):
        return f"Flower has changed: {', '.join(found)}"
    warm_tasks(command)
    for point in entry_points(group=ENTRY_POINTS[command]):
        try:
            import_module(point.value)
        except Exception as error:
            return f"{point.value} cannot be imported: {error}"
    logging.getLogger().handlers.clear()  # which some libraries take at import
    tell_in_json()
    threads = len(list(Path("/proc/self/task").iterdir()))
    return f"{threads} threads run after the imports" if threads != 1 else ""


class _Server:
    def __init__(self, connection: socket.socket, command: str) -> None:
        self._connection = connection
        self._command = command
        self._selector = selectors.DefaultSelector()
        self._tasks: dict[int, _Task] = {}
        self._lines = b""

    def run(self) -> None:
        self._selector.register(self._connection, selectors.EVENT_READ)
        while True:
            ready = self._selector.select(None if self._tasks else IDLE_SECONDS)
            if not ready:
                return
            for key, _ in ready:
                if key.fileobj is self._connection:
                    if not self._receive():
                        self._stop()
                        return
                else:
                    self._reap(key.fd)

    def _receive(self) -> bool:
        data = self._connection.recv(1 << 16)
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            self._fork(json.loads(line))
        return bool(data)

    def _fork(self, order: dict[str, Any]) -> None:
        goodbye = mmap.mmap(-1, 1)
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._connection.close()
            self._selector.close()
            _run(self._command, order, worker, goodbye)
        self._selector.register(pidfd := os.pidfd_open(pid), selectors.EVENT_READ)
        self._tasks[pidfd] = _Task(order["task_id"], pid, goodbye)
        _tell(self._connection, {"taken": order["task_id"]})

    def _reap(self, pidfd: int) -> None:
        task = self._tasks.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(task.pid, 0)
        exit_status = os.waitstatus_to_exitcode(status)
        how = "" if task.said_goodbye[0] else ending(exit_status)
        outcome = "died" if how else "failed" if exit_status else "completed"
        task.said_goodbye.close()
        _tell(self._connection, {"ended": task.task_id, "how": how, "outcome": outcome})

    def _stop(self) -> None:
        """Tasks notice by themselves that the SuperExec is gone; whoever does not is killed."""
        for task in self._tasks.values():
            os.kill(task.pid, signal.SIGTERM)
        self._selector.unregister(self._connection)
        while self._tasks:
            ready = self._selector.select(STOP_SECONDS)
            if not ready:
                break
            for key, _ in ready:
                task = self._tasks.pop(key.fd)
                self._selector.unregister(key.fd)
                os.waitpid(task.pid, 0)
        for task in self._tasks.values():
            os.kill(task.pid, signal.SIGKILL)


def _run(command: str, order: dict[str, Any], worker: int, goodbye: mmap.mmap) -> NoReturn:
    """In the child: become the task, by Flower's own command, and end without cleaning up twice."""
    status = 1
    try:
        CDLL(None).prctl(_PR_SET_PDEATHSIG, c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != worker:
            os._exit(1)
        if order["quiet"]:
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
        sys.argv = [command, *order["arguments"]]
        from icos_fl_warm_runtime.flower.tasks import run_task

        run_task(command)
        status = 0
    except SystemExit as end:
        goodbye[0] = 1
        status = end.code if isinstance(end.code, int) else 1
        _leave(order["task_id"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _leave(task_id: int) -> None:
    """What the task counted, for its SuperExec to add up."""
    if _kept is not None and (counted := generate_latest(TASK_REGISTRY)):
        with suppress(OSError):  # a full disk is no reason to fail
            told_by(task_id, _kept).write_bytes(counted)


def ending(status: int) -> str:
    """How a process ended, in words; *status* as subprocess has it."""
    if status >= 0:
        return f"its process ended by itself, with exit status {status}"
    name = signal.Signals(-status).name
    if -status == signal.SIGALRM:
        return "its process ran for longer than its message was to live, and was ended"
    return f"its process was killed by {name}"


def _tell(connection: socket.socket, fact: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(fact).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        return  # the SuperExec is gone; the next read says so
