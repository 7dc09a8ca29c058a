"""uvicorn in a thread, on a socket that is bound beforehand."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable

import h11
import uvicorn
from icos_fl_service.grpc_server import ListenError
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from icos_fl_otlp_bridge.errors import Overloaded, Undecodable
from icos_fl_otlp_bridge.http_app import MetricsApp, refusal
from icos_fl_otlp_bridge.receiver import CONNECTIONS_MAX

KEEP_ALIVE_SECONDS = 120
"""Longer than exporters keep an idle connection: who closes it must not be in their way."""


class _Protocol(H11Protocol):
    """What uvicorn refuses by itself has a Status for a body, as what the application refuses."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(Overloaded(f"there are {CONNECTIONS_MAX} connections, which is the limit"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(Undecodable(msg))

    def _refuse(self, error: Exception) -> None:
        """Tell *error*, unless an answer is on its way, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal(error, Headers(raw=self.headers or []))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class HttpServer:
    """Serves *app* on *listen_address*; with a *tls* that gives one, by the newest context."""

    def __init__(
        self, app: MetricsApp, listen_address: str, tls: Callable[[], ssl.SSLContext] | None
    ) -> None:
        host, _, port = listen_address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()  # as gRPC takes it
        try:
            self._socket = socket.create_server(
                (host, int(port)), family=family, dualstack_ipv6=both
            )
        except (OSError, OverflowError) as error:
            raise ListenError(f"cannot listen on {listen_address}: {error}") from None
        # A peer that is gone without a word must not keep its connection: accepted ones inherit it.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_SECONDS)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",  # a stranger's broken HTTP is no event of ours
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
            proxy_headers=False,
            ssl_context_factory=None if tls is None else lambda *_: _following(tls),
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def end(self, grace_seconds: float) -> None:
        """Take no more; exports in hand go on for *grace_seconds*. Returns at once."""
        self._uvicorn.config.timeout_graceful_shutdown = max(1, round(grace_seconds))
        self._uvicorn.should_exit = True
        if self._thread.ident is None:
            self._socket.close()

    def wait(self, timeout_seconds: float) -> None:
        """Returns when it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)

    def _serve(self) -> None:
        asyncio.run(self._uvicorn.serve(sockets=[self._socket]))


def _following(newest: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """A context whose handshakes take certificate and authority from the *newest* one."""
    context = newest()

    def choose(connection: ssl.SSLObject, *_: object) -> None:
        connection.context = newest()

    first = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    first.minimum_version = context.minimum_version
    first.verify_mode = context.verify_mode
    first.sni_callback = choose
    return first
