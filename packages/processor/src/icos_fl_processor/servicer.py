"""decode → domain → encode, and errors to statuses."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import grpc
import structlog
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_timeseries_store import InvalidRows, StoreUnavailable, UnknownNode

from icos_fl_processor import convert, metrics
from icos_fl_processor.errors import (
    ColumnUnavailable,
    InvalidSeries,
    StepTooShort,
    TooFewRows,
    TooManyWatchers,
    UnknownColumn,
)
from icos_fl_processor.processor import Processor, Sequences, Update
from icos_fl_processor.series import Part

_STATUSES: dict[type[Exception], grpc.StatusCode] = {
    UnknownNode: grpc.StatusCode.NOT_FOUND,
    UnknownColumn: grpc.StatusCode.NOT_FOUND,
    InvalidSeries: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidRows: grpc.StatusCode.INVALID_ARGUMENT,  # a name that no node can have
    ColumnUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    StepTooShort: grpc.StatusCode.FAILED_PRECONDITION,
    TooFewRows: grpc.StatusCode.FAILED_PRECONDITION,
    TooManyWatchers: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
}

log = structlog.get_logger()


class ProcessorServicer(pb_grpc.ProcessorServiceServicer):
    """The RPCs over a Processor, which may come later than the servicer.

    A watcher keeps its thread while it waits, so at most *watchers_max* may be there at once.
    """

    def __init__(
        self, processor: Callable[[], Processor], watchers_max: int, stopping: Callable[[], bool]
    ) -> None:
        self._processor = processor
        self._watchers_max = watchers_max
        self._watchers = threading.BoundedSemaphore(watchers_max)
        self._stopping = stopping

    def ListNodes(  # noqa: N802
        self,
        request: pb.ListNodesRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.ListNodesResponse:
        with _statuses(context):
            return pb.ListNodesResponse(nodes=self._processor().nodes())

    def DescribeWindow(  # noqa: N802
        self, request: pb.DescribeWindowRequest, context: grpc.ServicerContext
    ) -> pb.DescribeWindowResponse:
        with _statuses(context):
            series = request.series
            if series.features or series.targets:
                found = self._processor().describe(convert.spec(series))
            else:
                found = self._processor().window(series.node, series.interval.ToNanoseconds())
            return convert.description(found)

    def GetSequences(  # noqa: N802
        self, request: pb.GetSequencesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetSequencesResponse]:
        with _statuses(context):
            processor = self._processor()
            spec, parts = convert.spec(request.series), convert.parts(list(request.splits))
            if request.HasField("kept"):
                update = processor.update(spec, request.kept.version, parts)
                _count(update, parts)
                yield convert.header(update)
                yield from map(convert.piece, update.pieces)
                yield from map(convert.run, update.runs)
                return
            found = processor.sequences(spec, parts)
            _count(found, parts)
            yield convert.header(found)
            yield from map(convert.chunk, found.chunks)

    def GetLatest(  # noqa: N802
        self, request: pb.GetLatestRequest, context: grpc.ServicerContext
    ) -> pb.GetLatestResponse:
        with _statuses(context):
            return convert.latest(self._processor().latest(convert.spec_of_latest(request.series)))

    def WatchWindow(  # noqa: N802
        self, request: pb.WatchWindowRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchWindowResponse]:
        with _statuses(context), self._watcher():
            changes = self._processor().watch(request.node, lambda: self._ended(context))
            yield from map(convert.change, changes)
            if self._stopping():
                raise StoreUnavailable("the processor is shutting down")

    def _ended(self, context: grpc.ServicerContext) -> bool:
        return self._stopping() or not context.is_active()

    @contextlib.contextmanager
    def _watcher(self) -> Iterator[None]:
        if not self._watchers.acquire(blocking=False):
            raise TooManyWatchers(
                f"{self._watchers_max} clients watch windows already, and that is the limit"
            )
        metrics.WATCHERS.inc()
        try:
            yield
        finally:
            metrics.WATCHERS.dec()
            self._watchers.release()


def _count(found: Sequences | Update, parts: Sequence[Part]) -> None:
    if Part.TRAIN in parts:
        metrics.SEQUENCES.labels("train").inc(found.train_sequences)
    if Part.VALIDATION in parts:
        metrics.SEQUENCES.labels("validation").inc(found.validation_sequences)


@contextlib.contextmanager
def _statuses(context: grpc.ServicerContext) -> Iterator[None]:
    """End the RPC with the status of the error that comes out of the block."""
    try:
        yield
    except tuple(_STATUSES) as error:
        if isinstance(error, StoreUnavailable):
            metrics.STORE_ERRORS.inc()
        code = next(code for kind, code in _STATUSES.items() if isinstance(error, kind))
        _abort(context, code, str(error))
    except Exception:
        log.exception("unexpected error in a call")
        _abort(context, grpc.StatusCode.INTERNAL, "an error of the processor; its log has the rest")


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("not reached: abort raises")
