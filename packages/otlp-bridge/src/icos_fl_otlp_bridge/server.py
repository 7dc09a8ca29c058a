"""The servers of both transports: health that tells the truth, reflection, and an end in time."""

import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from icos_fl_service.probe import Probe
from icos_fl_timeseries_store import Store, StoreError

from icos_fl_otlp_bridge.bridge import Bridge
from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.errors import ListenError
from icos_fl_otlp_bridge.http_app import MetricsApp
from icos_fl_otlp_bridge.http_server import HttpServer
from icos_fl_otlp_bridge.rates import Rates
from icos_fl_otlp_bridge.receiver import Exports, Receiver
from icos_fl_otlp_bridge.security import Security, Tls
from icos_fl_otlp_bridge.servicer import SERVICE, MetricsServicer, server_options

EXPORTS_WAITING_MAX = 1024
"""Exports that wait for a worker; their messages are not read yet. What is above is refused."""
QUICK_THREADS = 4
"""For health, reflection and refusals, which never wait."""
PATIENCE_SECONDS = 5.0
"""How often calls without a message are looked for."""
GRACE_SECONDS = 5.0
"""How long exports in hand may go on when the server stops."""


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
        self._stopping = threading.Event()
        self._patience = threading.Thread(target=self._lose_patience, name="patience", daemon=True)
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._set_serving(False)
        self._probe = Probe(self._ask_store, self._set_serving, StoreError)
        self._receiver = Receiver(
            Exports(max_concurrent_exports, max_waiting_exports),
            security or Security(),
            max_message_bytes,
        )
        self._servicer = MetricsServicer(self._receiver)
        self._server = self._grpc_server()
        self.port: int = self._listen(listen_address)
        """Of OTLP/gRPC."""
        self._http: HttpServer | None = None
        if http_listen_address:
            tls = self._tls_context if self._receiver.security.tls else None
            self._http = HttpServer(MetricsApp(self._receiver), http_listen_address, tls)
        self.http_port: int | None = self._http.port if self._http else None
        """Of OTLP/HTTP, if it is served."""

    def start(self) -> None:
        """Serve from now on."""
        self._server.start()
        if self._http:
            self._http.start()
        self._probe.start()
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
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        if self._http:
            self._http.end(grace_seconds)
        self._server.stop(grace_seconds).wait()
        if self._http:
            self._http.wait(grace_seconds + 2)
        self._receiver.exports.shutdown(wait=False, cancel_futures=True)
        self._probe.stop(grace_seconds)
        if self._store is not None:
            self._store.close()

    def _grpc_server(self) -> grpc.Server:
        quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="grpc")
        server = grpc.server(quick, options=server_options(self._receiver.max_message_bytes))
        server.add_generic_rpc_handlers([self._servicer])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _listen(self, address: str) -> int:
        try:
            if self._receiver.security.tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._grpc_credentials())
        except RuntimeError:
            raise ListenError(
                f"cannot listen on {address}: the port is taken, or the host is not this machine's"
            ) from None

    def _grpc_credentials(self) -> grpc.ServerCredentials:
        def newest() -> grpc.ServerCertificateConfiguration:
            tls = self._tls()
            return grpc.ssl_server_certificate_configuration(
                [(tls.key, tls.certificate)], tls.client_ca
            )

        return grpc.dynamic_ssl_server_credentials(
            newest(), newest, require_client_authentication=self._tls().client_ca is not None
        )

    def _tls(self) -> Tls:
        tls = self._receiver.security.tls
        if tls is None:
            raise ValueError("TLS cannot be switched off while serving")
        return tls

    def _tls_context(self) -> ssl.SSLContext:
        return self._tls().context

    def _lose_patience(self) -> None:
        while not self._stopping.wait(PATIENCE_SECONDS):
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

    def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
