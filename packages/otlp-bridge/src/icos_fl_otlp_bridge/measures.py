"""The number that a term takes from one data point, whatever its type."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final, Literal

from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    ExponentialHistogramDataPoint,
    HistogramDataPoint,
    NumberDataPoint,
    SummaryDataPoint,
)

from icos_fl_otlp_bridge.reasons import Reason

Take = Literal["value", "count", "sum", "mean", "quantile"]
Bucket = tuple[float, float, int]
"""Lower bound, upper bound, observations."""

_QUANTILE_TOLERANCE: Final = 1e-9


def measured(
    kind: str, point: Any, take: Take, quantile: float | None
) -> tuple[float | None, Reason | None]:
    """The number, or why there is none; neither where nothing was observed.

    *kind* is the field of the Metric that holds the point, such as ``gauge``.
    """
    if (kind in ("gauge", "sum")) != (take == "value"):
        return None, Reason.UNSUPPORTED_TYPE
    if take == "value":
        return number_of(point)
    if not _valid(kind, point):
        return None, Reason.INVALID_HISTOGRAM
    if point.count == 0 and take in ("mean", "quantile"):
        return None, None
    return _finite(_of_distribution(kind, point, take, quantile or 0.0))


def number_of(point: NumberDataPoint) -> tuple[float | None, Reason | None]:
    """The number of a gauge's or sum's point, or why there is none."""
    match point.WhichOneof("value"):
        case "as_double":
            return _finite(point.as_double)
        case "as_int":
            return float(point.as_int), None
    return None, Reason.NO_VALUE


def _finite(value: float | None) -> tuple[float | None, Reason | None]:
    if value is None:
        return None, Reason.NO_VALUE
    return (value, None) if math.isfinite(value) else (None, Reason.NON_FINITE)


def _valid(kind: str, point: Any) -> bool:
    if kind == "histogram":
        return _valid_histogram(point)
    if kind == "exponential_histogram":
        counted = sum(point.positive.bucket_counts) + sum(point.negative.bucket_counts)
        return bool(counted + point.zero_count == point.count)
    return all(0 <= pair.quantile <= 1 for pair in point.quantile_values)


def _valid_histogram(point: HistogramDataPoint) -> bool:
    counts, bounds = point.bucket_counts, point.explicit_bounds
    if not counts and not bounds:
        return True
    return (
        len(counts) == len(bounds) + 1
        and all(map(math.isfinite, bounds))
        and all(a < b for a, b in pairwise(bounds))
        and sum(counts) == point.count
    )


def _of_distribution(kind: str, point: Any, take: Take, quantile: float) -> float | None:
    if take == "count":
        return float(point.count)
    if take == "quantile":
        return _quantile(kind, point, quantile)
    if kind != "summary" and not point.HasField("sum"):
        return None
    total = float(point.sum)
    return total if take == "sum" else total / point.count


def _quantile(kind: str, point: Any, quantile: float) -> float | None:
    if kind == "summary":
        return _of_summary(point, quantile)
    buckets = _linear(point) if kind == "histogram" else _exponential(point)
    if point.HasField("min"):
        buckets = ((max(lower, point.min), max(upper, point.min), n) for lower, upper, n in buckets)
    if point.HasField("max"):
        buckets = ((min(lower, point.max), min(upper, point.max), n) for lower, upper, n in buckets)
    return _interpolated(buckets, quantile * point.count)


def _of_summary(point: SummaryDataPoint, quantile: float) -> float | None:
    """A summary has the quantiles that its source computed, and no others."""
    for pair in point.quantile_values:
        if abs(pair.quantile - quantile) <= _QUANTILE_TOLERANCE:
            return float(pair.value)
    return None


def _linear(point: HistogramDataPoint) -> Iterator[Bucket]:
    """Buckets with observations. An outer one ends at the minimum or maximum, if told.

    Without them it is no wider than to 0, and else as narrow as its bound: as Prometheus does it.
    """
    bounds = list(point.explicit_bounds)
    if bounds:
        lowest = point.min if point.HasField("min") else min(0.0, bounds[0])
        highest = point.max if point.HasField("max") else bounds[-1]
    elif point.HasField("min") and point.HasField("max"):
        lowest, highest = point.min, point.max
    else:
        return
    edges = [lowest, *bounds, highest]
    for lower, upper, count in zip(edges, edges[1:], point.bucket_counts, strict=False):
        if count:
            yield lower, upper, count


def _exponential(point: ExponentialHistogramDataPoint) -> Iterator[Bucket]:
    """Buckets with observations, by value: (base^i, base^(i + 1)] with base 2^(2^-scale)."""
    step = _exp2(-point.scale)
    negative = point.negative.bucket_counts
    for place in reversed(range(len(negative))):
        index, count = point.negative.offset + place, negative[place]
        if count:
            yield -_exp2((index + 1) * step), -_exp2(index * step), count
    if point.zero_count:
        yield -point.zero_threshold, point.zero_threshold, point.zero_count
    for index, count in enumerate(point.positive.bucket_counts, point.positive.offset):
        if count:
            yield _exp2(index * step), _exp2((index + 1) * step), count


def _exp2(power: float) -> float:
    try:
        return float(2.0**power)
    except OverflowError:
        return math.inf


def _interpolated(buckets: Iterator[Bucket], rank: float) -> float | None:
    """The value of *rank* observations from below, linear within its bucket."""
    below = 0
    upper = None
    for lower, upper, count in buckets:
        if below + count >= rank:
            return lower + (upper - lower) * max(0.0, rank - below) / count
        below += count
    return upper
