"""Recorded machines replayed into the combination that a node runs, and what it was worth.

Shapes: t steps, k forecasts, h steps ahead, q quantiles. Forecasts are scored that start after the
first CHOSEN_ON of a node's rows, since settings were chosen on those.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from icos_fl_client.forecasting import Anchors, Combination, backtest
from icos_fl_client.forecasting.backtest import winkler
from icos_fl_client.forecasting.history import GAP_STEPS_MAX
from icos_fl_client.forecasting.intervals import LEVELS
from icos_fl_local import traces
from icos_fl_processor.errors import StepTooShort
from icos_fl_processor.windows import Steps, resample
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Replay = backtest.Record
Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Figures = dict[str, Any]

METRICS = ("power_w", "cpu_percent", "memory_available_mib", "memory_used_mib")
CHOSEN_ON = 0.4
SLICE, SLICE_STRIDE = 0.3, 0.05
STEPS_MIN = 500
LAST_ERRORS = 200


@dataclass(frozen=True)
class Task:
    """A grid and a horizon, and what the ratios over 60 % must be at most."""

    name: str
    interval_s: int
    steps: int
    median_max: float
    worst_max: float
    memory_counts: bool
    interval_s_min: float = 0.0
    """Only for traces whose rows are at least so far apart."""

    def counts(self, metric: str) -> bool:
        """Whether the targets are about this metric."""
        return self.memory_counts or not metric.startswith("memory")


TASKS = (
    Task("15 s grid, 5 min", 15, 20, 0.90, 1.05, memory_counts=False),
    Task("15 s grid, 1 min", 15, 4, 0.95, 1.04, memory_counts=False),
    Task("4 s grid, 1 min", 4, 15, 0.90, 1.03, memory_counts=True),
    Task("300 s grid, 1 h", 300, 12, 0.75, 0.90, memory_counts=True, interval_s_min=60),
)


@dataclass(frozen=True)
class Series:
    """One metric of one node on a grid; NaN for a step without a value."""

    node: str
    metric: str
    values_t: Array
    rows_t: Array
    """The newest row of each step."""
    time_s_t: Array
    """NaN where there is no value."""

    @property
    def limits(self) -> tuple[float, float]:
        """As for the forecasts of ``icos-fl-client``."""
        return 0.0, 100.0 if self.metric.endswith("_percent") else np.inf

    @property
    def row_share_t(self) -> Array:
        """Which share of the rows has come at each step."""
        rows_t = np.isfinite(self.values_t).cumsum()
        return np.asarray(rows_t / rows_t[-1])


def load_series(all_traces: list[traces.Trace], task: Task) -> Iterator[Series]:
    """The metrics of the traces that have enough of the task's steps."""
    for trace in all_traces:
        if trace.interval_seconds < task.interval_s_min:
            continue
        for metric in (name for name in METRICS if name in trace.columns):
            values_t = trace.values_tf[:, [trace.columns.index(metric)]]
            try:
                steps = resample(trace.times_s * 10**9, values_t, task.interval_s * 10**9)
            except StepTooShort:
                continue
            if len(steps) >= STEPS_MIN:
                rows_s = newest_rows(trace.times_s, values_t, steps)[:, 0]
                yield Series(trace.node, metric, *on_grid(steps, rows_s))


def newest_rows(time_s_t: NDArray[np.int64], values_tf: Array, steps: Steps) -> Array:
    """The newest row of each step (s, f)."""
    half_ns = min(steps.distance_ns, steps.interval_ns) // 2
    return values_tf[np.searchsorted(time_s_t * 10**9 - half_ns, steps.times_ns_s) - 1]


def on_grid(steps: Steps, rows_s: Array) -> tuple[Array, Array, Array]:
    """Values, newest rows, and times in seconds; NaN for a step that is not there.

    A long gap is as long as it must be to end a run.
    """
    ahead_s = np.diff(steps.times_ns_s) // steps.interval_ns
    place_s = np.concatenate([[0], np.clip(ahead_s, 1, GAP_STEPS_MAX + 2).cumsum()])
    found_ct = np.full((3, place_s[-1] + 1), np.nan)
    found_ct[:, place_s] = steps.values_sf[:, 0], rows_s, steps.times_ns_s / 1e9
    return found_ct[0], found_ct[1], found_ct[2]


