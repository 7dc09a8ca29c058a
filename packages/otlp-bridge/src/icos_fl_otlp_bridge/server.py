"""The servers of both transports, over one receiver."""

import ssl
import threading
from collections.abc import Callable

from icos_fl_service.grpc_server import GRACE_SECONDS, GrpcServer
from icos_fl_service.security import Security, grpc_credentials
from icos_fl_timeseries_store import Store, StoreError

from icos_fl_otlp_bridge.bridge import Bridge
from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.http_app import MetricsApp
from icos_fl_otlp_bridge.http_server import HttpServer
from icos_fl_otlp_bridge.rates import Rates
from icos_fl_otlp_bridge.receiver import Exports, Receiver
from icos_fl_otlp_bridge.servicer import OPTIONS, SERVICE, MetricsServicer

EXPORTS_WAITING_MAX = 1024
"""Exports that wait for a worker; their messages are not read yet. What is above is refused."""
QUICK_THREADS = 4
"""For health, reflection and refusals, which never wait."""
PATIENCE_SECONDS = 5.0
"""How often calls without a message are looked for."""


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
        *,
        max_waiting_exports: int = EXPORTS_WAITING_MAX,
        http_listen_address: str = "",
        security: Security | None = None,
    ) -> None:
        self._config = config
        self._connect = connect
        self._store: Store | None = None
        self._rates = Rates()
        self._changing = threading.Lock()
        self._patience = threading.Thread(target=self._lose_patience, name="patience", daemon=True)
        self._receiver = Receiver(
            Exports(max_concurrent_exports, max_waiting_exports),
            security or Security(),
            max_message_bytes,
        )
        self._servicer = MetricsServicer(self._receiver)
        # Exports have workers and a queue of their own.
        self._grpc = GrpcServer(
            SERVICE,
            listen_address,
            lambda server: server.add_generic_rpc_handlers([self._servicer]),
            self._ask_store,
            expected=StoreError,
            threads=QUICK_THREADS,
            waiting_max=None,
            receive_bytes_max=max_message_bytes,
            options=OPTIONS,
            credentials=grpc_credentials(lambda: self._receiver.security),
        )
        self.port: int = self._grpc.port
        """Of OTLP/gRPC."""
        self._http: HttpServer | None = None
        if http_listen_address:
            tls = self._tls_context if self._receiver.security.tls else None
            self._http = HttpServer(MetricsApp(self._receiver), http_listen_address, tls)
        self.http_port: int | None = self._http.port if self._http else None
        """Of OTLP/HTTP, if it is served."""

    def start(self) -> None:
        """Serve from now on."""
        self._grpc.start()
        if self._http:
            self._http.start()
        self._patience.start()

    def take_over(self, config: BridgeConfig, security: Security) -> None:
        """Go by these from the next export on; those in hand end by the old ones.

        Whether there is TLS cannot change.
        """
        with self._changing:
            self._config = config
            if self._store is not None:
                self._receiver.bridge = Bridge(config, self._store, self._rates)
        self._receiver.security = security

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more exports, wait for those in hand, and close the store."""
        if self._http:
            self._http.end(grace_seconds)
        self._grpc.stop(grace_seconds)
        if self._http:
            self._http.wait(grace_seconds + 2)
        self._receiver.exports.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _tls_context(self) -> ssl.SSLContext:
        tls = self._receiver.security.tls
        if tls is None:
            raise ValueError("TLS cannot be switched off while serving")
        return tls.context

    def _lose_patience(self) -> None:
        while not self._grpc.stopping.wait(PATIENCE_SECONDS):
            self._servicer.end_silent_calls()

    def _ask_store(self) -> None:
        try:
            if self._store is None:
                self._store = self._connect()
            self._store.check()
        except Exception as error:
            self._receiver.why_not = str(error)
            raise
        with self._changing:
            if self._receiver.bridge is None:
                self._receiver.bridge = Bridge(self._config, self._store, self._rates)
