"""The host source against a server that keeps what it is sent, and a powercap tree of files."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from icos_fl_local import host
from icos_fl_otlp_bridge.config import default_config
from icos_fl_otlp_bridge.rows import Converter
from opentelemetry.metrics import CallbackOptions
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)

OPTIONS = CallbackOptions()


class Receiver(MetricsServiceServicer):
    """Keeps requests; ``wait`` returns when there are enough of them."""

    def __init__(self) -> None:
        self.requests: list[pb.ExportMetricsServiceRequest] = []
        self._changed = threading.Condition()

    def Export(self, request, context):  # noqa: N802
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return pb.ExportMetricsServiceResponse()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, 20)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = grpc.server(ThreadPoolExecutor(1))
    service = Receiver()
    add_MetricsServiceServicer_to_server(service, server)
    service.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    server.stop(None).wait()


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, the second with a sub-domain, and a zone of the whole platform."""
    add_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    add_zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    add_zone(tmp_path, "intel-rapl:1:0", "core", 500_000)
    add_zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    return tmp_path


def add_zone(powercap: Path, zone: str, name: str, energy_uj: int) -> None:
    folder = powercap / zone
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")


def set_energy(powercap: Path, zone: str, energy_uj: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{energy_uj}\n")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the source reads, in a list of one."""
    now = [1_000.0]
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    return now


def metrics_of(request: pb.ExportMetricsServiceRequest) -> dict[str, list]:
    (resource,) = request.resource_metrics
    return {
        metric.name: list(metric.gauge.data_points)
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def attributes_of(point) -> dict[str, str | int]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in point.attributes
    }


def exported(receiver: Receiver, powercap: Path) -> pb.ExportMetricsServiceRequest:
    """The second export of a source: by then every counter has moved on."""
    source = host.start(receiver.endpoint, "this-node", 0.2, powercap)
    receiver.wait(2)
    source.stop()
    return receiver.requests[1]


def test_the_node_is_the_resources_host_name(receiver, tmp_path):
    (attribute,) = exported(receiver, tmp_path).resource_metrics[0].resource.attributes
    assert (attribute.key, attribute.value.string_value) == ("host.name", "this-node")


def test_cpu_is_a_share_of_time_by_processor_and_mode(receiver, tmp_path):
    points = metrics_of(exported(receiver, tmp_path))["system.cpu.utilization"]
    shares: dict[int, float] = {}
    for point in points:
        cpu = attributes_of(point)["cpu.logical_number"]
        shares[cpu] = shares.get(cpu, 0.0) + point.as_double
        assert 0.0 <= point.as_double <= 1.0
    assert set(shares) == set(range(psutil.cpu_count()))
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))


def test_memory_is_total_minus_available_in_bytes(receiver, tmp_path):
    (point,) = metrics_of(exported(receiver, tmp_path))["system.memory.usage"]
    memory = psutil.virtual_memory()
    assert attributes_of(point) == {"system.memory.state": "used"}
    assert point.as_int == pytest.approx(memory.total - memory.available, rel=0.5)
    assert point.as_int < memory.total


def test_the_bridge_takes_it_by_its_default_configuration(receiver, powercap):
    converter = Converter(default_config())
    rows = converter.convert(exported(receiver, powercap)).rows["this-node"]
    row = dict(zip(converter.columns, rows.values_tf[0], strict=True))
    assert 0.0 <= row["cpu_usage"] <= 100.0
    assert 0.0 < row["memory_usage"] < psutil.virtual_memory().total / 2**20
    assert row["power_consumption"] == 0.0


def test_without_counters_there_is_no_power(receiver, tmp_path):
    assert "hw.host.power" not in metrics_of(exported(receiver, tmp_path))


def test_power_is_exported_where_counters_can_be_read(receiver, powercap):
    (point,) = metrics_of(exported(receiver, powercap))["hw.host.power"]
    assert point.as_double == 0.0  # the tree's counters stand still


def test_no_thread_is_left_after_stop(receiver, tmp_path):
    before = set(threading.enumerate())
    exported(receiver, tmp_path)
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert [name for name in left if "Otel" in name or "host" in name] == []


def test_stop_returns_although_nobody_listens(tmp_path):
    source = host.start("127.0.0.1:1", "a", 0.1, tmp_path)
    start = time.monotonic()
    source.stop()
    assert time.monotonic() - start < 15


def test_power_is_the_energy_of_all_packages_over_time(powercap, clock):
    power = host.PackagePower(host.packages_of(powercap))
    set_energy(powercap, "intel-rapl:0", 1_000_000 + 30_000_000 // 10)
    set_energy(powercap, "intel-rapl:1", 2_000_000 + 5_000_000)
    clock[0] += 2.0
    # (3 J + 5 J) / 2 s
    assert [observation.value for observation in power(OPTIONS)] == [4.0]


def test_a_counter_that_begins_again_adds_its_range(powercap, clock):
    power = host.PackagePower(host.packages_of(powercap))
    set_energy(powercap, "intel-rapl:0", 500_000)
    clock[0] += 1.0
    # 0.5 J − 1 J + 10 J, and 0 J of the other package
    assert [observation.value for observation in power(OPTIONS)] == [9.5]


def test_sub_domains_and_the_platform_are_not_counted_twice(powercap):
    names = [package.energy_file.parent.name for package in host.packages_of(powercap)]
    assert names == ["intel-rapl:0", "intel-rapl:1"]


def test_a_counter_that_vanishes_is_a_gap_and_not_a_part(powercap, clock):
    power = host.PackagePower(host.packages_of(powercap))
    gone = powercap / "intel-rapl:1" / "energy_uj"
    gone.unlink()
    clock[0] += 1.0
    assert list(power(OPTIONS)) == []
    set_energy(powercap, "intel-rapl:1", 4_000_000)
    clock[0] += 1.0
    assert list(power(OPTIONS)) == []  # the first reading again: no energy is known yet
    set_energy(powercap, "intel-rapl:1", 7_000_000)
    clock[0] += 1.0
    assert [observation.value for observation in power(OPTIONS)] == [3.0]


def test_an_unreadable_counter_is_no_package(powercap):
    set_energy(powercap, "intel-rapl:0", 0)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("no number")
    names = [package.energy_file.parent.name for package in host.packages_of(powercap)]
    assert names == ["intel-rapl:1"]


def test_a_processor_that_is_taken_away_is_left_out(monkeypatch):
    cpu = host.CpuUtilization()
    times = psutil.cpu_times(percpu=True)
    monkeypatch.setattr(host.psutil, "cpu_times", lambda percpu: [times[0]._replace(user=1e9)])
    assert {observation.attributes["cpu.logical_number"] for observation in cpu(OPTIONS)} == {0}
