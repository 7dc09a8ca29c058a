import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_client.forecasting import Combination, Forecast, History, Steps
from icos_fl_client.forecasting.backtest import replay

STEPS = (1, 4)


def walk(steps: int, seed: int = 0) -> np.ndarray:
    """A load that comes and goes, with noise, in 0 to 100."""
    rng = np.random.default_rng(seed)
    load_t = 50 + 40 * np.sin(np.arange(steps) / 9) + rng.normal(size=steps).cumsum() / 4
    return np.clip(load_t + rng.normal(size=steps), 0.0, 100.0)


def run(values, combination: Combination | None = None) -> list[Forecast | None]:
    combination = combination or Combination(STEPS)
    return [combination.update(value) for value in values]


def table(forecasts: list[Forecast | None]) -> np.ndarray:
    """(t, 5, h), NaN where there is no forecast."""
    rows = [
        np.stack(list(vars(f).values())[:5]) if f else np.full((5, 2), np.nan) for f in forecasts
    ]
    return np.stack(rows)


def test_importing_it_loads_no_torch():
    code = "import sys, icos_fl_client.forecasting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.floats(0, 100) | st.just(math.nan), min_size=20, max_size=20),
)
def test_what_comes_later_changes_no_earlier_forecast(moment, later):
    values = walk(100)
    changed = np.concatenate([values[: moment + 1], later])

    expected = table(run(values[: moment + 1]))
    assert np.array_equal(expected, table(run(changed))[: moment + 1], equal_nan=True)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 100) | st.just(math.nan), min_size=60, max_size=120))
def test_intervals_are_nested_and_inside_the_limits(values):
    combination = Combination(STEPS, lower=0.0, upper=100.0)
    for forecast in filter(None, run(values, combination)):
        ladder = [forecast.lower_95_h, forecast.lower_80_h, forecast.yhat_h]
        ladder += [forecast.upper_80_h, forecast.upper_95_h]
        known = np.isfinite(ladder[0])
        assert all((a <= b)[known].all() for a, b in itertools.pairwise(ladder))
        assert not (np.minimum(forecast.yhat_h, ladder[0]) < 0).any()
        assert not (np.maximum(forecast.yhat_h, ladder[-1]) > 100).any()


def test_value_beyond_the_limits_is_believed():
    combination = Combination(STEPS, lower=0.0, upper=100.0)

    assert run([102.0, 101.0], combination)[-1].yhat_h.max() > 100
    assert run([-1.0], combination)[-1].yhat_h.min() < 0


def test_unit_of_the_metric_does_not_matter():
    values = walk(400)
    assert np.array_equal(1024 * table(run(values)), table(run(1024 * values)), equal_nan=True)


def test_step_without_a_value_has_no_forecast():
    forecasts = run([1.0, math.nan, 2.0])

    assert [forecast is not None for forecast in forecasts] == [True, False, True]


def test_there_is_a_forecast_from_the_first_value_on_and_it_repeats_it():
    assert run([7.0])[0].yhat_h.tolist() == [7.0, 7.0]


def test_quick_mixers_begin_a_new_run_anew():
    combination = Combination(STEPS)
    run([*walk(200), *[math.nan] * 5], combination)
    assert combination.mixture.mixers.square_mkh[0].any()

    run([40.0], combination)
    assert not combination.mixture.mixers.square_mkh[0].any()


def test_nothing_is_judged_across_a_long_gap():
    combination = Combination((1, 10))
    run([1.0, *[math.nan] * 5, 99.0], combination)

    assert np.isnan(combination.errors()[1]).all()


def test_errors_are_those_computed_by_hand():
    combination = Combination((1,))
    run([10.0, 10.0, 13.0], combination)

    # All repeat 10 when 10 and then 13 comes; an error counts 0.998 of the next one.
    assert math.isclose(3 / 1.998, combination.errors()[1][0])


def test_skipping_is_quick_and_ends_the_run():
    combination = Combination(STEPS)
    run(walk(50), combination)
    combination.skip(10**9)

    assert combination.history.count < 100
    assert combination.update(5.0).yhat_h.tolist() == [5.0, 5.0]


def test_restored_combination_goes_on_as_if_nothing_had_been(tmp_path):
    values = walk(700)
    combination = Combination(STEPS)
    run(values[:500], combination)
    np.savez(tmp_path / "state.npz", **combination.state())
    restored = Combination(STEPS)
    with np.load(tmp_path / "state.npz") as state:
        restored.restore(state)

    expected = table(run(values[500:], combination))
    assert np.array_equal(expected, table(run(values[500:], restored)))


def test_state_of_other_steps_is_refused_and_changes_nothing():
    combination = Combination((1, 5))
    with pytest.raises(ValueError, match="not one of"):
        combination.restore(Combination(STEPS).state())

    assert combination.history.count == 0


def test_state_is_bounded():
    combination = Combination((4, 20, 240))
    empty = sum(array.nbytes for array in combination.state().values())
    assert empty + 3 * 8 * 4096 < 1_000_000


class Oracle:
    """Knows that the load alternates, but not from the start."""

    names = ("oracle",)

    def forecast(self, history: History, steps_h: Steps) -> np.ndarray:
        if history.count < 30:
            return np.full((1, len(steps_h)), np.nan)
        return (
            np.where(steps_h % 2, 100.0, 0.0)[None]
            + np.where(steps_h % 2, -1.0, 1.0) * history.filled_t[-1]
        )


def test_any_forecaster_that_is_right_takes_over():
    rng = np.random.default_rng(0)
    combination = Combination((1, 2, 3), [Oracle()])
    for _ in range(60):
        load = rng.uniform(0, 100)
        run([load, 100.0 - load] * 4, combination)

    errors_kh, error_h = combination.errors()
    assert error_h[0] < 1.4 * errors_kh[-1, 0]


def test_combination_is_hardly_worse_than_the_last_value_where_nothing_can_be_known():
    values = np.random.default_rng(0).normal(size=1500).cumsum()
    combination = Combination(STEPS)
    run(values, combination)

    errors_kh, error_h = combination.errors()
    assert (error_h < 1.04 * errors_kh[0]).all()


def test_combination_is_far_better_where_the_metric_is_noise_around_a_level():
    combination = Combination(STEPS)
    run(np.random.default_rng(0).normal(50, 1, size=700), combination)

    errors_kh, error_h = combination.errors()
    # The mean's error against the last value's is 1 to the root of 2.
    assert (error_h < 0.74 * errors_kh[0]).all()


def test_intervals_hold_their_coverage():
    rng = np.random.default_rng(0)
    combination = Combination(STEPS)
    run(rng.normal(size=1500) * (1 + 4 * (np.arange(1500) > 700)), combination)

    inside_80_h, inside_95_h = combination.coverage()
    assert (abs(inside_80_h - 0.80) < 0.04).all()
    assert (abs(inside_95_h - 0.95) < 0.03).all()


@pytest.mark.parametrize("steps", [(), (0, 1), (2, 1), (1, 1)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match="steps ahead"):
        Combination(steps)


def test_limits_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match="lower limit"):
        Combination(STEPS, lower=1.0, upper=1.0)


def test_the_newest_rows_make_the_next_steps_better_known():
    walk_tr = np.random.default_rng(0).normal(size=(600, 5)).cumsum().reshape(600, 5)
    values_t, rows_t = walk_tr.mean(axis=1), walk_tr[:, -1]
    error, error_with_rows = (
        np.nanmean(np.abs(record.yhat_th - record.actual_th)[300:])
        for record in (replay(values_t, Combination([1]), rows) for rows in (None, rows_t))
    )
    assert error_with_rows < 0.85 * error
