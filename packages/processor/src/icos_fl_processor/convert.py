"""Domain ↔ messages: with the servicer the only modules that know the stubs."""

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from icos_fl.processor.v1 import processor_service_pb2 as pb

from icos_fl_processor.errors import InvalidSeries
from icos_fl_processor.increments import Piece
from icos_fl_processor.processor import (
    Change,
    Chunk,
    Description,
    Latest,
    RunOfSteps,
    Sequences,
    Update,
)
from icos_fl_processor.series import ColumnStatistics, Part, SeriesSpec
from icos_fl_processor.windows import Rows32

_SPLITS = {Part.TRAIN: pb.SPLIT_TRAIN, Part.VALIDATION: pb.SPLIT_VALIDATION}


def spec(message: pb.SeriesSpec) -> SeriesSpec:
    """Raises InvalidSeries."""
    return SeriesSpec(
        node=message.node,
        features=tuple(message.features),
        targets=tuple(message.targets),
        lookback=message.lookback,
        horizon=message.horizon,
        interval_ns=message.interval.ToNanoseconds(),
        train_fraction=message.train_fraction,
    )


def spec_of_latest(message: pb.SeriesSpec) -> SeriesSpec:
    """The same where the horizon is not used, and need not be given. Raises InvalidSeries."""
    without_horizon = pb.SeriesSpec()
    without_horizon.CopyFrom(message)
    without_horizon.horizon = 1
    return spec(without_horizon)


def parts(splits: list[int]) -> list[Part]:
    """The parts asked for; all where none is named. Raises InvalidSeries."""
    named: dict[int, Part] = {split: part for part, split in _SPLITS.items()}
    for split in splits:
        if split not in named:
            raise InvalidSeries(
                f"split {split} is unknown; SPLIT_TRAIN is {pb.SPLIT_TRAIN},"
                f" SPLIT_VALIDATION is {pb.SPLIT_VALIDATION}"
            )
    return [named[split] for split in splits] or list(Part)


def description(found: Description) -> pb.DescribeWindowResponse:
    """A window and what could be learned from it."""
    info = found.info
    return pb.DescribeWindowResponse(
        rows=info.rows,
        capacity=info.capacity_rows,
        first_time=_time(info.first_time_ns),
        last_time=_time(info.last_time_ns),
        interval=_duration(found.interval_ns),
        gaps=found.gaps,
        columns=[
            pb.Column(name=name, unit=unit, rows=rows)
            for name, unit, rows in zip(info.columns, info.units, found.column_rows, strict=True)
        ],
        train_sequences=found.train_sequences,
        validation_sequences=found.validation_sequences,
        missing_rows=found.missing_rows,
        reason=found.reason,
    )


def header(found: Sequences | Update) -> pb.GetSequencesResponse:
    """The first message of GetSequences."""
    return pb.GetSequencesResponse(
        header=pb.SequencesHeader(
            columns=_statistics(found.columns),
            interval=_duration(found.interval_ns),
            train_sequences=found.train_sequences,
            validation_sequences=found.validation_sequences,
            version=found.version if isinstance(found, Update) else b"",
        )
    )


def chunk(found: Chunk) -> pb.GetSequencesResponse:
    """One of the messages after it."""
    return pb.GetSequencesResponse(
        chunk=pb.SequencesChunk(
            split=_SPLITS[found.part],
            first_time=_time(found.first_time_ns),
            rows=_bytes(found.rows_sf),
        )
    )


def piece(found: Piece) -> pb.GetSequencesResponse:
    """Steps of an update: kept ones, or new ones in the columns' units."""
    return pb.GetSequencesResponse(
        piece=pb.StepsPiece(
            kept_first=found.kept_first,
            kept_steps=found.kept_steps,
            values=np.ascontiguousarray(found.values_sf, "<f8").tobytes(),
        )
    )


def run(found: RunOfSteps) -> pb.GetSequencesResponse:
    """Where sequences can be cut from the steps of an update."""
    return pb.GetSequencesResponse(
        run=pb.StepsRun(
            split=_SPLITS[found.part],
            first_time=_time(found.first_time_ns),
            first_step=found.steps.start,
            steps=len(found.steps),
        )
    )


def latest(found: Latest) -> pb.GetLatestResponse:
    """The newest lookback."""
    return pb.GetLatestResponse(
        columns=_statistics(found.columns),
        interval=_duration(found.interval_ns),
        last_time=_time(found.last_time_ns),
        rows=_bytes(found.rows_sf),
    )


def change(found: Change) -> pb.WatchWindowResponse:
    """One message of WatchWindow."""
    return pb.WatchWindowResponse(
        rows=found.rows,
        last_time=_time(found.last_time_ns),
        changed_rows=found.changed_rows,
    )


def _statistics(columns: tuple[ColumnStatistics, ...]) -> list[pb.Statistics]:
    return [
        pb.Statistics(
            column=column.name,
            unit=column.unit,
            mean=column.mean,
            standard_deviation=column.standard_deviation,
        )
        for column in columns
    ]


def _time(time_ns: int | None) -> Timestamp | None:
    if time_ns is None:
        return None
    message = Timestamp()
    message.FromNanoseconds(time_ns)
    return message


def _duration(interval_ns: int) -> Duration:
    message = Duration()
    message.FromNanoseconds(interval_ns)
    return message


def _bytes(rows_sf: Rows32) -> bytes:
    return np.ascontiguousarray(rows_sf, "<f4").tobytes()
