"""What the processor tells Prometheus."""

import time

import grpc
import numpy as np
import pytest
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl_processor.judging import Judging
from icos_fl_timeseries_store import MemoryStore
from icos_fl_timeseries_store.conditions import Expectations
from prometheus_client import REGISTRY


def sample(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def conditions(node):
    """Column and condition of all that is told of *node*."""
    return {
        (one.labels["column"], one.labels["condition"])
        for family in REGISTRY.collect()
        for one in family.samples
        if one.name == "icos_fl_window_condition" and one.labels["node"] == node
    }


class Forgetful(MemoryStore):
    def lose_all(self):
        self._windows.clear()


@pytest.fixture
def windows():
    return Forgetful()


def fill(store, node, power, newest_ns):
    times = newest_ns - np.arange(len(power))[::-1] * 3_000_000_000
    values = np.column_stack([power, np.arange(len(power)) % 11])
    window = store.create_window(node, 1000)
    window.append(["power", "cpu"], times, values, {"power": "W", "cpu": "%"})


def test_windows_are_told_with_what_is_wrong(windows):
    now = time.time_ns()
    fill(windows, "told-a", np.zeros(200), now)
    Judging(Expectations()).look(windows)
    assert sample("icos_fl_window_rows", node="told-a") == 200
    assert sample("icos_fl_window_capacity_rows", node="told-a") == 1000
    assert sample("icos_fl_window_last_row_timestamp_seconds", node="told-a") == now / 1e9
    assert conditions("told-a") == {("power", "unavailable")}


def test_what_is_well_again_is_no_longer_told(windows):
    now = time.time_ns()
    judging = Judging(Expectations())
    fill(windows, "told-b", np.zeros(200), now - 3_000_000_000)
    judging.look(windows)
    fill(windows, "told-b", [21.0], now)
    judging.look(windows)
    assert conditions("told-b") == set()


def test_recorded_rows_are_not_called_old(windows):
    fill(windows, "told-d", np.arange(200) % 7 + 20.0, time.time_ns() - 10**18)
    Judging(Expectations(), recorded=True).look(windows)
    assert conditions("told-d") == set()
    Judging(Expectations()).look(windows)
    assert conditions("told-d") == {("", "stale")}


def test_a_window_that_is_gone_is_no_longer_told(windows):
    judging = Judging(Expectations())
    fill(windows, "told-c", np.zeros(200), time.time_ns())
    windows.create_window("told-empty")
    judging.look(windows)
    assert conditions("told-empty") == {("", "silent")}
    windows.lose_all()
    judging.look(windows)
    assert sample("icos_fl_window_rows", node="told-c") is None
    assert sample("icos_fl_window_rows", node="told-empty") is None
    assert conditions("told-c") == conditions("told-empty") == set()


def test_served_sequences_are_counted_by_part(running, spec):
    # Of 10 steps 8 are for training: 4 sequences of 5, and none of the 2 others.
    running.store.fill("a", {"power": list(range(10))})
    before = sample("icos_fl_processor_sequences_served_total", part="train") or 0
    request = pb.GetSequencesRequest(series=spec(train_fraction=0.8), splits=[pb.SPLIT_TRAIN])
    list(running.stub.GetSequences(request, timeout=20))
    assert sample("icos_fl_processor_sequences_served_total", part="train") == before + 4


def test_a_store_that_does_not_answer_is_counted(running, spec):
    running.store.fill("a", {"power": list(range(10))})
    before = sample("icos_fl_processor_store_errors_total")
    running.store.answers = False
    with pytest.raises(grpc.RpcError):
        running.stub.GetLatest(pb.GetLatestRequest(series=spec()), timeout=20)
    assert sample("icos_fl_processor_store_errors_total") == before + 1
