"""The processor's service as this package sees it: the one module that knows its stubs."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from numpy.typing import NDArray

from icos_fl_client.credentials import Credentials
from icos_fl_client.data import Latest, Run, Scale, Sequences
from icos_fl_client.errors import NoSequences, ProcessorUnavailable
from icos_fl_client.kept import NO_STEPS, KeptSteps, Steps, Values

DEADLINE_SECONDS = 60.0
MESSAGE_BYTES_MAX = 64 << 20
RENEWAL_SHARE = 0.01
"""Of the steps: while fewer are new, what is kept stays as it is, and those come again. A large
window would be written anew for each of its rows else."""
_WAITED_FOR = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
_ASK_AGAIN = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                # gRPC asks five times at most: after 2, 4, 8 and 16 s.
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "2s",
                    "backoffMultiplier": 2,
                    "maxBackoff": "16s",
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
"""Else a store that is started again, for an upgrade, would cost a round every second."""
_CANNOT_LEARN = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
)

_NOT_CONNECTED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True)
class Query:
    """One metric of one node, as the run configuration wants it cut."""

    node: str
    metric: str
    features: tuple[str, ...]
    """More input columns beside the metric."""
    lookback: int
    horizon: int
    interval_seconds: float
    """0 takes the node's own distance of rows."""
    train_fraction: float

    def series(self) -> pb.SeriesSpec:
        interval = Duration()
        interval.FromNanoseconds(round(self.interval_seconds * 1e9))
        return pb.SeriesSpec(
            node=self.node,
            features=[self.metric, *self.features],
            targets=[self.metric],
            lookback=self.lookback,
            horizon=self.horizon,
            interval=interval,
            train_fraction=self.train_fraction,
        )


