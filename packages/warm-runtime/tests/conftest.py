"""A Flower federation of real processes on free ports of 127.0.0.1."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from icos_fl_service.testing import free_port
from prometheus_client.parser import text_string_to_metric_families

APP = Path(__file__).parent / "app"
HOST = "127.0.0.1"


@dataclass
class Federation:
    """A SuperLink, its SuperNodes and, in process isolation, their SuperExecs."""

    folder: Path
    tls: tuple[str, ...] = ()
    """Options of the SuperLink; without any everything is insecure."""
    ca: Path | None = None
    metrics: dict[str, int] = field(default_factory=dict)
    """Ports of /metrics, by the process's name."""
    port: int = field(default_factory=free_port)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trust = f'root-certificates = "{self.ca}"' if self.ca else "insecure = true"
        (self.folder / "flower").mkdir()
        (self.folder / "flower" / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
            f'address = "{HOST}:{self.port}"\n{trust}\n'
        )

    @property
    def env(self) -> dict[str, str]:
        mine = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FLWR_", "ICOS_FL_"))
        }
        return mine | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def trust(self) -> tuple[str, ...]:
        """Options of who connects to the SuperLink."""
        return ("--root-certificates", str(self.ca)) if self.ca else ("--insecure",)

    def superlink(
        self, *options: str, runtime: str = "warm", command: list[str] | None = None
    ) -> psutil.Process:
        process = self.start(
            "superlink",
            "superlink",
            *(self.tls or ("--insecure",)),
            *("--host", HOST, "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
            *options,
            runtime=runtime,
            program=command,
        )
        self.wait_for_port(self.port)
        return process

    def supernode(
        self,
        number: int,
        *options: str,
        runtime: str = "warm",
        port: int = 0,
        wait: bool = True,
        command: list[str] | None = None,
    ) -> psutil.Process:
        port = port or free_port()
        process = self.start(
            f"supernode-{number}",
            "supernode",
            *self.trust,
            *("--superlink", f"{HOST}:{self.port}", "--host", HOST, "--port", str(port)),
            *("--node-config", f"number={number}"),
            *options,
            runtime=runtime,
            program=command,
        )
        if wait:
            self.wait_for_port(port)
        return process

    def superexec(self, name: str, port: int, *options: str, runtime: str = "warm"):
        return self.start(
            name,
            "superexec",
            *("--runtime-api-address", f"{HOST}:{port}", *options),
            runtime=runtime,
        )

    def start(
        self,
        name: str,
        command: str,
        *options: str,
        runtime: str,
        program: list[str] | None = None,
    ) -> psutil.Process:
        """Flower's *command* with *options*; its output goes to NAME.log."""
        program = program or [sys.executable, "-m", "icos_fl_warm_runtime", command]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*program, *options],
                env=self.env | {"ICOS_FL_RUNTIME": runtime} | self._metrics_address(name),
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return psutil.Process(process.pid)

    def _metrics_address(self, name: str) -> dict[str, str]:
        port = self.metrics.get(name)
        return {"ICOS_FL_RUNTIME_METRICS_ADDRESS": f"{HOST}:{port}"} if port else {}

    def scrape(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of the process *name*, by name and labels' values."""
        url = f"http://{HOST}:{self.metrics[name]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    def status(self, name: str) -> dict[str, Any]:
        """What the process *name* says of itself."""
        url = f"http://{HOST}:{self.metrics[name]}/status"
        with urllib.request.urlopen(url, timeout=10) as answer:
            facts: dict[str, Any] = json.load(answer)
        return facts

    def wait_for_port(self, port: int) -> None:
        def listens() -> bool:
            for name, process in self.processes.items():
                assert process.poll() in (None, -9, -15), f"{name} has ended\n{self.logs()}"
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, port), timeout=1).close()
                return True
            return False

        wait_for(listens, 60, self.logs)

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a ``flwr`` command answers as JSON."""
        command = [sys.executable, str(Path(sys.executable).parent / "flwr"), *arguments]
        done = subprocess.run(
            [*command, "--format", "json"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        answer: dict[str, Any] = json.loads(
            done.stdout[done.stdout.find("{") : done.stdout.rfind("}") + 1]
        )
        assert answer.get("success"), answer
        return answer

    def run(self, faults: dict[int, dict[str, Any]] | None = None, **config: Any) -> "Run":
        """Submit a run, of which the rounds in *faults* go wrong in some way."""
        folder = self.folder / f"run-{time.monotonic_ns()}"
        folder.mkdir()
        config |= {"folder": str(folder), "faults": json.dumps(faults or {})}
        file = folder / "config.toml"
        file.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in config.items()))
        holds = [number for number, fault in (faults or {}).items() if fault.get("hold")]
        for number in holds:
            (folder / f"hold-{number}").touch()
        answer = self.flwr("run", str(APP), "local", "--run-config", str(file))
        return Run(self, folder, str(answer["run-id"]))

    def tree(self, name: str) -> list[psutil.Process]:
        """The process *name* and all that it started."""
        try:
            process = psutil.Process(self.processes[name].pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def commands(self, name: str) -> list[str]:
        """The command lines of the process *name* and of all that it started."""
        return [_command(process) for process in self.tree(name)]

    def workers(self, name: str) -> list[psutil.Process]:
        """The warm workers below the process *name*, without their tasks."""
        found = [process for process in self.tree(name) if _is_worker(process)]
        pids = {process.pid for process in found}
        return [process for process in found if process.ppid() not in pids]

    def tasks(self, name: str) -> list[psutil.Process]:
        """What the warm workers below the process *name* have forked."""
        return [task for worker in self.workers(name) for task in worker.children()]

    def stop(self) -> None:
        """End every process; AssertionError if something that they started is left."""
        started = [process for name in self.processes for process in self.tree(name)]
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in reversed(self.processes.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        _, left = psutil.wait_procs(started, 10)
        left += [process for process in self._by_home() if process not in left]
        said = [f"{process.pid} {_command(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes.values():
            process.wait(10)
        assert not said, f"left running: {said}"

    def _by_home(self) -> list[psutil.Process]:
        """Whatever has this federation's own FLWR_HOME, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                home = process.environ().get("FLWR_HOME")
                if home == self.env["FLWR_HOME"] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


