"""Counts a gRPC server's calls by method and status, and how long they take."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from prometheus_client import Counter, Gauge, Histogram

_CALLS = Counter("icos_fl_grpc_calls", "Calls that ended", ["method", "code"])
_UNDER_WAY = Gauge("icos_fl_grpc_calls_under_way", "Calls that have not ended", ["method"])
_SECONDS = Histogram(
    "icos_fl_grpc_call_seconds",
    "How long calls took, until the last message of the answer",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


class CallMetrics(grpc.ServerInterceptor):
    """Measures the calls of *service*, and no others: a health probe is no work."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.ServerInterceptor."""
        handler = continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        method = details.method.removeprefix(self._prefix)
        if handler.unary_unary:
            return handler._replace(unary_unary=_one(method, handler.unary_unary))
        if handler.unary_stream:
            return handler._replace(unary_stream=_stream(method, handler.unary_stream))
        return handler


def count(method: str, code: str) -> None:
    """A call that was refused before it was one."""
    _CALLS.labels(method, code).inc()


def _one(method: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    def measured(request: Any, context: grpc.ServicerContext) -> Any:
        with _Measured(method, context):
            return answer(request, context)

    return measured


def _stream(method: str, answers: Callable[..., Any]) -> Callable[..., Any]:
    def measured(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _Measured(method, context):
            yield from answers(request, context)

    return measured


class _Measured:
    """One call."""

    def __init__(self, method: str, context: Any) -> None:
        self._method = method
        self._context = context

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        _UNDER_WAY.labels(self._method).inc()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _UNDER_WAY.labels(self._method).dec()
        _SECONDS.labels(self._method).observe(time.perf_counter() - self._began)
        _CALLS.labels(self._method, self._code(kind)).inc()

    def _code(self, kind: type[BaseException] | None) -> str:
        code = self._context.code()  # None where nothing has set one
        if code is not None:
            return str(code.name)
        if kind is None:
            return "OK"
        return "CANCELLED" if kind is GeneratorExit else "UNKNOWN"
