"""What is asked for, and a window's rows prepared for it."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from uuid import uuid4

import numpy as np
from icos_fl_timeseries_store import Rows
from icos_fl_timeseries_store.conditions import Expectations, unavailable, unreadable

from icos_fl_processor.errors import (
    ColumnUnavailable,
    InvalidSeries,
    TooFewRows,
    UnknownColumn,
)
from icos_fl_processor.windows import (
    Normalisation,
    Rows32,
    Steps,
    Times,
    Values,
    missing_rows,
    normalise,
    parts,
    resample,
    sequence_count,
    statistics,
    train_steps,
)

INTERVAL_NS_MAX = 366 * 86_400 * 1_000_000_000


class Part(Enum):
    """A part of the window."""

    TRAIN = "training"
    VALIDATION = "validation"


def check_interval(interval_ns: int) -> None:
    """Raises InvalidSeries for a step that is no step."""
    if not 0 <= interval_ns <= INTERVAL_NS_MAX:
        raise InvalidSeries(
            f"interval is {interval_ns / 1e9:g} s; it must be 0 to {INTERVAL_NS_MAX / 1e9:g} s"
        )


@dataclass(frozen=True)
class SeriesSpec:
    """Which series of which node, on which grid; as ``SeriesSpec`` in the proto.

    Raises InvalidSeries for values that no window could answer.
    """

    node: str
    features: tuple[str, ...]
    targets: tuple[str, ...]
    lookback: int
    horizon: int
    interval_ns: int = 0
    """0: the median distance of the node's rows."""
    train_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not self.node:
            raise InvalidSeries("node is empty")
        for name, columns in (("features", self.features), ("targets", self.targets)):
            if not columns:
                raise InvalidSeries(f"{name} is empty; at least one column is needed")
            column, times = Counter(columns).most_common(1)[0]
            if times > 1:
                raise InvalidSeries(f"{name} has {column!r} {times} times; once is the limit")
        for name, steps in (("lookback", self.lookback), ("horizon", self.horizon)):
            if steps < 1:
                raise InvalidSeries(f"{name} is {steps}; it must be at least 1 step")
        check_interval(self.interval_ns)
        if not 0 < self.train_fraction <= 1:
            raise InvalidSeries(
                f"train_fraction is {self.train_fraction:g}; it must be above 0 and at most 1"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Features, then targets that are no feature."""
        return tuple(dict.fromkeys((*self.features, *self.targets)))

    @property
    def length(self) -> int:
        """Steps of a sequence."""
        return self.lookback + self.horizon


@dataclass(frozen=True)
class ColumnStatistics:
    """A column, and what normalises it."""

    name: str
    unit: str
    mean: float
    standard_deviation: float


@dataclass(frozen=True)
class Series:
    """A window's steps for the columns, train_fraction and interval of a SeriesSpec."""

    columns: tuple[str, ...]
    units: tuple[str, ...]
    steps: Steps
    train_steps: int
    runs: dict[Part, list[range]]
    normalisation: Normalisation | None
    """None while the training part has no step."""
    version: bytes = field(default_factory=lambda: uuid4().bytes)
    """Names these steps, and no others."""

    @cached_property
    def normalised_sf(self) -> Rows32:
        """Empty while the training part has no step."""
        if self.normalisation is None:
            return np.empty((0, len(self.columns)), np.float32)
        return normalise(self.steps.values_sf, self.normalisation)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, the normalised one included."""
        values_sf = self.steps.values_sf
        return self.steps.times_ns_s.nbytes + values_sf.nbytes + values_sf.size * 4

    def sequences(self, part: Part, spec: SeriesSpec) -> int:
        """Usable sequences of a part."""
        return sequence_count(self.runs[part], spec.lookback, spec.horizon)

    def statistics(self) -> tuple[ColumnStatistics, ...]:
        """One a column. Raises TooFewRows while the training part has no step."""
        if self.normalisation is None:
            raise TooFewRows(
                f"the training part has 0 of {len(self.steps)} steps with a value of"
                f" {' and '.join(self.columns)}; at least 1 is needed"
            )
        mean, deviation = self.normalisation.mean_f, self.normalisation.deviation_f
        return tuple(
            ColumnStatistics(*row)
            for row in zip(self.columns, self.units, mean.tolist(), deviation.tolist(), strict=True)
        )


def prepare(rows: Rows, spec: SeriesSpec, expectations: Expectations) -> Series:
    """Resample and split *rows*, and find what normalises them.

    Raises UnknownColumn, ColumnUnavailable, StepTooShort or TooFewRows.
    """
    for column in spec.columns:
        if column not in rows.columns:
            raise UnknownColumn(spec.node, column, rows.columns)
    places = [rows.columns.index(column) for column in spec.columns]
    values_tf = rows.values_tf[:, places]
    for column, place, values_t in zip(spec.columns, places, values_tf.T, strict=True):
        if expectations.of(column, rows.units[place]).zero_is_missing:
            _leave_out_unreadable(spec.node, column, rows.times_ns_t, values_t, expectations)
    steps = resample(rows.times_ns_t, values_tf, spec.interval_ns)
    border = train_steps(len(steps), spec.train_fraction)
    train, validation = parts(steps.runs, border)
    normalisation = None
    if border:
        normalisation = statistics(steps.values_sf[:border])
        _check_finite(spec.columns, normalisation)
    return Series(
        columns=spec.columns,
        units=tuple(rows.units[place] for place in places),
        steps=steps,
        train_steps=border,
        runs={Part.TRAIN: train, Part.VALIDATION: validation},
        normalisation=normalisation,
    )


def _leave_out_unreadable(
    node: str, column: str, times_ns_t: Times, values_t: Values, expectations: Expectations
) -> None:
    """Make NaN of long stretches of zeros in *values_t*, from which nothing could be learned.

    Raises ColumnUnavailable where the newest value is one of them.
    """
    seconds = expectations.unavailable_seconds
    found = unavailable(column, times_ns_t, values_t, seconds)
    if found is not None:
        raise ColumnUnavailable(f"{column!r} of node {node!r} is unavailable: {found.reason}")
    values_t[unreadable(times_ns_t, values_t, seconds)] = np.nan


def _check_finite(columns: tuple[str, ...], normalisation: Normalisation) -> None:
    for column, mean, deviation in zip(
        columns, normalisation.mean_f, normalisation.deviation_f, strict=True
    ):
        if not np.isfinite(mean) or not np.isfinite(deviation):
            raise TooFewRows(
                f"the values of {column!r} are too large: their mean is {mean:g}, their deviation"
                f" {deviation:g}; both must be finite"
            )


def shortage(series: Series, spec: SeriesSpec, capacity_rows: int) -> tuple[int, str]:
    """Rows that are missing until the first training sequence, and why; (0, "") if there is one."""
    if series.sequences(Part.TRAIN, spec):
        return 0, ""
    steps = series.steps
    missing, least = missing_rows(steps, spec.length, spec.train_fraction, capacity_rows)
    each = f" of {steps.interval_ns / 1e9:g} s" if steps.interval_ns else ""
    longest = max(map(len, series.runs[Part.TRAIN]), default=0)
    reason = (
        f"a training sequence of {' and '.join(spec.columns)} needs {spec.length} consecutive"
        f" steps{each} (lookback {spec.lookback} + horizon {spec.horizon}), and the longest run of"
        f" the training part has {longest} ({series.train_steps} of {len(steps)} steps,"
        f" {len(series.runs[Part.TRAIN])} runs); {missing} more rows are missing"
    )
    if least > capacity_rows:
        reason += (
            f", and the window can never have them: it holds {capacity_rows} rows where"
            f" {least} are needed"
        )
    return missing, reason


def lookback_of(series: Series, spec: SeriesSpec) -> range:
    """The newest *lookback* steps. Raises TooFewRows if the newest run is shorter."""
    newest = series.steps.runs[-1] if series.steps.runs else range(0)
    if len(newest) < spec.lookback:
        raise TooFewRows(
            f"the newest run of {' and '.join(spec.columns)} of node {spec.node!r} has"
            f" {len(newest)} steps; the lookback needs {spec.lookback}"
        )
    return newest[-spec.lookback :]


def gaps(steps: Steps) -> int:
    """Breaks between runs."""
    return max(0, len(steps.run_starts_r) - 1)
