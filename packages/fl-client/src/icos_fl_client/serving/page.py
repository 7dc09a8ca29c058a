"""The page for people: what a node expects, and how what it had expected fared."""

import json
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import numpy as np
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.security import Security, Unauthenticated, is_loopback
from icos_fl_service.settings import split_address

from icos_fl_client.forecasting.history import Array
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower
from icos_fl_client.serving.metrics import COMBINATION
from icos_fl_client.serving.outlook import Outlook, Record
from icos_fl_client.serving.settings import duration_text

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

RECORD_STEPS = 480
"""So many newest ones are shown."""
CONNECTIONS_MAX = 16
IDLE_SECONDS = 10.0
"""Who is silent for so long is waited for no more."""
BOUNDS = ("lower_80", "upper_80", "lower_95", "upper_95")

_FILES: Final = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
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


class Page:
    """Serves what *follower* posts on *board* over HTTP on *address*, from now to ``close``.

    It asks for what *newest* says: TLS, and a bearer token for all but the page itself. Without
    tokens it answers only who calls it by a name of this machine's own, as else any web site
    could have its readers' browsers ask. *recorded*: times of rows are not compared with the clock.
    Raises ListenError.
    """

    def __init__(
        self,
        address: str,
        board: Board,
        follower: Follower,
        newest: Callable[[], Security],
        *,
        recorded: bool = False,
    ) -> None:
        self._board = board
        self._follower = follower
        self._newest = newest
        self._recorded = recorded
        files = resources.files("icos_fl_client.serving") / "static"
        self._files = {
            path: ((files / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()
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
        if path == "/api/forecasts":
            found = self._forecasts()
        elif path == "/api/record":
            found = self._past(parse_qs(environ.get("QUERY_STRING", "")))
        else:
            raise Refusal(HTTPStatus.NOT_FOUND, "nothing is at this path")
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

    def _forecasts(self) -> dict[str, Any]:
        return {
            "now": None if self._recorded else time.time(),
            "nodes": [asdict(health) for health in self._follower.health()],
            "forecasts": [_forecast(outlook) for outlook in self._board.outlooks()],
        }

    def _past(self, query: dict[str, list[str]]) -> dict[str, Any]:
        node, metric = (query.get(name, [""])[-1] for name in ("node", "metric"))
        record = self._follower.record(node, metric)
        if record is None or record.first_time_ns is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"nothing of {metric!r} of {node!r}")
        return _record(record, record.first_time_ns)


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


def _forecast(outlook: Outlook) -> dict[str, Any]:
    time_ns, model, none = outlook.last_time_ns, outlook.model, outlook.none
    return {
        "node": outlook.node,
        "metric": outlook.metric,
        "unit": outlook.unit,
        "interval_s": outlook.interval_ns / 1e9,
        "time": None if time_ns is None else time_ns / 1e9,
        "value": _number(outlook.last_value),
        "horizons": [_horizon(outlook, place) for place in range(len(outlook.ahead_ns_h))],
        "model": model and {"round": model.round, "created": model.metadata.get("created-unix-s")},
        "no_model": outlook.no_model,
        "none": none and {"reason": none.reason.value, "message": none.message},
    }


def _horizon(outlook: Outlook, place: int) -> dict[str, Any]:
    ahead_s = outlook.ahead_ns_h[place] / 1e9
    found = {"ahead": duration_text(ahead_s), "ahead_s": ahead_s}
    if said := outlook.forecast:
        bounds = (said.lower_80_h, said.upper_80_h, said.lower_95_h, said.upper_95_h)
        told = zip(("yhat", *BOUNDS), (said.yhat_h, *bounds), strict=True)
        found |= {name: _number(array_h[place]) for name, array_h in told}
    return found


def _record(record: Record, first_time_ns: int) -> dict[str, Any]:
    """What came of late, what had been said of it, and how that fared in all that is kept."""
    first = max(0, len(record.values_t) - RECORD_STEPS)
    return {
        "first_time": (first_time_ns + first * record.interval_ns) / 1e9,
        "interval_s": record.interval_ns / 1e9,
        "values": _numbers(record.values_t[first:]),
        "horizons": [_past(record, place, first) for place in range(len(record.ahead_ns_h))],
    }


def _past(record: Record, place: int, first: int) -> dict[str, Any]:
    """Of one horizon; series begin at step *first*, and stand at the step that they are of."""
    ahead_ns, values_t = record.ahead_ns_h[place], record.values_t
    said_tc = np.concatenate([record.bounds_tbh, record.yhat_th[:, None], record.said_tkh], axis=1)
    of_tc = np.full(said_tc.shape[:2], np.nan)
    steps = min(ahead_ns // record.interval_ns, len(of_tc))
    of_tc[steps:] = said_tc[: len(of_tc) - steps, :, place]
    series = dict(zip((*BOUNDS, "yhat"), of_tc.T, strict=False))
    return {
        "ahead": duration_text(ahead_ns / 1e9),
        "coverage_80": _coverage(series["lower_80"], values_t, series["upper_80"]),
        "coverage_95": _coverage(series["lower_95"], values_t, series["upper_95"]),
        "errors": _errors(
            (COMBINATION, *record.names), np.abs(of_tc[:, len(BOUNDS) :] - values_t[:, None])
        ),
        **{name: _numbers(array_t[first:]) for name, array_t in series.items()},
    }


def _coverage(lower_t: Array, values_t: Array, upper_t: Array) -> float | None:
    known_t = np.isfinite(lower_t + values_t)
    inside_t = (lower_t <= values_t) & (values_t <= upper_t)
    return _number(float(inside_t[known_t].mean())) if known_t.any() else None


def _errors(names: tuple[str, ...], error_tk: Array) -> list[dict[str, Any]]:
    """Mean absolute error of each, and its ratio to that of the last value in the same cases: some
    speak only where it is easy."""
    last_t = error_tk[:, names.index("last")]
    found = []
    for name, error_t in zip(names, error_tk.T, strict=True):
        known_t = np.isfinite(error_t + last_t)
        if not known_t.any():
            continue
        error, last = float(error_t[known_t].mean()), float(last_t[known_t].mean())
        ratio = _number(error / last) if last else None
        cases = int(known_t.sum())
        found.append({"name": name, "error": _number(error), "ratio": ratio, "cases": cases})
    return found


def _number(value: float) -> float | None:
    """For JSON, which has no NaN; six digits are more than is seen."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _numbers(values: Array) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _with_port(host: str) -> str:
    """A Host header may go without one."""
    return host if host.rpartition(":")[2].isdigit() else f"{host}:80"
