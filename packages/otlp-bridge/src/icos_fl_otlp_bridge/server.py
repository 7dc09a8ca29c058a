"""The gRPC server: health that tells the truth, reflection, and an end in time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from icos_fl_timeseries_store import Store, StoreError, StoreUnavailable

from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.errors import ListenError
from icos_fl_otlp_bridge.servicer import SERVICE, Bridge, MetricsServicer

CALLS_WAITING_MAX = 1024
"""Calls that wait for a worker; their messages are not read yet. gRPC refuses what is above."""
PROBE_SECONDS = 2.0
"""How often the store is asked whether it still answers."""
GRACE_SECONDS = 5.0
"""How long exports in hand may go on when the server stops."""

log = structlog.get_logger()


class Server:
    """Takes OTLP into the store that *connect* gives, as soon as it gives it.

    While the store does not answer, exports end with UNAVAILABLE and health says NOT_SERVING. The
    store is closed when the server stops.
    """

    def __init__(
        self,
        config: BridgeConfig,
        connect: Callable[[], Store],
        listen_address: str,
        max_message_bytes: int = 64 << 20,
        max_concurrent_exports: int = 16,
    ) -> None:
        self._config = config
        self._connect = connect
        self._store: Store | None = None
        self._bridge: Bridge | None = None
        self._why_not = "the store has not answered yet"
        self._stopping = threading.Event()
        self._probing = threading.Thread(target=self._probe, name="store probe", daemon=True)
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._set_serving(False)
        self._server = grpc.server(
            ThreadPoolExecutor(max_concurrent_exports, thread_name_prefix="export"),
            maximum_concurrent_rpcs=max_concurrent_exports + CALLS_WAITING_MAX,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
            ],
        )
        MetricsServicer(self._serving_bridge, config.metrics).add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            self.port: int = self._server.add_insecure_port(listen_address)
        except RuntimeError:
            raise ListenError(
                f"cannot listen on {listen_address}: the port is taken, or the host is not this "
                "machine's"
            ) from None

    def start(self) -> None:
        """Serve from now on; ``port`` is the port."""
        self._server.start()
        self._probing.start()

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more exports, wait for those in hand, and close the store."""
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait()
        if self._probing.is_alive():
            self._probing.join(grace_seconds)
        if self._store is not None:
            self._store.close()

    def _serving_bridge(self) -> Bridge:
        if self._bridge is None:
            raise StoreUnavailable(self._why_not)
        return self._bridge

    def _probe(self) -> None:
        answered = None
        while not self._stopping.is_set():
            try:
                self._ask_store()
                answers = True
            except Exception as error:  # else the probe ends, and health stays at its last word
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
        self._store.nodes()
        if self._bridge is None:
            self._bridge = Bridge(self._config, self._store)

    def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