@dataclass
class Run:
    """A run that was submitted."""

    federation: Federation
    folder: Path
    id: str

    def facts(self) -> list[dict[str, Any]]:
        path = self.folder / "facts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def round(self, number: int, seconds: float = 90) -> dict[str, Any]:
        """What there is to tell of a round, once it is over."""
        wait_for(lambda: len(self.facts()) >= number, seconds, self.federation.logs)
        return self.facts()[number - 1]

    def end(self, seconds: float = 90) -> list[dict[str, Any]]:
        """The facts of all rounds, once the ServerApp is through."""

        def over() -> bool:
            return bool(self.facts()) and "over" in self.facts()[-1]

        wait_for(over, seconds, self.federation.logs)
        return self.facts()[:-1]

    def let_go(self, number: int) -> None:
        """Begin a round that is held."""
        (self.folder / f"hold-{number}").unlink()

    def task(self, number: int) -> psutil.Process:
        """The ClientApp's process that waits in a round."""
        path = self.folder / f"task-{number}"
        wait_for(path.exists, 60, self.federation.logs)
        return psutil.Process(int(path.read_text()))

    def status(self) -> str:
        answer = self.federation.flwr("list", "local", "--run-id", self.id)
        return str(answer["runs"][0]["status"])


def _is_worker(process: psutil.Process) -> bool:
    return "worker.main" in _command(process)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _toml(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def wait_for(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s\n{complaint()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def new_federation(tmp_path_factory) -> Iterator[Callable[..., Federation]]:
    """Makes federations, and ends them."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Federation:
            folder = tmp_path_factory.mktemp("federation")
            federation = Federation(folder, **options)
            stack.callback(federation.stop)
            return federation

        yield make


@pytest.fixture(scope="module")
def federation(new_federation) -> Federation:
    """A warm SuperLink with two warm SuperNodes, for all tests of a module."""
    federation = new_federation()
    federation.superlink()
    federation.supernode(0)
    federation.supernode(1)
    return federation


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """wait_until(condition, seconds, complaint)"""
    return wait_for
