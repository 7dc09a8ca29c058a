"""Programs of deploy/monitoring, and what has to be asked of services and of a Prometheus."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from icos_fl_service.testing import free_port
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"
RULES = ("alerts.yml", "forecasts.yml")
VARIABLES = {
    "$__rate_interval": "1m",
    "$node": ".*",
    "$metric": "memory_usage",
    "$horizon": "5m",
}
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: apt-get install prometheus")
    return found


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until(call: Callable[[], Any], problem: str, seconds: float = 60.0) -> Any:
    """What *call* gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if found := call():
                return found
        assert time.monotonic() < deadline, problem
        time.sleep(0.1)


@dataclass
class Prometheus:
    """One that runs."""

    port: int

    def api(self, what: str, **arguments: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        return json.loads(get(url))["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.api("query", query=expression)["result"]

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """What the query gives as soon as it gives something."""
        return wait_until(lambda: self.query(expression), f"nothing for {expression}")

    def wait_until_gone(self, expression: str) -> None:
        wait_until(lambda: not self.query(expression), f"still there: {expression}")


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """until(call, problem, seconds)"""
    return wait_until


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[int], str]:
    """The text that is served on a port."""
    return lambda port: get(f"http://127.0.0.1:{port}/metrics")


@pytest.fixture(scope="session")
def series_in() -> Callable[[str], set[str]]:
    """Names of all series that a text of metrics has, or could have."""

    def names(text: str) -> set[str]:
        return {
            family.name + end
            for family in text_string_to_metric_families(text)
            for end in SUFFIXES.get(family.type, [""])
        }

    return names


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """promtool(*arguments, given="what it reads")"""

    def run(*arguments: str, given: str = "") -> str:
        done = subprocess.run(
            [needed("promtool"), *arguments],
            cwd=FOLDER,
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def start_prometheus(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[dict[str, Any]], Prometheus]]:
    """Starts a Prometheus by a configuration, at a quicker pace than that says."""
    with contextlib.ExitStack() as stack:

        def start(configuration: dict[str, Any]) -> Prometheus:
            program = needed("prometheus")
            folder = tmp_path_factory.mktemp("prometheus")
            pace = {"scrape_interval": "1s", "evaluation_interval": "1s"}
            YAML().dump({**configuration, "global": pace}, folder / "prometheus.yml")
            port = free_port()
            command = [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ]
            with (folder / "log").open("wb") as log:
                running = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(running.wait, 30)
            stack.callback(running.terminate)
            found = Prometheus(port)
            wait_until(lambda: found.api("rules"), "Prometheus does not start")
            return found

        yield start


@pytest.fixture(scope="session")
def alerts() -> list[dict[str, Any]]:
    """Those of alerts.yml and forecasts.yml."""
    documents = [YAML(typ="safe").load(FOLDER / name) for name in RULES]
    rules = [rule for each in documents for group in each["groups"] for rule in group["rules"]]
    return [rule for rule in rules if "alert" in rule]


@pytest.fixture(scope="session")
def expressions() -> list[str]:
    """Of the dashboard, with Grafana's variables filled in."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    for variable, value in VARIABLES.items():
        found = [expression.replace(variable, value) for expression in found]
    return found
