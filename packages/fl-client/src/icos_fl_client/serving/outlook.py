"""One metric of one node: its steps, its combination, what was said, and what became of it.

Shapes: k forecasters, h horizons, t steps of the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from icos_fl_timeseries_store import ModelVersion
from numpy.typing import NDArray

from icos_fl_client.forecasting import Combination, Forecast
from icos_fl_client.forecasting.history import STEPS_MAX, Array, Newest
from icos_fl_client.serving.grid import Grid, Step, Times
from icos_fl_client.serving.model import FederatedModel

LEVELS = (0.8, 0.95)
BOUNDS = 4
"""lower_80, upper_80, lower_95, upper_95: in this order in the record."""


class Reason(Enum):
    """Why there is no forecast; the value is the word for it."""

    TOO_SHORT = "too-short"
    SILENT = "silent"
    STALE = "stale"
    UNAVAILABLE = "unavailable"
    STUCK = "stuck"
    TOO_RARE = "too-rare"
    STORE_UNAVAILABLE = "store-unavailable"


@dataclass(frozen=True)
class NoForecast:
    """Why there is none, with the numbers and the limit."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Outlook:
    """What is expected of one metric now; arrays are not to be written."""

    node: str
    metric: str
    unit: str
    interval_ns: int
    ahead_ns_h: tuple[int, ...]
    names: tuple[str, ...]
    """Of the forecasters."""
    last_time_ns: int | None = None
    """End of the newest whole step; None before the first."""
    last_value: float = np.nan
    forecast: Forecast | None = None
    """None where ``none`` says why."""
    none: NoForecast | None = None
    model: ModelVersion | None = None
    """The federated model that takes part."""
    no_model: str = ""
    """Why none takes part."""
    error_kh: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """Mean absolute errors of late, those of the combination last."""
    coverage_2h: Array = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Record:
    """What came of a metric, and what was said at the end of each step of the step ahead."""

    unit: str
    interval_ns: int
    first_time_ns: int | None
    """End of the first step; None where there is none."""
    ahead_ns_h: tuple[int, ...]
    names: tuple[str, ...]
    values_t: Array
    yhat_th: Array
    bounds_tbh: Array
    said_tkh: Array


