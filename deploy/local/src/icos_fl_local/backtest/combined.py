"""What nodes say beside a federated run: its model, combined with what each sees itself.

What is scored are the rows on which no node trained, from the first moment on at which the
federated model alone is scored too. Before it a node learns without the model, as one does that
has none yet.
"""

import itertools
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from icos_fl_client.forecasting import Combination
from icos_fl_client.forecasting.backtest import COMBINATION, Record
from icos_fl_client.serving.grid import DRIFT_SHARE_MAX
from icos_fl_client.serving.model import FederatedModel
from icos_fl_client.serving.settings import duration_text
from icos_fl_timeseries_store import ModelVersion
from numpy.typing import NDArray

from icos_fl_local import traces
from icos_fl_local.backtest.found import Judged, judge
from icos_fl_local.backtest.recorded import Stepped, checkpoint_in, end, stepped
from icos_fl_local.backtest.running import ForecasterClient
from icos_fl_local.deployment import steps_ahead
from icos_fl_local.errors import LocalError
from icos_fl_local.run_config import FORECAST_SECONDS, Value

LEARNED_STEPS = 400
"""Of a trace, so many newest steps before those that are scored are learned from.

On those that ship more of them change the median little, and a long trace would take long.
"""

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What of a run's configuration decides what is scored."""

    interval_s: float
    """0: each node's own distance of rows."""
    train_share: float
    lookback: int
    horizon: int

    @classmethod
    def of(cls, config: Mapping[str, Value]) -> "Run":
        return cls(
            float(config["interval"]),
            float(config["train-test-split"]),
            int(config["time-step"]),
            int(config["horizon"]),
        )

    def ahead(self, interval_s: float) -> int:
        """The step ahead that is nearest to five minutes, of those that the model has."""
        steps = range(1, self.horizon + 1)
        return min(steps, key=lambda step: abs(step * interval_s - FORECAST_SECONDS))

    def first_scored(self, values_t: NDArray[np.float64]) -> int:
        """Place of the first origin whose window has no step of the training part.

        The newest one where there is none: what is said there is told anyway.
        """
        there = np.flatnonzero(np.isfinite(values_t))
        first = math.floor(len(there) * self.train_share + 1e-9) + self.lookback - 1
        return int(there[min(first, len(there) - 1)]) if len(there) else 0


@dataclass(frozen=True)
class _Learned:
    """A node that has gone through all that comes before what is scored."""

    rest: Stepped
    combination: Combination
    model: FederatedModel


