"""What the service answers over real gRPC."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl_processor.server import SERVICE, ListenError, Server
from icos_fl_processor.windows import sliding_windows
from icos_fl_timeseries_store import StoreUnavailable

SECOND = 1_000_000_000
START_SECONDS = 1_700_000_000
NAN = float("nan")


def rows(message, columns: int) -> np.ndarray:
    return np.frombuffer(message.rows, "<f4").reshape(-1, columns)


def seconds(timestamp) -> float:
    return timestamp.ToNanoseconds() / SECOND - START_SECONDS


def sequences(running, series, splits=()):
    header, *chunks = running.stub.GetSequences(
        pb.GetSequencesRequest(series=series, splits=splits), timeout=20
    )
    return header.header, [answer.chunk for answer in chunks]


def refusal(call, *arguments, **options) -> tuple[str, str]:
    """Status and message with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call(*arguments, timeout=20, **options))
    return caught.value.code().name, caught.value.details()


# ListNodes, DescribeWindow


def test_nodes_are_listed_by_name(running):
    running.store.fill("b", {"power": [1]})
    running.store.fill("a", {"power": [1]})
    assert list(running.stub.ListNodes(pb.ListNodesRequest()).nodes) == ["a", "b"]


def test_a_window_is_described_without_columns(running):
    running.store.fill("a", {"power": [1, 2, NAN, 4], "cpu": [1, 2, 3, 4]}, at=[0, 15, 30, 90])
    series = pb.SeriesSpec(node="a")
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=series))
    assert (found.rows, found.capacity, found.gaps) == (4, 100_000, 1)
    assert (seconds(found.first_time), seconds(found.last_time)) == (0, 90)
    assert found.interval.ToSeconds() == 15
    assert [(c.name, c.unit, c.rows) for c in found.columns] == [("power", "W", 3), ("cpu", "%", 4)]


def test_an_empty_window_is_described(running, spec):
    running.store.create_window("a", 50)
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=pb.SeriesSpec(node="a")))
    assert (found.rows, found.capacity, found.HasField("first_time")) == (0, 50, False)


def test_usable_sequences_of_both_parts_are_counted(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    # 12 steps of training hold 8 sequences of 5, 8 of validation hold 4.
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=spec(train_fraction=0.6)))
    assert (found.train_sequences, found.validation_sequences) == (8, 4)
    assert (found.missing_rows, found.reason) == (0, "")


def test_missing_rows_are_counted_with_the_reason(running, spec):
    running.store.fill("a", {"power": list(range(5))})
    # 5 of 10 steps are training at 0.5.
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=spec(train_fraction=0.5)))
    assert found.missing_rows == 5
    assert (
        "sequence of power needs 5 consecutive steps of 15 s (lookback 3 + horizon 2)"
        in found.reason
    )
    assert "has 2 (2 of 5 steps" in found.reason
    assert "5 more rows are missing" in found.reason


def test_a_step_too_short_is_a_reason_in_the_description(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=spec(interval=5)))
    assert (found.train_sequences, found.missing_rows) == (0, 5)
    assert "a step of 5 s is shorter than the median distance of the rows, 15 s" in found.reason


def test_a_window_that_can_never_hold_a_sequence_says_so(running, spec):
    running.store.fill("a", {"power": [1, 2, 3]})
    running.store.create_window("a", 4)
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=spec()))
    assert "it holds 4 rows where 5 are needed" in found.reason
    assert found.missing_rows == 2


# GetSequences


def test_header_has_statistics_of_the_training_part_alone(running, spec):
    running.store.fill("a", {"power": [1, 3] * 5 + [100.0] * 10})
    header, _ = sequences(running, spec(train_fraction=0.5))
    (power,) = header.columns
    assert (power.column, power.unit, power.mean, power.standard_deviation) == ("power", "W", 2, 1)
    assert header.interval.ToSeconds() == 15
    assert (header.train_sequences, header.validation_sequences) == (6, 6)


