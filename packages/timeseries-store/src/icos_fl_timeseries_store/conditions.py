"""What is wrong with a window, judged from its rows: for ``watch``, ``status`` and the processor.

Pure numpy. Shapes: t rows, f columns. Times are nanoseconds since 1970-01-01 UTC.
"""

import tomllib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icos_fl_timeseries_store.contract import Rows, Times, Values

LATE_FACTOR = 3
"""What comes rarely is late only after this many of its own distances."""
SAME_VALUES_MIN = 5
"""So few equal values say nothing, however far apart they are."""

_SECOND_NS = 1_000_000_000


class Condition(Enum):
    """What can be wrong, worst first; the value is the exit status of who finds nothing worse."""

    DAMAGED = 9
    """What is on disk of the window is not what was acknowledged; nothing is read of it."""
    SILENT = 10
    """The node has no row, or a column no value any more while others go on."""
    STALE = 11
    """The newest row is old."""
    UNAVAILABLE = 12
    """A column that cannot be 0 is exactly 0: its sensor cannot be read."""
    STUCK = 13
    """A column repeats one value while time goes on."""
    OUT_OF_RANGE = 14
    """A column has values outside of its configured range."""
    GAPPY = 15
    """Rows are missing."""
    NAN = 16
    """Rows are there, but a column has no value in some that should have one."""

    @property
    def word(self) -> str:
        """As it is told to people and in JSON."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    condition: Condition
    column: str
    """Empty where it is the whole node."""
    reason: str
    """With the numbers and the limit."""

    def as_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return {
            "condition": self.condition.word,
            "exit_status": self.condition.value,
            "column": self.column,
            "reason": self.reason,
        }


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400, strict=True)]


class ColumnExpectations(_Model):
    """What the values of one column can be."""

    minimum: Number | None = None
    maximum: Number | None = None
    zero_is_missing: bool | None = None
    """Is exactly 0, for long, no measurement? Without it, of columns in W: a machine that sends
    rows draws power."""


class Expectations(_Model):
    """What a healthy window looks like; the defaults fit rows that come every 1 s to 60 s."""

    late_seconds: Seconds = 300.0
    """Rows older than this, or a column without a value for this long, are told. Above the 180 s
    that an exporter may collect before it sends."""
    unavailable_seconds: Seconds = 120.0
    """So long 0 where 0 is missing is a sensor that cannot be read."""
    stuck_seconds: Seconds = 600.0
    """So long the same value is no measurement. An idle server measured in whole watts repeats one
    for over nine minutes."""
    recent_seconds: Seconds = 900.0
    """Gaps, missing values and values out of range are told while they are not older."""
    missing_share_max: float = Field(default=0.05, gt=0, lt=1, strict=True)
    """Of the recent rows, and of a column's values in them."""
    columns: dict[str, ColumnExpectations] = Field(default_factory=dict)
    """By name. Who names a column counts on it: it is silent where a window has no value of it."""

    def of(self, column: str, unit: str) -> ColumnExpectations:
        """Those of a column, the defaults of its *unit* filled in."""
        given = self.columns.get(column, ColumnExpectations())
        if given.zero_is_missing is None:
            return given.model_copy(update={"zero_is_missing": unit == "W"})
        return given


class ExpectationsError(Exception):
    """A file of expectations that cannot be used; one line for each fault, with what was read."""


def load_expectations(path: Path | None) -> Expectations:
    """Read a TOML file; the defaults without one. Raises ExpectationsError."""
    if path is None:
        return Expectations()
    try:
        return Expectations.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ExpectationsError(
            "\n".join(
                f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}; read: {item['input']!r}"
                for item in error.errors()
            )
        ) from None
    except OSError as error:
        raise ExpectationsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ExpectationsError(f"{path}: {error}") from None


def judge(rows: Rows, expectations: Expectations, now_ns: int | None) -> list[Finding]:
    """What is wrong with a window of which *rows* are all, or the newest, worst first.

    *now_ns* None: the rows are recorded ones, whose times are not compared with the clock.
    """
    times_t = rows.times_ns_t
    if not len(times_t):
        return [Finding(Condition.SILENT, "", "the window has no row")]
    findings = _of_node(times_t, expectations, now_ns)
    for column, unit, values_t in zip(rows.columns, rows.units, rows.values_tf.T, strict=True):
        findings += _of_column(column, unit, times_t, values_t, expectations)
    return sorted(findings, key=lambda finding: finding.condition.value)


def exit_status(findings: list[Finding]) -> int:
    """That of the worst finding; 0 where there is none."""
    return min((finding.condition.value for finding in findings), default=0)


def unreadable(times_t: Times, values_t: Values, seconds: float) -> NDArray[np.bool_]:
    """Which rows belong to a stretch of exact zeros that lasts at least *seconds*.

    Rows without a value neither end a stretch nor belong to one.
    """
    found_t = np.zeros(len(times_t), bool)
    there = np.flatnonzero(~np.isnan(values_t))
    starts, ends = _stretches(values_t[there])
    lasted = times_t[there[ends]] - times_t[there[starts]]
    long = (values_t[there[starts]] == 0) & (lasted >= seconds * _SECOND_NS)
    for first, last in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        found_t[there[first : last + 1]] = True
    return found_t


def unavailable(column: str, times_t: Times, values_t: Values, seconds: float) -> Finding | None:
    """Is the newest value one of a stretch of zeros as ``unreadable`` finds them?"""
    there = np.flatnonzero(~np.isnan(values_t))
    if not len(there) or values_t[there[-1]] != 0:
        return None
    first = _stretches(values_t[there])[0][-1]
    lasted = (times_t[there[-1]] - times_t[there[first]]) / _SECOND_NS
    if lasted < seconds:
        return None
    reason = f"exactly 0 for {lasted:g} s, {seconds:g} s are the limit: its sensor cannot be read"
    return Finding(Condition.UNAVAILABLE, column, reason)


