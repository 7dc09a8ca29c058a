"""The single-node deployment: its components, their commands, addresses and order."""

import os
import random
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from icos_fl_local.doctor import port_problem
from icos_fl_local.errors import UsageError
from icos_fl_local.state import StateFolder
from icos_fl_local.supervisor import Component

HOST = "127.0.0.1"
STORE = ("valkey", "metadata", "backend", "proxy")
SERVICES = ("bridge", "processor")
FORECASTER = "forecaster"
CONTROLLER_PAGE = "controller-page"
"""Both of deployments that go on after a run."""
PAGE = "page"
"""The forecaster's page, which has a port of its own."""
METRICS = "metrics-"
"""Before a component's name: where it serves /metrics."""
RUN = "run"
"""The ServerApp of a run, which serves /metrics while it lasts."""
HORIZONS_SECONDS = (60, 300, 3600)
HORIZON_STEPS_MAX = 4096
"""How far ahead is forecast, in whole steps."""
# Below the range from which Linux takes ports for outgoing connections.
_PORT_RANGE = range(20000, 32000)
_PROBE_SECONDS = 0.5


def supernode(node: str) -> str:
    """Name of the component that trains for *node*."""
    return f"supernode-{node}"


def component_names(nodes: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """All components with those that not every deployment has, in the order in which they start."""
    return [*STORE, *SERVICES, *more, "superlink", *(supernode(node) for node in nodes)]


def metrics_names(names: Sequence[str]) -> list[str]:
    """Names of the ports where those of *names* serve /metrics that do, and the run does.

    With Flower as it comes, some serve little.
    """
    steady = ("backend", *SERVICES, FORECASTER, CONTROLLER_PAGE, "superlink")
    serving = [name for name in names if name in steady or name.startswith(supernode(""))]
    return [f"{METRICS}{name}" for name in (*serving, RUN)]


def parse_ports(given: Sequence[str]) -> dict[str, int]:
    """``NAME=PORT`` of the command line; raises UsageError. ``assign_ports`` checks the names."""
    ports: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal() or not 1 <= int(number) <= 65535:
            raise UsageError(
                f"--port {text}: not of the form NAME=PORT with a port from 1 to 65535"
            )
        if name in ports:
            raise UsageError(f"--port {text}: {name} is given twice")
        ports[name] = int(number)
    return ports


def assign_ports(names: Sequence[str], given: Mapping[str, int]) -> dict[str, int]:
    """A port for each name: the given one, or one that is free now. Raises UsageError."""
    for name in given:
        if name not in names:
            raise UsageError(f"--port {name}=…: no such component; there are: {', '.join(names)}")
    candidates = iter(random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)))
    free = (port for port in candidates if port not in given.values() and not port_problem(port))
    return {name: given[name] if name in given else next(free) for name in names}


def steps_ahead(interval_seconds: float) -> list[int]:
    """How far ahead a deployment's forecaster forecasts, in steps."""
    steps = {round(seconds / interval_seconds) for seconds in HORIZONS_SECONDS}
    return sorted(count for count in steps if 1 <= count <= HORIZON_STEPS_MAX) or [1]


