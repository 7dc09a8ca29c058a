"""``icos-fl up --keep`` and a Prometheus with the configuration that it has written."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

SMALL = ("-c", "time-step=20", "-c", "horizon=5", "-c", "local-epochs=1", "-c", "batch-size=256")
NAME = re.compile(r"\b(?:icos_fl|process|dataclay)_[a-z0-9_]+")
TOLD = {
    "backend": {
        "icos_fl_store_call_seconds_bucket",
        "icos_fl_store_rows_total",
        "icos_fl_store_errors_total",
    },
    "bridge": {
        "icos_fl_bridge_points_taken_total",
        "icos_fl_bridge_points_rejected_total",
        "icos_fl_bridge_rows_total",
        "icos_fl_bridge_export_seconds_bucket",
        "icos_fl_bridge_store_errors_total",
    },
    "processor": {
        "icos_fl_window_rows",
        "icos_fl_window_capacity_rows",
        "icos_fl_processor_sequences_served_total",
        "icos_fl_processor_store_errors_total",
        "icos_fl_grpc_call_seconds_bucket",
    },
    "forecaster": {
        "icos_fl_forecast_yhat",
        "icos_fl_forecast_yhat_lower",
        "icos_fl_forecast_yhat_upper",
        "icos_fl_forecast_value",
        "icos_fl_forecast_error",
        "icos_fl_forecast_coverage_ratio",
        "icos_fl_forecast_model_round",
    },
    "superlink": {"icos_fl_runtime_task_seconds_bucket"},
    "supernode-pfe1": {
        "icos_fl_runtime_task_seconds_bucket",
        "icos_fl_client_trained_sequences_total",
        "icos_fl_client_train_loss",
    },
}
"""What the services of ours must tell of their own work."""


@dataclass
class Kept:
    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / ".icos-fl"

    @property
    def ports(self) -> dict[str, int]:
        """Of the metrics, by component."""
        return self.description["metrics_ports"]

    @property
    def description(self) -> dict[str, Any]:
        return json.loads((self.state / "deployment.json").read_text())

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "icos_fl_local", *arguments]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str, seconds: float = 60.0) -> tuple[int, str]:
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, out


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """Two nodes that have learned for one round."""
    found = Kept(tmp_path_factory.mktemp("kept"))
    try:
        status, out = found.run(
            "up", "--keep", "--nodes", "2", "--rounds", "1", *SMALL, seconds=250
        )
        assert status == 0, out
        yield found
    finally:
        found.run("down", seconds=120)


@pytest.fixture(scope="module")
def prometheus(kept: Kept, start_prometheus: Any) -> Any:
    return start_prometheus(YAML(typ="safe").load(kept.state / "prometheus.yml"))


@pytest.fixture(scope="module")
def served(
    kept: Kept, prometheus: Any, metrics_of: Callable[[int], str], until: Callable[..., Any]
) -> dict[str, str]:
    """The metrics of all components, and of a run while it lasts."""

    def of_a_run_in_its_second_round() -> str:
        text = metrics_of(kept.ports["run"])
        return text if "icos_fl_run_last_round_seconds " in text else ""

    run = kept.start("train", "--rounds", "3")
    try:
        texts = {"run": until(of_a_run_in_its_second_round, "no run", 200)}
        prometheus.wait_for("icos_fl_run_last_round_seconds")
    finally:
        run.communicate(timeout=200)
    assert run.returncode == 0
    return texts | {name: metrics_of(port) for name, port in kept.ports.items() if name != "run"}


def test_every_part_is_scraped_and_ready(kept: Kept, prometheus, until):
    names = set(kept.ports) - {"run"}
    until(lambda: len(prometheus.query('up{job="icos-fl"} == 1')) == len(names), "not all are up")
    ready = until(
        lambda: len(found := prometheus.query("icos_fl_service_ready")) == 3 and found, "none"
    )
    assert {series["metric"]["service"] for series in ready} == {
        "otlp-bridge",
        "processor",
        "forecaster",
    }
    assert {series["value"][1] for series in ready} == {"1"}


def test_no_alert_is_raised_not_even_for_a_moment(prometheus, alerts):
    prometheus.wait_for("count(icos_fl_window_rows) == 2")  # the windows have been judged
    # Nothing comes of recorded traces, which is no fault; two scrapes are needed to see it.
    prometheus.wait_for('rate(icos_fl_store_rows_total{result="added"}[10m]) == 0')
    rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    health = {rule["name"]: rule["health"] for rule in rules if rule["type"] == "alerting"}
    assert health == {alert["alert"]: "ok" for alert in alerts}
    assert prometheus.query("ALERTS") == []


@pytest.mark.parametrize("component", TOLD)
def test_each_service_tells_of_its_own_work(served, series_in, component):
    assert TOLD[component] - series_in(served[component]) == set()


def test_alerts_and_dashboard_name_metrics_that_there_are(served, series_in, alerts, expressions):
    asked = " ".join([*expressions, *(str(alert["expr"]) for alert in alerts)])
    # Those of a forecaster are held against one in test_forecasts.py.
    named = {name for name in NAME.findall(asked) if not name.startswith("icos_fl_forecast_")}
    assert named - set().union(*map(series_in, served.values())) == set()
    assert len(named) > 30


def test_every_metric_of_ours_is_in_the_readme(served, series_in):
    readme = (Path(__file__).parents[2] / "deploy/monitoring/README.md").read_text()
    ours = {name for text in served.values() for name in series_in(text)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in ours}
    ours = {name for name in families if name.startswith("icos_fl_")}
    ours = {name for name in ours if not name.endswith("_created")}
    assert {name for name in ours if f"`{name}`" not in readme} == set()


def test_every_expression_of_the_dashboard_can_be_asked(served, prometheus, expressions):
    for expression in expressions:
        prometheus.query(expression)


def test_our_metrics_have_names_and_help_as_prometheus_wants_them(served, promtool):
    for text in served.values():
        ours = [line for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?icos_fl_", line)]
        # Of a client library's own choice, and not for scraping.
        ours = [line for line in ours if "_created" not in line]
        promtool("check", "metrics", given="\n".join(ours) + "\n")


def test_status_says_where_the_metrics_are(kept: Kept):
    status, out = kept.run("status")
    assert status == 0
    assert f", metrics {kept.ports['bridge']}\n" in out
    assert out.endswith(f"  monitor it: prometheus --config.file={kept.state}/prometheus.yml\n")


def test_every_component_but_valkey_logs_json(kept: Kept, served):
    for name in kept.description["components"]:
        if name != "valkey":
            for line in (kept.state / f"logs/{name}.log").open():
                assert json.loads(line)["event"], (name, line)


def test_a_backend_that_hangs_is_alarmed_until_it_goes_on(kept: Kept, prometheus):
    backend = kept.description["components"]["backend"]["pid"]
    os.kill(backend, signal.SIGSTOP)
    try:
        down = 'ALERTS{alertname="IcosFlServiceDown", service="store"}'
        for expected in (down, 'count(ALERTS{alertname="IcosFlServiceNotReady"}) == 3'):
            prometheus.wait_for(expected)
    finally:
        os.kill(backend, signal.SIGCONT)
    prometheus.wait_until_gone('ALERTS{alertname=~"IcosFlService.*"}')


def test_a_supernode_without_its_superexec_is_alarmed(kept: Kept, prometheus):
    # It goes on taking messages, which nobody works on: nothing else tells.
    supernode = psutil.Process(kept.description["components"]["supernode-pfe1"]["pid"])
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in supernode.children():
            child.kill()
    # A scrape of another that came too late, on a busy machine, makes an alert pending, too.
    (alert,) = prometheus.wait_for('ALERTS{alertname="IcosFlServiceDown", node="pfe1"}')
    assert alert["metric"]["service"] == "supernode"
