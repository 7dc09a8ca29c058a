import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_client.forecasting import Combination
from icos_fl_client.forecasting.backtest import (
    Record,
    Score,
    baselines,
    replay,
    score,
    with_gaps,
)

NAN = math.nan
HOUR_SECONDS = 3600


def scores_of(values, steps: list[int]) -> list[dict[str, Score]]:
    """Of a trace with a step an hour, by step ahead and forecaster."""
    record = replay(np.asarray(values, float), Combination(steps))
    simple = baselines(record, np.arange(len(values)), HOUR_SECONDS)
    return [{s.forecaster: s for s in each.forecasters} for each in score(record, simple)]


def test_nobody_errs_on_a_constant_and_there_is_no_ratio():
    (found,) = scores_of(np.full(60, 7.0), [2])

    assert [0.0] * len(found) == [each.mae for each in found.values()]
    assert all(math.isnan(each.ratio) for each in found.values())


def test_ramp_is_behind_the_last_value_and_ahead_of_nobody_who_drifts():
    found, later = scores_of(3.0 * np.arange(100), [1, 4])

    assert Score("last", 99, 3.0, 1.0) == found["last"]
    assert Score("last", 96, 12.0, 1.0) == later["last"]
    assert pytest.approx(12.0 / 96) == later["drift-40"].mae  # of the first value alone


def test_window_mean_is_that_of_the_newest_forty_values():
    found = scores_of(np.arange(100.0), [1])[0]["window-mean"]

    lag_t = np.minimum(np.arange(99), 39) / 2  # of the middle of the window
    assert pytest.approx(np.mean(lag_t + 1)) == found.mae


def test_seasonal_repeat_knows_a_daily_sine():
    days = 3
    found = scores_of(50 + 40 * np.sin(2 * np.pi * np.arange(24 * days) / 24), [1, 6])

    assert [24 * (days - 1)] * 2 == [each["seasonal-repeat"].origins for each in found]
    assert pytest.approx(0.0, abs=1e-9) == max(each["seasonal-repeat"].mae for each in found)


def test_seasonal_repeat_takes_the_same_time_of_day_after_a_gap():
    values = np.array([1.0, 2.0, NAN, NAN, NAN, NAN, NAN, 5.0, 6.0])
    numbers = np.array([0, 1, 2, 3, 4, 5, 6, 23, 24])  # steps of an hour
    record = replay(values, Combination([1, 2]))

    repeated_th = baselines(record, numbers, HOUR_SECONDS)["seasonal-repeat"]

    assert repeated_th[-2].tolist() == [1.0, 2.0]


def test_seasonal_repeat_of_more_than_a_day_ahead_takes_days_that_have_been():
    values = np.arange(80.0)
    record = replay(values, Combination([30]))

    repeated_th = baselines(record, np.arange(80), HOUR_SECONDS)["seasonal-repeat"]

    assert repeated_th[60, 0] == 60 + 30 - 48


def test_trace_under_a_day_has_no_seasonal_repeat():
    (found,) = scores_of(np.arange(20.0), [1])
    assert "seasonal-repeat" not in found


def test_step_of_which_nothing_came_is_not_told():
    assert [each.step for each in score(replay(np.arange(5.0), Combination([1, 9])), {})] == [1]


def test_nothing_is_scored_across_a_long_gap():
    values = np.array([1.0, 2.0, *[NAN] * 5, 3.0, 4.0])

    actual_th = replay(values, Combination([1, 7])).actual_th

    expected = np.full((9, 2), NAN)
    expected[[0, 7], 0] = 2.0, 4.0
    np.testing.assert_array_equal(expected, actual_th)


def test_interval_is_scored_by_hand():
    """Three of four are inside; what is missed costs 2 / 0.2 times by how much."""
    values = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    nothing = np.full((5, 1), NAN)
    bounds_tq = np.tile([-5.0, 0.0, 4.0, 9.0], (5, 1))
    record = Record(values, np.array([1]), (), nothing, bounds_tq[:, :, None], nothing[:, None])

    (found,) = score(record, {"last": values[:, None]})
    of_80, of_95 = found.intervals

    assert (of_80.origins, of_80.coverage, of_80.width) == (4, 0.75, 4.0)
    assert pytest.approx(of_80.winkler) == 4.0 + 10 * (10 - 4) / 4
    assert (of_95.coverage, of_95.width) == (0.75, 14.0)
    assert pytest.approx(of_95.winkler) == 14.0 + 40 * (10 - 9) / 4


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 69), st.lists(st.floats(0, 100) | st.just(NAN), min_size=10, max_size=10))
def test_what_comes_later_changes_nothing_that_was_said_before(moment, later):
    values = 50 + 40 * np.sin(np.arange(80) / 5)
    changed = np.concatenate([values[: moment + 1], later])
    numbers = np.arange(80)

    said, said_then = (
        [record.yhat_th, record.quantile_tqh, record.said_tkh, *simple.values()]
        for record in (replay(each, Combination([1, 4])) for each in (values, changed))
        for simple in [baselines(record, numbers[: len(record.values_t)], HOUR_SECONDS)]
    )

    for before, after in zip(said, said_then, strict=True):
        np.testing.assert_array_equal(before[: moment + 1], after[: moment + 1])


def test_gap_has_as_many_steps_as_it_may_have():
    numbers, values = with_gaps(np.array([3, 4, 6, 1_000_000]), np.arange(4.0), 2)

    assert numbers.tolist() == [3, 4, 5, 6, 7, 8, 1_000_000]
    np.testing.assert_array_equal(values, [0, 1, NAN, 2, NAN, NAN, 3])
