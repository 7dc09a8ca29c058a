import numpy as np
from icos_fl_timeseries_store import MemoryStore
from icos_fl_timeseries_store.watch import look, to_csv


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
