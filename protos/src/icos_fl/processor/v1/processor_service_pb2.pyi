import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Split(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPLIT_UNSPECIFIED: _ClassVar[Split]
    SPLIT_TRAIN: _ClassVar[Split]
    SPLIT_VALIDATION: _ClassVar[Split]
SPLIT_UNSPECIFIED: Split
SPLIT_TRAIN: Split
SPLIT_VALIDATION: Split

class SeriesSpec(_message.Message):
    __slots__ = ("node", "features", "targets", "lookback", "horizon", "interval", "train_fraction")
    NODE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    LOOKBACK_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FRACTION_FIELD_NUMBER: _ClassVar[int]
    node: str
    features: _containers.RepeatedScalarFieldContainer[str]
    targets: _containers.RepeatedScalarFieldContainer[str]
    lookback: int
    horizon: int
    interval: _duration_pb2.Duration
    train_fraction: float
    def __init__(self, node: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., targets: _Optional[_Iterable[str]] = ..., lookback: _Optional[int] = ..., horizon: _Optional[int] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., train_fraction: _Optional[float] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNodesResponse(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "unit", "rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    rows: int
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class DescribeWindowRequest(_message.Message):
    __slots__ = ("series",)
    SERIES_FIELD_NUMBER: _ClassVar[int]
    series: SeriesSpec
    def __init__(self, series: _Optional[_Union[SeriesSpec, _Mapping]] = ...) -> None: ...

class DescribeWindowResponse(_message.Message):
    __slots__ = ("rows", "capacity", "first_time", "last_time", "interval", "gaps", "columns", "train_sequences", "validation_sequences", "missing_rows", "reason")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MISSING_ROWS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rows: int
    capacity: int
    first_time: _timestamp_pb2.Timestamp
    last_time: _timestamp_pb2.Timestamp
    interval: _duration_pb2.Duration
    gaps: int
    columns: _containers.RepeatedCompositeFieldContainer[Column]
    train_sequences: int
    validation_sequences: int
    missing_rows: int
    reason: str
    def __init__(self, rows: _Optional[int] = ..., capacity: _Optional[int] = ..., first_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., gaps: _Optional[int] = ..., columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., train_sequences: _Optional[int] = ..., validation_sequences: _Optional[int] = ..., missing_rows: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class GetSequencesRequest(_message.Message):
    __slots__ = ("series", "splits", "kept")
    SERIES_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    series: SeriesSpec
    splits: _containers.RepeatedScalarFieldContainer[Split]
    kept: KeptSteps
    def __init__(self, series: _Optional[_Union[SeriesSpec, _Mapping]] = ..., splits: _Optional[_Iterable[_Union[Split, str]]] = ..., kept: _Optional[_Union[KeptSteps, _Mapping]] = ...) -> None: ...

class KeptSteps(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: bytes
    def __init__(self, version: _Optional[bytes] = ...) -> None: ...

class Statistics(_message.Message):
    __slots__ = ("column", "unit", "mean", "standard_deviation")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STANDARD_DEVIATION_FIELD_NUMBER: _ClassVar[int]
    column: str
    unit: str
    mean: float
    standard_deviation: float
    def __init__(self, column: _Optional[str] = ..., unit: _Optional[str] = ..., mean: _Optional[float] = ..., standard_deviation: _Optional[float] = ...) -> None: ...

class GetSequencesResponse(_message.Message):
    __slots__ = ("header", "chunk", "piece", "run")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    header: SequencesHeader
    chunk: SequencesChunk
    piece: StepsPiece
    run: StepsRun
    def __init__(self, header: _Optional[_Union[SequencesHeader, _Mapping]] = ..., chunk: _Optional[_Union[SequencesChunk, _Mapping]] = ..., piece: _Optional[_Union[StepsPiece, _Mapping]] = ..., run: _Optional[_Union[StepsRun, _Mapping]] = ...) -> None: ...

class SequencesHeader(_message.Message):
    __slots__ = ("columns", "interval", "train_sequences", "validation_sequences", "version")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[Statistics]
    interval: _duration_pb2.Duration
    train_sequences: int
    validation_sequences: int
    version: bytes
    def __init__(self, columns: _Optional[_Iterable[_Union[Statistics, _Mapping]]] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., train_sequences: _Optional[int] = ..., validation_sequences: _Optional[int] = ..., version: _Optional[bytes] = ...) -> None: ...

class StepsPiece(_message.Message):
    __slots__ = ("kept_first", "kept_steps", "values")
    KEPT_FIRST_FIELD_NUMBER: _ClassVar[int]
    KEPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    kept_first: int
    kept_steps: int
    values: bytes
    def __init__(self, kept_first: _Optional[int] = ..., kept_steps: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class StepsRun(_message.Message):
    __slots__ = ("split", "first_time", "first_step", "steps")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    split: Split
    first_time: _timestamp_pb2.Timestamp
    first_step: int
    steps: int
    def __init__(self, split: _Optional[_Union[Split, str]] = ..., first_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., first_step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class SequencesChunk(_message.Message):
    __slots__ = ("split", "first_time", "rows")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    split: Split
    first_time: _timestamp_pb2.Timestamp
    rows: bytes
    def __init__(self, split: _Optional[_Union[Split, str]] = ..., first_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class GetLatestRequest(_message.Message):
    __slots__ = ("series",)
    SERIES_FIELD_NUMBER: _ClassVar[int]
    series: SeriesSpec
    def __init__(self, series: _Optional[_Union[SeriesSpec, _Mapping]] = ...) -> None: ...

class GetLatestResponse(_message.Message):
    __slots__ = ("columns", "interval", "last_time", "rows")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[Statistics]
    interval: _duration_pb2.Duration
    last_time: _timestamp_pb2.Timestamp
    rows: bytes
    def __init__(self, columns: _Optional[_Iterable[_Union[Statistics, _Mapping]]] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class WatchWindowRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class WatchWindowResponse(_message.Message):
    __slots__ = ("rows", "last_time", "changed_rows")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    CHANGED_ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    last_time: _timestamp_pb2.Timestamp
    changed_rows: int
    def __init__(self, rows: _Optional[int] = ..., last_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., changed_rows: _Optional[int] = ...) -> None: ...
