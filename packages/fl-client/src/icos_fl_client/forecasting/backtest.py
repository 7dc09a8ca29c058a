"""What the forecasts of one metric were worth: what was said, held against what came.

Shapes: t steps of a grid, oldest first; h steps ahead, k forecasters, q quantiles, n numbers of
steps. What is said at t knows the values up to t, and no later one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from icos_fl_client.forecasting.combination import Combination
from icos_fl_client.forecasting.forecasters import Steps
from icos_fl_client.forecasting.history import GAP_STEPS_MAX, Array, History
from icos_fl_client.forecasting.intervals import LEVELS

COMBINATION = "combination"
WINDOW_MEAN, WINDOW_STEPS = "window-mean", 40
"""As many as a model reads by default."""
SEASONAL_REPEAT, SEASON_SECONDS = "seasonal-repeat", 86_400
INTERVALS = {"80": (1, 2), "95": (0, 3)}
"""Places of their bounds in LEVELS, by percent."""


@dataclass(frozen=True)
class Record:
    """What was said of a metric at each step, and what the step had. NaN stands for none."""

    values_t: Array
    steps_h: Steps
    names: tuple[str, ...]
    """Of the k forecasters."""
    yhat_th: Array
    """What the combination said at t of the step that is h later."""
    quantile_tqh: Array
    """Its quantiles LEVELS."""
    said_tkh: Array
    """What each forecaster said."""

    @cached_property
    def actual_th(self) -> Array:
        """What came, h steps after t."""
        return actuals(self.values_t, self.steps_h)


@dataclass(frozen=True)
class Score:
    """One forecaster at one step ahead, over the origins of which something was said and came."""

    forecaster: str
    origins: int
    mae: float
    """Mean absolute error."""
    ratio: float
    """To that of repeating the last value at the same origins; NaN where that never errs."""


@dataclass(frozen=True)
class IntervalScore:
    """One interval of the combination at one step ahead; figures are means over its origins."""

    percent: str
    origins: int
    coverage: float
    width: float
    winkler: float
    """Winkler (1972): the width, and 2 / (1 - level) times what an interval was missed by."""


@dataclass(frozen=True)
class StepScores:
    """All about one step ahead."""

    step: int
    forecasters: tuple[Score, ...]
    """The combination, the baselines, then what is combined; without those that said nothing."""
    intervals: tuple[IntervalScore, ...]


def with_gaps(number_n: Steps, value_nc: Array, steps_max: int) -> tuple[Steps, Array]:
    """The numbers and the values (t, c) of all steps: NaN for those between that have none.

    Of a gap there are *steps_max* steps at most, so that it costs no more than it means.
    """
    steps_n = np.minimum(np.diff(number_n, append=number_n[-1:] + 1), steps_max + 1)
    number_t = np.repeat(number_n - np.cumsum(steps_n) + steps_n, steps_n)
    number_t += np.arange(len(number_t))
    values_tc = np.full((len(number_t), *value_nc.shape[1:]), np.nan)
    values_tc[np.searchsorted(number_t, number_n)] = value_nc
    return number_t, values_tc


def replay(values_t: Array, combination: Combination, rows_t: Array | None = None) -> Record:
    """What *combination*, to which nothing has been told yet, says step by step.

    *rows_t* are the newest rows of the steps, as ``Combination.update`` takes them.
    """
    rows_t = values_t if rows_t is None else rows_t
    shape = len(values_t), len(combination.steps_h)
    yhat_th = np.full(shape, np.nan)
    quantile_tqh = np.full((shape[0], len(LEVELS), shape[1]), np.nan)
    said_tkh = np.full((shape[0], len(combination.names), shape[1]), np.nan)
    for t, (value, row) in enumerate(zip(values_t, rows_t, strict=True)):
        said = combination.update(value, row)
        if said is not None:
            yhat_th[t], said_tkh[t] = said.yhat_h, said.by_forecaster_kh
            bounds = (said.lower_95_h, said.lower_80_h, said.upper_80_h, said.upper_95_h)
            quantile_tqh[t] = bounds
    names, steps_h = combination.names, combination.steps_h
    return Record(values_t, steps_h, names, yhat_th, quantile_tqh, said_tkh)


def actuals(values_t: Array, steps_h: Steps) -> Array:
    """What came (t, h); NaN where nothing did, and beyond a gap that ends a run."""
    ahead = int(steps_h[-1])
    padded_t = np.concatenate([values_t, np.full(max(ahead, GAP_STEPS_MAX), np.nan)])
    ended_t = np.zeros(len(padded_t), np.int64)
    windows_tl = sliding_window_view(np.isnan(padded_t), GAP_STEPS_MAX + 1)
    ended_t[GAP_STEPS_MAX:] = windows_tl.all(axis=1)
    ends_t = ended_t.cumsum()
    place_th = np.arange(len(values_t))[:, None] + steps_h
    crossed_th = ends_t[place_th] > ends_t[: len(values_t), None]
    return np.where(crossed_th | np.isnan(values_t)[:, None], np.nan, padded_t[place_th])


def baselines(record: Record, number_t: Steps, interval_s: float) -> dict[str, Array]:
    """What nobody needs a forecast service for (t, h); *number_t* counts steps of the grid.

    The mean of the newest WINDOW_STEPS, and the value that was a whole number of days before.
    """
    values_t, steps_h = record.values_t, record.steps_h
    history, mean_t = History(WINDOW_STEPS), np.full(len(values_t), np.nan)
    for t, value in enumerate(values_t):
        history.append(value)
        if np.isfinite(value):
            mean_t[t] = history.newest(WINDOW_STEPS).mean()
    season = max(1, round(SEASON_SECONDS / interval_s))
    wanted_th = number_t[:, None] + steps_h - season * -(-steps_h // season)
    place_th = np.searchsorted(number_t, wanted_th)
    repeat_th = np.where(number_t[place_th] == wanted_th, values_t[place_th], np.nan)
    repeat_th[np.isnan(values_t)] = np.nan
    return {
        WINDOW_MEAN: np.repeat(mean_t[:, None], len(steps_h), axis=1),
        SEASONAL_REPEAT: repeat_th,
    }


def score(record: Record, baselines: Mapping[str, Array]) -> list[StepScores]:
    """All that is told of a record, a step ahead an entry; without those of which nothing came."""
    said = {COMBINATION: record.yhat_th, **baselines}
    said |= {name: record.said_tkh[:, place] for place, name in enumerate(record.names)}
    found = []
    for place, step in enumerate(record.steps_h):
        actual_t = record.actual_th[:, place]
        naive_t = np.abs(record.values_t - actual_t)
        scores = [
            _score(name, np.abs(said_th[:, place] - actual_t), naive_t)
            for name, said_th in said.items()
            if np.isfinite(said_th[:, place] - actual_t).any()
        ]
        if scores:
            intervals = _intervals(record.quantile_tqh[:, :, place], actual_t)
            found.append(StepScores(int(step), tuple(scores), tuple(intervals)))
    return found


def _score(name: str, error_t: Array, naive_t: Array) -> Score:
    known_t = np.isfinite(error_t)
    mae, naive = float(error_t[known_t].mean()), float(naive_t[known_t].mean())
    return Score(name, int(known_t.sum()), mae, mae / naive if naive else np.nan)


def _intervals(quantile_tq: Array, actual_t: Array) -> Iterator[IntervalScore]:
    known_t = np.isfinite(quantile_tq.sum(axis=1) + actual_t)
    if not known_t.any():
        return
    actual_t, quantile_tq = actual_t[known_t], quantile_tq[known_t]
    for percent, (low, high) in INTERVALS.items():
        low_t, high_t = quantile_tq[:, low], quantile_tq[:, high]
        yield IntervalScore(
            percent=percent,
            origins=len(actual_t),
            coverage=float(((low_t <= actual_t) & (actual_t <= high_t)).mean()),
            width=float((high_t - low_t).mean()),
            winkler=float(winkler(actual_t, low_t, high_t, 1 - int(percent) / 100).mean()),
        )


def winkler(actual: Array, low: Array, high: Array, alpha: float) -> Array:
    """Winkler (1972): the width, and 2 / alpha times what an interval was missed by."""
    missed = np.maximum(low - actual, 0) + np.maximum(actual - high, 0)
    return np.asarray(high - low + 2 / alpha * missed)
