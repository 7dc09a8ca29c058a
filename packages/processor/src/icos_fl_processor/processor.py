"""A store's windows as sequences: the library that the service serves."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from icos_fl_timeseries_store import Rows, Store, Window, WindowInfo
from icos_fl_timeseries_store.conditions import Expectations

from icos_fl_processor.errors import ColumnUnavailable, InvalidSeries, StepTooShort, TooFewRows
from icos_fl_processor.increments import Piece, pieces
from icos_fl_processor.recent import Recent
from icos_fl_processor.series import (
    ColumnStatistics,
    Part,
    Series,
    SeriesSpec,
    check_interval,
    gaps,
    lookback_of,
    prepare,
    shortage,
)
from icos_fl_processor.windows import Rows32, Steps, chunks, missing_rows, resample

CACHE_BYTES_MAX = 128 << 20
CHUNK_BYTES = 1 << 20
GIVEN_VERSIONS_MAX = 4
"""Answers of which the steps are remembered, a node and columns: clients keep one each."""
WAIT_SECONDS = 1.0
"""The longest that one wait for new rows lasts, and so how late a cancelled watcher is noticed."""


@dataclass(frozen=True)
class Description:
    """What a window holds and what could be learned from it."""

    info: WindowInfo
    column_rows: tuple[int, ...]
    """Rows in which each column has a value."""
    interval_ns: int
    """0 while unknown."""
    gaps: int
    train_sequences: int = 0
    validation_sequences: int = 0
    missing_rows: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Chunk:
    """Consecutive steps of one run, as ``SequencesChunk`` in the proto."""

    part: Part
    first_time_ns: int
    rows_sf: Rows32
    """Normalised; a view that must not be written."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a series: a header, and chunks that are cut while one iterates."""

    columns: tuple[ColumnStatistics, ...]
    interval_ns: int
    train_sequences: int
    validation_sequences: int
    chunks: Iterable[Chunk]


@dataclass(frozen=True)
class RunOfSteps:
    """Consecutive steps of one part, as ``StepsRun`` in the proto."""

    part: Part
    first_time_ns: int
    steps: range
    """Where it lies among the steps that the pieces make."""


@dataclass(frozen=True)
class Update:
    """The sequences of a series for who kept an earlier answer."""

    columns: tuple[ColumnStatistics, ...]
    interval_ns: int
    train_sequences: int
    validation_sequences: int
    version: bytes
    pieces: list[Piece]
    """No piece of new steps is larger than a message."""
    runs: Iterable[RunOfSteps]


@dataclass(frozen=True)
class Latest:
    """The newest *lookback* steps of a series."""

    columns: tuple[ColumnStatistics, ...]
    interval_ns: int
    last_time_ns: int
    rows_sf: Rows32
    """Normalised; a view that must not be written."""


@dataclass(frozen=True)
class Change:
    """A window, and how many rows were added or changed since the last look."""

    rows: int
    last_time_ns: int | None
    changed_rows: int


