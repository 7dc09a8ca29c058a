"""Looks at all windows again and again, and tells Prometheus what is wrong with them."""

import contextlib
import threading
import time
from typing import Any, NamedTuple

import structlog
from icos_fl_service import status
from icos_fl_timeseries_store import Store, StoreDamaged, StoreError, UnknownNode
from icos_fl_timeseries_store.conditions import Condition, Expectations, Finding, judge

from icos_fl_processor import metrics

JUDGE_SECONDS = 15.0
JUDGED_ROWS_MAX = 10_000
"""Newest rows that are looked at: what is wrong is so now, however large a window is."""

log = structlog.get_logger()


class Window(NamedTuple):
    """What a look at a window found."""

    rows: int | None
    """None of one that cannot be read."""
    found: list[Finding]


class Judging:
    """Judges the windows of a store every JUDGE_SECONDS, on a thread of its own.

    Times of *recorded* rows are not compared with the clock.
    """

    def __init__(self, expectations: Expectations, *, recorded: bool = False) -> None:
        self._expectations = expectations
        self._recorded = recorded
        self._telling = threading.Lock()
        self._told: set[tuple[str, ...]] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, store: Store) -> None:
        """Judge from now on, and whenever somebody asks for /status."""
        status.tell("windows", lambda: self._asked(store))
        self._thread = threading.Thread(
            target=self._run, args=(store,), name="judging", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Judge no more, and wait for the end of a look under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(JUDGE_SECONDS)

    def look(self, store: Store) -> dict[str, Window]:
        """Judge all windows now. Raises StoreUnavailable."""
        windows = {}
        for node in store.nodes():
            try:
                windows[node] = self._look_at(store, node)
            except UnknownNode:
                continue  # it was never made: its writer found the disk full
            except StoreDamaged as error:
                windows[node] = Window(None, [Finding(Condition.DAMAGED, "", str(error))])
        with self._telling:
            told = {labels for node, window in windows.items() for labels in _tell(node, window)}
            for labels in self._told - told:
                _forget(labels)
            self._told = told
        return windows

    def _asked(self, store: Store) -> dict[str, dict[str, Any]]:
        """All windows, for JSON; none while the store, which is what is waited for, is away."""
        try:
            windows = self.look(store)
        except StoreError:
            return {}
        return {
            node: {"rows": window.rows, "conditions": [found.as_dict() for found in window.found]}
            for node, window in windows.items()
        }

    def _look_at(self, store: Store, node: str) -> Window:
        window = store.window(node)
        info, rows = window.info(), window.read(last=JUDGED_ROWS_MAX)
        metrics.WINDOW_ROWS.labels(node).set(info.rows)
        metrics.WINDOW_CAPACITY_ROWS.labels(node).set(info.capacity_rows)
        if info.last_time_ns is not None:
            metrics.WINDOW_LAST_ROW.labels(node).set(info.last_time_ns / 1e9)
        found = judge(rows, self._expectations, None if self._recorded else time.time_ns())
        return Window(info.rows, found)

    def _run(self, store: Store) -> None:
        while True:
            try:
                self.look(store)
            except StoreError:
                metrics.STORE_ERRORS.inc()
            except Exception:  # else the windows would stay at their last word
                log.exception("windows cannot be judged")
            if self._stopping.wait(JUDGE_SECONDS):
                return


def _tell(node: str, window: Window) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = {
        (node, finding.column, finding.condition.word) for finding in window.found
    }
    for labels in found:
        metrics.WINDOW_CONDITION.labels(*labels).set(1)
    return found if window.rows is None else {*found, (node,)}


def _forget(labels: tuple[str, ...]) -> None:
    if len(labels) > 1:
        metrics.WINDOW_CONDITION.remove(*labels)
        return
    for gauge in (metrics.WINDOW_ROWS, metrics.WINDOW_CAPACITY_ROWS, metrics.WINDOW_LAST_ROW):
        with contextlib.suppress(KeyError):  # an empty window has no newest row
            gauge.remove(*labels)
