"""The store and the servicer, on the gRPC server that every service has."""

from collections.abc import Callable

import grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_service.grpc_server import GRACE_SECONDS, GrpcServer, ListenError
from icos_fl_service.security import Security
from icos_fl_timeseries_store import Store, StoreError, StoreUnavailable
from icos_fl_timeseries_store.conditions import Expectations

from icos_fl_processor.judging import Judging
from icos_fl_processor.processor import Processor
from icos_fl_processor.servicer import ProcessorServicer

CALLS_MAX = 16
"""Calls for which there is room when all watchers are there. More than both together are refused
with RESOURCE_EXHAUSTED."""

SERVICE: str = pb.DESCRIPTOR.services_by_name["ProcessorService"].full_name

__all__ = ["SERVICE", "ListenError", "Server"]


class Server(GrpcServer):
    """Serves the windows of the store that *connect* gives, as soon as it gives it.

    While the store does not answer, calls end with UNAVAILABLE and health says NOT_SERVING. The
    server closes the store when it stops. With *judging*, Prometheus is told what is wrong with the
    windows, whose rows may be *recorded* ones. Raises ListenError.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        listen_address: str,
        max_message_bytes: int = 4 << 20,
        watchers_max: int = 64,
        expectations: Expectations = Expectations(),  # noqa: B008 - frozen
        *,
        judging: bool = False,
        recorded: bool = False,
        security: Security = Security(),  # noqa: B008 - frozen
    ) -> None:
        self._connect = connect
        self._max_message_bytes = max_message_bytes
        self._watchers_max = watchers_max
        self._expectations = expectations
        self._store: Store | None = None
        self._processor: Processor | None = None
        self._judging = Judging(expectations, recorded=recorded) if judging else None
        super().__init__(
            SERVICE,
            listen_address,
            self._add,
            self._ask_store,
            expected=StoreError,
            threads=CALLS_MAX + watchers_max,
            receive_bytes_max=max_message_bytes,
            send_bytes_max=max_message_bytes,
            security=security,
        )

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more calls, end watchers, wait for the other calls, and close the store."""
        super().stop(grace_seconds)
        if self._judging:
            self._judging.stop()
        if self._store is not None:
            self._store.close()

    def _add(self, server: grpc.Server) -> None:
        servicer = ProcessorServicer(
            self._serving_processor, self._watchers_max, self.stopping.is_set
        )
        pb_grpc.add_ProcessorServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    def _serving_processor(self) -> Processor:
        if self._processor is None:
            raise StoreUnavailable(self.why_not)
        return self._processor

    def _ask_store(self) -> None:
        if self._store is None:
            self._store = self._connect()
        self._store.check()
        if self._processor is None:
            self._processor = Processor(self._store, self._max_message_bytes, self._expectations)
            if self._judging:
                self._judging.start(self._store)
