"""Follows the windows of a store: a thread a node, from rows to outlooks."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
from icos_fl_timeseries_store import Rows, Store, StoreError, UnknownNode, Window
from icos_fl_timeseries_store.conditions import (
    LATE_FACTOR,
    Condition,
    Expectations,
    Finding,
    judge,
)

from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.model import FederatedModel
from icos_fl_client.serving.outlook import MetricForecaster, NoForecast, Reason, Record
from icos_fl_client.units import limits_of

WAIT_SECONDS = 5.0
"""The longest that one wait for new rows lasts, and so how late the end is noticed."""
JUDGE_SECONDS = 14.0
"""A little less than the usual step, so that what is due is done when a step is whole."""
JUDGED_ROWS_MAX = 1000
MODEL_SECONDS = 29.0
SAVE_SECONDS = 300.0
RETRY_SECONDS = 2.0
UNKNOWN_SECONDS = 5.0
"""How often a window is looked for that is being made, or whose disk is full."""
STOP_SECONDS = 6.0
"""The longest that a thread is waited for which asks a store that does not answer."""

_REASONS = {
    Condition.SILENT: Reason.SILENT,
    Condition.STALE: Reason.STALE,
    Condition.UNAVAILABLE: Reason.UNAVAILABLE,
    Condition.STUCK: Reason.STUCK,
}
_NO_MEASUREMENTS = (Reason.UNAVAILABLE, Reason.STUCK)

log = structlog.get_logger()


@dataclass(frozen=True)
class Following:
    """What is forecast, and of what."""

    interval_ns: int
    ahead_ns_h: tuple[int, ...]
    metrics: tuple[str, ...] = ()
    """Empty: all."""
    expectations: Expectations = Expectations()  # noqa: RUF009 - frozen
    recorded: bool = False
    """Are the rows recorded ones, whose times are not compared with the clock?"""


@dataclass(frozen=True)
class NodeHealth:
    """A node's window, when it was judged last."""

    name: str
    rows: int
    capacity_rows: int
    conditions: tuple[dict[str, str], ...]
    """What is wrong, worst first: condition (its word), column, reason."""


