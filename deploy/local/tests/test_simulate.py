"""``icos-fl simulate`` from the command line, on real Ray, and that it leaves nothing behind."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = ("-c", "time-step=8", "-c", "horizon=4", "-c", "local-epochs=1", "-c", "interval=2")


@dataclass
class CommandLine:
    """``icos-fl simulate`` in a folder of its own; its processes carry a mark."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "icos_fl_local", "simulate", "--traces", "traces", *arguments],
            cwd=self.folder,
            env=os.environ | {"SIMULATE_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.popen(*arguments)
        out, errors = process.communicate(timeout=200)
        return process.returncode, out, errors

    def processes(self) -> list[psutil.Process]:
        """Those that carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SIMULATE_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if _status(process) != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        """Kill what a failed test left."""
        for process in self.processes():
            process.kill()


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.Error:
        return psutil.STATUS_ZOMBIE


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _prepare(folder: Path) -> CommandLine:
    (folder / "traces").mkdir()
    for node, period in (("a", 7), ("b", 11)):
        rows = (
            f"{1_700_000_000 + 2 * n},{50 + 30 * math.sin(n / period):.3f}\n" for n in range(120)
        )
        (folder / "traces" / f"{node}.csv").write_text("time_unix_s,cpu_percent\n" + "".join(rows))
    return CommandLine(folder)


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    prepared = _prepare(tmp_path)
    yield prepared
    prepared.end()


Swept = tuple[CommandLine, dict[str, Any]]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """Three virtual nodes on two traces, two rounds, two learning rates."""
    prepared = _prepare(tmp_path_factory.mktemp("swept"))
    sweep = ("--nodes", "3", "--rounds", "2", "--sweep", "learning-rate=0.001,0.01", *SMALL)
    try:
        status, out, errors = prepared.run(*sweep, "--json")
        assert status == 0, errors
        yield prepared, json.loads(out)
    finally:
        prepared.end()


def test_a_sweep_gives_a_row_a_setting_best_first(swept: Swept) -> None:
    command_line, result = swept
    ratios = [row["ratio"]["mean"] for row in result["table"]]
    assert {row["setting"]["learning-rate"] for row in result["table"]} == {0.001, 0.01}
    assert ratios == sorted(ratios)
    with (command_line.folder / "icos-fl-simulation" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["ratio"]) for row in rows] == ratios


def test_every_virtual_node_takes_part_in_every_round(swept: Swept) -> None:
    _, result = swept
    assert result["nodes"] == 3
    for run in result["runs"]:
        history = json.loads((Path(run["folder"]) / "history.json").read_text())
        assert history["state"] == "finished"
        for entry in history["rounds"]:
            assert {name: facts["state"] for name, facts in entry["nodes"].items()} == {
                "a-1": "ok", "a-2": "ok", "b-1": "ok",
            }  # fmt: skip


def test_a_run_has_seconds_memory_and_the_error_of_the_last_value(swept: Swept) -> None:
    _, result = swept
    for run in result["runs"]:
        assert len(run["seconds"]) == len(run["losses"]) == 2
        assert run["peak_memory_mib"] > 200
        assert run["errors"]["cpu_usage"]["mae"] > 0
        assert run["errors"]["cpu_usage"]["last_value"] > 0


def test_nothing_is_left_running(swept: Swept) -> None:
    command_line, _ = swept
    assert [_name(process) for process in command_line.processes()] == []


def test_nothing_outlives_a_launcher_that_is_killed(command_line: CommandLine) -> None:
    guard = command_line.popen("--nodes", "2", "--rounds", "1000", *SMALL)
    deadline = time.monotonic() + 100
    while "raylet" not in map(_name, command_line.processes()):
        assert guard.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (launcher,) = psutil.Process(guard.pid).children()
    scratch = next(
        p.environ()["RAY_TMPDIR"] for p in command_line.processes() if _name(p) == "raylet"
    )

    launcher.send_signal(signal.SIGKILL)

    _, errors = guard.communicate(timeout=60)
    assert "raylet" in errors
    assert [_name(process) for process in command_line.processes()] == []
    assert guard.returncode == 128 + signal.SIGKILL
    assert not Path(scratch).exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-c", "hiden-layer-size=8"], "nearest: hidden-layer-size"),
        (["--sweep", "learning-rate=fast"], "--sweep learning-rate=fast: learning-rate takes a nu"),
        (["--sweep", "batch-size=8,0"], "batch-size=0: Input should be greater than or equal to 1"),
        (["--nodes", "0"], "--nodes 0: 1 to 5,000 are possible"),
        (["--nodes", "5001"], "--nodes 5001: 1 to 5,000 are possible"),
        (["--seeds", "0"], "--seeds 0: 1 to 100 are possible"),
        (
            ["--seeds", "11", "--sweep", f"horizon={','.join(map(str, range(1, 100)))}"],
            "1,089 runs",
        ),
        (["--metric", "gpu"], "no node has the metric 'gpu'; there are: cpu_usage"),
        (["--traces", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_simulate_refuses(command_line: CommandLine, arguments: list[str], line: str) -> None:
    status, out, errors = command_line.run(*arguments)
    assert (status, out, len(errors.splitlines())) == (2, "", 1)
    assert line in errors
    assert not (command_line.folder / ".icos-fl").exists()
