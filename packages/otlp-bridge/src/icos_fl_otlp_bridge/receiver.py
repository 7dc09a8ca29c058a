"""What both transports call: who may export, how much at once, and the export itself."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import structlog
from icos_fl_service.security import Security
from icos_fl_timeseries_store import StoreUnavailable
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from icos_fl_otlp_bridge import metrics
from icos_fl_otlp_bridge.bridge import Bridge, Outcome
from icos_fl_otlp_bridge.errors import Overloaded
from icos_fl_otlp_bridge.inflate import gunzip, said_bytes
from icos_fl_otlp_bridge.memory import SMALL_BYTES, Turns

CONNECTIONS_MAX = 2_048
"""Of each transport. An idle one takes up to 15 kB, one whose request waits, unread, 150 kB."""
REQUEST_SECONDS_MAX = 30.0
"""How long a request may take to arrive: until then it keeps a worker."""

T = TypeVar("T")


class Decoder(Protocol):
    """What knows a format of requests, of which the metrics of some names are wanted."""

    def parse(self, encoded: bytes, wanted: frozenset[str], /) -> ExportMetricsServiceRequest:
        """Raises Undecodable, TooLarge."""

    def decoded_bytes(self, encoded: bytes, wanted: frozenset[str], /) -> int:
        """An upper estimate of what it takes. Raises Undecodable, TooLarge."""


log = structlog.get_logger()


class Exports(ThreadPoolExecutor):
    """The workers of exports, and a queue of a bounded length before them.

    What waits has not been read yet: a worker reads its request itself, so that no more requests
    are in memory than there are workers.
    """

    def __init__(self, workers: int, waiting_max: int) -> None:
        super().__init__(workers, thread_name_prefix="export")
        self.workers = workers
        self._limit = workers + waiting_max
        self.in_hand = 0
        """Exports that wait or are worked on."""
        self._counting = threading.Lock()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        with self._counting:
            self.in_hand += 1
        try:
            future = super().submit(fn, *args, **kwargs)
        except RuntimeError:  # shutting down
            self._ended()
            raise
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Any = None) -> None:
        with self._counting:
            self.in_hand -= 1

    def check(self) -> None:
        """Raises Overloaded if no more may wait."""
        if self.in_hand >= self._limit:
            raise Overloaded(f"{self.in_hand} exports are in hand, the limit is {self._limit}")


class Receiver:
    """Decodes exports and hands them to the bridge, while there is one."""

    def __init__(self, exports: Exports, security: Security, max_message_bytes: int) -> None:
        self.exports = exports
        self.security = security
        self.max_message_bytes = max_message_bytes
        self.bridge: Bridge | None = None
        self.turns = Turns(max(1, exports.workers // 2))
        self._inflating = threading.Lock()
        self.why_not = "the store has not answered yet"

    def admit(self, authorization: str | None) -> None:
        """Raises Unauthenticated or Overloaded: before any of the request is read."""
        self.security.check(authorization)
        self.exports.check()

    def inflated(self, compressed: bytes) -> bytes:
        """What gzip holds; of large ones one at a time. Raises Undecodable, TooLarge."""
        large = max(len(compressed), said_bytes(compressed)) > SMALL_BYTES
        with self._inflating if large else nullcontext():
            return gunzip(compressed, self.max_message_bytes)

    def export(
        self, encoded: bytes, decoder: Decoder, transport: str
    ) -> ExportMetricsServiceResponse:
        """Store what the request holds, and say what of it was not. Raises what status_of tells."""
        start = time.perf_counter()
        bridge = self.bridge
        if bridge is None:
            raise StoreUnavailable(self.why_not)
        wanted = bridge.metrics
        with self.turns.of(decoder.decoded_bytes(encoded, wanted)):
            converted = bridge.convert(decoder.parse(encoded, wanted))
        outcome = bridge.store(converted)
        _count(outcome)
        metrics.EXPORT_SECONDS.labels(transport).observe(time.perf_counter() - start)
        return _response(outcome)


def _count(outcome: Outcome) -> None:
    metrics.POINTS_TAKEN.inc(outcome.points)
    metrics.ROWS.inc(outcome.rows)
    for reason, count in outcome.rejected.items():
        metrics.POINTS_REJECTED.labels(reason).inc(count)
    if outcome.rejected:
        log.warning(
            "points rejected", **{reason.value: n for reason, n in outcome.rejected.items()}
        )


def _response(outcome: Outcome) -> ExportMetricsServiceResponse:
    """``partial_success`` is unset on full success, and a warning where nothing was rejected.

    The message is short whatever the request was: it has a number for each reason.
    """
    response = ExportMetricsServiceResponse()
    said = []
    if outcome.rejected:
        response.partial_success.rejected_data_points = outcome.rejected.total()
        counts = (f"{reason}: {count}" for reason, count in sorted(outcome.rejected.items()))
        said.append("rejected data points: " + ", ".join(counts))
    if outcome.without_rate:
        said.append(f"first data points of their series, without a rate: {outcome.without_rate}")
    if said:
        response.partial_success.error_message = "; ".join(said)
    return response
