"""Which rows a virtual node has, which settings a sweep has, and what a run's history says."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.simulation import results
from icos_fl_local.simulation.command import make_plan
from icos_fl_local.simulation.parts import virtual_nodes
from icos_fl_local.simulation.processor import filled_store
from icos_fl_local.simulation.settings import combinations, each_value_once, parse_sweeps
from icos_fl_local.simulation.virtual_server import PacedGrid, reply_to
from icos_fl_local.traces import Trace
from icos_fl_local.up import Options


def trace(node: str, rows: int) -> Trace:
    times = 1_700_000_000 + 2 * np.arange(rows)
    values = np.arange(2.0 * rows).reshape(rows, 2)
    return Trace(node, ("power_w", "cpu_percent"), ("W", "%"), times, values)


def starts(nodes: list[Trace]) -> dict[str, int]:
    """The first row that each node has of its trace."""
    return {node.node: int(node.times_s[0] - 1_700_000_000) // 2 for node in nodes}


def test_as_many_nodes_as_traces_take_them_whole() -> None:
    traces = [trace("a", 10), trace("b", 8), trace("c", 6)]
    assert virtual_nodes(traces, 2) == traces[:2]


def test_more_nodes_than_traces_take_halves_at_even_distances() -> None:
    nodes = virtual_nodes([trace("a", 10), trace("b", 8)], 5)
    assert starts(nodes) == {"a-1": 0, "b-1": 0, "a-2": 2, "b-2": 4, "a-3": 5}
    assert [len(node.times_s) for node in nodes] == [5, 4, 5, 4, 5]


@given(rows=st.lists(st.integers(1, 60), min_size=1, max_size=4), nodes=st.integers(1, 40))
def test_every_node_has_a_name_and_where_the_trace_is_long_enough_rows_of_its_own(
    rows: list[int], nodes: int
) -> None:
    traces = [trace(f"t{number}", count) for number, count in enumerate(rows)]
    made = virtual_nodes(traces, nodes)
    assert len({node.node for node in made}) == len(made) == nodes
    for index, whole in enumerate(traces):
        sharing = made[index :: len(traces)]
        first_rows = [int(node.times_s[0]) for node in sharing]
        assert all(len(node.times_s) for node in sharing)
        if len(whole.times_s) // 2 >= len(sharing) - 1:
            assert len(set(first_rows)) == len(sharing)


def test_a_thousand_nodes_share_the_rows_of_their_trace() -> None:
    whole = trace("a", 2000)
    assert all(np.shares_memory(n.values_tf, whole.values_tf) for n in virtual_nodes([whole], 1000))


def test_a_window_has_the_names_units_and_values_of_the_trace() -> None:
    rows = filled_store([trace("a", 3)]).window("a").read()
    assert (rows.columns, rows.units) == (("power_consumption", "cpu_usage"), ("W", "%"))
    assert rows.times_ns_t.tolist() == [1_700_000_000_000_000_000 + 2 * 10**9 * n for n in range(3)]
    assert rows.values_tf.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_a_sweep_takes_each_value_with_each_of_the_others() -> None:
    swept = parse_sweeps(["learning-rate=1e-3,1", "num-layers=1,2"], {})
    assert combinations(swept) == [
        {"learning-rate": 0.001, "num-layers": 1},
        {"learning-rate": 0.001, "num-layers": 2},
        {"learning-rate": 1.0, "num-layers": 1},
        {"learning-rate": 1.0, "num-layers": 2},
    ]


def test_without_a_sweep_there_is_one_setting() -> None:
    assert combinations(parse_sweeps([], {})) == [{}]


def test_each_value_is_in_a_setting_that_is_checked() -> None:
    checked = each_value_once({"a": [1, 2, 3], "b": [4, 5]})
    assert checked == [{"a": 1, "b": 4}, {"a": 2, "b": 5}, {"a": 3, "b": 5}]


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["hiden-layer-size=8,16"], "nearest: hidden-layer-size"),
        (["hidden-layer-size=8,many"], "--sweep hidden-layer-size=many: hidden-layer-size takes a"),
        (["hidden-layer-size"], "not of the form KEY=VALUE,VALUE,…"),
        (["hidden-layer-size=8,"], "not of the form KEY=VALUE,VALUE,…"),
        (["batch-size=8,8"], "8 is given twice"),
        (["batch-size=8", "batch-size=9"], "batch-size is given twice"),
        (["horizon=1,2"], "horizon has one value already: 3"),
        (["seed=1,2"], "--seeds K runs each setting with K seeds"),
        (["metric=cpu_usage,power_consumption"], "errors of different metrics"),
        (["result-dir=a,b"], "result-dir: not for simulate"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweeps: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sweeps(sweeps, {"horizon": 3})
    assert words in str(caught.value)


def test_without_ray_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LocalError) as caught:
        make_plan(Options(tmp_path, tmp_path), [], 1)
    assert "pip install 'icos-fl[simulation]'" in str(caught.value)


TWO_CHILDREN = """
import subprocess, sys, time
from icos_fl_local.simulation.memory import PeakMemory

def first_look_mib(memory):
    memory.restart()
    while not memory.peak_mib:
        time.sleep(0.05)
    return memory.peak_mib

command = [sys.executable, "-c", "x = b'x' * (120 << 20); print(flush=True); input()"]
with PeakMemory() as memory:
    alone = first_look_mib(memory)
    pipe = subprocess.PIPE
    children = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in range(2)]
    for child in children:
        child.stdout.readline()
    print(alone, first_look_mib(memory))
    for child in children:
        child.communicate(b"\\n")
