"""Rows to steps, runs, parts and sequences, in numpy alone.

Shapes: t rows, s steps, f columns, n sequences, r runs. Times are nanoseconds since 1970-01-01
UTC. A *run* is a stretch of consecutive steps in which every column has a value; a *gap* ends it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from icos_fl_processor.errors import StepTooShort

Times = NDArray[np.int64]
Values = NDArray[np.float64]
Rows32 = NDArray[np.float32]

DRIFT_SHARE_MAX = 0.05
"""How much further apart than a step rows may be. Probes that run late by this much leave one step
in twenty empty; that is clock drift, and more would be a step too short for the rows."""

_ROWS_MAX = 2**53
"""No window holds so many; it keeps numbers about absurd requests finite."""

_CONSTANT_SHARE = 1e-12
"""A deviation below this share of the largest value is what rounding makes of a constant column."""


@dataclass(frozen=True)
class Steps:
    """The full steps of a regular grid, oldest first."""

    interval_ns: int
    """Length of a step; 0 where fewer than two rows leave it unknown."""
    distance_ns: int
    """Median distance of rows, of the column where it is longest; 0 with fewer than two rows."""
    times_ns_s: Times
    values_sf: Values
    """Without NaN."""
    run_starts_r: NDArray[np.int64]
    """Index of the first step of each run."""

    def __len__(self) -> int:
        return len(self.times_ns_s)

    @property
    def runs(self) -> list[range]:
        """The step indices of each run, oldest first."""
        bounds = [*self.run_starts_r.tolist(), len(self)]
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Normalisation:
    """Statistics of the columns, over the training part."""

    mean_f: Values
    deviation_f: Values
    """Standard deviation; 1 where the column is constant."""


def row_distance_ns(times_ns_t: Times, values_tf: Values) -> int:
    """Median distance of a column's values, of the column where it is longest; 0 if unknown.

    Of an even number of distances the lower of the two in the middle: a distance that is there, and
    a single missing row among three or four does not make it longer.
    """
    distances = [0]
    absent_tf = np.isnan(values_tf)
    absent_ft = absent_tf.T if absent_tf.any() else absent_tf.T[:1]  # whole columns are alike
    for absent_t in absent_ft:
        times = times_ns_t[~absent_t]
        if len(times) > 1:
            distances.append(int(np.quantile(np.diff(times), 0.5, method="lower")))
    return max(distances)


def resample(times_ns_t: Times, values_tf: Values, interval_ns: int = 0) -> Steps:
    """The mean of the rows in each step, without the steps in which a column has no value.

    NaN is no value. *interval_ns* 0 takes the median distance of rows. The grid is laid so that the
    newest row stands half a row distance before the end of its step: then rows that jitter stay in
    their steps, and the newest step is a whole one. A step's time is that of the newest row that it
    would regularly have, so with one row a step it is the row's own.

    A step without a value ends a run, with one exception. Probes that run a little late (every
    15.02 s on steps of 15 s) skip a step every 750 although no row is missing. So where two
    neighbouring values are less than two steps apart, the one empty step between them takes the
    linear interpolation between them at its middle.

    Raises StepTooShort where rows are further apart than a step by more than DRIFT_SHARE_MAX.
    """
    some_t = ~np.isnan(values_tf).all(axis=1)
    times, values = times_ns_t[some_t], values_tf[some_t]
    distance = row_distance_ns(times, values)
    if interval_ns and distance > interval_ns * (1 + DRIFT_SHARE_MAX):
        raise StepTooShort(interval_ns, distance)
    interval = interval_ns or distance
    if not len(times):
        return _steps(interval, distance, times, values, np.empty(0, np.int64))

    length = max(1, interval)
    half = max(1, min(distance or length, length) // 2)
    newest = times[-1]
    index_t = (times - newest + length - half) // length
    middle = newest + half - length / 2

    present = ~np.isnan(values)
    first = np.flatnonzero(np.diff(index_t, prepend=index_t[0] - 1))
    index_s = index_t[first]
    means_sf = values
    if len(first) < len(values):
        counts = np.add.reduceat(present.astype(np.int64), first)
        sums = np.add.reduceat(np.where(present, values, 0.0), first)
        with np.errstate(invalid="ignore"):
            means_sf = sums / counts

    if not present.all() or (np.diff(index_s) > 1).any():
        late = [
            _late_steps(times[has], index_t[has], column[has], length, middle)
            for has, column in zip(present.T, values.T, strict=True)
        ]
        if any(len(index) for index, _ in late):
            index_s, means_sf = _with_late_steps(index_s, means_sf, late)
        full = ~np.isnan(means_sf).any(axis=1)
        index_s, means_sf = index_s[full], means_sf[full]
    return _steps(interval, distance, newest + index_s * length, means_sf, index_s)


def _late_steps(
    times: Times, index: Times, values: Values, length: int, middle: float
) -> tuple[Times, Values]:
    """The empty steps of one column that clock drift explains, and their values."""
    late = np.flatnonzero((np.diff(index) == 2) & (np.diff(times) < 2 * length))
    skipped = index[late] + 1
    since_row = middle - times[late] + skipped * length
    share = since_row / (times[late + 1] - times[late])
    return skipped, values[late] * (1 - share) + values[late + 1] * share


def _with_late_steps(
    index_s: Times, values_sf: Values, late: list[tuple[Times, Values]]
) -> tuple[Times, Values]:
    all_s = np.unique(np.concatenate([index_s, *(index for index, _ in late)]))
    filled_sf = np.full((len(all_s), values_sf.shape[1]), np.nan)
    filled_sf[np.searchsorted(all_s, index_s)] = values_sf
    for column, (index, value) in enumerate(late):
        filled_sf[np.searchsorted(all_s, index), column] = value
    return all_s, filled_sf


def _steps(
    interval: int, distance: int, times: Times, values: Values, index_s: NDArray[np.int64]
) -> Steps:
    starts = np.flatnonzero(np.diff(index_s) != 1) + 1
    if len(index_s):
        starts = np.concatenate([[0], starts])
    return Steps(interval, distance, times, values, starts.astype(np.int64))


def train_steps(steps: int, train_fraction: float) -> int:
    """How many of *steps*, oldest first, are for training: the whole steps of that share."""
    return math.floor(steps * train_fraction + 1e-9)


def parts(runs: list[range], border: int) -> tuple[list[range], list[range]]:
    """The runs before step *border* and those from it on; a run across it becomes one in each."""
    before = [range(run.start, min(run.stop, border)) for run in runs if run.start < border]
    after = [range(max(run.start, border), run.stop) for run in runs if run.stop > border]
    return before, after


def sequence_count(runs: list[range], lookback: int, horizon: int) -> int:
    """How many sequences can be cut from *runs*, none across a gap."""
    return sum(max(0, len(run) - lookback - horizon + 1) for run in runs)


def statistics(values_sf: Values) -> Normalisation:
    """Mean and standard deviation (of the population) of each column; at least one step.

    A column of very large numbers gives an infinite or NaN statistic, which the caller refuses.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # Along contiguous memory numpy sums in pairs: faster, and with a smaller rounding error.
        values_fs = np.ascontiguousarray(values_sf.T)
        mean_f = values_fs.mean(axis=1)
        deviation_f = values_fs.std(axis=1)
    constant = deviation_f <= np.abs(values_fs).max(axis=1) * _CONSTANT_SHARE
    return Normalisation(mean_f, np.where(constant, 1.0, deviation_f))


