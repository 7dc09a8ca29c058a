"""One metric of one node: its history, its forecasters, and what their errors have taught.

Shapes: k forecasts of all forecasters, m mixers, h steps ahead, s spreads, a alternatives of q
quantiles; r rows of what is kept of a forecast until what it was of has come.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Anchors, Forecaster
from icos_fl_client.forecasting.history import GAP_STEPS_MAX, Array, History
from icos_fl_client.forecasting.intervals import LEVELS, Intervals
from icos_fl_client.forecasting.memory import Memory
from icos_fl_client.forecasting.mixture import DISCOUNTS, Mixture

SPREAD_STEPS = 16
USUAL_SPREAD_STEPS = 1000
"""Over so many steps the usual spread is a mean, roughly."""
USUAL_SPREAD_SHARE = 0.1
SPREADS = 2
SCORE_DISCOUNT = 0.998
_SMALLEST = 1e-300


@dataclass(frozen=True)
class Forecast:
    """What comes, by step ahead (h,), in the metric's unit.

    The bounds are NaN until enough forecasts have come to their end.
    """

    yhat_h: Array
    lower_80_h: Array
    upper_80_h: Array
    lower_95_h: Array
    upper_95_h: Array
    by_forecaster_kh: Array
    """What each of the combination's ``names`` says; NaN where it says nothing."""


