"""From an OTLP request to rows: the one thing that the bridge knows and nobody else does."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
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
TIME_NS_MAX: Final = 2**63 - 1

SeriesKey = tuple[Any, ...]
Wanted = tuple[int, ...]
"""Terms that take a point, by their numbers: a number hashes faster than a Term."""


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
        self.columns = tuple(config.columns)
        self.units = {name: column.unit for name, column in config.columns.items()}
        numbers: dict[Term, int] = {}
        self._columns = [
            [
                _Source(source, tuple(_number(term, numbers) for term in source.terms))
                for source in of
            ]
            for of in (column.sources for column in config.columns.values())
        ]
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
            named = isinstance(node, str) and node != ""
            resource_key = _key(attributes)
            for scope_metrics in resource_metrics.scope_metrics:
                for metric in scope_metrics.metrics:
                    terms = self._terms.get(metric.name)
                    if terms is None:
                        continue
                    if named:
                        series = (resource_key, scope_metrics.scope.name)
                        self._collect(metric, terms, series, cells[str(node)], converted.rejected)
                    else:
                        points = sum(1 for _ in terms.points_of(metric))
                        converted.rejected[Reason.NO_NODE] += points
        for node, of_node in cells.items():
            converted.without_rate += self._put_rates(node, of_node)
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
        series: SeriesKey,
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
            key = (*series, _key(attributes)) if attributes else series
            if plain:
                problem = self._take_number(point, wanted, key, cells)
            else:
                problem = self._take(shape, point, terms, wanted, key, cells)
            if problem:
                rejected[problem] += 1

    def _take_number(
        self, point: Any, wanted: Wanted, series: SeriesKey, cells: "_Cells"
    ) -> Reason | None:
        """What ``_take`` does for terms that take a gauge's or a sum's number."""
        value, problem = number_of(point)
        if value is None:
            return problem
        time = point.time_unix_nano
        row = self._row(time)
        for number in wanted:
            cells.put(number, row, series, time, value)
        cells.points[wanted][row] += 1
        return None

    def _take(
        self,
        shape: "_Shape",
        point: Any,
        terms: "_Terms",
        wanted: Wanted,
        series: SeriesKey,
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
            elif value is not None and term.rate:
                rated.append(((number, shape.name, term.take, series, shape.counting), value))
            elif value is not None:
                plain += (number,)
                cells.put(number, row, series, point.time_unix_nano, value)
        if plain:
            cells.points[plain][row] += 1
        for place, (counter, value) in enumerate(rated):
            of = (point.time_unix_nano, point.start_time_unix_nano, value)
            # A point counts once, whatever is made of it.
            cells.counters[counter].append((of, not plain and place == 0))
        return problems[0] if len(problems) == len(wanted) else None

    def _put_rates(self, node: str, cells: "_Cells") -> int:
        """Turn the counters' points into cells; return how many of the points have no rate."""
        without = 0
        for (number, metric, take, series, counting), points in cells.counters.items():
            key = (node, metric, take, series)
            rates = self._rates.of(key, counting, [point for point, _ in points])
            for time, rate in rates.items():
                if math.isfinite(rate):
                    cells.put(number, self._row(time), series, time, rate)
            for (time, _, _), counts in points:
                has_rate = math.isfinite(rates.get(time, math.inf))
                without += counts and not has_rate
                cells.points[number,][self._row(time)] += counts and has_rate
        return without

    def _row(self, time_ns: int) -> int:
        # The first interval of time would be a row at 0, which no window takes.
        return time_ns // self._interval_ns * self._interval_ns or 1

    def _rows(self, cells: "_Cells", rejected: Counter[Reason]) -> NodeRows:
        """Rows that have a value; points of the others are counted in *rejected*."""
        times = np.array(sorted(set().union(*cells.by_term.values())), np.int64)
        index = {time: position for position, time in enumerate(times.tolist())}
        values = np.full((len(times), len(self.columns)), np.nan)
        overflowed = np.zeros(values.shape, bool)
        for place, sources in enumerate(self._columns):
            for source in sources:
                filled = source.values(cells, index)
                if filled is not None:
                    overflowed[:, place] |= np.isinf(filled)
                    empty = np.isnan(values[:, place]) & np.isfinite(filled)
                    values[empty, place] = filled[empty]
        there = ~np.isnan(values)
        kept = np.zeros(len(times), np.int64)
        for wanted, counted in cells.points.items():
            counts = np.zeros(len(times), np.int64)
            by_row = +counted
            counts[[index[row] for row in by_row]] = list(by_row.values())
            of = [any(s.takes(wanted) for s in sources) for sources in self._columns]
            stored = there[:, of].any(axis=1)
            too_large = ~stored & overflowed[:, of].any(axis=1)
            kept += np.where(stored, counts, 0)
            rejected[Reason.NON_FINITE] += int(counts[too_large].sum())
            rejected[Reason.INCOMPLETE] += int(counts[~stored & ~too_large].sum())
        rows, reported = there.any(axis=1), there.any(axis=0)
        columns = tuple(n for n, has in zip(self.columns, reported, strict=True) if has)
        return NodeRows(columns, times[rows], values[rows][:, reported], kept[rows])


