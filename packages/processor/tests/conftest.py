"""A real server on a MemoryStore, and how tests talk to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_processor.server import SERVICE, Server
from icos_fl_timeseries_store import MemoryStore, StoreUnavailable

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
STEP = 15


class CountingStore(MemoryStore):
    """A MemoryStore that counts the reads, and that can be made unavailable."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.answers = True

    def nodes(self) -> list[str]:
        if not self.answers:
            raise StoreUnavailable("the store at nowhere:1 does not answer")
        return super().nodes()

    def window(self, node: str) -> Any:
        if not self.answers:
            raise StoreUnavailable("the store at nowhere:1 does not answer")
        window = super().window(node)
        if not hasattr(window, "counted"):
            read = window.read

            def counting(**chosen: Any) -> Any:
                self.reads += 1
                return read(**chosen)

            window.counted = True
            window.read = counting
        return window

    def fill(self, node: str, columns: dict[str, list[float]], at: list[float] | None = None):
        """A row a STEP, or one at each of the seconds *at*."""
        values = np.array(list(columns.values()), np.float64).T
        seconds = np.arange(len(values)) * STEP if at is None else np.array(at)
        times = START + (seconds * SECOND).astype(np.int64)
        units = {name: "W" if name == "power" else "%" for name in columns}
        return self.create_window(node, 100_000).append(list(columns), times, values, units)


@dataclass
class Running:
    """A server and channels to it."""

    server: Server
    store: CountingStore
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = pb_grpc.ProcessorServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def wait_for_health(self, status: str) -> None:
        """Returns when the service's health is *status*; each change is told by the server."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        wanted = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
        watch = self.health.Watch(request, timeout=20)
        for answer in watch:
            if answer.status == wanted:
                watch.cancel()
                return


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Starts servers on a free port; all are stopped at the end."""
    started: list[Running] = []

    def start(store: CountingStore, **settings: Any) -> Running:
        connect = settings.pop("connect", lambda: store)
        server = Server(connect, "127.0.0.1:0", **settings)
        server.start()
        started.append(Running(server, store))
        return started[-1]

    yield start
    for running in started:
        running.channel.close()
        running.server.stop(0)


@pytest.fixture
def running(store: CountingStore, run: Callable[..., Running]) -> Running:
    running = run(store)
    running.wait_for_health("SERVING")
    return running


@pytest.fixture
def spec() -> Callable[..., pb.SeriesSpec]:
    """A SeriesSpec of column power with lookback 3 and horizon 2, changed as told."""

    def make(**changes: Any) -> pb.SeriesSpec:
        facts = {
            "node": "a",
            "features": ["power"],
            "targets": ["power"],
            "lookback": 3,
            "horizon": 2,
            "train_fraction": 1.0,
        }
        interval = changes.pop("interval", 0.0)
        message = pb.SeriesSpec(**(facts | changes))
        if interval:
            message.interval.FromNanoseconds(round(interval * SECOND))
        return message

    return make
