"""The specification that every store passes: the one in memory and the one on dataClay."""

import threading
import time
import uuid

import numpy as np
import pytest
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import (
    InvalidRows,
    MemoryStore,
    ModelVersion,
    StoreSettings,
    StoreUnavailable,
    UnknownNode,
    connect,
)


@pytest.fixture(params=["memory", "dataclay"])
def store(request):
    if request.param == "memory":
        yield MemoryStore()
        return
    with connect(request.getfixturevalue("dataclay_settings")) as connected:
        yield connected


@pytest.fixture
def node():
    return f"node-{uuid.uuid4().hex[:8]}"


def ns(*seconds):
    return np.array(seconds, np.int64) * 1_000_000_000


def column(*values):
    return np.array(values, float)[:, None]


def seconds_of(rows):
    return (rows.times_ns_t // 1_000_000_000).tolist()


def test_a_store_that_answers_passes_the_check_whatever_it_holds(store, node):
    store.check()
    store.create_window(node)
    store.check()


def test_rows_come_back_as_they_were_stored(store, node):
    window = store.create_window(node)
    values = np.array([[0.1, 1e300], [np.nan, -0.0]])
    window.append(["power", "cpu"], ns(10, 11), values, {"power": "W"})
    rows = window.read()
    assert rows.columns == ("power", "cpu")
    assert rows.units == ("W", "")
    assert rows.times_ns_t.tolist() == ns(10, 11).tolist()
    np.testing.assert_array_equal(rows.values_tf, values)


def test_late_rows_are_merged_in_order(store, node):
    window = store.create_window(node)
    window.append(["x"], ns(3, 4, 5), column(3, 4, 5))
    window.append(["x"], ns(1, 2, 6), column(1, 2, 6))
    rows = window.read()
    assert seconds_of(rows) == [1, 2, 3, 4, 5, 6]
    assert rows.values_tf[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_row_older_than_a_full_window_is_said_to_be_too_old(store, node):
    window = store.create_window(node, 3)
    window.append(["x"], ns(10, 11, 12), column(0, 0, 0))
    appended = window.append(["x"], ns(9, 13), column(1, 1))
    assert (appended.added, appended.too_old, appended.removed) == (1, 1, 1)
    assert seconds_of(window.read()) == [11, 12, 13]


def test_the_same_batch_twice_changes_nothing(store, node):
    window = store.create_window(node)
    window.append(["x"], ns(1, 2), column(1, 2))
    again = window.append(["x"], ns(1, 2), column(1, 2))
    assert (again.added, again.merged) == (0, 2)
    assert seconds_of(window.read()) == [1, 2]


def test_a_new_column_is_nan_in_older_rows(store, node):
    window = store.create_window(node)
    window.append(["x"], ns(1), column(1))
    window.append(["y"], ns(2), column(2))
    rows = window.read()
    assert rows.columns == ("x", "y")
    np.testing.assert_array_equal(rows.values_tf, [[1, np.nan], [np.nan, 2]])


def test_nan_never_overwrites_a_value(store, node):
    window = store.create_window(node)
    window.append(["x", "y"], ns(1), np.array([[1.0, np.nan]]))
    window.append(["x", "y"], ns(1), np.array([[np.nan, 2.0]]))
    assert window.read().values_tf.tolist() == [[1.0, 2.0]]


def test_a_cursor_gives_what_changed_after_it(store, node):
    window = store.create_window(node)
    cursor = window.append(["x"], ns(1, 2, 3), column(1, 2, 3)).cursor
    assert len(window.read(after=cursor).times_ns_t) == 0
    window.append(["x"], ns(2, 4), column(9, 4))
    changed = window.read(after=cursor)
    assert seconds_of(changed) == [2, 4]
    assert changed.values_tf[:, 0].tolist() == [9, 4]


def test_the_newest_rows_can_be_read_alone(store, node):
    window = store.create_window(node)
    window.append(["x"], ns(1, 2, 3), column(1, 2, 3))
    assert seconds_of(window.read(last=2)) == [2, 3]


def test_a_window_takes_a_new_capacity(store, node):
    store.create_window(node, 10).append(["x"], ns(1, 2, 3), column(1, 2, 3))
    window = store.create_window(node, 2)
    assert window.info().capacity_rows == 2
    assert seconds_of(window.read()) == [2, 3]


def test_wait_ends_as_soon_as_rows_come(store, node):
    window = store.create_window(node)
    cursor = window.info().cursor
    began = time.monotonic()
    writer = threading.Timer(0.3, lambda: window.append(["x"], ns(1), column(1)))
    writer.start()
    assert window.wait(cursor, 20) == cursor + 1
    assert time.monotonic() - began < 10
    writer.join()


def test_wait_without_news_ends_at_its_timeout(store, node):
    window = store.create_window(node)
    assert window.wait(window.info().cursor, 0.05) == window.info().cursor


def test_many_writers_lose_no_row(store, node):
    store.create_window(node, 10_000)

    def write(start):
        window = store.window(node)
        for second in range(start, 200, 8):
            window.append(["x"], ns(second), column(second))

    writers = [threading.Thread(target=write, args=(start,)) for start in range(1, 9)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert seconds_of(store.window(node).read()) == list(range(1, 200))


@pytest.mark.parametrize(
    ("columns", "times", "values", "said"),
    [
        (["x", "x"], ns(1), np.ones((1, 2)), "'x' stands twice"),
        (["x"], ns(1), np.ones((2, 1)), "shape (2, 1)"),
        (["x"], ns(0), np.ones((1, 1)), "time 0 ns"),
        (["x"], ns(1), np.array([[np.inf]]), "x is inf"),
        ([""], ns(1), np.ones((1, 1)), "without a name"),
        (["x"], np.array([1.5]), np.ones((1, 1)), "times are float64"),
        (["x"], ns(1), np.array([["high"]]), "no table of numbers"),
    ],
)
def test_rows_that_no_window_holds_are_refused_by_value(store, node, columns, times, values, said):
    window = store.create_window(node)
    with pytest.raises(InvalidRows) as error:
        window.append(columns, times, values)
    assert said in str(error.value)
    assert len(window.read().times_ns_t) == 0


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "é", "x" * 201])
def test_a_name_that_no_store_has_is_refused_by_value(store, name):
    for use in (store.create_window, store.window, lambda name: store.model_state(name, "cpu")):
        with pytest.raises(InvalidRows) as error:
            use(name)
        assert name in str(error.value)
        assert "200" in str(error.value)


def test_an_unknown_node_is_named_beside_the_known_ones(store, node):
    store.create_window(node)
    with pytest.raises(UnknownNode) as error:
        store.window("nobody")
    assert "nobody" in str(error.value)
    assert node in str(error.value)


def test_nodes_are_listed_by_name(store, node):
    for suffix in ("b", "a"):
        store.create_window(f"{node}-{suffix}")
    assert [name for name in store.nodes() if name.startswith(node)] == [f"{node}-a", f"{node}-b"]


def version(round_number):
    weights = {"w": np.full((2, 3), round_number, np.float32)}
    return ModelVersion(round_number, weights, {"horizon": 20, "model": "m:f"}, {"eval-loss": 0.5})


def test_latest_and_best_model_are_kept_apart(store, node):
    state = store.model_state(node, "cpu_usage")
    assert state.get() is None
    state.put(version(1), best=True)
    state.put(version(2))
    latest, best = state.get("latest"), state.get("best")
    assert (latest.round, best.round) == (2, 1)
    np.testing.assert_array_equal(latest.weights["w"], np.full((2, 3), 2, np.float32))
    assert (latest.config["horizon"], latest.metadata["eval-loss"]) == (20, 0.5)


def test_two_processes_may_create_the_same_window_at_once(dataclay_settings, node):
    failures = []

    def create(second):
        try:
            with connect(dataclay_settings) as store:
                store.create_window(node).append(["x"], ns(second), column(second))
        except Exception as error:
            failures.append(error)

    creators = [threading.Thread(target=create, args=(second,)) for second in range(1, 7)]
    with connect(dataclay_settings) as store:
        for creator in creators:
            creator.start()
        for creator in creators:
            creator.join()
        assert failures == []
        assert seconds_of(store.window(node).read()) == [1, 2, 3, 4, 5, 6]


def test_a_store_that_is_not_there_is_said_with_its_address():
    port = free_port()
    with pytest.raises(StoreUnavailable) as error:
        connect(StoreSettings(port=port, timeout_seconds=2))
    assert f"127.0.0.1:{port}" in str(error.value)
