"""A page for people: its files, and what its script asks for, to whom it may be told."""

import json
import math
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from icos_fl_service.grpc_server import ListenError
from icos_fl_service.security import Security, Unauthenticated, is_loopback
from icos_fl_service.settings import split_address

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

CONNECTIONS_MAX = 16
IDLE_SECONDS = 10.0
"""Who is silent for so long is waited for no more."""

Answer = Callable[[Mapping[str, str]], Any]
"""From the query's variables to JSON's types. Raises Refusal."""

_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
_HEADERS: Final = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]


class Refusal(Exception):
    """What is answered instead."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_readers(address: str, tokens: Path | None) -> None:
    """Raises ValueError where other machines reach the page on *address* and need no token."""
    if address and not is_loopback(address) and tokens is None:
        raise ValueError(
            f"other machines reach the page on {address}: give TOKENS, of which who reads it "
            "needs one"
        )


def number(value: object, digits: int = 6) -> float | None:
    """For JSON, which has no NaN: None for what is no number. More *digits* are not seen."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(f"{value:.{digits}g}") if is_number else None


class WebPage:
    """Serves a page over HTTP on *address*, from now to ``close``.

    *static* has its page.html and page.js; page.css and shared.js are those of every page here.
    *answers* has by path what the script may ask for.

    It asks for what *newest* says: TLS, and a bearer token for all but the files. Without tokens it
    answers only who calls it by a name of this machine's own, as else any web site could have its
    readers' browsers ask. Raises ListenError.
    """

    def __init__(
        self,
        address: str,
        static: Traversable,
        answers: Mapping[str, Answer],
        newest: Callable[[], Security],
    ) -> None:
        self._answers = answers
        self._newest = newest
        shared = resources.files("icos_fl_service") / "static"
        files = {
            "/": static / "page.html",
            "/page.js": static / "page.js",
            "/page.css": shared / "page.css",
            "/shared.js": shared / "shared.js",
        }
        self._files = {
            path: (file.read_bytes(), _KINDS[file.name.rpartition(".")[2]])
            for path, file in files.items()
        }
        try:
            self._server = _Server(split_address(address), newest)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ListenError(f"cannot serve the page on {address}: {reason}") from None
        self._server.set_app(self._app)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _app(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        try:
            status, (body, kind) = HTTPStatus.OK, self._answer(environ)
        except Refusal as refusal:
            status, body, kind = refusal.status, str(refusal).encode(), "text/plain; charset=utf-8"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS]
        start_response(f"{status.value} {status.phrase}", headers)
        return [body]

    def _answer(self, environ: "WSGIEnvironment") -> tuple[bytes, str]:
        if environ["REQUEST_METHOD"] != "GET":
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered")
        path = environ.get("PATH_INFO", "")
        if file := self._files.get(path):
            return file
        self._check(environ)
        if (answer := self._answers.get(path)) is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "nothing is at this path")
        found = answer(dict(parse_qsl(environ.get("QUERY_STRING", ""))))
        return json.dumps(found, allow_nan=False).encode(), "application/json"

    def _check(self, environ: "WSGIEnvironment") -> None:
        security = self._newest()
        try:
            security.check(environ.get("HTTP_AUTHORIZATION"))
        except Unauthenticated as error:
            raise Refusal(HTTPStatus.UNAUTHORIZED, str(error)) from None
        host = environ.get("HTTP_HOST", "")
        if security.token_digests is None and not is_loopback(_with_port(host)):
            raise Refusal(HTTPStatus.FORBIDDEN, f"{host!r} is no name of this machine's own")


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread a connection, and no more than CONNECTIONS_MAX at once."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], newest: Callable[[], Security]) -> None:
        self._newest = newest
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        if tls := self._newest().tls:  # the handshake is made by the connection's own thread
            connection = tls.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ends early is nobody's fault."""


class _Handler(WSGIRequestHandler):
    timeout = IDLE_SECONDS

    def log_message(self, *_: Any) -> None:
        """A page asks every two seconds."""


def _with_port(host: str) -> str:
    """A Host header may go without one."""
    return host if host.rpartition(":")[2].isdigit() else f"{host}:80"