class Combination:
    """Forecasts a metric *steps* ahead, of a grid of which it is told every step.

    What *forecasters* say is mixed with anchors and a memory. Everything stays within *lower* and
    *upper*, which nothing physical leaves; where a sensor does all the same (CPU at 102 %), within
    what has come. An ``update`` takes about 2 ms, and the state is bounded by the longest step.
    """

    def __init__(
        self,
        steps: Sequence[int],
        forecasters: Sequence[Forecaster] = (),
        *,
        lower: float = -math.inf,
        upper: float = math.inf,
    ) -> None:
        if not steps or min(steps) < 1 or list(steps) != sorted(set(steps)):
            raise ValueError(f"steps ahead are {list(steps)}; they must be 1 or more, and rise")
        if not lower < upper:
            raise ValueError(f"lower limit {lower:g} is not below the upper one, {upper:g}")
        self.steps_h = np.array(steps, np.int64)
        self._limits = lower, upper
        self._seen_2 = np.array([math.inf, -math.inf])
        self._anchors, self._memory, self._others = Anchors(), Memory(), forecasters
        everyone: list[Forecaster] = [self._anchors, self._memory, *forecasters]
        self.names = tuple(name for each in everyone for name in each.names)
        self.history = History()
        count = len(steps)
        self.mixture = Mixture(len(self.names), self.steps_h)
        self.intervals = Intervals(SPREADS, count, Memory.likenesses)
        said = self.intervals.alternatives * len(LEVELS)
        rows = (len(self.names), len(DISCOUNTS), 1, SPREADS, said, len(LEVELS), len(LEVELS))
        self._borders = np.cumsum(rows)[:-1].tolist()
        self._pending = np.full((int(self.steps_h[-1]) + 1, sum(rows), count), np.nan)
        self._usual_spread_2 = np.zeros(2)  # the mean, and of how many
        self._error_kh = np.zeros((len(self.names) + 1, count))
        self._error_weight_kh = np.zeros_like(self._error_kh)
        self._inside_2h = np.zeros((2, count))
        self._inside_weight_h = np.zeros(count)

    def update(self, value: float, row: float | None = None) -> Forecast | None:
        """Take the next step's value, NaN for none, and forecast from there.

        *row* is the newest of the rows of which the value is the mean; without it, the value.
        None where the step has no value: nobody knows where the machine is then.
        """
        self.history.append(value, row)
        self._learn()
        place = (self.history.count - 1) % len(self._pending)
        self._pending[place] = np.nan
        if not math.isfinite(value):
            return None
        if self.history.starts_t[-1] == self.history.count - 1:
            self.mixture.begin_run()
        self._seen_2[:] = min(self._seen_2[0], value), max(self._seen_2[1], value)
        self._pending[place], forecast = self._forecast()
        return forecast

    def skip(self, steps: int) -> None:
        """Take *steps* without a value; as quick however many they are."""
        for _ in range(min(steps, GAP_STEPS_MAX + 1 + len(self._pending))):
            self.update(math.nan)

    def errors(self) -> tuple[Array, Array]:
        """Mean absolute errors of late, by each of ``names`` (k, h) and of the mixture (h,)."""
        with np.errstate(invalid="ignore"):
            error_kh = self._error_kh / self._error_weight_kh
        return error_kh[:-1], error_kh[-1]

    def coverage(self) -> tuple[Array, Array]:
        """Shares of what came of late that was inside the 80 % and the 95 % interval, (h,) each."""
        with np.errstate(invalid="ignore"):
            inside_2h = self._inside_2h / self._inside_weight_h
        return inside_2h[0], inside_2h[1]

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which ``restore`` goes on, those of *forecasters* apart."""
        history = {f"history-{name}": array for name, array in self.history.state().items()}
        made = {"names": np.array(self.names), "steps": self.steps_h}
        return history | made | {name: array.copy() for name, array in self._learned().items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError for the state of other forecasters or steps, with nothing changed."""
        learned = self._learned()
        told = {"names": np.array(self.names), "steps": self.steps_h}
        same = all(np.array_equal(state.get(name, ()), array) for name, array in told.items())
        if not same or any(state[name].shape != array.shape for name, array in learned.items()):
            raise ValueError(f"the state is not one of {self.names} at steps {list(self.steps_h)}")
        for name, array in learned.items():
            array[...] = state[name]
        self.history.restore({name: state[f"history-{name}"] for name in self.history.state()})

    def _learned(self) -> dict[str, NDArray[Any]]:
        mixers, top, quantiles = self.mixture.mixers, self.mixture.top, self.intervals.weights
        return {
            "mixers-regret": mixers.regret_mkh,
            "mixers-square": mixers.square_mkh,
            "top-regret": top.regret_mkh,
            "top-square": top.square_mkh,
            "quantiles-regret": quantiles.regret_mkh,
            "quantiles-square": quantiles.square_mkh,
            "errors": self.intervals.errors_shn,
            "errors-finished": self.intervals.finished_h,
            "stretch": self.intervals.stretch_qh,
            "pending": self._pending,
            "usual-spread": self._usual_spread_2,
            "seen": self._seen_2,
            "score-error": self._error_kh,
            "score-error-weight": self._error_weight_kh,
            "score-inside": self._inside_2h,
            "score-inside-weight": self._inside_weight_h,
        }

    def _forecast(self) -> tuple[Array, Forecast]:
        with np.errstate(over="ignore", invalid="ignore"):
            recalled_kh, recalled_aqh = self._memory.recall(self.history, self.steps_h, LEVELS)
            anchored_kh, *others = (
                each.forecast(self.history, self.steps_h) for each in (self._anchors, *self._others)
            )
            said_kh = np.concatenate([anchored_kh, recalled_kh, *others])
        said_kh[~np.isfinite(said_kh)] = np.nan
        low = min(self._limits[0], self._seen_2[0])
        high = max(self._limits[1], self._seen_2[1])
        said_kh, recalled_aqh = np.clip(said_kh, low, high), np.clip(recalled_aqh, low, high)
        mixed_mh, yhat_h = self.mixture.mix(said_kh)
        spread_sh = self._spread(said_kh)
        quantile_aqh, mixed_qh, stretched_qh = self.intervals.quantiles(
            yhat_h, spread_sh, recalled_aqh
        )
        row_rh = [
            said_kh,
            mixed_mh,
            yhat_h[None],
            spread_sh,
            np.concatenate(quantile_aqh),
            mixed_qh,
            stretched_qh,
        ]
        low_95, low_80, high_80, high_95 = np.clip(stretched_qh, low, high)
        return np.concatenate(row_rh), Forecast(yhat_h, low_80, high_80, low_95, high_95, said_kh)

    def _spread(self, said_kh: Array) -> Array:
        """Spreads (s, h): 1, and how lively the window is and how much the forecasts differ.

        Of the latter the root, since errors grow less than it, and never near 0.
        """
        newest_t = self.history.newest(SPREAD_STEPS)
        spread = float(np.abs(newest_t - newest_t[-1]).mean())
        usual, count = self._usual_spread_2
        usual += (spread - usual) / min(count + 1, USUAL_SPREAD_STEPS)
        self._usual_spread_2[:] = usual, count + 1
        lively_h = spread + np.nanstd(said_kh, axis=0)
        spread_h = np.sqrt(lively_h * usual) + USUAL_SPREAD_SHARE * usual
        return np.stack([np.ones_like(spread_h), np.maximum(spread_h, _SMALLEST)])

    def _learn(self) -> None:
        """Hold the newest step against what was said of it."""
        now = self.history.count - 1
        actual = self.history.values_t[-1]
        begun_h = now - self.steps_h >= self.history.starts_t[-1]  # and so in this run
        if not (np.isfinite(actual) and begun_h.any()):
            return
        made_hr = self._pending[
            (now - self.steps_h) % len(self._pending), :, np.arange(len(begun_h))
        ]
        said_kh, mixed_mh, yhat_1h, spread_sh, quantile_ch, mixed_qh, stretched_qh = np.split(
            made_hr.T, self._borders
        )
        yhat_h = yhat_1h[0]
        actual_h = np.where(begun_h & np.isfinite(yhat_h), actual, np.nan)
        quantile_aqh = quantile_ch.reshape(-1, len(LEVELS), len(actual_h))
        self.mixture.learn(said_kh, mixed_mh, yhat_h, actual_h)
        self.intervals.learn(quantile_aqh, mixed_qh, stretched_qh, yhat_h, spread_sh, actual_h)
        self._score(np.concatenate([said_kh, yhat_1h]), stretched_qh, actual_h)

    def _score(self, said_kh: Array, bound_qh: Array, actual_h: Array) -> None:
        error_kh = np.abs(said_kh - actual_h)
        known_kh = np.isfinite(error_kh)
        kept_kh = np.where(known_kh, SCORE_DISCOUNT, 1.0)
        self._error_kh = kept_kh * self._error_kh + np.where(known_kh, error_kh, 0.0)
        self._error_weight_kh = kept_kh * self._error_weight_kh + known_kh
        known_h = np.isfinite(actual_h + bound_qh[0])
        kept_h = np.where(known_h, SCORE_DISCOUNT, 1.0)
        inside_2h = (bound_qh[[1, 0]] <= actual_h) & (actual_h <= bound_qh[[2, 3]])
        self._inside_2h = kept_h * self._inside_2h + (inside_2h & known_h)
        self._inside_weight_h = kept_h * self._inside_weight_h + known_h
