"""Starts the components as processes, notices when one dies, and stops them without a rest."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from icos_fl_service.shim import tied

from icos_fl_local import guard
from icos_fl_local.errors import Interrupted, LocalError

T = TypeVar("T")
_POLL_SECONDS = 0.1
LOG_BYTES_MAX = 16 * 2**20
_LOG_LINES = 10
_DELAY_SECONDS, _DELAY_SECONDS_MAX = 1.0, 60.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Component:
    """One process of the deployment."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Beside the supervisor's own."""
    port: int | None = None
    ready: Callable[[], bool] = lambda: True
    """Asked again and again, from when the process runs: may it be used? Must return at once."""
    after: tuple[str, ...] = ()
    """Components that must be ready before it starts; they stop after it."""
    stop_seconds: float = 20.0
    """How long it may take to end after SIGTERM; then it is killed."""


class ComponentDied(LocalError):
    """A component ended by itself."""


class TaskFailed(LocalError):
    """A command that should have worked did not."""


@dataclass(frozen=True)
class Ended:
    """What is known of a component that has ended by itself and is started again."""

    times: int
    how: str
    """The last time."""
    delay_seconds: float
    """From then until it is started again; doubled, up to a minute, if that was soon."""


@dataclass
class _Running:
    component: Component
    process: subprocess.Popen[bytes]
    log: Path
    is_ready: bool = False
    started: float = field(default_factory=time.monotonic)
    ended: Ended | None = None
    start_at: float | None = None
    """Of one that is down."""


@dataclass(frozen=True)
class Task:
    """A command under way."""

    name: str
    _process: subprocess.Popen[bytes]
    _out: Path
    _log: Path
    _check: Callable[[], None]

    @property
    def is_over(self) -> bool:
        """Has it ended?"""
        return _status(self._process) is not None

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(errors="replace")

    def wait(self) -> str:
        """What it printed, when it has ended. Raises as ``Supervisor.call``."""
        self.wait_for_end()
        if self._process.returncode != 0:
            with self._log.open("a") as stream:
                stream.write(self.printed)
            raise TaskFailed(
                f"{self.name} failed ({_ending(self._process.returncode)})" + _log_end(self._log)
            )
        return self.printed

    def wait_for_end(self) -> None:
        """However it ends. Raises ComponentDied as soon as a component dies."""
        while not self.is_over:
            self._check()
            time.sleep(_POLL_SECONDS)


