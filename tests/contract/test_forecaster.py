"""The forecaster as a process beside a real store and a real processor."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl.forecast.v1 import forecast_service_pb2_grpc as pb_grpc
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.settings import RunConfig, parse
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import ModelVersion, Store, connect
from icos_fl_timeseries_store.testing import StoreProcesses, store_processes
from prometheus_client.parser import text_string_to_metric_families

SECOND = 10**9
STEP = 3
"""Seconds between rows; five are a step of the forecasts."""
PATIENCE_SECONDS = 120.0
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/bring-a-model/src"
COLLECTOR = """
receivers: {{otlp: {{protocols: {{grpc: {{endpoint: "127.0.0.1:{otlp_port}"}}}}}}}}
exporters: {{otlphttp: {{endpoint: "http://127.0.0.1:{bridge_port}"}}}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines: {{metrics: {{receivers: [otlp], exporters: [otlphttp]}}}}
"""
COLUMNS = """
node_attribute: service.name
columns:
  expected:
    unit: "%"
    sources:
      - terms:
          - metric: icos_fl_forecast_yhat
            where:
              - {attribute: node, equals: NODE}
              - {attribute: metric, equals: cpu}
              - {attribute: horizon, equals: 5m}
  at_most:
    unit: "%"
    sources:
      - terms:
          - metric: icos_fl_forecast_yhat_upper
            where:
              - {attribute: node, equals: NODE}
              - {attribute: metric, equals: cpu}
              - {attribute: horizon, equals: 5m}
              - {attribute: level, equals: "0.8"}
"""


@dataclass
class Node:
    """A store with one window, and the services beside it."""

    name: str
    processes: StoreProcesses
    store: Store
    folder: Path
    count: int = 0
    began_ns: int = field(default_factory=lambda: time.time_ns() - 3600 * SECOND)
    forecaster: "subprocess.Popen[bytes] | None" = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.window = self.store.create_window(self.name, 1000)
        self.port, self.metrics_port = free_port(), free_port()

    def append(self, count: int) -> None:
        place = self.count + np.arange(count)
        self.count += count
        cpu, power = 50 + 20 * np.sin(place / 40), 100 + 30 * np.cos(place / 40)
        self.window.append(
            ["cpu", "power"],
            self.began_ns + place * STEP * SECOND,
            np.stack([cpu, power], axis=1),
            {"cpu": "%", "power": "W"},
        )

    def start(self, **environment: str) -> None:
        self.environment = {
            "ICOS_FL_FORECASTER_LISTEN_ADDRESS": f"127.0.0.1:{self.port}",
            "ICOS_FL_FORECASTER_METRICS_ADDRESS": f"127.0.0.1:{self.metrics_port}",
            "ICOS_FL_FORECASTER_STORE__PORT": str(self.processes.settings.port),
            "ICOS_FL_FORECASTER_STORE__TIMEOUT_SECONDS": "10",
            "ICOS_FL_FORECASTER_STATE_FOLDER": str(self.folder / "state"),
            "ICOS_FL_FORECASTER_RECORDED": "true",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-m", "icos_fl_client.serving"]
        with (self.folder / "forecaster.log").open("ab") as log:
            self.forecaster = subprocess.Popen(
                command, env={**os.environ, **self.environment}, stdout=log, stderr=log
            )

    def end(self, how: signal.Signals) -> int:
        assert self.forecaster is not None
        self.forecaster.send_signal(how)
        return self.forecaster.wait(60)

    def until(self, true: Callable[[pb.Forecast], bool]) -> pb.Forecast:
        """The first forecast of CPU of which it is *true*."""
        request = pb.WatchForecastsRequest(nodes=[self.name], metrics=["cpu"])
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = pb_grpc.ForecastServiceStub(channel)
            answers = stub.WatchForecasts(request, timeout=PATIENCE_SECONDS, wait_for_ready=True)
            return next(answer.forecast for answer in answers if true(answer.forecast))

    def until_step(self, count: int) -> pb.Forecast:
        """The forecast from the *count*-th row or later."""
        newest_ns = self.began_ns + (count - 1) * STEP * SECOND
        return self.until(lambda found: found.last_time.ToNanoseconds() > newest_ns)

    def samples(self) -> dict[tuple[str, ...], float]:
        """What Prometheus gets, by name and values of the labels in order of their names."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def keep_model(self, model: str, made_in: int) -> None:
        given = {"metric": "cpu", "model": model, "time-step": 10, "horizon": 8}
        run = parse(RunConfig, given, "run config of the test")
        weights = weights_of(build_model(run, "cpu"))
        metadata = {"created-unix-s": 1_700_000_000.0 + made_in}
        version = ModelVersion(made_in, weights, run.model_config_of("cpu"), metadata)
        self.store.model_state(self.name, "cpu").put(version)

    def has_torch(self) -> bool:
        assert self.forecaster is not None
        return "libtorch" in Path(f"/proc/{self.forecaster.pid}/maps").read_text()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreProcesses, Store]]:
    with (
        store_processes(tmp_path_factory.mktemp("store")) as processes,
        connect(processes.settings) as store,
    ):
        yield processes, store


