"""The pods of the examples, as docker or podman can run them: a node joins, measures and trains.

No cluster: each container by its image, options, environment, mounts and user, beside the others of
its pod on one loopback; Services are names on one network. What only a cluster does (network
policies, who runs where, limits) is in test_helm.py by what the chart says.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/icos-fl"
ENVIRONMENT = {"CONTAINERS_CONF": str(ROOT / "deploy/containers.conf"), **os.environ}
USER = 10001
NODE = "edge-1"
VALUES = {
    "single-node": ("settings.ICOS_FL_COLLECTOR_BATCH_TIMEOUT=3s",),
    "hybrid": (
        "settings.ICOS_FL_COLLECTOR_BATCH_TIMEOUT=3s",
        "gateway=fl-gateway:8443",
        "controller.enabled=true",
    ),
}
"""Of each example, what is other than in it."""
SERVICES = {
    "controller": ["fl-gateway"],
    "store": ["fl-otlp-bridge", "fl-processor"],
    "out": ["fl-supernode"],
    "data": ["fl-otlp-bridge"],
    "collect": [],
}
"""Of each pod, in the order of their start, the Services that lead to it where it has the ports."""
PORTS = {
    *(6379, 16587, 6867, 8676),  # the store
    *(4317, 50051, 50052, 8000, 8089, 8090, 8443, 9093, 9094),
    *range(9464, 9471),  # metrics
}
OPEN = {
    "single-node": {"controller": {8443}, "out": {9094}, "data": {4317}, "collect": set()},
    "hybrid": {
        **{"controller": {8443}, "store": {4317, 50051}},
        **{"out": {9094}, "data": set(), "collect": set()},
    },
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, given: str = "") -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=ENVIRONMENT, input=given, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], bool], seconds: float, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(1)


@dataclass
class Cluster:
    """Containers of one network, and the folders that they have."""

    engine: str
    folder: Path
    example: str
    name: str = field(default_factory=lambda: f"icos-fl-helm-{uuid.uuid4().hex[:8]}")
    started: list[str] = field(default_factory=list)

    @property
    def store(self) -> str:
        """The pod that has it."""
        return "store" if self.example == "hybrid" else "data"

    def start_pod(self, component: str, services: list[str], workload: dict[str, Any]) -> None:
        """Its containers in their order, each when those before it are up."""
        spec = workload["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            volumes[claim["metadata"]["name"]] = claim | {"emptyDir": {}}
        folders = {name: self._volume(component, one) for name, one in volumes.items()}
        first = (spec.get("initContainers", []) + spec["containers"])[0]
        self._run(
            *("--detach", "--name", self.container(component, "loopback")),
            *("--network", self.name, *(f"--network-alias={name}" for name in services)),
            "--no-healthcheck",
            *("--entrypoint", "sleep", first["image"], "infinity"),
            name=self.container(component, "loopback"),
        )
        for container in spec.get("initContainers", []):
            self._start(component, container, folders, ends="restartPolicy" not in container)
        for container in spec["containers"]:
            self._start(component, container, folders, ends=False)

    def _start(
        self, component: str, container: dict[str, Any], folders: dict[str, Path], *, ends: bool
    ) -> None:
        name = self.container(component, container["name"])
        env = {one["name"]: one.get("value", NODE) for one in container.get("env", [])}
        mounts = []
        for mount in container["volumeMounts"]:
            source = folders[mount["name"]] / mount.get("subPath", "")
            if not source.exists():
                own(source)
            ro = ":ro" if mount.get("readOnly") else ""
            mounts += ["--volume", f"{source}:{mount['mountPath']}{ro}"]
        entry, *rest = container.get("command", [""])
        arguments = [
            argument.replace("$(NODE_NAME)", NODE) for argument in rest + container.get("args", [])
        ]
        self._run(
            *(["--rm"] if ends else ["--detach"]),
            *("--name", name, "--network", f"container:{self.container(component, 'loopback')}"),
            *("--user", f"{USER}:{USER}", "--read-only", "--cap-drop", "all", "--no-healthcheck"),
            *(["--read-only-tmpfs=false"] if self.engine == "podman" else []),
            *("--security-opt", "no-new-privileges"),
            *(f"--env={key}={value}" for key, value in env.items()),
            *(["--workdir", container["workingDir"]] if "workingDir" in container else []),
            *mounts,
            *([f"--entrypoint={entry}"] if entry else []),
            container["image"],
            *arguments,
            name=name,
        )
        if not ends:
            for probe in ("startupProbe", "readinessProbe"):
                command = container[probe]["exec"]["command"]
                wait_until(
                    lambda command=command: (
                        self.exec(component, container["name"], *command)[0] == 0
                    ),
                    180,
                    self.logs,
                )

    def _run(self, *arguments: str, name: str) -> None:
        self.started.append(name)
        run(self.engine, "run", *arguments)

    def _volume(self, component: str, volume: dict[str, Any]) -> Path:
        name = volume.get("name") or volume["metadata"]["name"]
        if "hostPath" in volume:
            path = self.folder / volume["hostPath"]["path"].lstrip("/")
            assert path.is_dir(), path
            return path
        if "secret" in volume:
            secret = volume["secret"]
            source = self.folder / "secrets" / secret["secretName"]
            folder = own(self.folder / component / name)
            keys = secret.get("items") or [
                {"key": p.name, "path": p.name} for p in source.iterdir()
            ]
            for item in keys:
                target = folder / item["path"]
                shutil.copy(source / item["key"], target)
                os.chown(target, 0, USER)
                target.chmod(secret["defaultMode"])
            return folder
        if "configMap" in volume:
            return self.folder / "configuration"
        return own(self.folder / component / name)

    def container(self, component: str, name: str) -> str:
        return f"{self.name}-{component}-{name}"

    def exec(self, component: str, name: str, *command: str) -> tuple[int, str]:
        done = subprocess.run(
            [self.engine, "exec", self.container(component, name), *command],
            env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + (done.stderr if done.returncode else "")

    def logs(self) -> str:
        tails = []
        for name in self.started:
            done = subprocess.run(
                [self.engine, "logs", "--tail", "15", name],
                env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            tails.append(f"--- {name}\n{done.stdout}")
        return "\n".join(tails)

    def remove(self) -> None:
        for name in reversed(self.started):
            subprocess.run(
                [self.engine, "rm", "--force", "--time", "20", name],
                env=ENVIRONMENT, capture_output=True,
            )  # fmt: skip
        subprocess.run([self.engine, "network", "rm", self.name], capture_output=True)


def own(folder: Path) -> Path:
    """*folder*, made for our images' user."""
    folder.mkdir(parents=True)
    os.chown(folder, USER, USER)
    return folder


