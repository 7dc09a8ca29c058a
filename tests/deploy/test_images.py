"""The images, built and run as a node and its server: as nobody, on a root that cannot be written.

Needs docker or podman; where neither can be used, it says that it did not run.
"""

import json
import os
import re
import subprocess
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "otlp-bridge",
    "timeseries-store",
    "processor",
    "fl-server",
    "fl-client",
    "otel-collector",
    "scaphandre",
    "gateway",
)
PYTHON = NAMES[:5]
STOP_SECONDS = 20
# podman takes its limits from there, where they cannot be raised.
ENVIRONMENT = {"CONTAINERS_CONF": str(ROOT / "deploy/containers.conf"), **os.environ}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def did_not_run(reason: str) -> None:
    message = f"THE IMAGES WERE NOT TESTED: {reason}"
    warnings.warn(message, stacklevel=2)
    pytest.skip(message)


def usable(engine: str) -> bool:
    try:
        return subprocess.run([engine, "info"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def engine() -> str:
    for name in ("docker", "podman"):
        if usable(name):
            return name
    did_not_run("neither docker nor podman can be used")
    raise AssertionError


@pytest.fixture(scope="module")
def revision() -> str:
    """Of which the images are built."""
    return run("git", "-C", str(ROOT), "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def tags(engine: str, revision: str) -> dict[str, str]:
    """The tag of each image, all of them built, none over its budget."""
    done = subprocess.run([ROOT / "deploy/build-images"], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0
    return {
        tag.split("/")[1].split(":")[0]: tag
        for tag in re.findall(r"^icos-fl/\S+", done.stdout, re.M)
    }


def run(*command: str) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Part:
    """A container of the deployment that is started here."""

    image: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: str = ""
    health: str = ""
    """A url for icos-fl-health, where the image's own health check is of another command."""


def store(service: str, health: str = "") -> Part:
    environment = {
        "ICOS_FL_STORE_HOST": service,
        "ICOS_FL_STORE_KV_HOST": "kv",
        "ICOS_FL_STORE_METADATA_HOST": "metadata",
    }
    return Part("timeseries-store", ("serve", service), environment, health=health)


def superexec(image: str, of: str) -> Part:
    arguments = ("--insecure", "--runtime-api-address", of, "--health-server-address", "[::]:9093")
    return Part(image, arguments, {}, "icos-fl-superexec", "grpc://127.0.0.1:9093")


PARTS = {
    "kv": store("kv", "valkey://kv:6379"),
    "metadata": store("metadata", "grpc://metadata:16587/dataclay.proto.metadata.MetadataService"),
    "backend": store("backend"),
    "proxy": store("proxy", "tcp://proxy:8676"),
    "bridge": Part(
        "otlp-bridge",
        (),
        {"ICOS_FL_BRIDGE_STORE__HOST": "metadata", "ICOS_FL_BRIDGE_INSECURE": "true"},
    ),
    "processor": Part(
        "processor",
        (),
        {"ICOS_FL_PROCESSOR_STORE__HOST": "metadata", "ICOS_FL_PROCESSOR_INSECURE": "true"},
    ),
    "forecaster": Part(
        "fl-client",
        (),
        {
            "ICOS_FL_FORECASTER_STORE__HOST": "metadata",
            "ICOS_FL_FORECASTER_PROCESSOR__ADDRESS": "processor:50051",
            "ICOS_FL_FORECASTER_STATE_FOLDER": "/var/lib/icos-fl",
            "ICOS_FL_FORECASTER_METRICS_ADDRESS": "127.0.0.1:9470",
        },
        "icos-fl-forecaster",
        "http://127.0.0.1:9470/health",
    ),
    "collector": Part(
        "otel-collector", (), {"ICOS_FL_NODE": "edge-1", "ICOS_FL_COLLECTOR_BRIDGE": "bridge:4317"}
    ),
    "superlink": Part(
        "fl-server",
        ("--insecure", "--host", "0.0.0.0", "--isolation", "process", "--database", "superlink.db"),
        health="http://127.0.0.1:8000/health",
    ),
    "superlink-superexec": superexec("fl-server", "superlink:8000"),
    "page": Part(
        "fl-server",
        ("page",),
        {
            "ICOS_FL_PAGE_RUNS": "/var/lib/icos-fl",
            "ICOS_FL_PAGE_METRICS_ADDRESS": "127.0.0.1:9471",
        },
        "icos-fl-server",
        "http://127.0.0.1:8091",
    ),
    "supernode": Part(
        "fl-client",
        (
            "--insecure",
            "--superlink",
            "superlink:8000",
            "--host",
            "0.0.0.0",
            "--isolation",
            "process",
        ),
    ),
    "supernode-superexec": superexec("fl-client", "supernode:9094"),
}


@dataclass
class Running:
    """The containers of PARTS on a network of their own."""

    engine: str
    prefix: str

    def start(self, name: str, part: Part, tag: str) -> None:
        environment = [f"--env={key}={value}" for key, value in part.environment.items()]
        run(
            *(self.engine, "run", "--detach", "--name", self.container(name)),
            *("--network", self.prefix, "--network-alias", name, "--hostname", name),
            *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all"),
            *(
                "--security-opt",
                "no-new-privileges",
                "--volume",
                f"{self.container(name)}:/var/lib/icos-fl",
            ),
            *environment,
            *([f"--entrypoint={part.entrypoint}"] if part.entrypoint else []),
            *([f"--health-cmd=icos-fl-health {part.health}"] if part.health else []),
            tag,
            *part.arguments,
        )

    def container(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def healthy(self, name: str) -> bool:
        if self.engine == "podman":  # which asks by timers of systemd, or now
            command = ("podman", "healthcheck", "run", self.container(name))
            return subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 0
        return self.state(name)["Health"]["Status"] == "healthy"

    def state(self, name: str) -> dict:
        return json.loads(
            run(self.engine, "inspect", "--format", "{{json .State}}", self.container(name))
        )

    def wait_until_healthy(self, name: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy(name):
            assert self.state(name)["Running"], self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(1)

    def log(self, name: str) -> str:
        done = subprocess.run(
            [self.engine, "logs", self.container(name)],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return f"--- {name}\n{done.stdout[-3000:]}"

    def remove(self) -> None:
        for name in PARTS:
            for what in (("rm", "--force"), ("volume", "rm", "--force")):
                subprocess.run(
                    [self.engine, *what, self.container(name)], env=ENVIRONMENT, capture_output=True
                )
        subprocess.run(
            [self.engine, "network", "rm", self.prefix], env=ENVIRONMENT, capture_output=True
        )


@pytest.fixture(scope="module")
def running(engine: str, tags: dict[str, str]) -> Iterator[Running]:
    running = Running(engine, f"icos-fl-test-{uuid.uuid4().hex[:8]}")
    try:
        run(engine, "network", "create", running.prefix)
        for name, part in PARTS.items():
            running.start(name, part, tags[part.image])
            running.wait_until_healthy(name)
        yield running
    finally:
        running.remove()


def inside(engine: str, tag: str, *command: str) -> int:
    """The exit status of *command* in a container of its own of the image *tag*."""
    alone = (engine, "run", "--rm", "--network", "none", "--no-healthcheck")
    entry = ("--entrypoint", command[0], tag, *command[1:])
    return subprocess.run([*alone, *entry], env=ENVIRONMENT, capture_output=True).returncode


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_nobody_that_the_machine_knows(engine, tags, name):
    user = run(engine, "image", "inspect", "--format", "{{.Config.User}}", tags[name])
    assert user == "10001:10001"


@pytest.mark.parametrize("name", NAMES)
def test_its_labels_say_what_it_is(engine, tags, revision, name):
    text = run(engine, "image", "inspect", "--format", "{{json .Config.Labels}}", tags[name])
    labels = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
    assert labels["title"] == f"icos-fl/{name}"
    assert labels["version"] == tags[name].split(":")[1]
    assert labels["revision"] == revision
    assert labels["licenses"] == "Apache-2.0"
    assert "source" in labels


@pytest.mark.parametrize("name", NAMES)
def test_it_has_neither_compiler_nor_installer(engine, tags, name):
    assert inside(engine, tags[name], "sh", "-c", "command -v sh") == 0
    for program in ("uv", "pip", "pip3", "cc", "gcc", "g++", "go", "cargo", "make"):
        assert inside(engine, tags[name], "sh", "-c", f"command -v {program}") != 0, program


@pytest.mark.parametrize("name", PYTHON)
def test_torch_is_in_fl_client_alone(engine, tags, name):
    imported = inside(engine, tags[name], "python3", "-c", "import torch")
    assert (imported == 0) == (name == "fl-client")


def test_torch_of_fl_client_trains_on_the_cpu(engine, tags):
    program = (
        "import torch;"
        "model = torch.nn.LSTM(1, 16); optimizer = torch.optim.AdamW(model.parameters());"
        "model(torch.randn(40, 8, 1))[0].square().mean().backward(); optimizer.step();"
        "assert not torch.cuda.is_available()"
    )
    assert inside(engine, tags["fl-client"], "python3", "-c", program) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_what_is_in_it_is_beside_it(tags, name):
    bill = json.loads((ROOT / f"dist/images/{name}.cdx.json").read_text())
    debian = (ROOT / f"dist/images/{name}.debian.txt").read_text()
    assert bill["bomFormat"] == "CycloneDX"
    assert len(bill["components"]) > 20
    assert "\nlibc6" in debian


@pytest.mark.parametrize("name", PARTS)
def test_it_is_healthy_on_a_root_that_cannot_be_written(running, name):
    running.wait_until_healthy(name)
    written = subprocess.run(
        [running.engine, "exec", running.container(name), "sh", "-c", "echo > /usr/local/x"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert "Read-only file system" in written.stderr


@pytest.mark.parametrize("name", [*reversed(PARTS)])
def test_sigterm_ends_it_in_time(running, name):
    """In the reverse order of the start, as a deployment stops."""
    started = time.monotonic()
    run(running.engine, "stop", "--time", str(STOP_SECONDS), running.container(name))
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.1f} s")
    assert running.state(name)["ExitCode"] != 137, running.log(name)
    assert seconds < STOP_SECONDS