@pytest.fixture
def node(
    running: tuple[StoreProcesses, Store], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Node]:
    node = Node(request.node.name.removeprefix("test_"), *running, tmp_path)
    yield node
    if node.forecaster is not None and node.forecaster.poll() is None:
        node.forecaster.kill()
        node.forecaster.wait()
    print((tmp_path / "forecaster.log").read_text(errors="replace")[-4000:])


def test_prometheus_gets_what_grpc_says(node: Node):
    node.append(300)
    node.start()
    said = node.until_step(300)
    samples = node.samples()
    for horizon, text in zip(said.horizons, ("1m", "5m", "1h"), strict=True):
        assert samples["icos_fl_forecast_yhat", text, "cpu", node.name] == horizon.yhat
        for interval in horizon.intervals:
            labels = (text, f"{interval.level:g}", "cpu", node.name)
            assert samples["icos_fl_forecast_yhat_lower", *labels] == interval.lower
            assert samples["icos_fl_forecast_yhat_upper", *labels] == interval.upper
            assert 0 <= samples["icos_fl_forecast_coverage_ratio", *labels] <= 1
    assert samples["icos_fl_forecast_value", "cpu", node.name] == said.last_value
    assert samples["icos_fl_forecast_error", "combination", "1m", "cpu", node.name] > 0
    assert samples["icos_fl_forecast_error", "last", "1m", "cpu", node.name] > 0
    assert samples["icos_fl_service_ready",] == 1


def test_with_the_default_model_no_torch_is_loaded(node: Node):
    node.append(300)
    node.keep_model("icos_fl_client.models:AnchorLSTM", 7)
    node.start()
    said = node.until_step(300)
    assert (said.model.round, said.no_model) == (7, "")
    assert node.samples()["icos_fl_forecast_model_round", "cpu", node.name] == 7
    assert not node.has_torch()


