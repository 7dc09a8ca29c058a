"""What --source collector starts, and when Scaphandre can measure."""

import socket
from pathlib import Path

import pytest
from icos_fl_local import monitoring, sources
from icos_fl_local.deployment import Deployment, assign_ports, component_names, metrics_names
from icos_fl_local.errors import LocalError
from icos_fl_local.sources import Power, Sources, power_of
from icos_fl_local.state import StateFolder
from icos_fl_local.status import is_listening
from icos_fl_local.supervisor import Component


@pytest.fixture
def counters(tmp_path: Path) -> Path:
    """A folder with an energy counter."""
    zone = tmp_path / "counters" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text("1\n")
    return zone.parent


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    path = tmp_path / "modules"
    path.touch()
    return path


def test_rapl_needs_no_option(counters, modules, tmp_path):
    assert power_of(counters, tmp_path / "none", modules).options == ()


def test_counters_that_a_hypervisor_shares_are_read_with_vm(counters, modules, tmp_path):
    assert power_of(tmp_path / "none", counters, modules).options == ("--vm",)


def test_without_counters_there_is_no_power(modules, tmp_path):
    power = power_of(tmp_path / "none", tmp_path, modules)
    assert power.options is None
    assert power.found == (
        f"no energy counter can be read in {tmp_path / 'none'} or {tmp_path}: no power"
    )


def test_without_a_list_of_modules_scaphandre_would_end(counters, tmp_path):
    power = power_of(counters, counters, tmp_path / "none")
    assert power == Power(None, f"no {tmp_path / 'none'}, which Scaphandre needs: no power")


def deployment_of(found: Sources, folder: Path) -> Deployment:
    names = component_names(["a"], found.names)
    ports = assign_ports([*names, *metrics_names(names)], {})
    return Deployment(StateFolder(folder), ("a",), ports)


def components(found: Sources, folder: Path) -> dict[str, Component]:
    return {
        component.name: component for component in found.components(deployment_of(found, folder))
    }


def test_without_power_the_collector_runs_alone(tmp_path):
    found = Sources(Path("/otelcol"), None, Power(None, ""))
    (name,) = started = components(found, tmp_path)
    assert name == "collector"
    assert [Path(word).name for word in started[name].command] == ["otelcol", "config.yaml"]
    assert started[name].env["ICOS_FL_NODE"] == "a"
    assert "ICOS_FL_SCAPHANDRE_ADDRESS" not in started[name].env


def test_with_power_the_collector_scrapes_the_scaphandre_that_is_started(tmp_path):
    found = Sources(Path("/otelcol"), Path("/scaphandre"), Power(("--vm",), ""))
    started = components(found, tmp_path)
    assert list(started) == ["scaphandre", "collector"]
    scaphandre, collector = started["scaphandre"], started["collector"]
    assert scaphandre.command[:3] == ("/scaphandre", "--vm", "prometheus")
    files = [Path(word).name for word in collector.command]
    assert files == ["otelcol", "config.yaml", "power.yaml"]
    assert collector.env["ICOS_FL_SCAPHANDRE_ADDRESS"] == f"127.0.0.1:{scaphandre.port}"


@pytest.mark.parametrize("asks", ["up", "status"])
def test_whether_scaphandre_runs_is_seen_at_its_port_and_nothing_is_requested(tmp_path, asks):
    """A request for its /metrics that is not the Collector's would freeze its values."""
    scaphandre = components(Sources(Path("/o"), Path("/s"), Power((), "")), tmp_path)["scaphandre"]
    with socket.create_server(("127.0.0.1", scaphandre.port)) as listener:
        if asks == "up":
            assert scaphandre.ready()
        else:
            assert is_listening(scaphandre.port)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            assert connection.recv(1) == b""


def test_a_deployments_prometheus_does_not_scrape_scaphandre(tmp_path):
    deployment = deployment_of(Sources(Path("/o"), Path("/s"), Power((), "")), tmp_path)
    monitoring.write(deployment, "collector")
    written = deployment.state.prometheus.read_text()
    assert deployment.address("metrics-bridge") in written
    assert deployment.address("scaphandre") not in written


def test_a_collector_that_is_not_built_is_told_with_the_command_that_builds_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ICOS_FL_CACHE_DIR", str(tmp_path))
    with pytest.raises(LocalError, match=r"not built; run .*/deploy/build-sources once"):
        sources.find()
