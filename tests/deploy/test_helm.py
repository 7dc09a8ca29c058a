"""The chart as helm renders it: schemas of Kubernetes, what is closed, what services know."""

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from flwr.common.config import parse_config_args
from icos_fl_client.serving.settings import ForecasterSettings
from icos_fl_client.settings import NodeConfig
from icos_fl_otlp_bridge.settings import BridgeSettings
from icos_fl_processor.settings import ProcessorSettings
from icos_fl_server.enrolment.settings import EnrolmentSettings
from icos_fl_server.page.settings import PageSettings
from icos_fl_service.settings import load
from icos_fl_timeseries_store.services import ServiceSettings
from icos_fl_warm_runtime.metrics import RuntimeSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/icos-fl"
EXAMPLES = sorted(path.stem for path in CHART.glob("examples/*.yaml"))
PODS = {
    "controller": {"controller"},
    "node": {"collect", "data", "out"},
    "single-node": {"controller", "collect", "data", "out"},
    "hybrid": {"collect", "data", "out", "store"},
}
"""Of each example, the pods by their component."""
COMPONENT = "app.kubernetes.io/component"
STORE_PORTS = {6379, 16587, 6867, 8676}
SETTINGS = {
    "ICOS_FL_BRIDGE_LOG_LEVEL": "DEBUG",
    "ICOS_FL_BRIDGE_MAX_CONCURRENT_EXPORTS": "4",
    "ICOS_FL_BRIDGE_MAX_MESSAGE_BYTES": "4194304",
    "ICOS_FL_BRIDGE_STORE__TIMEOUT_SECONDS": "5",
    "ICOS_FL_PROCESSOR_MAX_MESSAGE_BYTES": "8388608",
    "ICOS_FL_PROCESSOR_RECORDED": "true",
    "ICOS_FL_PROCESSOR_STORE__TIMEOUT_SECONDS": "5",
    "ICOS_FL_PROCESSOR_WATCHERS_MAX": "8",
    "ICOS_FL_FORECASTER_HORIZONS": "1m\\,10m",
    "ICOS_FL_FORECASTER_INTERVAL_SECONDS": "30",
    "ICOS_FL_FORECASTER_METRICS": "cpu_usage",
    "ICOS_FL_FORECASTER_RECORDED": "true",
    "ICOS_FL_FORECASTER_STORE__TIMEOUT_SECONDS": "5",
    "ICOS_FL_FORECASTER_WATCHERS_MAX": "8",
    "ICOS_FL_STORE_LOG_LEVEL": "INFO",
    "ICOS_FL_COLLECTOR_BATCH_TIMEOUT": "10s",
}
"""Each that the chart passes on, with a value as helm takes it."""
EVERYTHING = (
    "metrics.enabled=true",
    "expectations=late_seconds = 60",
    *(f"settings.{name}={value}" for name, value in SETTINGS.items()),
)
Object = dict[str, Any]


@functools.cache
def helm() -> str:
    build = [ROOT / "deploy/build-sources", "--check", "helm"]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        message = f"THE CHART WAS NOT TESTED: {done.stderr.strip()}"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    return done.stdout.strip().removeprefix("helm=")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], cwd=CHART, capture_output=True, text=True)


def options(example: str, *values: str) -> list[str]:
    """Of helm, for an example with other values in it."""
    chosen = ["-f", f"examples/{example}.yaml"]
    for value in values:
        is_text = value.startswith(("settings.", "images."))
        chosen += ["--set-string" if is_text else "--set", value]
    return chosen


@functools.cache
def text(example: str, *values: str) -> str:
    """What helm makes of it."""
    done = run("template", "fl", ".", "-n", "icos-fl", *options(example, *values))
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def objects(example: str, *values: str) -> list[Object]:
    return [one for one in yaml.safe_load_all(text(example, *values)) if one]


def kind(what: str, example: str, *values: str) -> list[Object]:
    return [one for one in objects(example, *values) if one["kind"] == what]


def pods(example: str, *values: str) -> dict[str, Object]:
    """The spec of each pod, by its component."""
    found = kind("DaemonSet", example, *values) + kind("StatefulSet", example, *values)
    return {one["spec"]["template"]["metadata"]["labels"][COMPONENT]: one for one in found}


