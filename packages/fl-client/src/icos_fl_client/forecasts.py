"""Forecasts with intervals, and what they would have been worth. Arrays in, arrays out.

Shapes: n origins (moments at which a forecast starts), l steps of input, h steps to forecast, f
columns, q quantiles. Values are z-scores; column 0 is the metric itself.

Intervals are those of the node's own newest finished forecasts: the error at each step ahead,
divided by how much the window moved, at the quantiles that the interval asks for. An error counts
from the moment at which its whole horizon had come, so no interval knows of its own future.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from icos_fl_client.training import EVALUATION_BATCH_SIZE, SequenceDataset

Array = NDArray[np.float64]

ERRORS_MAX = 400
"""Finished forecasts that intervals are made of: the newest."""
ERRORS_MIN = 20
"""Fewer finished forecasts than this give no interval."""
# A calm window may be followed by a lively one, so part of the spread is the node's usual one.
USUAL_SPREAD_SHARE = 0.3
SPREAD_MIN = 1e-3
LEVELS_Q = np.array([0.025, 0.10, 0.90, 0.975])
ORIGINS_A_BLOCK = 256


@dataclass(frozen=True)
class Run:
    """Consecutive steps of a node, without a gap."""

    start: int
    """Number of the first step, counted on a grid that all runs share."""
    values_tf: NDArray[np.float32]


@dataclass(frozen=True)
class Errors:
    """Finished forecasts of one model on one node, in the order in which they finished."""

    scaled_nh: Array
    """What came minus what was forecast, divided by the spread at the origin."""
    usual_spread: float
    """Median spread of the windows that these errors are of."""


@dataclass(frozen=True)
class Forecast:
    """Values for each step ahead, (h,); NaN in the intervals where too few errors are known."""

    yhat_h: Array
    lower_80_h: Array
    upper_80_h: Array
    lower_95_h: Array
    upper_95_h: Array


@dataclass(frozen=True)
class Example:
    """One origin of a backtest, to look at."""

    start: int
    """Number of the first forecast step, as in ``Run.start``."""
    window_l: Array
    forecast: Forecast
    actual_h: Array


@dataclass(frozen=True)
class Backtest:
    """Errors over every origin of the validation runs; NaN where there is none."""

    origins: int
    values: int
    """Forecast values that were compared, that is, origins times horizon."""
    mae_h: Array
    """Mean absolute error by step ahead."""
    last_value_mae_h: Array
    """That of repeating the last value."""
    window_mean_mae_h: Array
    """That of repeating the mean of the window."""
    coverage_80: float
    """Share of the values that came inside the 80 % interval, over origins that had one."""
    coverage_95: float
    example: Example | None
    """The newest origin."""


def recent_errors(
    model: nn.Module,
    runs: Sequence[Run],
    *,
    lookback: int,
    horizon: int,
    device: torch.device | str = "cpu",
) -> Errors:
    """The newest finished forecasts that *model* would have made on *runs*."""
    origins = _forecast_all(model, _newest(runs, lookback + horizon), lookback, horizon, device)
    usual = _usual_spread(origins.spread_n)
    scaled_nh = origins.errors_nh / _scale(origins.spread_n, usual)[:, None]
    return Errors(scaled_nh[-ERRORS_MAX:], usual)


def forecast(
    model: nn.Module,
    window_lf: NDArray[np.float32],
    errors: Errors,
    *,
    device: torch.device | str = "cpu",
) -> Forecast:
    """Forecast what follows *window_lf* (l, f), with intervals from *errors*."""
    yhat_h = predict(model, window_lf[None], device)[0]
    scale = _scale(_spread(window_lf[None, :, 0].astype(np.float64)), errors.usual_spread)
    return _intervals(yhat_h, _quantiles(errors.scaled_nh[None], len(yhat_h))[0] * scale)


def backtest(
    model: nn.Module,
    runs_train: Sequence[Run],
    runs_validation: Sequence[Run],
    *,
    lookback: int,
    horizon: int,
    device: torch.device | str = "cpu",
) -> Backtest:
    """Forecast from every origin of the validation runs, as if it were now.

    The intervals at an origin come from forecasts whose whole horizon had come by then: those of
    the newest training sequences at first, then more and more of the validation part itself.
    """
    warm = _forecast_all(model, _newest(runs_train, lookback + horizon), lookback, horizon, device)
    here = _forecast_all(model, runs_validation, lookback, horizon, device)
    count = len(here.last_step_n)
    if not count:
        nan_h = np.full(horizon, np.nan)
        return Backtest(0, 0, nan_h, nan_h, nan_h, math.nan, math.nan, None)
    usual = _usual_spread(warm.spread_n if len(warm.spread_n) else here.spread_n[:ERRORS_MIN])
    scale_n = _scale(np.concatenate([warm.spread_n, here.spread_n]), usual)
    scaled_nh = np.concatenate([warm.errors_nh, here.errors_nh]) / scale_n[:, None]
    finished_n = np.concatenate([warm.last_step_n, here.last_step_n]) + horizon
    known_n = np.searchsorted(finished_n, here.last_step_n, side="right")
    bounds_nqh = np.concatenate(
        [
            _known_quantiles(scaled_nh, known_n[i : i + ORIGINS_A_BLOCK], horizon)
            for i in range(0, count, ORIGINS_A_BLOCK)
        ]
    )
    bounds_nqh *= scale_n[-count:, None, None]
    inside = [_covered(here.errors_nh, bounds_nqh, low, 3 - low) for low in (1, 0)]
    naive_nh = here.actual_nh - here.window_nl[:, -1:]
    mean_nh = here.actual_nh - here.window_nl.mean(axis=1, keepdims=True)
    yhat_h = here.actual_nh[-1] - here.errors_nh[-1]
    return Backtest(
        origins=count,
        values=count * horizon,
        mae_h=np.abs(here.errors_nh).mean(axis=0),
        last_value_mae_h=np.abs(naive_nh).mean(axis=0),
        window_mean_mae_h=np.abs(mean_nh).mean(axis=0),
        coverage_80=inside[0],
        coverage_95=inside[1],
        example=Example(
            start=int(here.last_step_n[-1]) + 1,
            window_l=here.window_nl[-1],
            forecast=_intervals(yhat_h, bounds_nqh[-1]),
            actual_h=here.actual_nh[-1],
        ),
    )


@dataclass(frozen=True)
class _Origins:
    """Forecasts from every origin of some runs, oldest first."""

    last_step_n: NDArray[np.int64]
    window_nl: Array
    actual_nh: Array
    errors_nh: Array
    spread_n: Array


def _forecast_all(
    model: nn.Module,
    runs: Sequence[Run],
    lookback: int,
    horizon: int,
    device: torch.device | str,
) -> _Origins:
    ordered = sorted(runs, key=lambda run: run.start)
    steps = [
        run.start + np.arange(lookback - 1, len(run.values_tf) - horizon, dtype=np.int64)
        for run in ordered
        if len(run.values_tf) >= lookback + horizon
    ]
    data = SequenceDataset(
        [run.values_tf for run in ordered], lookback=lookback, horizon=horizon, device=device
    )
    windows, actuals, forecasts = [np.zeros((0, lookback))], [np.zeros((0, horizon))], []
    model.to(device).eval()
    with torch.inference_mode():
        for x_blf, y_bh in data.loader(EVALUATION_BATCH_SIZE) if len(data) else ():
            windows.append(x_blf[:, :, 0].cpu().numpy().astype(np.float64))
            actuals.append(y_bh.cpu().numpy().astype(np.float64))
            forecasts.append(model(x_blf).cpu().numpy().astype(np.float64))
    window_nl, actual_nh = np.concatenate(windows), np.concatenate(actuals)
    yhat_nh = np.concatenate([np.zeros((0, horizon)), *forecasts])
    return _Origins(
        last_step_n=np.concatenate([np.zeros(0, np.int64), *steps]),
        window_nl=window_nl,
        actual_nh=actual_nh,
        errors_nh=actual_nh - yhat_nh,
        spread_n=_spread(window_nl),
    )


def _newest(runs: Sequence[Run], length: int) -> list[Run]:
    """The newest runs, and no more of them than hold ``ERRORS_MAX`` sequences."""
    chosen, missing = [], ERRORS_MAX
    for run in sorted(runs, key=lambda run: run.start, reverse=True):
        sequences = len(run.values_tf) - length + 1
        if missing <= 0:
            break
        if sequences > 0:
            skipped = max(0, sequences - missing)
            chosen.append(Run(run.start + skipped, run.values_tf[skipped:]))
            missing -= sequences
    return chosen


def predict(
    model: nn.Module, windows_blf: NDArray[np.float32], device: torch.device | str = "cpu"
) -> Array:
    """What follows each of b windows, (b, h)."""
    model.to(device).eval()
    with torch.inference_mode():
        yhat_bh = model(torch.tensor(windows_blf, dtype=torch.float32, device=device))
    return np.asarray(yhat_bh.cpu().numpy(), dtype=np.float64)


def _spread(window_nl: Array) -> Array:
    """Mean distance of a window's values from its last one, (n,)."""
    return np.asarray(np.abs(window_nl - window_nl[:, -1:]).mean(axis=1))


