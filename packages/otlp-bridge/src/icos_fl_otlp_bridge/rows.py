"""From an OTLP request to rows: the one thing that the bridge knows and nobody else does."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    AGGREGATION_TEMPORALITY_DELTA,
    Metric,
)

from icos_fl_otlp_bridge.config import BridgeConfig, Combine, Source, Term
from icos_fl_otlp_bridge.measures import measured, number_of
from icos_fl_otlp_bridge.rates import CounterPoint, Counting, Rates
from icos_fl_otlp_bridge.reasons import Reason

NO_RECORDED_VALUE: Final = 1
_TEMPORALITIES: Final = (
    AGGREGATION_TEMPORALITY_DELTA,
    AGGREGATION_TEMPORALITY_CUMULATIVE,
    None,  # of what has none
)
T = TypeVar("T")
_SCALARS: Final = ("string_value", "int_value", "double_value", "bool_value")
TIME_NS_MAX: Final = 2**63 - 1

Key = tuple[tuple[str, Any], ...]
"""Attributes by name."""
SourceKey = tuple[Key, Key]
"""Of a resource and of a scope."""
SeriesKey = tuple[int, Key]
"""A source's number and a point's attributes: within one metric that is a series."""
Wanted = tuple[int, ...]
"""Terms that take a point, by their numbers: a number hashes faster than a Term."""
CounterKey = tuple[int, int, Counting]
"""The numbers of a term and a series, and how the latter counts."""


@dataclass
class NodeRows:
    """The rows of one node in one request, oldest first; each has a value in some column."""

    columns: tuple[str, ...]
    """Those that any row has a value in: a node gets no column that it never reports."""
    times_ns_t: NDArray[np.int64]
    values_tf: NDArray[np.float64]
    points_t: NDArray[np.int64]
    """Data points that each row was made of."""


@dataclass
class Converted:
    """What a request holds for this bridge."""

    rows: dict[str, NodeRows] = field(default_factory=dict)
    rejected: Counter[Reason] = field(default_factory=Counter)
    """Points by Reason."""
    without_rate: int = 0
    """Points that a rate is asked of, and that are the first of their series: no row, no fault."""
    unmatched_resources: int = 0
    """Resources that the configuration leaves to others."""


class Converter:
    """Turns requests into rows as the configuration says. Any thread may call.

    Its only state are *rates*: a counter's rate needs the point before it.
    """

    def __init__(self, config: BridgeConfig, rates: Rates | None = None) -> None:
        self._config = config
        self._interval_ns = config.interval_ns
        self._rates = rates or Rates()
        self.columns = tuple(config.all_columns)
        self.units = {name: column.unit for name, column in config.all_columns.items()}
        numbers: dict[Term, int] = {}
        self._columns = [
            [
                _Source(source, tuple(_number(term, numbers) for term in source.terms))
                for source in of
            ]
            for of in (column.sources for column in config.all_columns.values())
        ]
        self._by_number = list(numbers)
        self._terms: dict[str, _Terms] = {}
        for term, number in numbers.items():
            self._terms.setdefault(term.metric, _Terms()).add(number, term)

    def convert(self, request: ExportMetricsServiceRequest) -> Converted:
        """Rows by node, and refused points. Metrics that no column names are neither."""
        converted = Converted()
        cells: dict[str, _Cells] = defaultdict(_Cells)
        for resource_metrics in request.resource_metrics:
            attributes = _plain(resource_metrics.resource.attributes)
            if not all(predicate.accepts(attributes) for predicate in self._config.resources):
                converted.unmatched_resources += 1
                continue
            node = attributes.get(self._config.node_attribute)
            refused = None
            if not isinstance(node, str) or not node:
                refused = Reason.NO_NODE
            elif node not in cells and len(cells) >= self._config.nodes_max:
                refused = Reason.TOO_MANY_NODES
            resource_key = _key(attributes)
            for scope_metrics in resource_metrics.scope_metrics:
                source = None
                for metric in scope_metrics.metrics:
                    terms = self._terms.get(metric.name)
                    if terms is None:
                        continue
                    if refused is not None:
                        converted.rejected[refused] += sum(1 for _ in terms.points_of(metric))
                        continue
                    of_node = cells[str(node)]
                    if source is None:
                        key = (resource_key, _scope_key(scope_metrics.scope))
                        source = _number(key, of_node.sources)
                    self._collect(metric, terms, source, of_node, converted.rejected)
        for node, of_node in cells.items():
            converted.without_rate += self._put_rates(of_node)
            if not of_node.by_term:
                continue
            rows = self._rows(of_node, converted.rejected)
            if len(rows.times_ns_t):
                converted.rows[node] = rows
        converted.rejected = +converted.rejected
        return converted

    def _collect(
        self,
        metric: Metric,
        terms: "_Terms",
        source: int,
        cells: "_Cells",
        rejected: Counter[Reason],
    ) -> None:
        """Put the metric's good points into *cells*, and count the others in *rejected*."""
        shape = _Shape.of(metric)
        # Nearly all metrics: each term takes the number as it is.
        plain = terms.plain and shape.kind in ("gauge", "sum") and not shape.unspecified
        for point, wanted, attributes in terms.points_of(metric):
            if not 0 < point.time_unix_nano <= TIME_NS_MAX:
                rejected[Reason.INVALID_TIME] += 1
                continue
            series = _number((source, _key(attributes) if attributes else ()), cells.series)
            if plain:
                problem = self._take_number(point, wanted, series, cells)
            else:
                problem = self._take(shape, point, terms, wanted, series, cells)
            if problem:
                rejected[problem] += 1

    def _take_number(
        self, point: Any, wanted: Wanted, series: int, cells: "_Cells"
    ) -> Reason | None:
        """What ``_take`` does for terms that take a gauge's or a sum's number."""
        value, problem = number_of(point)
        if value is None:
            return problem
        time = point.time_unix_nano
        row = self._row(time)
        for number in wanted:
            cells.by_term[number].put(row, series, time, value)
        cells.points[wanted].append(row)
        return None

    def _take(
        self,
        shape: "_Shape",
        point: Any,
        terms: "_Terms",
        wanted: Wanted,
        series: int,
        cells: "_Cells",
    ) -> Reason | None:
        """Put what each of the *wanted* terms takes of the point; why, if none takes anything."""
        problems: list[Reason] = []
        plain: Wanted = ()
        rated = []
        row = self._row(point.time_unix_nano)
        for number in wanted:
            term = terms.by_number[number]
            value, problem = measured(shape.kind, point, term.take, term.quantile)
            if term.rate and shape.counting is None:
                problem = Reason.UNSUPPORTED_TYPE
            elif problem is not Reason.UNSUPPORTED_TYPE and shape.unspecified:
                problem = Reason.UNSPECIFIED_TEMPORALITY
            if problem:
                problems.append(problem)
            elif value is not None and term.rate and shape.counting is not None:
                rated.append(((number, series, shape.counting), value))
            elif value is not None:
                plain += (number,)
                cells.by_term[number].put(row, series, point.time_unix_nano, value)
        if plain:
            cells.points[plain].append(row)
        for place, (counter, value) in enumerate(rated):
            points, counts = cells.counters[counter]
            points.append((point.time_unix_nano, point.start_time_unix_nano, value))
            counts.append(not plain and place == 0)  # once, whatever is made of a point
        return problems[0] if len(problems) == len(wanted) else None

    def _put_rates(self, cells: "_Cells") -> int:
        """Turn the counters' points into cells; return how many of the points have no rate."""
        if not cells.counters:
            return 0
        without = 0
        series_keys = list(cells.series)
        sources = [_digest(resource) + _digest(scope) for resource, scope in cells.sources]
        for (number, series, counting), (points, counts) in cells.counters.items():
            source, attributes = series_keys[series]
            term = self._by_number[number]
            # What is remembered is of one size, however long the attributes are.
            of = (("source", sources[source]), ("metric", term.metric), ("take", term.take))
            key = _digest(of + attributes)
            rates = self._rates.of(key, counting, points)
            for time, rate in rates.items():
                if math.isfinite(rate):
                    cells.by_term[number].put(self._row(time), series, time, rate)
            for (time, _, _), count in zip(points, counts, strict=True):
                if count and math.isfinite(rates.get(time, math.inf)):
                    cells.points[number,].append(self._row(time))
                else:
                    without += count
        return without

    def _row(self, time_ns: int) -> int:
        # The first interval of time would be a row at 0, which no window takes.
        return time_ns // self._interval_ns * self._interval_ns or 1

    def _rows(self, cells: "_Cells", rejected: Counter[Reason]) -> NodeRows:
        """Rows that have a value; points of the others are counted in *rejected*."""
        times = np.unique(np.concatenate([of_term.rows_p for of_term in cells.by_term.values()]))
        # What a window could not hold is not carried to it.
        times = times[-self._config.window_rows :]
        values = np.full((len(times), len(self.columns)), np.nan)
        overflowed = np.zeros(values.shape, bool)
        for place, sources in enumerate(self._columns):
            for source in sources:
                filled = source.values(cells, times)
                if filled is not None:
                    overflowed[:, place] |= np.isinf(filled)
                    empty = np.isnan(values[:, place]) & np.isfinite(filled)
                    values[empty, place] = filled[empty]
        there = ~np.isnan(values)
        kept = np.zeros(len(times), np.int64)
        for wanted, of_points in cells.points.items():
            rows = np.frombuffer(of_points, np.int64)
            inside = rows[rows >= times[0]]
            counts = np.bincount(np.searchsorted(times, inside), minlength=len(times))
            of = [any(s.takes(wanted) for s in sources) for sources in self._columns]
            stored = there[:, of].any(axis=1)
            too_large = ~stored & overflowed[:, of].any(axis=1)
            kept += np.where(stored, counts, 0)
            rejected[Reason.TOO_OLD] += len(rows) - len(inside)
            rejected[Reason.NON_FINITE] += int(counts[too_large].sum())
            rejected[Reason.INCOMPLETE] += int(counts[~stored & ~too_large].sum())
        with_value, reported = there.any(axis=1), there.any(axis=0)
        columns = tuple(n for n, has in zip(self.columns, reported, strict=True) if has)
        return NodeRows(
            columns, times[with_value], values[with_value][:, reported], kept[with_value]
        )