def _of_node(times_t: Times, expected: Expectations, now_ns: int | None) -> list[Finding]:
    found = [_stale(times_t, expected, now_ns), _gappy(_recent(times_t, expected), expected)]
    return [finding for finding in found if finding is not None]


def _stale(times_t: Times, expected: Expectations, now_ns: int | None) -> Finding | None:
    limit = max(expected.late_seconds, LATE_FACTOR * _distance(times_t))
    if now_ns is None or (age := (now_ns - int(times_t[-1])) / _SECOND_NS) <= limit:
        return None
    reason = f"the newest row is {age:.0f} s old, {limit:g} s are the limit"
    return Finding(Condition.STALE, "", reason)


def _gappy(recent_t: Times, expected: Expectations) -> Finding | None:
    if not (distance := _distance(recent_t)):
        return None
    span = (recent_t[-1] - recent_t[0]) / _SECOND_NS
    owed = round(span / distance) + 1
    missing = owed - len(recent_t)
    if missing <= expected.missing_share_max * owed:
        return None
    reason = (
        f"{missing} of {owed} rows of the newest {span:g} s are missing,"
        f" {expected.missing_share_max:.0%} are the limit"
    )
    return Finding(Condition.GAPPY, "", reason)


def _of_column(
    column: str, unit: str, times_t: Times, values_t: Values, expected: Expectations
) -> list[Finding]:
    of_column = expected.of(column, unit)
    there_t = ~np.isnan(values_t)
    if not there_t.any():  # such as power, which not every node can measure
        counted_on = column in expected.columns
        reason = f"no value in {len(values_t)} rows"
        return [Finding(Condition.SILENT, column, reason)] if counted_on else []
    limit = max(expected.late_seconds, LATE_FACTOR * _distance(times_t[there_t]))
    late = (times_t[-1] - times_t[there_t][-1]) / _SECOND_NS
    if late > limit:
        reason = f"no value for {late:g} s while rows go on, {limit:g} s are the limit"
        return [Finding(Condition.SILENT, column, reason)]
    found: list[Finding | None] = []
    if of_column.zero_is_missing:
        found.append(unavailable(column, times_t, values_t, expected.unavailable_seconds))
    if not any(found):
        # What cannot go further stays: a processor may well be at 100 % for an hour.
        ends = {0.0, of_column.minimum, of_column.maximum, 100.0 if unit == "%" else None}
        if values_t[there_t][-1] not in ends:
            found.append(_stuck(column, times_t[there_t], values_t[there_t], expected))
    recent = len(_recent(times_t, expected))
    found.append(_out_of_range(column, values_t[-recent:], of_column))
    found.append(_nan(column, times_t, there_t, recent, expected))
    return [finding for finding in found if finding is not None]


def _stuck(column: str, times_t: Times, values_t: Values, expected: Expectations) -> Finding | None:
    """Of the times and values that are there."""
    first = _stretches(values_t)[0][-1]
    lasted = (times_t[-1] - times_t[first]) / _SECOND_NS
    count = len(values_t) - first
    if count < SAME_VALUES_MIN or lasted < expected.stuck_seconds:
        return None
    reason = (
        f"{count} values in a row are {values_t[-1]:.9g}, over {lasted:g} s;"
        f" {expected.stuck_seconds:g} s are the limit"
    )
    return Finding(Condition.STUCK, column, reason)


def _out_of_range(column: str, values_t: Values, of_column: ColumnExpectations) -> Finding | None:
    low = -np.inf if of_column.minimum is None else of_column.minimum
    high = np.inf if of_column.maximum is None else of_column.maximum
    # What rounding adds to a value at its limit is no fault.
    outside = values_t[(values_t < low - _slack(low)) | (values_t > high + _slack(high))]
    if not len(outside):
        return None
    reason = (
        f"{len(outside)} recent values are not within {low:g} to {high:g};"
        f" the newest is {outside[-1]:g}"
    )
    return Finding(Condition.OUT_OF_RANGE, column, reason)


def _nan(
    column: str, times_t: Times, there_t: NDArray[np.bool_], recent: int, expected: Expectations
) -> Finding | None:
    """A column may come with every k-th row only: then it owes no more."""
    distance, own = _distance(times_t), _distance(times_t[there_t])
    if not distance or not own:
        return None
    owed = int(recent / max(1, round(own / distance)))
    missing = owed - int(there_t[-recent:].sum())
    if missing <= expected.missing_share_max * owed:
        return None
    reason = (
        f"{missing} of {owed} values of the newest {recent} rows are missing,"
        f" {expected.missing_share_max:.0%} are the limit"
    )
    return Finding(Condition.NAN, column, reason)


def _recent(times_t: Times, expected: Expectations) -> Times:
    since = times_t[-1] - round(expected.recent_seconds * _SECOND_NS)
    return times_t[np.searchsorted(times_t, since) :]


def _distance(times_t: Times) -> float:
    """Median distance in seconds; 0 while unknown."""
    return float(np.median(np.diff(times_t))) / _SECOND_NS if len(times_t) > 1 else 0.0


def _stretches(values_t: Values) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the first and of the last value of each stretch of equal values."""
    starts = np.flatnonzero(np.diff(values_t, prepend=np.nan) != 0)
    return starts, np.append(starts[1:], len(values_t))[: len(starts)] - 1


def _slack(limit: float) -> float:
    return 1e-9 * max(1.0, abs(limit)) if np.isfinite(limit) else 0.0
