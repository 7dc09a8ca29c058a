"""The compose files as they are written: what a service may do, who reaches whom, the settings."""

import importlib.util
import json
import re
import sys
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from icos_fl_client.serving.settings import ForecasterSettings
from icos_fl_local import certs
from icos_fl_server.page.settings import PageSettings
from icos_fl_service.security import is_loopback
from icos_fl_service.settings import load as load_settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy/compose"
DEPLOYMENTS = ("controller", "hybrid", "node", "single-node")
PROFILES = {"hybrid": ("site", "sensor")}
SOURCES = ("host", "power", "replay")
STORE = {"kv", "metadata", "backend", "proxy"}


def load(path: Path, name: str) -> ModuleType:
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


run = load(COMPOSE / "run", "icos_fl_compose_run")
images = load(ROOT / "deploy/images/images.py", "icos_fl_images")


@cache
def content(deployment: str, source: str = "host") -> dict[str, Any]:
    profiles = PROFILES.get(deployment, ())
    settings = {"ICOS_FL_SOURCE": source, "COMPOSE_PROFILES": ",".join(profiles)}
    return run.resolved(run.compose_files(deployment, COMPOSE, settings), profiles)


def sources(deployment: str) -> tuple[str, ...]:
    text = (COMPOSE / deployment / "settings.env").read_text()
    return tuple(s for s in SOURCES if re.search(rf"^#.*\b{s}: ", text, re.M))


def services() -> dict[str, dict[str, Any]]:
    return {
        f"{deployment}/{name}": service
        for deployment in DEPLOYMENTS
        for source in sources(deployment) or ("host",)
        for name, service in content(deployment, source)["services"].items()
    }


SERVICES = services()


def test_every_folder_is_a_deployment():
    assert [*DEPLOYMENTS] == run.DEPLOYMENTS
    assert {"node/scaphandre", "node/replay", "controller/gateway"} < SERVICES.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_needs(name):
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "network_mode", "ipc"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_and_is_started_again(name):
    service = SERVICES[name]
    assert service.keys() > {"cpus", "mem_limit", "pids_limit", "stop_grace_period", "logging"}
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_of_one_version_and_has_a_health_check(name):
    image = re.fullmatch(
        r"\$\{ICOS_FL_IMAGES\}/([a-z-]+):\$\{ICOS_FL_VERSION_([A-Z_]+)\}", SERVICES[name]["image"]
    )
    assert image
    built = images.IMAGES[image[1]]
    assert image[2] == image[1].upper().replace("-", "_")
    settings = run.dotenv_values(COMPOSE / name.split("/")[0] / "settings.env")
    assert settings[f"ICOS_FL_VERSION_{image[2]}"] == built.version()
    assert (
        "healthcheck" in SERVICES[name]
        or "\nHEALTHCHECK" in (ROOT / built.folder / "Dockerfile").read_text()
    )


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_needs_is_there_and_healthy_first(name):
    deployment, _, _ = name.partition("/")
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        assert f"{deployment}/{needed}" in SERVICES
        assert how == {"condition": "service_healthy"}


def test_a_store_starts_in_its_order():
    needs = {n: [*s.get("depends_on", {})] for n, s in content("node")["services"].items()}
    order = [name for level in run.levels(needs) for name in level]
    assert sorted(order) == sorted(needs)
    starts = ["kv", "metadata", "backend", "processor", "supernode-superexec"]
    assert sorted(starts, key=order.index) == starts


def on(deployment: str, network: str, source: str = "host") -> set[str]:
    return {
        n for n, s in content(deployment, source)["services"].items() if network in s["networks"]
    }


def inner(deployment: str) -> set[str]:
    """Networks that lead nowhere."""
    networks = content(deployment)["networks"]
    return {name for name, network in networks.items() if network.get("internal")}