def _number(of: T, numbers: dict[T, int]) -> int:
    """Its number, from now on if it has none yet."""
    return numbers.setdefault(of, len(numbers))


class _Terms:
    """The terms of one metric, and which points they take."""

    def __init__(self) -> None:
        self.by_number: dict[int, Term] = {}
        self._numbers: Wanted = ()
        self._filtered = False
        self.plain = True
        """Each takes the number of a gauge or sum as it is."""

    def add(self, number: int, term: Term) -> None:
        self.by_number[number] = term
        self._numbers += (number,)
        self._filtered |= bool(term.where)
        self.plain &= term.take == "value" and not term.rate

    def points_of(self, metric: Metric) -> Iterator[tuple[Any, Wanted, dict[str, Any]]]:
        """The points that some term takes, with those terms and the point's attributes.

        A point with the no-recorded-value flag says that there is nothing: it is left out.
        """
        kind = metric.WhichOneof("data")
        for point in getattr(metric, kind).data_points if kind else ():
            attributes = _plain(point.attributes) if point.attributes else {}
            wanted = self._wanted(attributes) if self._filtered else self._numbers
            if wanted and not point.flags & NO_RECORDED_VALUE:
                yield point, wanted, attributes

    def _wanted(self, attributes: dict[str, Any]) -> Wanted:
        return tuple(
            number
            for number, term in self.by_number.items()
            if all(predicate.accepts(attributes) for predicate in term.where)
        )


