"""Intervals know finished errors alone; a backtest's figures are those of its forecasts."""

import numpy as np
import pytest
import torch
from icos_fl_client import forecasts
from icos_fl_client.forecasts import ERRORS_MAX, ERRORS_MIN, Run, backtest, recent_errors
from torch import nn

SHAPE = {"lookback": 4, "horizon": 3}


class Repeat(nn.Module):
    def forward(self, x_blf: torch.Tensor) -> torch.Tensor:
        return x_blf[:, -1:, 0].expand(-1, 3)


def run(start: int, values: np.ndarray) -> Run:
    return Run(start, values.astype(np.float32)[:, None])


def noise(count: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, count)


def test_a_backtest_gives_the_errors_of_every_origin():
    # One window, [0, 2, 4, 6], followed by 8, 7 and 6: the last value is off by 2, 1 and 0, the
    # mean of the window by 5, 4 and 3.
    result = backtest(
        Repeat(), [], [run(0, np.array([0, 2, 4, 6, 8, 7, 6]))], lookback=4, horizon=3
    )

    assert (result.origins, result.values) == (1, 3)
    assert result.mae_h == pytest.approx([2, 1, 0])
    assert result.last_value_mae_h == pytest.approx([2, 1, 0])
    assert result.window_mean_mae_h == pytest.approx([5, 4, 3])


def test_runs_that_are_too_short_have_no_origin():
    result = backtest(Repeat(), [], [run(0, noise(6)), run(50, noise(6))], **SHAPE)

    assert result.origins == 0
    assert result.example is None
    assert np.isnan(result.mae_h).all()


def test_intervals_cover_about_as_much_as_they_say():
    result = backtest(Repeat(), [run(0, noise(500))], [run(500, noise(2000, seed=1))], **SHAPE)

    assert 0.75 < result.coverage_80 < 0.85
    assert 0.92 < result.coverage_95 < 0.98


def test_the_example_is_the_newest_origin():
    result = backtest(
        Repeat(), [run(0, noise(100))], [run(100, noise(20)), run(130, np.arange(9.0))], **SHAPE
    )

    assert result.example.start == 136
    assert result.example.window_l.tolist() == [2, 3, 4, 5]
    assert result.example.actual_h.tolist() == [6, 7, 8]
    assert result.example.forecast.yhat_h.tolist() == [5, 5, 5]


def test_an_error_that_has_not_finished_moves_no_interval():
    # At the last origin its own errors and those of the two origins before are not known yet.
    training, calm = run(0, noise(100)), noise(40, seed=1)
    stormy = calm.copy()
    stormy[-3:] += 1000.0

    before = backtest(Repeat(), [training], [run(100, calm)], **SHAPE).example.forecast
    after = backtest(Repeat(), [training], [run(100, stormy)], **SHAPE).example.forecast

    assert np.array_equal(before.lower_95_h, after.lower_95_h)
    assert np.array_equal(before.upper_95_h, after.upper_95_h)


def test_an_error_that_has_finished_moves_the_interval():
    training, calm = run(0, noise(100)), noise(40, seed=1)
    stormy = calm.copy()
    stormy[8:30:4] += 100.0

    before = backtest(Repeat(), [training], [run(100, calm)], **SHAPE).example.forecast
    after = backtest(Repeat(), [training], [run(100, stormy)], **SHAPE).example.forecast

    assert (1.5 * before.upper_95_h < after.upper_95_h).all()


@pytest.mark.parametrize(
    ("next_start", "known"),
    [
        (ERRORS_MIN + 6, True),  # behind the first run: the last of its errors has just come
        (ERRORS_MIN + 5, False),  # one step earlier it has not
    ],
)
def test_what_is_finished_is_decided_by_time(next_start, known):
    # ERRORS_MIN origins, at steps 3 to ERRORS_MIN + 2: the last finishes at ERRORS_MIN + 5. The
    # second run has one origin, at its start + 3, that knows those which have finished by then.
    first, second = run(0, noise(ERRORS_MIN + 6)), run(next_start - 4, noise(7))

    result = backtest(Repeat(), [first], [second], **SHAPE)

    assert known == bool(np.isfinite(result.example.forecast.upper_80_h).all())


def test_too_few_errors_give_no_interval():
    model = Repeat()
    errors = recent_errors(model, [run(0, noise(ERRORS_MIN + 5))], **SHAPE)

    forecast = forecasts.forecast(model, np.ones((4, 1), np.float32), errors)

    assert errors.scaled_nh.shape == (ERRORS_MIN - 1, 3)
    assert forecast.yhat_h.tolist() == [1, 1, 1]
    assert np.isnan(forecast.upper_80_h).all()


def test_recent_errors_are_the_newest():
    runs = [run(2000, noise(100)), run(0, noise(1000, seed=1, spread=50.0))]

    errors = recent_errors(Repeat(), runs, **SHAPE)

    assert errors.scaled_nh.shape == (ERRORS_MAX, 3)
    alone = recent_errors(Repeat(), runs[:1], **SHAPE)
    ratio = errors.scaled_nh[-94:] / alone.scaled_nh
    assert ratio.std(axis=1).max() == pytest.approx(0, abs=1e-9)


def test_a_livelier_window_has_wider_intervals():
    model = Repeat()
    errors = recent_errors(model, [run(0, noise(200))], **SHAPE)

    calm = forecasts.forecast(model, noise(4, 1, 0.1).astype(np.float32)[:, None], errors)
    lively = forecasts.forecast(model, noise(4, 1, 10.0).astype(np.float32)[:, None], errors)

    assert (calm.upper_80_h - calm.lower_80_h < lively.upper_80_h - lively.lower_80_h).all()


def test_the_95_interval_holds_the_80_interval():
    model = Repeat()
    errors = recent_errors(model, [run(0, noise(200))], **SHAPE)

    f = forecasts.forecast(model, np.zeros((4, 1), np.float32), errors)

    assert (f.lower_95_h <= f.lower_80_h).all()
    assert (f.lower_80_h <= f.upper_80_h).all()
    assert (f.upper_80_h <= f.upper_95_h).all()


def test_a_forecast_from_now_is_that_of_the_backtest():
    model = Repeat()
    training, validation = run(0, noise(100)), noise(60, seed=1)
    then = backtest(model, [training], [run(100, validation)], **SHAPE).example.forecast

    # What the last origin knew: everything before its own horizon.
    errors = recent_errors(model, [run(100, validation[:-3])], **SHAPE)
    window = validation[-7:-3].astype(np.float32)[:, None]
    now = forecasts.forecast(model, window, errors)

    assert np.allclose(then.yhat_h, now.yhat_h)
    assert np.isfinite(now.upper_80_h).all()
