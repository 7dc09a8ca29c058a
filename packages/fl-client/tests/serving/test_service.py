"""What a node says of its metrics, and when it says nothing: the real service over gRPC."""

import math
import time

import grpc
import numpy as np
import pytest
import structlog
from icos_fl.forecast.v1 import forecast_service_pb2 as pb
from icos_fl_client.serving import follower, kept
from icos_fl_timeseries_store import StoreUnavailable
from icos_fl_timeseries_store.conditions import ColumnExpectations, Expectations

SECOND = 10**9


def wave(count: int, first: int = 0) -> list[float]:
    return (50 + 20 * np.sin((first + np.arange(count)) / 10)).tolist()


def test_rows_become_forecasts_from_the_end_of_the_newest_step(service):
    service.append(cpu=wave(60), power=wave(60))
    cpu = service.until_now()
    assert (cpu.node, cpu.metric, cpu.unit, cpu.interval.seconds) == ("a", "cpu", "%", 15)
    assert cpu.last_time.ToNanoseconds() == service.time_ns + 15 * SECOND // 2
    assert cpu.last_value == wave(60)[-1]
    assert [each.ahead.seconds for each in cpu.horizons] == [60, 300]
    ahead = [each.time.ToNanoseconds() - cpu.last_time.ToNanoseconds() for each in cpu.horizons]
    assert ahead == [60 * SECOND, 300 * SECOND]
    for horizon in cpu.horizons:
        inner, outer = horizon.intervals
        assert (inner.level, outer.level) == (0.8, 0.95)
        assert 0 <= outer.lower <= inner.lower <= horizon.yhat <= inner.upper <= outer.upper <= 100


def test_each_new_step_is_told_to_who_watches(service):
    service.append(cpu=wave(30))
    service.until_now()
    stream = service.stub.WatchForecasts(pb.WatchForecastsRequest(), timeout=60)
    first = next(stream).forecast
    service.append(cpu=wave(1, 30))
    second = next(stream).forecast
    stream.cancel()
    assert second.last_time.ToNanoseconds() - first.last_time.ToNanoseconds() == 15 * SECOND
    assert second.last_value == wave(1, 30)[0]


def test_between_steps_the_store_is_asked_less_than_once_a_row_and_no_step_is_late(
    new_service, monkeypatch
):
    monkeypatch.setattr(follower, "JUDGE_SECONDS", 14.0)
    service = new_service(recorded=False, step_seconds=3)
    distance_ns, rows_of_a_step = 6 * SECOND // 10, 5

    def append(first: int, count: int) -> None:
        times_ns_t = service.time_ns + (first + np.arange(count)) * distance_ns
        values_tf = np.array(wave(count, first))[:, None]
        service.window.append(["cpu"], times_ns_t, values_tf, {"cpu": "%"})

    append(-49, 50)
    service.start()
    before = service.until(lambda found: found.HasField("last_time"))
    waits, wait = [], service.window.wait
    monkeypatch.setattr(service.window, "wait", lambda *args: waits.append(args) or wait(*args))
    for row in range(1, rows_of_a_step + 1):
        time.sleep(max(0.0, (service.time_ns + row * distance_ns - time.time_ns()) / SECOND))
        append(row, 1)
    stored = time.monotonic()
    after = service.until(lambda found: found.last_time != before.last_time)
    assert time.monotonic() < stored + 1
    assert after.last_time.ToNanoseconds() - before.last_time.ToNanoseconds() == 3 * SECOND
    assert len(waits) < rows_of_a_step


def test_what_was_said_stands_beside_what_came(service):
    service.append(cpu=wave(50))
    service.until_now()
    service.append(cpu=wave(30, 50))
    said = service.until_now()
    record = service.record()
    assert list(record.values) == wave(80)
    by_ahead = {each.ahead.seconds: each for each in record.horizons}
    assert [by_ahead[h.ahead.seconds].yhat[-1] for h in said.horizons] == [
        h.yhat for h in said.horizons
    ]
    last = next(each for each in by_ahead[60].forecasters if each.name == "last")
    assert list(last.yhat) == wave(80)


def test_forecasts_of_before_do_not_change_with_what_comes_after(service, new_service):
    service.append(cpu=wave(60))
    service.until_now()
    other = new_service()
    other.append(cpu=[*wave(60), *[99.0] * 40])
    other.start()
    other.until_now()
    for mine, its in zip(service.record().horizons, other.record().horizons, strict=True):
        np.testing.assert_array_equal(mine.yhat, its.yhat[:60])


def test_the_newest_global_model_takes_part_and_is_named(service, new_model):
    service.append(cpu=wave(30))
    service.until_now()
    assert service.forecasts("cpu")[0].no_model == "a keeps no model of cpu yet"
    service.store.model_state("a", "cpu").put(new_model(made_in=3))
    service.append(cpu=wave(1, 30))
    service.until(lambda found: found.no_model == "")
    service.append(cpu=wave(1, 31))
    found = service.until_now()
    assert (found.model.round, found.model.created.seconds) == (3, 1_700_000_003)
    said = next(each for each in service.record().horizons[0].forecasters if each.name == "model")
    assert math.isfinite(said.yhat[-1])
    assert np.isnan(said.yhat[:29]).all()