class ProcessorClient:
    """A connection to the processor at host:port. Close it, or use it as a context manager.

    Every call has a deadline, until which it waits for a processor that is not there. One whose
    store is away is asked again for half a minute. Neither if *wait_for_ready* is false. Raises
    NoSequences for what the node does not have, or ProcessorUnavailable. Who was waited for in vain
    is not asked again: a round asks several times a metric, and waiting each time would outlast it.

    By *credentials* the processor is known, and told who calls. Raises ConfigError for files that
    cannot be used.

    With *kept*, ``sequences`` asks only for the steps that are not kept there. What it returns is
    the same, bit by bit.
    """

    def __init__(
        self,
        address: str,
        deadline_seconds: float = DEADLINE_SECONDS,
        wait_for_ready: bool = True,
        kept: KeptSteps | None = None,
        credentials: Credentials = Credentials(),  # noqa: B008 - frozen
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._call: dict[str, Any] = {
            "timeout": deadline_seconds,
            "wait_for_ready": wait_for_ready,
            "metadata": credentials.metadata(),
        }
        options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
        if wait_for_ready:
            options.append(("grpc.service_config", _ASK_AGAIN))
        self._channel = credentials.channel(address, options)
        self._stub = pb_grpc.ProcessorServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._silence = ""
        self._kept = kept

    def nodes(self) -> list[str]:
        """The nodes that have a window."""
        with self._errors():
            answer = self._stub.ListNodes(pb.ListNodesRequest(), **self._call)
            return list(answer.nodes)

    def train_sequences(self, query: Query) -> int:
        """How many training sequences there are. Raises NoSequences, with the reason, for none."""
        with self._errors():
            answer = self._stub.DescribeWindow(
                pb.DescribeWindowRequest(series=query.series()), **self._call
            )
        if not answer.train_sequences:
            raise NoSequences(answer.reason)
        return int(answer.train_sequences)

    def sequences(self, query: Query) -> Sequences:
        """All sequences of both parts, rows joined to runs again."""
        if self._kept is None:
            return self._fetch(query, None).sequences
        name = self._address.encode() + b" " + query.series().SerializeToString(deterministic=True)
        kept = self._kept.load(name) or NO_STEPS
        try:
            answer = self._fetch(query, kept)
        except _DoesNotFitError:
            answer = self._fetch(query, NO_STEPS)
        if answer.version and answer.new_steps > RENEWAL_SHARE * sum(map(len, answer.steps)):
            self._kept.save(name, answer.version, answer.steps)
            self._kept.remove_unused()
        return answer.sequences

    def _fetch(self, query: Query, kept: Steps | None) -> "_Answer":
        request = pb.GetSequencesRequest(series=query.series())
        if kept is not None:
            request.kept.version = kept.version
        steps: list[Values] = []
        new_steps = 0
        with self._errors():
            answers = self._stub.GetSequences(request, **self._call)
            header = next(answers).header
            interval_ns = header.interval.ToNanoseconds()
            columns = len(header.columns)
            if kept is not None and header.version:
                parts = list(answers)
                pieces = [part.piece for part in parts if part.HasField("piece")]
                steps = [_steps(piece, kept.values_sf, columns) for piece in pieces]
                new_steps = sum(len(piece.values) for piece in pieces) // (8 * columns)
                spans = (part.run for part in parts if part.HasField("run"))
                runs = _runs_in(spans, _normalised(steps, header.columns), interval_ns)
            else:  # also a processor that knows of no increments
                chunks = (part.chunk for part in answers)
                runs = _runs(chunks, columns, interval_ns, query)
        sequences = Sequences(
            metric=query.metric,
            train=runs[pb.SPLIT_TRAIN],
            validation=runs[pb.SPLIT_VALIDATION],
            scale=_scale(header.columns),
            lookback=query.lookback,
            horizon=query.horizon,
            interval_ns=interval_ns,
            train_sequences=header.train_sequences,
            validation_sequences=header.validation_sequences,
        )
        return _Answer(sequences, header.version, steps, new_steps)

    def latest(self, query: Query) -> Latest:
        """The newest ``lookback`` steps."""
        with self._errors():
            answer = self._stub.GetLatest(pb.GetLatestRequest(series=query.series()), **self._call)
        return Latest(
            rows_lf=_rows(answer.rows, len(answer.columns)),
            scale=_scale(answer.columns),
            interval_ns=answer.interval.ToNanoseconds(),
            last_time_ns=answer.last_time.ToNanoseconds(),
        )

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "ProcessorClient":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        if self._silence:
            raise ProcessorUnavailable(self._silence)
        try:
            yield
        except grpc.RpcError as error:
            if error.code() in _CANNOT_LEARN:
                raise NoSequences(error.details()) from None
            cause = f"the processor at {self._address}: {error.code().name}: {error.details()}"
            if error.code() in _NOT_CONNECTED and (
                refusal := self._credentials.refusal(self._address)
            ):
                cause += f"; {refusal}"
            if error.code() in _WAITED_FOR:
                self._silence = cause
            raise ProcessorUnavailable(cause) from None


def _rows(data: bytes, columns: int) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4").reshape(-1, columns)


def _scale(columns: Sequence[pb.Statistics]) -> Scale:
    metric = columns[0]
    return Scale(metric.unit, metric.mean, metric.standard_deviation)


def _runs(
    chunks: Iterator[pb.SequencesChunk], columns: int, interval_ns: int, query: Query
) -> dict[int, list[Run]]:
    """Chunks of one run joined again: a later chunk begins with rows that are there already."""
    again = query.lookback + query.horizon - 1
    pieces: dict[int, list[tuple[int, list[NDArray[np.float32]]]]] = {
        pb.SPLIT_TRAIN: [],
        pb.SPLIT_VALIDATION: [],
    }
    for chunk in chunks:
        rows = _rows(chunk.rows, columns)
        first_ns = chunk.first_time.ToNanoseconds()
        runs = pieces[chunk.split]
        if runs:
            start_ns, parts = runs[-1]
            if first_ns == start_ns + (sum(map(len, parts)) - again) * interval_ns:
                parts.append(rows[again:])
                continue
        runs.append((first_ns, [rows]))
    return {
        split: [
            Run(first_ns, interval_ns, parts[0] if len(parts) == 1 else np.concatenate(parts))
            for first_ns, parts in runs
        ]
        for split, runs in pieces.items()
    }


@dataclass(frozen=True)
class _Answer:
    sequences: Sequences
    version: bytes
    """Empty unless increments were asked for and are known of; then of *steps*."""
    steps: list[Values]
    """In the columns' units, kept and new ones."""
    new_steps: int


class _DoesNotFitError(Exception):
    """An answer that does not fit what is kept: then all is asked for."""


def _steps(piece: pb.StepsPiece, kept_sf: Values, columns: int) -> Values:
    """The steps of *piece*, in the columns' units, as a view. Raises _DoesNotFitError."""
    if not piece.kept_steps:
        return np.frombuffer(piece.values, "<f8").reshape(-1, columns)
    steps = kept_sf[piece.kept_first : piece.kept_first + piece.kept_steps]
    if steps.shape != (piece.kept_steps, columns):
        raise _DoesNotFitError
    return steps


def _normalised(steps: list[Values], columns: Sequence[pb.Statistics]) -> NDArray[np.float32]:
    """Steps one after the other, as the processor does it: in float64, rounded once."""
    rows_sf = np.empty((sum(map(len, steps)), len(columns)), np.float32)
    first = 0
    for part_sf in steps:
        for place, column in enumerate(columns):
            centred_s = part_sf[:, place] - column.mean
            rows_sf[first : first + len(part_sf), place] = centred_s / column.standard_deviation
        first += len(part_sf)
    return rows_sf


def _runs_in(
    spans: Iterable[pb.StepsRun], rows_sf: NDArray[np.float32], interval_ns: int
) -> dict[int, list[Run]]:
    """Runs as views on *rows_sf*."""
    runs: dict[int, list[Run]] = {pb.SPLIT_TRAIN: [], pb.SPLIT_VALIDATION: []}
    for span in spans:
        rows_tf = rows_sf[span.first_step : span.first_step + span.steps]
        runs[span.split].append(Run(span.first_time.ToNanoseconds(), interval_ns, rows_tf))
    return runs
