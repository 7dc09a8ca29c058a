"""A gRPC server with health that tells the truth, reflection, and an end in time."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from icos_fl_service.calls import CallMetrics
from icos_fl_service.probe import PROBE_SECONDS, Probe
from icos_fl_service.security import Security, TokenCheck, grpc_credentials

GRACE_SECONDS = 5.0
"""How long calls in progress may go on when the server stops."""


class ListenError(Exception):
    """An address that cannot be listened on."""


class GrpcServer:
    """Serves what *add* adds to it; *service* is its full name in the proto.

    Health is NOT_SERVING until *ask* returns, whenever it raises, and while shutting down;
    ``why_not`` is the last error of *ask*, of which *expected* are no surprise. What answers is
    asked again after *probe_seconds*. *threads* calls are worked on at once, *waiting_max* more
    wait, None for any number; gRPC refuses what is above with RESOURCE_EXHAUSTED. *options* are
    gRPC's. *security* is what is asked of who calls; *credentials* go before its TLS. Raises
    ListenError.
    """

    def __init__(
        self,
        service: str,
        listen_address: str,
        add: Callable[[grpc.Server], None],
        ask: Callable[[], None],
        *,
        expected: type[Exception],
        probe_seconds: float = PROBE_SECONDS,
        threads: int,
        waiting_max: int | None = 0,
        receive_bytes_max: int,
        send_bytes_max: int = -1,
        options: Sequence[tuple[str, int]] = (),
        security: Security = Security(),  # noqa: B008 - frozen
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),  # older siblings give their own
    ) -> None:
        self._service = service
        self.security = security
        """What is asked of who connects now."""
        self.stopping = threading.Event()
        """Set as soon as the server is told to stop: calls that wait end by it."""
        # Its watchers take no thread of the pool.
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._set_serving(False)
        self._probe = Probe(ask, self._set_serving, expected, seconds=probe_seconds)
        credentials = credentials or grpc_credentials(lambda: self.security)
        token_check = TokenCheck(service, lambda: self.security)
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="call"),
            maximum_concurrent_rpcs=None if waiting_max is None else threads + waiting_max,
            interceptors=[*interceptors, token_check, CallMetrics(service)],
            options=[
                ("grpc.max_receive_message_length", receive_bytes_max),
                ("grpc.max_send_message_length", send_bytes_max),
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
                *options,
            ],
        )
        add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            self.port: int = (
                self._server.add_secure_port(listen_address, credentials)
                if credentials
                else self._server.add_insecure_port(listen_address)
            )
        except RuntimeError:
            raise ListenError(
                f"cannot listen on {listen_address}: the port is taken, or the host is not this"
                " machine's"
            ) from None

    @property
    def why_not(self) -> str:
        """Why it does not serve, if it does not."""
        return self._probe.why_not

    def start(self) -> None:
        """Serve from now on; ``port`` is the port."""
        self._server.start()
        self._probe.start()

    def take_over(self, security: Security) -> None:
        """Go by it from the next connection and call on; those that are there go on.

        Whether there is TLS, and whether clients need a certificate, cannot change.
        """
        self.security = security

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Take no more calls, and wait for those in progress."""
        self.stopping.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_seconds).wait()
        self._probe.stop(grace_seconds)

    def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", self._service):
            self._health.set(name, status.SERVING if serving else status.NOT_SERVING)