def _usual_spread(spread_n: Array) -> float:
    return float(np.median(spread_n)) if len(spread_n) else SPREAD_MIN


def _scale(spread_n: Array, usual: float) -> Array:
    mixed_n = (1 - USUAL_SPREAD_SHARE) * spread_n + USUAL_SPREAD_SHARE * usual
    return np.maximum(mixed_n, SPREAD_MIN)


def _known_quantiles(scaled_nh: Array, known_b: NDArray[np.int64], horizon: int) -> Array:
    """Quantiles (b, q, h) of the newest of the first ``known_b`` errors, for each of b origins."""
    bounds_bqh = np.full((len(known_b), len(LEVELS_Q), horizon), np.nan)
    for size in np.unique(np.minimum(known_b, ERRORS_MAX)):
        rows = np.flatnonzero(np.minimum(known_b, ERRORS_MAX) == size)
        chosen_bm = known_b[rows, None] - size + np.arange(size)
        bounds_bqh[rows] = _quantiles(scaled_nh[chosen_bm], horizon)
    return bounds_bqh


def _quantiles(scaled_bmh: Array, horizon: int) -> Array:
    """Quantiles (b, q, h) over the m errors of each of b origins; NaN for too few of them.

    Where all recent errors lie on one side, the interval still reaches to the forecast itself.
    """
    if scaled_bmh.shape[1] < ERRORS_MIN:
        return np.full((len(scaled_bmh), len(LEVELS_Q), horizon), np.nan)
    bounds_bqh = np.asarray(np.quantile(scaled_bmh, LEVELS_Q, axis=1)).transpose(1, 0, 2)
    below_q = (LEVELS_Q < 0.5)[:, None]
    return np.asarray(np.where(below_q, np.minimum(bounds_bqh, 0.0), np.maximum(bounds_bqh, 0.0)))


def _covered(errors_nh: Array, bounds_nqh: Array, low: int, high: int) -> float:
    known_nh = np.isfinite(bounds_nqh[:, low])
    inside_nh = (bounds_nqh[:, low] <= errors_nh) & (errors_nh <= bounds_nqh[:, high])
    return float(inside_nh[known_nh].mean()) if known_nh.any() else math.nan


def _intervals(yhat_h: Array, bounds_qh: Array) -> Forecast:
    low_95, low_80, high_80, high_95 = yhat_h + bounds_qh
    return Forecast(yhat_h, low_80, high_80, low_95, high_95)
