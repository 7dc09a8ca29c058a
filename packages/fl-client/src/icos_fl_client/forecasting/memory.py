"""What followed when a node was in the same state before.

Shapes: t steps of a history, w windows, l steps of a window, n nearest windows, a likenesses, h
steps ahead, k forecasts, q quantiles.

Two windows are alike by level or by shape. By level their distance is the weighted sum of squares
by which their steps differ; by shape their steps are first taken as ``(x - last) / spread``, and
what followed grows or shrinks with the spread. The nearer a window, the more it weighs. How near is
near enough differs between nodes: one that does the same job again is told best by the very
nearest, a noisy one by many. So each likeness gives two forecasts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Steps, groups
from icos_fl_client.forecasting.history import STEPS_MAX, Array, History

NEAREST = 20
KERNELS = {"nearest": 1, "near": 7}
"""How many windows are nearer than that at which the weight falls to 1/e."""
SPREAD_SHARE_MIN = 0.02
"""A window that moves less than this share of the usual one counts as flat."""
GROWTH_MAX = 2.0
"""What followed a window of the same shape is made so many times larger at most."""
DISTANCE_MIN = 1e-9
"""In squares of the spread; less is rounding."""


@dataclass(frozen=True)
class Length:
    """Of windows that are compared, by shape and by level."""

    name: str
    steps: int
    decay: float
    """Weight of a step as a share of that of the next one."""
    newest: int = STEPS_MAX
    """Only windows that end within the newest so many steps."""


LENGTHS = (
    Length("8", 8, 0.80),
    Length("16", 16, 0.85),
    Length("64", 64, 0.97),
    Length("late-16", 16, 0.85, newest=240),
)


class Memory:
    """Medians of what followed the windows of the node's own history that are like the newest.

    Those count after which all has come that is forecast together. There is no forecast before
    there are twice as many as are looked for.
    """

    names = tuple(
        f"memory-{by}-{kernel}-{length.name}"
        for kernel in KERNELS
        for length in LENGTHS
        for by in ("shape", "level")
    )
    likenesses = len(names) // len(KERNELS)

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (16, h)."""
        return self.recall(history, steps_h, ())[0]

    def recall(
        self, history: History, steps_h: Steps, levels: Sequence[float]
    ) -> tuple[Array, Array]:
        """Forecasts (16, h), and the quantiles *levels* of what followed near windows (8, q, h)."""
        filled_t, length_t = history.filled_t, _lengths(history)
        change_anh = np.full((self.likenesses, NEAREST, len(steps_h)), np.nan)
        distance_anh = np.full_like(change_anh, np.nan)
        if len(length_t) and length_t[-1]:
            centred_t = np.where(length_t > 0, filled_t - filled_t[-1], 0.0)
            compared = {
                (steps, decay): _Compared(centred_t, length_t, steps, decay)
                for steps, decay in {(each.steps, each.decay) for each in LENGTHS}
                if length_t[-1] >= steps
            }
            for group in groups(steps_h):
                finished_t = _finished(history, steps_h[group])
                for place, each in enumerate(LENGTHS):
                    of_length = compared.get((each.steps, each.decay))
                    found = of_length and of_length.nearest(finished_t, each.newest, steps_h[group])
                    if found:
                        rows = slice(2 * place, 2 * place + 2)
                        change_anh[rows, :, group], distance_anh[rows, :, group] = found
        quantile_kqh = _quantiles(change_anh, distance_anh, (0.5, *levels))
        quantile_kqh += filled_t[-1] if len(filled_t) else np.nan
        return quantile_kqh[:, 0], quantile_kqh[self.likenesses :, 1:]


def _lengths(history: History) -> NDArray[np.int64]:
    """How long the run is at each step (t,), of what is remembered; 0 where it is over."""
    size = len(history.filled_t)
    run_t = np.arange(history.count - size, history.count) + 1 - history.starts_t
    return np.where(np.isnan(history.filled_t), 0, np.minimum(run_t, np.arange(1, size + 1)))


def _finished(history: History, steps_h: Steps) -> NDArray[np.bool_]:
    """Whether all that is forecast *steps_h* ahead of each of the older steps has come."""
    ahead, starts_t = int(steps_h[-1]), history.starts_t
    finished_t = starts_t[ahead:] == starts_t[: max(len(starts_t) - ahead, 0)]
    for step in steps_h:  # what followed must have come, not been bridged
        finished_t &= np.isfinite(history.values_t[step : step + len(finished_t)])
    return np.asarray(finished_t)


