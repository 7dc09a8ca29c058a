"""A run as Prometheus sees it while it lasts."""

import socket
import urllib.error
import urllib.request

import pytest
from icos_fl_server.history import History
from icos_fl_server.metrics import RunCollector, told
from prometheus_client import CollectorRegistry


@pytest.fixture
def history(tmp_path):
    history = History(tmp_path, "1")
    history.plan(("cpu_usage",), 5)
    return history


def read(history):
    """Samples by name, or by name and the one label's value."""
    registry = CollectorRegistry()
    registry.register(RunCollector(history.facts))
    return {
        (sample.name.removeprefix("icos_fl_run_"), *sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_a_run_that_waits_has_no_round(history):
    assert read(history) == {
        ("state", "waiting"): 1,
        ("rounds_planned",): 5,
        ("rounds_finished",): 0,
        ("rounds_skipped",): 0,
    }


def test_rounds_nodes_and_losses_are_told(history):
    first = history.begin_round(1)
    first["metrics"]["cpu_usage"] = {"train_loss": 0.9, "eval_loss": 0.8, "mae": None}
    history.end_round(first, "finished")
    history.end_round(history.begin_round(2), "skipped", "nobody is there")
    third = history.begin_round(3)
    third["metrics"]["cpu_usage"] = {"train_loss": 0.7, "eval_loss": None}
    third["nodes"] = {"a": {"state": "ok"}, "b": {"state": "ok"}, "c": {"state": "failed"}}
    found = read(history)
    assert found[("state", "running")] == 1
    assert (found[("rounds_finished",)], found[("rounds_skipped",)]) == (1, 1)
    assert (found[("nodes", "ok")], found[("nodes", "failed")]) == (2, 1)
    # The newest that is known: the third round has not been evaluated yet.
    assert (found[("train_loss", "cpu_usage")], found[("eval_loss", "cpu_usage")]) == (0.7, 0.8)
    assert ("mae", "cpu_usage") not in found


def test_they_are_served_while_the_run_lasts(history):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with told(history.facts, address), urllib.request.urlopen(f"http://{address}/metrics") as page:
        assert 'icos_fl_run_state{state="waiting"} 1.0' in page.read().decode()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/metrics")


def test_a_port_in_use_stops_no_run(history):
    ran = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with told(history.facts, f"127.0.0.1:{taken.getsockname()[1]}"):
            ran.append(True)
        with told(history.facts, f"127.0.0.1:{taken.getsockname()[1]}"):
            ran.append(True)
    assert ran == [True, True]
