"""The whole pipeline by its one command, with every real part: dataClay, Flower, torch, gRPC."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from icos_fl_local import replay, run, traces
from icos_fl_local.deployment import Deployment
from icos_fl_local.run import read_history
from icos_fl_local.state import StateFolder
from icos_fl_local.supervisor import Supervisor

UP_SECONDS = 200.0
STOP_SECONDS = 60.0
FORECASTER_SECONDS = 120.0
BACK_SECONDS = 90.0
# Small, so that the whole stays under five minutes on two cores.
SMALL = ("-c", "time-step=20", "-c", "horizon=5", "-c", "local-epochs=1", "-c", "batch-size=256")


@dataclass
class CommandLine:
    """``icos-fl`` in a folder of its own; its processes carry a mark in their environment."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "icos_fl_local", *arguments],
            cwd=self.folder,
            env=os.environ | {"E2E_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "--json" not in arguments else subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout_seconds: float = 60.0) -> tuple[int, str]:
        process = self.popen(*arguments)
        out, errors = process.communicate(timeout=timeout_seconds)
        if errors:
            print(errors)
        return process.returncode, out

    def left(self) -> list[str]:
        """Command lines of processes of this deployment that are there now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("E2E_MARK") == self.mark and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        """Kill what a failed test left."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("E2E_MARK") == self.mark:
                    process.kill()
            except psutil.Error:
                continue


@pytest.fixture
def icos_fl(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path)
    yield command_line
    command_line.end()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CommandLine, dict[str, Any]]]:
    """A deployment of two nodes that was left running after one round, and its result."""
    command_line = CommandLine(tmp_path_factory.mktemp("kept"))
    try:
        status, out = command_line.run(
            *("up", "--keep", "--json", "--nodes", "2", "--rounds", "1", *SMALL),
            timeout_seconds=UP_SECONDS,
        )
        assert status == 0
        yield command_line, json.loads(out)
    finally:
        command_line.run("down", timeout_seconds=STOP_SECONDS)
        left = command_line.left()
        command_line.end()
        assert left == []


Kept = tuple[CommandLine, dict[str, Any]]


def test_up_ends_with_a_report_and_an_error_for_each_node_and_metric(kept: Kept) -> None:
    command_line, result = kept
    judged = {(entry["node"], entry["metric"]) for entry in result["backtest"]["results"]}
    told = {(entry["node"], entry["metric"]) for entry in result["backtest"]["unavailable"]}
    assert judged | told == {(n, m) for n in result["nodes"] for m in result["metrics"]}
    assert len(result["nodes"]) == 2
    assert {node for node, _ in judged} == set(result["nodes"])
    assert result["history"]["state"] == "finished"
    report = command_line.folder / "icos-fl-report"
    assert (report / "index.html").stat().st_size > 1000
    assert [path for path in report.rglob("*.png") if path.stat().st_size > 1000]


def test_up_tells_what_nodes_say_beside_the_model_alone(kept: Kept) -> None:
    _, result = kept
    alone = {(entry["node"], entry["metric"]) for entry in result["backtest"]["results"]}
    said = {(entry["node"], entry["metric"]): entry for entry in result["combination"]["results"]}
    assert (set(said), result["combination"]["notes"]) == (alone, [])
    for entry in said.values():
        assert entry["origins"] > 100
        assert entry["lower_80"] <= entry["yhat"] <= entry["upper_80"]


def test_the_forecast_covers_the_next_five_minutes_or_what_was_asked_for(kept: Kept) -> None:
    _, result = kept
    for entry in result["forecast"]["forecasts"]:
        assert len(entry["yhat"]) == 5
        assert entry["time_unix_s"][0] > entry["last_time_unix_s"]


