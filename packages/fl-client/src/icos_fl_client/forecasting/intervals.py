"""How sure a forecast is, from the node's own finished errors and from its memory.

Shapes: s spreads, h steps ahead, n finished errors, a alternatives, q quantiles. Each step ahead is
by itself.

A quantile of what will come is the forecast plus a quantile of the newest errors, each divided by
the *spread* at its time and multiplied by that of now; or it is a quantile of what followed the
windows that are like the newest, which knows that a job that has just begun may end soon, and that
an idle machine stays idle. Which is right differs between nodes. So they are alternatives, mixed by
how well each has done in the pinball loss, which is what quantiles are judged by. What is mixed is
stretched, away from the forecast, by factors that move with what comes (as adaptive conformal
inference moves levels: Gibbs and Candès, NeurIPS 2021), so that the coverage holds when the load
changes.
"""

import numpy as np

from icos_fl_client.forecasting.history import Array
from icos_fl_client.forecasting.mixture import PolynomialWeights

LEVELS = (0.025, 0.10, 0.90, 0.975)
"""The inner two bound the 80 % interval, the outer two that of 95 %."""
ERRORS_MIN = 20
"""Fewer finished errors than this give no interval."""
ERRORS = (60, 400)
"""Newest finished errors that an alternative takes."""
STRETCH_START = (0.2, 0.1, 0.1, 0.2)
"""Logarithms of the factors, by quantile: few errors tell little of the rare ones."""
STRETCH_STEP = 0.01
STRETCH_MIN, STRETCH_MAX = -0.3, 2.5
DISCOUNT = 0.998
SCALED_ERROR_MAX = 50.0
"""In spreads: a machine that wakes up from stillness must not blow up the intervals after it."""


class Intervals:
    """The quantiles LEVELS around a forecast. The first of the spreads is constant.

    *recalled* is how many alternatives come from a memory.
    """

    def __init__(self, spreads: int, steps: int, recalled: int = 0) -> None:
        alternatives = spreads * len(ERRORS) + recalled
        prior_a = [1 / alternatives] * alternatives
        self.weights = PolynomialWeights(prior_a, [DISCOUNT] * len(LEVELS), steps)
        self.errors_shn = np.full((spreads, steps, max(ERRORS)), np.nan)
        self.finished_h = np.zeros(steps, np.int64)
        self.stretch_qh = np.repeat(np.array(STRETCH_START)[:, None], steps, axis=1)
        self._cap_s1 = np.array([[np.inf], *[[SCALED_ERROR_MAX]] * (spreads - 1)])

    @property
    def alternatives(self) -> int:
        """How many there are."""
        return self.weights.regret_mkh.shape[1]

    def quantiles(
        self, yhat_h: Array, spread_sh: Array, recalled_aqh: Array
    ) -> tuple[Array, Array, Array]:
        """By each alternative (a, q, h), mixed (q, h), and stretched (q, h).

        NaN where too few errors are known.
        """
        bounds = [
            yhat_h + error_hq.T * spread_h
            for spread_h, errors_hn in zip(spread_sh, self.errors_shn, strict=True)
            for error_hq in self._error_quantiles(errors_hn)
        ]
        quantile_aqh = np.concatenate([np.stack(bounds), recalled_aqh])
        quantile_aqh[:, :, self.finished_h < ERRORS_MIN] = np.nan
        there_ah = np.isfinite(quantile_aqh[:, 0])
        there_ah |= ~there_ah.any(axis=0)
        given_aqh = np.where(there_ah[:, None], quantile_aqh, 0.0)
        weight_qah = self.weights.weights(there_ah)
        mixed_qh = _nested(np.einsum("qah,aqh->qh", weight_qah, given_aqh), yhat_h)
        stretched_qh = yhat_h + (mixed_qh - yhat_h) * np.exp(self.stretch_qh)
        return quantile_aqh, mixed_qh, _nested(stretched_qh, yhat_h)

    def learn(
        self,
        quantile_aqh: Array,
        mixed_qh: Array,
        stretched_qh: Array,
        yhat_h: Array,
        spread_sh: Array,
        actual_h: Array,
    ) -> None:
        """Take what came of what was said at different times, NaN as in ``Mixture.learn``."""
        level_q1 = np.array(LEVELS)[:, None]
        slope_qh = np.where(actual_h < mixed_qh, 1.0, 0.0) - level_q1
        gap_qah = mixed_qh[:, None] - quantile_aqh.transpose(1, 0, 2)
        self.weights.learn(np.where(np.isnan(actual_h), np.nan, slope_qh[:, None] * gap_qah))
        outward_qh = np.where(actual_h < stretched_qh, 1.0, 0.0) - level_q1
        outward_qh *= np.where(level_q1 < 1 / 2, 1.0, -1.0)
        known_h = np.isfinite(actual_h - yhat_h)
        moved_qh = np.clip(self.stretch_qh + STRETCH_STEP * outward_qh, STRETCH_MIN, STRETCH_MAX)
        self.stretch_qh = np.where(known_h & np.isfinite(mixed_qh), moved_qh, self.stretch_qh)
        with np.errstate(over="ignore"):
            error_sh = np.clip((actual_h - yhat_h) / spread_sh, -self._cap_s1, self._cap_s1)
        known = np.flatnonzero(known_h)
        place = self.finished_h[known] % self.errors_shn.shape[2]
        self.errors_shn[:, known, place] = error_sh[:, known]
        self.finished_h[known] += 1

    def _error_quantiles(self, errors_hn: Array) -> list[Array]:
        """For each of ERRORS quantiles (h, q) of so many newest errors."""
        size = errors_hn.shape[1]
        found = []
        for errors_max in ERRORS:
            count_h1 = np.minimum(self.finished_h, errors_max)[:, None]
            newest_hn = (self.finished_h[:, None] - 1 - np.arange(errors_max)) % size
            sorted_hn = np.sort(np.take_along_axis(errors_hn, newest_hn, axis=1))  # NaN come last
            last_h1 = np.maximum(count_h1 - 1, 0)
            place_hq = np.clip(np.array(LEVELS) * (count_h1 + 1) - 1, 0, last_h1)
            below_hq = place_hq.astype(np.int64)
            lower_hq = np.take_along_axis(sorted_hn, below_hq, axis=1)
            upper_hq = np.take_along_axis(sorted_hn, np.minimum(below_hq + 1, last_h1), axis=1)
            error_hq = lower_hq + (place_hq - below_hq) * (upper_hq - lower_hq)
            found.append(np.where(count_h1 < ERRORS_MIN, np.nan, error_hq))
        return found


def _nested(quantile_qh: Array, yhat_h: Array) -> Array:
    """Each around the next, and all around the forecast."""
    low_80, high_80 = np.minimum(quantile_qh[1], yhat_h), np.maximum(quantile_qh[2], yhat_h)
    low_95, high_95 = np.minimum(quantile_qh[0], low_80), np.maximum(quantile_qh[3], high_80)
    return np.stack([low_95, low_80, high_80, high_95])