def specs(example: str, *values: str) -> dict[str, Object]:
    return {name: one["spec"]["template"]["spec"] for name, one in pods(example, *values).items()}


def containers(example: str, *values: str) -> Iterator[tuple[str, Object]]:
    """Each container, also those that run before others, by its pod's component and its name."""
    for component, spec in specs(example, *values).items():
        for container in spec.get("initContainers", []) + spec["containers"]:
            yield f"{component}/{container['name']}", container


def environment(container: Object) -> dict[str, str]:
    return {each["name"]: each.get("value", "edge-1") for each in container.get("env", [])}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> str:
    return request.param


def test_helm_finds_nothing_wrong(example):
    done = run("lint", "--strict", ".", *options(example))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_every_object_fits_the_schemas_of_kubernetes(example, version):
    """Of the oldest that the chart takes, and of the newest that is known here."""
    for one in objects(example, *EVERYTHING):
        kubernetes_validate.validate(one, version, strict=True)
    assert PODS[example] == set(pods(example))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("gatewy=fl.example.org:8443", "gatewy"),
        ("node.stateFoldr=/srv", "stateFoldr"),
        ("controller.service.prt=1", "prt"),
        ("settings.ICOS_FL_BRIDGE_LOG_LEVL=INFO", "ICOS_FL_BRIDGE_LOG_LEVL"),
        ("images.tags.procesor=0.2.0", "procesor"),
        ("resources.bridge.limits.cpu=1", "bridge"),
        ("node.nodeSelector=edge", "/node/nodeSelector"),
        ("node.power=yes", "/node/power"),
        ("node.store=central", "/node/store"),
        ("settings.ICOS_FL_BRIDGE_LOG_LEVEL=LOUD", "/settings/ICOS_FL_BRIDGE_LOG_LEVEL"),
        ("gateway=https://fl.example.org", "/gateway"),
        ("node.stateFolder=relative", "/node/stateFolder"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(value, named):
    done = run("template", ".", *options("single-node", value))
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["gateway=fl.example.org:8443"], "say controller.enabled, node.enabled, or both"),
        (["node.enabled=true"], "gateway: host:port by which nodes reach"),
    ],
)
def test_what_is_needed_is_named(values, reason):
    done = run("template", ".", *(part for value in values for part in ("--set", value)))
    assert done.returncode != 0
    assert reason in done.stderr


