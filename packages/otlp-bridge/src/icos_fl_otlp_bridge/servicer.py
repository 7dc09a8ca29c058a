"""One RPC: convert, store, answer; and the one place where an error becomes a status."""

from collections import Counter
from collections.abc import Callable

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from icos_fl_timeseries_store import InvalidRows, Store, StoreUnavailable, Window
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
)

from icos_fl_otlp_bridge import rows
from icos_fl_otlp_bridge.config import BridgeConfig

RETRY_SECONDS = 5

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
        for node, node_rows in converted.rows.items():
            try:
                appended = self._window(node).append(
                    self._converter.columns,
                    node_rows.times_ns_t,
                    node_rows.values_tf,
                    self._converter.units,
                )
            except InvalidRows as error:
                log.warning("rows refused", node=node, error=str(error))
                rejected[rows.INVALID_NODE] += int(node_rows.points_t.sum())
                continue
            if appended.too_old:
                rejected[rows.TOO_OLD] += int(node_rows.points_t[: appended.too_old].sum())
        return +rejected

    def _window(self, node: str) -> Window:
        if node not in self._windows:
            self._windows[node] = self._store.create_window(node, self._config.window_rows)
        return self._windows[node]


class MetricsServicer(MetricsServiceServicer):
    """OTLP's MetricsService over the Bridge that *bridge* gives; it may raise StoreUnavailable."""

    def __init__(self, bridge: Callable[[], Bridge]) -> None:
        self._bridge = bridge

    def Export(  # noqa: N802 - gRPC's name
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        try:
            rejected = self._bridge().export(request)
        except StoreUnavailable as error:
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


def _unavailable(message: str) -> status_pb2.Status:
    """UNAVAILABLE with RetryInfo: the exporter keeps its batch and sends it again."""
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message=message)
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))
    status.details.add().Pack(retry)
    return status
