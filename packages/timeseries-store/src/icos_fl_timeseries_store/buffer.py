"""The rows of a window in numpy: what both stores keep, and the only place that changes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icos_fl_timeseries_store.contract import Appended, Rows, Times, Values, WindowInfo
from icos_fl_timeseries_store.errors import InvalidRows

CAPACITY_ROWS_MAX = 10_000_000
COLUMNS_MAX = 1_000
_SMALLEST_ALLOCATION_ROWS = 64


@dataclass(frozen=True)
class Snapshot:
    """All that a RowBuffer is made of, as copies; t rows, f columns."""

    capacity_rows: int
    cursor: int
    columns: tuple[str, ...]
    units: dict[str, str]
    times_ns_t: Times
    values_tf: Values
    revisions_t: NDArray[np.int64]
    """The cursor at which each row was written last."""


class RowBuffer:
    """The newest rows of one node, in order of time. Not safe for threads: its owner locks.

    Rows live in the slice [start, end) of arrays that are larger than needed: rows at the end are
    written behind it and old ones leave by moving the start, so an append costs what it brings,
    however large the window. Only when the arrays are full are the rows moved to the front.
    """

    def __init__(self, capacity_rows: int) -> None:
        self.columns: tuple[str, ...] = ()
        self.units: dict[str, str] = {}
        self.cursor = 0
        self._start = self._end = 0
        self._times = np.empty(0, np.int64)
        self._values = np.empty((0, 0), np.float64)
        self._revisions = np.empty(0, np.int64)
        self.capacity_rows = 0
        self.resize(capacity_rows)

    def __len__(self) -> int:
        return self._end - self._start

    def snapshot(self) -> Snapshot:
        """What ``restored`` makes the same buffer of."""
        kept = slice(self._start, self._end)
        return Snapshot(
            self.capacity_rows,
            self.cursor,
            self.columns,
            dict(self.units),
            self._times[kept].copy(),
            self._values[kept].copy(),
            self._revisions[kept].copy(),
        )

    @classmethod
    def restored(cls, snapshot: Snapshot) -> "RowBuffer":
        """The buffer that *snapshot* was taken of; takes over its arrays."""
        buffer = cls(snapshot.capacity_rows)
        buffer.cursor = snapshot.cursor
        buffer.columns, buffer.units = snapshot.columns, dict(snapshot.units)
        buffer._times, buffer._values = snapshot.times_ns_t, snapshot.values_tf
        buffer._revisions = snapshot.revisions_t
        buffer._end = len(snapshot.times_ns_t)
        return buffer

    def resize(self, capacity_rows: int) -> None:
        """Hold *capacity_rows* rows from now on; the oldest go if there are more."""
        check_capacity(capacity_rows)
        self.capacity_rows = capacity_rows
        self._start = max(self._start, self._end - capacity_rows)

    def check(
        self, columns: Sequence[str], times_ns_t: Times, values_tf: Values
    ) -> tuple[Times, Values]:
        """The arrays that ``append`` would take. Raises InvalidRows where it would."""
        self._new(columns)
        return _checked(columns, times_ns_t, values_tf)

    def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        """See ``Window.append``."""
        times, values = _checked(columns, times_ns_t, values_tf)
        places = self._places(columns)
        self.units.update(units or {})
        times, values, doubled = _merged_by_time(times, values)

        too_old = np.zeros(len(times), bool)
        if len(self) >= self.capacity_rows and len(times):
            too_old = times < self._times[self._start]
        fresh_times, fresh_values = times[~too_old], values[~too_old]
        added = merged = removed = 0
        if len(fresh_times):
            self.cursor += 1
            known = self._times[self._start : self._end]
            at = np.searchsorted(known, fresh_times)
            there = np.zeros(len(fresh_times), bool)
            inside = at < len(known)
            there[inside] = known[at[inside]] == fresh_times[inside]
            self._overwrite(at[there], places, fresh_values[there])
            self._insert(at[~there], places, fresh_times[~there], fresh_values[~there])
            merged, added = int(there.sum()), int((~there).sum())
            removed = max(0, len(self) - self.capacity_rows)
            self._start += removed
        return Appended(
            added=added,
            merged=merged + doubled,
            too_old=int(too_old.sum()),
            removed=removed,
            cursor=self.cursor,
        )

    def read(self, *, last: int | None = None, after: int | None = None) -> Rows:
        """See ``Window.read``. The arrays are copies."""
        start = self._start if last is None else max(self._start, self._end - max(0, last))
        chosen: slice | NDArray[np.intp] = slice(start, self._end)
        if after is not None:
            chosen = start + np.flatnonzero(self._revisions[start : self._end] > after)
        return Rows(
            columns=self.columns,
            units=self._unit_row(),
            times_ns_t=self._times[chosen].copy(),
            values_tf=self._values[chosen].copy(),
            cursor=self.cursor,
        )

    def info(self) -> WindowInfo:
        """See ``Window.info``."""
        times = self._times[self._start : self._end]
        return WindowInfo(
            rows=len(times),
            capacity_rows=self.capacity_rows,
            columns=self.columns,
            units=self._unit_row(),
            first_time_ns=int(times[0]) if len(times) else None,
            last_time_ns=int(times[-1]) if len(times) else None,
            cursor=self.cursor,
        )

    def _unit_row(self) -> tuple[str, ...]:
        return tuple(self.units.get(column, "") for column in self.columns)

    def _new(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of *columns* that the window lacks. Raises InvalidRows if they are too many."""
        new = tuple(column for column in columns if column not in self.columns)
        if len(self.columns) + len(new) > COLUMNS_MAX:
            raise InvalidRows(
                f"{len(self.columns) + len(new)} columns; a window has at most {COLUMNS_MAX}"
            )
        return new

    def _places(self, columns: Sequence[str]) -> NDArray[np.intp]:
        """Where *columns* stand in the window; new ones are added to its right."""
        new = self._new(columns)
        if new:
            wider = np.full((len(self._values), len(self.columns) + len(new)), np.nan)
            wider[:, : len(self.columns)] = self._values
            self._values = wider
            self.columns += new
        return np.array([self.columns.index(column) for column in columns], np.intp)

    def _overwrite(self, at: NDArray[np.intp], places: NDArray[np.intp], values: Values) -> None:
        if not len(at):
            return
        cells = np.ix_(at + self._start, places)
        self._values[cells] = np.where(np.isnan(values), self._values[cells], values)
        self._revisions[at + self._start] = self.cursor

    def _insert(
        self, at: NDArray[np.intp], places: NDArray[np.intp], times: Times, values: Values
    ) -> None:
        """Insert rows before the positions *at* of the window; *at* and *times* ascend."""
        if not len(at):
            return
        self._make_room(len(times))
        first = self._start + int(at[0])
        tail = slice(first, self._end)
        positions = at - at[0] + np.arange(len(at)) + first
        end = self._end + len(times)
        moved = np.ones(end - first, bool)
        moved[positions - first] = False
        old = first + np.flatnonzero(moved)
        self._times[old] = self._times[tail].copy()
        self._values[old] = self._values[tail].copy()
        self._revisions[old] = self._revisions[tail].copy()
        self._times[positions] = times
        self._values[positions] = np.nan
        self._values[np.ix_(positions, places)] = values
        self._revisions[positions] = self.cursor
        self._end = end

    def _make_room(self, rows: int) -> None:
        """Have *rows* free places behind the end."""
        needed = len(self) + rows
        if self._end + rows <= len(self._times):
            return
        size = len(self._times)
        if needed * 2 > size:
            size = max(_SMALLEST_ALLOCATION_ROWS, needed * 2)
        kept = slice(self._start, self._end)
        times = np.empty(size, np.int64)
        values = np.empty((size, len(self.columns)), np.float64)
        revisions = np.empty(size, np.int64)
        count = len(self)
        times[:count] = self._times[kept]
        values[:count] = self._values[kept]
        revisions[:count] = self._revisions[kept]
        self._times, self._values, self._revisions = times, values, revisions
        self._start, self._end = 0, count


