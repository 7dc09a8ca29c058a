"""The bridge in its own process and real dataClay, which is killed and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import StoreSettings, connect
from icos_fl_timeseries_store.contract import Rows
from icos_fl_timeseries_store.services import SERVICES
from icos_fl_timeseries_store.testing import StoreProcesses, store_processes
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECOND = 1_000_000_000
START = 1_699_999_998 * SECOND  # a multiple of the interval of 3 s


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcesses]:
    with store_processes(tmp_path_factory.mktemp("store")) as running:
        yield running


@contextlib.contextmanager
def running_bridge(
    store: StoreProcesses, **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], grpc.Channel]]:
    """A bridge that serves, and a channel to it; it must end well unless the block ends it."""
    address = f"127.0.0.1:{free_port()}"
    environment = {"LISTEN_ADDRESS": address, "STORE__PORT": str(store.settings.port), **settings}
    process = subprocess.Popen(
        tied(sys.executable, "-m", "icos_fl_otlp_bridge"),
        env=os.environ | {f"ICOS_FL_BRIDGE_{name}": value for name, value in environment.items()},
    )
    try:
        with grpc.insecure_channel(address) as channel:
            wait_for_health(channel, SERVING)
            yield process, channel
        if process.poll() is None:
            process.terminate()
            assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def bridge_process(
    store: StoreProcesses, metrics_port: int
) -> Iterator[tuple[subprocess.Popen[bytes], grpc.Channel]]:
    metrics = f"127.0.0.1:{metrics_port}"
    with running_bridge(store, STORE__TIMEOUT_SECONDS="3", METRICS_ADDRESS=metrics) as running:
        yield running


@pytest.fixture(scope="module")
def bridge(bridge_process: tuple[subprocess.Popen[bytes], grpc.Channel]) -> grpc.Channel:
    """A channel to a bridge that serves."""
    return bridge_process[1]


def wait_for_health(channel: grpc.Channel, status: int) -> None:
    request = health_pb2.HealthCheckRequest()
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120, wait_for_ready=True)
    for answer in watch:
        if answer.status == status:
            watch.cancel()
            return


def scrapes(node: str, *watts: float) -> pb.ExportMetricsServiceRequest:
    """A scrape of Scaphandre every 3 s from START."""
    request = pb.ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="host.name").value.string_value = node
    metrics = resource.scope_metrics.add().metrics
    for name, values in {
        "scaph_host_power_microwatts": [round(1e6 * value) for value in watts],
        "scaph_host_memory_total_bytes": [3 << 20] * len(watts),
        "scaph_host_memory_available_bytes": [1 << 20] * len(watts),
    }.items():
        points = metrics.add(name=name).gauge.data_points
        for step, value in enumerate(values):
            points.add(time_unix_nano=START + 3 * step * SECOND, as_int=value)
    return request


def export(channel: grpc.Channel, request: pb.ExportMetricsServiceRequest) -> None:
    """An export that must be OK, and wholly."""
    stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
    response = stub.Export(request, timeout=30)
    assert not response.HasField("partial_success")


def read(settings: StoreSettings, node: str) -> Rows:
    with connect(settings) as store:
        return store.window(node).read()


def test_acknowledged_rows_are_in_the_store(bridge, store):
    request = scrapes("a", 146.83, 20.5)
    request.MergeFrom(scrapes("b", 7.0))
    export(bridge, request)
    rows = read(store.settings, "a")
    assert rows.columns == ("power_consumption", "memory_usage")
    assert rows.units == ("W", "MiB")
    assert rows.times_ns_t.tolist() == [START, START + 3 * SECOND]
    np.testing.assert_array_equal(rows.values_tf, [[146.83, 2.0], [20.5, 2.0]])
    np.testing.assert_array_equal(read(store.settings, "b").values_tf, [[7.0, 2.0]])


def test_a_batch_that_comes_again_changes_nothing_in_the_store(bridge, store):
    for _ in range(3):
        export(bridge, scrapes("c", 1.0, 2.0))
    np.testing.assert_array_equal(read(store.settings, "c").values_tf, [[1.0, 2.0], [2.0, 2.0]])


def test_a_node_name_that_the_store_refuses_is_told_and_the_other_node_is_stored(bridge, store):
    request = scrapes("no such name", 1.0)
    request.MergeFrom(scrapes("d", 7.0))
    stub = MetricsServiceStub(bridge)  # type: ignore[no-untyped-call]
    partial = stub.Export(request, timeout=30).partial_success
    assert partial.error_message == "rejected data points: invalid_node: 3"
    assert partial.rejected_data_points == 3
    np.testing.assert_array_equal(read(store.settings, "d").values_tf, [[7.0, 2.0]])


def test_no_export_is_lost_while_sighup_makes_the_bridge_read_its_files_again(
    bridge_process, store
):
    process, channel = bridge_process
    watts = [float(number) for number in range(1, 31)]
    for count in range(1, len(watts) + 1):
        process.send_signal(signal.SIGHUP)
        export(channel, scrapes("hup", *watts[:count]))
    stored = read(store.settings, "hup")
    assert stored.values_tf[:, stored.columns.index("power_consumption")].tolist() == watts


def test_a_killed_store_is_unavailable_until_it_is_back(bridge, store):
    export(bridge, scrapes("e", 1.0))
    for service in reversed(SERVICES):
        store.processes[service].kill()
        store.processes[service].wait()
    refusal(bridge, scrapes("e", 1.0, 2.0))
    wait_for_health(bridge, NOT_SERVING)
    for service in SERVICES:
        store.start(service)
    wait_for_health(bridge, SERVING)
    export(bridge, scrapes("e", 1.0, 2.0))
    np.testing.assert_array_equal(read(store.settings, "e").values_tf, [[1.0, 2.0], [2.0, 2.0]])


def refusal(channel: grpc.Channel, request: pb.ExportMetricsServiceRequest) -> grpc.RpcError:
    """The error of an export that must be sent again."""
    stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
    with pytest.raises(grpc.RpcError) as refused:
        stub.Export(request, timeout=30)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    (detail,) = rpc_status.from_call(refused.value).details
    assert detail.Is(RetryInfo.DESCRIPTOR)
    return refused.value


def test_a_damaged_window_is_told_and_only_its_own_node_waits_for_the_repair(
    bridge, store, metrics_port
):
    export(bridge, scrapes("damaged", 1.0, 2.0))
    backend = store.processes["backend"]
    backend.kill()
    backend.wait()
    path = store.folder / "objects" / "windows" / "damaged.state"
    content = bytearray(path.read_bytes())
    content[content.rindex(np.float64(1.0).tobytes())] ^= 1
    path.write_bytes(content)
    wait_for_health(bridge, NOT_SERVING)
    store.start("backend")
    wait_for_health(bridge, SERVING)
    request = scrapes("damaged", 1.0, 2.0, 3.0)
    request.MergeFrom(scrapes("whole", 7.0))
    assert str(path) in refusal(bridge, request).details()
    np.testing.assert_array_equal(read(store.settings, "whole").values_tf, [[7.0, 2.0]])
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'icos_fl_bridge_store_errors_total{reason="damaged"} 1.0' in metrics
    health = health_pb2_grpc.HealthStub(bridge).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert health.status == SERVING
    with connect(store.settings) as connected:
        connected.repair("damaged")
    export(bridge, request)
    powers = read(store.settings, "damaged").values_tf[:, 0].tolist()
    assert powers == [1.0, 2.0, 3.0]


ATTEMPT_SECONDS = 5.0
"""An exporter's."""


def test_case_4_a_batch_comes_three_times_from_a_slow_store_and_over_a_restart(store):
    batch = scrapes("slow", *(float(number) for number in range(60)))
    backend = store.processes["backend"]
    with running_bridge(store) as (process, channel):
        stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
        backend.send_signal(signal.SIGSTOP)
        answers = threading.Timer(ATTEMPT_SECONDS + 1, backend.send_signal, [signal.SIGCONT])
        answers.start()
        with pytest.raises(grpc.RpcError) as gave_up:
            stub.Export(batch, timeout=ATTEMPT_SECONDS)
        assert gave_up.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        for again in [stub.Export.future(batch, timeout=30) for _ in range(2)]:
            assert not again.result().HasField("partial_success")
        answers.join()
        process.kill()
        process.wait()
    with running_bridge(store) as (_, channel):
        export(channel, batch)
    rows = read(store.settings, "slow")
    assert rows.times_ns_t.tolist() == [START + 3 * step * SECOND for step in range(60)]
    assert rows.values_tf[:, 0].tolist() == [float(number) for number in range(60)]
