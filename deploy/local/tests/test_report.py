"""The report: what it says of a result, and what it refuses to leave out."""

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icos_fl_local import plots, report
from matplotlib import image
from rich.console import Console

START_S = 1_423_849_200.0
STEP_S = 15.0


def backtest_entry(
    node: str, metric: str, unit: str, level: float, mae: tuple[float, float, float]
) -> dict[str, Any]:
    """A backtest's result as `icos-fl-client` prints it: 60 steps of window, 20 of forecast."""
    random = np.random.default_rng(len(node) * 100 + len(metric))
    walk = level + np.cumsum(random.normal(0, level * 0.02, 80))
    ahead = np.arange(1, 21)
    names = ("federated", "last_value", "window_mean")
    yhat = walk[59] + (walk[:60].mean() - walk[59]) * (1 - np.exp(-ahead / 15))
    spread = level * 0.02 * np.sqrt(ahead)
    times = START_S + STEP_S * np.arange(80)
    return {
        "node": node,
        "metric": metric,
        "unit": unit,
        "round": 5,
        "interval_seconds": STEP_S,
        "lookback": 60,
        "horizon": 20,
        "origins": 40,
        "values": 800,
        "mae": dict(zip(names, mae, strict=True)),
        "mae_by_step": {name: [error] * 20 for name, error in zip(names, mae, strict=True)},
        "best": names[int(np.argmin(mae))],
        "coverage": {"80": 0.75, "95": 0.94},
        "plot": {
            "window_time_unix_s": times[:60].tolist(),
            "window": walk[:60].tolist(),
            "time_unix_s": times[60:].tolist(),
            "yhat": yhat.tolist(),
            "lower_80": (yhat - 1.28 * spread).tolist(),
            "upper_80": (yhat + 1.28 * spread).tolist(),
            "lower_95": (yhat - 1.96 * spread).tolist(),
            "upper_95": (yhat + 1.96 * spread).tolist(),
            "actual": walk[60:].tolist(),
        },
    }


def forecast_entry(node: str, metric: str, unit: str) -> dict[str, Any]:
    steps = np.arange(1, 21)
    return {
        "node": node,
        "metric": metric,
        "unit": unit,
        "round": 5,
        "model_age_seconds": 3.0,
        "interval_seconds": STEP_S,
        "last_time_unix_s": START_S,
        "last_value": 188.4,
        "time_unix_s": (START_S + STEP_S * steps).tolist(),
        "yhat": (190.0 + steps).tolist(),
        "lower_80": (180.0 + steps).tolist(),
        "upper_80": (200.0 + steps).tolist(),
        "lower_95": (170.0 + steps).tolist(),
        "upper_95": (210.0 + steps).tolist(),
    }