def check_capacity(rows: int) -> None:
    """Raises InvalidRows for a capacity that no window has."""
    if not 1 <= rows <= CAPACITY_ROWS_MAX:
        raise InvalidRows(f"a window of {rows} rows; it can hold 1 to {CAPACITY_ROWS_MAX}")


def _checked(columns: Sequence[str], times_ns_t: Times, values_tf: Values) -> tuple[Times, Values]:
    given = np.asarray(times_ns_t)
    if given.size and given.dtype.kind not in "iu":
        raise InvalidRows(f"times are {given.dtype}; they must be whole nanoseconds")
    times = given.astype(np.int64)
    try:
        values = np.asarray(values_tf, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRows(f"values are no table of numbers: {error}") from None
    if times.ndim != 1 or values.shape != (len(times), len(columns)):
        raise InvalidRows(
            f"values of shape {values.shape} for times of shape {times.shape}"
            f" and {len(columns)} columns"
        )
    doubled = sorted({column for column in columns if list(columns).count(column) > 1})
    if doubled:
        raise InvalidRows(f"column {doubled[0]!r} stands twice")
    if any(not column for column in columns):
        raise InvalidRows("a column without a name")
    if len(times) and times.min() <= 0:
        raise InvalidRows(f"time {times.min()} ns; it must be above 0")
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise InvalidRows(f"{columns[column]} is {values[row, column]} at {times[row]} ns")
    return times, values


def _merged_by_time(times: Times, values: Values) -> tuple[Times, Values, int]:
    """Rows in order of time, one a time; where a time stands twice, later values win."""
    if len(times) < 2 or (np.diff(times) > 0).all():
        return times, values, 0
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    distinct, group = np.unique(times, return_inverse=True)
    merged = np.full((len(distinct), values.shape[1]), np.nan)
    # Assignment by index keeps the last of equal indices: the later row, as np.nonzero is ordered.
    rows, cells = np.nonzero(~np.isnan(values))
    merged[group[rows], cells] = values[rows, cells]
    return distinct, merged, len(times) - len(distinct)
