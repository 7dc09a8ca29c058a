"""A processor that serves what a test gives it over real gRPC, and a real dataClay."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_timeseries_store import StoreSettings, connect
from icos_fl_timeseries_store.testing import running_store

SECOND = 1_000_000_000
STEP_NS = 15 * SECOND
START_NS = 1_700_000_000 * SECOND + SECOND // 4
NEW_ROWS = 7


@dataclass
class Series:
    """A metric of a node in its unit: runs of each part, one step missing between two runs."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    unit: str
    mean: float
    deviation: float

    def chunks(self, again: int) -> Iterator[pb.SequencesChunk]:
        """Every run in chunks with at most NEW_ROWS new sequences, cut as the proto wants it."""
        start = 0
        for split, runs in ((pb.SPLIT_TRAIN, self.train), (pb.SPLIT_VALIDATION, self.validation)):
            for run in runs:
                rows = ((run - self.mean) / self.deviation).astype("<f4")
                first = 0
                while first + again < len(rows):
                    chunk = pb.SequencesChunk(split=split)
                    chunk.first_time.FromNanoseconds(START_NS + (start + first) * STEP_NS)
                    chunk.rows = rows[first : first + again + NEW_ROWS].tobytes()
                    yield chunk
                    first += NEW_ROWS
                start += len(run) + 1

    def last_time_ns(self) -> int:
        runs = self.train + self.validation
        return START_NS + (sum(map(len, runs)) + len(runs) - 2) * STEP_NS


class Windows(pb_grpc.ProcessorServiceServicer):
    """What the nodes have. Set *failure* and every call ends with it, *silence* and none does."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str], Series] = {}
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.silence: threading.Event | None = None
        self.asked: list[pb.SeriesSpec] = []

    def put(
        self,
        node: str,
        metric: str,
        train: list[np.ndarray],
        validation: list[np.ndarray],
        unit: str = "%",
        mean: float = 50.0,
        deviation: float = 10.0,
    ) -> None:
        self.series[node, metric] = Series(train, validation, unit, mean, deviation)

    def _find(self, spec: pb.SeriesSpec, context: grpc.ServicerContext) -> Series:
        self.asked.append(spec)
        if self.silence:
            self.silence.wait()
        if self.failure:
            context.abort(*self.failure)
        key = (spec.node, spec.targets[0])
        if key not in self.series:
            columns = ", ".join(metric for node, metric in self.series if node == spec.node)
            context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"node {spec.node!r} has no column {key[1]!r}; it has: {columns}",
            )
        return self.series[key]

    def ListNodes(self, request: Any, context: grpc.ServicerContext) -> pb.ListNodesResponse:  # noqa: N802
        if self.failure:
            context.abort(*self.failure)
        return pb.ListNodesResponse(nodes=sorted({node for node, _ in self.series}))

    def DescribeWindow(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        series = self._find(request.series, context)
        train, validation = _counts(series, request.series)
        reason = "" if train else f"{_length(request.series)} rows in a row are needed"
        return pb.DescribeWindowResponse(
            train_sequences=train, validation_sequences=validation, reason=reason
        )

    def GetSequences(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        series = self._find(request.series, context)
        train, validation = _counts(series, request.series)
        if not train + validation:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{_length(request.series)} rows in a row are needed",
            )
        header = pb.SequencesHeader(
            columns=[_statistics(request.series, series)],
            train_sequences=train,
            validation_sequences=validation,
        )
        header.interval.FromNanoseconds(STEP_NS)
        yield pb.GetSequencesResponse(header=header)
        for chunk in series.chunks(_length(request.series) - 1):
            yield pb.GetSequencesResponse(chunk=chunk)

    def GetLatest(self, request: Any, context: grpc.ServicerContext) -> pb.GetLatestResponse:  # noqa: N802
        series = self._find(request.series, context)
        last = (series.train + series.validation)[-1][-request.series.lookback :]
        rows = ((last - series.mean) / series.deviation).astype("<f4")
        answer = pb.GetLatestResponse(
            columns=[_statistics(request.series, series)], rows=rows.tobytes()
        )
        answer.interval.FromNanoseconds(STEP_NS)
        answer.last_time.FromNanoseconds(series.last_time_ns())
        return answer


def _length(spec: pb.SeriesSpec) -> int:
    return int(spec.lookback + spec.horizon)


def _counts(series: Series, spec: pb.SeriesSpec) -> tuple[int, int]:
    train, validation = (
        sum(max(0, len(run) - _length(spec) + 1) for run in runs)
        for runs in (series.train, series.validation)
    )
    return train, validation


def _statistics(spec: pb.SeriesSpec, series: Series) -> pb.Statistics:
    return pb.Statistics(
        column=spec.targets[0],
        unit=series.unit,
        mean=series.mean,
        standard_deviation=series.deviation,
    )


@pytest.fixture
def windows() -> Windows:
    """Nothing, until a test puts something."""
    return Windows()


@pytest.fixture
def address(windows: Windows) -> Iterator[str]:
    """Where *windows* are served."""
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_ProcessorServiceServicer_to_server(windows, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    stopped: threading.Event = server.stop(0)
    stopped.wait()


@pytest.fixture
def processor(address: str) -> Iterator[ProcessorClient]:
    with ProcessorClient(address, deadline_seconds=20) as client:
        yield client


@pytest.fixture(scope="session")
def dataclay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    with running_store(tmp_path_factory.mktemp("store")) as settings:
        connect(settings).close()  # ready, not only listening
        yield settings


@pytest.fixture
def wave() -> Callable[..., np.ndarray]:
    """Rows around 50, from a seed."""

    def make(count: int, seed: int = 0) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, 2, count)
        return 50 + 10 * np.sin(np.arange(count) / 5) + noise

    return make


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's: factories of models that repeat the last value, or go above it."""
    (tmp_path / "a_model_of_ones_own.py").write_text(
        "import torch\n"
        "class Repeat(torch.nn.Module):\n"
        "    def __init__(self, horizon, rise):\n"
        "        super().__init__()\n"
        "        self.horizon, self.rise = horizon, rise\n"
        "    def forward(self, x):\n"
        "        return x[:, -1:, 0].expand(-1, self.horizon) + self.rise\n"
        "def repeat(*, horizon, **_): return Repeat(horizon, 0.0)\n"
        "def rise(*, horizon, **_): return Repeat(horizon, 1.0)\n"
        "def fall(*, horizon, **_): return Repeat(horizon, -1.0)\n"
        "def nan(*, horizon, **_): return Repeat(horizon, float('nan'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "a_model_of_ones_own"


@pytest.fixture
def small_run() -> dict[str, Any]:
    """A run configuration that learns in a moment: 4 steps in, 2 ahead."""
    return {
        "metric": "cpu_usage",
        "time-step": 4,
        "horizon": 2,
        "hidden-layer-size": 4,
        "local-epochs": 1,
    }
