"""client⇄server: the ServerApp on a real SuperLink with four SuperNodes, warm and stock.

The nodes speak protos/README.md with a model of two numbers, so that what each must do to the
average can be computed by hand; by name of the node they raise, die, or say more than was asked.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from icos_fl_service.testing import free_port
from safetensors.numpy import load_file

# On the stock runtime each message starts a Python process: on a busy machine that adds up.
pytestmark = pytest.mark.timeout(420)

HOST = "127.0.0.1"
NODES = "good", "raises", "dies", "extra"

PYPROJECT = """
[project]
name = "contract"
version = "0.1.0"
description = "Client and server by contract"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42.0"]

[tool.flwr.app]
publisher = "icos-fl"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
metric = "cpu_usage"
"""

SERVER_APP = """
from icos_fl_server.app import app as _app

app = _app
"""

CLIENT_APP = '''
"""Adds its step to both weights; *faults* names the nodes that do something else instead.

What came is written down.
"""

import json
import os
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

LAYOUTS = {"weights-metrics": ["cpu_usage"], "weights-layouts": ['[["w",[2]]]']}

app = ClientApp()


def reply(message, context, train=None):
    name = context.node_config["node-name"]
    if name == "good":
        config = dict(message.content["config"])
        arrays = list(message.content.get("arrays", {}))
        came = {"message": message.metadata.message_type, "config": config, "arrays": arrays}
        with (Path(os.environ["FLWR_HOME"]) / "came.jsonl").open("a") as stream:
            stream.write(json.dumps(came) + chr(10))
    if train is not None and name in context.run_config["faults"].split(","):
        if name == "raises":
            raise ValueError("disk on fire")
        if name == "dies":
            os._exit(1)
    node, numbers = ConfigRecord({"protocol": 2, "name": name}), {}
    content = RecordDict({"node": node})
    config = message.content["config"]
    if config.get("evaluate-metrics"):
        loss = float(message.content["arrays"]["weights"].numpy()[0])
        judged = {"num-examples": 4, "eval-loss": loss, "mae": 2.0, "naive-mae": 3.0}
        numbers |= {f"evaluate.cpu_usage.{key}": value for key, value in judged.items()}
    if message.metadata.message_type == "query":
        train = np.zeros(2, np.float32)
    if train is not None:
        node.update(LAYOUTS)
        content["arrays"] = ArrayRecord({"weights": Array(np.asarray(train, np.float32))})
        examples = context.node_config["examples"]
        trained = {"num-examples": examples, "train-loss": 0.5, "seconds": 0.1}
        if name == "extra" and name in context.run_config["faults"].split(","):
            trained["accuracy"] = 0.9
        numbers |= {f"train.cpu_usage.{key}": value for key, value in trained.items()}
    content["metrics"] = MetricRecord(numbers)
    return Message(content, reply_to=message)


@app.query()
def query(message, context):
    return reply(message, context)


@app.train()
def train(message, context):
    weights = message.content["arrays"]["weights"].numpy()
    return reply(message, context, weights + context.node_config["step"])


@app.evaluate()
def evaluate(message, context):
    return reply(message, context)
'''


@dataclass
class Flower:
    """A SuperLink with its SuperNodes, on free ports."""

    folder: Path
    runtime: str
    port: int = field(default_factory=free_port)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        mine = {name: v for name, v in os.environ.items() if not name.startswith("FLWR_")}
        return mine | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "ICOS_FL_RUNTIME": self.runtime,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Write the app, and start the SuperLink and a SuperNode for each of NODES."""
        app = self.folder / "app"
        app.mkdir()
        (app / "LICENSE").write_text("Apache-2.0\n")
        (app / "server_app.py").write_text(SERVER_APP)
        (app / "client_app.py").write_text(CLIENT_APP)
        (self.folder / "flower").mkdir()
        (self.folder / "flower" / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
            f'address = "{HOST}:{self.port}"\ninsecure = true\n'
        )
        self._spawn(
            "superlink",
            *("--insecure", "--host", HOST, "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
        )
        wait_for(self._listens, 60, self.logs)
        for place, node in enumerate(NODES):
            self._spawn(
                "supernode",
                *("--insecure", "--superlink", f"{HOST}:{self.port}"),
                *("--host", HOST, "--port", str(free_port()), "--node-config"),
                f'node-name="{node}" step={1.0 + place} examples={10 * (place + 1)}',
            )

    def run(self, **config: Any) -> str:
        """Submit a run; returns its id."""
        given = {key.replace("_", "-"): value for key, value in config.items()}
        lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
        (self.folder / "app" / "pyproject.toml").write_text(PYPROJECT + "\n".join(lines) + "\n")
        answer = self.flwr("run", str(self.folder / "app"), "local", "--format", "json")
        facts = json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
        assert facts.get("success"), answer
        return str(facts["run-id"])

    def flwr(self, *arguments: str) -> str:
        command = [sys.executable, str(Path(sys.executable).parent / "flwr"), *arguments]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self) -> None:
        """End every process, and what Flower started for it: a SuperExec starts ClientApps in
        sessions of their own until it has seen that its SuperNode is gone."""
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        while left := self._left():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, 5)

    def _left(self) -> list[psutil.Process]:
        """Processes with this federation's own FLWR_HOME."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                home = process.environ().get("FLWR_HOME")
                if home == self.env["FLWR_HOME"] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _listens(self) -> bool:
        assert self.processes[0].poll() is None, self.logs()
        try:
            socket.create_connection((HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}-{len(self.processes)}.log").open("wb") as log:
            command = [sys.executable, "-m", "icos_fl_warm_runtime", name, *arguments]
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        self.processes.append(process)


def wait_for(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.2)


def end_of(folder: Path, flower: Flower, seconds: float) -> dict[str, Any]:
    """The history of the run, once it is over."""
    path = folder / "history.json"

    def over() -> bool:
        return path.exists() and json.loads(path.read_text())["state"] in ("finished", "failed")

    wait_for(over, seconds, flower.logs)
    history: dict[str, Any] = json.loads(path.read_text())
    return history


@pytest.fixture
def flower(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Flower]:
    flower = Flower(tmp_path, request.param)
    try:
        flower.start()
        yield flower
    finally:
        flower.stop()


@pytest.mark.parametrize("flower", ["warm"], indirect=True)
def test_of_four_nodes_one_that_raises_dies_or_says_more_costs_nobody_else_a_round(
    flower, tmp_path, needs_of, lacking
):
    results = tmp_path / "results"
    run_id = flower.run(
        faults="raises,dies,extra",
        num_server_rounds=2,
        min_available_clients=4,
        result_dir=str(results),
    )
    history = end_of(results, flower, 240)

    assert (history["state"], history["reason"]) == ("finished", "")
    assert {name: node["metrics"] for name, node in history["nodes"].items()} == {
        "good": {"cpu_usage": 10},
        "raises": {"cpu_usage": 20},
        "dies": {"cpu_usage": 30},
        "extra": {"cpu_usage": 40},
    }
    for entry in history["rounds"]:
        assert entry["state"] == "finished"
        assert entry["nodes"] == {
            "good": {"state": "ok", "cause": ""},
            "raises": {"state": "failed", "cause": "ValueError: disk on fire"},
            "dies": {
                "state": "failed",
                "cause": "the ClientApp: its process ended by itself, with exit status 1",
            },
            "extra": {
                "state": "ok",
                "cause": "train.cpu_usage accuracy was not asked for and is left out",
            },
        }
    # Good adds 1 with 10 examples, extra 4 with 40: (10 * 1 + 40 * 4) / 50 = 3.4 a round.
    weights = load_file(results / "checkpoints/cpu_usage/latest.safetensors")["w"]
    assert weights == pytest.approx([6.8, 6.8])
    losses = [entry["metrics"]["cpu_usage"]["eval_loss"] for entry in history["rounds"]]
    assert losses == pytest.approx([3.4, 6.8])

    # What icos-fl-client says that it needs of a server came in each message.
    lines = (Path(flower.env["FLWR_HOME"]) / "came.jsonl").read_text().splitlines()
    for need in needs_of("fl-server"):
        came = [each for each in map(json.loads, lines) if each["message"] == need["message"]]
        assert came
        needed = {"config": need["config"], "arrays": need["arrays"]}
        assert [lacking(needed, each, need["message"]) for each in came] == [[]] * len(came)

    log = flower.flwr("log", run_id, "local", "--show")
    told = [line for line in log.splitlines() if "cannot take part fully" in line]
    for node in ("raises", "dies", "extra"):
        assert sum(f'"node": "{node}"' in line for line in told) == 1, log


@pytest.mark.parametrize("flower", ["stock"], indirect=True)
def test_below_the_minimum_the_run_stops_with_the_node_and_its_cause(flower, tmp_path):
    results = tmp_path / "results"
    flower.run(
        faults="raises",
        num_server_rounds=50,
        min_fit_clients=4,
        min_available_clients=4,
        result_dir=str(results),
    )
    history = end_of(results, flower, 240)
    assert history["state"] == "failed"
    assert history["reason"] == (
        "3 rounds in a row failed: 4 nodes needed, 3 usable; raises: ValueError: disk on fire"
    )
    assert [entry["state"] for entry in history["rounds"]] == ["skipped"] * 3
