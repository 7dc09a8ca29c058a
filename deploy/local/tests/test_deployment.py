from pathlib import Path

import pytest
from icos_fl_local.deployment import Deployment, assign_ports, component_names
from icos_fl_local.errors import UsageError
from icos_fl_local.state import StateFolder

NAMES = component_names(["a", "b"])


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(StateFolder(tmp_path), ("a", "b"), assign_ports(NAMES, {}))


def test_every_component_has_a_port_of_its_own() -> None:
    ports = assign_ports(NAMES, {"bridge": 4317})
    assert list(ports) == NAMES
    assert len(set(ports.values())) == len(NAMES)
    assert ports["bridge"] == 4317


def test_a_port_for_an_unknown_component_is_refused() -> None:
    with pytest.raises(UsageError, match="no such component; there are: valkey, metadata"):
        assign_ports(NAMES, {"redis": 6379})


def test_components_come_after_those_that_they_need(deployment: Deployment) -> None:
    started: set[str] = set()
    for component in deployment.components(Path("bridge.yaml")):
        assert set(component.after) <= started
        started.add(component.name)
    assert started == set(NAMES)


def test_settings_of_the_shell_do_not_reach_the_components(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICOS_FL_BRIDGE_PORT", "1")
    monkeypatch.setenv("DATACLAY_KV_HOST", "elsewhere")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    env = deployment.env()
    assert "ICOS_FL_BRIDGE_PORT" not in env
    assert "DATACLAY_KV_HOST" not in env
    assert env["FLWR_HOME"] == str(deployment.state.flower)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"


def test_without_home_the_state_folder_is_home(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert deployment.env()["HOME"] == str(deployment.state.folder)
