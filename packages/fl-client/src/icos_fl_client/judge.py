"""Forecasts and backtests of the models that a node keeps, as plain data in the metric's unit.

No server is needed: weights come from the node's own store, rows from its processor.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from icos_fl_timeseries_store import ModelVersion, Store, UnknownNode
from numpy.typing import NDArray

from icos_fl_client import forecasts
from icos_fl_client.data import Run, Scale, Sequences
from icos_fl_client.errors import ClientError, NoSequences, NotFinite
from icos_fl_client.models import ModelError
from icos_fl_client.node import build_model, load_weights
from icos_fl_client.processor_client import ProcessorClient, Query
from icos_fl_client.settings import RunConfig, parse
from icos_fl_client.units import limits_of

Answer = dict[str, Any]


class Judge:
    """Judges the newest global model of each node and metric."""

    def __init__(self, store: Store, processor: ProcessorClient) -> None:
        self._store = store
        self._processor = processor

    def forecast(self, nodes: Iterable[str], metrics: list[str]) -> Answer:
        """What comes next, with intervals from the node's own recent errors."""
        answers, unavailable = self._each(nodes, metrics, self._forecast)
        return {"forecasts": answers, "unavailable": unavailable}

    def backtest(self, nodes: Iterable[str], metrics: list[str]) -> Answer:
        """Errors over the validation part, that is, over rows that no node trained on."""
        answers, unavailable = self._each(nodes, metrics, self._backtest)
        return {"results": answers, "unavailable": unavailable}

    def _each(
        self,
        nodes: Iterable[str],
        metrics: list[str],
        judge: Callable[[str, str, ModelVersion], Answer],
    ) -> tuple[list[Answer], list[Answer]]:
        answers, unavailable = [], []
        for node in nodes:
            for metric in metrics:
                try:
                    version = self._store.model_state(node, metric).get()
                    if version is None:
                        raise self._no_model(node, metric)
                    answers.append({"node": node, "metric": metric} | judge(node, metric, version))
                except (ClientError, ModelError, UnknownNode) as error:
                    unavailable.append({"node": node, "metric": metric, "reason": str(error)})
        return answers, unavailable

    def _no_model(self, node: str, metric: str) -> NoSequences | UnknownNode:
        nodes = self._processor.nodes()
        if node not in nodes:
            return UnknownNode(node, nodes)
        return NoSequences(f"{node} keeps no model of {metric}")

    def _forecast(self, node: str, metric: str, version: ModelVersion) -> Answer:
        model, query = _restore(node, metric, version)
        latest = self._processor.latest(query)
        sequences = self._processor.sequences(query)
        # Scores of the newest origins, the validation part's: the model never saw those rows.
        errors = forecasts.recent_errors(
            model,
            _steps([*sequences.train, *sequences.validation]),
            lookback=query.lookback,
            horizon=query.horizon,
        )
        forecast = forecasts.forecast(model, latest.rows_lf, errors)
        if not np.isfinite(forecast.yhat_h).all():
            raise _not_finite(node, metric, version)
        first = latest.last_time_ns + latest.interval_ns
        created = version.metadata.get("created-unix-s", math.nan)
        return {
            "unit": latest.scale.unit,
            "round": version.round,
            "model_age_seconds": _plain(time.time() - float(created)),
            "interval_seconds": latest.interval_ns / 1e9,
            "last_time_unix_s": latest.last_time_ns / 1e9,
            "last_value": _plain(latest.scale.restore(latest.rows_lf[-1:, 0])[0]),
            "time_unix_s": _times(first, latest.interval_ns, query.horizon),
            **_in_units(forecast, latest.scale),
        }

    def _backtest(self, node: str, metric: str, version: ModelVersion) -> Answer:
        model, query = _restore(node, metric, version)
        sequences = self._processor.sequences(query)
        result = forecasts.backtest(
            model,
            _steps(sequences.train),
            _steps(sequences.validation),
            lookback=query.lookback,
            horizon=query.horizon,
        )
        if result.example is None:
            raise NoSequences(
                f"{node}: {metric} has no sequence of {query.lookback + query.horizon} steps "
                "without a gap in the part that no node trained on"
            )
        if not np.isfinite(result.mae_h).all():
            raise _not_finite(node, metric, version)
        deviation = sequences.scale.standard_deviation
        mae_by_step = {
            "federated": result.mae_h * deviation,
            "last_value": result.last_value_mae_h * deviation,
            "window_mean": result.window_mean_mae_h * deviation,
        }
        mae = {name: float(mae_h.mean()) for name, mae_h in mae_by_step.items()}
        return {
            "unit": sequences.scale.unit,
            "round": version.round,
            "interval_seconds": sequences.interval_ns / 1e9,
            "validation_start_unix_s": sequences.validation[0].first_time_ns / 1e9,
            "lookback": query.lookback,
            "horizon": query.horizon,
            "origins": result.origins,
            "mae": {name: _plain(value) for name, value in mae.items()},
            "mae_by_step": {name: _list(mae_h) for name, mae_h in mae_by_step.items()},
            "best": min(mae, key=lambda name: mae[name]),
            "coverage": {"80": _plain(result.coverage_80), "95": _plain(result.coverage_95)},
            "values": result.values,
            "plot": _plot(result.example, sequences),
        }


def _restore(node: str, metric: str, version: ModelVersion) -> tuple[torch.nn.Module, Query]:
    """The model that was kept, and the query that gives its input."""
    run = parse(RunConfig, version.config, f"configuration kept beside {metric}'s model")
    model = build_model(run, metric)
    load_weights(model, dict(version.weights))
    return model, run.query(node, metric)


def _not_finite(node: str, metric: str, version: ModelVersion) -> NotFinite:
    return NotFinite(
        f"{node}: the model of {metric} from round {version.round} forecasts values that are not "
        "finite"
    )


def _steps(runs: list[Run]) -> list[forecasts.Run]:
    """Runs by number of step; all runs of one answer share one grid."""
    return [
        forecasts.Run(run.first_time_ns // run.interval_ns, np.asarray(run.rows_tf)) for run in runs
    ]


def _plot(example: forecasts.Example, sequences: Sequences) -> Answer:
    scale, interval = sequences.scale, sequences.interval_ns
    phase = sequences.validation[0].first_time_ns % interval
    first = example.start * interval + phase
    return {
        "window_time_unix_s": _times(
            first - sequences.lookback * interval, interval, sequences.lookback
        ),
        "window": _list(scale.restore(example.window_l)),
        "time_unix_s": _times(first, interval, sequences.horizon),
        "actual": _list(scale.restore(example.actual_h)),
        **_in_units(example.forecast, scale),
    }


def _in_units(forecast: forecasts.Forecast, scale: Scale) -> dict[str, list[float | None]]:
    """In the metric's unit, and never outside what the unit can be."""
    lowest, highest = limits_of(scale.unit)
    series = {
        "yhat": forecast.yhat_h,
        "lower_80": forecast.lower_80_h,
        "upper_80": forecast.upper_80_h,
        "lower_95": forecast.lower_95_h,
        "upper_95": forecast.upper_95_h,
    }
    return {
        name: _list(np.clip(scale.restore(values_h), lowest, highest))
        for name, values_h in series.items()
    }


def _times(first_ns: int, interval_ns: int, count: int) -> list[float]:
    return [(first_ns + i * interval_ns) / 1e9 for i in range(count)]


def _list(values: NDArray[np.float64]) -> list[float | None]:
    return [_plain(value) for value in values.tolist()]


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