def test_a_model_says_nothing_of_steps_that_it_may_have_been_trained_on(new_service, new_model):
    service = new_service()
    service.append(cpu=wave(50))
    service.store.model_state("a", "cpu").put(new_model())
    service.start()
    service.until_now()
    service.append(cpu=wave(5, 50))
    service.until_now()
    model = next(each for each in service.record().horizons[0].forecasters if each.name == "model")
    assert np.flatnonzero(np.isfinite(model.yhat)).tolist() == [49, 50, 51, 52, 53, 54]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"interval": 300}, "its steps are of 300 s, forecasts are of 15 s"),
        ({"time-step": 40}, "the model needs 40 steps without a gap, and 30 are there"),
        ({"horizon": 2}, "the model reaches 2 steps ahead, forecasts begin at 4"),
    ],
)
def test_a_model_that_does_not_fit_is_left_out_with_the_reason(service, new_model, changes, reason):
    service.store.model_state("a", "cpu").put(new_model(**changes))
    service.append(cpu=wave(30))
    found = service.until_now()
    assert found.no_model.endswith(reason)
    assert not found.HasField("model")
    assert len(found.horizons) == 2


def test_weights_that_are_damaged_leave_the_forecasts_to_the_others(service, new_model):
    version = new_model()
    del version.weights["head.bias"]
    service.store.model_state("a", "cpu").put(version)
    service.append(cpu=wave(30))
    found = service.until_now()
    assert found.no_model == "the model of round 3 cannot be used: the weights have no 'head.bias'"
    assert len(found.horizons) == 2


def test_a_sensor_that_cannot_be_read_has_no_forecast_and_teaches_nothing(service):
    service.append(cpu=wave(30), power=wave(30))
    service.until_now("power")
    service.append(cpu=wave(20), power=[0.0] * 20)
    found = service.until(lambda found: found.none.reason == pb.REASON_UNAVAILABLE, "power")
    assert "exactly 0 for " in found.none.message
    assert not found.horizons
    assert service.forecasts("cpu")[0].horizons
    service.append(cpu=[50.0], power=[0.0])
    service.until_now()
    assert math.isnan(service.record("power").values[-1])
    service.append(cpu=wave(5), power=wave(5))
    assert service.until(lambda found: found.horizons, "power").last_value == wave(5)[-1]


def test_a_metric_that_repeats_one_value_has_no_forecast(service):
    service.append(cpu=[42.5] * 60)
    found = service.until(lambda found: found.none.reason == pb.REASON_STUCK)
    assert "are 42.5, over" in found.none.message


def test_a_metric_that_has_fallen_silent_has_no_forecast_however_long_ago(service):
    service.append(cpu=wave(30), power=wave(30))
    service.until_now("power")
    service.append(cpu=wave(1100), power=[math.nan] * 1100)
    found = service.until(lambda found: found.none.reason == pb.REASON_SILENT, "power")
    assert "no value for 16500 s while rows go on, 300 s are the limit" in found.none.message


def test_a_node_whose_newest_row_is_old_has_no_forecast(new_service):
    service = new_service(recorded=False)
    service.time_ns = time.time_ns() - 1000 * SECOND
    service.append(cpu=wave(30))
    service.start()
    found = service.until(lambda found: found.none.reason == pb.REASON_STALE)
    assert "450 s are the limit" not in found.none.message
    assert "the newest row is 5" in found.none.message


def test_rows_further_apart_than_a_step_have_no_forecast(service):
    times = service.time_ns + np.arange(10) * 60 * SECOND
    service.window.append(["cpu"], times, np.array(wave(10))[:, None], {"cpu": "%"})
    found = service.until(lambda found: found.none.reason == pb.REASON_TOO_RARE)
    assert found.none.message == "rows are 60 s apart, steps of 15 s are forecast"


def test_one_row_is_too_short(service):
    service.append(cpu=[1.0])
    found = service.until(lambda found: True)
    assert found.none.reason == pb.REASON_TOO_SHORT


def test_while_the_store_is_away_forecasts_hold_until_they_are_old(new_service):
    service = new_service(expectations=Expectations(late_seconds=2.0))
    service.append(cpu=wave(30))
    service.start()
    service.until_now()
    service.store.answers = False
    away = time.monotonic()
    found = service.until(lambda found: found.HasField("none"))
    assert time.monotonic() - away > 1.0
    assert found.none.reason == pb.REASON_STORE_UNAVAILABLE
    assert "nowhere:1 does not answer" in found.none.message
    service.store.answers = True
    service.append(cpu=wave(1))
    assert service.until_now().horizons


