"""From points to rows, with values that can be checked by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icos_fl_otlp_bridge import default_config
from icos_fl_otlp_bridge.rates import Rates
from icos_fl_otlp_bridge.rows import Converter
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

POWER = "scaph_host_power_microwatts"
TOTAL = "scaph_host_memory_total_bytes"
AVAILABLE = "scaph_host_memory_available_bytes"
CPU = "system.cpu.utilization"
MEMORY = "system.memory.usage"
UNSPECIFIED, DELTA, CUMULATIVE = 0, 1, 2
SECOND = 1_000_000_000
START = 1_699_999_998 * SECOND


@pytest.fixture
def convert(config):
    """Rows of node a by seconds after START, and the refused points by reason."""

    def convert(export: Any, text: str = "") -> tuple[dict[float, dict[str, float]], dict]:
        converter = Converter(config(text) if text else default_config())
        converted = converter.convert(export.request)
        rows = converted.rows.get("a")
        found = {}
        if rows is not None:
            for time, values in zip(rows.times_ns_t, rows.values_tf, strict=True):
                seconds = (int(time) - START) / SECOND
                cells = zip(rows.columns, values, strict=True)
                found[seconds] = {name: float(v) for name, v in cells if not np.isnan(v)}
        return found, dict(converted.rejected)

    return convert


def columns(**sources: str) -> str:
    """A configuration of columns, each with the source given as flow YAML."""
    lines = [f"  {name}: {{sources: [{source}]}}" for name, source in sources.items()]
    return "columns:\n" + "\n".join(lines) + "\n"


def test_more_columns_stand_in_one_row_with_the_packaged_ones(convert, export):
    batch = export().gauge(POWER, (0, 20_000_000)).gauge("hw.fan.speed", (0, 900.0))
    rows, _ = convert(batch, "more_" + columns(fan="{terms: [{metric: hw.fan.speed}]}"))
    assert rows == {0: {"power_consumption": 20.0, "fan": 900.0}}


# Checklist, Data: test flags & 1. Such a point is a gap, never 0.
def test_case_1_a_point_without_recorded_value_is_a_gap(bridge, export):
    flagged = {"flags": 1}
    batch = export().gauge(
        POWER,
        (0, 20_000_000),
        (3, 0, {}, flagged),
        (6, 21_000_000),
        (9, 0, {}, {"flags": 3}),
        (12, None, {}, flagged),
        (15, 0.0, {}, flagged),
    )
    assert not bridge.export(batch).HasField("partial_success")
    assert bridge.rows() == {0: {"power_consumption": 20.0}, 6: {"power_consumption": 21.0}}


def test_another_flag_does_not_make_a_gap(convert, export):
    rows, rejected = convert(export().gauge(POWER, (0, 0, {}, {"flags": 2})))
    assert (rows, rejected) == ({0: {"power_consumption": 0.0}}, {})


@given(st.integers(0, 10**12))
def test_whole_microwatts_become_the_watts_that_a_person_would_write(microwatts):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="host.name").value.string_value = "a"
    metric = resource.scope_metrics.add().metrics.add(name=POWER)
    metric.gauge.data_points.add(time_unix_nano=START, as_int=microwatts)
    watts = Converter(default_config()).convert(request).rows["a"].values_tf[0, 0]
    whole, rest = divmod(microwatts, 10**6)
    assert watts == float(f"{whole}.{rest:06}")


def test_rows_that_the_window_could_not_hold_are_too_old(convert, export):
    text = "window_rows: 2\n" + columns(c="{terms: [{metric: m}]}", d="{terms: [{metric: n}]}")
    batch = export().gauge("m", (6, 3.0), (0, 1.0), (3, 2.0), (1, 1.0)).gauge("n", (3, 9), (0, 8))
    assert convert(batch, text) == ({3: {"c": 2.0, "d": 9.0}, 6: {"c": 3.0}}, {"too_old": 3})


def test_of_more_nodes_than_there_may_be_no_more_is_made(config, export):
    text = "nodes_max: 2\n" + columns(c="{terms: [{metric: m}]}")
    batch = export().gauge("other", (0, 1)).resource("b").gauge("m", (0, 1))
    batch.resource("c").gauge("m", (0, 1)).resource("d").gauge("m", (0, 1), (3, 1))
    batch.resource("b").gauge("m", (3, 1))
    converted = Converter(config(text)).convert(batch.request)
    assert (list(converted.rows), converted.rejected) == (["b", "c"], {"too_many_nodes": 2})


def test_memory_is_total_minus_available_in_mib(convert, export):
    batch = export().gauge(TOTAL, (0, 16 << 30)).gauge(AVAILABLE, (0, (6 << 30) + 512))
    assert convert(batch)[0] == {0: {"memory_usage": 10 * 1024 - 512 / 1048576}}


def test_terms_combine_whatever_their_order_resource_and_scope(convert, export):
    batch = export().gauge(AVAILABLE, (1, 1 << 20)).resource("a").gauge(TOTAL, (0, 3 << 20))
    assert convert(batch) == ({0: {"memory_usage": 2.0}}, {})


def test_a_term_without_the_others_is_counted_as_incomplete(convert, export):
    batch = export().gauge(TOTAL, (0, 3 << 20), (3, 3 << 20)).gauge(AVAILABLE, (3, 1 << 20))
    assert convert(batch) == ({3: {"memory_usage": 2.0}}, {"incomplete": 1})


def test_an_incomplete_column_leaves_the_rows_other_columns(convert, export):
    batch = export().gauge(TOTAL, (0, 3 << 20)).gauge(POWER, (0, 1_000_000))
    assert convert(batch) == ({0: {"power_consumption": 1.0}}, {"incomplete": 1})


@pytest.mark.parametrize("attribute", ["state", "cpu.mode"])
def test_cpu_usage_is_what_the_cpus_are_not_idle_on_average(convert, export, attribute):
    points = [
        (0, idle, {"cpu": f"cpu{n}", attribute: "idle"}) for n, idle in enumerate([0.5, 0.75])
    ]
    busy = (0, 0.25, {"cpu": "cpu0", attribute: "user"})
    assert convert(export().gauge(CPU, *points, busy)) == ({0: {"cpu_usage": 37.5}}, {})


@pytest.mark.parametrize("attribute", ["state", "system.memory.state"])
def test_memory_used_is_taken_from_a_sum_too(convert, export, attribute):
    batch = export().sum(
        MEMORY,
        CUMULATIVE,
        (0, 5 << 20, {attribute: "used"}),
        (0, 9 << 20, {attribute: "free"}),
    )
    assert convert(batch) == ({0: {"memory_usage": 5.0}}, {})


def test_the_first_source_whose_terms_are_all_there_wins(convert, export):
    used = {"state": "used"}
    batch = (
        export()
        .gauge(MEMORY, (0, 7 << 20, used), (3, 8 << 20, used))
        .gauge(TOTAL, (0, 3 << 20), (3, 3 << 20))
        .gauge(AVAILABLE, (0, 1 << 20))
    )
    assert convert(batch) == ({0: {"memory_usage": 2.0}, 3: {"memory_usage": 8.0}}, {})


def test_points_whose_clocks_differ_a_little_fall_into_one_row(convert, export):
    batch = export().gauge(POWER, (3.2, 1_000_000)).gauge(TOTAL, (4.1, 3 << 20))
    batch.gauge(AVAILABLE, (5.999, 1 << 20))
    assert convert(batch) == ({3: {"power_consumption": 1.0, "memory_usage": 2.0}}, {})


def test_of_one_series_in_one_row_the_newest_point_counts(convert, export):
    batch = export().gauge(POWER, (2, 2_000_000), (1, 1_000_000))
    assert convert(batch) == ({0: {"power_consumption": 2.0}}, {})


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("sum", 12.0), ("mean", 4.0), ("min", 1.0), ("max", 8.0), ("last", 3.0)],
)
def test_series_combine_as_configured(convert, export, combine, expected):
    points = [(0, 8.0, {"s": "x"}), (1, 1.0, {"s": "y"}), (2, 3.0, {"s": "z"})]
    text = columns(c=f"{{terms: [{{metric: m, combine: {combine}}}]}}")
    assert convert(export().gauge("m", *points), text) == ({0: {"c": expected}}, {})


# Checklist, Data: a series is resource + scope + name + point attributes: two sensors of one metric
# are two series.
def test_series_of_two_resources_of_one_node_are_two(convert, export):
    batch = export(sensor="1").gauge("m", (0, 1.0)).resource("a", sensor="2").gauge("m", (0, 2.0))
    assert convert(batch, columns(c="{terms: [{metric: m}]}"))[0] == {0: {"c": 3.0}}


@pytest.mark.parametrize("of_scope", ["name", "version", "attributes"])
def test_series_of_two_scopes_are_two(convert, export, of_scope):
    batch = export().gauge("m", (0, 1.0))
    scope = batch.request.resource_metrics[0].scope_metrics.add()
    if of_scope == "attributes":
        scope.scope.attributes.add(key="k").value.bool_value = True
    else:
        setattr(scope.scope, of_scope, "another")
    scope.metrics.append(batch.request.resource_metrics[0].scope_metrics[0].metrics[0])
    assert convert(batch, columns(c="{terms: [{metric: m}]}"))[0] == {0: {"c": 2.0}}


# Checklist, Data: as_int and as_double both count.
def test_integers_and_doubles_both_count(convert, export):
    batch = export().gauge(POWER, (0, 3_000_000), (3, 1_500_000.0))
    assert convert(batch) == ({0: {"power_consumption": 3.0}, 3: {"power_consumption": 1.5}}, {})


# Checklist, Data: a gauge ignores the start time.
def test_a_gauge_ignores_its_start_time(convert, export):
    later = {"start_time_unix_nano": START + 99 * SECOND}
    batch = export().gauge(POWER, (0, 1_000_000, {}, later))
    assert convert(batch) == ({0: {"power_consumption": 1.0}}, {})


def test_factor_plus_and_scale_apply_in_the_documented_order(convert, export):
    text = columns(
        c="{terms: [{metric: m, factor: 2}, {metric: n, factor: -1}], plus: 1, "
        "multiply_by: 10, divide_by: 4}"
    )
    batch = export().gauge("m", (0, 5)).gauge("n", (0, 3.0))
    assert convert(batch, text)[0] == {0: {"c": (1 + 2 * 5 - 3) * 10 / 4}}


def test_one_metric_may_fill_several_columns(convert, export):
    text = columns(
        up="{terms: [{metric: m, where: [{attribute: direction, equals: up}]}]}",
        both="{terms: [{metric: m}]}",
    )
    points = [(0, 1.0, {"direction": "up"}), (0, 2.0, {"direction": "down"})]
    assert convert(export().gauge("m", *points), text)[0] == {0: {"up": 1.0, "both": 3.0}}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("equals: sda", 1.0),
        ("one_of: [sda, sdb]", 3.0),
        ("matches: sd.", 3.0),
        ("matches: sd", None),
        ("exists: true", 7.0),
    ],
)
def test_predicates_choose_series_and_an_absent_attribute_is_no_match(
    convert, export, condition, expected
):
    points = [
        (0, 1.0, {"device": "sda"}),
        (0, 2.0, {"device": "sdb"}),
        (0, 4.0, {"device": "nvme0"}),
        (0, 8.0),
    ]
    text = columns(c=f"{{terms: [{{metric: m, where: [{{attribute: device, {condition}}}]}}]}}")
    expected_rows = {} if expected is None else {0: {"c": expected}}
    assert convert(export().gauge("m", *points), text) == (expected_rows, {})


def test_resources_that_do_not_match_are_for_others(config, export):
    text = "resources: [{attribute: env, equals: edge}]\n" + columns(c="{terms: [{metric: m}]}")
    batch = export(env="edge").gauge("m", (0, 1.0))
    batch.resource("b", env="cloud").gauge("m", (0, 1.0)).resource("c").gauge("m", (0, 1.0))
    converted = Converter(config(text)).convert(batch.request)
    assert list(converted.rows) == ["a"]
    assert converted.unmatched_resources == 2
    assert not converted.rejected


def test_the_node_may_be_named_by_another_attribute(config, export):
    text = "node_attribute: service.instance.id\n" + columns(c="{terms: [{metric: m}]}")
    batch = export(None, **{"service.instance.id": "n1"}).gauge("m", (0, 1.0))
    assert list(Converter(config(text)).convert(batch.request).rows) == ["n1"]


@pytest.mark.parametrize("attributes", [{}, {"host.name": ""}, {"host.name": 7}])
def test_points_of_no_node_are_rejected(convert, export, attributes):
    batch = export(None, **attributes).gauge(POWER, (0, 1), (3, 1)).gauge("other", (0, 1))
    assert convert(batch) == ({}, {"no_node": 2})


# Checklist, Data: time_unix_nano = 0 is rejected.
@pytest.mark.parametrize(
    ("time_ns", "reason"), [(0, "invalid_time"), (2**63, "invalid_time"), (2**63 - 1, None)]
)
def test_a_time_that_no_row_can_have_is_rejected(convert, export, time_ns, reason):
    batch = export().gauge(POWER, (0, 1))
    point = batch.request.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points[0]
    point.time_unix_nano = time_ns
    assert convert(batch)[1] == ({reason: 1} if reason else {})


def test_a_point_in_the_first_interval_of_time_has_a_row(convert, export):
    batch = export().gauge(POWER, (0, 1_000_000))
    point = batch.request.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points[0]
    point.time_unix_nano = 5
    rows, rejected = convert(batch)
    assert (list(rows.values()), rejected) == ([{"power_consumption": 1.0}], {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_rejected(convert, export, value):
    assert convert(export().gauge(POWER, (0, value))) == ({}, {"non_finite": 1})


def test_a_result_too_large_for_a_number_costs_nothing_but_itself(convert, export):
    text = columns(
        c="{terms: [{metric: m}], multiply_by: 100}", d="{terms: [{metric: n, combine: sum}]}"
    )
    huge = [(0, 1.7e308, {"s": 1}), (0, 1.7e308, {"s": 2}), (3, 1.0)]
    batch = export().gauge("m", (0, 1e307), (3, 1.0)).gauge("n", *huge)
    assert convert(batch, text) == ({3: {"c": 100.0, "d": 1.0}}, {"non_finite": 3})


# Checklist, Data: a point with no value is invalid, unless bit 0 of flags is set.
def test_a_value_of_neither_kind_is_rejected(convert, export):
    assert convert(export().gauge(POWER, (0, None))) == ({}, {"no_value": 1})


# Checklist, Data: sums: cumulative and delta.
@pytest.mark.parametrize("temporality", [DELTA, CUMULATIVE])
def test_sums_of_a_known_temporality_are_taken(convert, export, temporality):
    batch = export().sum(POWER, temporality, (0, 1_000_000))
    assert convert(batch) == ({0: {"power_consumption": 1.0}}, {})


# Checklist, Data: UNSPECIFIED temporality is invalid.
@pytest.mark.parametrize("temporality", [UNSPECIFIED, 3])
def test_sums_of_unspecified_temporality_are_rejected(convert, export, temporality):
    batch = export().sum(POWER, temporality, (0, 1), (3, 1), (6, 0, {}, {"flags": 1}))
    assert convert(batch) == ({}, {"unspecified_temporality": 2})


def test_cpu_usage_from_seconds_that_the_cores_were_idle(convert, export):
    points = [
        (seconds, seconds * idle, {"cpu": f"cpu{core}", "state": "idle"})
        for core, idle in enumerate([0.5, 0.75])
        for seconds in (0, 3, 6)
    ]
    batch = export().sum("system.cpu.time", CUMULATIVE, *points, monotonic=True)
    assert convert(batch) == ({3: {"cpu_usage": 37.5}, 6: {"cpu_usage": 37.5}}, {})


RATE = "columns:\n  c: {sources: [{terms: [{metric: m, rate: true}]}]}\n"


def test_what_is_remembered_of_a_counter_is_of_one_size_and_tells_it_from_others(config, export):
    rates = Rates()
    converter = Converter(config(RATE), rates)
    long = "x" * 100_000
    for attributes in ({}, {long: ""}, {long: long}, {long: 1}, {long: True}, {long: "1"}):
        for resource in (attributes, {}):
            batch = export(**resource).sum("m", CUMULATIVE, (0, 1, attributes))
            converter.convert(batch.request)
    keys = [key for key, _ in rates._series]
    assert {len(key) for key in keys} == {16}
    assert len(keys) == 11


def test_a_rate_of_a_gauge_is_no_rate(convert, export):
    assert convert(export().gauge("m", (0, 1), (3, 2)), RATE) == ({}, {"unsupported_type": 2})


def test_a_point_that_only_begins_a_series_is_neither_stored_nor_rejected(config, export):
    converted = Converter(config(RATE)).convert(export().sum("m", CUMULATIVE, (0, 1)).request)
    assert (converted.rows, converted.rejected, converted.without_rate) == ({}, {}, 1)


def test_a_gap_of_a_counter_is_no_point(convert, export):
    batch = export().sum("m", CUMULATIVE, (0, 6), (3, 0, {}, {"flags": 1}), (6, 12))
    assert convert(batch, RATE) == ({6: {"c": 1.0}}, {})


def test_a_rate_and_the_number_itself_count_a_point_once(convert, export):
    text = columns(c="{terms: [{metric: m, rate: true}]}", d="{terms: [{metric: m}]}")
    converter = Converter(default_config())
    assert not converter.convert(export().request).rows
    batch = export().sum("m", CUMULATIVE, (0, 6), (3, 12))
    assert convert(batch, text) == ({0: {"d": 6.0}, 3: {"c": 2.0, "d": 12.0}}, {})


def test_histograms_and_summaries_fill_the_columns_that_ask_for_them(convert, export):
    text = columns(
        requests="{terms: [{metric: h, take: count, rate: true}]}",
        mean="{terms: [{metric: h, take: mean}]}",
        p50="{terms: [{metric: h, take: quantile, quantile: 0.5}]}",
        total="{terms: [{metric: s, take: sum}]}",
    )
    histogram, summary = Metric(name="h"), Metric(name="s")
    histogram.histogram.aggregation_temporality = DELTA
    histogram.histogram.data_points.add(
        time_unix_nano=START + 3 * SECOND,
        start_time_unix_nano=START,
        count=6,
        sum=12,
        bucket_counts=[6, 0],
        explicit_bounds=[4.0],
    )
    summary.summary.data_points.add(time_unix_nano=START + 3 * SECOND, count=1, sum=7.5)
    assert convert(export().metric(histogram).metric(summary), text) == (
        {3: {"requests": 2.0, "mean": 2.0, "p50": 2.0, "total": 7.5}},
        {},
    )


@pytest.mark.parametrize("kind", ["histogram", "exponential_histogram", "summary"])
def test_kinds_that_no_column_can_hold_are_counted_if_a_column_names_them(convert, export, kind):
    ours, other = Metric(name=POWER), Metric(name="other")
    for metric in (ours, other):
        getattr(metric, kind).data_points.add(time_unix_nano=START, count=1)
    batch = export().metric(ours).metric(other).gauge(TOTAL, (0, 2)).gauge(AVAILABLE, (0, 2))
    assert convert(batch) == ({0: {"memory_usage": 0.0}}, {"unsupported_type": 1})


def test_a_metric_without_data_is_nothing(convert, export):
    assert convert(export().metric(Metric(name=POWER))) == ({}, {})


def test_metrics_and_series_that_no_column_names_are_not_ours(convert, export):
    batch = export().gauge("scaph_self_mem", (0, float("nan")), (3, None))
    batch.gauge(CPU, (0, float("nan"), {"state": "user"}))
    assert convert(batch) == ({}, {})


finite = st.floats(-1e12, 1e12)


@given(st.dictionaries(st.integers(0, 400), finite, min_size=1), st.randoms())
def test_points_in_any_order_are_rows_in_order_of_time(values, random):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    order = list(values.items())
    random.shuffle(order)
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="host.name").value.string_value = "a"
    metric = resource.scope_metrics.add().metrics.add(name="hw.host.power")
    for step, value in order:
        metric.gauge.data_points.add(time_unix_nano=START + 3 * step * SECOND, as_double=value)
    rows = Converter(default_config()).convert(request).rows["a"]
    assert [(t - START) / SECOND / 3 for t in rows.times_ns_t.tolist()] == sorted(values)
    assert rows.values_tf[:, 0].tolist() == [values[step] for step in sorted(values)]
    assert rows.points_t.tolist() == [1] * len(values)
