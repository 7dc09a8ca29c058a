"""Services of a node without power to read, each started by itself, and a Prometheus beside."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.testing import store_processes
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from ruamel.yaml import YAML

EXAMPLE = Path(__file__).parents[2] / "deploy/monitoring/prometheus.yml"
MODULES = {
    "store": "",
    "otlp-bridge": "icos_fl_otlp_bridge",
    "processor": "icos_fl_processor",
    "superlink": "icos_fl_warm_runtime",
}
DISTRIBUTIONS = {
    "icos-fl-timeseries-store",
    "icos-fl-otlp-bridge",
    "icos-fl-processor",
    "icos-fl-warm-runtime",
}


class Receiver(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps, by service, the names of metrics that come over OTLP."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        for resource in request.resource_metrics:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            names = self.names.setdefault(attributes["service.name"], set())
            names |= {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


@dataclass
class Services:
    folder: Path
    ports: dict[str, int] = field(
        default_factory=lambda: {service: free_port() for service in MODULES}
    )
    """Of the metrics."""
    receiver: Receiver = field(default_factory=Receiver)

    def metrics_env(self, service: str, prefix: str, endpoint: str) -> dict[str, str]:
        return {
            f"ICOS_FL_{prefix}_METRICS_ADDRESS": f"127.0.0.1:{self.ports[service]}",
            f"ICOS_FL_{prefix}_METRICS_OTLP_ENDPOINT": endpoint,
        }

    @contextlib.contextmanager
    def process(self, service: str, *arguments: str, **environment: str) -> Iterator[None]:
        command = [sys.executable, "-m", MODULES[service], *arguments]
        with (self.folder / f"{service}.log").open("wb") as log:
            running = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=log
            )
        try:
            yield
        finally:
            running.terminate()
            running.wait(30)


@pytest.fixture(scope="module")
def services(
    tmp_path_factory: pytest.TempPathFactory,
    until: Callable[..., Any],
    metrics_of: Callable[[int], str],
) -> Iterator[Services]:
    """A store with ten minutes of no power at a live CPU, and who serves it."""
    found = Services(tmp_path_factory.mktemp("services"))
    with contextlib.ExitStack() as stack:
        server = grpc.server(ThreadPoolExecutor(4))
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(found.receiver, server)
        endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        stack.callback(lambda: server.stop(0).wait())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in found.metrics_env("store", "STORE", endpoint).items():
            patch.setenv(name, value)
        patch.setenv("ICOS_FL_STORE_LOG_LEVEL", "INFO")
        settings = stack.enter_context(store_processes(found.folder / "store")).settings
        with connect(settings) as store:
            times = time.time_ns() - np.arange(200)[::-1] * 3_000_000_000
            values = np.column_stack([np.zeros(200), np.arange(200) % 11])
            units = {"power_consumption": "W", "cpu_usage": "%"}
            store.create_window("edge-1").append(list(units), times, values, units)
        for service, prefix in (("otlp-bridge", "BRIDGE"), ("processor", "PROCESSOR")):
            environment = {
                f"ICOS_FL_{prefix}_STORE__PORT": str(settings.port),
                f"ICOS_FL_{prefix}_LISTEN_ADDRESS": "127.0.0.1:0",
                **found.metrics_env(service, prefix, endpoint),
            }
            stack.enter_context(found.process(service, **environment))
        options = ("superlink", "--insecure", "--host", "127.0.0.1", "--port", str(free_port()))
        environment = found.metrics_env("superlink", "RUNTIME", endpoint)
        stack.enter_context(found.process("superlink", *options, **environment))
        for service, port in found.ports.items():
            until(lambda port=port: metrics_of(port), f"{service} serves no metrics")
        yield found


@pytest.fixture(scope="module")
def prometheus(services: Services, start_prometheus: Any) -> Any:
    """By the example, with the addresses of what runs here."""
    document = YAML(typ="safe").load(EXAMPLE)
    steady, _run = document["scrape_configs"]
    steady["static_configs"] = [
        {
            "targets": [f"127.0.0.1:{services.ports[given['labels']['service']]}"],
            "labels": given["labels"],
        }
        for given in steady["static_configs"]
        if given["labels"]["service"] in services.ports
    ]
    alerts = str(EXAMPLE.with_name("alerts.yml"))
    return start_prometheus({"rule_files": [alerts], "scrape_configs": [steady]})


def test_a_prometheus_scrapes_every_service(prometheus, until):
    up = until(
        lambda: len(found := prometheus.query("up == 1")) == len(MODULES) and found,
        "not all are up",
    )
    assert {series["metric"]["service"] for series in up} == set(MODULES)


def test_it_learns_that_power_is_unavailable_and_alerts(prometheus):
    (series,) = prometheus.wait_for("icos_fl_window_condition == 1")
    assert series["metric"]["node"] == "edge-1"
    assert series["metric"]["column"] == "power_consumption"
    assert series["metric"]["condition"] == "unavailable"
    (alert,) = prometheus.wait_for('ALERTS{alertname="IcosFlSensorUnavailable"}')
    assert alert["metric"]["alertstate"] == "pending"  # for two minutes


def test_it_counts_rows_appends_and_the_windows_fill(prometheus):
    (added,) = prometheus.wait_for('icos_fl_store_rows_total{result="added"}')
    assert float(added["value"][1]) == 200
    (fill,) = prometheus.wait_for("icos_fl_window_rows / icos_fl_window_capacity_rows")
    assert float(fill["value"][1]) == pytest.approx(200 / 300)
    (appends,) = prometheus.wait_for(
        'icos_fl_store_call_seconds_count{call="TimeSeriesData.append"}'
    )
    assert float(appends["value"][1]) == 1


def test_every_service_exports_the_same_over_otlp(services: Services, until):
    names = services.receiver.names
    until(lambda: set(names) == DISTRIBUTIONS, f"only these have exported: {set(names)}", 90)
    for found in names.values():
        assert {"icos_fl_service_info", "process_resident_memory_bytes"} <= found
    assert "icos_fl_store_rows" in names["icos-fl-timeseries-store"]


def test_logs_are_json_lines_those_of_dataclay_too(services: Services):
    files = {
        "otlp-bridge": services.folder / "otlp-bridge.log",
        "processor": services.folder / "processor.log",
        "superlink": services.folder / "superlink.log",
        "backend": services.folder / "store/backend.log",
        "metadata": services.folder / "store/metadata.log",
        "proxy": services.folder / "store/proxy.log",
    }
    told = {name: [json.loads(line) for line in file.open()] for name, file in files.items()}
    assert "serving" in {line["event"] for line in told["processor"]}
    for name in ("backend", "metadata"):
        assert any(line["logger"].startswith("dataclay") for line in told[name])
