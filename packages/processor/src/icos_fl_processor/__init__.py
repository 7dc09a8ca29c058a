"""Serves a node's window as normalised sequences over gRPC.

As a library: ``Processor(store)`` on any Store of icos_fl_timeseries_store, and the functions on
arrays in ``icos_fl_processor.windows``.
"""

from icos_fl_processor.errors import (
    ColumnUnavailable,
    InvalidSeries,
    ProcessorError,
    StepTooShort,
    TooFewRows,
    TooManyWatchers,
    UnknownColumn,
)
from icos_fl_processor.increments import Piece
from icos_fl_processor.processor import (
    Change,
    Chunk,
    Description,
    Latest,
    Processor,
    RunOfSteps,
    Sequences,
    Update,
)
from icos_fl_processor.series import ColumnStatistics, Part, SeriesSpec
from icos_fl_processor.windows import denormalise, normalise, resample, sliding_windows

__all__ = [
    "Change",
    "Chunk",
    "ColumnStatistics",
    "ColumnUnavailable",
    "Description",
    "InvalidSeries",
    "Latest",
    "Part",
    "Piece",
    "Processor",
    "ProcessorError",
    "RunOfSteps",
    "Sequences",
    "SeriesSpec",
    "StepTooShort",
    "TooFewRows",
    "TooManyWatchers",
    "UnknownColumn",
    "Update",
    "denormalise",
    "normalise",
    "resample",
    "sliding_windows",
]
