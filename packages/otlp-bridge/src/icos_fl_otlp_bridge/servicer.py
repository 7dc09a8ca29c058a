"""One RPC: convert, store, answer; and the one place where an error becomes a status."""

from collections import Counter
from collections.abc import Callable

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from icos_fl_timeseries_store import InvalidRows, Store, StoreError, Window
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from icos_fl_otlp_bridge import envelope, rows
from icos_fl_otlp_bridge.config import BridgeConfig

RETRY_SECONDS = 5
NODE_LOG_CHARACTERS = 200
SERVICE: str = metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"].full_name

log = structlog.get_logger()


class Bridge:
    """Stores what a request holds for the configured columns."""

    def __init__(self, config: BridgeConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._converter = rows.Converter(config)
        self._windows: dict[str, Window] = {}

    def export(self, request: ExportMetricsServiceRequest) -> Counter[str]:
        """Store the request's rows; return the rejected points by reason.

        Raises StoreUnavailable; the same request may then be sent again, whatever of it was stored.
        """
        converted = self._converter.convert(request)
        rejected = converted.rejected
        if converted.unmatched_resources:
            log.debug("resources for others", count=converted.unmatched_resources)
        for node, node_rows in converted.rows.items():
            try:
                appended = self._window(node).append(
                    node_rows.columns,
                    node_rows.times_ns_t,
                    node_rows.values_tf,
                    {name: self._converter.units[name] for name in node_rows.columns},
                )
            except InvalidRows as error:
                log.warning("rows refused", node=node[:NODE_LOG_CHARACTERS], error=str(error)[:500])
                rejected[rows.INVALID_NODE] += int(node_rows.points_t.sum())
                continue
            if appended.too_old:
                rejected[rows.TOO_OLD] += int(node_rows.points_t[: appended.too_old].sum())
        return +rejected

    def _window(self, node: str) -> Window:
        if node not in self._windows:
            self._windows[node] = self._store.create_window(node, self._config.window_rows)
        return self._windows[node]


class MetricsServicer:
    """OTLP's MetricsService over the Bridge that *bridge* gives; it may raise StoreUnavailable.

    Of a request, only the *metrics* are parsed.
    """

    def __init__(self, bridge: Callable[[], Bridge], metrics: frozenset[str]) -> None:
        self._bridge = bridge
        self._metrics = metrics

    def add_to(self, server: grpc.Server) -> None:
        """Serve on *server*.

        Requests come as bytes: gRPC would parse all of it, and call what it cannot INTERNAL.
        """
        method: grpc.RpcMethodHandler[bytes, ExportMetricsServiceResponse]
        method = grpc.unary_unary_rpc_method_handler(
            self.export, response_serializer=ExportMetricsServiceResponse.SerializeToString
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, {"Export": method})]
        )

    def export(
        self, serialized: bytes, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        """Answer one export."""
        try:
            request = envelope.parse(serialized, self._metrics)
            rejected = self._bridge().export(request)
        except DecodeError:
            context.abort_with_status(rpc_status.to_status(_undecodable(len(serialized))))
            raise
        except StoreError as error:
            log.warning("export refused for now", error=str(error))
            context.abort_with_status(rpc_status.to_status(_unavailable(str(error))))
            raise
        response = ExportMetricsServiceResponse()
        if rejected:
            log.warning("points rejected", **rejected)
            response.partial_success.rejected_data_points = rejected.total()
            response.partial_success.error_message = "rejected data points: " + ", ".join(
                f"{reason}: {count}" for reason, count in sorted(rejected.items())
            )
        return response


def _undecodable(size_bytes: int) -> status_pb2.Status:
    """INVALID_ARGUMENT with BadRequest: no second attempt could succeed."""
    problem = f"the request's {size_bytes} bytes are no ExportMetricsServiceRequest"
    status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=problem)
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(description=problem)
    status.details.add().Pack(bad)
    return status


def _unavailable(message: str) -> status_pb2.Status:
    """UNAVAILABLE with RetryInfo: the exporter keeps its batch and sends it again."""
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message=message)
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))
    status.details.add().Pack(retry)
    return status