def test_the_window_equals_the_trace_value_by_value(kept: Kept) -> None:
    command_line, result = kept
    recorded = {trace.node: trace for trace in traces.load(traces.SHIPPED)}
    for node in result["nodes"]:
        status, out = command_line.run("window", node, "--csv")
        rows = list(csv.reader(io.StringIO(out)))
        trace = recorded[node]
        names = [traces.column_of(column) for column in trace.columns]
        assert status == 0
        # A column that only other nodes have is there, and empty.
        for name in set(rows[0][1:]) - set(names):
            assert {row[rows[0].index(name)] for row in rows[1:]} == {""}
        order = [rows[0].index(name) for name in names]
        window = [[float(row[0]), *(float(row[at]) for at in order)] for row in rows[1:]]
        assert window == [
            [float(time_s), *values]
            for time_s, values in zip(trace.times_s.tolist(), trace.values_tf.tolist(), strict=True)
        ]


def test_everything_listens_on_this_machine_alone(kept: Kept) -> None:
    command_line, _ = kept
    addresses = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("E2E_MARK") == command_line.mark:
                found = process.net_connections("inet")
                addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_status_says_that_every_component_is_up(kept: Kept) -> None:
    command_line, result = kept
    began = time.monotonic()
    status, out = command_line.run("status", "--json")
    print(f"status took {time.monotonic() - began:.2f} s")
    found = json.loads(out)
    assert status == 0, out
    assert {facts["health"] for facts in found["components"].values()} == {"healthy"}
    assert all(facts["up"] and facts["version"] for facts in found["components"].values())
    assert len(found["components"]) == 11
    assert set(found["rows"]) == set(result["nodes"])
    assert (found["run"]["state"], found["run"]["round"]) == ("finished", 1)


def test_status_of_parts_by_their_addresses_names_the_newest_run(kept: Kept) -> None:
    command_line, _ = kept
    description = json.loads((command_line.folder / ".icos-fl" / "deployment.json").read_text())
    ports = description["metrics_ports"]
    names = [name for name in ports if name != "run"]
    status, out = command_line.run("status", *(f"127.0.0.1:{ports[name]}" for name in names))
    assert status == 0, out
    assert "finished:completed" in out
    assert [line.split()[0] for line in out.splitlines() if " at " in line] == [
        "healthy" for _ in names
    ]


def test_a_second_deployment_in_the_same_folder_is_refused(kept: Kept) -> None:
    command_line, _ = kept
    pid = json.loads(command_line.run("status", "--json")[1])["pid"]
    status, out = command_line.run("up")
    assert (status, len(out.splitlines())) == (1, 1)
    assert f"runs there already (pid {pid})" in out


def until_it_answers(command_line: CommandLine, *command: str) -> dict[str, Any]:
    """What the forecaster says as soon as it has gone through the rows, which all come at once."""
    until = time.monotonic() + FORECASTER_SECONDS
    status = 1
    while status and time.monotonic() < until:
        status, out = command_line.run(*command, "--json")
        print(out)
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_node_forecasts_on_its_own(kept: Kept) -> None:
    command_line, result = kept
    node = result["nodes"][0]
    found = until_it_answers(command_line, "forecast", node)["forecasts"]
    assert {entry["node"] for entry in found} == {node}
    assert {entry["metric"] for entry in found} >= set(result["metrics"])
    for entry in found:
        ahead = [time_s - entry["last_time_unix_s"] for time_s in entry["time_unix_s"]]
        assert ahead == [60, 300, 3600]
        assert len(entry["yhat"]) == 3


def test_a_forecaster_is_judged_by_what_it_has_said(kept: Kept) -> None:
    command_line, result = kept
    found = until_it_answers(command_line, "backtest", "--node", result["nodes"][0])
    assert found["source"].startswith("forecaster at 127.0.0.1:")
    metrics = {entry["metric"] for entry in found["results"]}
    assert metrics & set(result["metrics"])
    for entry in found["results"]:
        assert {"combination", "last"} < {each["forecaster"] for each in entry["forecasters"]}


