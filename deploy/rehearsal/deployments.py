"""A controller and nodes: compose projects in folders of their own, as operators have them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

DEPLOY = Path(__file__).resolve().parents[1]
sys.path.append(str(DEPLOY / "images"))

from images import IMAGES  # noqa: E402 - which is beside

TRACES = DEPLOY / "local/src/icos_fl_local/traces"
STORE = "metadata:16587"
PATIENCE_SECONDS = 240.0
_UID = "10001"

T = TypeVar("T")


class Fault(Exception):
    """What did not hold."""


def run(*command: str | Path, cwd: Path | None = None, given: str = "") -> str:
    """What *command* prints. Raises Fault with all that it says where its exit status is not 0."""
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, cwd=cwd, input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"{' '.join(arguments[:9])}: {(done.stdout + done.stderr)[-2000:].strip()}")
    return done.stdout


def wait_for(what: str, ask: Callable[[], T | None], seconds: float = PATIENCE_SECONDS) -> T:
    """The first answer that is something. Raises Fault after *seconds*."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise Fault(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)
    return answer


class Deployment:
    """*kind* of deploy/compose, in *folder*, whose name is the project's."""

    def __init__(self, engine: str, kind: str, folder: Path) -> None:
        folder.mkdir()
        self.engine, self.kind, self.folder = engine, kind, folder
        self.settings: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Of its folder, and so of the project; a node's too."""
        return self.folder.name

    def icos_fl(self, *arguments: str, given: str = "") -> str:
        """``icos-fl``, as the operator of this machine."""
        return run(sys.executable, "-m", "icos_fl_local", *arguments, cwd=self.folder, given=given)

    def compose(self, *arguments: str) -> str:
        """``deploy/compose/run`` in this folder."""
        return run(DEPLOY / "compose/run", self.kind, *arguments, cwd=self.folder)

    def set(self, **settings: str) -> None:
        """Into settings.env."""
        self.settings |= settings
        lines = (f"{name}={value}\n" for name, value in self.settings.items())
        (self.folder / "settings.env").write_text("".join(lines))

    def join_network(self, network: str, services: dict[str, Any]) -> None:
        """The network *out* is the one between the machines; JSON is YAML."""
        override = {"services": services, "networks": {"out": {"external": True, "name": network}}}
        (self.folder / "compose.override.yaml").write_text(json.dumps(override))

    def container(self, service: str) -> str:
        """Its name."""
        separator = "-" if self.engine == "docker" else "_"
        return separator.join((self.folder.name, service, "1"))

    def exec(self, service: str, *command: str) -> str:
        """What *command* prints in the container of *service*."""
        return run(self.engine, "exec", self.container(service), *command)

    def inspect(self, service: str) -> dict[str, Any]:
        """The engine's words on the container of *service*."""
        return json.loads(run(self.engine, "inspect", self.container(service)))[0]  # type: ignore[no-any-return]

    def addresses(self) -> dict[str, list[str]]:
        """Of each service that runs, on all of its networks."""
        names = run(self.engine, "ps", "--format", "{{.Names}}").split()
        mine = [
            name for name in names if name == self.container(name[len(self.folder.name) + 1 : -2])
        ]
        services = [name[len(self.folder.name) + 1 : -2] for name in mine]
        return {
            service: [
                n["IPAddress"]
                for n in self.inspect(service)["NetworkSettings"]["Networks"].values()
            ]
            for service in services
        }

    def kill(self, service: str) -> None:
        """As if it had crashed: the engine did not do it, and starts it again."""
        os.kill(self.inspect(service)["State"]["Pid"], signal.SIGKILL)

    def started(self, service: str) -> str:
        """When its container last was."""
        return str(self.inspect(service)["State"]["StartedAt"])

    def down(self) -> None:
        """With its volumes."""
        self.compose("down", "-v")


class Run:
    """A federated run, in the SuperExec of a controller; ended when it is left."""

    def __init__(self, controller: "Controller", folder: str) -> None:
        self._controller, self.folder = controller, folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.history().get("state") in ("waiting", "running"):
            self.quiesce()

    def history(self) -> dict[str, Any]:
        """Empty before there is one."""
        try:
            text = self._controller.exec(
                "superlink-superexec", "cat", f"{self.folder}/history.json"
            )
        except Fault:
            return {}
        return json.loads(text)  # type: ignore[no-any-return]

    def rounds(self) -> list[dict[str, Any]]:
        """Those that are over."""
        rounds = self.history().get("rounds", [])
        return [one for one in rounds if one["state"] != "running"]

    def wait_rounds(self, count: int) -> None:
        """Until *count* rounds are over."""
        wait_for(f"{count} rounds", lambda: len(self.rounds()) >= count)

    def quiesce(self) -> None:
        """End it with the round in hand. Raises Fault if it is not ended so."""
        self._controller.exec("superlink-superexec", "icos-fl-server", "quiesce", self.folder)
        if (state := self.history()["state"]) != "quiesced":
            raise Fault(f"the run is {state}")

    def finished(self, seconds: float = PATIENCE_SECONDS) -> list[dict[str, Any]]:
        """Its rounds, when all have been. Raises Fault if the run ends otherwise."""

        def over() -> dict[str, Any] | None:
            history = self.history()
            return history if history.get("state") not in (None, "waiting", "running") else None

        history = wait_for("the end of the run", over, seconds)
        if history["state"] != "finished":
            raise Fault(f"the run is {history['state']}: {history['reason']}")
        return list(history["rounds"])