@pytest.mark.parametrize("deployment", ["node", "single-node"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_store_is_reached_by_who_needs_it(deployment, source):
    assert on(deployment, "data", source) == STORE | {
        "otlp-bridge",
        "processor",
        "forecaster",
        "supernode-superexec",
    }


@pytest.mark.parametrize("deployment", ["hybrid", "node", "single-node"])
def test_the_store_is_on_its_network_alone(deployment):
    assert "data" in inner(deployment)
    for name in STORE:
        assert [*content(deployment)["services"][name]["networks"]] == ["data"]


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_supernode_leaves_a_node(source):
    assert inner("node") == {"data", "collect", "tasks"}
    assert on("node", "out", source) == {"supernode"}
    assert "data" not in content("node", source)["services"]["supernode"]["networks"]


def test_a_single_node_leads_nowhere():
    assert inner("single-node") == content("single-node")["networks"].keys()


def test_the_gateway_alone_is_seen_of_a_controller():
    assert inner("controller") == {"control"}
    assert on("controller", "out") == {"gateway"}


def test_a_site_is_reached_at_its_bridge_and_left_by_its_supernodes():
    assert inner("hybrid") == {"data", "collect", "tasks"}
    assert on("hybrid", "in") == {"otlp-bridge"}
    assert on("hybrid", "out") == {"supernode-1", "supernode-2", "collector"}


def test_ports_are_published_by_the_gateway_and_a_sites_bridge_alone():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {
        "controller/gateway",
        "hybrid/otlp-bridge",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_insecure(name):
    assert "insecure" not in json.dumps(SERVICES[name]).lower()


def test_a_stranger_needs_a_key_or_a_certificate_wherever_it_comes():
    superlink = content("controller")["services"]["superlink"]
    assert "--enable-supernode-auth" in superlink["command"]
    assert "--isolation=process" in superlink["entrypoint"]
    assert "--superexec-auth-secret-file=/run/secrets/superexec.secret" in superlink["entrypoint"]
    for deployment in ("node", "hybrid", "single-node"):
        for service, prefix in (("otlp-bridge", "BRIDGE"), ("processor", "PROCESSOR")):
            environment = content(deployment)["services"][service]["environment"]
            assert environment[f"ICOS_FL_{prefix}_TLS__CLIENT_CA"] == "/run/secrets/ca.pem"


@pytest.mark.parametrize("name", [name for name in SERVICES if name.endswith("/forecaster")])
def test_a_forecaster_shows_rows_in_its_own_container_alone(name, monkeypatch):
    """By its own reading of what it is given, which refuses what it does not know."""
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(ForecasterSettings)
    assert settings.page_address
    assert all(is_loopback(address) for address in settings.addresses())


def test_who_follows_the_readme_needs_tls_and_a_token_for_the_page(tmp_path, monkeypatch):
    readme = (COMPOSE / "README.md").read_text()
    [override] = re.findall(r"^```yaml\n(services:\n  forecaster:\n.*?)^```$", readme, re.M | re.S)
    (tmp_path / "compose.override.yaml").write_text(override)
    together = run.resolved(run.compose_files("node", tmp_path, {}))
    forecaster = together["services"]["forecaster"]
    for variable, value in forecaster["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(ForecasterSettings)
    assert [is_loopback(address) for address in settings.addresses()] == [True, False]
    assert settings.tls.certificate
    assert settings.tokens
    assert forecaster["networks"].keys() == {"data", "page"}
    assert not together["networks"]["page"]


def test_a_page_of_runs_is_in_its_own_container_alone_and_only_reads_them(monkeypatch):
    page = SERVICES["controller/page"]
    for variable, value in page["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(PageSettings)
    assert all(is_loopback(address) for address in settings.addresses())
    assert f"superlink-superexec:{settings.runs}:ro" in page["volumes"]
    assert SERVICES["single-node/page"]["environment"] == page["environment"]


def test_who_follows_the_readme_needs_tls_and_a_token_for_the_page_of_runs(tmp_path, monkeypatch):
    readme = (COMPOSE / "README.md").read_text()
    [override] = re.findall(r"^```yaml\n(services:\n  page:\n.*?)^```$", readme, re.M | re.S)
    (tmp_path / "compose.override.yaml").write_text(override)
    page = run.resolved(run.compose_files("controller", tmp_path, {}))["services"]["page"]
    for variable, value in page["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings(PageSettings)
    assert (settings.listen_address, settings.runs) == ("0.0.0.0:8091", Path("/var/lib/icos-fl"))
    assert settings.tls.certificate
    assert settings.tokens
    assert page["networks"].keys() == {"control", "page"}


@pytest.mark.parametrize("source", SOURCES)
def test_times_of_recorded_rows_are_compared_with_no_clock(source):
    services = content("node", source)["services"]
    recorded = {name for name, s in services.items() if "RECORDED" in json.dumps(s)}
    assert recorded == ({"processor", "forecaster"} if source == "replay" else set())


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_its_settings_are_those_that_it_reads(deployment):
    read = {"ICOS_FL_SOURCE"} if sources(deployment) else set()
    for source in sources(deployment) or ("host",):
        read |= run.variables(content(deployment, source))
    if deployment in PROFILES:
        read.add("COMPOSE_PROFILES")
    settings = run.dotenv_values(COMPOSE / deployment / "settings.env")
    assert settings.keys() == read - {"ICOS_FL_COMPOSE", "ICOS_FL_FOLDER"}


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_each_block_of_settings_says_what_it_is(deployment):
    blocks = (COMPOSE / deployment / "settings.env").read_text().split("\n\n")
    assert all(block.startswith("#") and "\n" in block for block in blocks[1:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir()
    (tmp_path / "node/node.env").write_text("ICOS_FL_NODE_NAME=a\nICOS_FL_NODE_SUPERLINK=b:1\n")
    return tmp_path


def test_the_environment_is_over_the_folders_settings_and_those_over_the_shipped(folder):
    (folder / "settings.env").write_text("ICOS_FL_IMAGES=x\nICOS_FL_TRAINING_CPUS=3\n")
    settings = run.read_settings("node", folder, {"ICOS_FL_IMAGES": "y", "PATH": "z"})
    assert settings["ICOS_FL_IMAGES"] == "y"
    assert settings["ICOS_FL_TRAINING_CPUS"] == "3"
    assert settings["ICOS_FL_TRAINING_MEMORY"] == "4g"
    assert settings["ICOS_FL_NODE_NAME"] == "a"
    assert settings["ICOS_FL_BRIDGE_CONFIG"] == str(COMPOSE / "bridge.yaml")
    assert "PATH" not in settings


def test_an_unknown_name_in_the_environment_stops_the_start(folder):
    with pytest.raises(run.Refused) as refused:
        run.read_settings("node", folder, {"ICOS_FL_TRAINING_CPU": "1"})
    assert str(refused.value) == (
        "the environment: ICOS_FL_TRAINING_CPU: no such setting; is it ICOS_FL_TRAINING_CPUS?"
    )


def test_an_unknown_name_in_the_file_stops_the_start(folder):
    (folder / "settings.env").write_text("TRAINING=1\n")
    with pytest.raises(run.Refused) as refused:
        run.read_settings("node", folder, {})
    assert str(refused.value) == f"{folder}/settings.env: TRAINING: no such setting"


def test_a_line_that_is_no_setting_stops_the_start(folder):
    (folder / "settings.env").write_text("ICOS_FL_IMAGES\n")
    with pytest.raises(run.Refused, match="ICOS_FL_IMAGES: not of the form NAME=VALUE"):
        run.read_settings("node", folder, {})


def test_a_setting_without_a_value_stops_the_start(folder):
    (folder / "node/node.env").unlink()
    settings = run.read_settings("node", folder, {})
    with pytest.raises(run.Refused, match="ICOS_FL_NODE_NAME has no value"):
        run.check_values(content("node"), settings)


SENSOR = {
    "ICOS_FL_NODE_NAME": "a",
    "ICOS_FL_COLLECTOR_BRIDGE": "b:1",
    "COMPOSE_PROFILES": "sensor",
}


def test_what_is_not_started_needs_no_value(tmp_path):
    settings = run.read_settings("hybrid", tmp_path, SENSOR)
    files = run.compose_files("hybrid", tmp_path, settings)
    sensor = run.resolved(files, [settings["COMPOSE_PROFILES"]])
    run.check_values(sensor, settings)
    assert [*sensor["services"]] == ["collector"]


def test_an_unknown_source_stops_the_start(tmp_path):
    with pytest.raises(run.Refused, match="ICOS_FL_SOURCE=sun: there are host, power, replay"):
        run.compose_files("node", tmp_path, {"ICOS_FL_SOURCE": "sun"})


def test_a_source_that_its_settings_do_not_tell_of_stops_the_start(tmp_path):
    with pytest.raises(run.Refused, match="ICOS_FL_SOURCE=replay: there are host, power"):
        run.compose_files("hybrid", tmp_path, SENSOR | {"ICOS_FL_SOURCE": "replay"})


@pytest.mark.parametrize(("profile", "measures"), [("site", False), ("sensor", True)])
def test_a_source_is_of_the_machine_that_measures(tmp_path, profile, measures):
    settings = {"ICOS_FL_SOURCE": "power", "COMPOSE_PROFILES": profile}
    services = run.resolved(run.compose_files("hybrid", tmp_path, settings), [profile])["services"]
    assert ("scaphandre" in services) is measures


def test_scaphandre_sees_the_counters_where_engines_do_not_hide_them():
    scaphandre = content("node", "power")["services"]["scaphandre"]
    path = scaphandre["environment"]["SCAPHANDRE_POWERCAP_PATH"]
    assert path == "/host/sys/class/powercap"
    assert scaphandre["command"][0] == "--vm"
    assert set(scaphandre["volumes"]) == {
        f"{folder}:/host{folder}:ro"
        for folder in ("/sys/class/powercap", "/sys/devices/virtual/powercap")
    }


@pytest.mark.parametrize("profile", ["", "sites", "site,sun"])
def test_a_profile_that_no_service_has_stops_the_start(profile):
    settings = {"COMPOSE_PROFILES": profile}
    files = run.compose_files("hybrid", COMPOSE, settings)
    with pytest.raises(run.Refused) as refused:
        run.resolved(files, run.profiles_of(settings))
    assert str(refused.value) == f"COMPOSE_PROFILES={profile}: one or more of sensor, site"


def test_a_line_of_settings_that_cannot_be_read_stops_the_start(folder):
    (folder / "settings.env").write_text("ICOS_FL_IMAGES='x\n")
    with pytest.raises(run.Refused, match="ICOS_FL_IMAGES='x: not of the form NAME=VALUE"):
        run.read_settings("node", folder, {})
    (folder / "settings.env").write_bytes(b"\xff\n")
    with pytest.raises(run.Refused, match=r"settings\.env: cannot be read: 'utf-8'"):
        run.read_settings("node", folder, {})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("services: [a]", "services must be a mapping of mappings"),
        ("services: {a: }", "services must be a mapping of mappings"),
        ("services: {a: [", "while parsing a flow node"),
        ("services: {a: {extends: kv}}", "a extends kv: no file and service of it"),
        ("services: {a: {extends: {file: b.yaml, service: c}}}", "b.yaml: cannot be read"),
    ],
)
def test_an_override_that_is_no_compose_file_stops_the_start(tmp_path, override, told):
    (tmp_path / "compose.override.yaml").write_text(override)
    with pytest.raises(run.Refused, match=told):
        run.resolved(run.compose_files("node", tmp_path, {}))


def test_an_override_may_read_the_environment_or_have_a_default(tmp_path):
    text = 'services: {kv: {environment: ["A=${PROXY}", "B=${NONE:-x}", "C=$${NOT}"]}}'
    (tmp_path / "compose.override.yaml").write_text(text)
    kv = run.resolved(run.compose_files("node", tmp_path, {}))["services"]["kv"]
    assert "ICOS_FL_STORE_HOST" in kv["environment"]
    alone = {"services": {"kv": {"environment": kv["environment"]}}}
    with pytest.raises(run.Refused, match="PROXY has no value"):
        run.check_values(alone, {})
    run.check_values(alone, {"PROXY": "x"})


@pytest.mark.parametrize("name", ["My Node", "Edge", "-a", "a.b"])
def test_a_folder_whose_name_is_no_projects_stops_the_start(name):
    with pytest.raises(run.Refused, match="the folder's name is the project's"):
        run.check_project(Path("/tmp", name))


CERTIFICATES = {
    "controller": ("controller",),
    "hybrid": ("node",),
    "node": ("node",),
    "single-node": ("controller", "node"),
}


def with_certificates(folder: Path, deployment: str) -> dict[str, str]:
    """Settings of a *folder* that has what ``icos-fl certs`` and ``icos-fl node join`` make."""
    for what in CERTIFICATES[deployment]:
        certs.make(folder / "certs", what, ["localhost"], [], 1, -1)
    (folder / "certs/superexec.secret").touch()
    for node in ("node", "node-1", "node-2"):
        (folder / node).mkdir(exist_ok=True)
        for name in ("supernode.key", "gateway-ca.pem"):
            (folder / node / name).touch()
    return run.read_settings(deployment, folder, {})  # type: ignore[no-any-return]


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_with_what_icos_fl_makes_nothing_is_missing(tmp_path, deployment):
    settings = with_certificates(tmp_path, deployment)
    run.check_files(content(deployment), settings)


def test_a_certificate_that_is_not_there_stops_the_start(folder):
    settings = with_certificates(folder, "node")
    (folder / "certs/fl-client.key").unlink()
    with pytest.raises(run.Refused) as refused:
        run.check_files(content("node"), settings)
    assert str(refused.value) == (
        f"forecaster needs {folder}/certs/fl-client.key, which is not there; 'icos-fl certs "
        "controller' or 'node', with --uid 10001, makes it"
    )


def test_a_folder_that_is_not_there_stops_the_start(folder):
    settings = with_certificates(folder, "node") | {"ICOS_FL_BRIDGE_CONFIG": "/nowhere/bridge.yaml"}
    with pytest.raises(run.Refused, match=r"otlp-bridge needs /nowhere/bridge\.yaml"):
        run.check_files(content("node"), settings)


def test_what_is_not_healthy_stops_those_alone_that_need_it():
    started = []

    class Recorded(run.Compose):
        def _start(self, content, services):
            started.extend(services)
            return {"scaphandre", "proxy", "processor"} & {*services}

    compose = Recorded("podman", [], {})
    assert compose.up(json.loads(json.dumps(content("node", "power"))), []) == 1
    everything = content("node", "power")["services"].keys()
    assert everything - {*started} == {"supernode-superexec"}


def test_a_service_that_is_not_there_is_not_started():
    compose = run.Compose("podman", [], {})
    assert compose.up(json.loads(json.dumps(content("node"))), ["bridge"]) == 2


def test_files_are_merged_as_compose_does():
    base = {
        "volumes": ["a:/x", "b:/y:ro", "c:/z"],
        "command": ["1", "2"],
        "environment": {"A": "1"},
        "ports": ["1:1"],
    }
    over = {
        "volumes": ["c:/y:ro", "d:/w", {"source": "e", "target": "/z"}],
        "command": ["3"],
        "environment": ["B=2", "C"],
        "ports": ["2:2"],
    }
    assert run.merged(base, over) == {
        "volumes": ["a:/x", "c:/y:ro", "d:/w", {"source": "e", "target": "/z"}],
        "command": ["3"],
        "environment": {"A": "1", "B": "2", "C": None},
        "ports": ["1:1", "2:2"],
    }
