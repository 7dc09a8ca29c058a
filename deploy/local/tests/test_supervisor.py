"""Components are real Python processes here: the kernel's part in ending them is what is tested."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from icos_fl_local import supervisor as supervisor_module
from icos_fl_local.errors import Interrupted, LocalError
from icos_fl_local.supervisor import (
    Component,
    ComponentDied,
    Ended,
    Supervisor,
    TaskFailed,
    log_tail,
)

PATIENCE_SECONDS = 20.0
SLEEPER = "import time; time.sleep(600)"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


def until(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fact():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def read_pid(path: Path) -> int:
    until(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path, os.environ) as supervisor:
        yield supervisor


def test_a_component_starts_when_those_before_it_are_ready(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    first = Component(
        "first",
        python(f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); {SLEEPER}"),
        ready=flag.exists,
    )
    second = Component(
        "second",
        python(f"import pathlib; assert pathlib.Path({str(flag)!r}).exists(); {SLEEPER}"),
        after=("first",),
    )
    assert supervisor.start([second, first]) == []
    assert list(supervisor.pids) == ["first", "second"]


def test_components_that_wait_for_others_can_be_left_for_later(supervisor: Supervisor) -> None:
    slow = Component("slow", python(SLEEPER), ready=lambda: False)
    quick = Component("quick", python(SLEEPER))
    last = Component("last", python(SLEEPER), after=("slow",))
    assert supervisor.start([slow, quick, last], wait_for=["quick"]) == [last]


def test_a_component_that_is_never_ready_is_named_with_its_log(supervisor: Supervisor) -> None:
    mute = Component("mute", python(f"print('so far so good', flush=True); {SLEEPER}"), ready=bool)
    with pytest.raises(LocalError, match=r"not ready within 1 s: mute; mute; its last lines:"):
        supervisor.start([mute], timeout_seconds=1)


def test_a_death_names_component_status_last_lines_and_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    code = "print('\\n'.join(f'line {n}' for n in range(1, 31))); raise SystemExit(7)"
    with pytest.raises(ComponentDied) as caught:
        supervisor.start([Component("bridge", python(code), ready=lambda: False)])
    lines = "".join(f"\n  | line {n}" for n in range(21, 31))
    assert str(caught.value) == (
        f"bridge died (exit status 7); its last lines:{lines}\nlog: {tmp_path / 'bridge.log'}"
    )


def test_a_killed_component_is_said_to_be_killed(supervisor: Supervisor) -> None:
    supervisor.start([Component("backend", python(SLEEPER))])
    os.kill(supervisor.pids["backend"], signal.SIGKILL)
    with pytest.raises(ComponentDied, match=r"^backend died \(killed by SIGKILL\)"):
        supervisor.during(lambda: time.sleep(PATIENCE_SECONDS))


def test_a_component_that_ends_is_started_again_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_DELAY_SECONDS", 0.1)
    told: list[tuple[str, str]] = []
    with Supervisor(tmp_path, os.environ, lambda *change: told.append(change)) as supervisor:
        supervisor.start([Component("page", python(SLEEPER)), Component("store", python(SLEEPER))])
        supervisor.restarts = True
        before = supervisor.pids
        os.kill(before["page"], signal.SIGKILL)
        until(lambda: not alive(before["page"]))
        told.clear()
        supervisor.check()
        assert (told, list(supervisor.pids)) == ([("page", "ended")], ["store"])
        until(lambda: (supervisor.check(), ("page", "up") in told)[1])
        assert told == [("page", "ended"), ("page", "starting"), ("page", "up")]
        assert supervisor.ended == {"page": Ended(1, "killed by SIGKILL", 0.1)}
        assert supervisor.pids["store"] == before["store"]
        assert supervisor.pids["page"] != before["page"]


def test_a_component_that_ends_again_and_again_waits_longer_and_keeps_its_log(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_DELAY_SECONDS", 0.05)
    supervisor.restarts = True
    supervisor.start([Component("broken", python("print('hello'); raise SystemExit(3)"))])
    delays = set()

    def has_ended_thrice() -> bool:
        supervisor.check()
        delays.update(ended.delay_seconds for ended in supervisor.ended.values())
        return "broken" in supervisor.ended and supervisor.ended["broken"].times == 3

    until(has_ended_thrice)
    assert delays == {0.05, 0.1, 0.2}
    assert supervisor.ended["broken"].how == "exit status 3"
    assert (tmp_path / "broken.log").read_text() == 3 * "hello\n"


def test_a_component_that_cannot_be_started_again_is_tried_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_DELAY_SECONDS", 0.05)
    logs, away = tmp_path / "logs", tmp_path / "away"
    logs.mkdir()
    with Supervisor(logs, os.environ) as supervisor:
        supervisor.start([Component("page", python(SLEEPER))])
        supervisor.restarts = True
        logs.rename(away)  # its log cannot be opened
        os.kill(supervisor.pids["page"], signal.SIGKILL)
        until(lambda: (supervisor.check(), "page" in supervisor.ended)[1])
        until(lambda: (supervisor.check(), supervisor.ended["page"].times > 2)[1])
        assert supervisor.pids == {}
        assert supervisor.ended["page"].how == (
            f"[Errno 2] No such file or directory: '{logs / 'page.log'}'"
        )
        assert supervisor.ended["page"].delay_seconds > 0.05
        away.rename(logs)
        until(lambda: (supervisor.check(), "page" in supervisor.pids)[1])
        assert alive(supervisor.pids["page"])


def test_a_long_log_is_moved_away_and_what_comes_next_is_at_its_beginning(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, log, moved = tmp_path / "flag", tmp_path / "page.log", tmp_path / "page.log.1"
    log.write_text("of the deployment before\n")
    talk = (
        "import pathlib, time\nfor n in range(200): print(n, flush=True)\n"
        f"while not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.01)\n"
        "print(200, flush=True); time.sleep(600)"
    )
    supervisor.start([Component("page", python(talk))])
    until(lambda: log_tail(log, 1) == ["199"])
    monkeypatch.setattr(supervisor_module, "LOG_BYTES_MAX", 600)
    supervisor.check()
    flag.touch()
    until(lambda: log.read_text() == "200\n")
    assert moved.read_text().split() == [str(number) for number in range(200)]


def test_logs_has_what_was_moved_away_and_follows_what_comes(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "page.log"
    log.parent.mkdir()
    log.with_suffix(".log.1").write_text("first\n")
    log.write_text("second, a long line\n")
    command = (sys.executable, "-m", "icos_fl_local", "logs", "page", "-f")
    with subprocess.Popen(
        [*command, "--state-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as logs:
        assert logs.stdout is not None
        assert [logs.stdout.readline() for _ in range(2)] == ["first\n", "second, a long line\n"]
        os.truncate(log, 0)
        with log.open("a") as stream:
            stream.write("third\n")
        assert logs.stdout.readline() == "third\n"
        logs.terminate()


def test_a_task_gives_what_it_printed(supervisor: Supervisor) -> None:
    assert supervisor.call("task", python("print('{}')")) == "{}\n"


def test_tasks_of_one_name_do_not_print_into_each_other(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    """``up`` and ``train`` judge models at the same time."""
    other = Supervisor(tmp_path, os.environ)
    with supervisor.meanwhile("task", python("print('first')")) as task:
        assert other.call("task", python("print('second')")) == "second\n"
        assert task.wait() == "first\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["task.log"]


def test_a_failed_task_shows_its_last_lines(supervisor: Supervisor) -> None:
    with pytest.raises(TaskFailed, match=r"(?s)task failed \(exit status 1\).*too few rows"):
        supervisor.call("task", python("raise SystemExit('too few rows')"))


def test_work_in_a_thread_gives_its_result_or_its_error(supervisor: Supervisor) -> None:
    assert supervisor.during(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        supervisor.during(lambda: 1 // 0)


def test_components_stop_before_those_that_they_need(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    with Supervisor(tmp_path, os.environ, lambda *change: told.append(change)) as supervisor:
        store = Component("store", python(SLEEPER))
        supervisor.start([store, Component("bridge", python(SLEEPER), after=("store",))])
    assert [name for name, state in told if state == "stopped"] == ["bridge", "store"]


def test_a_component_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    deaf = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(flag)!r}).touch()
        time.sleep(600)
    """
    supervisor = Supervisor(tmp_path, os.environ)
    supervisor.start([Component("deaf", python(deaf), ready=flag.exists, stop_seconds=0.3)])
    pid = supervisor.pids["deaf"]
    supervisor.stop()
    assert not alive(pid)


