import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from icos_fl_local import doctor
from icos_fl_local.doctor import Check

STRANGER = 23456


def check_of(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_fit_machine_passes_every_check(tmp_path: Path) -> None:
    assert [check.line() for check in doctor.examine(tmp_path, {}) if not check.ok] == []


def test_a_taken_port_is_named_with_its_component(tmp_path: Path, taken_port: int) -> None:
    check = check_of(doctor.examine(tmp_path, {"bridge": taken_port}), "ports")
    assert (check.ok, check.found) == (
        False,
        f"cannot use 127.0.0.1: bridge={taken_port} (address already in use)",
    )


def test_one_port_for_two_components_is_refused(tmp_path: Path) -> None:
    check = check_of(doctor.examine(tmp_path, {"bridge": 21999, "processor": 21999}), "ports")
    assert (check.ok, "21999 (given twice)" in check.found) == (False, True)


def test_a_state_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check = check_of(doctor.examine(file, {}), "state folder")
    assert (check.ok, "not a directory" in check.found) == (False, True)


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    doctor.examine(tmp_path / "new", {})
    assert list(tmp_path.iterdir()) == []


def test_unreadable_counters_are_told_and_not_in_the_way(tmp_path: Path) -> None:
    assert doctor.rapl(tmp_path) == Check(
        "rapl", True, "this machine tells no power; --source host goes on without it"
    )


def test_readable_counters_are_counted(tmp_path: Path) -> None:
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text("1")
    assert doctor.rapl(tmp_path).found == "2 energy counters can be read"


# Becomes a uid that no user has, without HOME, once Python has read what that uid may not read.
AS_STRANGER = f"""
import os, sys
import icos_fl_local.up
from icos_fl_local.__main__ import main

os.environ.clear()
os.chdir("/")
os.setgroups([])
os.setgid({STRANGER})
os.setuid({STRANGER})
main()
"""


def as_stranger(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", AS_STRANGER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that any uid can reach."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/") and folder.stat().st_mode & 0o5 != 0o5:
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


@needs_root
def test_a_folder_of_another_user_is_one_line_with_folder_uid_and_cure(open_folder: Path) -> None:
    state = open_folder / "state"
    state.mkdir(mode=0o755)
    for command in (["doctor"], ["up"]):
        ended = as_stranger([*command, "--state-dir", str(state)])
        line = next(
            line for line in (ended.stdout + ended.stderr).splitlines() if "state folder" in line
        )
        assert ended.returncode == 1
        assert line.endswith(
            f"bad state folder: {state} cannot be written by uid {STRANGER}: {state} "
            f"(owner uid 0): permission denied; run 'sudo chown -R {STRANGER} {state}', "
            "or give another --state-dir"
        )
        assert "Traceback" not in ended.stderr


@needs_root
def test_no_home_and_a_uid_without_a_name_are_fit(open_folder: Path) -> None:
    state = open_folder / "state"
    state.mkdir()
    os.chown(state, STRANGER, STRANGER)
    ended = as_stranger(["doctor", "--json", "--state-dir", str(state)])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert all(check["ok"] for check in json.loads(ended.stdout))
