"""Forecasts and backtests are JSON as docs/architecture.md tells it, in the metric's unit."""

import json
import math
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from icos_fl_client.judge import Judge
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.settings import RunConfig, parse
from icos_fl_client.units import limits_of
from icos_fl_timeseries_store import MemoryStore, ModelVersion

INTERVALS = ["lower_80", "upper_80", "lower_95", "upper_95"]
SERIES = ["yhat", *INTERVALS]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def judge(store, address) -> Iterator[Judge]:
    with ProcessorClient(address, wait_for_ready=False) as processor:  # as the commands do it
        yield Judge(store, processor)


@pytest.fixture
def keep(store, small_run) -> Callable[..., None]:
    """Keeps a model for a node, as a round does."""

    def put(node="a", metric="cpu_usage", metadata=None, **changes) -> None:
        run = parse(RunConfig, small_run | {"metric": metric} | changes, "run config")
        version = ModelVersion(
            round=5,
            weights=weights_of(build_model(run, metric)),
            config=run.model_config_of(metric),
            metadata=metadata or {},
        )
        store.model_state(node, metric).put(version)

    return put


def one(answer: dict, kind: str) -> dict:
    json.dumps(answer, allow_nan=False)
    assert answer["unavailable"] == []
    (item,) = answer[kind]
    return item


def reason(answer: dict) -> str:
    json.dumps(answer, allow_nan=False)
    (item,) = answer["unavailable"]
    assert set(item) == {"node", "metric", "reason"}
    return item["reason"]


def test_a_forecast_has_the_fields_that_are_documented(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    keep()

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    assert set(item) == {
        "node",
        "metric",
        "unit",
        "round",
        "model_age_seconds",
        "interval_seconds",
        "last_time_unix_s",
        "last_value",
        "time_unix_s",
        *SERIES,
    }
    assert (item["node"], item["metric"], item["unit"]) == ("a", "cpu_usage", "%")
    assert (item["round"], item["interval_seconds"]) == (5, 15.0)
    assert {len(item[name]) for name in ("time_unix_s", *SERIES)} == {2}


def test_a_forecast_follows_the_last_row(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    keep()

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    last = windows.series["a", "cpu_usage"].last_time_ns() / 1e9
    assert item["last_time_unix_s"] == last
    assert item["time_unix_s"] == [last + 15, last + 30]


def test_a_forecast_is_in_the_metrics_unit(judge, keep, windows, own_model):
    windows.put("a", "power", [np.linspace(100, 160, 40)], [np.linspace(160, 200, 20)], "W", 150, 8)
    keep(metric="power", model=f"{own_model}:repeat")

    item = one(judge.forecast(["a"], ["power"]), "forecasts")

    assert item["unit"] == "W"
    assert item["last_value"] == pytest.approx(200, abs=1e-3)
    assert item["yhat"] == pytest.approx([200, 200], abs=1e-3)


def test_intervals_lie_in_each_other(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(60)], [wave(40)])
    keep()

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    bounds = np.array([item[n] for n in ("lower_95", "lower_80", "upper_80", "upper_95")])
    assert (np.diff(bounds, axis=0) >= 0).all()


@pytest.mark.parametrize(("model", "last", "expected"), [("rise", 98, 100), ("fall", 3, 0)])
def test_no_share_leaves_what_a_share_can_be(
    judge, keep, windows, own_model, model, last, expected
):
    windows.put("a", "cpu_usage", [np.linspace(50, last, 40)], [np.full(20, float(last))])
    keep(model=f"{own_model}:{model}")

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    assert item["yhat"] == [expected, expected]
    assert all(0 <= value <= 100 for name in INTERVALS for value in item[name])


@pytest.mark.parametrize(
    ("unit", "limits"),
    [
        ("W", (0.0, math.inf)),
        ("%", (0.0, 100.0)),
        ("kBy/s", (0.0, math.inf)),
        ("{requests}", (0.0, math.inf)),
        ("Cel", (-math.inf, math.inf)),
    ],
)
def test_a_unit_says_what_a_value_can_be(unit, limits):
    assert limits_of(unit) == limits


def test_a_column_of_unknown_unit_has_no_limits(judge, keep, windows, own_model):
    windows.put("a", "load", [np.full(20, 3.0)], [np.full(20, 3.0)], unit="")
    keep(metric="load", model=f"{own_model}:fall")

    item = one(judge.forecast(["a"], ["load"]), "forecasts")

    assert item["yhat"] == pytest.approx([-7, -7], abs=1e-4)


def test_too_few_finished_forecasts_give_no_interval_and_no_nan(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(10)], [])
    keep()

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    assert {value for name in INTERVALS for value in item[name]} == {None}
    assert all(isinstance(value, float) for value in item["yhat"])


def test_the_age_of_a_model_counts_from_when_it_was_kept(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [])
    keep(metadata={"created-unix-s": time.time() - 100})

    item = one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")

    assert 100 <= item["model_age_seconds"] < 130


def test_the_age_of_a_model_that_has_no_date_is_null(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [])
    keep()

    assert one(judge.forecast(["a"], ["cpu_usage"]), "forecasts")["model_age_seconds"] is None


def test_a_backtest_has_the_fields_that_are_documented(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20), wave(9)])
    keep()

    item = one(judge.backtest(["a"], ["cpu_usage"]), "results")

    assert set(item) == {
        "node",
        "metric",
        "unit",
        "round",
        "interval_seconds",
        "validation_start_unix_s",
        "lookback",
        "horizon",
        "origins",
        "mae",
        "mae_by_step",
        "best",
        "coverage",
        "values",
        "plot",
    }
    assert set(item["mae"]) == {"federated", "last_value", "window_mean"}
    assert set(item["coverage"]) == {"80", "95"}
    assert set(item["plot"]) == {"window_time_unix_s", "window", "time_unix_s", "actual", *SERIES}
    assert (item["lookback"], item["horizon"], item["round"]) == (4, 2, 5)
    assert (item["origins"], item["values"]) == (15 + 4, 2 * (15 + 4))