def test_values_stay_within_what_the_expectations_allow(new_service):
    limits = {"cpu": ColumnExpectations(maximum=64.0)}
    service = new_service(expectations=Expectations(columns=limits))
    ramp = np.linspace(0, 63, 60)
    service.append(units={"cpu": "MiB"}, cpu=ramp.tolist())
    service.start()
    found = service.until_now()
    ends = [each.upper for horizon in found.horizons for each in horizon.intervals]
    assert max(ends) <= 64.0
    assert found.horizons[-1].yhat > 63.0


def test_a_restart_goes_on_with_what_was_learned(new_service, tmp_path):
    service = new_service(folder=tmp_path)
    service.append(cpu=wave(200))
    service.start()
    service.until_now()
    before = service.record()
    service.stop()
    service.append(cpu=wave(10, 200))
    service.start()
    service.until_now()
    after = service.record()
    assert list(after.values) == wave(210)
    np.testing.assert_array_equal(before.horizons[0].yhat, after.horizons[0].yhat[:200])


def test_a_restart_after_the_window_has_moved_on_leaves_a_gap(new_service, tmp_path):
    service = new_service(folder=tmp_path)
    service.append(cpu=wave(50))
    service.start()
    service.until_now()
    service.stop()
    service.time_ns += 100 * 15 * SECOND
    service.append(cpu=wave(20))
    service.start()
    service.until_now()
    values = np.array(service.record().values)
    assert np.isnan(values[50:150]).all()
    assert values[150:].tolist() == wave(20)


@pytest.mark.parametrize("changed", ["horizons", "forecasters"])
def test_a_state_of_other_horizons_or_forecasters_is_learned_from_again(
    new_service, tmp_path, changed
):
    service = new_service(folder=tmp_path)
    service.append(cpu=wave(200))
    service.start()
    service.until_now()
    said = service.record()
    service.stop()
    (file,) = tmp_path.iterdir()
    with np.load(file) as arrays:
        state = dict(arrays)
    if changed == "horizons":
        state["ahead"] = state["ahead"][:1]
    else:  # as 0.3.0 wrote it
        state["combination-names"] = state["combination-names"][:1]
        del state["grid-row"]
    np.savez(file, **state)
    service.append(cpu=wave(10, 200))
    service.start()
    service.until_now()
    again = service.record()
    assert list(again.values) == wave(210)
    np.testing.assert_array_equal(said.horizons[0].yhat, again.horizons[0].yhat[:200])


@pytest.mark.parametrize("damage", ["torn", "another"])
def test_a_damaged_state_is_told_and_begun_anew(new_service, tmp_path, monkeypatch, damage):
    log = structlog.testing.CapturingLogger()  # whatever other tests have made of the real one
    monkeypatch.setattr(kept, "log", log)
    service = new_service(folder=tmp_path)
    service.append(cpu=wave(50))
    service.start()
    service.until_now()
    service.stop()
    (file,) = tmp_path.iterdir()
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        np.savez(file, ahead=np.array([1]))
    service.start()
    assert service.until_now().horizons
    assert [(call.method_name, call.args) for call in log.calls] == [
        ("warning", ("forecasts begin anew",))
    ]


@pytest.mark.parametrize(
    ("call", "request_", "told"),
    [
        ("GetForecasts", pb.GetForecastsRequest(nodes=["b"]), "no node 'b'; there are: a"),
        ("GetForecasts", pb.GetForecastsRequest(metrics=["x"]), "no metric 'x'; there are: cpu"),
        ("GetRecord", pb.GetRecordRequest(node="b", metric="x"), "no node 'b'; there are: a"),
        ("GetRecord", pb.GetRecordRequest(node="a", metric="x"), "no metric 'x'; there are: cpu"),
    ],
)
def test_who_asks_for_what_is_not_there_is_told_what_is(service, call, request_, told):
    service.append(cpu=wave(30))
    service.until_now()
    with pytest.raises(grpc.RpcError) as caught:
        getattr(service.stub, call)(request_)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, told)


def test_one_watcher_too_many_is_refused(service):
    service.append(cpu=wave(30))
    while not service.forecasts():
        time.sleep(0.05)
    streams = [service.stub.WatchForecasts(pb.WatchForecastsRequest()) for _ in range(2)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        next(service.stub.WatchForecasts(pb.WatchForecastsRequest()))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "2 clients watch forecasts already, and that is the limit"
    for stream in streams:
        stream.cancel()


def test_a_watcher_that_leaves_makes_room_at_once(service):
    service.append(cpu=wave(30))
    for _ in range(20):
        service.until_now()
        time.sleep(0.02)


def test_who_watches_is_told_of_the_end(new_service):
    service = new_service()
    service.append(cpu=wave(30))
    service.start()
    stream = service.stub.WatchForecasts(pb.WatchForecastsRequest())
    next(stream)
    service.server.stop()
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_store_that_is_away_at_the_start_is_waited_for(new_service):
    service = new_service()
    service.append(cpu=wave(30))
    service.store.answers = False
    with pytest.raises(StoreUnavailable):
        service.store.check()
    service.start()
    assert service.forecasts() == []
    service.store.answers = True
    assert service.until_now().horizons