def test_rows_are_normalised_with_them(running, spec):
    running.store.fill("a", {"power": [1, 3] * 5 + [100.0] * 10})
    _, (train, validation) = sequences(running, spec(train_fraction=0.5))
    assert rows(train, 1).ravel().tolist() == [-1, 1] * 5
    assert rows(validation, 1).ravel().tolist() == [98] * 10
    assert (train.split, validation.split) == (pb.SPLIT_TRAIN, pb.SPLIT_VALIDATION)
    assert (seconds(train.first_time), seconds(validation.first_time)) == (0, 150)


def test_columns_are_features_then_targets_that_are_no_feature(running, spec):
    running.store.fill("a", {"x": [0.0] * 6, "cpu": [1.0] * 6, "power": [2.0] * 6})
    series = spec(features=["power", "cpu"], targets=["x", "cpu"])
    header, (chunk,) = sequences(running, series)
    assert [column.column for column in header.columns] == ["power", "cpu", "x"]
    assert [column.mean for column in header.columns] == [2, 1, 0]
    assert rows(chunk, 3).shape == (6, 3)


def test_only_the_splits_asked_for_are_sent(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    header, (chunk,) = sequences(running, spec(train_fraction=0.5), [pb.SPLIT_VALIDATION])
    assert chunk.split == pb.SPLIT_VALIDATION
    assert (header.train_sequences, header.validation_sequences) == (6, 6)


def test_each_run_of_consecutive_steps_is_its_own_chunk(running, spec):
    minutes = [k * 15 for k in range(40)]
    at = [*minutes, *(1200 + s for s in minutes), *(2400 + s for s in minutes)]
    running.store.fill("a", {"power": at}, at=at)
    header, chunks = sequences(running, spec())
    # Off for ten minutes twice: three runs of 40 steps with 36 sequences each.
    assert header.train_sequences == 108
    assert [(seconds(c.first_time), len(rows(c, 1))) for c in chunks] == [
        (0, 40),
        (1200, 40),
        (2400, 40),
    ]


def test_a_long_run_comes_in_chunks_that_overlap(running, spec):
    count = 300_000
    rng = np.random.default_rng(0)
    running.store.create_window("a", count)
    times = (START_SECONDS + np.arange(count) * 15) * SECOND
    running.store.window("a").append(["power"], times, rng.random((count, 1)))
    header, chunks = sequences(running, spec())
    assert len(chunks) == 2
    assert all(len(chunk.rows) <= 1 << 20 for chunk in chunks)
    first, second = (rows(chunk, 1) for chunk in chunks)
    assert first[-4:].tolist() == second[:4].tolist()
    assert seconds(chunks[1].first_time) == (len(first) - 4) * 15
    cut = sum(len(sliding_windows(part, 3, 2)[0]) for part in (first, second))
    assert cut == header.train_sequences == count - 4


@pytest.mark.parametrize(("count", "status"), [(4, "FAILED_PRECONDITION"), (5, 1), (6, 2)])
def test_runs_around_the_length_of_a_sequence(running, spec, count: int, status):
    running.store.fill("a", {"power": list(range(count))})
    request = pb.GetSequencesRequest(series=spec())
    if count == 4:
        code, message = refusal(running.stub.GetSequences, request)
        assert code == status
        assert "needs 5 consecutive steps" in message
        assert "1 more rows are missing" in message
    else:
        header, _ = sequences(running, spec())
        assert header.train_sequences == status


def test_a_training_part_shorter_than_a_sequence_is_refused_with_what_is_missing(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    request = pb.GetSequencesRequest(series=spec(train_fraction=0.2), splits=[pb.SPLIT_TRAIN])
    code, message = refusal(running.stub.GetSequences, request)
    assert code == "FAILED_PRECONDITION"
    assert "has 4 (4 of 20 steps" in message
    assert "5 more rows are missing" in message


def test_validation_can_be_had_while_training_has_no_sequence(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    header, (chunk,) = sequences(running, spec(train_fraction=0.2))
    assert (header.train_sequences, header.validation_sequences) == (0, 12)
    assert chunk.split == pb.SPLIT_VALIDATION


def test_no_validation_sequence_is_refused(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    request = pb.GetSequencesRequest(series=spec(train_fraction=0.9), splits=[pb.SPLIT_VALIDATION])
    code, message = refusal(running.stub.GetSequences, request)
    assert (code, "the validation part has 2 (2 of 20 steps)" in message) == (
        "FAILED_PRECONDITION",
        True,
    )


def test_all_metrics_of_a_window_cost_one_read(running, spec):
    running.store.fill("a", {"power": list(range(20)), "cpu": list(range(20))})
    for _ in range(3):
        for metric in ("power", "cpu"):
            sequences(running, spec(features=[metric], targets=[metric]))
    assert running.store.reads == 1


def test_new_rows_are_seen(running, spec):
    running.store.fill("a", {"power": list(range(10))})
    assert sequences(running, spec())[0].train_sequences == 6
    running.store.fill("a", {"power": [5]}, at=[150])
    assert sequences(running, spec())[0].train_sequences == 7


# GetLatest


def test_latest_is_the_newest_lookback(running, spec):
    running.store.fill("a", {"power": [1, 3, 1, 3, 1, 3, 7]})
    found = running.stub.GetLatest(pb.GetLatestRequest(series=spec(horizon=0, train_fraction=0.9)))
    # 6 of 7 steps are training: mean 2, deviation 1.
    assert rows(found, 1).ravel().tolist() == [-1, 1, 5]
    assert seconds(found.last_time) == 90
    assert (found.columns[0].mean, found.interval.ToSeconds()) == (2, 15)


def test_latest_after_a_gap_needs_a_whole_lookback(running, spec):
    running.store.fill("a", {"power": list(range(12))}, at=[*range(0, 150, 15), 600, 615])
    code, message = refusal(running.stub.GetLatest, pb.GetLatestRequest(series=spec()))
    assert code == "FAILED_PRECONDITION"
    assert "has 2 steps; the lookback needs 3" in message


# WatchWindow


def test_a_watcher_hears_of_the_window_and_of_each_change(running):
    running.store.fill("a", {"power": [1, 2]})
    watch = running.stub.WatchWindow(pb.WatchWindowRequest(node="a"), timeout=20)
    first = next(watch)
    assert (first.rows, first.changed_rows, seconds(first.last_time)) == (2, 2, 15)
    running.store.fill("a", {"power": [9, 3]}, at=[15, 30])
    second = next(watch)
    assert (second.rows, second.changed_rows, seconds(second.last_time)) == (3, 2, 30)
    watch.cancel()


def test_a_watcher_that_cancels_gives_its_place_back(run, store):
    store.fill("a", {"power": [1]})
    running = run(store, watchers_max=1)
    running.wait_for_health("SERVING")
    watch = running.stub.WatchWindow(pb.WatchWindowRequest(node="a"), timeout=20)
    next(watch)
    code, message = refusal(running.stub.WatchWindow, pb.WatchWindowRequest(node="a"))
    assert (code, message) == (
        "RESOURCE_EXHAUSTED",
        "1 clients watch windows already, and that is the limit",
    )
    watch.cancel()

    def has_a_place() -> bool:
        again = running.stub.WatchWindow(pb.WatchWindowRequest(node="a"), timeout=20)
        with contextlib.suppress(grpc.RpcError):
            return next(again).rows == 1
        assert again.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return False

    while not has_a_place():  # the test's own timeout bounds it
        time.sleep(0.05)


def test_watchers_do_not_hold_up_other_calls(run, store, spec):
    store.fill("a", {"power": list(range(20))})
    running = run(store, watchers_max=20)
    running.wait_for_health("SERVING")
    watches = [running.stub.WatchWindow(pb.WatchWindowRequest(node="a")) for _ in range(20)]
    for watch in watches:
        next(watch)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: sequences(running, spec())[0].train_sequences, range(8)))
    assert found == [16] * 8
    for watch in watches:
        watch.cancel()


def test_watchers_end_when_the_server_stops(running):
    running.store.fill("a", {"power": [1]})
    watch = running.stub.WatchWindow(pb.WatchWindowRequest(node="a"), timeout=20)
    next(watch)
    running.server.stop()
    with pytest.raises(grpc.RpcError) as caught:
        next(watch)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in caught.value.details()


# Errors


def test_an_unknown_node_is_not_found_with_those_that_are(running, spec):
    running.store.fill("b", {"power": [1]})
    code, message = refusal(running.stub.GetSequences, pb.GetSequencesRequest(series=spec()))
    assert (code, message) == ("NOT_FOUND", "no window of node 'a'; nodes with a window: b")


def test_an_unknown_column_is_not_found_with_those_that_are(running, spec):
    running.store.fill("a", {"cpu": [1]})
    code, message = refusal(running.stub.GetLatest, pb.GetLatestRequest(series=spec()))
    assert (code, message) == ("NOT_FOUND", "node 'a' has no column 'power'; its columns: cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": ""}, "node is empty"),
        ({"features": []}, "features is empty; at least one column is needed"),
        ({"targets": ["x", "x"]}, "targets has 'x' 2 times; once is the limit"),
        ({"lookback": 0}, "lookback is 0; it must be at least 1 step"),
        ({"horizon": 0}, "horizon is 0; it must be at least 1 step"),
        ({"interval": -1}, "interval is -1 s; it must be 0 to 3.16224e+07 s"),
        ({"train_fraction": 0}, "train_fraction is 0; it must be above 0 and at most 1"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5; it must be above 0 and at most 1"),
        ({"train_fraction": NAN}, "train_fraction is nan; it must be above 0 and at most 1"),
        (
            {"lookback": 2_000_000},
            "2000002 steps of 1 columns are 8000008 bytes; a message holds 4192256",
        ),
    ],
)
def test_a_request_that_no_window_can_answer_is_invalid(running, spec, changes, message: str):
    running.store.fill("a", {"power": [1]})
    request = pb.GetSequencesRequest(series=spec(**changes))
    assert refusal(running.stub.GetSequences, request) == ("INVALID_ARGUMENT", message)


