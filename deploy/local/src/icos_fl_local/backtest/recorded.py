"""Recorded traces, replayed step by step into the combination that a node runs."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from icos_fl_client.data import Latest, Scale
from icos_fl_client.errors import NoSequences
from icos_fl_client.forecasting import Combination, History, backtest
from icos_fl_client.forecasting.history import GAP_STEPS_MAX
from icos_fl_client.processor_client import Query
from icos_fl_client.serving.grid import DRIFT_SHARE_MAX, Grid
from icos_fl_client.serving.model import FederatedModel
from icos_fl_client.serving.settings import (
    STEPS_AHEAD_MAX,
    ForecasterSettings,
    duration_seconds,
    duration_text,
)
from icos_fl_client.units import limits_of
from icos_fl_processor import Processor, ProcessorError
from icos_fl_processor.convert import spec
from icos_fl_timeseries_store import MemoryStore, ModelVersion
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from icos_fl_local import traces
from icos_fl_local.backtest.found import Found, Judged, gather, judge, known
from icos_fl_local.errors import LocalError, UsageError
from icos_fl_local.run_config import choose_metrics

HORIZONS = tuple(map(duration_text, ForecasterSettings.model_fields["horizons"].default))
INTERVAL_SECONDS = round(ForecasterSettings.model_fields["interval_seconds"].default)


@dataclass(frozen=True)
class Replayed:
    """What traces are replayed for. No nodes: all; no metrics: those that ``up`` learns."""

    nodes: Sequence[str]
    metrics: Sequence[str]
    horizons: Sequence[str]
    interval_seconds: int | None = None
    """None: 15, or what the rows of a trace are apart, if that is more."""
    model: Path | None = None
    """A checkpoint."""


def of_traces(folder: Path, options: Replayed) -> Found:
    """Replay recorded traces. Raises TraceError, UsageError or LocalError."""
    horizons_s = sorted({_seconds(text) for text in options.horizons})
    loaded = traces.load(folder)
    chosen = known("node", options.nodes, [trace.node for trace in loaded])
    loaded = [trace for trace in loaded if trace.node in chosen]
    columns = [traces.column_of(name) for trace in loaded for name in trace.columns]
    metrics = choose_metrics(options.metrics, columns)
    checkpoint = checkpoint_in(options.model, metrics) if options.model else None
    notes = [f"{options.model} may have been trained on these rows"] if options.model else []
    replays = []
    for trace in loaded:
        interval_s = options.interval_seconds or _interval_seconds(trace)
        if trace.interval_seconds > interval_s * (1 + DRIFT_SHARE_MAX):
            apart = f"rows are {trace.interval_seconds:g} s apart"
            notes.append(f"{trace.node}: {apart}, more than a step of {interval_s} s")
            continue
        steps = list(_steps(trace.node, horizons_s, interval_s, notes))
        for metric in metrics if steps else ():
            if metric in map(traces.column_of, trace.columns):
                arguments = trace, metric, interval_s, steps, checkpoint
                replays.append(functools.partial(_replay, *arguments))
            elif metric in options.metrics:
                notes.append(f"{trace.node}: no metric {metric}")
    return gather(f"traces of {folder}", _together(replays), notes)


def _interval_seconds(trace: traces.Trace) -> int:
    distance_s = trace.interval_seconds
    fits = distance_s <= INTERVAL_SECONDS * (1 + DRIFT_SHARE_MAX)
    return INTERVAL_SECONDS if fits else math.ceil(distance_s)


def _seconds(text: str) -> float:
    try:
        return duration_seconds(text)
    except ValueError as error:
        raise UsageError(f"--horizon {error}") from None


def _steps(
    node: str, horizons_s: Sequence[float], interval_s: int, notes: list[str]
) -> Iterator[int]:
    """The horizons in steps; *notes* gets a line for each of which that cannot be told."""
    for horizon_s in horizons_s:
        steps = horizon_s / interval_s
        if steps == round(steps) and 1 <= steps <= STEPS_AHEAD_MAX:
            yield round(steps)
        else:
            has = f"{round(steps, 4):g} steps of {interval_s} s"
            limits = f"1 to {STEPS_AHEAD_MAX} whole ones are needed"
            notes.append(f"{node}: horizon {duration_text(horizon_s)} is {has}; {limits}")


def checkpoint_in(file: Path, metrics: Sequence[str]) -> tuple[str, ModelVersion]:
    """A metric and its model, as ``icos-fl-server`` wrote them. Raises UsageError."""
    try:
        with safe_open(file, "np") as opened:
            facts = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metric, round_, run = facts["metric"], int(facts["round"]), json.loads(facts["run-config"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(f"--model {file} is no checkpoint of icos-fl-server: {error}") from None
    if metric not in metrics:
        raise UsageError(f"--model {file} is of {metric}; asked for are: {', '.join(metrics)}")
    return metric, ModelVersion(round_, weights, run)


@dataclass(frozen=True)
class Stepped:
    """One metric of a trace on the grid of a node: t steps, NaN where one has no value."""

    trace: traces.Trace
    metric: str
    unit: str
    interval_ns: int
    row_distance_ns: int
    number_t: NDArray[np.int64]
    end_unix_s_t: NDArray[np.float64]
    values_t: NDArray[np.float64]
    rows_t: NDArray[np.float64]
    """The newest row of each step."""

    def part(self, steps: slice) -> "Stepped":
        """Some of the steps."""
        names = ("number_t", "end_unix_s_t", "values_t", "rows_t")
        return replace(self, **{name: getattr(self, name)[steps] for name in names})

    def combination(self, steps: Sequence[int]) -> tuple[Combination, FederatedModel]:
        """As a node has it before its first row; the model is silent until it takes a version."""
        model = FederatedModel(self.trace.node, self.metric, self.interval_ns)
        lower, upper = limits_of(self.unit)
        return Combination(steps, [model], lower=lower, upper=upper), model

    def judge(
        self, combination: Combination, model: FederatedModel, version: ModelVersion | None
    ) -> Judged:
        """What *combination* says of these steps with its *model* in this *version*."""
        recorded = RecordedProcessor(self.trace, self.end_unix_s_t, combination.history)
        model.processor = lambda: contextlib.nullcontext(recorded)
        model.take(version, combination.history, self.row_distance_ns)
        record = backtest.replay(self.values_t, combination, self.rows_t)
        said_th = record.said_tkh[:, combination.names.index(*model.names)]
        notes = []
        if version and not np.isfinite(said_th).any():
            notes = [f"{self.trace.node}, {self.metric}: {model.why_not}"]
        about = self.trace.node, self.metric, self.unit, self.interval_ns / 1e9
        return judge(about, self.end_unix_s_t, self.number_t, record, notes)


class RecordedProcessor:
    """What a node's processor would give a model of one's own, as the rows of *trace* come.

    It has those of the steps that *history* has by then; those that are still to come end at
    *end_unix_s_t*.
    """

    def __init__(
        self, trace: traces.Trace, end_unix_s_t: NDArray[np.float64], history: History
    ) -> None:
        self._trace, self._end_unix_s_t, self._history = trace, end_unix_s_t, history
        self._steps_before = history.count
        self._columns = [traces.column_of(name) for name in trace.columns]
        self._units = dict(zip(self._columns, trace.units, strict=True))
        store = MemoryStore()
        self._window = store.create_window(trace.node, len(trace.times_s))
        self._processor = Processor(store)
        self._rows = 0

    def latest(self, query: Query) -> Latest:
        """The newest lookback. Raises NoSequences."""
        end_unix_s = self._end_unix_s_t[self._history.count - self._steps_before - 1]
        known = int(np.searchsorted(self._trace.times_s, end_unix_s))
        times_ns_t = self._trace.times_s[self._rows : known] * 10**9
        values_tf = self._trace.values_tf[self._rows : known]
        self._window.append(self._columns, times_ns_t, values_tf, self._units)
        self._rows = known
        try:
            found = self._processor.latest(spec(query.series()))
        except ProcessorError as error:
            raise NoSequences(str(error)) from None
        metric = found.columns[0]
        scale = Scale(metric.unit, metric.mean, metric.standard_deviation)
        return Latest(found.rows_sf, scale, found.interval_ns, found.last_time_ns)


def stepped(trace: traces.Trace, metric: str, interval_s: float, ahead: int) -> Stepped:
    """The steps of *metric*, of which a node forecasts up to *ahead* ones."""
    place = [traces.column_of(name) for name in trace.columns].index(metric)
    grid = Grid(round(interval_s * 1e9))
    whole = list(grid.add(trace.times_s * 10**9, trace.values_tf[:, place]))
    number_t, values_tc = backtest.with_gaps(
        np.array([step.number for step in whole], np.int64),
        np.array([[step.mean, step.row] for step in whole]).reshape(-1, 2),
        GAP_STEPS_MAX + 2 + ahead,  # of more a combination knows nothing either
    )
    return Stepped(
        trace,
        metric,
        trace.units[place],
        grid.interval_ns,
        grid.distance_ns,
        number_t,
        np.array([grid.end_ns(number) for number in number_t.tolist()]) / 1e9,
        *values_tc.T,
    )


def _replay(
    trace: traces.Trace,
    metric: str,
    interval_s: int,
    steps: Sequence[int],
    checkpoint: tuple[str, ModelVersion] | None,
) -> Judged:
    found = stepped(trace, metric, interval_s, max(steps))
    version = checkpoint[1] if checkpoint and checkpoint[0] == metric else None
    return found.judge(*found.combination(steps), version)


def _together(replays: Sequence["functools.partial[Judged]"]) -> Iterator[Judged]:
    """Run them on all cores, in processes that end with this one; tell how far it is.

    Raises LocalError if one of them dies.
    """
    cores = min(len(os.sched_getaffinity(0)), len(replays))
    if cores < 2:
        yield from _told(map(_call, replays), len(replays))
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cores, spawn, _leave_interrupts)
    try:
        yield from _told(pool.map(_call, replays), len(replays))
    except BrokenProcessPool:
        raise LocalError("a process that replays the traces died") from None
    finally:
        end(pool)


def end(pool: ProcessPoolExecutor) -> None:
    """End its processes, whatever they do."""
    for process in multiprocessing.active_children():
        process.terminate()
    pool.shutdown(cancel_futures=True)


def _told(judged: Iterable[Judged], total: int) -> Iterator[Judged]:
    """Each with a line on standard error, which a terminal has one of, at last none."""
    before, after = ("\r\x1b[2K", "") if sys.stderr.isatty() else ("", "\n")
    for count, found in enumerate(judged, start=1):
        line = f"{before}{count} of {total}: {found.node}, {found.metric}"
        print(line, end=after, file=sys.stderr, flush=True)
        yield found
    print(before, end="", file=sys.stderr, flush=True)


def _call(replay: "functools.partial[Judged]") -> Judged:
    return replay()


def _leave_interrupts() -> None:
    """Ctrl-C goes to the whole group; the parent ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
