"""The metrics-validation consumer: what a window holds, and what changed since the last look."""

import contextlib
import csv
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from icos_fl_timeseries_store.conditions import Condition, Expectations, Finding, judge
from icos_fl_timeseries_store.contract import Rows, Store
from icos_fl_timeseries_store.errors import StoreDamaged, UnknownNode

_NO_ROWS = Rows((), (), np.empty(0, np.int64), np.empty((0, 0)), 0)
GAP_FACTOR = 1.5
"""Two neighbouring rows further apart than this many median distances have a gap between them."""


@dataclass(frozen=True)
class ColumnReport:
    """Statistics of one column over the window, in its unit; None while it has no value."""

    unit: str
    values: int
    nans: int
    minimum: float | None
    mean: float | None
    maximum: float | None
    last: float | None


@dataclass(frozen=True)
class Report:
    """One look at a window."""

    node: str
    rows: int
    added: int
    """Rows that were not there at the last look; all of them at the first."""
    removed: int
    """Rows of the last look that have left."""
    first_time_unix_s: float | None
    last_time_unix_s: float | None
    interval_seconds: float | None
    """Median distance of rows."""
    rate_per_second: float | None
    """Rows a second of the window's time."""
    gaps: int
    columns: dict[str, ColumnReport]
    conditions: tuple[Finding, ...] = ()
    """What is wrong, worst first."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"conditions": [found.as_dict() for found in self.conditions]}


def look(
    node: str, rows: Rows, before: Rows | None = None, conditions: Sequence[Finding] = ()
) -> Report:
    """Report on *rows* of *node*'s window, of which *before* was the last look.

    *conditions* is what ``conditions.judge`` found in them.
    """
    times = rows.times_ns_t
    distances = np.diff(times) / 1e9
    median = float(np.median(distances)) if len(distances) else None
    span = float((times[-1] - times[0]) / 1e9) if len(times) > 1 else None
    old = before.times_ns_t if before is not None else times[:0]
    return Report(
        node=node,
        rows=len(times),
        added=int(np.isin(times, old, invert=True).sum()),
        removed=int(np.isin(old, times, invert=True).sum()),
        first_time_unix_s=float(times[0] / 1e9) if len(times) else None,
        last_time_unix_s=float(times[-1] / 1e9) if len(times) else None,
        interval_seconds=median,
        rate_per_second=(len(times) - 1) / span if span else None,
        gaps=int((distances > GAP_FACTOR * median).sum()) if median is not None else 0,
        columns={
            column: _column(unit, rows.values_tf[:, index])
            for index, (column, unit) in enumerate(zip(rows.columns, rows.units, strict=True))
        },
        conditions=tuple(conditions),
    )


def _column(unit: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> ColumnReport:
    there = values[~np.isnan(values)]
    statistics = (
        (float(there.min()), float(there.mean()), float(there.max()), float(there[-1]))
        if len(there)
        else (None, None, None, None)
    )
    return ColumnReport(unit, len(there), len(values) - len(there), *statistics)


class Watcher:
    """Looks at windows of *store* again and again: that of *node*, or all that there are.

    With *recorded* the rows' times are not compared with the clock.
    """

    def __init__(
        self, store: Store, node: str | None, expectations: Expectations, *, recorded: bool = False
    ) -> None:
        self._store = store
        self._node = node
        self._expectations = expectations
        self._recorded = recorded
        self._before: dict[str, Rows] = {}

    def look(self) -> list[Report]:
        """One report a node, by name. Raises StoreUnavailable.

        A window that is asked for, or was there, and is not there now, is silent.
        """
        nodes = [self._node] if self._node else sorted({*self._store.nodes(), *self._before})
        return [self._look_at(node) for node in nodes]

    def wait(self, seconds: float) -> None:
        """Return when the one window changes, or after *seconds*. Raises StoreUnavailable."""
        if self._node in self._before:
            with contextlib.suppress(UnknownNode, StoreDamaged):
                self._store.window(self._node).wait(self._before[self._node].cursor, seconds)
                return
        time.sleep(seconds)

    def _look_at(self, node: str) -> Report:
        try:
            rows = self._store.window(node).read()
        except (UnknownNode, StoreDamaged) as error:
            damaged = isinstance(error, StoreDamaged)
            condition = Condition.DAMAGED if damaged else Condition.SILENT
            found, rows = [Finding(condition, "", str(error))], _NO_ROWS
        else:
            found = judge(rows, self._expectations, None if self._recorded else time.time_ns())
        report = look(node, rows, self._before.get(node), found)
        self._before[node] = rows
        return report


def to_csv(rows: Rows) -> str:
    """The rows as CSV: ``time_unix_s``, then the columns.

    Floats in the shortest form that reads back as the same value, whole numbers without a point, a
    missing value as nothing.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["time_unix_s", *rows.columns])
    for time_ns, values in zip(rows.times_ns_t.tolist(), rows.values_tf.tolist(), strict=True):
        seconds, rest = divmod(time_ns, 1_000_000_000)
        time_text = f"{seconds}.{rest:09d}".rstrip("0") if rest else str(seconds)
        writer.writerow([time_text, *(_number(value) for value in values)])
    return text.getvalue()


def _number(value: float) -> str:
    if value != value:
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