GRANDPARENT = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             start_new_session=True)
    with open({pid_file!r}, "w") as stream:
        stream.write(str(child.pid))
    {then}
"""


def test_what_a_component_leaves_behind_is_found_and_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    supervisor = Supervisor(tmp_path, os.environ)
    code = GRANDPARENT.format(pid_file=str(pid_file), then="time.sleep(600)")
    supervisor.start([Component("supernode", python(code))])
    orphan = read_pid(pid_file)
    left = supervisor.stop()
    assert (len(left), alive(orphan)) == (1, False)


LAUNCHER = """
    import argparse, os, pathlib, sys, time
    from icos_fl_local import guard
    from icos_fl_local.__main__ import _finish
    from icos_fl_local.supervisor import Component, Supervisor

    folder = pathlib.Path(sys.argv[1])
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    parent = [sys.executable, "-c", '''{grandparent}''']

    def work(_):
        with Supervisor(folder, os.environ) as supervisor:
            supervisor.start([Component("plain", tuple(child)), Component("parent", tuple(parent))])
            (folder / "launcher").write_text(str(os.getpid()))
            while True:
                supervisor.check()
                time.sleep(0.05)

    sys.exit(guard.run_guarded(lambda: _finish(work, argparse.Namespace(command='up'))))
"""


class Launched:
    """A launcher with two components and a grandchild, run as the command does it."""

    def __init__(self, folder: Path) -> None:
        grandparent = textwrap.dedent(
            GRANDPARENT.format(pid_file=str(folder / "pid"), then="time.sleep(600)")
        )
        code = textwrap.dedent(LAUNCHER).replace("{grandparent}", grandparent)
        self.guard = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True
        )
        self.launcher = read_pid(folder / "launcher")
        read_pid(folder / "pid")
        processes = psutil.Process(self.guard.pid).children(recursive=True)
        self.pids = [process.pid for process in processes]
        assert len(self.pids) == 4  # launcher, two components, one grandchild

    def rest(self) -> list[int]:
        return [pid for pid in self.pids if alive(pid)]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    for pid in [launched.guard.pid, *launched.rest()]:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    launched.guard.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_launcher_leaves_nothing(
    launched: Launched, number: signal.Signals, status: int
) -> None:
    launched.guard.send_signal(number)
    _, errors = launched.guard.communicate(timeout=PATIENCE_SECONDS)
    assert (launched.guard.returncode, launched.rest()) == (status, [])
    assert errors == f"interrupted ({number.name}); everything is stopped\n"


class InterruptedLock:
    """What Popen takes while it asks for a process; a signal comes as soon as it is taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:
        if not self._lock.acquire(blocking):
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    def release(self) -> None:
        self._lock.release()


