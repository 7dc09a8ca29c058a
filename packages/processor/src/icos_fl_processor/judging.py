"""Looks at all windows again and again, and tells Prometheus what is wrong with them."""

import contextlib
import threading
import time

import structlog
from icos_fl_timeseries_store import Store, StoreDamaged, StoreError, UnknownNode
from icos_fl_timeseries_store.conditions import Condition, Expectations, Finding, judge

from icos_fl_processor import metrics

JUDGE_SECONDS = 15.0
JUDGED_ROWS_MAX = 10_000
"""Newest rows that are looked at: what is wrong is so now, however large a window is."""

log = structlog.get_logger()


class Judging:
    """Judges the windows of a store every JUDGE_SECONDS, on a thread of its own.

    Times of *recorded* rows are not compared with the clock.
    """

    def __init__(self, expectations: Expectations, *, recorded: bool = False) -> None:
        self._expectations = expectations
        self._recorded = recorded
        self._told: set[tuple[str, ...]] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, store: Store) -> None:
        """Judge from now on."""
        self._thread = threading.Thread(
            target=self._run, args=(store,), name="judging", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Judge no more, and wait for the end of a look under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(JUDGE_SECONDS)

    def look(self, store: Store) -> None:
        """Judge all windows now. Raises StoreUnavailable."""
        told = set()
        for node in store.nodes():
            try:
                told |= self._look_at(store, node)
            except UnknownNode:
                continue  # it was never made: its writer found the disk full
            except StoreDamaged as error:
                told |= _tell(node, [Finding(Condition.DAMAGED, "", str(error))])
        for labels in self._told - told:
            _forget(labels)
        self._told = told

    def _look_at(self, store: Store, node: str) -> set[tuple[str, ...]]:
        window = store.window(node)
        info, rows = window.info(), window.read(last=JUDGED_ROWS_MAX)
        metrics.WINDOW_ROWS.labels(node).set(info.rows)
        metrics.WINDOW_CAPACITY_ROWS.labels(node).set(info.capacity_rows)
        if info.last_time_ns is not None:
            metrics.WINDOW_LAST_ROW.labels(node).set(info.last_time_ns / 1e9)
        found = judge(rows, self._expectations, None if self._recorded else time.time_ns())
        return _tell(node, found) | {(node,)}

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


def _tell(node: str, findings: list[Finding]) -> set[tuple[str, ...]]:
    told: set[tuple[str, ...]] = {
        (node, finding.column, finding.condition.word) for finding in findings
    }
    for labels in told:
        metrics.WINDOW_CONDITION.labels(*labels).set(1)
    return told


def _forget(labels: tuple[str, ...]) -> None:
    if len(labels) > 1:
        metrics.WINDOW_CONDITION.remove(*labels)
        return
    for gauge in (metrics.WINDOW_ROWS, metrics.WINDOW_CAPACITY_ROWS, metrics.WINDOW_LAST_ROW):
        with contextlib.suppress(KeyError):  # an empty window has no newest row
            gauge.remove(*labels)
