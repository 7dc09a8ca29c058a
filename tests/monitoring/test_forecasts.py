"""A forecaster over a recorded ramp of memory, which a Prometheus watches as forecasts.yml says.

Rows of an hour come within seconds: the forecaster goes by their times, not by the clock.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import Window, connect
from icos_fl_timeseries_store.testing import store_processes
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/monitoring"
TRACE = ROOT / "deploy/local/src/icos_fl_local/traces/bsc-power-modelling/opteron-6140.csv"
CAPACITY_MIB = 12_288
INSTALLED_MIB = 32_768
"""What the recorded server has."""


@dataclass
class Recording:
    """Two sessions of a server; in the second one it fills more and more of its memory."""

    times_ns_t: np.ndarray
    values_tf: np.ndarray
    """Percent of CPU and MiB of memory in use."""

    @property
    def full(self) -> int:
        """The row at which as much memory is in use as the node is said to have."""
        return int(np.argmax(self.values_tf[:, 1] >= CAPACITY_MIB))

    def append(self, window: Window, first: int, last: int) -> None:
        """Rows from *first* up to *last*."""
        rows = slice(first, last)
        columns, units = ["cpu_usage", "memory_usage"], {"cpu_usage": "%", "memory_usage": "MiB"}
        window.append(columns, self.times_ns_t[rows], self.values_tf[rows], units)


@dataclass
class Forecaster:
    port: int
    """Of the metrics."""
    window: Window


@pytest.fixture(scope="module")
def recording() -> Recording:
    table = np.genfromtxt(TRACE, delimiter=",", names=True)
    used_t = INSTALLED_MIB - table["memory_available_mib"]
    values_tf = np.column_stack([table["cpu_percent"], used_t])
    return Recording((table["time_unix_s"] * 1e9).astype(np.int64), values_tf)


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forecaster]:
    folder = tmp_path_factory.mktemp("forecaster")
    port = free_port()
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(store_processes(folder / "store")).settings
        store = stack.enter_context(connect(settings))
        window = store.create_window("edge-1", 20_000)
        environment = {
            "ICOS_FL_FORECASTER_STORE__PORT": str(settings.port),
            "ICOS_FL_FORECASTER_LISTEN_ADDRESS": "127.0.0.1:0",
            "ICOS_FL_FORECASTER_METRICS_ADDRESS": f"127.0.0.1:{port}",
            "ICOS_FL_FORECASTER_RECORDED": "true",
        }
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen(
                [sys.executable, "-m", "icos_fl_client.serving"],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
        stack.callback(running.wait, 30)
        stack.callback(running.terminate)
        yield Forecaster(port, window)


@pytest.fixture(scope="module")
def prometheus(forecaster: Forecaster, start_prometheus: Any, tmp_path_factory: Any) -> Any:
    """With the shipped rules, quicker as the rows are, and the line that the docs have."""
    rules = YAML(typ="safe").load(FOLDER / "forecasts.yml")
    (group,) = rules["groups"]
    for rule in group["rules"]:
        if "for" in rule:
            rule["for"] = "1s"
    text = (ROOT / "docs/forecasts.md").read_text()
    (line,) = re.findall(r"^- (\{ record: .* \})$", text, flags=re.MULTILINE)
    group["rules"].insert(0, YAML(typ="safe").load(line.replace("32768", str(CAPACITY_MIB))))
    file = tmp_path_factory.mktemp("rules") / "forecasts.yml"
    YAML().dump(rules, file)
    targets = [{"targets": [f"127.0.0.1:{forecaster.port}"]}]
    return start_prometheus(
        {
            "rule_files": [str(file)],
            "scrape_configs": [{"job_name": "icos-fl", "static_configs": targets}],
        }
    )


@pytest.fixture(scope="module")
def warned_at(forecaster: Forecaster, prometheus: Any, recording: Recording) -> int:
    """The row after which the alert is firing: all at once until 12 minutes before memory is full,
    and from there by the minute."""
    firing = 'ALERTS{alertname="IcosFlMemoryFullSoon", alertstate="firing"}'
    times_s_t = recording.times_ns_t / 1e9
    full_s = times_s_t[recording.full]
    begin = 0
    for until_s in np.arange(full_s - 720, full_s, 60):
        end = int(np.searchsorted(times_s_t, until_s))
        recording.append(forecaster.window, begin, end)
        # So it has seen what the forecaster makes of these rows.
        prometheus.wait_for(f"icos_fl_forecast_time_seconds > {times_s_t[end - 1] - 16}")
        if prometheus.query(firing):
            assert begin > 0, "it was raised all the time"
            return end
        begin = end
    pytest.fail("memory is full, and nobody was warned")


def test_who_runs_out_of_memory_is_warned_minutes_before(recording: Recording, warned_at: int):
    ahead_s = (recording.times_ns_t[recording.full] - recording.times_ns_t[warned_at - 1]) / 1e9
    assert recording.values_tf[:warned_at, 1].max() < 0.95 * CAPACITY_MIB
    assert ahead_s >= 120


def test_the_autoscaler_is_given_the_largest_cpu_that_may_come(prometheus: Any, warned_at: int):
    document = YAML(typ="safe").load(FOLDER / "keda.yaml")
    (trigger,) = document["spec"]["triggers"]
    (answer,) = prometheus.wait_for(trigger["metadata"]["query"])
    (now,) = prometheus.query('icos_fl_forecast_value{metric="cpu_usage"}')
    assert float(now["value"][1]) <= float(answer["value"][1]) <= 100


def test_rules_and_panels_name_what_a_forecaster_tells(
    forecaster: Forecaster,
    metrics_of: Callable[[int], str],
    series_in: Callable[[str], set[str]],
    expressions: list[str],
    warned_at: int,
):
    asked = (FOLDER / "forecasts.yml").read_text() + " ".join(expressions)
    named = set(re.findall(r"\bicos_fl_forecast_[a-z0-9_]+", asked))
    assert named - series_in(metrics_of(forecaster.port)) == set()
    assert len(named) >= 8


def test_every_expression_about_forecasts_can_be_asked(prometheus: Any, expressions: list[str]):
    for expression in expressions:
        if "icos_fl_forecast" in expression:
            prometheus.query(expression)


def test_every_metric_of_a_forecaster_is_in_the_readme(
    forecaster: Forecaster,
    metrics_of: Callable[[int], str],
    series_in: Callable[[str], set[str]],
    warned_at: int,
):
    readme = (FOLDER / "README.md").read_text()
    told = {name for name in series_in(metrics_of(forecaster.port)) if "forecast" in name}
    assert {name for name in told if f"`{name}`" not in readme} == set()
