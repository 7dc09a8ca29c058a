"""What a forecaster is, and the simple ones.

Shapes: k forecasts, h steps ahead for which a forecast is asked.
"""

import itertools
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.history import Array, History

Steps = NDArray[np.int64]
"""Steps ahead, (h,), each at least 1, rising."""

MEAN_STEPS = 4
MEDIAN_STEPS = (12, 40, 120)
DRIFT_STEPS = 40


GROUP_FACTOR_MAX = 8


def groups(steps_h: Steps) -> list[slice]:
    """Steps ahead that are alike: in each group none is over GROUP_FACTOR_MAX times another.

    What holds for the next minute says little of the next hour, and would be drowned by it.
    """
    starts = [0]
    for place, step in enumerate(steps_h):
        if step > GROUP_FACTOR_MAX * steps_h[starts[-1]]:
            starts.append(place)
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(steps_h)])]


class Forecaster(Protocol):
    """Forecasts one metric from its history: a simple rule, a model, whatever one likes.

    It is asked once a step, in order, with the history up to then.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Of its forecasts, k of them."""
        ...

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (k, h), in the metric's unit; rows of NaN where it has none."""
        ...


class Anchors:
    """The last value, the newest row, a mean and medians of the newest values, and a drift.

    The last value is the mean of a step, and as old as the middle of it; its newest row is from its
    end, which tells more of the next minute where a step has several rows.
    The drift goes on as most of the newest steps have gone, which a single jump does not change.
    Where the run is shorter than one of them asks for, it is that of the run.
    """

    names = (
        "last",
        "newest-row",
        f"mean-{MEAN_STEPS}",
        *(f"median-{steps}" for steps in MEDIAN_STEPS),
        f"drift-{DRIFT_STEPS}",
    )

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (7, h)."""
        newest_t = history.newest(max(MEDIAN_STEPS))
        if not len(newest_t):
            return np.full((len(self.names), len(steps_h)), np.nan)
        last = newest_t[-1]
        flat = [last, history.row, newest_t[-MEAN_STEPS:].mean()]
        flat += [np.median(newest_t[-steps:]) for steps in MEDIAN_STEPS]
        moved_t = np.diff(newest_t[-1 - DRIFT_STEPS :])
        drift_h = last + (float(np.median(moved_t)) if len(moved_t) else 0.0) * steps_h
        flat_kh = np.repeat(np.array(flat)[:, None], len(steps_h), axis=1)
        return np.concatenate([flat_kh, drift_h[None]])