def test_a_users_module_is_one_more_forecaster(node: Node, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    node.append(300)
    node.keep_model("bring_a_model:build", 4)
    with processor(node) as address:
        node.start(ICOS_FL_FORECASTER_PROCESSOR__ADDRESS=address, PYTHONPATH=str(EXAMPLE))
        said = node.until_step(300)
        assert (said.model.round, said.no_model) == (4, "")
        with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
            request = pb.GetRecordRequest(node=node.name, metric="cpu")
            record = pb_grpc.ForecastServiceStub(channel).GetRecord(request)
        (model,) = (each for each in record.horizons[0].forecasters if each.name == "model")
        # Its weights are 0: it repeats the newest step, as the processor has it.
        assert model.yhat[-1] == pytest.approx(record.values[-1], abs=1.0)
        assert node.has_torch()


def test_a_users_module_whose_processor_is_away_leaves_the_forecast_to_the_others(
    node: Node, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(EXAMPLE)
    node.append(300)
    node.keep_model("bring_a_model:build", 4)
    address = f"127.0.0.1:{free_port()}"
    node.start(ICOS_FL_FORECASTER_PROCESSOR__ADDRESS=address, PYTHONPATH=str(EXAMPLE))
    said = node.until_step(300)
    assert said.no_model.startswith(f"the processor at {address}: UNAVAILABLE")
    assert len(said.horizons) == 3


def test_a_forecaster_that_is_told_to_end_keeps_what_it_learned(node: Node):
    node.append(300)
    node.start()
    node.until_step(300)
    assert node.end(signal.SIGTERM) == 0
    assert (node.folder / "state" / f"{node.name}@cpu.npz").stat().st_size > 0
    node.append(900)  # of the 1,000 rows of the window some are as old as what was learned
    node.start()
    node.until_step(1200)
    with grpc.insecure_channel(f"127.0.0.1:{node.port}") as channel:
        request = pb.GetRecordRequest(node=node.name, metric="cpu")
        record = pb_grpc.ForecastServiceStub(channel).GetRecord(request)
    assert len(record.values) == 240


def test_a_forecaster_that_is_killed_goes_on_from_the_window(node: Node):
    node.append(300)
    node.start()
    node.until_step(300)
    assert node.end(signal.SIGKILL) == -signal.SIGKILL
    node.append(50)
    node.start()
    assert node.until_step(350).horizons


def test_forecasts_go_on_when_the_backend_comes_back(node: Node):
    node.append(300)
    node.start()
    node.until_step(300)
    backend = node.processes.processes["backend"]
    backend.kill()
    backend.wait()
    node.processes.start("backend")
    node.append(50)
    assert node.until_step(350).horizons


def test_forecasts_go_back_into_a_collector_over_otlp(node: Node):
    command = [ROOT / "deploy/build-sources", "--check", "otelcol-peer"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    if not found:
        pytest.skip("no Collector: deploy/build-sources otelcol-peer")
    bridge_port, otlp_port = free_port(), free_port()
    collector = node.folder / "collector.yaml"
    collector.write_text(COLLECTOR.format(otlp_port=otlp_port, bridge_port=bridge_port))
    columns = node.folder / "bridge.yaml"
    columns.write_text(COLUMNS.replace("NODE", node.name))
    bridge = {
        "ICOS_FL_BRIDGE_LISTEN_ADDRESS": f"127.0.0.1:{free_port()}",
        "ICOS_FL_BRIDGE_HTTP_LISTEN_ADDRESS": f"127.0.0.1:{bridge_port}",
        "ICOS_FL_BRIDGE_CONFIG": str(columns),
        "ICOS_FL_BRIDGE_STORE__PORT": str(node.processes.settings.port),
    }
    node.append(300)
    with (
        service([sys.executable, "-m", "icos_fl_otlp_bridge"], bridge, bridge_port),
        service([found.partition("=")[2], f"--config={collector}"], {}, otlp_port),
    ):
        endpoint = f"http://127.0.0.1:{otlp_port}"
        node.start(ICOS_FL_FORECASTER_METRICS_OTLP_ENDPOINT=endpoint)
        said = node.until_step(300)
        assert node.end(signal.SIGTERM) == 0  # what is newest is exported at the end
        window = node.store.create_window("icos-fl-client")
        cursor = 0
        while not window.info().rows:
            cursor = window.wait(cursor, PATIENCE_SECONDS)
    rows = window.read()
    told = dict(zip(rows.columns, rows.values_tf[-1], strict=True))
    assert told == {
        "expected": said.horizons[1].yhat,
        "at_most": said.horizons[1].intervals[0].upper,
    }


@contextlib.contextmanager
def service(command: list[str], environment: dict[str, str], port: int) -> Iterator[None]:
    """One that listens on *port* in the block."""
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, f"{command} has ended"
                assert time.monotonic() < deadline, f"{command} does not listen on {port}"
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def processor(node: Node) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "ICOS_FL_PROCESSOR_LISTEN_ADDRESS": address,
        "ICOS_FL_PROCESSOR_STORE__PORT": str(node.processes.settings.port),
        "ICOS_FL_PROCESSOR_RECORDED": "true",
    }
    command = [sys.executable, "-m", "icos_fl_processor"]
    with service(command, environment, int(address.rpartition(":")[2])):
        yield address
