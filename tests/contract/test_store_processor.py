"""The store and the processor: real dataClay, real gRPC."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_processor import sliding_windows
from icos_fl_processor.server import SERVICE, Server
from icos_fl_timeseries_store import Store, StoreSettings, connect
from icos_fl_timeseries_store.testing import running_store

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


@contextmanager
def serving(settings: StoreSettings) -> Iterator[grpc.Channel]:
    server = Server(lambda: connect(settings), "127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel
    finally:
        server.stop(1)


def wait_for_health(channel: grpc.Channel, status: int) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120, wait_for_ready=True)
    for answer in watch:
        if answer.status == status:
            watch.cancel()
            return


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    with running_store(tmp_path_factory.mktemp("store")) as settings:
        yield settings


@pytest.fixture(scope="module")
def store(settings: StoreSettings) -> Iterator[Store]:
    with connect(settings) as store:
        yield store


@pytest.fixture(scope="module")
def stub(settings: StoreSettings, store: Store) -> Iterator[pb_grpc.ProcessorServiceStub]:
    with serving(settings) as channel:
        wait_for_health(channel, health_pb2.HealthCheckResponse.SERVING)
        yield pb_grpc.ProcessorServiceStub(channel)


def spec(node: str, **changes) -> pb.SeriesSpec:
    facts = {
        "features": ["power", "cpu"],
        "targets": ["power"],
        "lookback": 4,
        "horizon": 2,
        "train_fraction": 0.75,
    }
    return pb.SeriesSpec(node=node, **(facts | changes))


def append(store: Store, node: str, values: np.ndarray, first_step: int = 0) -> None:
    times = START + (first_step + np.arange(len(values))) * 15 * SECOND
    units = {"power": "W", "cpu": "%"}
    store.create_window(node, 1000).append(["cpu", "power"], times, values, units)


def test_rows_of_the_store_return_as_sequences_in_units(store, stub):
    values = np.random.default_rng(0).normal(50, 10, (40, 2))
    append(store, "units", values)
    header, train, validation = stub.GetSequences(
        pb.GetSequencesRequest(series=spec("units")), timeout=30
    )
    columns = header.header.columns
    assert [(c.column, c.unit) for c in columns] == [("power", "W"), ("cpu", "%")]
    mean = np.array([column.mean for column in columns])
    deviation = np.array([column.standard_deviation for column in columns])
    np.testing.assert_allclose(mean, values[:30, ::-1].mean(axis=0))
    np.testing.assert_allclose(deviation, values[:30, ::-1].std(axis=0))
    for chunk, expected in ((train.chunk, values[:30]), (validation.chunk, values[30:])):
        rows = np.frombuffer(chunk.rows, "<f4").reshape(-1, 2)
        np.testing.assert_allclose(rows * deviation + mean, expected[:, ::-1], rtol=1e-5)
        assert len(sliding_windows(rows, 4, 2)[0]) == len(expected) - 5


def test_missing_rows_are_those_that_are_missing(store, stub):
    append(store, "growing", np.ones((5, 2)))
    request = pb.DescribeWindowRequest(series=spec("growing"))
    # 6 of 8 steps are training at 0.75.
    assert stub.DescribeWindow(request, timeout=30).missing_rows == 3
    append(store, "growing", np.ones((2, 2)), first_step=5)
    assert stub.DescribeWindow(request, timeout=30).missing_rows == 1
    append(store, "growing", np.ones((1, 2)), first_step=7)
    found = stub.DescribeWindow(request, timeout=30)
    assert (found.missing_rows, found.train_sequences, found.reason) == (0, 1, "")


def test_an_unknown_node_is_not_found(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetLatest(pb.GetLatestRequest(series=spec("nobody")), timeout=30)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "no window of node 'nobody'" in caught.value.details()


def test_a_name_that_no_node_can_have_is_invalid(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetLatest(pb.GetLatestRequest(series=spec("a/b")), timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_watcher_hears_of_rows_that_another_process_may_append(store, stub):
    append(store, "watched", np.ones((3, 2)))
    watch = stub.WatchWindow(pb.WatchWindowRequest(node="watched"), timeout=60)
    assert next(watch).rows == 3
    late = threading.Thread(target=append, args=(store, "watched", np.ones((2, 2)), 2))
    late.start()
    change = next(watch)
    late.join()
    assert (change.rows, change.changed_rows) == (4, 2)
    watch.cancel()