class Supervisor:
    """Runs components and short commands (tasks) as children of this process.

    Not for more than one thread at a time. Use it as a context manager: leaving it stops all that
    this process has started meanwhile, and nothing that was there before.
    """

    def __init__(
        self,
        log_folder: Path,
        env: Mapping[str, str],
        changed: Callable[[str, str], None] = lambda _name, _state: None,
    ) -> None:
        """*changed* hears of a component's states: starting, up, ended, stopping, stopped."""
        self._log_folder = log_folder
        self._env = dict(env)
        self._changed = changed
        self.restarts = False
        """Is a component that ends started again? Else that is an error."""
        self._running: dict[str, _Running] = {}
        self._tasks: list[subprocess.Popen[bytes]] = []
        self._others = guard.descendants()
        guard.adopt_orphans()

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        except Interrupted:
            self.stop()
            raise

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the components that run, in the order in which they were started first."""
        return {
            name: running.process.pid
            for name, running in self._running.items()
            if running.start_at is None
        }

    @property
    def ended(self) -> dict[str, Ended]:
        """Those that have ended by themselves, whether or not they run again."""
        return {name: each.ended for name, each in self._running.items() if each.ended}

    def log_path(self, name: str) -> Path:
        """Where *name* logs."""
        return self._log_folder / f"{name}.log"

    def start(
        self,
        components: Iterable[Component],
        wait_for: Iterable[str] | None = None,
        timeout_seconds: float = 120.0,
    ) -> list[Component]:
        """Start *components*, each when those it comes after are ready, as parallel as that allows.

        Returns when those in *wait_for* (default: all) are ready, with the ones that could not
        start yet; give them to the next call. Raises ComponentDied, and LocalError at the timeout.
        """
        waiting = list(components)
        names = [component.name for component in waiting]
        wanted = set(names if wait_for is None else wait_for)
        deadline = time.monotonic() + timeout_seconds
        while True:
            self.check()
            for component in list(waiting):
                if all(self._is_ready(name) for name in component.after):
                    waiting.remove(component)
                    self._start(component)
            missing = sorted(name for name in wanted if not self._is_ready(name))
            if not missing and (wait_for is not None or not waiting):
                return waiting
            if time.monotonic() > deadline:
                raise self._not_ready(missing, timeout_seconds)
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise ComponentDied if a component has ended; with ``restarts`` start it again.

        Call it again and again: a component that ends soon after its start waits for the next. A
        log of over LOG_BYTES_MAX is moved to NAME.log.1, in place of the one that was there.
        """
        if self._running:  # else they are another one's
            self._rotate_logs()
        for name, running in self._running.items():
            status = _status(running.process)
            if status is None:
                if running.ended:
                    self._is_ready(name)  # tells that it is up again
            elif not self.restarts:
                raise ComponentDied(f"{name} died ({_ending(status)})" + _log_end(running.log))
            elif running.start_at is None:
                self._note_end(running, _ending(status))
            elif time.monotonic() >= running.start_at:
                running.started = time.monotonic()
                try:
                    self._start(running.component, running.ended)
                except OSError as error:  # such as: the disk is full
                    self._note_end(running, str(error))

    def call(
        self, name: str, command: tuple[str, ...], env: Mapping[str, str] | None = None
    ) -> str:
        """Run *command* to its end and return what it printed; its errors go to the log of *name*.

        Raises TaskFailed if its exit status is not 0, ComponentDied as soon as a component dies.
        """
        with self.meanwhile(name, command, env) as task:
            return task.wait()

    @contextlib.contextmanager
    def meanwhile(
        self, name: str, command: tuple[str, ...], env: Mapping[str, str] | None = None
    ) -> Iterator["Task"]:
        """Run *command*, at most while the block lasts; its errors go to the log of *name*."""
        log = self.log_path(name)
        # Its own, as `up` may have a task of this name under way beside `train`.
        with (
            tempfile.NamedTemporaryFile(dir=log.parent, prefix=f"{name}.", suffix=".out") as out,
            log.open("ab") as errors,
        ):
            process = self._popen(command, env or {}, out.file, errors)
            self._tasks.append(process)
            try:
                yield Task(name, process, Path(out.name), log, self.check)
            finally:
                if _status(process) is None:
                    process.terminate()
                    _wait(process)
                self._tasks.remove(process)

    def during(self, work: Callable[[], T]) -> T:
        """Call *work* in a thread, and watch the components meanwhile; return what it returns."""
        outcome: list[T] = []
        problem: list[Exception] = []

        def run() -> None:
            try:
                outcome.append(work())
            except Exception as error:
                problem.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            self.check()
            thread.join(_POLL_SECONDS)
        if problem:
            self.check()  # a component's death explains the failure better than the failure does
            raise problem[0]
        return outcome[0]

    def stop(self) -> list[str]:
        """Stop everything; return the names of processes that had to be found and killed."""
        for task in self._tasks:
            _send(task, signal.SIGTERM)
        left = [each for each in self._running.values() if _status(each.process) is None]
        stopping: dict[str, float] = {}
        while left:
            for running in left:
                name = running.component.name
                users = {other.component.name for other in left if name in other.component.after}
                if not users and name not in stopping:
                    self._changed(name, "stopping")
                    _send(running.process, signal.SIGTERM)
                    stopping[name] = time.monotonic() + running.component.stop_seconds
                if time.monotonic() > stopping.get(name, float("inf")):
                    running.process.kill()
            time.sleep(_POLL_SECONDS / 2)
            for running in [each for each in left if _status(each.process) is not None]:
                left.remove(running)
                self._changed(running.component.name, "stopped")
        for task in self._tasks:
            if _status(task) is None:
                task.kill()
                _wait(task)
        self._running.clear()
        self._tasks.clear()
        return guard.end_descendants(grace_seconds=2.0, spare=self._others)

    def _start(self, component: Component, ended: Ended | None = None) -> None:
        log = self.log_path(component.name)
        if not ended:
            log.unlink(missing_ok=True)
        with log.open("ab") as stream:
            process = self._popen(component.command, component.env, stream, stream)
        self._running[component.name] = _Running(component, process, log, ended=ended)
        self._changed(component.name, "starting")

    def _rotate_logs(self) -> None:
        for log in self._log_folder.glob("*.log"):
            with contextlib.suppress(OSError):
                if log.stat().st_size > LOG_BYTES_MAX:
                    shutil.copyfile(log, log.with_suffix(".log.1"))
                    os.truncate(log, 0)  # who writes it goes on at its end

    def _note_end(self, running: _Running, how: str) -> None:
        now, before = time.monotonic(), running.ended
        delay_seconds = _DELAY_SECONDS
        if before and now - running.started < _DELAY_SECONDS_MAX:
            delay_seconds = min(2 * before.delay_seconds, _DELAY_SECONDS_MAX)
        running.ended = Ended(before.times + 1 if before else 1, how, delay_seconds)
        running.start_at = now + delay_seconds
        self._changed(running.component.name, "ended")

    def _popen(
        self,
        command: tuple[str, ...],
        env: Mapping[str, str],
        out: IO[bytes],
        errors: IO[bytes],
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            tied(*command),
            env=self._env | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,  # Ctrl-C on the terminal is for the launcher alone
        )

    def _is_ready(self, name: str) -> bool:
        running = self._running.get(name)
        if running is None:
            return False
        if not running.is_ready and running.component.ready():
            running.is_ready = True
            self._changed(name, "up")
        return running.is_ready

    def _not_ready(self, missing: list[str], timeout_seconds: float) -> LocalError:
        first = next((name for name in missing if name in self._running), missing[0])
        return LocalError(
            f"not ready within {timeout_seconds:g} s: {', '.join(missing)}; {first}"
            + _log_end(self.log_path(first))
        )


def log_tail(log: Path, lines: int) -> list[str]:
    """The last *lines* of a file without colours, reading no more than its last 64 KiB."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        text = stream.read().decode(errors="replace")
    return _COLOUR.sub("", text).splitlines()[-lines:]


def _log_end(log: Path) -> str:
    lines = log_tail(log, _LOG_LINES) if log.exists() else []
    text = "".join(f"\n  | {line}" for line in lines) if lines else "\n  | (it logged nothing)"
    return f"; its last lines:{text}\nlog: {log}"


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}"


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """``poll``, also after an interrupt in an earlier one.

    That leaves Popen's lock taken, and it would then say for ever that the process has not ended.
    """
    if process.poll() is None:
        try:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:
            process.returncode = 0  # as Popen says it where somebody else was told
        else:
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


def _wait(process: subprocess.Popen[bytes]) -> None:
    while _status(process) is None:
        time.sleep(_POLL_SECONDS / 2)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if _status(process) is None:
        process.send_signal(number)
