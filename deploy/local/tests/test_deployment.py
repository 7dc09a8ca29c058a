from pathlib import Path

import pytest
from icos_fl_local import monitoring
from icos_fl_local.deployment import (
    PAGE,
    Deployment,
    assign_ports,
    component_names,
    metrics_names,
)
from icos_fl_local.errors import UsageError
from icos_fl_local.state import StateFolder
from ruamel.yaml import YAML

COMPONENTS = component_names(["a", "b"], ["forecaster", "controller-page"])
NAMES = [*COMPONENTS, PAGE, *metrics_names(COMPONENTS)]


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(StateFolder(tmp_path), ("a", "b"), assign_ports(NAMES, {}))


def test_every_component_has_ports_of_its_own() -> None:
    ports = assign_ports(NAMES, {"bridge": 4317})
    assert list(ports) == NAMES
    assert len(set(ports.values())) == len(NAMES)
    assert ports["bridge"] == 4317


def test_a_port_for_an_unknown_component_is_refused() -> None:
    with pytest.raises(UsageError, match="no such component; there are: valkey, metadata"):
        assign_ports(NAMES, {"redis": 6379})


def test_components_come_after_those_that_they_need(deployment: Deployment) -> None:
    started: set[str] = set()
    for component in deployment.components(Path("bridge.yaml"), recorded=False):
        assert set(component.after) <= started
        started.add(component.name)
    assert started == set(COMPONENTS)


def test_the_forecasters_page_is_where_it_is_said_to_be(deployment: Deployment) -> None:
    components = deployment.components(Path("bridge.yaml"), recorded=True)
    (forecaster,) = (each for each in components if each.name == "forecaster")
    assert deployment.page == f"http://{forecaster.env['ICOS_FL_FORECASTER_PAGE_ADDRESS']}/"
    assert PAGE not in deployment.names


def test_the_controllers_page_shows_the_runs_of_the_deployment(deployment: Deployment) -> None:
    components = deployment.components(Path("bridge.yaml"), recorded=True)
    (page,) = (each for each in components if each.name == "controller-page")
    assert deployment.controller_page == f"http://{page.env['ICOS_FL_PAGE_LISTEN_ADDRESS']}/"
    assert page.env["ICOS_FL_PAGE_RUNS"] == str(deployment.state.runs)
    assert page.env["ICOS_FL_PAGE_SUPERLINK"] == deployment.address("superlink")


@pytest.mark.parametrize(
    ("interval_seconds", "horizons"),
    [(15, "60s,300s,3600s"), (300, "300s,3600s"), (7, "63s,301s,3598s"), (7200, "7200s")],
)
def test_what_is_forecast_is_whole_steps_ahead(
    deployment: Deployment, interval_seconds: float, horizons: str
) -> None:
    forecaster = next(
        component
        for component in deployment.components(
            Path("bridge.yaml"), recorded=True, interval_seconds=interval_seconds
        )
        if component.name == "forecaster"
    )
    assert forecaster.env["ICOS_FL_FORECASTER_HORIZONS"] == horizons


def test_prometheus_scrapes_whoever_is_given_an_address_for_it(deployment: Deployment) -> None:
    monitoring.write(deployment, "replay")
    document = YAML(typ="safe").load(deployment.state.prometheus)
    steady, run = document["scrape_configs"]
    scraped = {target for static in steady["static_configs"] for target in static["targets"]}
    addresses = [
        value
        for component in deployment.components(Path("bridge.yaml"), recorded=True)
        for name, value in component.env.items()
        if name.endswith("_METRICS_ADDRESS")
    ]
    assert sorted(addresses) == sorted(scraped)
    assert len(scraped) == 8
    (static,) = run["static_configs"]
    assert static["targets"] == [deployment.address("metrics-run")]


def test_prometheus_knows_which_supernode_is_whose(deployment: Deployment) -> None:
    monitoring.write(deployment, "host")
    document = YAML(typ="safe").load(deployment.state.prometheus)
    labels = [static["labels"] for static in document["scrape_configs"][0]["static_configs"]]
    assert {"service": "supernode", "node": "b", "source": "host"} in labels


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