def usable_engine() -> str:
    for name in ("docker", "podman"):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([name, "info"], capture_output=True).returncode == 0:
                return name
    return ""


def rendered(example: str) -> dict[str, dict[str, Any]]:
    """The workloads and the configuration, by component."""
    helm = run(ROOT / "deploy/build-sources", "helm").strip().removeprefix("helm=")
    sets = [part for value in VALUES[example] for part in ("--set", value)]
    text = run(helm, "template", "fl", CHART, "-f", CHART / f"examples/{example}.yaml", *sets)
    return {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: one
        for one in yaml.safe_load_all(text)
        if one and one["kind"] in ("DaemonSet", "StatefulSet", "ConfigMap")
    }


@pytest.fixture(scope="module")
def engine() -> str:
    """What runs containers, with the images built."""
    engine = usable_engine()
    if not engine:
        message = "THE CHART'S PODS DID NOT RUN: neither docker nor podman can be used"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    images = (
        *("otlp-bridge", "timeseries-store", "processor", "fl-server", "fl-client"),
        *("otel-collector", "gateway"),
    )
    run(ROOT / "deploy/build-images", *images)
    return engine


@pytest.fixture(scope="module", params=VALUES)
def cluster(
    engine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    objects = rendered(request.param)
    folder = tmp_path_factory.mktemp("cluster")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    cluster = Cluster(engine, folder, request.param)
    try:
        run(engine, "network", "create", cluster.name)
        certs = folder / "secrets/icos-fl-controller"
        run("icos-fl", "certs", "controller", "--folder", certs, "--name", "fl-gateway")
        (certs / "superexec.secret").write_text(secrets.token_hex(32))
        shared = folder / "secrets/icos-fl-shared-store"
        names = [f"--name={name}" for name in SERVICES["store"]]
        run("icos-fl", "certs", "node", "--folder", shared, *names)
        own(folder / "var/lib/icos-fl")
        (folder / "configuration").mkdir()
        for name, text in objects["configuration"]["data"].items():
            (folder / "configuration" / name).write_text(text)
        invitations = folder / "secrets/icos-fl-invitations"
        invitations.mkdir()
        for component, services in SERVICES.items():
            if component == "out":
                (invitations / NODE).write_text(invitation(cluster))
            if component in objects:
                alone = component != "data" or cluster.store == "data"
                cluster.start_pod(component, services if alone else [], objects[component])
        yield cluster
    finally:
        cluster.remove()


def invitation(cluster: Cluster) -> str:
    command = ("icos-fl-server", "node", "invite", NODE)
    status, word = cluster.exec("controller", "enrolment", *command)
    assert status == 0, word
    return word


def test_a_node_joins_by_its_name(cluster):
    def online() -> bool:
        status, text = cluster.exec(
            "controller", "enrolment", "icos-fl-server", "node", "list", "--json"
        )
        assert status == 0, text
        return [(row["name"], row["state"]) for row in json.loads(text)] == [(NODE, "online")]

    wait_until(online, 60, cluster.logs)


def test_what_is_measured_comes_into_the_window(cluster):
    def rows() -> int:
        status, text = cluster.exec(
            cluster.store, "backend", "icos-fl-store", "window", NODE, "--csv"
        )
        return text.count("\n") if status == 0 else 0

    wait_until(lambda: rows() > 40, 400, cluster.logs)


def test_the_forecaster_says_what_comes_next(cluster):
    def said() -> bool:
        status, text = cluster.exec(
            cluster.store, "forecaster", "icos-fl-health", "http://127.0.0.1:9470/metrics"
        )
        assert status == 0, text
        return f'icos_fl_forecast_yhat{{horizon="1m",metric="cpu_usage",node="{NODE}"}}' in text

    wait_until(said, 120, cluster.logs)


def test_a_run_trains_on_it(cluster):
    app = cluster.folder / "controller/tmp/superlink/app"
    shutil.copytree(ROOT / "deploy/local/src/icos_fl_local/flower_app", app)
    home = cluster.folder / "controller/state/superlink/flwr"
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:8000"\n'
        'root-certificates = "/run/secrets/ca.pem"\n'
    )
    config = {
        "metric": "cpu_usage",
        "num-server-rounds": 2,
        "min-available-clients": 1,
        "interval": 3.0,
        "time-step": 6,
        "horizon": 2,
        "result-dir": "results",
    }
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    status, text = cluster.exec(
        "controller", "superlink", "flwr", "run", "/tmp/app", "own", "--run-config", words
    )
    assert status == 0, text

    history = cluster.folder / "controller/state/superexec/results/history.json"

    def over() -> bool:
        return history.exists() and json.loads(history.read_text())["state"] in (
            "finished",
            "failed",
        )

    wait_until(over, 300, cluster.logs)
    assert json.loads(history.read_text())["state"] == "finished", history.read_text()
    assert (history.parent / "checkpoints/cpu_usage/latest.safetensors").exists()