def test_every_value_is_documented_with_its_default():
    """A name of the schema that values.yaml does not have could be set, but not be found."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def names(properties: Object, found: Object, path: str) -> Iterator[tuple[str, bool]]:
        for name, one in properties.items():
            here = f"{path}.{name}"
            yield here, name in found
            inner = one.get("properties")
            if inner and here != ".settings":
                yield from names(inner, found.get(name) or {}, here)

    missing = [name for name, there in names(schema["properties"], values, "") if not there]
    assert missing == [".global"]
    assert set(SETTINGS) == set(schema["properties"]["settings"]["properties"])
    for name in SETTINGS:
        prefix, rest = re.match(r"(ICOS_FL_[A-Z]+_)(.*)", name).groups()
        line = re.search(rf"^#   {prefix}  ?.*$", (CHART / "values.yaml").read_text(), re.M)
        assert line, prefix
        assert rest in re.split(r"[ ,]+", line.group())


def test_images_are_of_the_packages_versions():
    tags = yaml.safe_load((CHART / "values.yaml").read_text())["images"]["tags"]
    project = {
        name: tomllib.loads((ROOT / f"packages/{name}/pyproject.toml").read_text())["project"]
        for name in ("otlp-bridge", "timeseries-store", "processor", "fl-server", "fl-client")
    }
    built = (ROOT / "deploy/otel-collector/builder.yaml").read_text()
    sources = {
        "otel-collector": re.search(r"\d+\.\d+\.\d+", built).group(),
        "scaphandre": (ROOT / "deploy/scaphandre/version").read_text().strip(),
        "gateway": (ROOT / "deploy/gateway/version").read_text().strip(),
    }
    assert {name: one["version"] for name, one in project.items()} | sources == tags


@pytest.mark.parametrize(
    ("image", "changed"),
    [
        ("otlp-bridge", {"data"}),
        ("timeseries-store", {"data"}),
        ("processor", {"data"}),
        ("fl-server", {"controller"}),
        ("fl-client", {"data", "out"}),
        ("otel-collector", {"collect"}),
        ("scaphandre", {"collect"}),
        ("gateway", {"controller"}),
    ],
)
def test_an_upgraded_image_starts_no_other_pod_anew(image, changed):
    before = pods("single-node", "node.power=true")
    after = pods("single-node", "node.power=true", f"images.tags.{image}=9.9.9")
    templates = {name: one["spec"]["template"] for name, one in before.items()}
    assert changed == {
        name for name, one in after.items() if one["spec"]["template"] != templates[name]
    }


def test_an_upgraded_chart_starts_no_pod_anew(example):
    for name, one in pods(example).items():
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"] == labels, name


def test_no_container_is_root_or_can_become_it(example):
    for component, spec in specs(example).items():
        assert spec["securityContext"]["runAsNonRoot"], component
        assert spec["securityContext"]["runAsUser"] == 10001, component
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, component
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), component
    closed = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    for name, container in containers(example):
        assert closed == container["securityContext"], name


def test_no_pod_has_a_token_of_kubernetes(example):
    for component, spec in specs(example).items():
        assert spec["automountServiceAccountToken"] is False, component


def test_kubernetes_sets_no_variables_that_services_refuse(example):
    """It would, of Services that have names such as those of our settings."""
    for component, spec in specs(example).items():
        assert spec["enableServiceLinks"] is False, component


def test_every_container_has_limits_and_tells_its_health(example):
    for name, container in containers(example, *EVERYTHING):
        for amounts in ("requests", "limits"):
            assert {"cpu", "memory"} == container["resources"][amounts].keys(), name
        if name != "out/setup":  # which ends
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name


def test_services_start_after_what_they_need_and_end_before_it():
    """Sidecars: init containers that go on, which Kubernetes ends in the reverse order."""
    spec = specs("node")["data"]
    assert [c["name"] for c in spec["initContainers"]] == ["kv", "metadata", "backend", "proxy"]
    assert all(c["restartPolicy"] == "Always" for c in spec["initContainers"])
    assert [c["name"] for c in spec["containers"]] == [
        "otlp-bridge",
        "processor",
        "forecaster",
        "superexec",
    ]


def test_only_the_gateway_can_be_reached_from_outside(example):
    opened = {
        one["metadata"]["name"]
        for one in kind("Service", example, "controller.service.type=NodePort")
        if one["spec"].get("type", "ClusterIP") != "ClusterIP"
    }
    assert opened == ({"fl-gateway"} if "controller" in PODS[example] else set())
    assert not {"Ingress", "HTTPRoute"} & {one["kind"] for one in objects(example)}
    for name, container in containers(example, *EVERYTHING):
        assert all("hostPort" not in port for port in container.get("ports", [])), name


def test_a_controller_is_closed_until_it_is_opened():
    [service] = [s for s in kind("Service", "single-node") if "type" in s["spec"]]
    assert service["spec"]["type"] == "ClusterIP"


def test_the_store_is_on_loopback_alone(example):
    """Whoever reaches a port of dataClay can run code in its backend."""
    for name, container in containers(example, *EVERYTHING):
        ports = {port["containerPort"] for port in container.get("ports", [])}
        assert not STORE_PORTS & ports, name
        if "/timeseries-store:" in container["image"]:
            assert environment(container)["ICOS_FL_STORE_HOST"] == "127.0.0.1", name
    for one in kind("Service", example, *EVERYTHING) + kind("NetworkPolicy", example, *EVERYTHING):
        numbers = set(map(int, re.findall(r"\d+", json.dumps(one["spec"]))))
        assert not STORE_PORTS & numbers, one["metadata"]["name"]


def test_the_superlink_enrolment_and_page_are_on_loopback_alone():
    """Strangers reach the gateway, which is in the same pod."""
    found = dict(containers("controller", *EVERYTHING))
    assert "--host=127.0.0.1" in found["controller/superlink"]["args"]
    listens = environment(found["controller/enrolment"])["ICOS_FL_ENROLMENT_LISTEN_ADDRESS"]
    assert listens == "127.0.0.1:8090"
    page = found["controller/page"]
    assert environment(page)["ICOS_FL_PAGE_LISTEN_ADDRESS"] == "127.0.0.1:8091"
    assert [port["name"] for port in page["ports"]] == ["metrics-page"]
    [service] = kind("Service", "controller")
    assert [port["port"] for port in service["spec"]["ports"]] == [8443]


@pytest.mark.parametrize("name", ["node/data", "hybrid/store"])
def test_forecasts_are_on_loopback_alone(name):
    which, component = name.split("/")
    container = dict(containers(which))[f"{component}/forecaster"]
    given = environment(container)
    assert given["ICOS_FL_FORECASTER_PAGE_ADDRESS"] == "127.0.0.1:8089"
    assert "ICOS_FL_FORECASTER_LISTEN_ADDRESS" not in given  # as it is by default
    assert not container.get("ports")


def test_the_processor_of_a_node_is_on_loopback_alone():
    container = dict(containers("node"))["data/processor"]
    assert environment(container)["ICOS_FL_PROCESSOR_LISTEN_ADDRESS"] == "127.0.0.1:50051"
    assert "ports" not in container or not container["ports"]


@pytest.mark.parametrize("metrics", ["false", "true"])
def test_metrics_are_on_loopback_unless_they_are_asked_for(example, metrics):
    values = EVERYTHING if metrics == "true" else ()
    host = "0.0.0.0" if metrics == "true" else "127.0.0.1"
    for name, container in containers(example, *values):
        for variable, value in environment(container).items():
            if variable.endswith("_METRICS_ADDRESS"):
                assert value.startswith(f"{host}:"), name


def selects(selector: Object, labels: Object) -> bool:
    return selector.get("matchLabels", selector).items() <= labels.items()


def test_what_no_policy_names_is_denied_to_every_pod(example):
    [deny] = [one for one in kind("NetworkPolicy", example) if len(one["spec"]) == 2]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for component, one in pods(example).items():
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert selects(deny["spec"]["podSelector"], labels), component


def flows(example: str, *values: str) -> set[tuple[str, str, int]]:
    """Who may talk to whom on which port, but for names: (from, to, port)."""
    found = set()
    for one in kind("NetworkPolicy", example, *values):
        me = one["spec"]["podSelector"]["matchLabels"].get(COMPONENT)
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in one["spec"].get(direction) or []:
                ports = [port["port"] for port in rule["ports"]]
                for peer in rule.get(peers, [{}]):
                    for port in ports:
                        ends = (
                            (peer_name(peer), me)
                            if direction == "ingress"
                            else (me, peer_name(peer))
                        )
                        found.add((direction, *ends, port))
    return {flow for flow in found if flow[-1] != 53}


def peer_name(peer: Object) -> str:
    if "ipBlock" in peer:
        return peer["ipBlock"]["cidr"]
    if "podSelector" in peer:
        return peer["podSelector"]["matchLabels"][COMPONENT]
    namespace = peer.get("namespaceSelector", {}).get("matchLabels", {})
    return namespace.get("kubernetes.io/metadata.name", "anybody")


def both(source: str, target: str, port: int) -> set[tuple[str, str, str, int]]:
    """What one end may send, and the other may take."""
    return {("egress", source, target, port), ("ingress", source, target, port)}


OUT = {
    ("egress", "out", "203.0.113.7/32", 8443),
    ("egress", "out", "controller", 8443),
}
OPEN = {("ingress", "anybody", "controller", 8443)}


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("controller", OPEN),
        ("node", both("collect", "data", 4317) | both("data", "out", 9094) | OUT),
        (
            "single-node",
            both("collect", "data", 4317)
            | both("data", "out", 9094)
            | {("egress", "out", "controller", 8443)}
            | OPEN,
        ),
        (
            "hybrid",
            both("collect", "store", 4317)
            | both("data", "store", 50051)
            | both("data", "out", 9094)
            | OUT,
        ),
    ],
)
def test_pods_talk_to_those_alone_that_they_need(which, expected):
    """Only the SuperNode leaves the node, and only for the gateway."""
    assert expected == flows(which)


def test_metrics_are_for_one_namespace():
    opened = flows("node", "metrics.enabled=true", "metrics.namespace=prometheus") - flows("node")
    assert {"prometheus"} == {flow[1] for flow in opened}
    assert {9464, 9465, 9466, 9467, 9468, 9470} == {flow[3] for flow in opened}


def test_nobody_but_the_cluster_answers_names(example):
    peers = [
        peer
        for one in kind("NetworkPolicy", example)
        for rule in one["spec"].get("egress") or []
        if 53 in [port["port"] for port in rule["ports"]]
        for peer in rule["to"]
    ]
    assert {peer_name(peer) for peer in peers} <= {"kube-system", "169.254.20.10/32"}


def test_no_object_has_a_secret_in_it(example):
    assert "Secret" not in {one["kind"] for one in objects(example, *EVERYTHING)}
    assert "PRIVATE KEY" not in text(example, *EVERYTHING)
    for name, container in containers(example, *EVERYTHING):
        assert not re.findall("secretKeyRef|secretRef", json.dumps(container)), name
        for variable, value in environment(container).items():
            if re.search("KEY|TOKEN|SECRET|PASSWORD", variable):
                assert value.startswith("/run/"), variable


def test_secret_files_are_for_our_images_user_alone(example):
    for component, spec in specs(example).items():
        for volume in spec["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440, (component, volume["name"])
        assert spec["securityContext"]["fsGroup"] == 10001


def test_the_key_of_an_authority_is_in_no_pod_but_the_one_that_signs(example):
    for component, spec in specs(example).items():
        for volume in spec["volumes"]:
            keys = [item["key"] for item in volume.get("secret", {}).get("items", [])]
            assert "ca.key" not in keys, component
            if volume.get("hostPath", {}).get("path") == "/var/lib/icos-fl":
                users = [
                    container["name"]
                    for container in spec["initContainers"] + spec["containers"]
                    for mount in container["volumeMounts"]
                    if mount["name"] == volume["name"] and "subPath" not in mount
                ]
                assert (component, users) == ("out", ["setup"])


def test_what_is_mounted_is_there(example):
    for component, one in pods(example).items():
        spec = one["spec"]["template"]["spec"]
        there = {volume["name"] for volume in spec["volumes"]}
        there |= {c["metadata"]["name"] for c in one["spec"].get("volumeClaimTemplates", [])}
        mounted = {
            mount["name"]
            for container in spec.get("initContainers", []) + spec["containers"]
            for mount in container["volumeMounts"]
        }
        assert there == mounted, component


def test_services_lead_to_pods_that_have_the_port(example):
    for service in kind("Service", example):
        [target] = [
            component
            for component, one in pods(example).items()
            if selects(service["spec"]["selector"], one["spec"]["template"]["metadata"]["labels"])
        ]
        named = {
            port["name"]: port["containerPort"]
            for name, container in containers(example)
            if name.startswith(f"{target}/")
            for port in container.get("ports", [])
        }
        for port in service["spec"]["ports"]:
            assert port["port"] == named[port["targetPort"]], service["metadata"]["name"]


def test_a_pod_meets_those_of_its_own_node():
    for service in kind("Service", "node"):
        assert service["spec"]["internalTrafficPolicy"] == "Local", service["metadata"]["name"]


def test_a_nodes_certificates_are_good_for_the_names_that_its_pods_use():
    found = dict(containers("node"))
    _, _, *names = found["out/setup"]["command"]
    bridge, _ = environment(found["collect/collector"])["ICOS_FL_COLLECTOR_BRIDGE"].split(":")
    runtime = found["data/superexec"]["args"][0].removeprefix("--runtime-api-address=")
    assert {bridge, runtime.split(":")[0]} == set(names)
    assert {s["metadata"]["name"] for s in kind("Service", "node")} == set(names)


def collector_variables() -> set[str]:
    files = ROOT.glob("deploy/otel-collector/*.yaml")
    return {name for file in files for name in re.findall(r"\$\{env:(\w+)", file.read_text())}


def gateway_variables() -> set[str]:
    script = (ROOT / "deploy/gateway/gateway").read_text()
    return set(re.findall(r"\$\{(ICOS_FL_GATEWAY_\w+)", script))


KNOWN = {
    "enrolment": EnrolmentSettings,
    "forecaster": ForecasterSettings,
    "page": PageSettings,
    "otlp-bridge": BridgeSettings,
    "processor": ProcessorSettings,
    "timeseries-store": ServiceSettings,
    "fl-server": RuntimeSettings,
    "fl-client": RuntimeSettings,
    "otel-collector": collector_variables,
    "gateway": gateway_variables,
    "scaphandre": lambda: {"SCAPHANDRE_POWERCAP_PATH"},
}
"""Of each image, who reads its variables; of a container that runs another command than its image,
by the container's name."""


