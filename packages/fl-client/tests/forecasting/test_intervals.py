import numpy as np
from icos_fl_client.forecasting.intervals import LEVEL_STEP, LEVELS, Intervals

NOTHING = np.full((2, 4, 1), np.nan), np.full((4, 1), np.nan)
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
    _, quantile_qh = taught(np.arange(20) - 9.5).quantiles(YHAT, SPREAD)

    assert quantile_qh[:, 0].round(9).tolist() == [90.5, 91.6, 108.4, 109.5]


def test_too_few_errors_give_no_interval():
    assert np.isnan(taught(np.arange(19.0)).quantiles(YHAT, SPREAD)[1]).all()


def test_interval_reaches_to_the_forecast_where_all_errors_are_on_one_side():
    _, quantile_qh = taught([5.0] * 20).quantiles(YHAT, SPREAD)

    assert quantile_qh[:, 0].tolist() == [100.0, 100.0, 105.0, 105.0]


def test_errors_count_in_spreads_of_their_time():
    intervals = Intervals(2, 1)
    for error in np.arange(20) - 9.5:
        intervals.learn(
            np.full((4, 4, 1), np.nan), NOTHING[1], YHAT, np.array([[1.0], [0.5]]), YHAT + error
        )
    quantile_aqh, _ = intervals.quantiles(YHAT, np.array([[1.0], [2.0]]))

    assert quantile_aqh[:, 1, 0].round(9).tolist() == [91.6, 91.6, 66.4, 66.4]


def test_levels_move_towards_what_came():
    intervals = taught(np.arange(20) - 9.5)
    intervals.learn(*intervals.quantiles(YHAT, SPREAD), YHAT, SPREAD, YHAT + 50)

    # It came above all four quantiles, so each level rises by a step times the level itself.
    expected = [level * (1 + LEVEL_STEP) for level in LEVELS]
    assert np.allclose(expected, intervals.level_qh[:, 0], rtol=1e-12)


def test_coverage_comes_back_after_errors_have_grown():
    rng = np.random.default_rng(0)
    intervals, inside = Intervals(1, 1), []
    for step in range(3000):
        quantile_aqh, mixed_qh = intervals.quantiles(YHAT, SPREAD)
        actual_h = YHAT + rng.normal(size=1) * (1 if step < 1000 else 10)
        inside.append(mixed_qh[1] <= actual_h <= mixed_qh[2])
        intervals.learn(quantile_aqh, mixed_qh, YHAT, SPREAD, actual_h)

    assert abs(np.mean(inside[1500:]) - 0.8) < 0.03
