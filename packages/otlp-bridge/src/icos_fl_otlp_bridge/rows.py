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
NO_TIME = "no_time"
NO_VALUE = "no_value"
NON_FINITE = "non_finite"
UNSUPPORTED_TYPE = "unsupported_type"
UNSPECIFIED_TEMPORALITY = "unspecified_temporality"
INVALID_NODE = "invalid_node"
TOO_OLD = "too_old"

SeriesKey = tuple[Any, ...]


@dataclass
class NodeRows:
    """The rows of one node in one request, oldest first."""

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


class Converter:
    """Turns requests into rows as the configuration says. Has no state: any thread may call."""

    def __init__(self, config: BridgeConfig) -> None:
        self._config = config
        self.columns = tuple(config.columns)
        self.units = {name: column.unit for name, column in config.columns.items()}
        self._terms: dict[str, list[Term]] = defaultdict(list)
        for column in config.columns.values():
            for source in column.sources:
                for term in source.terms:
                    if term not in self._terms[term.metric]:
                        self._terms[term.metric].append(term)

    def convert(self, request: ExportMetricsServiceRequest) -> Converted:
        """Rows by node, and refused points. Metrics that no column names are neither."""
        converted = Converted()
        cells: dict[str, _Cells] = defaultdict(_Cells)
        for resource_metrics in request.resource_metrics:
            attributes = _plain(resource_metrics.resource.attributes)
            if not all(predicate.accepts(attributes) for predicate in self._config.resources):
                continue
            node = attributes.get(self._config.node_attribute)
            resource_key: SeriesKey | None = None
            for scope_metrics in resource_metrics.scope_metrics:
                for metric in scope_metrics.metrics:
                    terms = self._terms.get(metric.name)
                    if terms is None:
                        continue
                    if not isinstance(node, str) or not node:
                        converted.rejected[NO_NODE] += _point_count(metric)
                        continue
                    if resource_key is None:
                        resource_key = _key(attributes)
                    series = (resource_key, scope_metrics.scope.name)
                    self._collect(metric, terms, series, cells[node], converted.rejected)
        for node, of_node in cells.items():
            if of_node.points:
                converted.rows[node] = self._rows(of_node)
        return converted

    def _collect(
        self,
        metric: Metric,
        terms: list[Term],
        series: SeriesKey,
        cells: "_Cells",
        rejected: Counter[str],
    ) -> None:
        """Put the metric's good points into *cells*, the others into *rejected*."""
        kind = metric.WhichOneof("data")
        if kind not in ("gauge", "sum"):
            rejected[UNSUPPORTED_TYPE] += _point_count(metric)
            return
        if kind == "sum" and metric.sum.aggregation_temporality == (
            AGGREGATION_TEMPORALITY_UNSPECIFIED
        ):
            rejected[UNSPECIFIED_TEMPORALITY] += len(metric.sum.data_points)
            return
        filtered = any(term.where for term in terms)
        interval = self._config.interval_ns
        for point in getattr(metric, kind).data_points:
            if point.flags & NO_RECORDED_VALUE:
                continue
            value, problem = _value(point)
            if problem:
                rejected[problem] += 1
                continue
            attributes = _plain(point.attributes) if point.attributes else {}
            row = point.time_unix_nano // interval * interval
            # The first cell of time would be 0, which no window takes.
            row = row or 1
            cells.points[row] += 1
            key = (*series, _key(attributes)) if attributes else series
            for term in terms:
                if not filtered or all(predicate.accepts(attributes) for predicate in term.where):
                    cells.put(term, row, key, point.time_unix_nano, value)

    def _rows(self, cells: "_Cells") -> NodeRows:
        times = sorted(cells.points)
        index = {time: position for position, time in enumerate(times)}
        values = np.full((len(times), len(self.columns)), np.nan)
        for place, column in enumerate(self._config.columns.values()):
            for source in column.sources:
                filled = _of_source(source, cells, index)
                values[:, place] = np.where(np.isnan(values[:, place]), filled, values[:, place])
        points = np.array([cells.points[time] for time in times], np.int64)
        return NodeRows(np.array(times, np.int64), values, points)


class _Cells:
    """The points of one node, by term, row and series; of one series in one row the newest."""

    def __init__(self) -> None:
        self.points: Counter[int] = Counter()
        self.by_term: dict[Term, dict[int, dict[SeriesKey, tuple[int, float]]]] = {}

    def put(self, term: Term, row: int, series: SeriesKey, time_ns: int, value: float) -> None:
        known = self.by_term.setdefault(term, {}).setdefault(row, {})
        if series not in known or known[series][0] <= time_ns:
            known[series] = (time_ns, value)


def _of_source(source: Source, cells: _Cells, index: Mapping[int, int]) -> NDArray[np.float64]:
    """The source's value in each row; NaN where a term is missing."""
    total = np.full(len(index), source.plus)
    for term in source.terms:
        term_values = np.full(len(index), np.nan)
        for row, series in cells.by_term.get(term, {}).items():
            term_values[index[row]] = _combined(term.combine, list(series.values()))
        # A factor of 1 must not touch a value's last bit, nor a plus of 0.
        total = total + (term_values if term.factor == 1 else term.factor * term_values)
    if source.multiply_by != 1:
        total = total * source.multiply_by
    return total / source.divide_by if source.divide_by != 1 else total


def _combined(how: Combine, points: list[tuple[int, float]]) -> float:
    values = [value for _, value in points]
    match how:
        case "sum":
            return math.fsum(values)
        case "mean":
            return math.fsum(values) / len(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "last":
            return max(points, key=lambda point: point[0])[1]


def _value(point: NumberDataPoint) -> tuple[float, str]:
    """The point's value, or why it has none."""
    if not 0 < point.time_unix_nano <= TIME_NS_MAX:
        return 0.0, NO_TIME
    kind = point.WhichOneof("value")
    if kind is None:
        return 0.0, NO_VALUE
    value = float(getattr(point, kind))
    return (value, "") if math.isfinite(value) else (0.0, NON_FINITE)


def _point_count(metric: Metric) -> int:
    kind = metric.WhichOneof("data")
    return len(getattr(metric, kind).data_points) if kind else 0


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
