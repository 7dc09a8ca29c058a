"""A node that runs: what its forecaster has said of each metric, and what came."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl.forecast.v1 import forecast_service_pb2_grpc as pb_grpc
from icos_fl_client.credentials import Credentials
from icos_fl_client.forecasting.backtest import Record
from numpy.typing import NDArray

from icos_fl_local.backtest.found import Found, gather, judge, known
from icos_fl_local.errors import LocalError

_DEADLINE_SECONDS = 30.0
_MESSAGE_BYTES_MAX = 256 << 20
"""A record of 4,096 steps, 3 horizons and 12 forecasters has 2 MB."""
_BOUNDS = ((0.95, "lower"), (0.8, "lower"), (0.8, "upper"), (0.95, "upper"))
"""As Record has them."""


@dataclass(frozen=True)
class Said:
    """The record of one metric."""

    unit: str
    interval_seconds: float
    end_unix_s_t: NDArray[np.float64]
    record: Record


class ForecasterClient:
    """A connection to the forecaster at host:port. Use it as a context manager.

    Raises LocalError.
    """

    def __init__(self, address: str, credentials: Credentials = Credentials()) -> None:  # noqa: B008 - frozen
        self.address = address
        self._credentials = credentials
        self._metadata = credentials.metadata()
        options = [("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX)]
        self._channel = credentials.channel(address, options)
        # Generated stubs have no types.
        self._stub: Any = pb_grpc.ForecastServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "ForecasterClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def forecasts(self, nodes: Sequence[str] = ()) -> Sequence[Any]:
        """The newest ``Forecast`` of each metric of *nodes*, or of all."""
        answer = self._call(self._stub.GetForecasts, pb.GetForecastsRequest(nodes=nodes))
        found: Sequence[Any] = answer.forecasts
        return found

    def metrics(self) -> dict[tuple[str, str], str]:
        """Each node and metric, and why there is no forecast of it now; empty where there is."""
        return {(each.node, each.metric): each.none.message for each in self.forecasts()}

    def record(self, node: str, metric: str) -> Said:
        """What was said of a metric."""
        request = pb.GetRecordRequest(node=node, metric=metric)
        answer = self._call(self._stub.GetRecord, request)
        interval_ns, horizons = answer.interval.ToNanoseconds(), answer.horizons
        record = Record(
            values_t=np.array(answer.values, np.float64),
            steps_h=np.array([h.ahead.ToNanoseconds() // interval_ns for h in horizons]),
            names=tuple(each.name for each in horizons[0].forecasters),
            yhat_th=np.array([h.yhat for h in horizons]).T,
            quantile_tqh=_bounds(horizons),
            said_tkh=_said(horizons),
        )
        end_ns_t = answer.first_time.ToNanoseconds() + interval_ns * np.arange(len(answer.values))
        return Said(answer.unit, interval_ns / 1e9, end_ns_t / 1e9, record)

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_DEADLINE_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            cause = f"forecaster at {self.address}: {error.code().name}: {error.details()}"
            if error.code() is grpc.StatusCode.UNAVAILABLE and (
                refusal := self._credentials.refusal(self.address)
            ):
                cause += f"; {refusal}"
            raise LocalError(cause) from None


def of_node(client: ForecasterClient, nodes: Sequence[str], metrics: Sequence[str]) -> Found:
    """Judge what a forecaster has said; what came decides. Raises UsageError or LocalError."""
    there = client.metrics()
    nodes = known("node", nodes, [node for node, _ in there])
    metrics = known("metric", metrics, [metric for _, metric in there])
    judged = []
    for (node, metric), why_none in there.items():
        if node in nodes and metric in metrics:
            said = client.record(node, metric)
            about = node, metric, said.unit, said.interval_seconds
            number_t = np.arange(len(said.end_unix_s_t))
            notes = [f"{node}, {metric}: no forecast now: {why_none}"] if why_none else []
            judged.append(judge(about, said.end_unix_s_t, number_t, said.record, notes))
    return gather(f"forecaster at {client.address}", judged, [])


def _bounds(horizons: Any) -> NDArray[np.float64]:
    by_level = [{each.level: each for each in horizon.intervals} for horizon in horizons]
    bounds_hqt = [[getattr(of[level], side) for level, side in _BOUNDS] for of in by_level]
    return np.array(bounds_hqt, np.float64).transpose(2, 1, 0)


def _said(horizons: Any) -> NDArray[np.float64]:
    said_hkt = [[each.yhat for each in horizon.forecasters] for horizon in horizons]
    return np.array(said_hkt, np.float64).transpose(2, 1, 0)