def test_errors_of_a_backtest_are_in_the_metrics_unit(judge, keep, windows, own_model):
    # A ramp by 3 W a step: the last value is off by 3 and 6, the mean of 4 values by 7.5 and 10.5.
    windows.put("a", "power", [3 * np.arange(30.0)], [100 + 3 * np.arange(30.0)], "W", 40, 8)
    keep(metric="power", model=f"{own_model}:rise")

    item = one(judge.backtest(["a"], ["power"]), "results")

    # The model goes 8 W above the last value, so it is off by 5 and 2.
    expected = {"federated": 3.5, "last_value": 4.5, "window_mean": 9.0}
    assert item["mae"] == pytest.approx(expected, rel=1e-4)
    expected = {"federated": [5, 2], "last_value": [3, 6], "window_mean": [7.5, 10.5]}
    for name, mae_h in expected.items():
        assert item["mae_by_step"][name] == pytest.approx(mae_h, rel=1e-4)
    assert (item["unit"], item["best"]) == ("W", "federated")
    start_s = windows.series["a", "power"].last_time_ns() / 1e9 - 29 * item["interval_seconds"]
    assert item["validation_start_unix_s"] == start_s


def test_the_best_is_not_always_ours(judge, keep, windows, own_model):
    windows.put("a", "power", [np.arange(30.0)], [np.full(30, 50.0)], "W")
    keep(metric="power", model=f"{own_model}:rise")

    assert one(judge.backtest(["a"], ["power"]), "results")["best"] == "last_value"


def test_the_plot_shows_the_newest_origin_in_units(judge, keep, windows, own_model):
    windows.put("a", "power", [np.arange(30.0)], [np.arange(40.0, 60.0)], "W", 30, 10)
    keep(metric="power", model=f"{own_model}:repeat")

    plot = one(judge.backtest(["a"], ["power"]), "results")["plot"]

    last = windows.series["a", "power"].last_time_ns() / 1e9
    assert plot["window"] == pytest.approx([54, 55, 56, 57], abs=1e-3)
    assert plot["actual"] == pytest.approx([58, 59], abs=1e-3)
    assert plot["yhat"] == pytest.approx([57, 57], abs=1e-3)
    assert plot["time_unix_s"] == [last - 15, last]
    assert plot["window_time_unix_s"] == [last - 75, last - 60, last - 45, last - 30]


def test_a_backtest_of_few_rows_has_no_coverage_and_no_nan(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(8)], [wave(8)])
    keep()

    assert one(judge.backtest(["a"], ["cpu_usage"]), "results")["coverage"] == {
        "80": None,
        "95": None,
    }


def test_a_backtest_needs_rows_that_no_node_trained_on(judge, keep, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(5)])
    keep()

    assert reason(judge.backtest(["a"], ["cpu_usage"])) == (
        "a: cpu_usage has no sequence of 6 steps without a gap in the part that no node trained on"
    )


@pytest.mark.parametrize("call", ["forecast", "backtest"])
def test_a_node_without_a_model_is_unavailable_and_the_others_are_not(
    judge, keep, windows, wave, call
):
    for node in ("a", "b"):
        windows.put(node, "cpu_usage", [wave(40)], [wave(20)])
    keep("b")

    answer = getattr(judge, call)(["a", "b"], ["cpu_usage"])

    assert answer.pop("unavailable") == [
        {"node": "a", "metric": "cpu_usage", "reason": "a keeps no model of cpu_usage"}
    ]
    ((item,),) = answer.values()
    assert item["node"] == "b"


@pytest.mark.parametrize("call", ["forecast", "backtest"])
def test_forecasts_that_are_no_numbers_are_not_judged(judge, keep, windows, wave, own_model, call):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    keep(model=f"{own_model}:nan")

    assert reason(getattr(judge, call)(["a"], ["cpu_usage"])) == (
        "a: the model of cpu_usage from round 5 forecasts values that are not finite"
    )


@pytest.mark.parametrize("call", ["forecast", "backtest"])
def test_a_column_that_is_gone_is_the_reason(judge, keep, windows, wave, call):
    windows.put("a", "power", [wave(40)], [wave(20)])
    keep()

    told = reason(getattr(judge, call)(["a"], ["cpu_usage"]))
    assert told == "node 'a' has no column 'cpu_usage'; it has: power"


def test_a_processor_that_is_away_is_the_reason(judge, keep, windows, address):
    windows.failure = (grpc.StatusCode.UNAVAILABLE, "the store does not answer")
    keep()

    assert reason(judge.forecast(["a"], ["cpu_usage"])) == (
        f"the processor at {address}: UNAVAILABLE: the store does not answer"
    )


def test_a_model_that_is_no_longer_there_is_the_reason(judge, keep, store, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    keep()
    kept = store.model_state("a", "cpu_usage").get()
    config = dict(kept.config) | {"model": "gone:build"}
    store.model_state("a", "cpu_usage").put(ModelVersion(5, kept.weights, config))

    assert reason(judge.forecast(["a"], ["cpu_usage"])).startswith("model 'gone:build': cannot")


def test_weights_that_fit_no_model_are_the_reason(judge, keep, store, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    keep()
    kept = store.model_state("a", "cpu_usage").get()
    config = dict(kept.config) | {"hidden-layer-size": 9}
    store.model_state("a", "cpu_usage").put(ModelVersion(5, kept.weights, config))

    assert "has shape (16, 1), the model's has (36, 1)" in reason(
        judge.forecast(["a"], ["cpu_usage"])
    )