class _Cells:
    """The points of one node in one request."""

    def __init__(self) -> None:
        self.sources: dict[SourceKey, int] = {}
        """The sources and their numbers, in order."""
        self.series: dict[SeriesKey, int] = {}
        """The series and their numbers, in order."""
        self.points: dict[Wanted, array[int]] = defaultdict(lambda: array("q"))
        """The row of each point, by the terms that it is for."""
        self.by_term: dict[int, _Numbers] = defaultdict(_Numbers)
        self.counters: dict[CounterKey, tuple[list[CounterPoint], bytearray]] = defaultdict(
            lambda: ([], bytearray())
        )
        """Points that a rate is asked of, and whether each counts as one."""


class _Numbers:
    """What one term takes of points; arrays, as a request may hold a million of them."""

    def __init__(self) -> None:
        self._rows, self._series, self._times = array("q"), array("q"), array("q")
        self._values = array("d")

    def put(self, row: int, series: int, time_ns: int, value: float) -> None:
        self._rows.append(row)
        self._series.append(series)
        self._times.append(time_ns)
        self._values.append(value)

    @property
    def rows_p(self) -> NDArray[np.int64]:
        return np.frombuffer(self._rows, np.int64)

    def by_row(self, rows_t: NDArray[np.int64], combine: Combine) -> NDArray[np.float64]:
        """The value in each of *rows_t*, NaN where there is none.

        Of one series in one row the newest point counts, then series combine.
        """
        rows, values = self.rows_p, np.frombuffer(self._values, np.float64)
        series, times = (np.frombuffer(a, np.int64) for a in (self._series, self._times))
        order = np.lexsort((times, series, rows))  # of equal ones the last to come stays the last
        rows, series, values, times = rows[order], series[order], values[order], times[order]
        newest = np.append((rows[1:] != rows[:-1]) | (series[1:] != series[:-1]), True)
        newest &= rows >= rows_t[0]
        rows, values, times = rows[newest], values[newest], times[newest]
        found, starts, sizes = np.unique(rows, return_index=True, return_counts=True)
        combined = values[starts]
        for place in np.flatnonzero(sizes > 1):
            part = slice(starts[place], starts[place] + sizes[place])
            combined[place] = _combined(combine, values[part], times[part])
        by_row = np.full(len(rows_t), np.nan)
        by_row[np.searchsorted(rows_t, found)] = combined
        return by_row


