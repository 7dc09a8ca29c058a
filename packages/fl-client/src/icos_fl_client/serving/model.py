"""The federated model that a node keeps, as one more forecaster."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import structlog
from icos_fl_timeseries_store import ModelVersion
from numpy.typing import NDArray

from icos_fl_client.data import Latest
from icos_fl_client.errors import ClientError
from icos_fl_client.forecasting import History, Steps
from icos_fl_client.forecasting.anchor_lstm import AnchorLSTM
from icos_fl_client.forecasting.history import STEPS_MAX, Array
from icos_fl_client.processor_client import Query
from icos_fl_client.serving.grid import DRIFT_SHARE_MAX
from icos_fl_client.settings import RunConfig, parse

DEFAULT_MODEL = "icos_fl_client.models:AnchorLSTM"
DEVIATION_STEPS = 300
"""Of so many newest steps the deviation is taken, as of a window of usual size."""

log = structlog.get_logger()


class Predictor(Protocol):
    """A model that is loaded: what ``Forecaster.forecast`` is."""

    def forecast(self, history: History, steps_h: Steps) -> Array: ...


class Feed(Protocol):
    """Who gives a model its input, as in training: a ``ProcessorClient``."""

    def latest(self, query: Query) -> Latest: ...


@dataclass
class FederatedModel:
    """The newest global model of one metric; says nothing while there is none that fits.

    The default model is evaluated in numpy on the node's own steps. Any other is a module of torch,
    for which *processor* gives the input as in training; it is asked for the newest step alone.
    """

    node: str
    metric: str
    interval_ns: int
    processor: Callable[[], AbstractContextManager[Feed]] | None = None

    names = ("model",)

    def __post_init__(self) -> None:
        self.version: ModelVersion | None = None
        self.why_not = f"{self.node} keeps no model of {self.metric} yet"
        """Why it takes no part; empty where it does."""
        self.is_new = False
        """May it have been trained on the steps that come now?"""
        self.at_newest = True
        """Is the step that comes now the newest that there is?"""
        self._predictor: Predictor | None = None

    def take(self, version: ModelVersion | None, history: History, row_distance_ns: int) -> None:
        """Go by *version* from now on, unless it is the one that is there."""
        if version is None or (self.version and _identity(version) == _identity(self.version)):
            return
        self.version, self._predictor, self.is_new = version, None, True
        try:
            self._predictor, self.why_not = self._load(version, history, row_distance_ns), ""
        except Exception as error:  # a user's module may raise anything
            self._refuse(f"the model of round {version.round} cannot be used: {error}")

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (1, h); NaN where the model says nothing."""
        nothing_kh = np.full((1, len(steps_h)), np.nan)
        asked = self.at_newest or not (self.is_new or isinstance(self._predictor, _Module))
        if self._predictor is None or not asked:
            return nothing_kh
        try:
            said_kh = self._predictor.forecast(history, steps_h)
        except ClientError as error:  # such as the processor away, or too few rows
            self.why_not = str(error)
            return nothing_kh
        except Exception as error:
            assert self.version is not None
            self._refuse(f"the model of round {self.version.round} fails: {error!r}")
            self._predictor = None
            return nothing_kh
        self.why_not = ""
        if not np.isfinite(said_kh).any():
            self.why_not = self._why_silent(len(history.newest(STEPS_MAX)), int(steps_h[0]))
        return said_kh

    def _load(self, version: ModelVersion, history: History, row_distance_ns: int) -> Predictor:
        run = parse(RunConfig, version.config, f"configuration kept beside {self.metric}'s model")
        features = run.features_of(self.metric)
        step_ns = round(run.interval * 1e9) or row_distance_ns
        if abs(step_ns - self.interval_ns) > DRIFT_SHARE_MAX * self.interval_ns:
            raise ValueError(
                f"its steps are of {step_ns / 1e9:g} s, "
                f"forecasts are of {self.interval_ns / 1e9:g} s"
            )
        if run.model == DEFAULT_MODEL and not features:
            newest_t = history.values_t[-DEVIATION_STEPS:]
            deviation = float(np.nanstd(newest_t)) if np.isfinite(newest_t).any() else 1.0
            return AnchorLSTM(version.weights, lookback=run.time_step, deviation=deviation or 1.0)
        if self.processor is None:
            raise ValueError(f"{run.model} needs PROCESSOR__ADDRESS, to be fed as in training")
        return _Module(self.node, self.metric, run, version.weights, self.processor)

    def _why_silent(self, steps: int, first: int) -> str:
        assert self.version is not None
        needed, horizon = (self.version.config.get(name, 0) for name in ("time-step", "horizon"))
        if steps < int(needed):
            return f"the model needs {needed} steps without a gap, and {steps} are there"
        return f"the model reaches {horizon} steps ahead, forecasts begin at {first}"

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        log.warning("no federated model", node=self.node, metric=self.metric, reason=reason)


class _Module:
    """A module of torch, which is imported here and not before."""

    def __init__(
        self,
        node: str,
        metric: str,
        run: RunConfig,
        weights: Mapping[str, NDArray[Any]],
        processor: Callable[[], AbstractContextManager[Feed]],
    ) -> None:
        from icos_fl_client import forecasts
        from icos_fl_client.node import build_model, load_weights

        model = build_model(run, metric)
        load_weights(model, weights)
        self._predict: Callable[[Latest], Array] = lambda latest: forecasts.predict(
            model, latest.rows_lf[None]
        )[0]
        self._query = run.query(node, metric)
        self._processor = processor

    def forecast(self, history: History, steps_h: Steps) -> Array:  # noqa: ARG002
        with self._processor() as processor:
            latest = processor.latest(self._query)
        said_h = latest.scale.restore(self._predict(latest))
        yhat_h = np.full(len(steps_h), np.nan)
        reached_h = steps_h <= len(said_h)
        yhat_h[reached_h] = said_h[steps_h[reached_h] - 1]
        return yhat_h[None]


def _identity(version: ModelVersion) -> tuple[int, object]:
    return version.round, version.metadata.get("created-unix-s")
