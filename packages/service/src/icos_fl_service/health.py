"""``icos-fl-health URL``: is what listens there healthy? For the health checks of containers.

Exit status 0 if it is, with what it answers if that is HTTP, such as its /status; else 1 and the
reason on standard error.
"""

import contextlib
import http.client
import socket
import ssl
import sys
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

TIMEOUT_SECONDS = 3.0
BODY_BYTES_MAX = 16 << 20
"""A forecaster's /metrics has some 12 kB a node and metric."""


class Unhealthy(Exception):
    """What listens there does not do what it is for."""


def main() -> None:
    """Ask once."""
    if len(sys.argv) != 2:
        print(
            "usage: icos-fl-health http|https|grpc|valkey|tcp://HOST:PORT[/PATH]", file=sys.stderr
        )
        raise SystemExit(2)
    try:
        ask(sys.argv[1])
    except (OSError, http.client.HTTPException, ValueError, Unhealthy) as error:
        raise SystemExit(
            f"icos-fl-health: {sys.argv[1]}: {error or type(error).__name__}"
        ) from None


def ask(url: str) -> None:
    """Returns if *url* is healthy. Raises Unhealthy, OSError, HTTPException; ValueError for a url
    that cannot be asked."""
    parts = urlsplit(url)
    if parts.scheme not in _ASK or not parts.hostname or not parts.port:
        raise ValueError(f"not of the form {'|'.join(_ASK)}://HOST:PORT[/PATH]")
    _ASK[parts.scheme](parts)


def _http(url: SplitResult) -> None:
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        # Whose certificate it is does not matter to a process that asks its own machine.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            url.netloc, timeout=TIMEOUT_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", url.path or "/")
        answer = connection.getresponse()
        body = answer.read(BODY_BYTES_MAX + 1)
        if len(body) > BODY_BYTES_MAX:
            raise Unhealthy(f"it answers more than {BODY_BYTES_MAX} bytes")
        text = body.decode(errors="replace").strip()
        if answer.status != http.HTTPStatus.OK:
            raise Unhealthy(f"{answer.status} {text[:200] or answer.reason}")
        print(text)


def _grpc(url: SplitResult) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(url.netloc) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=url.path[1:]), timeout=TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            raise Unhealthy(f"{error.code().name}: {error.details()}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unhealthy(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _valkey(url: SplitResult) -> None:
    with _connected(url) as connection:
        connection.sendall(b"PING\r\n")
        answer = connection.recv(200)
    if not answer.startswith(b"+PONG"):
        raise Unhealthy(answer.decode(errors="replace").strip() or "no answer")


def _tcp(url: SplitResult) -> None:
    _connected(url).close()


def _connected(url: SplitResult) -> socket.socket:
    return socket.create_connection((url.hostname, url.port), TIMEOUT_SECONDS)


_ASK: dict[str, Callable[[SplitResult], None]] = {
    "http": _http,
    "https": _http,
    "grpc": _grpc,
    "valkey": _valkey,
    "tcp": _tcp,
}

if __name__ == "__main__":
    main()
