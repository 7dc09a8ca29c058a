"""A real forecast service on a MemoryStore whose rows the test appends."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl.forecast.v1 import forecast_service_pb2_grpc as pb_grpc
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.serving import follower
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower, Following
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.model import DEFAULT_MODEL
from icos_fl_client.serving.server import Server
from icos_fl_client.settings import RunConfig, parse
from icos_fl_timeseries_store import MemoryStore, ModelVersion, StoreUnavailable
from icos_fl_timeseries_store.conditions import Expectations

SECOND = 10**9
STEP = 15
MINUTE = 60 * SECOND
PATIENCE_SECONDS = 60.0


class AwayStore(MemoryStore):
    """A MemoryStore that can be made unavailable."""

    answers = True

    def check(self) -> None:
        self._answer()

    def nodes(self) -> list[str]:
        self._answer()
        return super().nodes()

    def window(self, node: str):
        self._answer()
        return _AwayWindow(self, super().window(node))

    def _answer(self) -> None:
        if not self.answers:
            raise StoreUnavailable("the store at nowhere:1 does not answer")


class _AwayWindow:
    """A window of an AwayStore."""

    def __init__(self, store: AwayStore, window) -> None:
        self._store = store
        self._window = window

    def __getattr__(self, name: str):
        self._store._answer()
        return getattr(self._window, name)


@dataclass
class Service:
    """A forecast service that runs, and the rows of its one window."""

    store: AwayStore = field(default_factory=AwayStore)
    recorded: bool = True
    step_seconds: int = STEP
    folder: Path | None = None
    expectations: Expectations = field(default_factory=Expectations)
    watchers_max: int = 2
    processor: Callable | None = None
    running: bool = False

    def __post_init__(self) -> None:
        self.window = self.store.create_window("a", 10_000)
        self.time_ns = 1_700_000_000 * SECOND if self.recorded else time.time_ns()

    def start(self) -> None:
        self.board = Board()
        following = Following(
            self.step_seconds * SECOND,
            (MINUTE, 5 * MINUTE),
            expectations=self.expectations,
            recorded=self.recorded,
        )
        self.follower = Follower(following, self.board, KeptState(self.folder), self.processor)
        self.server = Server(
            lambda: self.store,
            self.follower,
            self.board,
            "127.0.0.1:0",
            watchers_max=self.watchers_max,
        )
        self.server.start()
        self.running = True
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = pb_grpc.ForecastServiceStub(self.channel)

    def stop(self) -> None:
        if self.running:
            self.channel.close()
            self.server.stop()
        self.running = False

    def append(self, units: dict[str, str] | None = None, **columns: list[float]) -> None:
        """A row a step for each value."""
        count = max(map(len, columns.values()))
        times = self.time_ns + np.arange(1, count + 1) * STEP * SECOND
        self.time_ns = int(times[-1])
        values = np.array(list(columns.values()), float).T
        self.window.append(list(columns), times, values, units or {"cpu": "%", "power": "W"})

    def forecasts(self, *metrics: str) -> list[pb.Forecast]:
        return list(self.stub.GetForecasts(pb.GetForecastsRequest(metrics=metrics)).forecasts)

    def until(self, true: Callable[[pb.Forecast], bool], metric: str = "cpu") -> pb.Forecast:
        """The first forecast of *metric* of which it is *true*."""
        request = pb.WatchForecastsRequest(metrics=[metric])
        seen = None
        try:
            for answer in self.stub.WatchForecasts(request, timeout=PATIENCE_SECONDS):
                seen = answer.forecast
                if true(seen):
                    return seen
        except grpc.RpcError as error:
            raise AssertionError(f"{error.code()}; the last word was {seen}") from None
        raise AssertionError("the stream ended")

    def until_now(self, metric: str = "cpu") -> pb.Forecast:
        """The forecast that starts at the newest row."""
        return self.until(lambda found: found.last_time.ToNanoseconds() >= self.time_ns, metric)

    def record(self, metric: str = "cpu") -> pb.GetRecordResponse:
        return self.stub.GetRecord(pb.GetRecordRequest(node="a", metric=metric))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    """Judge windows and look for models whenever there is something new."""
    monkeypatch.setattr(follower, "JUDGE_SECONDS", 0.0)
    monkeypatch.setattr(follower, "MODEL_SECONDS", 0.0)
    monkeypatch.setattr(follower, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.1)


@pytest.fixture
def new_service() -> Iterator[Callable[..., Service]]:
    """Makes services, which the test starts; they end with it."""
    made: list[Service] = []

    def new(**chosen: object) -> Service:
        made.append(Service(**chosen))
        return made[-1]

    yield new
    for service in made:
        service.stop()


@pytest.fixture
def service(new_service) -> Service:
    """One that runs and has no row yet."""
    service = new_service()
    service.start()
    return service


@pytest.fixture
def new_model() -> Callable[..., ModelVersion]:
    """Makes versions of models whose lookback is 8 steps and whose horizon 20.

    The weights of the default model are 0: its softmax gates all anchors alike.
    """

    def new(made_in: int = 3, **changes: object) -> ModelVersion:
        given = {"metric": "cpu", "time-step": 8, "horizon": 20, **changes}
        run = parse(RunConfig, given, "run config of the test")
        weights = weights_of(build_model(run, "cpu"))
        if run.model == DEFAULT_MODEL:
            weights = {name: np.zeros_like(array) for name, array in weights.items()}
        created = {"created-unix-s": 1_700_000_000.0 + made_in}
        return ModelVersion(made_in, weights, run.model_config_of("cpu"), created)

    return new