def test_with_nothing_to_judge_the_reason_is_the_answer(kept: Kept, tmp_path: Path) -> None:
    command_line, _ = kept
    state = StateFolder(command_line.folder / ".icos-fl")
    running = state.read_running()
    ports = {name: facts["port"] for name, facts in running["components"].items()}
    deployment = Deployment(state, tuple(running["nodes"]), ports)
    with Supervisor(tmp_path, deployment.env()) as supervisor:
        answer = run.judge(deployment, supervisor, "backtest", ["fan_speed"])
    assert answer["results"] == []
    assert {entry["metric"] for entry in answer["unavailable"]} == {"fan_speed"}


def test_logs_show_one_component(kept: Kept) -> None:
    command_line, _ = kept
    status, out = command_line.run("logs", "superlink")
    assert status == 0
    assert "SuperLink" in out
    status, out = command_line.run("logs", "superlnk")
    assert (status, len(out.splitlines())) == (2, 1)


def test_another_run_goes_on_from_the_checkpoints(kept: Kept) -> None:
    command_line, _ = kept
    status, out = command_line.run(
        *("train", "--json", "--rounds", "1", "--metric-is-no-option"), timeout_seconds=60
    )
    assert status == 2
    status, out = command_line.run("train", "--json", "--rounds", "1", timeout_seconds=UP_SECONDS)
    assert status == 0
    result = json.loads(out)
    assert result["run_config"]["resume"].endswith("runs/0001/checkpoints")
    assert result["history"]["state"] == "finished"
    # By the forecaster, which has gone through the rows by now.
    said = {(entry["node"], entry["metric"]) for entry in result["combination"]["results"]}
    assert said == {(entry["node"], entry["metric"]) for entry in result["backtest"]["results"]}
    assert [entry for entry in result["combination"]["results"] if entry["mae"] is None] == []


def test_a_quiesced_run_ends_with_its_round_and_the_next_one_does_the_rest(kept: Kept) -> None:
    command_line, _ = kept

    def train_until_a_round(*arguments: str) -> tuple["subprocess.Popen[str]", Path]:
        runs = command_line.folder / ".icos-fl/runs"
        before = set(runs.iterdir())
        process = command_line.popen("train", *arguments)
        deadline = time.monotonic() + UP_SECONDS
        while True:
            for folder in set(runs.iterdir()) - before:
                history = read_history(folder / "history.json")
                if history and len(history["rounds"]) > 1:
                    return process, folder
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def quiesce(process: "subprocess.Popen[str]") -> str:
        status, out = command_line.run("quiesce", timeout_seconds=UP_SECONDS)
        said, _ = process.communicate(timeout=STOP_SECONDS)
        assert (status, process.returncode) == (0, 4), out + said
        return out

    first = train_until_a_round("--rounds", "1000")
    out = quiesce(first[0])
    status, told = command_line.run("status", "--json")
    found = json.loads(told)
    done = found["run"]["round"]
    assert f"asked to; {1000 - done} of 1000 rounds are left" in out
    assert (status, found["run"]["state"], found["quiesced"]) == (0, "quiesced", True)
    second = train_until_a_round()
    quiesce(second[0])
    config = tomllib.loads((second[1] / "run-config.toml").read_text())
    assert config["num-server-rounds"] == 1000 - done
    assert config["resume"] == str(first[1] / "checkpoints")


