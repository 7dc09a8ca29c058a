"""The values of one metric as they come, to the means of a regular grid.

Shapes: t rows. Times are nanoseconds since 1970-01-01 UTC.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.history import Array

Times = NDArray[np.int64]

DISTANCES = 32
"""Of so many newest rows the median is the distance at which they come."""
DRIFT_SHARE_MAX = 0.05
"""So much further apart than a step rows may be: probes run late."""


class Step(NamedTuple):
    """A whole one, by its number on the grid."""

    number: int
    mean: float
    row: float
    """The newest one, of which the step has at least one."""


class Grid:
    """Steps of *interval_ns*. A step is whole as soon as the next row is due after its end.

    The first rows lay the grid: their newest one stands half a row distance before the end of its
    step, so that rows that jitter stay in their steps. What comes later than its step's end is left
    out, and so is a second value of a time.
    """

    def __init__(self, interval_ns: int) -> None:
        self.interval_ns = interval_ns
        self.distance_ns = 0
        """At which rows come; 0 before the second one."""
        self._origin_ns: int | None = None
        self._step = 0
        """The one that is being filled; those before are whole."""
        self._sum = self._row = 0.0
        self._count = 0
        self._times_ns_t = np.zeros(0, np.int64)

    @property
    def is_too_fine(self) -> bool:
        """Are rows further apart than a step?"""
        return self.distance_ns > self.interval_ns * (1 + DRIFT_SHARE_MAX)

    @property
    def last_time_ns(self) -> int | None:
        """Of the newest value; None before the first."""
        return int(self._times_ns_t[-1]) if len(self._times_ns_t) else None

    @property
    def due_ns(self) -> int | None:
        """Time of the earliest row that may make a step whole; None before there is a grid."""
        return None if self._origin_ns is None else self.end_ns(self._step) - self.distance_ns

    def end_ns(self, step: int) -> int:
        """When a step ends."""
        assert self._origin_ns is not None
        return self._origin_ns + (step + 1) * self.interval_ns

    def add(self, times_ns_t: Times, values_t: Array) -> Iterator[Step]:
        """Take values, oldest first, NaN for none; gives the steps that are whole now.

        Steps without a value are left out.
        """
        new_t = np.isfinite(values_t) & (times_ns_t > (self.last_time_ns or 0))
        times_ns_t, values_t = times_ns_t[new_t], values_t[new_t]
        if not len(times_ns_t):
            return
        self._times_ns_t = np.concatenate([self._times_ns_t, times_ns_t])
        distances = np.diff(self._times_ns_t[-DISTANCES - 1 :])
        if not len(distances):
            self._sum, self._row, self._count = float(values_t[0]), float(values_t[0]), 1
            return
        self.distance_ns = int(np.quantile(distances, 0.5, method="lower"))
        if self._origin_ns is None:
            # A value that came alone before is the first one of what is laid now.
            times_ns_t = self._times_ns_t
            values_t = np.concatenate([np.full(self._count, self._sum), values_t])
            self._sum, self._count = 0.0, 0
            half = max(min(self.distance_ns, self.interval_ns) // 2, 1)
            phase = (int(times_ns_t[-1]) + half) % self.interval_ns
            first = (int(times_ns_t[0]) - phase) // self.interval_ns
            self._origin_ns = first * self.interval_ns + phase
        self._times_ns_t = self._times_ns_t[-DISTANCES - 1 :]
        yield from self._whole(times_ns_t, values_t)

    def _whole(self, times_ns_t: Times, values_t: Array) -> Iterator[Step]:
        assert self._origin_ns is not None
        step_t = (times_ns_t - self._origin_ns) // self.interval_ns
        in_time_t = step_t >= self._step
        step_t, values_t = step_t[in_time_t], values_t[in_time_t]
        if not len(step_t):
            return
        starts = np.flatnonzero(np.diff(step_t, prepend=-1))
        for step, step_values_t in zip(
            step_t[starts].tolist(), np.split(values_t, starts[1:]), strict=True
        ):
            if step > self._step and self._count:
                yield self._finish()
            self._step = step
            self._sum += float(step_values_t.sum())
            self._row = float(step_values_t[-1])
            self._count += len(step_values_t)
        if int(times_ns_t[-1]) + self.distance_ns >= self.end_ns(self._step):
            yield self._finish()

    def _finish(self) -> Step:
        """End the step, which has a value."""
        found = Step(self._step, self._sum / self._count, self._row)
        self._step, self._sum, self._count = self._step + 1, 0.0, 0
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """All that ``restore`` needs; before there is a grid, nothing."""
        if self._origin_ns is None:
            return {}
        return {
            "grid": np.array([self.interval_ns, self._origin_ns, self._step, self._count]),
            "sum": np.array([self._sum]),
            "row": np.array([self._row]),
            "times": self._times_ns_t,
        }

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on where ``state`` was made."""
        _, self._origin_ns, self._step, self._count = (int(number) for number in state["grid"])
        self._sum = float(state["sum"][0])
        self._row = float(state["row"][0]) if "row" in state else np.nan  # 0.3.0 kept none
        self._times_ns_t = state["times"]
        self.distance_ns = int(np.quantile(np.diff(self._times_ns_t), 0.5, method="lower"))
