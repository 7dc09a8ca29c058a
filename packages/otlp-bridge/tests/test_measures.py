"""The numbers of histograms and summaries, and how broken ones are told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_otlp_bridge.measures import measured
from icos_fl_otlp_bridge.reasons import Reason
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    ExponentialHistogramDataPoint,
    HistogramDataPoint,
    NumberDataPoint,
    SummaryDataPoint,
)

VALID = {"count": 4, "sum": 10.0, "bucket_counts": [1, 3], "explicit_bounds": [2.0]}


def of(point, take, quantile=None):
    kinds = {
        NumberDataPoint: "gauge",
        HistogramDataPoint: "histogram",
        ExponentialHistogramDataPoint: "exponential_histogram",
        SummaryDataPoint: "summary",
    }
    return measured(kinds[type(point)], point, take, quantile)


@pytest.mark.parametrize(("take", "value"), [("count", 4.0), ("sum", 10.0), ("mean", 2.5)])
@pytest.mark.parametrize(
    "point",
    [
        HistogramDataPoint(**VALID),
        HistogramDataPoint(count=4, sum=10),
        ExponentialHistogramDataPoint(count=4, sum=10, zero_count=4),
        SummaryDataPoint(count=4, sum=10),
    ],
    ids=["histogram", "no buckets", "exponential", "summary"],
)
def test_count_sum_and_mean(point, take, value):
    assert of(point, take) == (value, None)


@pytest.mark.parametrize(
    ("quantile", "value"), [(0.0, 0.0), (0.125, 1.0), (0.25, 2.0), (0.5, 3.0), (1.0, 4.0)]
)
def test_a_quantile_is_linear_within_its_bucket(quantile, value):
    point = HistogramDataPoint(count=4, bucket_counts=[1, 2, 1], explicit_bounds=[2, 4])
    assert of(point, "quantile", quantile) == (value, None)


def test_minimum_and_maximum_bound_the_outer_buckets():
    point = HistogramDataPoint(
        count=4, bucket_counts=[2, 2], explicit_bounds=[10], min=8.0, max=14.0
    )
    assert of(point, "quantile", 0.0) == (8.0, None)
    assert of(point, "quantile", 0.25) == (9.0, None)
    assert of(point, "quantile", 0.75) == (12.0, None)
    assert of(point, "quantile", 1.0) == (14.0, None)


def test_a_quantile_of_exponential_buckets():
    point = ExponentialHistogramDataPoint(count=4, scale=0, zero_count=1)
    point.positive.offset = 1  # (2, 4], (4, 8]
    point.positive.bucket_counts.extend([1, 1])
    point.negative.offset = 0  # [-2, -1)
    point.negative.bucket_counts.append(1)
    quantiles = [0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.0]
    found = [of(point, "quantile", quantile)[0] for quantile in quantiles]
    assert found == [-2.0, -1.5, -1.0, 0.0, 3.0, 4.0, 8.0]


def test_a_summary_has_the_quantiles_of_its_source():
    point = SummaryDataPoint(count=4, quantile_values=[{"quantile": 0.95, "value": 7.0}])
    assert of(point, "quantile", 0.95) == (7.0, None)
    assert of(point, "quantile", 0.5) == (None, Reason.NO_VALUE)


@pytest.mark.parametrize("take", ["mean", "quantile"])
def test_nothing_observed_is_a_gap_and_no_fault(take):
    assert of(HistogramDataPoint(sum=0), take, 0.5 if take == "quantile" else None) == (None, None)


@pytest.mark.parametrize("take", ["sum", "mean"])
def test_a_histogram_without_sum_has_no_such_value(take):
    assert of(HistogramDataPoint(count=4), take) == (None, Reason.NO_VALUE)


def test_a_histogram_without_buckets_has_a_count_and_no_quantile():
    assert of(HistogramDataPoint(count=4, sum=1), "count") == (4.0, None)
    assert of(HistogramDataPoint(count=4, sum=1), "quantile", 0.5) == (None, Reason.NO_VALUE)


# Checklist, Data: histogram: bucket_counts = bounds + 1, or both empty; bounds strictly increasing;
# counts sum to count.
@pytest.mark.parametrize(
    "broken",
    [
        {"bucket_counts": [4]},
        {"bucket_counts": [1, 3, 0]},
        {"bucket_counts": []},
        {"explicit_bounds": []},
        {"explicit_bounds": [2.0, 2.0], "bucket_counts": [1, 3, 0]},
        {"explicit_bounds": [3.0, 2.0], "bucket_counts": [1, 3, 0]},
        {"explicit_bounds": [float("nan")]},
        {"count": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("take", ["count", "sum", "mean", "quantile"])
def test_case_7_a_histogram_that_contradicts_itself_is_invalid(broken, take):
    quantile = 0.5 if take == "quantile" else None
    found = of(HistogramDataPoint(**(VALID | broken)), take, quantile)
    assert found == (None, Reason.INVALID_HISTOGRAM)


def test_exponential_counts_that_do_not_add_up_are_invalid():
    point = ExponentialHistogramDataPoint(count=3, zero_count=1)
    point.positive.bucket_counts.append(1)
    assert of(point, "count") == (None, Reason.INVALID_HISTOGRAM)


@pytest.mark.parametrize("take", ["count", "sum", "mean", "quantile"])
def test_a_gauge_is_no_distribution(take):
    assert of(NumberDataPoint(as_int=1), take, 0.5) == (None, Reason.UNSUPPORTED_TYPE)


def test_buckets_without_end_have_no_finite_quantile():
    point = ExponentialHistogramDataPoint(count=1, scale=-30)
    point.positive.bucket_counts.append(1)
    assert of(point, "quantile", 1.0) == (None, Reason.NON_FINITE)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50),
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=10, unique=True),
    st.floats(0, 1),
)
def test_a_quantile_is_in_the_bucket_of_the_observation_of_that_rank(values, bounds, quantile):
    bounds = sorted(map(float, bounds))
    counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1).tolist()
    point = HistogramDataPoint(
        count=len(values),
        bucket_counts=counts,
        explicit_bounds=bounds,
        min=min(values),
        max=max(values),
    )
    found, problem = of(point, "quantile", quantile)
    assert problem is None
    rank = max(1, int(np.ceil(quantile * len(values))))
    observation = sorted(values)[rank - 1]
    bucket = int(np.searchsorted(bounds, observation))
    edges = [min(values), *bounds, max(values)]
    assert edges[bucket] - 1e-9 <= found <= max(edges[bucket + 1], edges[bucket]) + 1e-9
