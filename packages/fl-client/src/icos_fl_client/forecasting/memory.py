"""What followed when a node was in the same state before.

Shapes: t steps of a history, w windows, l steps of a window, n nearest windows, h steps ahead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Steps, groups
from icos_fl_client.forecasting.history import STEPS_MAX, Array, History, Newest

SPREAD_SHARE_MIN = 0.02
"""A window that moves less than this share of the usual one counts as flat."""


@dataclass(frozen=True)
class Likeness:
    """What makes two windows alike: the weighted sum of squares by which their steps differ."""

    name: str
    steps: int
    nearest: int
    decay: float
    """Weight of a step as a share of that of the next one."""
    by_shape: bool
    """Whether steps are ``(x - last) / spread``; else they are the values themselves."""


LIKENESSES = (
    Likeness("memory-shape-16", 16, 40, 0.85, by_shape=True),
    Likeness("memory-shape-32", 32, 40, 0.9, by_shape=True),
    Likeness("memory-level-16", 16, 15, 0.8, by_shape=False),
    Likeness("memory-level-32", 32, 15, 1.0, by_shape=False),
)


class Memory:
    """The median of what followed the nearest finished windows of the node's own history.

    A window is finished when all that is forecast from it has come. There is no forecast before
    twice as many are finished as are looked for.
    """

    names = tuple(likeness.name for likeness in LIKENESSES)

    def __init__(self) -> None:
        self._windows = [_Windows(likeness) for likeness in LIKENESSES]

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (4, h)."""
        for windows in self._windows:
            windows.follow(history)
        filled_t, starts_t = history.filled_t, history.starts_t
        size = len(filled_t)
        run_t = np.arange(history.count - size, history.count) + 1 - starts_t
        length_t = np.minimum(run_t, np.arange(1, size + 1))  # what is forgotten is no window
        length_t[np.isnan(filled_t)] = 0
        forecasts_kh = np.full((len(self.names), len(steps_h)), np.nan)
        if not size or not length_t[-1]:
            return forecasts_kh
        compared = [windows.compare(length_t) for windows in self._windows]
        for group in groups(steps_h):
            finished_t = _finished(history, steps_h[group])
            for forecast_h, windows, found in zip(
                forecasts_kh, self._windows, compared, strict=True
            ):
                like = windows.likeness
                ends = np.flatnonzero(finished_t & (length_t[: len(finished_t)] >= like.steps))
                if found is not None and len(ends) >= 2 * like.nearest:
                    nearest, factor_n = found.nearest(ends, like.nearest)
                    changes_nh = (
                        filled_t[nearest[:, None] + steps_h[group]] - filled_t[nearest, None]
                    )
                    change_h = np.median(changes_nh * factor_n[:, None], axis=0)
                    forecast_h[group] = filled_t[-1] + change_h
        return forecasts_kh


def _finished(history: History, steps_h: Steps) -> NDArray[np.bool_]:
    """Whether all that is forecast *steps_h* ahead of each of the older steps has come."""
    ahead, starts_t = int(steps_h[-1]), history.starts_t
    finished_t = starts_t[ahead:] == starts_t[: max(len(starts_t) - ahead, 0)]
    for step in steps_h:  # what followed must have come, not been bridged
        finished_t &= np.isfinite(history.values_t[step : step + len(finished_t)])
    return np.asarray(finished_t)


@dataclass(frozen=True)
class _Compared:
    """How far all windows are from the newest one."""

    distance_w: Array
    scale_w: Array
    """1 for all where windows are not compared by shape."""

    def nearest(self, ends: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], Array]:
        """Those of *ends* whose windows are most like the newest, and what their changes take."""
        chosen = ends[np.argpartition(self.distance_w[ends], count)[:count]]
        return chosen, self.scale_w[-1] / self.scale_w[chosen]


class _Windows:
    """The windows that end at each step of a history."""

    def __init__(self, likeness: Likeness) -> None:
        self.likeness = likeness
        self._weight_l = likeness.decay ** np.arange(likeness.steps, dtype=float)[::-1]
        self._steps_wl = Newest(STEPS_MAX, likeness.steps)
        self._spread_w = Newest(STEPS_MAX)
        self._square_w = Newest(STEPS_MAX)
        self._count = 0

    def follow(self, history: History) -> None:
        """Take the steps that are new; those before the first whole window are NaN."""
        steps = self.likeness.steps
        new = min(history.count - self._count, len(history.filled_t))
        known_t = history.filled_t[-(new + steps - 1) :]
        padded_t = np.concatenate([np.full(new + steps - 1 - len(known_t), np.nan), known_t])
        for window_l in sliding_window_view(padded_t, steps) if new > 0 else ():
            centred_l = window_l - window_l[-1] if self.likeness.by_shape else window_l
            self._steps_wl.append(centred_l)
            self._spread_w.append(np.abs(centred_l) @ self._weight_l / self._weight_l.sum())
            self._square_w.append(centred_l**2 @ self._weight_l)
        self._count = history.count

    def compare(self, length_t: NDArray[np.int64]) -> _Compared | None:
        """With the newest window; None where it is not whole. *length_t* is that of the runs."""
        steps = self.likeness.steps
        if length_t[-1] < steps:
            return None
        steps_wl = self._steps_wl.rows
        if not self.likeness.by_shape:
            apart_wl = steps_wl - steps_wl[-1]
            distance_w = np.einsum("wl,wl,l->w", apart_wl, apart_wl, self._weight_l)
            return _Compared(distance_w, np.ones(len(distance_w)))
        spread_w = self._spread_w.rows
        usual = float(spread_w[length_t >= steps].mean())
        scale_w = np.maximum(spread_w, max(SPREAD_SHARE_MIN * usual, np.finfo(float).tiny))
        newest_l = steps_wl[-1] / scale_w[-1] * self._weight_l
        product_w = steps_wl @ newest_l
        distance_w = self._square_w.rows / scale_w**2 - 2 * product_w / scale_w
        return _Compared(distance_w, scale_w)
