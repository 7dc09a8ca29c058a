"""The page for people: what a node expects, and how what it had expected fared."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from importlib import resources
from typing import Any

import numpy as np
from icos_fl_service.security import Security
from icos_fl_service.web import Refusal, WebPage, number

from icos_fl_client.forecasting.history import Array
from icos_fl_client.forecasting.intervals import ERRORS_MIN
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower
from icos_fl_client.serving.metrics import COMBINATION
from icos_fl_client.serving.outlook import Outlook, Record
from icos_fl_client.serving.settings import duration_text

RECORD_STEPS = 480
"""So many newest ones are shown."""
BOUNDS = ("lower_80", "upper_80", "lower_95", "upper_95")


class Page(WebPage):
    """Serves what *follower* posts on *board*: see WebPage.

    *recorded*: times of rows are not compared with the clock.
    """

    def __init__(
        self,
        address: str,
        board: Board,
        follower: Follower,
        newest: Callable[[], Security],
        *,
        recorded: bool = False,
    ) -> None:
        self._board = board
        self._follower = follower
        self._recorded = recorded
        static = resources.files("icos_fl_client.serving") / "static"
        answers = {"/api/forecasts": self._forecasts, "/api/record": self._past}
        super().__init__(address, static, answers, newest)

    def _forecasts(self, _: Mapping[str, str]) -> dict[str, Any]:
        return {
            "now": None if self._recorded else time.time(),
            "errors_min": ERRORS_MIN,
            "nodes": [asdict(health) for health in self._follower.health()],
            "forecasts": [_forecast(outlook) for outlook in self._board.outlooks()],
        }

    def _past(self, query: Mapping[str, str]) -> dict[str, Any]:
        node, metric = (query.get(name, "") for name in ("node", "metric"))
        record = self._follower.record(node, metric)
        if record is None or record.first_time_ns is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"nothing of {metric!r} of {node!r}")
        return _record(record, record.first_time_ns)


def _forecast(outlook: Outlook) -> dict[str, Any]:
    time_ns, model, none = outlook.last_time_ns, outlook.model, outlook.none
    return {
        "node": outlook.node,
        "metric": outlook.metric,
        "unit": outlook.unit,
        "interval_s": outlook.interval_ns / 1e9,
        "time": None if time_ns is None else time_ns / 1e9,
        "value": number(outlook.last_value),
        "horizons": [_horizon(outlook, place) for place in range(len(outlook.ahead_ns_h))],
        "model": model and {"round": model.round, "created": model.metadata.get("created-unix-s")},
        "no_model": outlook.no_model,
        "none": none and {"reason": none.reason.value, "message": none.message},
    }


def _horizon(outlook: Outlook, place: int) -> dict[str, Any]:
    ahead_s = outlook.ahead_ns_h[place] / 1e9
    found = {"ahead": duration_text(ahead_s), "ahead_s": ahead_s}
    if said := outlook.forecast:
        bounds = (said.lower_80_h, said.upper_80_h, said.lower_95_h, said.upper_95_h)
        told = zip(("yhat", *BOUNDS), (said.yhat_h, *bounds), strict=True)
        found |= {name: number(array_h[place]) for name, array_h in told}
    return found


def _record(record: Record, first_time_ns: int) -> dict[str, Any]:
    """What came of late, what had been said of it, and how that fared in all that is kept."""
    first = max(0, len(record.values_t) - RECORD_STEPS)
    return {
        "first_time": (first_time_ns + first * record.interval_ns) / 1e9,
        "interval_s": record.interval_ns / 1e9,
        "values": _numbers(record.values_t[first:]),
        "horizons": [_past(record, place, first) for place in range(len(record.ahead_ns_h))],
    }


def _past(record: Record, place: int, first: int) -> dict[str, Any]:
    """Of one horizon; series begin at step *first*, and stand at the step that they are of."""
    ahead_ns, values_t = record.ahead_ns_h[place], record.values_t
    said_tc = np.concatenate([record.bounds_tbh, record.yhat_th[:, None], record.said_tkh], axis=1)
    of_tc = np.full(said_tc.shape[:2], np.nan)
    steps = min(ahead_ns // record.interval_ns, len(of_tc))
    of_tc[steps:] = said_tc[: len(of_tc) - steps, :, place]
    series = dict(zip((*BOUNDS, "yhat"), of_tc.T, strict=False))
    return {
        "ahead": duration_text(ahead_ns / 1e9),
        "coverage_80": _coverage(series["lower_80"], values_t, series["upper_80"]),
        "coverage_95": _coverage(series["lower_95"], values_t, series["upper_95"]),
        "errors": _errors(
            (COMBINATION, *record.names), np.abs(of_tc[:, len(BOUNDS) :] - values_t[:, None])
        ),
        **{name: _numbers(array_t[first:]) for name, array_t in series.items()},
    }


def _coverage(lower_t: Array, values_t: Array, upper_t: Array) -> float | None:
    known_t = np.isfinite(lower_t + values_t)
    inside_t = (lower_t <= values_t) & (values_t <= upper_t)
    return number(float(inside_t[known_t].mean())) if known_t.any() else None


def _errors(names: tuple[str, ...], error_tk: Array) -> list[dict[str, Any]]:
    """Mean absolute error of each, and its ratio to that of the last value in the same cases: some
    speak only where it is easy."""
    last_t = error_tk[:, names.index("last")]
    found = []
    for name, error_t in zip(names, error_tk.T, strict=True):
        known_t = np.isfinite(error_t + last_t)
        if not known_t.any():
            continue
        error, last = float(error_t[known_t].mean()), float(last_t[known_t].mean())
        ratio = number(error / last) if last else None
        cases = int(known_t.sum())
        found.append({"name": name, "error": number(error), "ratio": ratio, "cases": cases})
    return found


def _numbers(values: Array) -> list[float | None]:
    return [number(value) for value in values.tolist()]