def test_the_controllers_page_shows_the_run_and_its_node(cluster):
    told: dict[str, Any] = {}

    def online() -> bool:
        status, text = cluster.exec(
            "controller", "page", "icos-fl-health", "http://127.0.0.1:8091/api/run"
        )
        assert status == 0, text
        told.update(json.loads(text))
        return [(n["name"], n["online"]["state"]) for n in told["nodes"]] == [(NODE, "online")]

    wait_until(online, 60, cluster.logs)
    assert (told["run"]["state"], len(told["run"]["rounds"])) == ("finished", 2)
    assert told["nodes"][0]["last"]["state"] == "ok"


def test_a_node_with_a_store_of_its_own_forecasts_by_itself(cluster):
    if cluster.store != "data":
        pytest.skip("a shared store keeps no models of nodes")
    status, text = cluster.exec(
        "data", "superexec", "icos-fl-client", "forecast", "--json",
        "--processor", "127.0.0.1:50051", "--store", "127.0.0.1:16587",
    )  # fmt: skip
    assert status == 0, text


def test_neighbours_reach_what_is_open_and_nothing_else(cluster):
    for component, expected in OPEN[cluster.example].items():
        address = run(
            cluster.engine, "inspect", "--format",
            "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
            cluster.container(component, "loopback"),
        ).strip()  # fmt: skip
        program = (
            "import socket\n"
            f"for port in {sorted(PORTS)}:\n"
            "    with socket.socket() as one:\n"
            "        one.settimeout(2)\n"
            f"        if one.connect_ex(({address!r}, port)) == 0: print(port)\n"
        )
        # From another pod than its own.
        asker = ("controller", "enrolment") if component == "out" else ("out", "supernode")
        status, text = cluster.exec(*asker, "python3", "-c", program)
        assert status == 0, text
        assert set(map(int, text.split())) == expected, component
