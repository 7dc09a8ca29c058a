import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from icos_fl_local import state as state_module
from icos_fl_local.errors import LocalError, NothingRunning
from icos_fl_local.state import StateFolder

HOLDER = """
import pathlib, sys, time
from icos_fl_local.state import StateFolder
with StateFolder(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_deployment_in_a_folder_is_refused_naming_the_first(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LocalError, match=rf"runs there already \(pid {holder.pid}\)"):
            StateFolder(tmp_path).lock().__enter__()
        assert StateFolder(tmp_path).is_running()
    finally:
        holder.kill()
        holder.wait()
    assert not StateFolder(tmp_path).is_running()


def test_hints_name_a_folder_that_is_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NothingRunning, match=r"icos-fl up --keep --state-dir other'$"):
        StateFolder(Path("other")).read_running()
    with pytest.raises(NothingRunning, match=r"icos-fl up --keep'$"):
        StateFolder(Path(".icos-fl")).read_running()


@pytest.mark.parametrize(
    ("variable", "told"), [("UV_RUN_RECURSION_DEPTH", "uv run icos-fl up"), ("", "icos-fl up")]
)
def test_hints_are_called_as_the_command_was(tmp_path: Path, variable: str, told: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV")}
    ended = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", "status"],
        cwd=tmp_path,
        env=env | ({variable: "1"} if variable else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"start one with '{told} --keep'" in ended.stderr


def test_what_was_written_is_read(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.write({"pid": 7})
    assert state.read() == {"pid": 7}


def test_nothing_runs_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NothingRunning):
        StateFolder(tmp_path / "none").read_running()


def test_a_deployment_that_ended_by_itself_says_why(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.write({"state": "failed", "reason": "supernode-a died (killed by SIGKILL)"})
    with pytest.raises(NothingRunning, match="has ended: supernode-a died"):
        state.read_running()


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "deployment.json").write_text("{")
    with pytest.raises(LocalError, match=r"deployment\.json: cannot be read"):
        StateFolder(tmp_path).read()


def test_runs_are_numbered_on(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    with state.lock():
        assert state.new_run() == tmp_path / "runs" / "0001"
        (tmp_path / "runs" / "0009").mkdir()
        assert state.new_run() == tmp_path / "runs" / "0010"


def test_the_last_run_is_one_of_this_deployment(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    run = tmp_path / "runs" / "0001"
    run.mkdir(parents=True)
    (run / "history.json").write_text("{}")
    assert state.last_run(since_unix_s=0.0) == run
    assert state.last_run(since_unix_s=time.time() + 60) is None


def test_a_run_goes_on_from_the_newest_checkpoints_that_have_a_metric_of_it(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    for run, metric in (("0001", "cpu_usage"), ("0002", "orders"), ("0003", None)):
        folder = state.runs / run / "checkpoints"
        (folder / metric if metric else folder).mkdir(parents=True)
        os.utime(folder, (int(run), int(run)))
    found = {
        metric: state.last_checkpoints(1.0, [metric, "memory_usage"])
        for metric in ("cpu_usage", "orders", "power_consumption")
    }
    assert found == {
        "cpu_usage": state.runs / "0001/checkpoints",
        "orders": state.runs / "0002/checkpoints",
        "power_consumption": None,
    }
    assert state.last_checkpoints(1.5, ["cpu_usage"]) is None


def test_old_runs_are_deleted_but_for_what_the_next_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "RUNS_KEPT", 2)
    state = StateFolder(tmp_path)
    with state.lock():
        for number in (9, 998, 999, 1000, 1001):
            (state.runs / f"{number:04}").mkdir()
        (state.runs / "mine").mkdir()
        for run, metric in (("0009", "cpu"), ("0998", "cpu"), ("0998", "power"), ("0999", "cpu")):
            (state.runs / run / "checkpoints" / metric).mkdir(parents=True)
        with state.one_run_at_a_time("") as folder:
            pass
        assert folder == str(state.runs / "1002")
        left = sorted(path.name for path in state.runs.iterdir())
        assert left == ["0998", "0999", "1000", "1001", "mine"]


def test_two_runs_that_wait_for_a_third_have_folders_of_their_own(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    folders: list[str] = []

    def run() -> None:
        with state.one_run_at_a_time("") as folder:
            Path(folder).mkdir()
            folders.append(folder)

    with state.lock(), state.one_run_at_a_time("") as first:
        waiting = [threading.Thread(target=run) for _ in range(2)]
        for thread in waiting:
            thread.start()
        Path(first).mkdir()
    for thread in waiting:
        thread.join()
    assert sorted([first, *folders]) == [str(state.runs / f"000{n}") for n in (1, 2, 3)]