"""


def test_the_peak_is_that_of_all_processes_together() -> None:
    """In a small process: of a large one the kernel may take back memory meanwhile."""
    command = [sys.executable, "-c", TWO_CHILDREN]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    alone, together = map(int, ended.stdout.split())
    assert 240 <= together - alone <= 320


class Echo(Grid):
    """Answers when it is asked the second time, and counts what is under way."""

    def __init__(self, refused: int | None = None) -> None:
        self.under_way: dict[str, Message] = {}
        self.most = 0
        self._refused = refused
        self._asked: set[str] = set()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id != self._refused:
                message.metadata.__dict__["_message_id"] = f"to {message.metadata.dst_node_id}"
                ids.append(message.metadata.message_id)
                self.under_way[ids[-1]] = message
        self.most = max(self.most, len(self.under_way))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids) & self.under_way.keys()
        again, self._asked = wanted & self._asked, self._asked | wanted
        answered = [self.under_way.pop(message_id) for message_id in again]
        return [Message(RecordDict(), reply_to=message) for message in answered]

    def _unused(self, *_: object, **__: object) -> Any:
        raise AssertionError

    set_run = create_message = get_node_ids = send_and_receive = _unused
    run = property(_unused)


@pytest.fixture
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages in a run's process alone."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def messages(count: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in range(1, count + 1)]


@pytest.mark.usefixtures("in_a_run")
def test_no_more_messages_are_under_way_than_there_may_be() -> None:
    echo = Echo()
    replies = PacedGrid(echo, 3).send_and_receive(messages(10))
    assert echo.most == 3
    assert sorted(map(reply_to, replies)) == sorted(f"to {node}" for node in range(1, 11))


@pytest.mark.usefixtures("in_a_run")
def test_a_reply_is_given_once_and_to_whom_it_is_for() -> None:
    paced = PacedGrid(Echo(), 1)
    assert paced.push_messages(messages(3)) == ["to 1", "to 2", "to 3"]
    assert [reply_to(reply) for reply in paced.pull_messages(["to 2"])] == ["to 2"]
    assert paced.pull_messages(["to 2"]) == []
    assert [reply_to(reply) for reply in paced.pull_messages(["to 1"])] == ["to 1"]


@pytest.mark.usefixtures("in_a_run")
def test_a_message_that_is_refused_leaves_the_others_their_places() -> None:
    assert PacedGrid(Echo(refused=2), 9).push_messages(messages(3)) == ["to 1", "", "to 3"]


def history(*maes: float | None) -> dict[str, Any]:
    """Of one metric, with a round a mean absolute error; 2 is that of the last value."""
    rounds = [
        {
            "seconds": 10.0 if number == 0 else 1.0 + number,
            "metrics": {"cpu_usage": {"eval_loss": mae, "mae": mae, "naive_mae": mae and 2.0}},
        }
        for number, mae in enumerate(maes)
    ]
    return {"state": "finished", "rounds": rounds}


def outcome(setting: results.Setting, seed: int, *maes: float | None) -> results.Outcome:
    return results.outcome(setting, seed, Path("runs/0001"), history(*maes), 100 + seed)


def test_the_first_round_is_left_out_of_the_seconds_a_round() -> None:
    assert outcome({}, 0, 5.0, 4.0, 3.0).seconds_a_round == 2.5
    assert outcome({}, 0, 5.0).seconds_a_round == 10.0


def test_a_run_is_judged_by_its_last_round_that_was() -> None:
    assert outcome({}, 0, 5.0, 3.0, None).errors == {"cpu_usage": results.Error(3.0, 2.0)}


def test_a_row_has_mean_and_spread_over_the_seeds() -> None:
    (row,) = results.rows([outcome({}, 0, 3.0), outcome({}, 1, 5.0)], ["cpu_usage"])
    assert row.seeds == (0, 1)
    assert row.mae["cpu_usage"] == results.Spread(4.0, pytest.approx(2**0.5))
    assert row.ratio == results.Spread(2.0, pytest.approx(0.5**0.5))
    assert row.peak_memory_mib == 101


def test_the_best_setting_stands_first_and_one_that_failed_last() -> None:
    failed = results.Outcome({"num-layers": 9}, 0, "runs/0003", "it diverged")
    outcomes = [failed, outcome({"num-layers": 1}, 0, 3.0), outcome({"num-layers": 2}, 0, 1.0)]
    made = results.rows(outcomes, ["cpu_usage"])
    assert [row.setting["num-layers"] for row in made] == [2, 1, 9]
    assert made[-1].reason == "it diverged"


def test_the_files_have_a_row_a_setting(tmp_path: Path) -> None:
    outcomes = [outcome({"num-layers": 1}, 0, 3.0), outcome({"num-layers": 2}, 0, 1.0)]
    made = results.rows(outcomes, ["cpu_usage"])
    as_json, as_csv = results.write(tmp_path, {"nodes": 3}, outcomes, made)
    found = json.loads(as_json.read_text())
    assert (found["nodes"], len(found["table"]), len(found["runs"])) == (3, 2, 2)
    header, best, worst = as_csv.read_text().splitlines()
    assert header.startswith("num-layers,seeds,ratio,ratio_deviation,cpu_usage_mae,")
    assert best.startswith("2,1,0.5,0.0,1.0,")
    assert worst.startswith("1,1,1.5,0.0,3.0,")