def test_services_take_the_settings_that_they_are_given(example, monkeypatch):
    """By their own reading of the environment, which refuses what it does not know."""
    for name in [name for name in os.environ if name.startswith("ICOS_FL_")]:
        monkeypatch.delenv(name)
    for name, container in containers(example, *EVERYTHING):
        image = container["image"].split("/")[-1].split(":")[0]
        given = environment(container)
        known = KNOWN.get(name.split("/")[1]) or KNOWN[image]
        given.pop("NODE_NAME", None)  # of the command line
        if not isinstance(known, type):
            assert given.keys() <= known(), name
            continue
        prefix = known.model_config["env_prefix"]
        assert all(variable.startswith(prefix) for variable in given), name
        with monkeypatch.context() as patch:
            for variable, value in given.items():
                patch.setenv(variable, value)
            load(known)


PARSERS = {
    "superlink": ("flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"),
    "supernode": ("flwr.supernode.cli.flower_supernode", "_parse_args_run_supernode"),
    "superexec": ("flwr.supercore.cli.flower_superexec", "_parse_args"),
}


def test_flower_takes_the_options_that_it_is_given(example):
    for name, container in containers(example):
        command = name.split("/")[1].rpartition("-")[2]
        if command in PARSERS:
            module, function = PARSERS[command]
            parsed = getattr(import_module(module), function)().parse_args(container["args"])
            assert parsed.insecure is False


