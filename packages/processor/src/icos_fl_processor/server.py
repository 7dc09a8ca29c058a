"""The gRPC server: health that says the truth, reflection, and an end that is clean."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_timeseries_store import Store, StoreError, StoreUnavailable

from icos_fl_processor.processor import Processor
from icos_fl_processor.servicer import ProcessorServicer

CALLS_MAX = 16
"""Calls for which there is room when all watchers are there. More than both together are refused
with RESOURCE_EXHAUSTED."""
PROBE_SECONDS = 2.0
"""How often the store is asked whether it still answers."""
GRACE_SECONDS = 5.0
"""How long calls in progress may go on when the server stops."""

SERVICE: str = pb.DESCRIPTOR.services_by_name["ProcessorService"].full_name

log = structlog.get_logger()


class ListenError(Exception):
    """The address cannot be listened on."""


class Server:
    """Serves the windows of the store that *connect* gives, as soon as it gives it.

    While the store does not answer, calls end with UNAVAILABLE and health says NOT_SERVING. The
    server closes the store when it stops.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        listen_address: str,
        max_message_bytes: int = 4 << 20,
        watchers_max: int = 64,
    ) -> None:
        self._connect = connect
        self._max_message_bytes = max_message_bytes
        self._store: Store | None = None
        self._processor: Processor | None = None
        self._why_not = "the store has not answered yet"
        self._stopping = threading.Event()
        self._probing = threading.Thread(target=self._probe, name="store probe", daemon=True)
        # Its watchers take no thread of the pool.
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._set_serving(False)
        self._server = self._build(listen_address, watchers_max)

    def _build(self, listen_address: str, watchers_max: int) -> grpc.Server:
        threads = CALLS_MAX + watchers_max
        server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="call"),
            maximum_concurrent_rpcs=threads,
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", self._max_message_bytes),
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
            ],
        )
        servicer = ProcessorServicer(self._serving_processor, watchers_max, self._stopping)
        pb_grpc.add_ProcessorServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            self.port: int = server.add_insecure_port(listen_address)
        except RuntimeError:
            raise ListenError(
                f"cannot listen on {listen_address}: the port is taken, or the host is not this"
                " machine's"
            ) from None
        return server

    def start(self) -> None:
        """Serve from now on; ``port`` is the port."""
        self._server.start()
        self._probing.start()

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more calls, end watchers, wait for the other calls, and close the store."""
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait()
        if self._probing.is_alive():
            self._probing.join(grace_seconds)
        if self._store is not None:
            self._store.close()

    def _serving_processor(self) -> Processor:
        if self._processor is None:
            raise StoreUnavailable(self._why_not)
        return self._processor

    def _probe(self) -> None:
        answered = None
        while not self._stopping.is_set():
            try:
                self._ask_store()
                answers = True
            except Exception as error:
                answers = False
                self._why_not = str(error)
                if not isinstance(error, StoreError):
                    log.exception("unexpected error of the store")
            if answers is not answered:
                answered = answers
                self._set_serving(answers)
                if answers:
                    log.info("store answers")
                else:
                    log.warning("store does not answer", reason=self._why_not)
            self._stopping.wait(PROBE_SECONDS)

    def _ask_store(self) -> None:
        if self._store is None:
            self._store = self._connect()
        processor = self._processor or Processor(self._store, self._max_message_bytes)
        processor.check_store()
        self._processor = processor

    def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