def test_status_names_a_sensor_that_cannot_be_read_until_it_can(kept: Kept) -> None:
    command_line, result = kept
    running = json.loads((command_line.folder / ".icos-fl" / "deployment.json").read_text())
    bridge = f"127.0.0.1:{running['components']['bridge']['port']}"
    node = result["nodes"][0]
    (recorded,) = (trace for trace in traces.load(traces.SHIPPED) if trace.node == node)

    step = round(recorded.interval_seconds)

    def send(first: int, last: int, power: float) -> None:
        """Rows *first* to *last* after the recorded ones, with the same columns."""
        numbers = np.arange(first, last + 1)
        values = np.repeat(20.0 + numbers[:, None] % 7, len(recorded.columns), axis=1)
        values[:, recorded.columns.index("power_w")] = power + numbers % 7 * (power > 0)
        times = recorded.times_s[-1] + numbers * step
        trace = dataclasses.replace(recorded, times_s=times, values_tf=values)
        replay.send([trace], bridge, lambda *_: None)

    rows = 600 // step + 1
    send(1, rows, power=0.0)
    status, out = command_line.run("status", "--json")
    (wrong,) = json.loads(out)["conditions"][node]
    assert status == 12
    assert (wrong["condition"], wrong["column"]) == ("unavailable", "power_consumption")
    assert wrong["reason"].startswith("exactly 0 for 600 s")
    assert command_line.run("watch", node, "--once")[0] == 12
    # No model of it is trained there, and those of the other metrics are.
    status, out = command_line.run("train", "--json", "--rounds", "1", timeout_seconds=UP_SECONDS)
    asked = json.loads(out)
    learned = asked["history"]["nodes"][node]["metrics"]
    assert status == 0
    assert set(asked["metrics"]) - set(learned) == {"power_consumption"}
    send(rows + 1, rows + 2, power=21.0)
    assert command_line.run("status")[0] == 0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill(command_line: CommandLine, part: str) -> None:
    """Kill *part* of a deployment that goes on; come back when all is well again."""
    components = json.loads(command_line.run("status", "--json")[1])["components"]
    before = components[part]["pid"]
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + BACK_SECONDS
    status, out = command_line.run("status", "--json")
    assert status == 1, out
    while status or json.loads(out)["components"][part]["pid"] == before:
        assert time.monotonic() < deadline, out
        status, out = command_line.run("status", "--json")
    print(f"{part} is back after {BACK_SECONDS - deadline + time.monotonic():.1f} s")


def test_a_part_that_dies_is_started_again_and_told(kept: Kept) -> None:
    command_line, _ = kept
    kill(command_line, "forecaster")
    logs = command_line.folder / ".icos-fl" / "logs"
    (line,) = (
        line
        for line in (logs / "launcher.log").read_text().splitlines()
        if "forecaster died" in line
    )
    assert line.endswith(
        "forecaster died (killed by SIGKILL); it is started again in 1 s; "
        f"log: {logs / 'forecaster.log'}"
    )
    _, out = command_line.run("status")
    assert "died 1×, last killed by SIGKILL" in out


def test_a_status_that_cannot_be_written_ends_nothing_and_is_told(kept: Kept) -> None:
    command_line, _ = kept
    state = command_line.folder / ".icos-fl"

    def pid_noted() -> Any:
        description = json.loads((state / "deployment.json").read_text())
        return description["components"]["forecaster"]["pid"]

    blocked = state / "deployment.tmp"
    blocked.mkdir()
    try:
        noted = pid_noted()
        assert noted
        os.kill(noted, signal.SIGKILL)
        until(lambda: "status is out of date" in (state / "logs" / "launcher.log").read_text())
    finally:
        blocked.rmdir()

    until(lambda: pid_noted() not in (None, noted))
    assert psutil.pid_exists(pid_noted())


@pytest.mark.slow
def test_each_part_that_dies_comes_back_and_nodes_learn_on(kept: Kept) -> None:
    """``uv run pytest tests/e2e/test_up.py -m slow -s``, 5 minutes."""
    command_line, result = kept
    running = json.loads((command_line.folder / ".icos-fl" / "deployment.json").read_text())
    for part in running["components"]:
        kill(command_line, part)
    status, out = command_line.run("train", "--json", "--rounds", "1", timeout_seconds=UP_SECONDS)
    assert status == 0, out
    # Those that were killed are nodes too, until the SuperLink has missed their heartbeat.
    assert set(json.loads(out)["history"]["nodes"]) >= set(result["nodes"])


