"""Outlooks and records to messages: shapes alone."""

from collections.abc import Iterator

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl_timeseries_store import ModelVersion

from icos_fl_client.serving.outlook import LEVELS, Outlook, Reason, Record

_REASONS = {
    Reason.TOO_SHORT: pb.REASON_TOO_SHORT,
    Reason.SILENT: pb.REASON_SILENT,
    Reason.STALE: pb.REASON_STALE,
    Reason.UNAVAILABLE: pb.REASON_UNAVAILABLE,
    Reason.STUCK: pb.REASON_STUCK,
    Reason.TOO_RARE: pb.REASON_TOO_RARE,
    Reason.STORE_UNAVAILABLE: pb.REASON_STORE_UNAVAILABLE,
}


def forecast(outlook: Outlook) -> pb.Forecast:
    """An outlook as a message."""
    message = pb.Forecast(
        node=outlook.node,
        metric=outlook.metric,
        unit=outlook.unit,
        interval=_duration(outlook.interval_ns),
        last_value=outlook.last_value,
        horizons=_horizons(outlook),
        no_model=outlook.no_model,
    )
    if outlook.last_time_ns is not None:
        message.last_time.CopyFrom(_time(outlook.last_time_ns))
    if outlook.model:
        message.model.CopyFrom(_model(outlook.model))
    if outlook.none:
        none = pb.NoForecast(reason=_REASONS[outlook.none.reason], message=outlook.none.message)
        message.none.CopyFrom(none)
    return message


def record(found: Record) -> pb.GetRecordResponse:
    """A record as a message."""
    message = pb.GetRecordResponse(
        unit=found.unit, interval=_duration(found.interval_ns), values=found.values_t
    )
    if found.first_time_ns is not None:
        message.first_time.CopyFrom(_time(found.first_time_ns))
    for place, ahead_ns in enumerate(found.ahead_ns_h):
        bounds_bt = found.bounds_tbh[:, :, place].T
        message.horizons.add(
            ahead=_duration(ahead_ns),
            yhat=found.yhat_th[:, place],
            intervals=[
                pb.RecordOfInterval(level=level, lower=bounds_bt[at], upper=bounds_bt[at + 1])
                for level, at in zip(LEVELS, (0, 2), strict=True)
            ],
            forecasters=[
                pb.RecordOfForecaster(name=name, yhat=found.said_tkh[:, k, place])
                for k, name in enumerate(found.names)
            ],
        )
    return message


def _horizons(outlook: Outlook) -> Iterator[pb.Horizon]:
    said = outlook.forecast
    if said is None or outlook.last_time_ns is None:
        return
    for place, ahead_ns in enumerate(outlook.ahead_ns_h):
        bounds = (
            (said.lower_80_h[place], said.upper_80_h[place]),
            (said.lower_95_h[place], said.upper_95_h[place]),
        )
        yield pb.Horizon(
            ahead=_duration(ahead_ns),
            time=_time(outlook.last_time_ns + ahead_ns),
            yhat=said.yhat_h[place],
            intervals=[
                pb.Interval(level=level, lower=lower, upper=upper)
                for level, (lower, upper) in zip(LEVELS, bounds, strict=True)
                if np.isfinite(lower)
            ],
        )


def _model(version: ModelVersion) -> pb.Model:
    created = version.metadata.get("created-unix-s")
    message = pb.Model(round=version.round)
    if created is not None:
        message.created.CopyFrom(_time(round(float(created) * 1e9)))
    return message


def _duration(ns: int) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(ns)
    return duration


def _time(ns: int) -> Timestamp:
    time = Timestamp()
    time.FromNanoseconds(ns)
    return time
