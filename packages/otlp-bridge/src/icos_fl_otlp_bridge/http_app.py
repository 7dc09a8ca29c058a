"""OTLP/HTTP: decode, call, encode; errors become statuses in status.py."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2  # type: ignore[import-untyped]
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from icos_fl_otlp_bridge import envelope, json_request, metrics
from icos_fl_otlp_bridge.errors import Overloaded, TooLarge
from icos_fl_otlp_bridge.receiver import REQUEST_SECONDS_MAX, Decoder, Receiver
from icos_fl_otlp_bridge.status import RETRY_SECONDS, status_of

PATH: Final = "/v1/metrics"
TRANSPORT: Final = "http"
_HTTP_STATUS: Final[dict[int, int]] = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 413,
    code_pb2.UNAVAILABLE: 503,
}


@dataclass(frozen=True)
class _Codec:
    media_type: str
    decoder: Decoder
    encode: Callable[[Message], bytes]


_PROTOBUF: Final = _Codec(
    "application/x-protobuf", envelope, lambda message: message.SerializeToString()
)
_JSON: Final = _Codec(
    "application/json",
    json_request,
    lambda message: json_format.MessageToJson(message, indent=None).encode(),
)
_CODECS: Final = {codec.media_type: codec for codec in (_PROTOBUF, _JSON)}


class _Disconnected(Exception):
    """Nobody is there any more to be answered."""


class _Body:
    """The body of one request, read once."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._whole = False
        """Nothing more of it is to be read."""

    async def read(self) -> bytes:
        """The body. Raises TooLarge, with nothing over the limit kept, and Overloaded if slow."""
        body = bytearray()  # as a list of chunks it would be in memory twice when they are joined
        size_bytes = 0
        try:
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                while not self._whole and size_bytes <= 2 * self._max_bytes:
                    chunk = await self._next()
                    size_bytes += len(chunk)
                    if size_bytes <= self._max_bytes:
                        body += chunk
                    else:
                        body.clear()
        except TimeoutError:
            self._whole = True  # who is this slow is not waited for again
            raise Overloaded(
                f"after {REQUEST_SECONDS_MAX:g} s {size_bytes} bytes of the request are here, and "
                "not its end"
            ) from None
        if size_bytes > self._max_bytes:
            more_than = "" if self._whole else "more than "
            raise TooLarge(
                f"the request's {more_than}{size_bytes} bytes are over the limit of "
                f"{self._max_bytes}"
            )
        return bytes(body)

    async def drop(self) -> None:
        """Read what is left, within limits, and keep none of it.

        A client that is still sending when its connection closes does not read why.
        """
        left_bytes = 2 * self._max_bytes
        try:
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                while not self._whole and left_bytes > 0:
                    left_bytes -= len(await self._next())
        except TimeoutError:
            pass

    async def _next(self) -> bytes:
        event = await self._receive()
        if event["type"] == "http.disconnect":
            self._whole = True
            raise _Disconnected
        self._whole = not event.get("more_body", False)
        return bytes(event.get("body", b""))


class MetricsApp:
    """The ASGI application: POST /v1/metrics over *receiver*, and a Status for all else."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        codec = _CODECS.get(_media_type(headers))
        body = _Body(receive, self._receiver.max_message_bytes)
        try:
            response = self._misdirected(scope, headers, codec)
            if response is None and codec is not None:
                response = await self._answer(headers, codec, body)
            await body.drop()
        except _Disconnected:
            return
        if response is not None:
            await response(scope, receive, send)

    def _misdirected(self, scope: Scope, headers: Headers, codec: _Codec | None) -> Response | None:
        """What is said of a request that is no export."""
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if scope["path"] != PATH:
            problem = f"nothing is at this path; metrics go to {PATH}"
            return _refusal(status_pb2.Status(code=code_pb2.NOT_FOUND, message=problem), codec)
        if scope["method"] != "POST":
            http_status, problem = 405, f"the method of {PATH} is POST"
        elif codec is None:
            http_status = 415
            problem = f"content-type {_media_type(headers)[:100]!r} is none of {list(_CODECS)}"
        elif encoding not in ("identity", "", "gzip"):
            http_status, problem = 415, f"content-encoding {encoding[:100]!r} is not gzip"
        else:
            return None
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=problem)
        return _refusal(status, codec, http_status)

    async def _answer(self, headers: Headers, codec: _Codec, body: _Body) -> Response:
        loop = asyncio.get_running_loop()
        gzipped = headers.get("content-encoding", "").strip().lower() == "gzip"

        def export() -> bytes:
            # Read by the worker, as gRPC does it: what waits for a worker holds no memory.
            encoded = asyncio.run_coroutine_threadsafe(body.read(), loop).result()
            if gzipped:
                encoded = self._receiver.inflated(encoded)
            return codec.encode(self._receiver.export(encoded, codec.decoder, TRANSPORT))

        try:
            self._receiver.admit(headers.get("authorization"))
            answer = await loop.run_in_executor(self._receiver.exports, export)
        except _Disconnected:
            raise
        except Exception as error:
            return refusal(error, headers)
        return Response(answer, media_type=codec.media_type)


def refusal(error: Exception, headers: Headers) -> Response:
    """What is said of an error, in the type of the request with these *headers*."""
    return _refusal(status_of(error), _CODECS.get(_media_type(headers)))


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def _refusal(
    status: status_pb2.Status, codec: _Codec | None, http_status: int | None = None
) -> Response:
    codec = codec or _PROTOBUF
    metrics.EXPORTS_REFUSED.labels(TRANSPORT, code_pb2.Code.Name(status.code)).inc()
    headers: dict[str, Any] = {}
    if status.code == code_pb2.UNAVAILABLE:
        headers["retry-after"] = str(RETRY_SECONDS)
    elif status.code == code_pb2.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    elif http_status == 405:
        headers["allow"] = "POST"
    return Response(
        codec.encode(status),
        http_status or _HTTP_STATUS[status.code],
        headers,
        codec.media_type,
    )