def test_an_interrupt_while_it_looks_at_a_process_does_not_keep_it_from_stopping(
    tmp_path: Path,
) -> None:
    def interrupt(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        supervisor = Supervisor(tmp_path, os.environ)
        supervisor.start([Component("one", python(SLEEPER), stop_seconds=1.0)])
        supervisor._running["one"].process._waitpid_lock = InterruptedLock()  # type: ignore[attr-defined]
        with pytest.raises(Interrupted):
            supervisor.check()
        stopping = threading.Thread(target=supervisor.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE_SECONDS)
        assert not stopping.is_alive()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_launcher_killed_with_sigkill_leaves_nothing(launched: Launched) -> None:
    os.kill(launched.launcher, signal.SIGKILL)
    launched.guard.communicate(timeout=PATIENCE_SECONDS)
    assert (launched.guard.returncode, launched.rest()) == (128 + signal.SIGKILL, [])


def test_a_guard_killed_with_sigkill_leaves_nothing(launched: Launched) -> None:
    launched.guard.kill()
    until(lambda: launched.rest() == [])


def test_what_was_there_before_it_lives_on(tmp_path: Path) -> None:
    child = tmp_path / "child"
    starts_another = f"""
        import pathlib, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}])
        pathlib.Path({str(child)!r}).write_text(str(child.pid))
        child.wait()
    """
    with subprocess.Popen(python(starts_another)) as before:
        try:
            others = read_pid(child)
            with Supervisor(tmp_path, os.environ) as supervisor:
                supervisor.start([Component("one", python(SLEEPER))])
                (started,) = supervisor.pids.values()
            assert (alive(before.pid), alive(others), alive(started)) == (True, True, False)
        finally:
            before.kill()
            psutil.Process(others).kill()
