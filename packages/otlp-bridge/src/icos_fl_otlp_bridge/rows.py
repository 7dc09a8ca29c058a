"""From an OTLP request to rows: the one thing that the bridge knows and nobody else does."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AGGREGATION_TEMPORALITY_UNSPECIFIED,
    Metric,
    NumberDataPoint,
)

from icos_fl_otlp_bridge.config import BridgeConfig, Combine, Source, Term

NO_RECORDED_VALUE: Final = 1
TIME_NS_MAX: Final = 2**63 - 1

# Reason codes of rejected points; they are told to exporters and stay as they are.
NO_NODE = "no_node"
INVALID_TIME = "invalid_time"
NO_VALUE = "no_value"
NON_FINITE = "non_finite"
UNSUPPORTED_TYPE = "unsupported_type"
UNSPECIFIED_TEMPORALITY = "unspecified_temporality"
INVALID_NODE = "invalid_node"
TOO_OLD = "too_old"
INCOMPLETE = "incomplete"

SeriesKey = tuple[Any, ...]
Wanted = tuple[Term, ...]


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
    rejected: Counter[str] = field(default_factory=Counter)
    """Points by reason code."""
    unmatched_resources: int = 0
    """Resources that the configuration leaves to others."""


class Converter:
    """Turns requests into rows as the configuration says. Has no state: any thread may call."""

    def __init__(self, config: BridgeConfig) -> None:
        self._config = config
        self.columns = tuple(config.columns)
        self.units = {name: column.unit for name, column in config.columns.items()}
        terms: dict[str, dict[Term, None]] = defaultdict(dict)
        for column in config.columns.values():
            for source in column.sources:
                for term in source.terms:
                    terms[term.metric][term] = None
        self._terms: dict[str, Wanted] = {name: tuple(of) for name, of in terms.items()}
        self._column_terms = [
            {term for source in column.sources for term in source.terms}
            for column in config.columns.values()
        ]

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
                        points = sum(1 for _ in _wanted_points(metric, terms))
                        converted.rejected[NO_NODE] += points
        for node, of_node in cells.items():
            rows = self._rows(of_node, converted.rejected)
            if len(rows.times_ns_t):
                converted.rows[node] = rows
        return converted

    def _collect(
        self,
        metric: Metric,
        terms: Wanted,
        series: SeriesKey,
        cells: "_Cells",
        rejected: Counter[str],
    ) -> None:
        """Put the metric's good points into *cells*, and count the others in *rejected*."""
        fault = _fault(metric)
        interval = self._config.interval_ns
        for point, wanted, attributes in _wanted_points(metric, terms):
            value, problem = (0.0, fault) if fault else _value(point)
            if problem:
                rejected[problem] += 1
                continue
            # The first interval of time would be a row at 0, which no window takes.
            row = point.time_unix_nano // interval * interval or 1
            key = (*series, _key(attributes)) if attributes else series
            cells.put(wanted, row, key, point.time_unix_nano, value)

    def _rows(self, cells: "_Cells", rejected: Counter[str]) -> NodeRows:
        """Rows that have a value; points of the others are counted in *rejected*."""
        times = np.array(sorted(cells.points), np.int64)
        index = {int(time): position for position, time in enumerate(times)}
        values = np.full((len(times), len(self.columns)), np.nan)
        overflowed = np.zeros(values.shape, bool)
        for place, column in enumerate(self._config.columns.values()):
            for source in column.sources:
                filled = _of_source(source, cells, index)
                overflowed[:, place] |= np.isinf(filled)
                empty = np.isnan(values[:, place]) & np.isfinite(filled)
                values[empty, place] = filled[empty]
        kept = np.zeros(len(times), np.int64)
        for row, position in index.items():
            stored = self._terms_of(~np.isnan(values[position]))
            too_large = self._terms_of(overflowed[position])
            for wanted, count in cells.points[row].items():
                if not stored.isdisjoint(wanted):
                    kept[position] += count
                else:
                    reason = INCOMPLETE if too_large.isdisjoint(wanted) else NON_FINITE
                    rejected[reason] += count
        some = ~np.isnan(values).all(axis=1)
        there = ~np.isnan(values).all(axis=0)
        columns = tuple(name for name, has in zip(self.columns, there, strict=True) if has)
        return NodeRows(columns, times[some], values[some][:, there], kept[some])

    def _terms_of(self, columns_f: NDArray[np.bool_]) -> set[Term]:
        """Every term of the columns that are marked."""
        chosen = (of for of, marked in zip(self._column_terms, columns_f, strict=True) if marked)
        return set().union(*chosen)


class _Cells:
    """The points of one node, by term, row and series; of one series in one row the newest."""

    def __init__(self) -> None:
        self.points: dict[int, Counter[Wanted]] = defaultdict(Counter)
        """How many points each row has, by the terms that they are for."""
        self.by_term: dict[Term, dict[int, dict[SeriesKey, tuple[int, float]]]] = {}

    def put(self, wanted: Wanted, row: int, series: SeriesKey, time_ns: int, value: float) -> None:
        self.points[row][wanted] += 1
        for term in wanted:
            known = self.by_term.setdefault(term, {}).setdefault(row, {})
            if series not in known or known[series][0] <= time_ns:
                known[series] = (time_ns, value)


def _of_source(source: Source, cells: _Cells, index: Mapping[int, int]) -> NDArray[np.float64]:
    """The source's value in each row; NaN where a term is missing, infinite if too large."""
    total = np.full(len(index), source.plus)
    with np.errstate(over="ignore", invalid="ignore"):
        for term in source.terms:
            term_values = np.full(len(index), np.nan)
            for row, series in cells.by_term.get(term, {}).items():
                term_values[index[row]] = _combined(term.combine, list(series.values()))
            total = total + term.factor * term_values
        return total * source.multiply_by / source.divide_by


def _combined(how: Combine, points: list[tuple[int, float]]) -> float:
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


def _fault(metric: Metric) -> str:
    """Why no point of the metric can be taken, if so."""
    kind = metric.WhichOneof("data")
    if kind not in ("gauge", "sum"):
        return UNSUPPORTED_TYPE
    temporality = metric.sum.aggregation_temporality
    if kind == "sum" and temporality == AGGREGATION_TEMPORALITY_UNSPECIFIED:
        return UNSPECIFIED_TEMPORALITY
    return ""


def _wanted_points(
    metric: Metric, terms: Wanted
) -> Iterator[tuple[NumberDataPoint, Wanted, dict[str, Any]]]:
    """The metric's points that some term takes, with those terms and the point's attributes.

    A point with the no-recorded-value flag says that there is nothing: it is left out.
    """
    kind = metric.WhichOneof("data")
    filtered = any(term.where for term in terms)
    for point in getattr(metric, kind).data_points if kind else ():
        attributes = _plain(point.attributes) if point.attributes else {}
        wanted = terms
        if filtered:
            wanted = tuple(t for t in terms if all(p.accepts(attributes) for p in t.where))
        if wanted and not point.flags & NO_RECORDED_VALUE:
            yield point, wanted, attributes


def _value(point: NumberDataPoint) -> tuple[float, str]:
    """The point's value, or why it has none."""
    if not 0 < point.time_unix_nano <= TIME_NS_MAX:
        return 0.0, INVALID_TIME
    kind = point.WhichOneof("value")
    if kind is None:
        return 0.0, NO_VALUE
    value = float(getattr(point, kind))
    return (value, "") if math.isfinite(value) else (0.0, NON_FINITE)


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