def _number(term: Term, numbers: dict[Term, int]) -> int:
    return numbers.setdefault(term, len(numbers))


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
    """The points of one node, by term, row and series; of one series in one row the newest."""

    def __init__(self) -> None:
        self.points: dict[Wanted, Counter[int]] = defaultdict(Counter)
        """How many points each row has, by the terms that they are for."""
        self.by_term: dict[int, dict[int, dict[SeriesKey, tuple[int, float]]]] = defaultdict(dict)
        self.counters: dict[Any, list[tuple[CounterPoint, bool]]] = defaultdict(list)
        """Points that a rate is asked of, by term and series, and whether each counts as one."""

    def put(self, number: int, row: int, series: SeriesKey, time_ns: int, value: float) -> None:
        cell = self.by_term[number].setdefault(row, {})
        if series not in cell or cell[series][0] <= time_ns:
            cell[series] = (time_ns, value)


@dataclass(frozen=True)
class _Source:
    """A Source with its terms' numbers."""

    source: Source
    numbers: Wanted

    def takes(self, wanted: Wanted) -> bool:
        """Is one of the source's terms among *wanted*?"""
        return not set(self.numbers).isdisjoint(wanted)

    def values(self, cells: _Cells, index: Mapping[int, int]) -> NDArray[np.float64] | None:
        """The value in each row; NaN where a term is missing, infinite if too large.

        None where some term is in no row.
        """
        if any(number not in cells.by_term for number in self.numbers):
            return None
        total = np.full(len(index), self.source.plus)
        with np.errstate(over="ignore", invalid="ignore"):
            for number, term in zip(self.numbers, self.source.terms, strict=True):
                of_term = np.full(len(index), np.nan)
                for row, cell in cells.by_term[number].items():
                    of_term[index[row]] = _combined(term.combine, list(cell.values()))
                total = total + term.factor * of_term
            return total * self.source.multiply_by / self.source.divide_by


def _combined(how: Combine, points: list[tuple[int, float]]) -> float:
    if len(points) == 1:
        return points[0][1]
    values = [value for _, value in points]
    match how:
        case "sum":
            return _sum(values)
        case "mean":
            return _sum(values) / len(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "last":
            return max(points, key=lambda point: point[0])[1]


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
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
    """Attributes as plain values; of arrays and maps their text."""
    plain: dict[str, Any] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind) if kind else None
        scalar = kind in ("string_value", "int_value", "double_value", "bool_value")
        plain[attribute.key] = value if scalar else str(value)
    return plain


def _key(attributes: Mapping[str, Any]) -> SeriesKey:
    return tuple(sorted(attributes.items(), key=lambda item: item[0]))