class MetricForecaster:
    """Follows one metric; one thread at a time may use it.

    *ahead_ns_h* are multiples of *interval_ns*, rising. *lower* and *upper* are what the metric
    cannot leave.
    """

    def __init__(
        self,
        model: FederatedModel,
        unit: str,
        ahead_ns_h: tuple[int, ...],
        *,
        lower: float,
        upper: float,
    ) -> None:
        self.model = model
        self.unit = unit
        self._ahead_ns_h = ahead_ns_h
        self.grid = Grid(model.interval_ns)
        steps = [ahead_ns // model.interval_ns for ahead_ns in ahead_ns_h]
        self._combination = Combination(steps, [model], lower=lower, upper=upper)
        names = len(self._combination.names)
        self._values = Newest(STEPS_MAX)
        self._said = Newest(STEPS_MAX, 1 + BOUNDS + names, len(steps))
        self._step: int | None = None
        """The newest whole one."""
        self._forecast: Forecast | None = None
        self._value = np.nan

    def add(self, times_ns_t: Times, values_t: Array, *, usable: bool) -> int:
        """Take values as ``Grid.add`` does; how many steps are whole now.

        Where they are not *usable*, since they are no measurements, nothing is learned from them.
        """
        whole = list(self.grid.add(times_ns_t, values_t))[-STEPS_MAX:]
        for step in whole:
            self.model.at_newest = step is whole[-1]
            self._take(step, usable=usable)
        if whole:
            self.model.is_new = False
        return len(whole)

    def take_model(self, version: ModelVersion | None) -> None:
        """Go by *version* from the next step on."""
        self.model.take(version, self._combination.history, self.grid.distance_ns)

    def outlook(self, none: NoForecast | None) -> Outlook:
        """What is expected now, or why nothing is."""
        if self.grid.is_too_fine:
            none = NoForecast(
                Reason.TOO_RARE,
                f"rows are {self.grid.distance_ns / 1e9:g} s apart, "
                f"steps of {self.grid.interval_ns / 1e9:g} s are forecast",
            )
        elif self._forecast is None and none is None:
            none = NoForecast(Reason.TOO_SHORT, "no step is whole yet; 1 is needed")
        error_kh, own_h = self._combination.errors()
        takes_part = not self.model.why_not
        return Outlook(
            node=self.model.node,
            metric=self.model.metric,
            unit=self.unit,
            interval_ns=self.grid.interval_ns,
            ahead_ns_h=self._ahead_ns_h,
            names=self._combination.names,
            last_time_ns=None if self._step is None else self.grid.end_ns(self._step),
            last_value=self._value,
            forecast=None if none else self._forecast,
            none=none,
            model=self.model.version if takes_part else None,
            no_model=self.model.why_not,
            error_kh=np.concatenate([error_kh, own_h[None]]),
            coverage_2h=np.stack(self._combination.coverage()),
        )

    def record(self) -> Record:
        """A copy of what was said, and what came."""
        said = self._said.rows.copy()
        first = None
        if self._step is not None:
            first = self.grid.end_ns(self._step - len(said) + 1)
        return Record(
            unit=self.unit,
            interval_ns=self.grid.interval_ns,
            first_time_ns=first,
            ahead_ns_h=self._ahead_ns_h,
            names=self._combination.names,
            values_t=self._values.rows.copy(),
            yhat_th=said[:, 0],
            bounds_tbh=said[:, 1 : 1 + BOUNDS],
            said_tkh=said[:, 1 + BOUNDS :],
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """All that ``restore`` needs; before the first whole step, nothing."""
        if self._step is None:
            return {}
        own = {
            "step": np.array(self._step),
            "ahead": np.array(self._ahead_ns_h),
            "values": self._values.rows.copy(),
            "said": self._said.rows.copy(),
        }
        parts = {"grid": self.grid.state(), "combination": self._combination.state()}
        for part, state in parts.items():
            own |= {f"{part}-{name}": array for name, array in state.items()}
        return own

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where ``state`` was made.

        Of other forecasters or horizons, learn again from the values that it has, about 2 ms each.
        Raises ValueError for a state of another interval, or of another kind.
        """

        def of(part: str) -> dict[str, NDArray[Any]]:
            prefix = f"{part}-"
            return {
                name.removeprefix(prefix): array
                for name, array in state.items()
                if name.startswith(prefix)
            }

        try:
            interval_s = int(of("grid")["grid"][0]) / 1e9
            if interval_s != self.grid.interval_ns / 1e9:
                raise ValueError(f"it is of steps of {interval_s:g} s")
            same_horizons = tuple(state["ahead"].tolist()) == self._ahead_ns_h
            if not same_horizons or tuple(state["combination-names"]) != self._combination.names:
                self.grid.restore(of("grid"))
                self._learn_again(int(state["step"]), state["values"])
                return
            self._combination.restore(of("combination"))
            self.grid.restore(of("grid"))
            self._values.fill(state["values"])
            self._said.fill(state["said"])
            self._step = int(state["step"])
        except (KeyError, IndexError) as error:
            raise ValueError(f"it lacks {error}") from None

    def _learn_again(self, newest: int, values_t: Array) -> None:
        """From steps up to the number *newest*, of which single rows are not known any more."""
        for number, value in enumerate(values_t.tolist(), newest - len(values_t) + 1):
            if np.isfinite(value):
                self._take(Step(number, value, value), usable=True)

    def _take(self, step: Step, *, usable: bool) -> None:
        """A whole step; those that were skipped have no value."""
        skipped = 0 if self._step is None else step.number - self._step - 1
        self._combination.skip(skipped)
        for _ in range(min(skipped, STEPS_MAX)):
            self._remember(np.nan, None)
        self._step = step.number
        self._value = step.mean if usable else np.nan
        self._forecast = self._combination.update(self._value, step.row)
        self._remember(self._value, self._forecast)

    def _remember(self, value: float, said: Forecast | None) -> None:
        self._values.append(value)
        if said is None:
            self._said.append(np.nan)
            return
        bounds = [said.lower_80_h, said.upper_80_h, said.lower_95_h, said.upper_95_h]
        self._said.append(np.concatenate([[said.yhat_h, *bounds], said.by_forecaster_kh]))