@dataclass(frozen=True)
class Deployment:
    """What is needed to start the components, and to talk to them."""

    state: StateFolder
    nodes: tuple[str, ...]
    ports: Mapping[str, int]
    runtime: str = "warm"
    """Or ``stock``: Flower as it comes, which starts a process for each message."""

    @property
    def names(self) -> list[str]:
        """Of the components, in the order in which they start."""
        return [name for name in self.ports if name != PAGE and not name.startswith(METRICS)]

    @property
    def metrics_ports(self) -> dict[str, int]:
        """Where ``/metrics`` are, by component."""
        return {
            name.removeprefix(METRICS): port
            for name, port in self.ports.items()
            if name.startswith(METRICS)
        }

    @property
    def page(self) -> str:
        """Where the forecaster's page is; empty without one."""
        return f"http://{self.address(PAGE)}/" if PAGE in self.ports else ""

    @property
    def controller_page(self) -> str:
        """Where the page of runs and their nodes is; empty without one."""
        return f"http://{self.address(CONTROLLER_PAGE)}/" if CONTROLLER_PAGE in self.ports else ""

    def address(self, name: str) -> str:
        """Where the component *name* listens."""
        return f"{HOST}:{self.ports[name]}"

    def _metrics_env(self, name: str, prefix: str) -> dict[str, str]:
        return {f"{prefix}_METRICS_ADDRESS": self.address(f"{METRICS}{name}")}

    def env(self) -> dict[str, str]:
        """Environment of every process, over that of the launcher."""
        home = str(self.state.folder)
        env = {"HOME": home, "USER": "icos-fl"} | {
            # Settings are this deployment's alone: what the user's shell has of them would mix in.
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ICOS_FL_", "DATACLAY_", "FLWR_"))
        }
        cores = os.cpu_count() or 1
        threads = str(max(1, cores // max(1, len(self.nodes))))
        return env | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
            "FLWR_HOME": str(self.state.flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "ICOS_FL_RUNTIME": self.runtime,
            # Nodes share the machine: more threads than cores would only wait for each other.
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
        }

    def components(
        self, bridge_config: Path, *, recorded: bool, interval_seconds: float = 15.0
    ) -> list[Component]:
        """All components, in the order in which they start.

        Are the rows *recorded* ones? What is forecast has steps of *interval_seconds*.
        """
        services = self._services(bridge_config, recorded)
        if FORECASTER in self.ports:
            services.append(self._forecaster(recorded, interval_seconds))
        if CONTROLLER_PAGE in self.ports:
            services.append(self._controller_page())
        return [*self._store(), *services, *self._flower()]

    def store_env(self, prefix: str) -> dict[str, str]:
        """Where the store is, for the settings of the service with *prefix*."""
        return {
            f"{prefix}_STORE__HOST": HOST,
            f"{prefix}_STORE__PORT": str(self.ports["metadata"]),
        }

    def _store(self) -> list[Component]:
        env = {
            "ICOS_FL_STORE_STATE_DIR": str(self.state.folder / "store"),
            "ICOS_FL_STORE_KV_PORT": str(self.ports["valkey"]),
            "ICOS_FL_STORE_METADATA_PORT": str(self.ports["metadata"]),
            "ICOS_FL_STORE_BACKEND_PORT": str(self.ports["backend"]),
            "ICOS_FL_STORE_PROXY_PORT": str(self.ports["proxy"]),
        }
        after = {
            "valkey": (),
            "metadata": ("valkey",),
            "backend": ("metadata",),
            "proxy": ("metadata",),
        }
        return [
            self.component(
                name,
                (*module("icos_fl_timeseries_store"), "serve", "kv" if name == "valkey" else name),
                # The backend alone serves them.
                env | (self._metrics_env(name, "ICOS_FL_STORE") if name == "backend" else {}),
                tcp,
                after[name],
                stop_seconds=30.0,
            )
            for name in STORE
        ]

    def _services(self, bridge_config: Path, recorded: bool) -> list[Component]:
        bridge = {
            "ICOS_FL_BRIDGE_LISTEN_ADDRESS": self.address("bridge"),
            "ICOS_FL_BRIDGE_CONFIG": str(bridge_config),
            **self.store_env("ICOS_FL_BRIDGE"),
            **self._metrics_env("bridge", "ICOS_FL_BRIDGE"),
        }
        processor = {
            "ICOS_FL_PROCESSOR_LISTEN_ADDRESS": self.address("processor"),
            "ICOS_FL_PROCESSOR_RECORDED": str(recorded),
            **self.store_env("ICOS_FL_PROCESSOR"),
            **self._metrics_env("processor", "ICOS_FL_PROCESSOR"),
        }
        if self.state.expectations.exists():
            processor["ICOS_FL_PROCESSOR_EXPECTATIONS"] = str(self.state.expectations)
        after = ("backend", "proxy")
        return [
            self.component("bridge", module("icos_fl_otlp_bridge"), bridge, serving, after),
            self.component("processor", module("icos_fl_processor"), processor, serving, after),
        ]

    def _forecaster(self, recorded: bool, interval_seconds: float) -> Component:
        horizons = steps_ahead(interval_seconds)
        env = {
            "ICOS_FL_FORECASTER_LISTEN_ADDRESS": self.address(FORECASTER),
            "ICOS_FL_FORECASTER_PAGE_ADDRESS": self.address(PAGE),
            "ICOS_FL_FORECASTER_PROCESSOR__ADDRESS": self.address("processor"),
            "ICOS_FL_FORECASTER_RECORDED": str(recorded),
            "ICOS_FL_FORECASTER_INTERVAL_SECONDS": f"{interval_seconds:g}",
            "ICOS_FL_FORECASTER_HORIZONS": ",".join(
                f"{count * interval_seconds:g}s" for count in horizons
            ),
            **self.store_env("ICOS_FL_FORECASTER"),
            **self._metrics_env(FORECASTER, "ICOS_FL_FORECASTER"),
        }
        if not recorded:  # else what was learned of other traces would be among it
            env["ICOS_FL_FORECASTER_STATE_FOLDER"] = str(self.state.folder / "forecasts")
        if self.state.expectations.exists():
            env["ICOS_FL_FORECASTER_EXPECTATIONS"] = str(self.state.expectations)
        command = module("icos_fl_client.serving")
        if recorded:  # all rows come at once, beside the training that is waited for
            command = ("nice", "-n", "10", *command)
        return self.component(FORECASTER, command, env, serving, ("backend", "proxy"))

    def _controller_page(self) -> Component:
        env = {
            "ICOS_FL_PAGE_LISTEN_ADDRESS": self.address(CONTROLLER_PAGE),
            "ICOS_FL_PAGE_RUNS": str(self.state.runs),
            "ICOS_FL_PAGE_SUPERLINK": self.address("superlink"),
            **self._metrics_env(CONTROLLER_PAGE, "ICOS_FL_PAGE"),
        }
        return self.component(CONTROLLER_PAGE, (*module("icos_fl_server"), "page"), env)

    def _flower(self) -> list[Component]:
        superlink = (
            *module("icos_fl_warm_runtime"),
            "superlink",
            *("--insecure", "--host", HOST, "--port", str(self.ports["superlink"])),
            "--disable-runtime-dependency-installation",
        )
        env = self._metrics_env("superlink", "ICOS_FL_RUNTIME")
        components = [self.component("superlink", superlink, env, tcp, ())]
        for node in self.nodes:
            name = supernode(node)
            config = {
                "node-name": node,
                "processor-address": self.address("processor"),
                "store-address": self.address("metadata"),
            }
            node_config = " ".join(f'{key}="{value}"' for key, value in config.items())
            threads = self.env()["OMP_NUM_THREADS"]
            command = (
                *module("icos_fl_warm_runtime"),
                "supernode",
                *("--insecure", "--superlink", self.address("superlink")),
                *("--host", HOST, "--port", str(self.ports[name])),
                *("--node-config", f"{node_config} threads={threads}"),
            )
            env = self._metrics_env(name, "ICOS_FL_RUNTIME")
            components.append(self.component(name, command, env, tcp, ("superlink",)))
        return components

    def component(
        self,
        name: str,
        command: tuple[str, ...],
        env: Mapping[str, str] | None = None,
        probe: Callable[[int], bool] | None = None,
        after: Iterable[str] = (),
        stop_seconds: float = 20.0,
    ) -> Component:
        """The component *name*, ready when *probe* (default: ``tcp``) of its port says so."""
        port = self.ports[name]
        ask = probe or tcp
        return Component(
            name, command, env or {}, port, lambda: ask(port), tuple(after), stop_seconds
        )


def tcp(port: int) -> bool:
    """Does somebody listen on the port?"""
    try:
        socket.create_connection((HOST, port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def serving(port: int) -> bool:
    """Does the gRPC service on the port say that it is healthy?"""
    if not tcp(port):
        return False
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def script(name: str) -> tuple[str, ...]:
    """A console script of this environment, run by this Python whatever its first line says."""
    return (sys.executable, str(Path(sys.executable).parent / name))
