"""What followed when a node was in the same state before.

Shapes: t steps of a history, w windows, l steps of a window, n nearest windows, h steps ahead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Steps
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
        ahead = int(steps_h[-1])
        filled_t, starts_t = history.filled_t, history.starts_t
        size = len(filled_t)
        run_t = np.arange(history.count - size, history.count) + 1 - starts_t
        length_t = np.minimum(run_t, np.arange(1, size + 1))  # what is forgotten is no window
        length_t[np.isnan(filled_t)] = 0
        finished_t = starts_t[ahead:] == starts_t[: max(size - ahead, 0)]
        for step in steps_h:  # what followed must have come, not been bridged
            finished_t &= np.isfinite(history.values_t[step : step + len(finished_t)])
        forecasts_kh = np.full((len(self.names), len(steps_h)), np.nan)
        if not len(finished_t) or not length_t[-1]:
            return forecasts_kh
        for forecast_h, windows in zip(forecasts_kh, self._windows, strict=True):
            like = windows.likeness
            ends = np.flatnonzero(finished_t & (length_t[: len(finished_t)] >= like.steps))
            if length_t[-1] >= like.steps and len(ends) >= 2 * like.nearest:
                nearest, factor_n = windows.nearest(ends)
                changes_nh = filled_t[nearest[:, None] + steps_h] - filled_t[nearest, None]
                forecast_h[:] = filled_t[-1] + np.median(changes_nh * factor_n[:, None], axis=0)
        return forecasts_kh


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

    def nearest(self, ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
        """Those of *ends* whose windows are most like the newest, and what their changes take."""
        steps_wl, nearest = self._steps_wl.rows, self.likeness.nearest
        if not self.likeness.by_shape:
            apart_wl = steps_wl[: ends[-1] + 1] - steps_wl[-1]
            distance_w = np.einsum("wl,wl,l->w", apart_wl, apart_wl, self._weight_l)[ends]
            return ends[np.argpartition(distance_w, nearest)[:nearest]], np.ones(nearest)
        spread_w = self._spread_w.rows
        least = max(SPREAD_SHARE_MIN * float(spread_w[ends].mean()), np.finfo(float).tiny)
        scale_w = np.maximum(spread_w, least)
        newest_l = steps_wl[-1] / scale_w[-1] * self._weight_l
        product_w = steps_wl @ newest_l
        distance_w = self._square_w.rows / scale_w**2 - 2 * product_w / scale_w
        chosen = ends[np.argpartition(distance_w[ends], nearest)[:nearest]]
        return chosen, scale_w[-1] / scale_w[chosen]
