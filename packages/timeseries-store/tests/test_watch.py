import json
import threading
import time

import numpy as np
from icos_fl_timeseries_store import MemoryStore, StoreDamaged
from icos_fl_timeseries_store.conditions import Expectations
from icos_fl_timeseries_store.watch import Watcher, look, to_csv


def ns(*seconds):
    return np.array([round(second * 1_000_000_000) for second in seconds], np.int64)


def window():
    return MemoryStore().create_window("a", 4)


def test_a_look_counts_rows_gaps_and_nans():
    rows = window()
    rows.append(["x", "y"], ns(3, 6, 9, 18), np.array([[1, 2], [3, np.nan], [5, 6], [7, 8.0]]))
    report = look("a", rows.read())
    assert (report.rows, report.added, report.removed, report.gaps) == (4, 4, 0, 1)
    assert report.interval_seconds == 3.0
    assert report.rate_per_second == 3 / 15
    x, y = report.columns["x"], report.columns["y"]
    assert (x.minimum, x.mean, x.maximum, x.last) == (1, 4, 7, 7)
    assert (y.values, y.nans) == (3, 1)


def test_a_second_look_tells_what_came_and_went():
    rows = window()
    rows.append(["x"], ns(1, 2, 3, 4), np.ones((4, 1)))
    before = rows.read()
    rows.append(["x"], ns(5, 6, 7), np.ones((3, 1)))
    report = look("a", rows.read(), before)
    assert (report.rows, report.added, report.removed) == (4, 3, 3)


def test_a_look_at_an_empty_window_has_no_numbers():
    report = look("a", window().read())
    assert (report.rows, report.interval_seconds, report.rate_per_second, report.gaps) == (
        0, None, None, 0,
    )  # fmt: skip


def test_csv_reads_back_as_the_same_values():
    rows = window()
    values = [0.1, 146.83, 1 / 3, 5e-324]
    rows.append(["x"], ns(1, 2.5, 3, 4), np.array(values)[:, None])
    lines = to_csv(rows.read()).splitlines()
    assert lines[0] == "time_unix_s,x"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2.5", "3", "4"]
    assert [float(line.split(",")[1]) for line in lines[1:]] == values


def test_a_missing_value_is_empty_in_csv():
    rows = window()
    rows.append(["x", "y"], ns(1), np.array([[1.0, np.nan]]))
    assert to_csv(rows.read()) == "time_unix_s,x,y\n1,1,\n"


def told(report):
    return [found.condition.word for found in report.conditions]


def test_a_watcher_looks_at_every_window():
    store = MemoryStore()
    for node in ("b", "a"):
        store.create_window(node).append(["x"], ns(1, 2), np.array([[1.0], [2.0]]))
    reports = Watcher(store, None, Expectations(), recorded=True).look()
    assert [(report.node, report.rows, told(report)) for report in reports] == [
        ("a", 2, []),
        ("b", 2, []),
    ]


def test_rows_of_long_ago_are_stale_unless_they_are_recorded_ones():
    store = MemoryStore()
    store.create_window("a").append(["x"], ns(1, 2), np.array([[1.0], [2.0]]))
    (report,) = Watcher(store, "a", Expectations()).look()
    assert told(report) == ["stale"]
    (report,) = Watcher(store, "a", Expectations(), recorded=True).look()
    assert told(report) == []


def test_a_window_that_was_never_there_is_silent():
    (report,) = Watcher(MemoryStore(), "a", Expectations()).look()
    assert (told(report), report.rows) == (["silent"], 0)


class Forgetful(MemoryStore):
    """A store that loses its windows, as a killed backend does."""

    def lose_all(self):
        self._windows.clear()


def test_a_window_that_is_gone_stays_silent_until_it_is_back():
    store = Forgetful()
    store.create_window("a").append(["x"], ns(1, 2), np.array([[1.0], [2.0]]))
    watcher = Watcher(store, None, Expectations(), recorded=True)
    watcher.look()
    store.lose_all()
    gone = [report for _ in range(2) for report in watcher.look()]
    assert [(told(report), report.removed) for report in gone] == [(["silent"], 2), (["silent"], 0)]
    store.create_window("a").append(["x"], ns(3), np.array([[3.0]]))
    (back,) = watcher.look()
    assert (told(back), back.added) == ([], 1)


class Damaged(MemoryStore):
    def window(self, node):
        if node == "b":
            raise StoreDamaged("rows 3 to 9 are not what was written")
        return super().window(node)


def test_a_damaged_window_is_told_and_the_others_too():
    store = Damaged()
    for node in ("a", "b"):
        store.create_window(node).append(["x"], ns(1, 2), np.array([[1.0], [2.0]]))
    reports = Watcher(store, None, Expectations(), recorded=True).look()
    assert [told(report) for report in reports] == [[], ["damaged"]]
    assert reports[1].conditions[0].reason == "rows 3 to 9 are not what was written"


def test_a_wait_ends_when_the_window_changes():
    store = MemoryStore()
    window = store.create_window("a")
    window.append(["x"], ns(1), np.array([[1.0]]))
    watcher = Watcher(store, "a", Expectations())
    watcher.look()
    late = threading.Timer(0.2, lambda: window.append(["x"], ns(2), np.array([[2.0]])))
    late.start()
    began = time.monotonic()
    watcher.wait(60)
    assert time.monotonic() - began < 30
    (report,) = watcher.look()
    assert report.added == 1


def test_a_report_is_json_with_the_conditions():
    (report,) = Watcher(MemoryStore(), "a", Expectations()).look()
    assert json.loads(json.dumps(report.as_dict()))["conditions"] == [
        {
            "condition": "silent",
            "exit_status": 10,
            "column": "",
            "reason": "no window of node 'a'; nodes with a window: none",
        }
    ]
