"""A power sensor that cannot be read: no model is trained on it, and the other metrics go on."""

import grpc
import numpy as np
import pytest
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl_processor import ColumnUnavailable, Part, Processor, SeriesSpec
from icos_fl_timeseries_store.conditions import Expectations

# Rows come every 15 s: the 41 of ten minutes.
LIVE, DEAD = [50.0 + at % 7 for at in range(60)], [0.0] * 41
CPU = [20.0 + at % 5 for at in range(101)]


def spec(*columns, **changes):
    facts = {"features": columns, "targets": columns, "lookback": 3, "horizon": 2}
    return SeriesSpec(node="a", **(facts | changes))


def steps(store, series):
    """Values of all training steps, in the column's unit, run by run."""
    found = Processor(store).sequences(series, [Part.TRAIN])
    (power,) = found.columns
    return [
        np.round(chunk.rows_sf[:, 0] * power.standard_deviation + power.mean, 3).tolist()
        for chunk in found.chunks
    ]


def test_ten_minutes_of_no_power_are_refused_with_the_reason(store):
    store.fill("a", {"power": LIVE + DEAD, "cpu": CPU})
    for refused in (Processor(store).sequences, Processor(store).latest):
        with pytest.raises(
            ColumnUnavailable, match="'power' of node 'a' is unavailable: exactly 0"
        ):
            refused(spec("power"))


def test_the_other_metrics_of_the_node_go_on(store):
    store.fill("a", {"power": LIVE + DEAD, "cpu": CPU})
    assert Processor(store).sequences(spec("cpu")).train_sequences == 101 - 4


def test_a_metric_that_needs_the_dead_one_is_refused_too(store):
    store.fill("a", {"power": LIVE + DEAD, "cpu": CPU})
    with pytest.raises(ColumnUnavailable, match="'power'"):
        Processor(store).sequences(spec("cpu", "power"))


def test_real_values_clear_it_and_the_zeros_are_not_learned(store):
    store.fill("a", {"power": [*LIVE, *DEAD, 21, 22, 23, 24, 25]})
    assert steps(store, spec("power")) == [LIVE, [21, 22, 23, 24, 25]]


def test_a_short_zero_is_a_value(store):
    # Eight zeros every 15 s last 105 s; 120 s are the limit.
    store.fill("a", {"power": [*LIVE, *[0.0] * 8]})
    assert steps(store, spec("power")) == [[*LIVE, *[0.0] * 8]]


def test_an_idle_cpu_is_no_dead_one(store):
    store.fill("a", {"cpu": [0.0] * 101})
    assert Processor(store).sequences(spec("cpu")).train_sequences == 101 - 4


def test_an_operator_says_where_zero_is_a_value(store):
    store.fill("a", {"power": LIVE + DEAD})
    expectations = Expectations(columns={"power": {"zero_is_missing": False}})
    found = Processor(store, expectations=expectations).sequences(spec("power"))
    assert found.train_sequences == 101 - 4


def test_the_service_describes_it_without_missing_rows_and_refuses_sequences(running, spec):
    running.store.fill("a", {"power": LIVE + DEAD, "cpu": CPU})
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=spec()))
    assert (found.rows, found.train_sequences, found.missing_rows) == (101, 0, 0)
    assert found.reason.startswith("'power' of node 'a' is unavailable: exactly 0 for 600 s")
    with pytest.raises(grpc.RpcError) as caught:
        list(running.stub.GetSequences(pb.GetSequencesRequest(series=spec()), timeout=20))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == found.reason