class _Compared:
    """How far all windows of a length are from the newest one.

    Sums over windows are correlations; values are seen from the newest one, so that what is near it
    loses no digits.
    """

    def __init__(
        self, centred_t: Array, length_t: NDArray[np.int64], steps: int, decay: float
    ) -> None:
        self._centred_t, self._before = centred_t, steps - 1
        self._whole_w = length_t[steps - 1 :] >= steps
        weight_l = decay ** np.arange(steps, dtype=float)[::-1]
        weight_l /= weight_l.sum()
        newest_l, last_w = centred_t[-steps:], centred_t[steps - 1 :]
        sum_w = np.correlate(centred_t, weight_l)
        square_sum_w = np.correlate(centred_t**2, weight_l)
        product_w = np.correlate(centred_t, weight_l * newest_l)
        newest_square = weight_l @ newest_l**2
        square_w = np.maximum(square_sum_w - last_w * (2 * sum_w - last_w), 0.0)
        spread_w = np.sqrt(square_w)
        usual = float(spread_w[self._whole_w].mean()) or 1.0
        scale_w = np.maximum(spread_w, SPREAD_SHARE_MIN * usual)
        by_level_w = (square_sum_w - 2 * product_w + newest_square) / usual**2
        product_w -= last_w * (weight_l @ newest_l)
        by_shape_w = (square_w / scale_w - 2 * product_w / scale_w[-1]) / scale_w
        by_shape_w += newest_square / scale_w[-1] ** 2
        self._distances_w = by_shape_w, by_level_w
        self._scales_w = scale_w, np.ones_like(scale_w)

    def nearest(
        self, finished_t: NDArray[np.bool_], newest: int, steps_h: Steps
    ) -> tuple[Array, Array] | None:
        """What followed the nearest windows (2, n, h), and how far they are (2, n, 1).

        By shape and by level, the nearest first; None where there are too few.
        """
        begin = max(len(self._whole_w) - newest, 0)
        finished_w = finished_t[self._before :]
        ends_w = begin + np.flatnonzero((finished_w & self._whole_w[: len(finished_w)])[begin:])
        if len(ends_w) < 2 * NEAREST:
            return None
        changes, distances = [], []
        for distance_w, scale_w in zip(self._distances_w, self._scales_w, strict=True):
            distance_n = distance_w[ends_w]
            nearest_n = np.argpartition(distance_n, NEAREST)[:NEAREST]
            nearest_n = nearest_n[np.argsort(distance_n[nearest_n])]
            distances.append(distance_n[nearest_n, None])
            end_n1 = ends_w[nearest_n, None]
            last_n1 = self._centred_t[end_n1 + self._before]
            change_nh = self._centred_t[end_n1 + self._before + steps_h] - last_n1
            changes.append(change_nh * np.minimum(scale_w[-1] / scale_w[end_n1], GROWTH_MAX))
        return np.stack(changes), np.stack(distances)


def _quantiles(change_anh: Array, distance_anh: Array, levels: Sequence[float]) -> Array:
    """Weighted quantiles (k, q, h) of the changes, by each of KERNELS in turn.

    Each change stands in the middle of its weight, and between two of them quantiles are linear.
    """
    width_k1h = np.concatenate([distance_anh[:, [nearer]] for nearer in KERNELS.values()])
    kernels = len(KERNELS)
    distance_knh = np.concatenate([np.maximum(distance_anh, 0.0)] * kernels)
    weight_knh = np.exp(-distance_knh / np.maximum(width_k1h, DISTANCE_MIN))
    order_anh = np.argsort(change_anh, axis=1)
    change_anh = np.take_along_axis(change_anh, order_anh, axis=1)
    weight_knh = np.take_along_axis(weight_knh, np.concatenate([order_anh] * kernels), axis=1)
    place_knh = np.cumsum(weight_knh, axis=1)
    place_knh = (place_knh - weight_knh / 2) / place_knh[:, -1:]
    level_q1 = np.array(levels)[:, None]
    above_kqh = (place_knh[:, :, None] < level_q1).sum(axis=1).clip(1, NEAREST - 1)
    of_k11, of_h = np.arange(len(place_knh))[:, None, None], np.arange(place_knh.shape[2])
    low_kqh, high_kqh = (place_knh[of_k11, above_kqh - back, of_h] for back in (1, 0))
    of_a11 = of_k11 % len(change_anh)
    first_kqh, second_kqh = (change_anh[of_a11, above_kqh - back, of_h] for back in (1, 0))
    share_kqh = (level_q1 - low_kqh) / np.maximum(high_kqh - low_kqh, DISTANCE_MIN)
    return np.asarray(first_kqh + share_kqh.clip(0.0, 1.0) * (second_kqh - first_kqh))
