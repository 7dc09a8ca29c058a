"""deploy/monitoring with the programs it is for: promtool, and a Prometheus that scrapes."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.testing import free_port, store_processes
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"
NAME = re.compile(r"\b(?:icos_fl|process|dataclay)_[a-z0-9_]+")
SERVICES = ("store", "otlp-bridge", "processor")


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: apt-get install prometheus")
    return found


def promtool(*arguments: str, given: str = "") -> str:
    done = subprocess.run(
        [needs("promtool"), *arguments],
        cwd=FOLDER,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, object]]:
    document = YAML(typ="safe").load(FOLDER / "alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Those of the dashboard, with Grafana's variables filled in."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [e.replace("$__rate_interval", "1m").replace("$node", ".*") for e in found]


# The files


def test_promtool_takes_the_configuration_and_the_alerts():
    promtool("check", "config", "prometheus.yml")


def test_the_alerts_pass_their_unit_tests():
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_unit_test_that_sees_it_raised():
    tests = YAML(typ="safe").load(FOLDER / "alerts_test.yml")["tests"]
    raised = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert {alert["alert"] for alert in alerts()} == raised


def test_every_alert_must_last_and_says_what_to_do():
    for alert in alerts():
        assert alert["for"]
        assert set(alert["annotations"]) == {"summary", "action"}
        assert alert["labels"]["severity"] in ("critical", "warning")


# What is scraped


class Scraped:
    """Services that run, and a Prometheus that scrapes them."""

    def __init__(self, folder: Path, ports: dict[str, int], prometheus: int | None) -> None:
        self.folder = folder
        self._ports = ports
        self._prometheus = prometheus

    def text(self, service: str) -> str:
        return get(f"http://127.0.0.1:{self._ports[service]}/metrics")

    def names(self) -> set[str]:
        """Of all series that the services could have."""
        found = set()
        for service in self._ports:
            for family in text_string_to_metric_families(self.text(service)):
                suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
                found |= {family.name + end for end in suffixes.get(family.type, [""])}
        return found

    def query(self, expression: str) -> list[dict[str, object]]:
        question = urllib.parse.urlencode({"query": expression})
        url = f"http://127.0.0.1:{self._prometheus}/api/v1/query?{question}"
        return json.loads(get(url))["data"]["result"]

    def wait_for(self, expression: str) -> list[dict[str, object]]:
        """What the query gives as soon as it gives something."""
        return until(lambda: self.query(expression), f"nothing for {expression}")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def until(call, problem: str, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if found := call():
                return found
        assert time.monotonic() < deadline, problem
        time.sleep(0.2)


@contextlib.contextmanager
def process(*command: str, log: Path, **environment: str) -> Iterator[None]:
    with log.open("wb") as stream:
        running = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=stream, stderr=stream
        )
    try:
        yield
    finally:
        running.terminate()
        running.wait(30)


def configuration(folder: Path, ports: dict[str, int]) -> Path:
    """The example, with the addresses of what runs here and a quicker pace."""
    document = YAML(typ="safe").load(FOLDER / "prometheus.yml")
    document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    document["rule_files"] = [str(FOLDER / "alerts.yml")]
    (job,) = document["scrape_configs"]
    job["static_configs"] = [
        {"targets": [f"127.0.0.1:{ports[given['labels']['service']]}"], "labels": given["labels"]}
        for given in job["static_configs"]
        if given["labels"]["service"] in ports
    ]
    file = folder / "prometheus.yml"
    YAML().dump(document, file)
    return file


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """A store with ten minutes of no power at a live CPU, and who serves it."""
    folder = tmp_path_factory.mktemp("monitoring")
    ports = {service: free_port() for service in SERVICES}
    addresses = {service: f"127.0.0.1:{port}" for service, port in ports.items()}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ICOS_FL_STORE_METRICS_ADDRESS", addresses["store"])
        patch.setenv("ICOS_FL_STORE_LOG_LEVEL", "INFO")
        settings = stack.enter_context(store_processes(folder / "store")).settings
        with connect(settings) as store:
            times = time.time_ns() - np.arange(200)[::-1] * 3_000_000_000
            values = np.column_stack([np.zeros(200), np.arange(200) % 11])
            units = {"power_consumption": "W", "cpu_usage": "%"}
            store.create_window("edge-1").append(list(units), times, values, units)
        for service, module in (("otlp-bridge", "BRIDGE"), ("processor", "PROCESSOR")):
            where = {
                "STORE__PORT": str(settings.port),
                "LISTEN_ADDRESS": "127.0.0.1:0",
                "METRICS_ADDRESS": addresses[service],
            }
            variables = {f"ICOS_FL_{module}_{name}": value for name, value in where.items()}
            command = (sys.executable, "-m", f"icos_fl_{service.replace('-', '_')}")
            log = folder / f"{service}.log"
            stack.enter_context(process(*command, log=log, **variables))
        prometheus = None
        if shutil.which("prometheus"):
            prometheus = free_port()
            command = (
                "prometheus",
                f"--config.file={configuration(folder, ports)}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            )
            stack.enter_context(process(*command, log=folder / "prometheus.log"))
        found = Scraped(folder, ports, prometheus)
        for service in SERVICES:
            until(lambda service=service: found.text(service), f"{service} serves no metrics")
        yield found


def test_a_prometheus_scrapes_every_service(scraped: Scraped):
    needs("prometheus")
    up = until(
        lambda: len(found := scraped.query("up == 1")) == len(SERVICES) and found, "not all are up"
    )
    assert {series["metric"]["service"] for series in up} == set(SERVICES)


def test_it_learns_that_power_is_unavailable_and_alerts(scraped: Scraped):
    needs("prometheus")
    (series,) = scraped.wait_for("icos_fl_window_condition == 1")
    assert series["metric"]["node"] == "edge-1"
    assert series["metric"]["column"] == "power_consumption"
    assert series["metric"]["condition"] == "unavailable"
    (alert,) = scraped.wait_for('ALERTS{alertname="IcosFlSensorUnavailable"}')
    assert alert["metric"]["alertstate"] == "pending"  # for two minutes


def test_it_counts_rows_appends_and_the_windows_fill(scraped: Scraped):
    needs("prometheus")
    (added,) = scraped.wait_for('icos_fl_store_rows_total{result="added"}')
    assert float(added["value"][1]) == 200
    (fill,) = scraped.wait_for("icos_fl_window_rows / icos_fl_window_capacity_rows")
    assert float(fill["value"][1]) == pytest.approx(200 / 300)
    (appends,) = scraped.wait_for('icos_fl_store_call_seconds_count{call="TimeSeriesData.append"}')
    assert float(appends["value"][1]) == 1


def test_every_expression_of_the_dashboard_can_be_asked(scraped: Scraped):
    needs("prometheus")
    scraped.wait_for("up")
    for expression in expressions():
        scraped.query(expression)


def test_alerts_and_dashboard_name_metrics_that_there_are(scraped: Scraped):
    asked = " ".join([*expressions(), *(str(alert["expr"]) for alert in alerts())])
    named = set(NAME.findall(asked))
    assert named - scraped.names() == set()
    assert len(named) > 10


def test_our_metrics_have_names_and_help_as_prometheus_wants_them(scraped: Scraped):
    for service in SERVICES:
        lines = scraped.text(service).splitlines()
        ours = [line for line in lines if re.match(r"(# (HELP|TYPE) )?icos_fl_", line)]
        # Of a client library's own choice, and not for scraping.
        ours = [line for line in ours if "_created" not in line]
        promtool("check", "metrics", given="\n".join(ours) + "\n")


def test_logs_are_json_lines_those_of_dataclay_too(scraped: Scraped):
    files = {
        "otlp-bridge": scraped.folder / "otlp-bridge.log",
        "processor": scraped.folder / "processor.log",
        "backend": scraped.folder / "store/backend.log",
        "metadata": scraped.folder / "store/metadata.log",
    }
    told = {name: [json.loads(line) for line in file.open()] for name, file in files.items()}
    assert "serving" in {line["event"] for line in told["processor"]}
    assert any(line["logger"].startswith("dataclay") for line in told["backend"])
