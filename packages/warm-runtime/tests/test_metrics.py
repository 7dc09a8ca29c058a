"""/metrics of a SuperLink and its SuperNodes, and their logs: real processes, real tasks."""

import json
from importlib.metadata import version

import pytest
from icos_fl_service.testing import free_port
from icos_fl_warm_runtime.metrics import TaskCounts
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROUNDS = 4


@pytest.fixture(scope="module")
def told(new_federation, wait_until):
    """A run of four rounds, in two of which node 1 fails."""
    names = ("superlink", "supernode-0", "supernode-1")
    federation = new_federation(metrics={name: free_port() for name in names})
    federation.superlink()
    federation.supernode(0)
    federation.supernode(1)
    faults = {2: {"fault": "raises", "node": 1}, 3: {"fault": "exits-3", "node": 1}}
    federation.run(faults, rounds=ROUNDS).end()
    for name in names:  # a task ends a moment after its reply has come
        wait_until(lambda name=name: not federation.tasks(name), 30, federation.logs)
    return federation


def count(federation, name: str, *labels: str) -> float | None:
    return federation.scrape(name).get(("icos_fl_runtime_task_seconds_count", *labels))


def test_a_supernode_tells_how_its_tasks_ended(told):
    assert count(told, "supernode-0", "clientapp", "completed") == ROUNDS
    assert count(told, "supernode-1", "clientapp", "completed") == ROUNDS - 2
    assert count(told, "supernode-1", "clientapp", "failed") == 1
    assert count(told, "supernode-1", "clientapp", "died") == 1


def test_a_supernode_tells_how_its_tasks_started(told):
    values = told.scrape("supernode-1")
    assert values["icos_fl_runtime_tasks_started_total", "clientapp", "warm"] == ROUNDS
    assert values["icos_fl_runtime_workers_started_total", "clientapp"] == 1


def test_a_superlink_tells_how_its_runs_ended(told):
    assert count(told, "superlink", "serverapp", "completed") == 1


def test_what_tasks_count_is_added_up_and_of_gauges_the_newest_is_kept(told):
    values = told.scrape("supernode-0")
    assert values[("app_added_total",)] == ROUNDS * 1000
    assert values["app_round", "0"] == ROUNDS
    # Of node 1, the task that raised has told what it did until then; the one that died has not.
    assert told.scrape("supernode-1")[("app_added_total",)] == (ROUNDS - 2) * 1000


def test_a_supernode_tells_its_version_and_that_it_is_well(told):
    assert told.status("supernode-0") == {
        "part": "supernode",
        "version": version("icos-fl-warm-runtime"),
        "health": "healthy",
        "waits_for": "",
        "reason": "",
        "apps": {"icos-fl-client": version("icos-fl-client")},
    }


def test_a_superlink_tells_its_newest_run(told, wait_until):
    def run():
        return told.status("superlink")["run"]

    wait_until(lambda: run()["state"] == "finished:completed", 10, told.logs)
    told.run({1: {"fault": "server-exits"}}, rounds=1)
    wait_until(lambda: run()["state"] == "finished:failed", 30, told.logs)
    assert "exit status" in run()["reason"]
    assert told.status("superlink")["nodes_online"] == 2


def test_nothing_is_left_of_what_tasks_told(told):
    assert not list(told.folder.glob("icos-fl-*/*.prom"))


def test_every_line_of_every_process_is_json(told):
    for name in told.processes:
        lines = [json.loads(line) for line in told.log(name).splitlines()]
        assert {line["logger"] for line in lines} >= {"flwr", "uvicorn.error"}
        assert all(line["event"] for line in lines)


def test_a_stock_supernode_tells_that_it_is_there(new_federation, wait_until):
    federation = new_federation(metrics={"supernode-0": free_port()})
    federation.supernode(0, runtime="stock")
    values = federation.scrape("supernode-0")
    assert [series for series in values if series[0] == "icos_fl_service_info"]
    assert not [series for series in values if series[0].startswith("icos_fl_runtime")]


def test_a_supernode_whose_address_for_metrics_is_taken_does_not_start(new_federation):
    federation = new_federation()
    federation.metrics["supernode-0"] = federation.port
    federation.superlink()
    federation.supernode(0, wait=False)
    assert federation.processes["supernode-0"].wait(60) == 1
    assert federation.log("supernode-0") == (
        f"flower-supernode: cannot serve metrics on 127.0.0.1:{federation.port}: "
        "Address already in use\n"
    )


def of_a_task(count: int, value: float) -> str:
    registry = CollectorRegistry()
    Counter("rows", "Rows", ["node"], registry=registry).labels("a").inc(count)
    Gauge("loss", "Loss", ["metric"], registry=registry).labels("cpu").set(value)
    Histogram("wait_seconds", "Time", buckets=(1, 2), registry=registry).observe(value)
    return generate_latest(registry).decode()


def test_counts_of_tasks_are_those_of_one_that_did_all_of_it():
    counts = TaskCounts()
    counts.add(of_a_task(3, 0.5))
    counts.add(of_a_task(4, 1.5))
    registry = CollectorRegistry()
    registry.register(counts)
    text = generate_latest(registry).decode().splitlines()
    assert [line for line in text if not line.startswith("#")] == [
        'rows_total{node="a"} 7.0',
        'loss{metric="cpu"} 1.5',
        'wait_seconds_bucket{le="1.0"} 1.0',
        'wait_seconds_bucket{le="2.0"} 2.0',
        'wait_seconds_bucket{le="+Inf"} 2.0',
        "wait_seconds_count 2.0",
        "wait_seconds_sum 2.0",
    ]
    assert "# TYPE rows_total counter" in text
    assert "# TYPE wait_seconds histogram" in text


def test_what_a_task_told_in_part_is_refused_whole():
    counts = TaskCounts()
    with pytest.raises(ValueError):
        counts.add('# TYPE rows_total counter\nrows_total{node="a"} 7.0\nrows_total{node="b')
    assert not list(counts.collect())
