"""What is wrong with a window, on rows whose answer can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_timeseries_store import Rows
from icos_fl_timeseries_store.conditions import (
    Condition,
    Expectations,
    ExpectationsError,
    exit_status,
    judge,
    load_expectations,
    unreadable,
)

SECOND = 1_000_000_000
NAN = float("nan")
DEFAULTS = Expectations()


def ns(seconds):
    return (np.asarray(seconds, float) * SECOND).astype(np.int64)


def rows(seconds, units=None, **columns):
    """A window with rows at *seconds*; units are those of *units*, % without."""
    names = tuple(columns)
    return Rows(
        columns=names,
        units=tuple((units or {}).get(name, "%") for name in names),
        times_ns_t=ns(seconds),
        values_tf=np.array([columns[name] for name in names], float).T.reshape(-1, len(names)),
        cursor=1,
    )


def live(count):
    """Values that change with every row."""
    return 20 + np.arange(count) % 7


def told(window, expectations=DEFAULTS, now=None):
    """Condition and column of each finding."""
    found = judge(window, expectations, None if now is None else round(now * SECOND))
    return [(finding.condition.word, finding.column) for finding in found]


EVERY_3_S = np.arange(300) * 3.0 + 3


# The node


def test_a_live_window_has_nothing_wrong():
    window = rows(EVERY_3_S, {"power": "W"}, cpu=live(300), power=50 + live(300))
    assert judge(window, DEFAULTS, round(900 * SECOND)) == []
    assert exit_status([]) == 0


def test_a_window_without_rows_is_silent():
    assert told(rows([], cpu=[]), now=0) == [("silent", "")]


@pytest.mark.parametrize(("age", "found"), [(300, []), (301, [("stale", "")])])
def test_a_newest_row_older_than_five_minutes_is_stale(age, found):
    assert told(rows(EVERY_3_S, cpu=live(300)), now=900 + age) == found


def test_rows_that_come_rarely_are_stale_after_three_of_their_distances():
    hourly = rows(np.arange(1, 6) * 3600.0, cpu=live(5))
    assert told(hourly, now=8 * 3600) == []
    assert told(hourly, now=8 * 3600 + 1) == [("stale", "")]


def test_recorded_rows_are_never_stale():
    assert told(rows(EVERY_3_S, cpu=live(300)), now=None) == []


@pytest.mark.parametrize(("missing", "found"), [(5, []), (6, [("gappy", "")])])
def test_more_than_one_in_twenty_missing_rows_is_gappy(missing, found):
    # 100 rows every 3 s, the limit is 5 of them.
    seconds = np.delete(np.arange(100) * 3.0 + 3, range(40, 40 + missing))
    assert told(rows(seconds, cpu=live(len(seconds)))) == found


def test_a_gap_that_is_no_longer_recent_is_not_told():
    # 20 rows before a gap of half an hour; the 15 minutes that count are whole.
    seconds = np.concatenate([np.arange(20) * 3.0 + 3, 2000 + np.arange(400) * 3.0])
    assert told(rows(seconds, cpu=live(420))) == []


def test_rows_that_jitter_are_not_gappy():
    jitter = np.random.default_rng(1).uniform(-1.4, 1.4, 300)
    assert told(rows(EVERY_3_S + jitter, cpu=live(300))) == []


# A column


def test_ten_minutes_of_no_power_at_a_live_cpu_are_unavailable():
    window = rows(EVERY_3_S[:201], {"power": "W"}, cpu=live(201), power=np.zeros(201))
    (found,) = judge(window, DEFAULTS, None)
    assert (found.condition, found.column) == (Condition.UNAVAILABLE, "power")
    assert found.reason.startswith("exactly 0 for 600 s, 120 s are the limit")
    assert exit_status([found]) == 12


def test_one_real_value_makes_power_available():
    power = np.append(np.zeros(200), 21.0)
    assert told(rows(EVERY_3_S[:201], {"power": "W"}, cpu=live(201), power=power)) == []


@pytest.mark.parametrize(("count", "found"), [(40, []), (41, [("unavailable", "power")])])
def test_power_may_be_zero_for_less_than_two_minutes(count, found):
    # The last of 41 zeros every 3 s comes 120 s after the first.
    power = np.append(50 + live(100), np.zeros(count))
    window = rows(np.arange(len(power)) * 3.0 + 3, {"power": "W"}, power=power)
    assert told(window) == found


def test_a_cpu_may_be_idle_for_long():
    assert told(rows(EVERY_3_S, cpu=np.zeros(300), power=live(300))) == []


def test_what_can_be_zero_is_said_by_column():
    window = rows(
        EVERY_3_S, {"gpu_power": "W", "flow": "l/s"}, gpu_power=live(300) * 0, flow=live(300) * 0
    )
    columns = {"gpu_power": {"zero_is_missing": False}, "flow": {"zero_is_missing": True}}
    assert told(window, Expectations(columns=columns)) == [("unavailable", "flow")]


@pytest.mark.parametrize(("count", "found"), [(200, []), (201, [("stuck", "cpu")])])
def test_one_value_for_ten_minutes_is_stuck(count, found):
    cpu = np.append(live(50), np.full(count, 41.5))
    assert told(rows(np.arange(len(cpu)) * 3.0 + 3, cpu=cpu, memory=live(len(cpu)))) == found


def test_an_hour_at_full_load_is_not_stuck():
    seconds = np.arange(1200) * 3.0 + 3
    assert told(rows(seconds, {"fan": "rpm"}, cpu=np.full(1200, 100.0))) == []


def test_an_hour_at_the_configured_maximum_is_not_stuck():
    window = rows(EVERY_3_S, {"fan": "rpm"}, fan=np.full(300, 4000.0))
    assert told(window) == [("stuck", "fan")]
    assert told(window, Expectations(columns={"fan": {"maximum": 4000.0}})) == []


def test_four_equal_values_an_hour_apart_are_not_stuck():
    assert told(rows(np.arange(1, 5) * 3600.0, cpu=[7, 7, 7, 7])) == []


def test_values_that_change_again_are_not_stuck():
    assert told(rows(EVERY_3_S[:251], cpu=np.append(np.full(250, 41.5), 41.6))) == []


def test_a_column_that_stopped_while_rows_go_on_is_silent():
    # 101 rows every 3 s without a value; the last value is 303 s before the newest row.
    cpu = np.append(live(199), np.full(101, NAN))
    window = rows(EVERY_3_S, {"power": "W"}, power=live(300), cpu=cpu)
    assert told(window) == [("silent", "cpu")]


def test_a_column_that_never_had_a_value_is_silent_where_it_is_counted_on():
    window = rows(EVERY_3_S, power=np.full(300, NAN), cpu=live(300))
    assert told(window) == []
    assert told(window, Expectations(columns={"power": {}})) == [("silent", "power")]


@pytest.mark.parametrize(("missing", "found"), [(15, []), (16, [("nan", "cpu")])])
def test_more_than_one_in_twenty_missing_values_is_told(missing, found):
    # 300 recent rows, the limit is 15 values of them.
    cpu = live(300).astype(float)
    cpu[100 : 100 + missing] = NAN
    assert told(rows(EVERY_3_S, power=live(300), cpu=cpu)) == found


def test_a_column_that_comes_with_every_fifth_row_lacks_nothing():
    cpu = np.where(np.arange(300) % 5 == 0, live(300), NAN)
    assert told(rows(EVERY_3_S, power=live(300), cpu=cpu)) == []


def test_values_out_of_the_configured_range_are_told_with_the_newest():
    expectations = Expectations(columns={"power": {"minimum": 5.0, "maximum": 400.0}})
    power = np.append(live(298), [4.0, 812.0])
    (found,) = judge(rows(EVERY_3_S, {"power": "W"}, power=power), expectations, None)
    assert found.condition is Condition.OUT_OF_RANGE
    assert found.reason == "2 recent values are not within 5 to 400; the newest is 812"


def test_rounding_does_not_leave_a_range():
    expectations = Expectations(columns={"cpu": {"minimum": 0.0, "maximum": 100.0}})
    cpu = np.append(live(298), [-1e-14, 100 + 1e-13])
    assert told(rows(EVERY_3_S, cpu=cpu), expectations) == []


def test_the_worst_finding_comes_first_and_is_the_exit_status():
    window = rows(EVERY_3_S, {"power": "W"}, memory=np.full(300, 9.0), power=np.zeros(300))
    found = judge(window, DEFAULTS, round(2000 * SECOND))
    assert [f.condition.word for f in found] == ["stale", "unavailable", "stuck"]
    assert exit_status(found[::-1]) == 11


# Zeros that are no measurements


def test_only_long_stretches_of_zeros_are_unreadable():
    values = np.array([0, 5, 0, 0, NAN, 0, 5, 0, 0], float)
    # Zeros from 20 s to 50 s, with a row without a value between; the last from 70 s to 80 s.
    found = unreadable(ns(np.arange(9) * 10), values, 30)
    assert found.tolist() == [False, False, True, True, False, True, False, False, False]


@given(st.lists(st.sampled_from([0.0, 1.0, NAN]), max_size=40), st.integers(1, 10))
def test_unreadable_rows_are_zeros_whose_stretch_is_long_enough(values, seconds):
    found = unreadable(ns(np.arange(len(values))), np.array(values, float), seconds)
    for at in range(len(values)):
        if values[at] != 0:
            assert not found[at]
            continue
        around = [at, at]
        for end, step in ((0, -1), (1, 1)):
            next_one = at
            while 0 <= next_one < len(values) and values[next_one] != 1.0:
                around[end] = next_one if values[next_one] == 0 else around[end]
                next_one += step
        assert found[at] == (around[1] - around[0] >= seconds)


# The file


def test_a_file_gives_ranges_and_thresholds(tmp_path):
    file = tmp_path / "expectations.toml"
    file.write_text("stuck_seconds = 60.0\n[columns.power]\nmaximum = 400.0\n")
    found = load_expectations(file)
    assert (found.stuck_seconds, found.late_seconds) == (60, 300)
    assert found.columns["power"].maximum == 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stuck_second = 60", "stuck_second: Extra inputs are not permitted; read: 60"),
        ("[columns.power]\nmaximum = 'x'", "columns.power.maximum: Input should be a valid number"),
        ("late_seconds = 0", "late_seconds: Input should be greater than 0; read: 0"),
        ("a = 1\na = 2", "Cannot overwrite a value"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_what_was_read(tmp_path, text, said):
    file = tmp_path / "expectations.toml"
    file.write_text(text)
    with pytest.raises(ExpectationsError) as caught:
        load_expectations(file)
    assert str(file) in str(caught.value)
    assert said in str(caught.value)
