"""What the processor streams becomes runs again, and its statuses become errors in one sentence."""

import socket
import threading
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from icos_fl_client.errors import NoSequences, ProcessorUnavailable
from icos_fl_client.processor_client import ProcessorClient, Query

QUERY = Query(
    node="a",
    metric="cpu_usage",
    features=(),
    lookback=4,
    horizon=2,
    interval_seconds=0.0,
    train_fraction=0.75,
)
STEP_NS = 15_000_000_000


def in_units(sequences, runs) -> list[list[float]]:
    return [sequences.scale.restore(run.rows_tf[:, 0]).round(3).tolist() for run in runs]


def test_chunks_of_one_run_are_joined_again(windows, processor):
    values = np.arange(40.0)
    windows.put("a", "cpu_usage", [values], [])
    chunks = list(windows.series["a", "cpu_usage"].chunks(again=5))
    assert len(chunks) == 5

    sequences = processor.sequences(QUERY)

    assert in_units(sequences, sequences.train) == [values.tolist()]


def test_two_runs_stay_two(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(6.0), np.arange(20.0, 29.0)], [])

    sequences = processor.sequences(QUERY)

    assert in_units(sequences, sequences.train) == [[*range(6)], [*range(20, 29)]]


def test_a_gap_between_runs_is_seen_in_their_times(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(6.0), np.arange(6.0)], [])

    first, second = processor.sequences(QUERY).train

    assert second.first_time_ns - first.times_ns_t[-1] == 2 * STEP_NS


def test_parts_are_kept_apart(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(15.0)], [np.arange(30.0, 45.0)])

    sequences = processor.sequences(QUERY)

    assert in_units(sequences, sequences.train) == [[*range(15)]]
    assert in_units(sequences, sequences.validation) == [[*range(30, 45)]]
    assert (sequences.train_sequences, sequences.validation_sequences) == (10, 10)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=st.lists(st.integers(6, 60), min_size=1, max_size=5))
def test_what_is_split_and_joined_is_what_was_there(windows, processor, lengths):
    runs = [np.arange(length) + 100.0 * i for i, length in enumerate(lengths)]
    windows.put("a", "cpu_usage", runs, runs)

    sequences = processor.sequences(QUERY)

    assert in_units(sequences, sequences.train) == [run.tolist() for run in runs]
    assert in_units(sequences, sequences.validation) == [run.tolist() for run in runs]


def test_latest_is_the_newest_lookback(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(30.0)], [np.arange(40.0, 50.0)], "W", 20, 5)

    latest = processor.latest(QUERY)

    assert latest.scale.restore(latest.rows_lf[:, 0]).round(3).tolist() == [46, 47, 48, 49]
    assert latest.scale.unit == "W"
    assert latest.interval_ns == STEP_NS
    assert latest.last_time_ns == windows.series["a", "cpu_usage"].last_time_ns()


def test_nodes_are_those_with_a_window(windows, processor):
    windows.put("b", "cpu_usage", [np.arange(6.0)], [])
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])

    assert processor.nodes() == ["a", "b"]


def test_training_sequences_are_counted_without_rows(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(6.0), np.arange(8.0)], [])

    assert processor.train_sequences(QUERY) == 1 + 3


def test_no_training_sequence_has_the_processors_reason(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(5.0)], [])

    with pytest.raises(NoSequences, match=r"^6 rows in a row are needed$"):
        processor.train_sequences(QUERY)


def test_the_query_is_asked_as_the_run_wants_it_cut(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])
    processor.train_sequences(replace(QUERY, interval_seconds=2.5, features=("power",)))

    (spec,) = windows.asked
    assert list(spec.features) == ["cpu_usage", "power"]
    assert list(spec.targets) == ["cpu_usage"]
    assert spec.interval.ToNanoseconds() == 2_500_000_000
    assert (spec.lookback, spec.horizon, spec.train_fraction) == (4, 2, 0.75)


@pytest.mark.parametrize("call", ["sequences", "latest", "train_sequences"])
@pytest.mark.parametrize("code", ["NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT"])
def test_what_the_node_lacks_is_told_in_the_processors_words(windows, processor, code, call):
    windows.failure = (grpc.StatusCode[code], "300 rows are needed, 12 are there")

    with pytest.raises(NoSequences, match=r"^300 rows are needed, 12 are there$"):
        getattr(processor, call)(QUERY)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL"])
def test_a_processor_that_cannot_answer_is_named(windows, address, code):
    windows.failure = (grpc.StatusCode[code], "the store does not answer")

    with (
        ProcessorClient(address, wait_for_ready=False) as processor,
        pytest.raises(ProcessorUnavailable) as caught,
    ):
        processor.nodes()
    assert str(caught.value) == f"the processor at {address}: {code}: the store does not answer"


def test_who_let_one_deadline_pass_is_not_asked_again(windows, address):
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])
    windows.silence = threading.Event()
    told = []
    try:
        with ProcessorClient(address, deadline_seconds=0.5) as processor:
            for call in (processor.sequences, processor.sequences, processor.train_sequences):
                with pytest.raises(ProcessorUnavailable, match="DEADLINE_EXCEEDED") as caught:
                    call(QUERY)
                told.append(str(caught.value))
    finally:
        windows.silence.set()

    assert len(windows.asked) == 1
    assert len(set(told)) == 1


def test_who_answers_that_it_cannot_now_is_asked_again(windows, processor):
    windows.put("a", "cpu_usage", [np.arange(6.0)], [])
    windows.failure = (grpc.StatusCode.UNAVAILABLE, "the store does not answer")

    def recover() -> None:
        while not windows.asked:
            time.sleep(0.01)
        windows.failure = None

    recovery = threading.Thread(target=recover)
    recovery.start()
    counted = processor.train_sequences(QUERY)
    recovery.join()

    assert counted == 1
    assert len(windows.asked) == 2


def test_nobody_at_the_address_is_told_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with (
        ProcessorClient(address, deadline_seconds=0.5) as processor,
        pytest.raises(
            ProcessorUnavailable, match=f"^the processor at {address}: DEADLINE_EXCEEDED"
        ),
    ):
        processor.nodes()