class Controller(Deployment):
    """SuperLink, SuperExec, enrolment and gateway."""

    def __init__(self, engine: str, folder: Path, network: str, address: str) -> None:
        super().__init__(engine, "controller", folder)
        self.address, self.gateway = address, f"{address}:8443"
        self.set(ICOS_FL_GATEWAY=self.gateway, ICOS_FL_GATEWAY_LISTEN="127.0.0.1:18443")
        self.join_network(network, {"gateway": {"networks": {"out": {"ipv4_address": address}}}})
        self.icos_fl("certs", "controller", "--name", address, "--uid", _UID)
        self._runs = 0

    def invite(self, name: str) -> str:
        """An invitation."""
        return self.exec("enrolment", "icos-fl-server", "node", "invite", name)

    def page(self) -> dict[str, Any]:
        """What its page shows of the newest run."""
        return dict(
            json.loads(self.exec("page", "icos-fl-health", "http://127.0.0.1:8091/api/run"))
        )

    def train(self, rounds: int, **config: Any) -> Run:
        """Submit a run, in the SuperLink's container."""
        self._runs += 1
        folder = f"run-{self._runs}"
        config |= {
            "metric": "power_consumption,cpu_usage",
            "num-server-rounds": rounds,
            "result-dir": folder,
        }
        text = " ".join(f"{key.replace('_', '-')}={json.dumps(v)}" for key, v in config.items())
        self.exec("superlink", "flwr", "run", "/opt/icos-fl-app", "own", "--run-config", text)
        return Run(self, folder)


class Node(Deployment):
    """A node that replays a trace of its own."""

    def __init__(self, engine: str, folder: Path, network: str, trace: str) -> None:
        super().__init__(engine, "node", folder)
        self.trace = TRACES / trace
        self.set(
            ICOS_FL_SOURCE="replay",
            ICOS_FL_REPLAY_TRACE=str(self.trace),
            ICOS_FL_REPLAY_INTERVAL_SECONDS="0.05",
            ICOS_FL_COLLECTOR_BATCH_TIMEOUT="6s",
        )
        # The exporter stays when the bridge, whose image it has, is upgraded.
        exporter = f"icos-fl/otlp-bridge:{IMAGES['otlp-bridge'].version()}"
        self.join_network(network, {"replay": {"image": exporter}})
        self.icos_fl("certs", "node", "--uid", _UID)

    def join(self, invitation: str) -> str:
        """What ``icos-fl node join`` says."""
        return self.icos_fl("node", "join", "-", "--uid", _UID, given=invitation)

    def acknowledged(self) -> int:
        """Rows that the bridge has said OK to."""
        return int(self.exec("replay", "cat", "/tmp/acknowledged") or 0)  # noqa: S108

    def window(self, name: str = "") -> dict[int, dict[str, float]]:
        """Values by column, by time in seconds, that the store holds."""
        command = ("icos-fl-store", "window", name or self.name, "--csv")

        def read() -> str | None:
            # It waits 10 s for an answer, which is little where two nodes share a machine.
            with contextlib.suppress(Fault):
                return self.exec("backend", *command)
            return None

        text = wait_for(" ".join(command), read)
        head, *lines = (line.split(",") for line in text.splitlines())
        return {
            round(float(cells[0])): {
                column: float(cell)
                for column, cell in zip(head[1:], cells[1:], strict=True)
                if cell
            }
            for cells in lines
        }

    def forecasts(self) -> list[dict[str, Any]]:
        """Of this node, by its newest model."""
        text = self.exec(
            "supernode-superexec", "icos-fl-client", "forecast", "--json", "--node", self.name,
            "--store", STORE, "--processor", "processor:50051",
            "--processor-ca", "/run/secrets/ca.pem",
            "--processor-certificate", "/run/secrets/fl-client.pem",
            "--processor-key", "/run/secrets/fl-client.key",
        )  # fmt: skip
        return list(json.loads(text)["forecasts"])

    def wait_expected(self, metrics: Iterable[str]) -> None:
        """Until the node's forecaster says what comes next of each of *metrics*."""
        series = rf'icos_fl_forecast_yhat{{horizon="1m",metric="(\w+)",node="{self.name}"}}'

        def said() -> bool:
            text = self.exec("forecaster", "icos-fl-health", "http://127.0.0.1:9470/metrics")
            return set(re.findall(series, text)) >= {*metrics}

        wait_for(f"the forecaster of {self.name}", said)