class Replays:
    """Replays traces while their federation trains; a context manager.

    In processes of its own that are forked, so nothing may have started a thread by then.
    """

    def __init__(
        self, recorded: Sequence[traces.Trace], metrics: Sequence[str], config: Mapping[str, Value]
    ) -> None:
        self._run = run = Run.of(config)
        self._notes: list[str] = []
        self._pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"), _be_quiet
        )
        self._learning: list[tuple[str, Future[_Learned]]] = []
        for trace, metric in itertools.product(recorded, metrics):
            interval_s = run.interval_s or trace.interval_seconds
            if metric not in map(traces.column_of, trace.columns):
                continue  # the federated model alone says so already
            if trace.interval_seconds > interval_s * (1 + DRIFT_SHARE_MAX):
                apart = f"rows are {trace.interval_seconds:g} s apart"
                self._notes.append(f"{trace.node}: {apart}, more than a step of {interval_s:g} s")
                continue
            future = self._pool.submit(_learn, trace, metric, interval_s, run)
            self._learning.append((metric, future))

    def judge(self, checkpoints: Path) -> Result:
        """What nodes would have said with the models in this folder."""
        notes = list(self._notes)
        metrics = {metric for metric, _ in self._learning}
        files = {metric: checkpoints / metric / "latest.safetensors" for metric in metrics}
        there = [file for file in files.values() if file.exists()]
        versions = dict(checkpoint_in(file, list(metrics)) for file in there)
        try:
            judging = [
                self._pool.submit(_judge, learning.result(), versions.get(metric))
                for metric, learning in self._learning
            ]
            judged = [future.result() for future in judging]
        except BrokenProcessPool:
            notes.append("No combination: a process that replays the traces died.")
            judged = []
        finally:
            self.close()
        return _result(judged, self._run, notes)

    def __enter__(self) -> "Replays":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End its processes, whatever they do."""
        end(self._pool)


def of_forecaster(
    address: str,
    config: Mapping[str, Value],
    forecasts: Sequence[Mapping[str, Any]],
    backtests: Sequence[Mapping[str, Any]],
) -> Result:
    """What the forecaster at *address* has said.

    Of the nodes and metrics of *forecasts*, and since the validation parts of *backtests*, which
    are the federated model's alone. Of a pair that is not among these, no error is told.
    """
    run = Run.of(config)
    starts_s = {
        (each["node"], each["metric"]): each["validation_start_unix_s"] for each in backtests
    }
    judged, notes = [], []
    try:
        with ForecasterClient(address) as client:
            there = client.metrics()
            for each in forecasts:
                node, metric = each["node"], each["metric"]
                if (node, metric) not in there:
                    notes.append(f"{node}, {metric}: the forecaster does not follow it")
                    continue
                said = client.record(node, metric)
                behind = each["last_time_unix_s"] - 2 * said.interval_seconds
                if not len(said.end_unix_s_t) or said.end_unix_s_t[-1] < behind:
                    notes.append(
                        f"{node}, {metric}: the forecaster is still going through the rows"
                    )
                    continue
                first_s = starts_s.get((node, metric), math.inf)
                first_s += (run.lookback - 1) * said.interval_seconds
                first = int(np.searchsorted(said.end_unix_s_t[:-1], first_s))
                about = node, metric, said.unit, said.interval_seconds
                end_unix_s_t = said.end_unix_s_t[first:]
                number_t = np.arange(len(end_unix_s_t))
                judged.append(judge(about, end_unix_s_t, number_t, _from(said.record, first)))
    except LocalError as error:
        notes.append(str(error))
    return _result(judged, run, notes)


def _from(record: Record, first: int) -> Record:
    names = ("values_t", "yhat_th", "quantile_tqh", "said_tkh")
    return replace(record, **{name: getattr(record, name)[first:] for name in names})


def _be_quiet() -> None:
    """Give way to the federation, end at once when told, and say nothing to the terminal."""
    os.nice(5)  # more would starve them where others compute
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for good


def _learn(trace: traces.Trace, metric: str, interval_s: float, run: Run) -> _Learned:
    ahead = run.ahead(interval_s)
    said = steps_ahead(interval_s)
    found = stepped(trace, metric, interval_s, max(ahead, *said))
    # A longer one is mixed by itself, so what is said of this one is what a node says.
    steps = [*(step for step in said if step < ahead), ahead]
    combination, model = found.combination(steps)
    first = run.first_scored(found.values_t)
    known = slice(max(0, first - LEARNED_STEPS), first)
    for value, row in zip(found.values_t[known], found.rows_t[known], strict=True):
        combination.update(value, row)
    return _Learned(found.part(slice(first, None)), combination, model)


def _judge(learned: _Learned, version: ModelVersion | None) -> Judged:
    return learned.rest.judge(learned.combination, learned.model, version)


def _result(judged: Sequence[Judged], run: Run, notes: Sequence[str]) -> Result:
    """As plain data: an entry a node and metric, of one step ahead; None is what is not known."""
    notes = [*notes, *(note for each in judged for note in each.notes)]
    results = [_entry(each, run) for each in judged if len(each.end_unix_s_t)]
    notes += [
        f"{each['node']}, {each['metric']}: no error of the combination yet: no row that no node "
        f"trained on came {duration_text(each['step'] * each['interval_seconds'])} after a forecast"
        for each in results
        if each["mae"] is None
    ]
    return {"results": results, "notes": notes}


def _entry(judged: Judged, run: Run) -> Result:
    record, interval_s = judged.record, judged.interval_seconds
    place = int(np.argmin(np.abs(record.steps_h - run.ahead(interval_s))))
    step, last_s = int(record.steps_h[place]), float(judged.end_unix_s_t[-1])
    scored = next((each for each in judged.scores if each.step == step), None)
    errors = {each.forecaster: each for each in scored.forecasters} if scored else {}
    combination, last = errors.get(COMBINATION), errors.get("last")
    low_95, low_80, high_80, high_95 = map(_plain, record.quantile_tqh[-1, :, place])
    return {
        "node": judged.node,
        "metric": judged.metric,
        "unit": judged.unit,
        "interval_seconds": interval_s,
        "step": step,
        "origins": combination.origins if combination else 0,
        "mae": combination.mae if combination else None,
        "last_value_mae": last.mae if last else None,
        "ratio": _plain(combination.ratio) if combination else None,
        "coverage": {each.percent: each.coverage for each in (scored.intervals if scored else ())},
        "last_time_unix_s": last_s,
        "time_unix_s": last_s + step * interval_s,
        "last_value": _plain(record.values_t[-1]),
        "yhat": _plain(record.yhat_th[-1, place]),
        "lower_80": low_80,
        "upper_80": high_80,
        "lower_95": low_95,
        "upper_95": high_95,
        "plot": _plot(judged, step),
    }


def _plot(judged: Judged, step: int) -> Result:
    """What was forecast *step* ahead of late, and what came."""
    late, horizon = judged.of_late(), judged.horizon(step)
    panel = {name: list(map(_plain, said_t)) for name, said_t in late["panels"][horizon].items()}
    came = {name: list(map(_plain, late[name])) for name in ("window_time_unix_s", "window")}
    return {"unit": judged.unit, "panels": {horizon: panel}, **came}


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
