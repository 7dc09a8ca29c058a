"""Prometheus metrics of a process: served over HTTP, and exported over OTLP where asked."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Gauge, make_wsgi_app, start_http_server

from icos_fl_service.settings import split_address
from icos_fl_service.status import Facts
from icos_fl_service.status import of as status_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from icos_fl_service.otlp import Export

_INFO = Gauge("icos_fl_service_info", "Always 1; which service this is", ["service", "version"])


class MetricsAddressError(Exception):
    """An address that no metrics can be served on, or an exporter that is not installed."""


def check(address: str = "", otlp_endpoint: str = "") -> None:
    """Raises MetricsAddressError where ``Metrics`` would, in a process that is not to serve yet."""
    if address:
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with _refusing(address), socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    if otlp_endpoint:
        _exporter(otlp_endpoint)


@contextlib.contextmanager
def _refusing(address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise MetricsAddressError(
            f"cannot serve metrics on {address}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _exporter(endpoint: str) -> "type[Export]":
    try:
        from icos_fl_service.otlp import Export
    except ImportError:
        raise MetricsAddressError(
            f"cannot export metrics to {endpoint}: install icos-fl-service[otlp]"
        ) from None
    return Export


class Metrics:
    """Serves the default registry on *address* (host:port; port 0 takes a free one), and exports it
    to *otlp_endpoint*, from now to ``close``; what is empty is off.

    Beside /metrics there are /health: 503 while a Probe says that what the service needs is away,
    and /status: what *status* returns as JSON, by default what ``icos_fl_service.status`` knows.

    *service* is the service's distribution. Raises MetricsAddressError.
    """

    def __init__(
        self,
        service: str,
        address: str = "",
        otlp_endpoint: str = "",
        status: Callable[[], Facts] | None = None,
    ) -> None:
        self.port: int | None = None
        """Where ``/metrics`` is; None where it is off."""
        self._ending = contextlib.ExitStack()
        _INFO.labels(service, version(service)).set(1)
        exporter = _exporter(otlp_endpoint) if otlp_endpoint else None
        if address:
            self._serve(address, status or (lambda: status_of(service)))
        if exporter:
            self._ending.callback(exporter(REGISTRY, otlp_endpoint, service).close)

    def close(self) -> None:
        """End; what was not exported yet is."""
        self._ending.close()

    def _serve(self, address: str, status: Callable[[], Facts]) -> None:
        host, port = split_address(address)
        with _refusing(address):
            server, thread = start_http_server(port, host)
        server.set_app(_with_health_and_status(make_wsgi_app(), status))
        self.port = server.server_port
        self._ending.callback(thread.join)
        self._ending.callback(server.server_close)
        self._ending.callback(server.shutdown)


def _with_health_and_status(
    metrics: "WSGIApplication", status: Callable[[], Facts]
) -> "WSGIApplication":
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/status":
            answer = json.dumps(status()).encode()
            start_response("200 OK", [("Content-Type", "application/json")])
            return [answer]
        if environ["PATH_INFO"] != "/health":
            return metrics(environ, start_response)
        away = REGISTRY.get_sample_value("icos_fl_service_ready") == 0
        code = "503 Service Unavailable" if away else "200 OK"
        start_response(code, [("Content-Type", "text/plain")])
        return [b"what it needs does not answer\n" if away else b"ready\n"]

    return app