@pytest.mark.slow
def test_a_run_that_fails_while_it_is_kept_does_not_end_what_goes_on(icos_fl: CommandLine) -> None:
    steps = ("-c", "interval=1", "-c", "time-step=16", "-c", "horizon=4", "--metric", "cpu_usage")
    status, out = icos_fl.run(
        *("up", "--source", "host", "--keep", "--rounds", "3", *steps, *SMALL[4:]),
        timeout_seconds=UP_SECONDS,
    )
    assert status == 0, out
    runs = icos_fl.folder / ".icos-fl" / "runs"

    def until_a_run(state: str, since: int) -> int:
        """The number of the first run after *since* that is in *state*."""
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            for folder in sorted(runs.iterdir()):
                history = read_history(folder / "history.json")
                if int(folder.name) > since and history and history["state"] == state:
                    return int(folder.name)
            time.sleep(0.1)
        raise AssertionError(icos_fl.run("logs", "launcher")[1])

    under_way = until_a_run("running", 1)
    kill(icos_fl, "superlink")
    assert until_a_run("failed", under_way - 1) == under_way
    until_a_run("finished", under_way)
    assert icos_fl.run("status")[0] == 0
    assert icos_fl.run("down", timeout_seconds=STOP_SECONDS)[0] == 0
    assert icos_fl.left() == []


@pytest.mark.parametrize("stage", ["valkey: up", "window of"])
def test_ctrl_c_leaves_nothing(icos_fl: CommandLine, stage: str) -> None:
    process = icos_fl.popen("up", "--nodes", "2", *SMALL)
    assert process.stdout is not None
    assert any(line.startswith(stage) for line in process.stdout)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 130
    assert out.splitlines()[-1] == "interrupted (SIGINT); everything is stopped"
    assert icos_fl.left() == []


def test_this_machine_is_learned_again_and_again(icos_fl: CommandLine) -> None:
    steps = ("-c", "interval=1", "-c", "time-step=16", "-c", "horizon=4", "--rounds", "1")
    process = icos_fl.popen("up", "--source", "host", *steps, *SMALL[4:], "--metric", "cpu_usage")
    assert process.stdout is not None
    reports = (line for line in process.stdout if line.startswith("report:"))
    assert next(reports) == next(reports)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 130


def test_a_component_killed_in_a_round_ends_the_run_with_its_name_and_log(
    icos_fl: CommandLine,
) -> None:
    process = icos_fl.popen("up", "--nodes", "2", *SMALL)
    assert process.stdout is not None
    assert any(line.startswith("round 1 of 5") for line in process.stdout)
    description = json.loads((icos_fl.folder / ".icos-fl" / "deployment.json").read_text())
    os.kill(description["components"]["processor"]["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 1
    assert "icos-fl: processor died (killed by SIGKILL); its last lines:\n  | " in out
    assert f"log: {icos_fl.folder / '.icos-fl' / 'logs' / 'processor.log'}" in out
    assert "Traceback" not in out
    assert icos_fl.left() == []


def test_a_window_of_gaps_fails_with_the_rows_that_are_missing(
    icos_fl: CommandLine,
) -> None:
    folder = icos_fl.folder / "traces"
    folder.mkdir()
    times_s = (1_700_000_000 + 15 * n + 3600 * (n // 30) for n in range(100))
    rows = "".join(f"{time_s},{40 + n % 7}\n" for n, time_s in enumerate(times_s))
    (folder / "gaps.csv").write_text(f"time_unix_s,cpu_percent\n{rows}")
    status, out = icos_fl.run("up", "--traces", str(folder), timeout_seconds=UP_SECONDS)
    assert status == 1
    assert "Traceback" not in out
    assert "30" in out.splitlines()[-1]
    assert icos_fl.left() == []