def normalise(values_sf: Values, by: Normalisation) -> Rows32:
    """(value - mean) / deviation, computed in float64."""
    rows_sf = np.empty(values_sf.shape, np.float32)
    for place, (mean, deviation) in enumerate(zip(by.mean_f, by.deviation_f, strict=True)):
        rows_sf[:, place] = (values_sf[:, place] - mean) / deviation  # long loops, not short ones
    return rows_sf


def denormalise(rows_sf: NDArray[np.floating], by: Normalisation) -> Values:
    """Normalised values back in the columns' units."""
    return rows_sf.astype(np.float64) * by.deviation_f + by.mean_f


def sliding_windows(
    rows_tf: NDArray[np.floating], lookback: int, horizon: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Every *lookback* rows and the *horizon* rows after them, oldest first.

    Two views on *rows_tf*, of shape (n, lookback, f) and (n, horizon, f), without a copy; n is 0
    where there are too few rows for a sequence.
    """
    length = lookback + horizon
    if len(rows_tf) < length:
        columns = rows_tf.shape[1]
        return np.empty((0, lookback, columns), rows_tf.dtype), np.empty(
            (0, horizon, columns), rows_tf.dtype
        )
    windows_ntf = sliding_window_view(rows_tf, length, axis=0).swapaxes(1, 2)
    return windows_ntf[:, :lookback], windows_ntf[:, lookback:]


def chunks(run: range, length: int, rows_max: int) -> Iterator[range]:
    """*run* in stretches of at most *rows_max* steps, but at least the *length* of a sequence.

    Each begins with the *length* - 1 steps that the one before ended with, so that cutting them
    apart gives each sequence of the run once. Nothing where the run is shorter than a sequence.
    """
    size = max(rows_max, length)
    for start in range(run.start, run.stop - length + 1, size - length + 1):
        yield range(start, min(start + size, run.stop))


def missing_rows(
    steps: Steps, length: int, train_fraction: float, capacity_rows: int
) -> tuple[int, int]:
    """Rows until the first training sequence of *length* steps, and rows that the window must hold.

    Supposes that rows go on without a gap at their own distance (a row a step while unknown).
    New rows move the border between the parts on, and old ones leave a window that is full. The
    second number is above *capacity_rows* where there can never be a sequence; the first then
    counts what is missing to the second. Neither is above _ROWS_MAX.
    """
    rows_a_step = steps.interval_ns / steps.distance_ns if steps.distance_ns else 1.0
    capacity_steps = math.floor(capacity_rows / rows_a_step + 1e-9)
    least_steps = _steps_for(length, train_fraction)
    least_rows = _whole_rows(least_steps * rows_a_step)
    count = len(steps)
    if least_steps > capacity_steps:
        missing = max(1, least_steps - count)
    else:
        # The first run that is long enough, or the newest, which grows.
        starts = [run.start for run in steps.runs[:-1] if len(run) >= length]
        starts.append(steps.runs[-1].start if steps.runs else 0)
        end = min(starts) + length
        needed = _steps_for(end, train_fraction)
        missing = max(0, needed - count)
        if needed > capacity_steps:
            leaving = end - train_steps(capacity_steps, train_fraction)
            missing = max(0, capacity_steps - count) + leaving
    return _whole_rows(missing * rows_a_step), least_rows


def _whole_rows(rows: float) -> int:
    return min(math.ceil(min(rows, _ROWS_MAX) - 1e-9), _ROWS_MAX)


def _steps_for(border: int, train_fraction: float) -> int:
    """The fewest steps of which the training part has *border*."""
    steps = math.ceil(min(border / train_fraction, _ROWS_MAX) - 1e-6)
    return steps if train_steps(steps, train_fraction) >= border else steps + 1
