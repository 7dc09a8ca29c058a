"""What the launcher asks of the processor: which windows there are, and what is missing in them."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc

from icos_fl_local.errors import LocalError
from icos_fl_local.run_config import Value

_DEADLINE_SECONDS = 10.0


@dataclass(frozen=True)
class Window:
    """What a node's window holds."""

    rows: int
    columns: tuple[str, ...]
    """Those that have a value in some row."""


@dataclass(frozen=True)
class Readiness:
    """What is missing until a metric of a node can be learned."""

    missing_rows: int
    reason: str
    """Empty when nothing is missing."""


class ProcessorClient:
    """A connection to the processor. Use it as a context manager. Raises LocalError."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address)
        # Generated stubs have no types.
        self._stub: Any = pb_grpc.ProcessorServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "ProcessorClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def windows(self) -> dict[str, Window]:
        """All windows, by node."""
        nodes = self._call(self._stub.ListNodes, pb.ListNodesRequest()).nodes
        return {node: self._window(node) for node in nodes}

    def readiness(
        self, node: str, metrics: Iterable[str], config: dict[str, Value]
    ) -> dict[str, Readiness]:
        """For each metric, what is missing until a run with *config* can learn it."""
        extra = [name.strip() for name in str(config["features"]).split(",") if name.strip()]
        found = {}
        for metric in metrics:
            series = pb.SeriesSpec(
                node=node,
                features=[metric, *(name for name in extra if name != metric)],
                targets=[metric],
                lookback=int(config["time-step"]),
                horizon=int(config["horizon"]),
                train_fraction=float(config["train-test-split"]),
            )
            series.interval.FromMicroseconds(round(float(config["interval"]) * 1e6))
            request = pb.DescribeWindowRequest(series=series)
            answer = self._call(self._stub.DescribeWindow, request)
            found[metric] = Readiness(answer.missing_rows, answer.reason)
        return found

    def _window(self, node: str) -> Window:
        request = pb.DescribeWindowRequest(series=pb.SeriesSpec(node=node))
        answer = self._call(self._stub.DescribeWindow, request)
        columns = tuple(column.name for column in answer.columns if column.rows)
        return Window(answer.rows, columns)

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_DEADLINE_SECONDS)
        except grpc.RpcError as error:
            raise LocalError(
                f"processor at {self._address}: {error.code().name}: {error.details()}"
            ) from None
