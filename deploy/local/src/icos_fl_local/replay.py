"""Send recorded traces to an OTLP/gRPC endpoint, as a Collector beside each machine would.

One request carries a node's next 60 scrapes with their own timestamps. The next request is sent
when the one before is acknowledged, so what was sent is stored.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint

from icos_fl_local.traces import POWER_METRIC, Trace, unit_of

ROWS_PER_REQUEST = 60
SCOPE_NAME = "icos_fl_local.replay"

_ATTEMPT_SECONDS = 30.0
_GIVE_UP_SECONDS = 120.0
_BACKOFF_SECONDS_MAX = 5.0
# What OTLP names as worth another attempt; RESOURCE_EXHAUSTED only where the server says when.
_RETRYABLE = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNAVAILABLE,
}

Progress = Callable[[str, int, int], None]


class ReplayError(Exception):
    """The endpoint did not take all rows; the message has its words."""


def send(traces: Sequence[Trace], endpoint: str, progress: Progress) -> None:
    """Send all rows of *traces* to *endpoint* (host:port), oldest first, all nodes side by side.

    Calls ``progress(node, sent_rows, total_rows)`` after each acknowledged request. Raises
    ReplayError when the endpoint refuses points, or stays unavailable for two minutes.
    """
    with grpc.insecure_channel(endpoint) as channel:
        stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]
        for trace, first, stop in _batches(traces):
            try:
                response = export(stub, request(trace, first, stop))
            except grpc.RpcError as error:
                raise ReplayError(
                    f"{endpoint} did not take rows of {trace.node}: "
                    f"{error.code().name}: {error.details()}"
                ) from None
            refused = response.partial_success
            if refused.rejected_data_points:
                raise ReplayError(
                    f"{endpoint} refused {refused.rejected_data_points} data points of "
                    f"{trace.node}: {refused.error_message or 'no reason given'}"
                )
            progress(trace.node, stop, len(trace.times_s))


def request(trace: Trace, first: int, stop: int) -> ExportMetricsServiceRequest:
    """The rows *first* to *stop* of *trace* as one export: a metric a column, a point a row."""
    message = ExportMetricsServiceRequest()
    resource = message.resource_metrics.add()
    attribute = resource.resource.attributes.add(key="host.name")
    attribute.value.string_value = trace.node
    scope = resource.scope_metrics.add()
    scope.scope.name = SCOPE_NAME
    times_ns = [int(time_s) * 10**9 for time_s in trace.times_s[first:stop]]
    for index, column in enumerate(trace.columns):
        scope.metrics.append(_metric(trace, column, index, times_ns, slice(first, stop)))
    return message


def _metric(trace: Trace, column: str, index: int, times_ns: list[int], rows: slice) -> Metric:
    values = trace.values_tf[rows, index]
    metric = Metric()
    if column == "power_w" and trace.has_whole_microwatts:
        metric.name = POWER_METRIC
        metric.gauge.data_points.extend(
            NumberDataPoint(time_unix_nano=time_ns, as_int=value)
            for time_ns, value in zip(
                times_ns, np.rint(values * 1e6).astype(int).tolist(), strict=True
            )
        )
    else:
        metric.name = column
        metric.unit = unit_of(column)
        metric.gauge.data_points.extend(
            NumberDataPoint(time_unix_nano=time_ns, as_double=value)
            for time_ns, value in zip(times_ns, values.tolist(), strict=True)
        )
    return metric


def _batches(traces: Sequence[Trace]) -> Iterator[tuple[Trace, int, int]]:
    """Batches of all traces, in the order of the share of its trace that a batch completes.

    So the windows fill together, whatever the traces' lengths and intervals.
    """
    order = []
    for number, trace in enumerate(traces):
        total = len(trace.times_s)
        for first in range(0, total, ROWS_PER_REQUEST):
            stop = min(first + ROWS_PER_REQUEST, total)
            order.append((stop / total, number, first, stop))
    for _, number, first, stop in sorted(order):
        yield traces[number], first, stop


def export(
    stub: MetricsServiceStub, message: ExportMetricsServiceRequest
) -> ExportMetricsServiceResponse:
    """Send *message* until it is taken. Raises RpcError: it is refused, or two minutes passed."""
    give_up = time.monotonic() + _GIVE_UP_SECONDS
    backoff = 0.1
    while True:
        try:
            response: ExportMetricsServiceResponse = stub.Export(message, timeout=_ATTEMPT_SECONDS)
            return response
        except grpc.RpcError as error:
            asked = _asked_delay_seconds(error)
            delay = backoff * random.uniform(0.8, 1.2) if asked is None else asked  # noqa: S311
            retryable = error.code() in _RETRYABLE or asked is not None
            if not retryable or time.monotonic() + delay > give_up:
                raise
            time.sleep(delay)
            backoff = min(2 * backoff, _BACKOFF_SECONDS_MAX)


def _asked_delay_seconds(error: Any) -> float | None:
    """The delay that the server asks for by a RetryInfo in its status, if it does."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in Status.FromString(value).details:
                info = RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.ToTimedelta().total_seconds())
    return None
