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

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_TOO_SHORT: _ClassVar[Reason]
    REASON_SILENT: _ClassVar[Reason]
    REASON_STALE: _ClassVar[Reason]
    REASON_UNAVAILABLE: _ClassVar[Reason]
    REASON_STUCK: _ClassVar[Reason]
    REASON_TOO_RARE: _ClassVar[Reason]
    REASON_STORE_UNAVAILABLE: _ClassVar[Reason]
REASON_UNSPECIFIED: Reason
REASON_TOO_SHORT: Reason
REASON_SILENT: Reason
REASON_STALE: Reason
REASON_UNAVAILABLE: Reason
REASON_STUCK: Reason
REASON_TOO_RARE: Reason
REASON_STORE_UNAVAILABLE: Reason

class GetForecastsRequest(_message.Message):
    __slots__ = ("nodes", "metrics")
    NODES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    metrics: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Iterable[str]] = ...) -> None: ...

class GetForecastsResponse(_message.Message):
    __slots__ = ("forecasts",)
    FORECASTS_FIELD_NUMBER: _ClassVar[int]
    forecasts: _containers.RepeatedCompositeFieldContainer[Forecast]
    def __init__(self, forecasts: _Optional[_Iterable[_Union[Forecast, _Mapping]]] = ...) -> None: ...

class WatchForecastsRequest(_message.Message):
    __slots__ = ("nodes", "metrics")
    NODES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    metrics: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchForecastsResponse(_message.Message):
    __slots__ = ("forecast",)
    FORECAST_FIELD_NUMBER: _ClassVar[int]
    forecast: Forecast
    def __init__(self, forecast: _Optional[_Union[Forecast, _Mapping]] = ...) -> None: ...

class Forecast(_message.Message):
    __slots__ = ("node", "metric", "unit", "interval", "last_time", "last_value", "horizons", "model", "no_model", "none")
    NODE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_VALUE_FIELD_NUMBER: _ClassVar[int]
    HORIZONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NO_MODEL_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    node: str
    metric: str
    unit: str
    interval: _duration_pb2.Duration
    last_time: _timestamp_pb2.Timestamp
    last_value: float
    horizons: _containers.RepeatedCompositeFieldContainer[Horizon]
    model: Model
    no_model: str
    none: NoForecast
    def __init__(self, node: _Optional[str] = ..., metric: _Optional[str] = ..., unit: _Optional[str] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_value: _Optional[float] = ..., horizons: _Optional[_Iterable[_Union[Horizon, _Mapping]]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., no_model: _Optional[str] = ..., none: _Optional[_Union[NoForecast, _Mapping]] = ...) -> None: ...

class Horizon(_message.Message):
    __slots__ = ("ahead", "time", "yhat", "intervals")
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    YHAT_FIELD_NUMBER: _ClassVar[int]
    INTERVALS_FIELD_NUMBER: _ClassVar[int]
    ahead: _duration_pb2.Duration
    time: _timestamp_pb2.Timestamp
    yhat: float
    intervals: _containers.RepeatedCompositeFieldContainer[Interval]
    def __init__(self, ahead: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., yhat: _Optional[float] = ..., intervals: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("level", "lower", "upper")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    level: float
    lower: float
    upper: float
    def __init__(self, level: _Optional[float] = ..., lower: _Optional[float] = ..., upper: _Optional[float] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("round", "created")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    round: int
    created: _timestamp_pb2.Timestamp
    def __init__(self, round: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class NoForecast(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    message: str
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class GetRecordRequest(_message.Message):
    __slots__ = ("node", "metric")
    NODE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    node: str
    metric: str
    def __init__(self, node: _Optional[str] = ..., metric: _Optional[str] = ...) -> None: ...

class GetRecordResponse(_message.Message):
    __slots__ = ("unit", "interval", "first_time", "values", "horizons")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    HORIZONS_FIELD_NUMBER: _ClassVar[int]
    unit: str
    interval: _duration_pb2.Duration
    first_time: _timestamp_pb2.Timestamp
    values: _containers.RepeatedScalarFieldContainer[float]
    horizons: _containers.RepeatedCompositeFieldContainer[RecordOfHorizon]
    def __init__(self, unit: _Optional[str] = ..., interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., first_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., values: _Optional[_Iterable[float]] = ..., horizons: _Optional[_Iterable[_Union[RecordOfHorizon, _Mapping]]] = ...) -> None: ...

class RecordOfHorizon(_message.Message):
    __slots__ = ("ahead", "yhat", "intervals", "forecasters")
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    YHAT_FIELD_NUMBER: _ClassVar[int]
    INTERVALS_FIELD_NUMBER: _ClassVar[int]
    FORECASTERS_FIELD_NUMBER: _ClassVar[int]
    ahead: _duration_pb2.Duration
    yhat: _containers.RepeatedScalarFieldContainer[float]
    intervals: _containers.RepeatedCompositeFieldContainer[RecordOfInterval]
    forecasters: _containers.RepeatedCompositeFieldContainer[RecordOfForecaster]
    def __init__(self, ahead: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., yhat: _Optional[_Iterable[float]] = ..., intervals: _Optional[_Iterable[_Union[RecordOfInterval, _Mapping]]] = ..., forecasters: _Optional[_Iterable[_Union[RecordOfForecaster, _Mapping]]] = ...) -> None: ...

class RecordOfInterval(_message.Message):
    __slots__ = ("level", "lower", "upper")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    level: float
    lower: _containers.RepeatedScalarFieldContainer[float]
    upper: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, level: _Optional[float] = ..., lower: _Optional[_Iterable[float]] = ..., upper: _Optional[_Iterable[float]] = ...) -> None: ...

class RecordOfForecaster(_message.Message):
    __slots__ = ("name", "yhat")
    NAME_FIELD_NUMBER: _ClassVar[int]
    YHAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    yhat: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., yhat: _Optional[_Iterable[float]] = ...) -> None: ...