def test_an_unknown_split_is_invalid(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    request = pb.GetSequencesRequest(series=spec(), splits=[0])
    code, message = refusal(running.stub.GetSequences, request)
    assert (code, message.startswith("split 0 is unknown")) == ("INVALID_ARGUMENT", True)


def test_a_step_too_short_for_the_rows_is_refused(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    request = pb.GetSequencesRequest(series=spec(interval=5))
    code, message = refusal(running.stub.GetSequences, request)
    assert code == "FAILED_PRECONDITION"
    assert message.startswith("a step of 5 s is shorter than the median distance of the rows, 15 s")


def test_values_too_large_to_normalise_are_refused(running, spec):
    running.store.fill("a", {"power": [1e308, -1e308] * 5})
    code, message = refusal(running.stub.GetSequences, pb.GetSequencesRequest(series=spec()))
    assert (code, "'power' are too large" in message) == ("FAILED_PRECONDITION", True)


def test_absurd_numbers_are_described_and_harm_nothing(running, spec):
    running.store.fill("a", {"power": list(range(20))})
    series = spec(lookback=2**32 - 1, horizon=2**32 - 1, train_fraction=5e-324)
    found = running.stub.DescribeWindow(pb.DescribeWindowRequest(series=series))
    assert (found.train_sequences, found.missing_rows > 0) == (0, True)


# The server


def test_health_follows_the_store(run, store, spec):
    def connect():
        if not store.answers:
            raise StoreUnavailable("the store at nowhere:1 does not answer")
        return store

    store.answers = False
    running = run(store, connect=connect)
    running.wait_for_health("NOT_SERVING")
    code, message = refusal(running.stub.DescribeWindow, pb.DescribeWindowRequest(series=spec()))
    assert code == "UNAVAILABLE"
    assert message in (
        "the store has not answered yet",
        "the store at nowhere:1 does not answer",
    )
    store.answers = True
    running.wait_for_health("SERVING")
    store.answers = False
    running.wait_for_health("NOT_SERVING")


def test_health_says_not_serving_while_shutting_down(running):
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    watch = running.health.Watch(request, timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    running.server.stop()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_names_the_service(running):
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
    assert SERVICE in [service.name for service in answer.list_services_response.service]


def test_a_port_that_is_taken_is_refused(running, store):
    address = f"127.0.0.1:{running.server.port}"
    with pytest.raises(ListenError, match=f"cannot listen on {address}: the port is taken"):
        Server(lambda: store, address)