@dataclass(frozen=True)
class _Source:
    """A Source with its terms' numbers."""

    source: Source
    numbers: Wanted

    def takes(self, wanted: Wanted) -> bool:
        """Is one of the source's terms among *wanted*?"""
        return not set(self.numbers).isdisjoint(wanted)

    def values(self, cells: _Cells, rows_t: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """The value in each row; NaN where a term is missing, infinite if too large.

        None where some term is in no row.
        """
        if any(number not in cells.by_term for number in self.numbers):
            return None
        total = np.full(len(rows_t), self.source.plus)
        with np.errstate(over="ignore", invalid="ignore"):
            for number, term in zip(self.numbers, self.source.terms, strict=True):
                total += term.factor * cells.by_term[number].by_row(rows_t, term.combine)
            return total * self.source.multiply_by / self.source.divide_by


def _combined(how: Combine, values: NDArray[np.float64], times: NDArray[np.int64]) -> float:
    match how:
        case "sum":
            return _sum(values)
        case "mean":
            return _sum(values) / len(values)
        case "min":
            return float(values.min())
        case "max":
            return float(values.max())
        case "last":
            return float(values[times.argmax()])


def _sum(values: NDArray[np.float64]) -> float:
    try:
        return math.fsum(values.tolist())
    except OverflowError:
        return math.inf


class _Shape(NamedTuple):
    """What all points of a metric have in common."""

    name: str
    kind: str
    """The field that holds them; empty if none does."""
    unspecified: bool
    """It should say a temporality, and says none that is known."""
    counting: Counting | None
    """None of what does not count."""

    @classmethod
    def of(cls, metric: Metric) -> "_Shape":
        kind = metric.WhichOneof("data") or ""
        counting: Counting | None = Counting.CUMULATIVE
        temporality = None
        if kind in ("sum", "histogram", "exponential_histogram"):  # a summary always adds up
            temporality = getattr(metric, kind).aggregation_temporality
        if kind == "gauge":
            counting = None
        elif temporality == AGGREGATION_TEMPORALITY_DELTA:
            counting = Counting.DELTA
        elif kind == "sum" and not metric.sum.is_monotonic:
            counting = Counting.CUMULATIVE_UP_AND_DOWN
        unspecified = temporality not in _TEMPORALITIES
        return cls(metric.name, kind, unspecified, counting)


def _plain(attributes: Iterator[KeyValue] | Any) -> dict[str, Any]:
    """Attributes as plain values; of bytes, arrays and maps the bytes."""
    plain: dict[str, Any] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        if kind in _SCALARS:
            plain[attribute.key] = getattr(attribute.value, kind)
        else:
            plain[attribute.key] = attribute.value.SerializeToString(deterministic=True)
    return plain


def _key(attributes: Mapping[str, Any]) -> Key:
    return tuple(sorted(attributes.items(), key=lambda item: item[0]))


def _scope_key(scope: InstrumentationScope) -> Key:
    return (("name", scope.name), ("version", scope.version), *_key(_plain(scope.attributes)))


def _digest(key: Key) -> bytes:
    """16 bytes that no other key has. It copies no value but to encode it."""
    digest = blake2b(digest_size=16)
    for name, value in key:
        for part in (name, type(value).__name__, value):
            encoded = part if isinstance(part, bytes) else str(part).encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.digest()
