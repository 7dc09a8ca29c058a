"""The one place where an error becomes a status. Both transports send the same."""

from typing import Final

import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from icos_fl_service.security import Unauthenticated
from icos_fl_timeseries_store import StoreDamaged, StoreError, StoreFull

from icos_fl_otlp_bridge import metrics
from icos_fl_otlp_bridge.errors import Overloaded, TooLarge, Undecodable

RETRY_SECONDS = 5
MESSAGE_CHARACTERS_MAX = 1_000

_STORE_REASONS: Final[dict[type[StoreError], str]] = {StoreFull: "full", StoreDamaged: "damaged"}

log = structlog.get_logger()


def status_of(error: Exception) -> status_pb2.Status:
    """What an exporter is told of *error*.

    An exporter drops a batch whose status says UNKNOWN or INTERNAL. So what is not known to be the
    batch's own fault is UNAVAILABLE with a delay: the exporter keeps the batch and sends it again.
    """
    message = str(error)[:MESSAGE_CHARACTERS_MAX]
    match error:
        case Undecodable():
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(description=message)
            status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=message)
            status.details.add().Pack(bad)
            return status
        case TooLarge():
            return status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=message)
        case Unauthenticated():
            return status_pb2.Status(code=code_pb2.UNAUTHENTICATED, message=message)
        case Overloaded():
            log.debug("export refused for now", error=message)
        case StoreError():
            reason = _STORE_REASONS.get(type(error), "unavailable")
            metrics.STORE_ERRORS.labels(reason).inc()
            log.warning("export refused for now", reason=reason, error=message)
        case _:
            log.error("unexpected error in an export", exc_info=error)
            message = "an unexpected error, which the bridge's log tells; send the export again"
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message=message)
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))
    status.details.add().Pack(retry)
    return status
