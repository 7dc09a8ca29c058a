"""Mixes forecasts by each node's own finished errors, without a learning rate.

Shapes: m mixers, k forecasts that are mixed, h steps ahead.

ML-Poly (Gaillard, Stoltz and van Erven, *A second-order bound with excess losses*, COLT 2014): the
weight of a forecast is its regret, where positive, divided by the sum of its squares. How much is
forgotten, and whether a mixer competes with the best forecast or with the best mixture of them,
decides how quick and how bold it is. No choice is best on all nodes, so there are several mixers,
and one more, by the same rule, mixes them with repeating the last value. Each step ahead has
weights of its own but in the last one: that judges mixers by all steps of a group together, with
less noise.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Steps, groups
from icos_fl_client.forecasting.history import Array

DISCOUNTS = (0.98, 0.998, 0.98, 0.995)
BOLD = (True, True, False, False)
"""Whether a mixer's regret is that of a small step towards a forecast: then it competes with every
convex mixture, and else with every single forecast."""
KEPT = (0.0, 1.0, 0.0, 1.0)
"""Of what a mixer has learned, when a new run begins."""
TOP_DISCOUNT = 0.995
TOP_KEPT = 0.1
FORGOTTEN_STEPS = 20
"""So many steps ahead are forgotten at a new run as KEPT says, and further ones the less: what is
known of the next hour has taken hours to learn."""
LAST_PRIOR = 1 / 2
"""Of the last value among the forecasts, before there is a regret."""
TOP_LAST_PRIOR = 1 / 3
ROUNDING = 1e-9
"""Differences up to this share of a value are none."""
_SMALLEST = 1e-300


class PolynomialWeights:
    """The weights (m, k, h) of k alternatives, by their regrets."""

    def __init__(self, prior_k: Sequence[float], discounts_m: Sequence[float], steps: int) -> None:
        self._prior_k1 = np.array(prior_k)[:, None]
        self._discount_m11 = np.array(discounts_m)[:, None, None]
        self.regret_mkh = np.zeros((len(discounts_m), len(prior_k), steps))
        self.square_mkh = np.zeros_like(self.regret_mkh)

    def forget(self, kept_mh: Array) -> None:
        """Keep this share of what was learned: weights stay, and move quicker; 0 is the prior."""
        kept_m1h = kept_mh[:, None]
        self.regret_mkh = kept_m1h * self.regret_mkh
        self.square_mkh = kept_m1h * self.square_mkh

    def learn(self, regret_mkh: Array) -> None:
        """Take how much less each alternative lost than what was said, NaN where it said nothing.

        A mixer and step for which all are NaN forgets nothing.
        """
        known_mkh = np.isfinite(regret_mkh)
        given_mkh = np.where(known_mkh, regret_mkh, 0.0)
        kept_mkh = np.where(known_mkh.any(axis=1, keepdims=True), self._discount_m11, 1.0)
        self.regret_mkh = kept_mkh * self.regret_mkh + given_mkh
        self.square_mkh = kept_mkh * self.square_mkh + given_mkh**2

    def weights(self, there_kh: NDArray[np.bool_]) -> Array:
        """They sum to 1 over the alternatives that are there, of which there must be one."""
        return self._weights(there_kh, self.regret_mkh, self.square_mkh)

    def weights_together(self, groups: Sequence[slice]) -> Array:
        """The same for all steps of a group, by the mean of their regrets, where all are there."""
        regret_mkh, square_mkh = np.empty_like(self.regret_mkh), np.empty_like(self.square_mkh)
        for group in groups:
            regret_mkh[..., group] = self.regret_mkh[..., group].mean(axis=2, keepdims=True)
            square_mkh[..., group] = self.square_mkh[..., group].mean(axis=2, keepdims=True)
        return self._weights(np.ones(self._prior_k1.shape, np.bool_), regret_mkh, square_mkh)

    def _weights(self, there_kh: NDArray[np.bool_], regret_mkh: Array, square_mkh: Array) -> Array:
        prior_kh = np.where(there_kh, self._prior_k1, 0.0)
        weight_mkh = prior_kh / np.maximum(square_mkh, _SMALLEST) * np.maximum(regret_mkh, 0.0)
        sum_m1h = weight_mkh.sum(axis=1, keepdims=True)
        learned_m1h = sum_m1h > 0
        weight_mkh = np.where(learned_m1h, weight_mkh, prior_kh)
        return np.asarray(weight_mkh / np.where(learned_m1h, sum_m1h, prior_kh.sum(axis=0)))


class Mixture:
    """Mixes k forecasts, the first of which repeats the last value."""

    def __init__(self, forecasts: int, steps_h: Steps) -> None:
        steps = len(steps_h)
        self._groups = groups(steps_h)
        others, mixers = forecasts - 1, len(DISCOUNTS)
        prior_k = [LAST_PRIOR, *[(1 - LAST_PRIOR) / others] * others]
        self.mixers = PolynomialWeights(prior_k, DISCOUNTS, steps)
        prior_k = [TOP_LAST_PRIOR, *[(1 - TOP_LAST_PRIOR) / mixers] * mixers]
        self.top = PolynomialWeights(prior_k, [TOP_DISCOUNT], steps)
        self._bold_m11 = np.array(BOLD)[:, None, None]
        self._spared_h = np.maximum(0.0, 1 - FORGOTTEN_STEPS / steps_h)

    def begin_run(self) -> None:
        """The machine may be doing something else now: the quick mixers begin anew."""
        self.mixers.forget(np.maximum(np.array(KEPT)[:, None], self._spared_h))
        self.top.forget(np.maximum(TOP_KEPT, self._spared_h)[None])

    def mix(self, forecast_kh: Array) -> tuple[Array, Array]:
        """What each mixer says (m, h), and the mixture of them (h,).

        NaN forecasts take no part; the first must be there.
        """
        there_kh = np.isfinite(forecast_kh)
        given_kh = np.where(there_kh, forecast_kh, 0.0)
        last_h = given_kh[0]
        mixed_mh = _snapped((self.mixers.weights(there_kh) * given_kh).sum(axis=1), last_h)
        finalist_kh = np.concatenate([given_kh[:1], mixed_mh])
        mixture_h = (self.top.weights_together(self._groups)[0] * finalist_kh).sum(axis=0)
        return mixed_mh, _snapped(mixture_h, last_h)

    def learn(self, forecast_kh: Array, mixed_mh: Array, mixture_h: Array, actual_h: Array) -> None:
        """Take what came of forecasts that were made at different times, one for each step ahead.

        NaN where none was made, or nothing came.
        """
        towards_mkh = _side(mixed_mh, actual_h)[:, None] * (mixed_mh[:, None] - forecast_kh)
        itself_mkh = np.abs(mixed_mh - actual_h)[:, None] - np.abs(forecast_kh - actual_h)
        self.mixers.learn(np.where(self._bold_m11, towards_mkh, itself_mkh))
        finalist_kh = np.concatenate([forecast_kh[:1], mixed_mh])
        self.top.learn((_side(mixture_h, actual_h) * (mixture_h - finalist_kh))[None])

    def shares(self, there_kh: NDArray[np.bool_]) -> Array:
        """The share (k, h) of each forecast in the mixture; they sum to 1."""
        top_kh = self.top.weights_together(self._groups)[0]
        share_kh = np.einsum("mh,mkh->kh", top_kh[1:], self.mixers.weights(there_kh))
        share_kh[0] += top_kh[0]
        return np.asarray(share_kh)


def _snapped(mixed: Array, last_h: Array) -> Array:
    """The last value itself where that differs by rounding alone."""
    return np.where(np.abs(mixed - last_h) <= ROUNDING * np.abs(last_h), last_h, mixed)


def _side(said: Array, actual_h: Array) -> Array:
    """The sign of the error, 0 where it is rounding alone, which would count like any other."""
    return np.sign(_snapped(said, actual_h) - actual_h)