@pytest.mark.parametrize("which", ["node", "hybrid"])
def test_fl_client_takes_the_node_config_that_it_is_given(which):
    args = dict(containers(which))["out/supernode"]["args"]
    [config] = [each for each in args if each.startswith("--node-config=")]
    given = parse_config_args([config.removeprefix("--node-config=")])
    assert NodeConfig.model_validate(given).node_name == "$(NODE_NAME)"


def setup(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent
    return subprocess.run(
        ["sh", CHART / "setup", "fl-otlp-bridge", "fl-supernode"],
        cwd=folder,
        env={"PATH": f"{program}:{os.environ['PATH']}", "NODE_NAME": "edge-1"},
        capture_output=True,
        text=True,
    )


def test_a_node_makes_its_keys_once_and_for_each_service_its_own(tmp_path):
    (tmp_path / "node").mkdir()
    (tmp_path / "node/node.env").touch()  # it has joined
    first = setup(tmp_path)
    assert first.returncode == 0, first.stderr
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = setup(tmp_path)
    assert again.returncode == 0, again.stderr
    assert made == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {
        folder: {path.name for path in (tmp_path / folder).iterdir()}
        for folder in ("collector", "otlp-bridge", "superexec", "supernode")
    }
    assert given == {
        "collector": {"ca.pem", "collector.pem", "collector.key"},
        "otlp-bridge": {"ca.pem", "otlp-bridge.pem", "otlp-bridge.key"},
        "superexec": {"ca.pem", "superexec.secret"},
        "supernode": {"ca.pem", "supernode.pem", "supernode.key", "superexec.secret"},
    }
    secret = (tmp_path / "superexec/superexec.secret").read_text()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    for path in made:
        if path.suffix in (".key", ".secret"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_node_that_is_not_invited_says_so_and_measures_all_the_same(tmp_path):
    done = setup(tmp_path)
    assert done.returncode != 0
    assert "/run/invitations/edge-1" in done.stderr
    assert (tmp_path / "collector/collector.key").exists()
