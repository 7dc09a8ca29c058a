"""Bad input ends the command with one clear line, before anything starts."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from icos_fl_local import run_config, up
from icos_fl_local.errors import UsageError
from icos_fl_local.traces import Trace

TRACE = "time_unix_s,power_w,cpu_percent\n" + "".join(
    f"{1_700_000_000 + 2 * n},{100 + n % 7},{n % 100}\n" for n in range(600)
)


def icos_fl(*arguments: str, cwd: Path) -> tuple[int, list[str]]:
    ended = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == ""
    return ended.returncode, ended.stderr.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "a.csv").write_text(TRACE)
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-c", "hiden-layer-size=8"], "nearest: hidden-layer-size"),
        (
            ["--metric", "gpu"],
            "no node has the metric 'gpu'; there are: cpu_usage, power_consumption",
        ),
        (["--nodes", "2"], "has 1 trace, 2 nodes were asked for"),
        (["--nodes", "0"], "--nodes 0: at least 1 is needed"),
        (["--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["--rounds", "2", "-c", "num-server-rounds=2"], "are the same: give one of them"),
        (["--port", "bridge=http"], "--port bridge=http: not of the form NAME=PORT"),
        (["--port", "bridge=0"], "with a port from 1 to 65535"),
        (["--port", "bric=4317"], "--port bric=…: no such component; there are: valkey, metadata"),
        (["--source", "host"], "--traces is for --source replay"),
        (["-c", "train-test-split=3"], "train-test-split=3.0: Input should be less than or equal"),
        (["-c", "strategy=Magic"], "strategy='Magic': no such strategy; there are FedAvg, FedProx"),
        (["-c", "resume=nowhere"], "resume=nowhere: no such folder"),
    ],
)
def test_up_refuses(folder: Path, arguments: list[str], line: str) -> None:
    status, lines = icos_fl("up", "--traces", "traces", *arguments, cwd=folder)
    assert (status, len(lines)) == (2, 1)
    assert line in lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a: [", "not YAML: "),
        ("- a", "a mapping is needed, such as more_columns: …"),
        ("window_rows: 9", "window_rows is what --source replay sets itself"),
    ],
)
def test_up_refuses_a_configuration_of_the_bridge(
    folder: Path, text: str | None, said: str
) -> None:
    if text is not None:
        (folder / "own.yaml").write_text(text)
    options = ("--traces", "traces", "--bridge-config", "own.yaml")
    status, lines = icos_fl("up", *options, cwd=folder)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"icos-fl: --bridge-config own.yaml: {said}")


def test_up_refuses_a_taken_port_in_the_words_of_doctor(folder: Path, taken_port: int) -> None:
    port = f"bridge={taken_port}"
    status, lines = icos_fl("up", "--traces", "traces", "--port", port, cwd=folder)
    ended = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", "doctor", "--port", port],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (status, ended.returncode) == (1, 1)
    assert lines == [f"icos-fl: {ended.stdout.splitlines()[1]}"]


def test_up_names_file_line_and_column_of_a_trace(folder: Path) -> None:
    (folder / "traces" / "b.csv").write_text("time_unix_s,power_w\n1700000000,12\n1700000002,x\n")
    status, lines = icos_fl("up", "--traces", "traces", cwd=folder)
    assert (status, len(lines)) == (2, 1)
    assert "traces/b.csv:3: column power_w: 'x' is not a number" in lines[0]


def test_up_refuses_traces_that_are_all_too_short_and_says_by_how_much(folder: Path) -> None:
    lines = TRACE.splitlines()
    (folder / "traces" / "a.csv").write_text("\n".join(lines[:31]))
    status, lines = icos_fl("up", "--traces", "traces", "--metric", "cpu_usage", cwd=folder)
    assert status == 2
    assert lines == [
        "icos-fl: no trace has the steps to learn cpu_usage: at most 5 of 15 s in a; 75 are needed "
        "(lookback 40 + horizon 20, in the 80 % to train on)"
    ]


def test_steps_of_rows_that_come_early_and_late_are_not_counted_too_low() -> None:
    """A row is a step, on whichever side of its moment it comes."""
    times_s = 1_700_000_000 + 15 * np.arange(80) + np.resize([0, -3, 3], 80)
    trace, short = (
        Trace("a", ("cpu_percent",), ("%",), times_s[:rows], np.ones((rows, 1)))
        for rows in (80, 74)
    )
    config = run_config.complete({}, ["cpu_usage"], 1, 15.0, "")
    up._ensure_long_enough([short, trace], ["cpu_usage"], config)
    with pytest.raises(UsageError, match="at most 74 of 15 s in a; 75 are needed"):
        up._ensure_long_enough([short], ["cpu_usage"], config)


@pytest.mark.parametrize("command", [("up", "--kep"), ("node", "invite", "a", "--huors=1")])
def test_a_misspelt_option_is_told_with_the_one_that_was_meant(
    folder: Path, command: tuple[str, ...]
) -> None:
    status, lines = icos_fl(*command, cwd=folder)
    assert status == 2
    assert lines[0].startswith(f"usage: icos-fl {command[0]}")
    assert re.search("; nearest: --(keep|hours)", lines[-1])


def test_up_refuses_a_model_that_cannot_be_imported(folder: Path) -> None:
    arguments = ("up", "--traces", "traces", "-c", "model=nosuch:build")
    status, lines = icos_fl(*arguments, cwd=folder)
    assert status == 2
    assert lines == [
        "icos-fl: model 'nosuch:build': cannot import nosuch: No module named 'nosuch'"
    ]


def test_up_refuses_a_folder_that_is_not_there(folder: Path) -> None:
    status, lines = icos_fl("up", "--traces", "nowhere", cwd=folder)
    assert (status, lines) == (2, ["icos-fl: nowhere is not a folder"])


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["watch"], ["window", "a"], ["train"], ["forecast"], ["down"]],
    ids=lambda arguments: arguments[0],
)
def test_nothing_running_is_said_with_status_three(folder: Path, arguments: list[str]) -> None:
    status, lines = icos_fl(*arguments, cwd=folder)
    assert status == 3
    assert len(lines) == 1
    assert lines[0].startswith(f"icos-fl: {folder / '.icos-fl'}: no deployment runs there; start")
