"""The board as Prometheus has it."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from icos_fl_client.serving.outlook import LEVELS, Outlook
from icos_fl_client.serving.settings import duration_text

COMBINATION = "combination"
"""The forecaster that is all of them together."""

_FAMILIES = {
    "yhat": ("What the metric is expected to be, in its own unit", ["horizon"]),
    "yhat_lower": ("Lower end of the interval of that level", ["horizon", "level"]),
    "yhat_upper": ("Upper end of the interval of that level", ["horizon", "level"]),
    "value": ("Mean of the newest whole step, from which forecasts start", []),
    "time_seconds": ("Unix time of the end of that step", []),
    "error": ("Mean absolute error of late, in the metric's unit", ["horizon", "forecaster"]),
    "coverage_ratio": (
        "Share of what came of late that was inside the interval",
        ["horizon", "level"],
    ),
    "none": ("1 while there is no forecast, for that reason", ["reason"]),
    "model_round": ("Round of the federated model that takes part", []),
    "model_created_timestamp_seconds": ("Unix time at which the node got that model", []),
}


class BoardCollector(Collector):
    """Gives what *outlooks* returns; what has no number has no series."""

    def __init__(self, outlooks: Callable[[], list[Outlook]]) -> None:
        self._outlooks = outlooks

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return _families().values()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = _families()
        for outlook in self._outlooks():
            for name, labels, value in _samples(outlook):
                if np.isfinite(value):
                    families[name].add_metric([outlook.node, outlook.metric, *labels], value)
        return families.values()


def _families() -> dict[str, GaugeMetricFamily]:
    return {
        name: GaugeMetricFamily(f"icos_fl_forecast_{name}", text, labels=["node", "metric", *more])
        for name, (text, more) in _FAMILIES.items()
    }


def _samples(outlook: Outlook) -> Iterator[tuple[str, tuple[str, ...], float]]:
    horizons = [duration_text(ahead_ns / 1e9) for ahead_ns in outlook.ahead_ns_h]
    yield "value", (), outlook.last_value
    if outlook.last_time_ns is not None:
        yield "time_seconds", (), outlook.last_time_ns / 1e9
    if outlook.none:
        yield "none", (outlook.none.reason.value,), 1.0
    if outlook.model:
        yield "model_round", (), float(outlook.model.round)
        created = outlook.model.metadata.get("created-unix-s", np.nan)
        yield "model_created_timestamp_seconds", (), float(created)
    for place, horizon in enumerate(horizons):
        for name, error_h in zip((*outlook.names, COMBINATION), outlook.error_kh, strict=True):
            yield "error", (horizon, name), float(error_h[place])
        for level, inside_h in zip(LEVELS, outlook.coverage_2h, strict=True):
            yield "coverage_ratio", (horizon, f"{level:g}"), float(inside_h[place])
        if said := outlook.forecast:
            yield "yhat", (horizon,), float(said.yhat_h[place])
            bounds = ((said.lower_80_h, said.upper_80_h), (said.lower_95_h, said.upper_95_h))
            for level, (lower_h, upper_h) in zip(LEVELS, bounds, strict=True):
                yield "yhat_lower", (horizon, f"{level:g}"), float(lower_h[place])
                yield "yhat_upper", (horizon, f"{level:g}"), float(upper_h[place])
