import numpy as np
from icos_fl_client.forecasting.intervals import LEVELS, STRETCH_START, STRETCH_STEP, Intervals

NOTHING = np.full((2, 4, 1), np.nan), np.full((4, 1), np.nan), np.full((4, 1), np.nan)
NO_MEMORY = np.zeros((0, 4, 1))
SPREAD = np.ones((1, 1))
YHAT = np.array([100.0])


def taught(errors) -> Intervals:
    intervals = Intervals(1, 1)
    for error in errors:
        intervals.learn(*NOTHING, YHAT, SPREAD, YHAT + error)
    return intervals


def test_quantiles_are_those_of_the_errors_computed_by_hand():
    # Of the errors -9.5, -8.5, ..., 9.5 the quantile 0.1 stands at place 0.1 * 21 - 1 = 1.1; that
    # of 0.025 would stand before the first one.
    _, quantile_qh, _ = taught(np.arange(20) - 9.5).quantiles(YHAT, SPREAD, NO_MEMORY)

    assert quantile_qh[:, 0].round(9).tolist() == [90.5, 91.6, 108.4, 109.5]


def test_too_few_errors_give_no_interval():
    quantiles = taught(np.arange(19.0)).quantiles(YHAT, SPREAD, NO_MEMORY)
    assert all(np.isnan(each).all() for each in quantiles)


def test_interval_reaches_to_the_forecast_where_all_errors_are_on_one_side():
    _, quantile_qh, _ = taught([5.0] * 20).quantiles(YHAT, SPREAD, NO_MEMORY)

    assert quantile_qh[:, 0].tolist() == [100.0, 100.0, 105.0, 105.0]


def test_errors_count_in_spreads_of_their_time():
    intervals = Intervals(2, 1)
    for error in np.arange(20) - 9.5:
        intervals.learn(
            np.full((4, 4, 1), np.nan), *NOTHING[1:], YHAT, np.array([[1.0], [0.5]]), YHAT + error
        )
    quantile_aqh, _, _ = intervals.quantiles(YHAT, np.array([[1.0], [2.0]]), NO_MEMORY)

    assert quantile_aqh[:, 1, 0].round(9).tolist() == [91.6, 91.6, 66.4, 66.4]


def test_bounds_stretch_where_what_came_was_outside():
    intervals = taught(np.arange(20) - 9.5)
    intervals.learn(*intervals.quantiles(YHAT, SPREAD, NO_MEMORY), YHAT, SPREAD, YHAT + 50)

    # It came above all four quantiles: the lower two are further out than they need be, and the
    # upper two not far enough.
    moved = [-STRETCH_STEP * level if level < 0.5 else STRETCH_STEP * level for level in LEVELS]
    assert np.allclose(np.add(STRETCH_START, moved), intervals.stretch_qh[:, 0], rtol=1e-12)


def test_stretched_bounds_are_so_many_times_further_from_the_forecast():
    _, mixed_qh, stretched_qh = taught(np.arange(20) - 9.5).quantiles(YHAT, SPREAD, NO_MEMORY)

    expected = (mixed_qh[:, 0] - 100) * np.exp(STRETCH_START)
    assert np.allclose(expected, stretched_qh[:, 0] - 100, rtol=1e-12)


def test_memory_that_knows_what_comes_takes_over():
    rng = np.random.default_rng(0)
    intervals, widths = Intervals(1, 1, 1), []
    for _ in range(600):
        actual_h = YHAT + rng.choice([-9, 9], 1) + rng.uniform(-1, 1, 1)
        side = np.sign(actual_h - YHAT)
        recalled_aqh = (YHAT + 9 * side + np.array([-1.0, -0.8, 0.8, 1.0])[:, None])[None]
        said = intervals.quantiles(YHAT + 9 * side, SPREAD, recalled_aqh)
        widths.append(said[2][2] - said[2][1])
        intervals.learn(*said, YHAT + 9 * side, SPREAD, actual_h)

    assert abs(np.mean(widths[300:]) - 1.6) < 0.2


def test_memory_that_is_silent_leaves_it_to_the_errors():
    intervals = Intervals(1, 1, 1)
    for error in np.arange(20) - 9.5:
        intervals.learn(np.full((3, 4, 1), np.nan), *NOTHING[1:], YHAT, SPREAD, YHAT + error)
    _, quantile_qh, _ = intervals.quantiles(YHAT, SPREAD, np.full((1, 4, 1), np.nan))

    assert quantile_qh[:, 0].round(9).tolist() == [90.5, 91.6, 108.4, 109.5]


def test_coverage_comes_back_after_errors_have_grown():
    rng = np.random.default_rng(0)
    intervals, inside = Intervals(1, 1), []
    for step in range(3000):
        said = intervals.quantiles(YHAT, SPREAD, NO_MEMORY)
        actual_h = YHAT + rng.normal(size=1) * (1 if step < 1000 else 10)
        inside.append(said[2][1] <= actual_h <= said[2][2])
        intervals.learn(*said, YHAT, SPREAD, actual_h)

    assert abs(np.mean(inside[1500:]) - 0.8) < 0.03