def replay(series: Series, steps: int) -> Replay:
    lower, upper = series.limits
    combination = Combination(range(1, steps + 1), lower=lower, upper=upper)
    return backtest.replay(series.values_t, combination, series.rows_t)


def errors(series: Series, found: Replay, said_th: Array, steps: int) -> Figures:
    """How far the first *steps* of a forecast were off, as ratios to repeating the last value."""
    actual_th, share_t = found.actual_th[:, :steps], series.row_share_t
    error_th = np.abs(said_th[:, :steps] - actual_th)
    naive_th = np.abs(found.said_tkh[:, 0, :steps] - actual_th)
    # A forecaster that is silent repeats the last value.
    error_th = np.where(np.isnan(error_th), naive_th, error_th)

    def ratio(part_t: Bools, ahead: slice = slice(None)) -> float:
        return float(np.nansum(error_th[part_t, ahead]) / np.nansum(naive_th[part_t, ahead]))

    starts = np.arange(CHOSEN_ON, 1 - SLICE + 1e-9, SLICE_STRIDE)
    by_slice = {
        f"{start:.2f}": ratio((share_t > start) & (share_t <= start + SLICE)) for start in starts
    }
    return {
        "ratio": ratio(share_t > CHOSEN_ON),
        "ratio_of_the_last_step": ratio(share_t > CHOSEN_ON, slice(-1, None)),
        "ratio_by_slice": by_slice,
        "ratio_of_the_worst_slice": max(by_slice.values()),
    }


def score(series: Series, found: Replay, steps: int) -> Figures:
    """All figures of the first *steps* of a replay."""
    scored_t = series.row_share_t > CHOSEN_ON
    simple = {
        name: errors(series, found, found.said_tkh[:, place], steps)["ratio"]
        for place, name in enumerate(Anchors.names)
    }
    best = min(simple, key=lambda name: simple[name])
    return {
        "node": series.node,
        "metric": series.metric,
        "origins": int(np.isfinite(found.actual_th[scored_t, :steps]).any(axis=1).sum()),
        **errors(series, found, found.yhat_th, steps),
        "best_simple": best,
        "best_simple_ratio": simple[best],
        **interval_figures(found.quantile_tqh[scored_t, :, :steps], found, scored_t, steps),
    }


def interval_figures(quantile_tqh: Array, found: Replay, scored_t: Bools, steps: int) -> Figures:
    actual_th = found.actual_th[:, :steps]
    last_tqh = last_value_intervals(found.said_tkh[:, 0, :steps], actual_th)[scored_t]
    actual_th = actual_th[scored_t]
    known_th = np.isfinite(actual_th + quantile_tqh[:, 0] + last_tqh[:, 0])
    figures = {}
    for percent, low, high in ((80, 1, 2), (95, 0, 3)):
        inside_th = (quantile_tqh[:, low] <= actual_th) & (actual_th <= quantile_tqh[:, high])
        ours, last = (
            winkler(actual_th, each[:, low], each[:, high], 1 - percent / 100)[known_th].mean()
            for each in (quantile_tqh, last_tqh)
        )
        figures[f"coverage_{percent}"] = float(inside_th[known_th].mean())
        figures[f"winkler_ratio_{percent}"] = float(ours / last)
    return figures


def last_value_intervals(last_th: Array, actual_th: Array) -> Array:
    """Quantiles (t, q, h) of the newest LAST_ERRORS finished errors, around the last value."""
    quantile_tqh = np.full((len(last_th), len(LEVELS), last_th.shape[1]), np.nan)
    for h, error_t in enumerate((actual_th - last_th).T):
        begun_n = np.flatnonzero(np.isfinite(error_t))
        known_t = np.searchsorted(begun_n + h + 1, np.arange(len(error_t)), side="right")
        if len(begun_n) <= LAST_ERRORS:
            continue
        windows = sliding_window_view(error_t[begun_n], LAST_ERRORS)
        of_windows_wq = np.quantile(windows, LEVELS, axis=1).T
        enough = np.flatnonzero(known_t >= LAST_ERRORS)
        quantile_tqh[enough, :, h] = (
            last_th[enough, h, None] + of_windows_wq[known_t[enough] - LAST_ERRORS]
        )
    return quantile_tqh
