"""The forecasts of a store's windows, on the gRPC server that every service has."""

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator

import grpc
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl.forecast.v1 import forecast_service_pb2_grpc as pb_grpc
from icos_fl_service.grpc_server import GRACE_SECONDS, GrpcServer
from icos_fl_service.security import Security
from icos_fl_timeseries_store import Store, StoreError

from icos_fl_client.serving import convert
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower
from icos_fl_client.serving.outlook import Outlook

CALLS_MAX = 8
"""Calls for which there is room when all watchers are there."""
RECEIVE_BYTES_MAX = 64 << 10
LOOK_SECONDS = 1.0
"""How late a watcher notices that the server stops."""
PROBE_SECONDS = 10.0
"""How late a window that is new, or a store that has gone, is noticed."""

SERVICE: str = pb.DESCRIPTOR.services_by_name["ForecastService"].full_name


class Server(GrpcServer):
    """Serves what *follower* posts on *board*, of the store that *connect* gives.

    While the store does not answer health says NOT_SERVING; what was forecast is served all the
    same. The server closes the store when it stops. Raises ListenError.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        follower: Follower,
        board: Board,
        listen_address: str,
        *,
        watchers_max: int = 16,
        security: Security = Security(),  # noqa: B008 - frozen
    ) -> None:
        self._connect = connect
        self._follower = follower
        self._board = board
        self._watchers_max = watchers_max
        self._store: Store | None = None
        super().__init__(
            SERVICE,
            listen_address,
            self._add,
            self._ask_store,
            expected=StoreError,
            probe_seconds=PROBE_SECONDS,
            threads=CALLS_MAX + watchers_max,
            receive_bytes_max=RECEIVE_BYTES_MAX,
            security=security,
        )

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more calls, keep what was learned, and close the store."""
        super().stop(grace_seconds)
        self._follower.stop()
        if self._store is not None:
            self._store.close()

    def _add(self, server: grpc.Server) -> None:
        servicer = _Servicer(self._board, self._follower, self._watchers_max, self.stopping.is_set)
        pb_grpc.add_ForecastServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    def _ask_store(self) -> None:
        if self._store is None:
            self._store = self._connect()
        self._store.check()
        self._follower.find(self._store)


class _Servicer(pb_grpc.ForecastServiceServicer):
    """A watcher keeps its thread while it waits, so at most *watchers_max* may be there at once."""

    def __init__(
        self, board: Board, follower: Follower, watchers_max: int, stopping: Callable[[], bool]
    ) -> None:
        self._board = board
        self._follower = follower
        self._watchers_max = watchers_max
        self._watchers = threading.BoundedSemaphore(watchers_max)
        self._stopping = stopping

    def GetForecasts(  # noqa: N802
        self, request: pb.GetForecastsRequest, context: grpc.ServicerContext
    ) -> pb.GetForecastsResponse:
        outlooks = self._board.outlooks()
        _check_known(context, "node", request.nodes, {each.node for each in outlooks})
        _check_known(context, "metric", request.metrics, {each.metric for each in outlooks})
        wanted = [each for each in outlooks if _is_wanted(each, request.nodes, request.metrics)]
        return pb.GetForecastsResponse(forecasts=map(convert.forecast, wanted))

    def WatchForecasts(  # noqa: N802
        self, request: pb.WatchForecastsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchForecastsResponse]:
        def ended() -> bool:
            return self._stopping() or not context.is_active()

        with self._watcher(context):
            context.add_callback(self._board.wake)
            count = 0
            while not ended():
                count, outlooks = self._board.since(count)
                for outlook in outlooks:
                    if _is_wanted(outlook, request.nodes, request.metrics):
                        yield pb.WatchForecastsResponse(forecast=convert.forecast(outlook))
                self._board.wait(count, LOOK_SECONDS, ended)
        if self._stopping():
            context.abort(grpc.StatusCode.UNAVAILABLE, "the forecaster is shutting down")

    def GetRecord(  # noqa: N802
        self, request: pb.GetRecordRequest, context: grpc.ServicerContext
    ) -> pb.GetRecordResponse:
        found = self._follower.record(request.node, request.metric)
        if found is None:
            outlooks = self._board.outlooks()
            _check_known(context, "node", [request.node], {each.node for each in outlooks})
            metrics = {each.metric for each in outlooks if each.node == request.node}
            _check_known(context, "metric", [request.metric], metrics)
        assert found is not None
        return convert.record(found)

    @contextlib.contextmanager
    def _watcher(self, context: grpc.ServicerContext) -> Iterator[None]:
        if not self._watchers.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._watchers_max} clients watch forecasts already, and that is the limit",
            )
        try:
            yield
        finally:
            self._watchers.release()


def _is_wanted(outlook: Outlook, nodes: Collection[str], metrics: Collection[str]) -> bool:
    return (not nodes or outlook.node in nodes) and (not metrics or outlook.metric in metrics)


def _check_known(
    context: grpc.ServicerContext, what: str, asked: Collection[str], known: Collection[str]
) -> None:
    for name in asked:
        if name not in known:
            there = ", ".join(sorted(known)) or "none before it has gone through the windows"
            context.abort(grpc.StatusCode.NOT_FOUND, f"no {what} {name!r}; there are: {there}")