class Follower:
    """Posts outlooks to *board*, of the windows that it has found, until ``stop``."""

    def __init__(
        self,
        following: Following,
        board: Board,
        kept: KeptState,
        processor: Callable[[], ProcessorClient] | None = None,
    ) -> None:
        self._following = following
        self._board = board
        self._kept = kept
        self._processor = processor
        self._nodes: dict[str, _Node] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def find(self, store: Store) -> None:
        """Follow every window of *store* from now on. Raises StoreError."""
        for name in store.nodes():
            if name not in self._nodes:
                node = _Node(name, store, self._following, self._board, self._kept, self._processor)
                self._nodes[name] = node
                thread = threading.Thread(
                    target=node.run, args=[self._stopping], name=f"follow {name}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """Follow no more, and keep what was learned."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for node in self._nodes.values():
            node.save()

    def record(self, node: str, metric: str) -> Record | None:
        """What was said of a metric and what came; None if it is not followed."""
        return found.record(metric) if (found := self._nodes.get(node)) else None

    def health(self) -> list[NodeHealth]:
        """Of each node whose window has been judged, sorted by name."""
        nodes = sorted(self._nodes.items())
        return [node.health for _, node in nodes if node.health]


class _Node:
    def __init__(
        self,
        name: str,
        store: Store,
        following: Following,
        board: Board,
        kept: KeptState,
        processor: Callable[[], ProcessorClient] | None,
    ) -> None:
        self._name = name
        self._store = store
        self._following = following
        self._board = board
        self._kept = kept
        self._processor = processor
        self._window: Window | None = None
        self._metrics: dict[str, MetricForecaster] = {}
        self._none: dict[str, NoForecast] = {}
        """By metric; that of the whole node under the empty name."""
        self.health: NodeHealth | None = None
        self._using = threading.Lock()
        self._cursor = 0
        self._newest_ns = 0
        """Time of the newest row."""
        self._judged_s = self._models_s = -float("inf")
        self._saved_s = self._looked_s = time.monotonic()

    def run(self, stopping: threading.Event) -> None:
        rest_seconds = 0.0
        while not stopping.wait(rest_seconds):
            try:
                self._look(rested=rest_seconds > 0)
                rest_seconds = self._rest_seconds()
            except StoreError as error:
                self._window = None
                self._store_away(error)
                unknown = isinstance(error, UnknownNode)
                rest_seconds = UNKNOWN_SECONDS if unknown else RETRY_SECONDS
            except Exception:  # else the node would stay at its last word
                log.exception("unexpected error", node=self._name)
                rest_seconds = RETRY_SECONDS

    def record(self, metric: str) -> Record | None:
        with self._using:
            found = self._metrics.get(metric)
            return found.record() if found else None

    def save(self) -> None:
        for name, metric in self._metrics.items():
            with self._using:
                state = metric.state()
            self._kept.save(self._name, name, state)

    def _look(self, *, rested: bool) -> None:
        if self._window is None:
            self._window = self._store.window(self._name)
        window = self._window
        rows = None
        if rested or window.wait(self._cursor, WAIT_SECONDS) != self._cursor:
            rows = window.read(after=self._cursor)
            if rows.cursor < self._cursor:  # a window that was made anew counts anew
                rows = window.read()
        now_s = time.monotonic()
        self._looked_s = now_s
        post = set()
        if now_s >= self._judged_s + JUDGE_SECONDS:
            self._judged_s = now_s
            self._judge(window)
            post = set(self._metrics)
        if rows is not None:
            with self._using:
                post |= self._add(rows)
            self._cursor = rows.cursor
        if now_s >= self._models_s + MODEL_SECONDS:
            self._models_s = now_s
            for name, metric in self._metrics.items():
                metric.take_model(self._store.model_state(self._name, name).get())
        self._post(post)
        if now_s >= self._saved_s + SAVE_SECONDS:
            self._saved_s = now_s
            self.save()

    def _rest_seconds(self) -> float:
        """How long no row can come that makes a step whole: each call of the store costs.

        A metric that has been silent for a step is not counted: the first one after may be late.
        """
        if self._following.recorded:
            return 0.0
        now_ns = max(time.time_ns(), self._newest_ns)  # whoever writes may be ahead
        dues_ns = [
            due_ns
            for metric in self._metrics.values()
            if (due_ns := metric.grid.due_ns or 0) > now_ns - self._following.interval_ns
        ]
        rest_ns = min(dues_ns, default=0) - now_ns
        return max(0.0, min(rest_ns / 1e9, JUDGE_SECONDS))

    def _judge(self, window: Window) -> None:
        rows = window.read(last=JUDGED_ROWS_MAX)
        now_ns = None if self._following.recorded else time.time_ns()
        found = judge(rows, self._following.expectations, now_ns)
        # Worst first, and so is what stays of two.
        self._none = {each.column: none for each in reversed(found) if (none := _none_of(each))}
        info = window.info()
        wrong = tuple(_condition(each.column, each.condition.word, each.reason) for each in found)
        self.health = NodeHealth(self._name, info.rows, info.capacity_rows, wrong)

    def _add(self, rows: Rows) -> set[str]:
        grown = set()
        if len(rows.times_ns_t):
            self._newest_ns = max(self._newest_ns, int(rows.times_ns_t[-1]))
        for place, (name, unit) in enumerate(zip(rows.columns, rows.units, strict=True)):
            wanted = not self._following.metrics or name in self._following.metrics
            if not wanted or (name not in self._metrics and _is_empty(rows, place)):
                continue
            if name not in self._metrics:
                self._metrics[name] = self._new(name, unit)
                grown.add(name)
            metric, none = self._metrics[name], self._none.get(name)
            metric.unit = unit or metric.unit
            usable = none is None or none.reason not in _NO_MEASUREMENTS
            if metric.add(rows.times_ns_t, rows.values_tf[:, place], usable=usable):
                grown.add(name)
        return grown

    def _new(self, name: str, unit: str) -> MetricForecaster:
        following = self._following
        expected = following.expectations.of(name, unit)
        lower, upper = limits_of(unit)
        metric = MetricForecaster(
            FederatedModel(self._name, name, following.interval_ns, self._processor),
            unit,
            following.ahead_ns_h,
            lower=lower if expected.minimum is None else expected.minimum,
            upper=upper if expected.maximum is None else expected.maximum,
        )
        if kept := self._kept.load(self._name, name):
            try:
                metric.restore(kept)
            except ValueError as error:
                self._kept.refuse(self._name, name, str(error))
        metric.take_model(self._store.model_state(self._name, name).get())
        return metric

    def _post(self, names: set[str]) -> None:
        for name in names:
            with self._using:
                metric = self._metrics[name]
                none = self._none.get("") or self._none.get(name) or self._behind(metric)
                outlook = metric.outlook(none)
            self._board.post(outlook)

    def _behind(self, metric: MetricForecaster) -> NoForecast | None:
        """Has it had no value for so long that even those who judge windows have forgotten it?"""
        limit = self._following.expectations.late_seconds
        late = (self._newest_ns - (metric.grid.last_time_ns or self._newest_ns)) / 1e9
        if late <= max(limit, LATE_FACTOR * metric.grid.distance_ns / 1e9):
            return None
        reason = f"no value for {late:g} s while rows go on, {limit:g} s are the limit"
        return NoForecast(Reason.SILENT, reason)

    def _store_away(self, error: StoreError) -> None:
        """Rows that nobody can read now may be there: what was said holds until it is old."""
        limit = self._following.expectations.late_seconds
        away = time.monotonic() - self._looked_s
        if away > limit:
            reason = f"for {away:.0f} s, {limit:g} s are the limit: {error}"
            none = NoForecast(Reason.STORE_UNAVAILABLE, reason)
            self._none = {"": none}
            if self.health:
                wrong = (_condition("", none.reason.value, reason),)
                self.health = replace(self.health, conditions=wrong)
            self._judged_s = -float("inf")
            self._post(set(self._metrics))


def _condition(column: str, word: str, reason: str) -> dict[str, str]:
    return {"condition": word, "column": column, "reason": reason}


def _none_of(found: Finding) -> NoForecast | None:
    reason = _REASONS.get(found.condition)
    return NoForecast(reason, found.reason) if reason else None


def _is_empty(rows: Rows, place: int) -> bool:
    return not (rows.values_tf[:, place] == rows.values_tf[:, place]).any()
