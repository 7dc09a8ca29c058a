"""OTLP/gRPC: decode, call, encode; errors become statuses in status.py."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from google.rpc import code_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceResponse,
)

from icos_fl_otlp_bridge import envelope, metrics
from icos_fl_otlp_bridge.receiver import CONNECTIONS_MAX, REQUEST_SECONDS_MAX, Receiver
from icos_fl_otlp_bridge.status import status_of

SERVICE: str = metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"].full_name
TRANSPORT: Final = "grpc"
_METHOD: Final = f"/{SERVICE}/Export"
# No protobuf message begins so: field 3 has no wire type 7.
_GZIP: Final = b"\x1f\x8b"
_NONE_AND_GZIP: Final = 0b101
_NO_MESSAGE: Final = b"\xff"


# gRPC would inflate a message in full before it looks at its size, and parse all of it, and call
# INTERNAL what it cannot. So messages come as compressed bytes.
OPTIONS: Final = [
    ("grpc.per_message_decompression", 0),
    ("grpc.compression_enabled_algorithms_bitset", _NONE_AND_GZIP),
    # A peer that is gone without a word must not keep a worker waiting for its message.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    # A window that grows with the line would hold megabytes of each call that waits, unread.
    ("grpc.http2.bdp_probe", 0),
]
"""What a server needs so that a request arrives here as it was sent, and bounded."""


class MetricsServicer(grpc.GenericRpcHandler):
    """OTLP's MetricsService over *receiver*.

    Who may not export, or not now, is told so before the message is read. gRPC's own limit on calls
    would say RESOURCE_EXHAUSTED without a delay, and the exporter would drop the batch.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._silent: dict[grpc.ServicerContext, float] = {}
        """Calls in which a worker waits for the message, and since when."""

        def export(messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            held = [self._message(messages, context)]
            return self._answer(context, lambda: self._export(held.pop()))

        # Exports wait for each other, but health does not wait for exports.
        export.experimental_thread_pool = receiver.exports  # type: ignore[attr-defined]
        # As one of a stream it is called before the message is there, so that it can lose patience.
        self._handler: Any = grpc.stream_unary_rpc_method_handler(
            export, response_serializer=ExportMetricsServiceResponse.SerializeToString
        )

    def end_silent_calls(self) -> None:
        """Cancel calls whose message did not come in time: each keeps a worker."""
        now = time.monotonic()
        for context, since in list(self._silent.items()):
            if now - since > REQUEST_SECONDS_MAX:
                context.cancel()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != _METHOD:
            return None
        metadata = dict(handler_call_details.invocation_metadata or ())
        authorization = metadata.get("authorization")
        try:
            self._receiver.admit(None if authorization is None else str(authorization))
        except Exception as error:
            return self._refusing(error)
        return self._handler

    def _refusing(self, error: Exception) -> Any:
        """A handler that tells *error* without waiting for the message."""

        def refuse(_: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            def fail() -> ExportMetricsServiceResponse:
                raise error

            return self._answer(context, fail)

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _message(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The call's message; of a call that ends without one nothing, which is no request."""
        self._silent[context] = time.monotonic()
        try:
            return next(messages, _NO_MESSAGE)
        finally:
            del self._silent[context]

    def _export(self, serialized: bytes) -> ExportMetricsServiceResponse:
        if serialized.startswith(_GZIP):
            serialized = self._receiver.inflated(serialized)
        return self._receiver.export(serialized, envelope, TRANSPORT)

    def _answer(
        self, context: grpc.ServicerContext, export: Callable[[], ExportMetricsServiceResponse]
    ) -> ExportMetricsServiceResponse:
        try:
            return export()
        except Exception as error:  # gRPC would say UNKNOWN
            status = status_of(error)
        metrics.EXPORTS_REFUSED.labels(TRANSPORT, code_pb2.Code.Name(status.code)).inc()
        context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("unreachable: abort raises")