class Processor:
    """Serves the windows of *store*. Any number of threads may use it at once.

    Every method may raise what the store raises: UnknownNode, InvalidRows for a name that no node
    can have, and StoreUnavailable. A window is read once for all that is asked of it until it
    changes.
    """

    def __init__(
        self,
        store: Store,
        message_bytes_max: int = 4 << 20,
        expectations: Expectations = Expectations(),  # noqa: B008 - frozen
    ) -> None:
        self._store = store
        self._expectations = expectations
        self._message_bytes_max = message_bytes_max
        self._rows = Recent[Rows](CACHE_BYTES_MAX, 1, _bytes_of_rows)
        self._series = Recent[Series](CACHE_BYTES_MAX, 1, lambda series: series.nbytes)
        self._given = Recent[Steps](CACHE_BYTES_MAX, GIVEN_VERSIONS_MAX, _bytes_of_steps)

    def nodes(self) -> list[str]:
        """The nodes that have a window, sorted by name."""
        return self._store.nodes()

    def window(self, node: str, interval_ns: int = 0) -> Description:
        """What the window of *node* holds, whichever columns have values."""
        check_interval(interval_ns)
        info, rows = self._read(node)
        any_column = np.zeros((len(rows.times_ns_t), 1))
        try:
            steps = resample(rows.times_ns_t, any_column, interval_ns)
        except StepTooShort as error:
            steps = resample(rows.times_ns_t, any_column)
            return _description(info, rows, steps, interval_ns, reason=str(error))
        return _description(info, rows, steps, steps.interval_ns)

    def describe(self, spec: SeriesSpec) -> Description:
        """What the window holds, and what could be learned from it.

        Too few rows are told, not raised; so is a step too short for the rows, as the first rows of
        a node may come late, and a column whose sensor cannot be read. Raises UnknownColumn.
        """
        info, rows = self._read(spec.node)
        try:
            series = self._prepare(info, rows, spec)
        except ColumnUnavailable as error:  # more rows would not cure it
            found = self.window(spec.node, spec.interval_ns)
            return replace(found, reason=str(error))
        except StepTooShort as error:
            steps = resample(rows.times_ns_t[:0], rows.values_tf[:0])
            missing, _ = missing_rows(steps, spec.length, spec.train_fraction, info.capacity_rows)
            return _description(
                info, rows, resample(rows.times_ns_t, np.zeros((len(rows.times_ns_t), 1))),
                spec.interval_ns, missing_rows=missing, reason=str(error),
            )  # fmt: skip
        missing, reason = shortage(series, spec, info.capacity_rows)
        return _description(
            info, rows, series.steps, series.steps.interval_ns,
            train_sequences=series.sequences(Part.TRAIN, spec),
            validation_sequences=series.sequences(Part.VALIDATION, spec),
            missing_rows=missing, reason=reason,
        )  # fmt: skip

    def sequences(self, spec: SeriesSpec, wanted: Iterable[Part] = Part) -> Sequences:
        """The sequences of the parts that are *wanted*.

        Raises UnknownColumn, ColumnUnavailable, StepTooShort, InvalidSeries for a sequence that no
        message can hold, and TooFewRows where there is no sequence in those parts.
        """
        wanted = _in_order(wanted)
        series, counts, statistics = self._sequences(spec, wanted)
        return Sequences(
            statistics,
            series.steps.interval_ns,
            counts[Part.TRAIN],
            counts[Part.VALIDATION],
            _Chunks(series, spec, wanted, self._chunk_bytes),
        )

    def update(self, spec: SeriesSpec, kept: bytes, wanted: Iterable[Part] = Part) -> Update:
        """The sequences of the *wanted* parts, for a client that has the steps of version *kept*.

        All steps are new where no such version is remembered. Raises as ``sequences`` does.
        """
        wanted = _in_order(wanted)
        series, counts, statistics = self._sequences(spec, wanted)
        columns = (spec.node, spec.columns)
        known = self._given.find((columns, kept))
        self._given.get((columns, series.version), lambda: series.steps)
        return Update(
            statistics,
            series.steps.interval_ns,
            counts[Part.TRAIN],
            counts[Part.VALIDATION],
            series.version,
            [part for piece in pieces(known, series.steps) for part in self._sendable(piece)],
            _runs(series, spec, wanted),
        )

    def _sequences(
        self, spec: SeriesSpec, wanted: list[Part]
    ) -> tuple[Series, dict[Part, int], tuple[ColumnStatistics, ...]]:
        self._check_message(spec, spec.length)
        info, rows = self._read(spec.node)
        series = self._prepare(info, rows, spec)
        counts = {part: series.sequences(part, spec) for part in Part}
        statistics = series.statistics() if series.train_steps else ()
        if not statistics or not any(counts[part] for part in wanted):
            raise TooFewRows(_why_none(series, spec, wanted, info.capacity_rows))
        return series, counts, statistics

    @property
    def _chunk_bytes(self) -> int:
        return min(CHUNK_BYTES, self._message_bytes_max - 1024)

    def _sendable(self, piece: Piece) -> Iterator[Piece]:
        """*piece*, its new steps cut to the size of a message."""
        if piece.kept_steps:
            yield piece
        values_sf = piece.values_sf
        steps_max = max(1, self._chunk_bytes // (values_sf.itemsize * values_sf.shape[1]))
        for first in range(0, len(values_sf), steps_max):
            yield Piece(0, 0, values_sf[first : first + steps_max])

    def latest(self, spec: SeriesSpec) -> Latest:
        """The newest lookback.

        Raises UnknownColumn, ColumnUnavailable, StepTooShort, InvalidSeries and TooFewRows.
        """
        self._check_message(spec, spec.lookback)
        series = self._prepare(*self._read(spec.node), spec)
        steps = lookback_of(series, spec)
        return Latest(
            series.statistics(),
            series.steps.interval_ns,
            int(series.steps.times_ns_s[steps[-1]]),
            series.normalised_sf[steps.start : steps.stop],
        )

    def watch(self, node: str, ended: Callable[[], bool]) -> Iterator[Change]:
        """The window as it is, then each time that rows were added or changed, until *ended*.

        Sleeps in the store between; *ended* is asked every WAIT_SECONDS.
        """
        window = self._store.window(node)
        info = window.info()
        yield Change(info.rows, info.last_time_ns, info.rows)
        seen = info.cursor
        while not ended():
            cursor = window.wait(seen, WAIT_SECONDS)
            if cursor != seen:
                change, seen = _change(window, seen if cursor > seen else None)
                yield change

    def _read(self, node: str) -> tuple[WindowInfo, Rows]:
        if not node:
            raise InvalidSeries("node is empty")
        window = self._store.window(node)
        info = window.info()
        return info, self._rows.get((node, info), window.read)

    def _prepare(self, info: WindowInfo, rows: Rows, spec: SeriesSpec) -> Series:
        series = (spec.node, spec.columns, spec.interval_ns, spec.train_fraction)
        key = (series, (info, rows.cursor))
        return self._series.get(key, lambda: prepare(rows, spec, self._expectations))

    def _check_message(self, spec: SeriesSpec, steps: int) -> None:
        size = steps * len(spec.columns) * np.dtype(np.float32).itemsize
        # A message is a little more than its rows: column names and statistics of GetLatest.
        limit = self._message_bytes_max - 1024 * (1 + len(spec.columns))
        if size > limit:
            raise InvalidSeries(
                f"{steps} steps of {len(spec.columns)} columns are {size} bytes; a message holds"
                f" {limit}"
            )


@dataclass(frozen=True)
class _Chunks:
    """Cuts the chunks anew each time that one iterates."""

    series: Series
    spec: SeriesSpec
    wanted: list[Part]
    chunk_bytes: int

    def __iter__(self) -> Iterator[Chunk]:
        rows_sf, times_ns_s = self.series.normalised_sf, self.series.steps.times_ns_s
        rows_max = self.chunk_bytes // (rows_sf.itemsize * rows_sf.shape[1])
        for part in self.wanted:
            for run in self.series.runs[part]:
                for chunk in chunks(run, self.spec.length, rows_max):
                    first = int(times_ns_s[chunk.start])
                    yield Chunk(part, first, rows_sf[chunk.start : chunk.stop])


def _in_order(wanted: Iterable[Part]) -> list[Part]:
    chosen = set(wanted)
    return [part for part in Part if part in chosen]


def _runs(series: Series, spec: SeriesSpec, wanted: list[Part]) -> Iterator[RunOfSteps]:
    for part in wanted:
        for run in series.runs[part]:
            if len(run) >= spec.length:
                yield RunOfSteps(part, int(series.steps.times_ns_s[run.start]), run)


def _description(
    info: WindowInfo, rows: Rows, steps: Steps, interval_ns: int, **facts: object
) -> Description:
    column_rows = tuple((~np.isnan(rows.values_tf)).sum(axis=0).tolist())
    return Description(info, column_rows, interval_ns, gaps(steps), **facts)  # type: ignore[arg-type]


def _why_none(series: Series, spec: SeriesSpec, wanted: list[Part], capacity_rows: int) -> str:
    if wanted == [Part.VALIDATION] and series.train_steps:
        longest = max(map(len, series.runs[Part.VALIDATION]), default=0)
        return (
            f"a validation sequence needs {spec.length} consecutive steps, and the longest run of"
            f" the validation part has {longest}"
            f" ({len(series.steps) - series.train_steps} of {len(series.steps)} steps)"
        )
    return shortage(series, spec, capacity_rows)[1]


def _change(window: Window, after: int | None) -> tuple[Change, int]:
    changed = window.read(after=after)
    info = window.info()
    return Change(info.rows, info.last_time_ns, len(changed.times_ns_t)), changed.cursor


def _bytes_of_rows(rows: Rows) -> int:
    return rows.times_ns_t.nbytes + rows.values_tf.nbytes


def _bytes_of_steps(steps: Steps) -> int:
    return steps.times_ns_s.nbytes + steps.values_sf.nbytes