def said_entry(
    node: str, metric: str, unit: str, mae: float, last_value_mae: float, coverage: float
) -> dict[str, Any]:
    """What a node says, as `backtest.combined` gives it: 20 steps ahead."""
    return {
        "node": node,
        "metric": metric,
        "unit": unit,
        "interval_seconds": STEP_S,
        "step": 20,
        "origins": 40,
        "mae": mae,
        "last_value_mae": last_value_mae,
        "ratio": mae / last_value_mae if last_value_mae else None,
        "coverage": {"80": coverage, "95": 0.95},
        "last_time_unix_s": START_S,
        "time_unix_s": START_S + 20 * STEP_S,
        "last_value": 188.4,
        "yhat": 210.0,
        "lower_80": 200.0,
        "upper_80": 220.0,
        "lower_95": 190.0,
        "upper_95": 230.0,
        "plot": {
            "unit": unit,
            "panels": {
                "5m": {
                    "time_unix_s": [START_S + 20 * STEP_S, START_S + 21 * STEP_S],
                    "yhat": [188.0, 190.0],
                    "lower_80": [180.0, 182.0],
                    "upper_80": [200.0, 202.0],
                    "lower_95": [170.0, 172.0],
                    "upper_95": [210.0, None],
                }
            },
            "window_time_unix_s": [START_S, START_S + STEP_S],
            "window": [188.0, 188.4],
        },
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """Two nodes, two metrics, no memory on node-b. Each of the three is the best once."""
    metrics = ["power_consumption", "memory_usage"]
    no_memory = {"node": "node-b", "metric": "memory_usage", "reason": "no such column"}
    calm = backtest_entry("node-b", "power_consumption", "W", 45.0, (1.0, 2.0, 3.0))
    return {
        "nodes": ["node-a", "node-b"],
        "metrics": metrics,
        "backtest": {
            "results": [
                backtest_entry("node-a", "power_consumption", "W", 190.0, (3.0, 4.0, 5.0)),
                backtest_entry("node-a", "memory_usage", "MiB", 24_000.0, (1234.5, 1000.0, 1500.0)),
                {**calm, "coverage": {"80": 0.9, "95": 0.97}, "values": 2400},
            ],
            "unavailable": [dict(no_memory)],
        },
        "forecast": {
            "forecasts": [forecast_entry("node-a", "power_consumption", "W")],
            "unavailable": [dict(no_memory)],
        },
        "combination": {
            "results": [
                said_entry("node-a", "power_consumption", "W", 2.0, 4.0, 0.75),
                said_entry("node-a", "memory_usage", "MiB", 1234.5, 1000.0, 0.75),
                {**said_entry("node-b", "power_consumption", "W", 4.0, 2.0, 0.9), "origins": 120},
            ],
            "notes": ["a word about it"],
        },
        "history": {
            "protocol": 1,
            "run": "1",
            "state": "finished",
            "reason": "",
            "metrics": metrics,
            "rounds_total": 2,
            "nodes": {"node-a": {"metrics": {"power_consumption": 1200}, "cause": ""}},
            "rounds": [round_entry(number, metrics) for number in (1, 2)],
        },
        "stages": [{"name": "start", "seconds": 12.25}, {"name": "train", "seconds": 60.0}],
        "source": {"kind": "replay", "traces": ["a.csv", "b.csv"]},
    }


def round_entry(number: int, metrics: list[str]) -> dict[str, Any]:
    loss = {"train_loss": 1.0 / number, "eval_loss": 1.1 / number}
    return {
        "round": number,
        "state": "finished",
        "reason": "",
        "started_unix_s": START_S,
        "seconds": 9.5,
        "metrics": {
            metric: {**loss, "mae": 3.0, "naive_mae": 3.1, "num_examples": 900, "nodes": 2}
            for metric in metrics
        },
        "nodes": {node: {"state": "ok", "cause": ""} for node in ("node-a", "node-b")},
    }


class _Links(HTMLParser):
    """Every address that a page would load or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]


def page_of(folder: Path, result: dict[str, Any]) -> str:
    return report.write(folder, result)[0].read_text()


def test_summary_tells_of_both_and_pools_coverage(result):
    # Ratios 0.50, 1.23 and 2.00, and 0.75, 1.23 and 0.50; (0.75 · 80 + 0.9 · 120) / 200 = 0.84.
    assert report.summary(result) == (
        "The combination, which is what a node says, is better than the last value in 1 of 3 pairs "
        "of node and metric: 1.23 of its error in the median, 2.00 at worst. The federated model "
        "alone is better than the last value in 2 of 3 pairs of node and metric: 0.75 of its error "
        "in the median, 1.23 at worst. The combination's 80 % interval held 84 % of what then came."
    )


def test_summary_says_so_when_there_is_no_error(result):
    result["backtest"]["results"] = result["combination"]["results"] = []
    assert "No error could be computed" in report.summary(result)


def test_a_row_has_errors_ratio_coverage_and_the_next_five_minutes(result):
    assert report.rows(result)[0] == report.Row(
        node="node-a",
        metric="power_consumption",
        unit="W",
        last="4.00",
        combination="2.00",
        ratio="0.50",
        federated="0.75",
        best="combination",
        coverage="75 %",
        ahead="188 → 210 (200 to 220)",
        ahead_seconds=300.0,
    )


def test_rows_are_those_nodes_and_metrics_of_which_something_is_known(result):
    assert [(row.node, row.metric) for row in report.rows(result)] == [
        ("node-a", "power_consumption"),
        ("node-a", "memory_usage"),
        ("node-b", "power_consumption"),
    ]


def test_how_far_ahead_is_named(result):
    for entry in result["combination"]["results"]:
        entry["step"] = 2
    assert {row.ahead_seconds for row in report.rows(result)} == {30.0}
    assert "Mean errors 30 s ahead" in report.text(result)


def test_a_constant_metric_has_no_ratio_and_no_star(result):
    result["combination"]["results"][0] |= {"mae": 0.0, "last_value_mae": 0.0, "ratio": None}
    result["backtest"]["results"][0]["mae_by_step"] = dict.fromkeys(
        ("federated", "last_value", "window_mean"), [0.0] * 20
    )
    row = report.rows(result)[0]
    assert (row.ratio, row.federated, row.best) == ("", "", "")


@pytest.mark.parametrize(
    ("mae", "best"),
    [(3.98, "combination"), (3.982, ""), (4.0, ""), (4.018, ""), (4.2, "last_value")],
)
def test_what_is_better_by_rounding_alone_has_no_star(result, mae, best):
    result["backtest"]["results"][0]["mae_by_step"]["federated"] = [5.0] * 20
    result["combination"]["results"][0] |= {"mae": mae, "ratio": mae / 4.0}
    assert report.rows(result)[0].best == best


def test_a_model_that_does_not_reach_as_far_has_no_error_there(result):
    by_step = dict.fromkeys(("federated", "last_value"), [1.0] * 5)
    result["backtest"]["results"][0] |= {"horizon": 5, "mae_by_step": by_step}
    row = report.rows(result)[0]
    assert (row.last, row.ratio, row.federated, row.best) == ("4.00", "0.50", "", "combination")
    told = "node-a, power_consumption: the federated model forecasts 1.25 min ahead, not 5 min"
    assert told in report.notes(result)


def test_a_model_on_another_grid_is_judged_as_far_ahead(result):
    by_step = {"federated": [1.0, 2.0, 3.0], "last_value": [2.0, 2.0, 2.0]}
    other = {"interval_seconds": 150.0, "horizon": 3, "mae_by_step": by_step}
    result["backtest"]["results"][0] |= other
    assert report.rows(result)[0].federated == "1.00"
    result["backtest"]["results"][0]["interval_seconds"] = 200.0
    assert report.rows(result)[0].federated == ""


def test_without_a_combination_the_federated_model_is_told_alone(result):
    result["combination"] = {"results": [], "notes": []}
    row = report.rows(result)[0]
    assert (row.last, row.combination, row.ratio) == ("4.00", "", "")
    assert (row.federated, row.best, row.ahead) == ("0.75", "federated", "")


def test_text_marks_the_best_of_the_three_alone(result):
    shown = report.text(result)
    assert re.findall(r"[\d,.]+ \*", shown) == ["0.50 *", "1,000 *", "0.50 *"]


def test_text_lists_what_is_unavailable_once_with_its_reason(result):
    expected = "node-b, memory_usage: no backtest and no forecast: no such column"
    assert report.text(result).count(expected) == 1


def test_text_has_what_must_be_known_of_the_combination(result):
    assert "\na word about it" in report.text(result)


def test_table_fits_a_terminal_without_losing_a_number(result):
    console = Console(file=io.StringIO(), width=100)
    console.print(report.table(result))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("4.00", "2.00", "0.50", "0.75", "1,234"))
    assert max(map(len, shown.splitlines())) <= 100


def test_node_names_are_not_read_as_markup(result):
    result["nodes"] = ["[red]x[/]"]
    for entry in (*result["backtest"]["results"], *result["combination"]["results"]):
        entry["node"] = "[red]x[/]"
    assert "[red]x[/]" in report.text(result)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(24_879.4, "24,879"), (312.46, "312"), (14.26, "14.3"), (3.14159, "3.14"), (0.0123, "0.0123"),
     (0.0, "0.00"), (-14.26, "-14.3"), (None, ""), (float("nan"), "")],
)  # fmt: skip
def test_numbers_show_the_digits_that_mean_something(value, expected):
    assert report.number(value) == expected


def test_write_gives_the_page_first_then_json_and_plots(result, tmp_path):
    names = [file.name for file in report.write(tmp_path / "out", result)]
    assert names == [
        "index.html",
        "result.json",
        "forecast-node-a-power_consumption.png",
        "forecast-node-a-memory_usage.png",
        "forecast-node-b-power_consumption.png",
        "loss.png",
    ]
    assert sorted(names) == sorted(file.name for file in (tmp_path / "out").iterdir())


def test_a_plot_is_of_what_the_node_says_or_else_of_the_model_alone(result, tmp_path):
    said, *others = result["combination"]["results"]
    result["combination"]["results"] = [said, {**others[0], "origins": 0}]

    report.write(tmp_path, result)

    name = "forecast-node-a-power_consumption.png"
    assert (
        plots.record("node-a · power_consumption", said["plot"]) == (tmp_path / name).read_bytes()
    )
    alone = result["backtest"]["results"][1]
    name = "forecast-node-a-memory_usage.png"
    assert plots.forecast("node-a · memory_usage", alone) == (tmp_path / name).read_bytes()


def test_json_is_the_result_with_null_for_what_is_no_number(result, tmp_path):
    expected = copy.deepcopy(result)
    result["backtest"]["results"][0]["plot"]["actual"][3] = float("nan")
    expected["backtest"]["results"][0]["plot"]["actual"][3] = None
    written = report.write(tmp_path, result)[1]
    assert json.loads(written.read_text()) == expected


def test_page_loads_nothing_from_anywhere(result, tmp_path):
    page = page_of(tmp_path, result)
    assert [link[:22] for link in _Links(page).found] == ["data:image/png;base64,"] * 4
    assert re.findall(r"https?://|@import|url\(", page) == []


def test_page_escapes_what_came_from_outside(result, tmp_path):
    result["backtest"]["unavailable"][0]["reason"] = "<script>alert(1)</script>"
    page = page_of(tmp_path, result)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_page_names_the_round_and_node_that_failed(result, tmp_path):
    result["history"]["rounds"][1]["nodes"]["node-b"] = {
        "state": "failed",
        "cause": "out of memory",
    }
    assert "round 2, node-b: failed: out of memory" in page_of(tmp_path, result)


def test_page_marks_the_best_of_each_row(result, tmp_path):
    cells = re.findall(r'<td[^>]* class="best">(.*?)</td>', page_of(tmp_path, result))
    assert cells == ["0.50 ★", "1,000 ★", "0.50 ★"]


def test_a_run_without_any_result_still_gives_a_page(result, tmp_path):
    result |= {"backtest": {}, "forecast": {}, "combination": {}, "history": {}}
    assert "No error could be computed" in page_of(tmp_path, result)


def test_names_that_no_file_can_have_make_files_that_are_apart(result, tmp_path):
    result["combination"] = {}
    for entry, node in zip(result["backtest"]["results"], ["../a", "*/a", "_/a"], strict=True):
        entry |= {"node": f"../{node}", "metric": "m"}
    written = report.write(tmp_path, result)
    assert all(file.parent == tmp_path for file in written)
    assert len(set(written)) == len(written) == 6


def test_a_plot_is_a_png_of_a_readable_size(result):
    png = plots.forecast("node-a", result["backtest"]["results"][0])
    height, width, _ = image.imread(io.BytesIO(png)).shape
    assert (width, height) == (952, 476)


def test_values_that_are_missing_leave_a_plot_whole(result):
    entry = result["backtest"]["results"][0]
    entry["plot"]["actual"] = [None] * 20
    entry["plot"]["window"][5] = None
    assert plots.forecast("node-a", entry).startswith(b"\x89PNG")


def test_many_metrics_get_rows_of_loss_panels():
    metrics = [f"metric_{number}" for number in range(7)]
    png = plots.loss({"rounds": [round_entry(1, metrics)]}, metrics)
    height, width, _ = image.imread(io.BytesIO(png)).shape
    assert (width, height) == (1428, 1428)


def test_there_is_no_loss_plot_without_a_round():
    assert plots.loss({"rounds": []}, ["cpu_usage"]) is None


def test_thinning_keeps_the_peak_and_the_order():
    times = np.arange(100_000.0)
    values = np.zeros(100_000)
    values[54_321] = 7.0
    values[54_322] = -7.0
    thin_times, thin_values = plots.thin(times, values, 1_000)
    assert len(thin_times) <= 1_000
    assert (thin_values.max(), thin_values.min()) == (7.0, -7.0)
    assert (np.diff(thin_times) > 0).all()


def test_a_short_line_is_not_thinned():
    times, values = np.arange(10.0), np.arange(10.0)
    assert plots.thin(times, values)[1] is values


def test_a_forecast_without_an_interval_has_no_empty_brackets(result):
    result["combination"]["results"][0] |= {"lower_80": None, "upper_80": None}

    assert report.rows(result)[0].ahead == "188 → 210"
