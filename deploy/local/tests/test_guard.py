import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

KEPT = """
    import os, pathlib, sys, time
    from icos_fl_local import guard

    folder = pathlib.Path(sys.argv[1])

    def work():
        (folder / "launcher").write_text(str(os.getpid()))
        print("on the terminal", flush=True)
        if sys.argv[2] == "fail":
            return 5
        if sys.argv[2] == "hang":
            time.sleep(600)
        guard.kept(folder / "launcher.log")
        print("in the log", flush=True)
        time.sleep(600)

    sys.exit(guard.run_guarded(work, keep=True))
"""


def command(folder: Path, behaviour: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(KEPT), str(folder), behaviour]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def end_launcher(tmp_path: Path) -> Iterator[None]:
    yield
    pid = int((tmp_path / "launcher").read_text())
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)


@pytest.mark.usefixtures("end_launcher")
def test_a_kept_launcher_goes_on_after_the_command_has_ended(tmp_path: Path) -> None:
    ended = subprocess.run(
        command(tmp_path, "keep"), capture_output=True, text=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "on the terminal\n")
    assert alive(int((tmp_path / "launcher").read_text()))
    deadline = time.monotonic() + 20
    while (tmp_path / "launcher.log").read_text() != "in the log\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("end_launcher")
def test_a_launcher_that_fails_before_it_is_kept_gives_its_status(tmp_path: Path) -> None:
    ended = subprocess.run(command(tmp_path, "fail"), timeout=20, check=False)
    assert ended.returncode == 5


@pytest.mark.usefixtures("end_launcher")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_command_is_the_end_of_what_is_not_kept_yet(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(command(tmp_path, "hang"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on the terminal\n"
    launcher = int((tmp_path / "launcher").read_text())
    process.send_signal(number)
    process.wait(timeout=20)
    wait_until_gone(launcher)
