"""The processor and its reader in fl-client: what the store holds is what a node learns from."""

from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_client.errors import NoSequences, ProcessorUnavailable
from icos_fl_client.processor_client import ProcessorClient, Query
from icos_fl_processor.server import SERVICE, Server
from icos_fl_timeseries_store import MemoryStore, StoreUnavailable

SECOND = 1_000_000_000
STEP_NS = 15 * SECOND
START_NS = 1_700_000_000 * SECOND
QUERY = Query(
    node="a",
    metric="power",
    features=("cpu",),
    lookback=4,
    horizon=2,
    interval_seconds=15.0,
    train_fraction=0.75,
)
CHUNK_BYTES = 1 << 20


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def server(store: MemoryStore) -> Iterator[Server]:
    server = Server(lambda: store, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=30):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
    yield server
    server.stop(0)


@pytest.fixture
def client(server: Server) -> Iterator[ProcessorClient]:
    with ProcessorClient(f"127.0.0.1:{server.port}", deadline_seconds=30) as client:
        yield client


def append(store: MemoryStore, values: np.ndarray, first_step: int = 0) -> None:
    times = START_NS + (first_step + np.arange(len(values))) * STEP_NS
    window = store.create_window("a", 400_000)
    window.append(["cpu", "power"], times, values, {"cpu": "%", "power": "W"})


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(50, 10, (count, 2))


def test_the_values_of_the_store_come_back_in_units(store, client):
    values = noise(40)
    append(store, values)

    sequences = client.sequences(QUERY)

    (train,), (validation,) = sequences.train, sequences.validation
    restore = sequences.scale.restore
    np.testing.assert_allclose(restore(train.rows_tf[:, 0]), values[:30, 1], rtol=1e-5)
    np.testing.assert_allclose(restore(validation.rows_tf[:, 0]), values[30:, 1], rtol=1e-5)
    assert sequences.scale.unit == "W"
    assert (sequences.train_sequences, sequences.validation_sequences) == (25, 5)


def test_the_times_of_the_store_come_back(store, client):
    append(store, noise(40))

    sequences = client.sequences(QUERY)

    times = np.concatenate([run.times_ns_t for run in sequences.train + sequences.validation])
    assert times.tolist() == (START_NS + np.arange(40) * STEP_NS).tolist()


def test_the_metric_is_the_first_column_and_features_follow(store, client):
    values = noise(40)
    append(store, values)

    rows_tf = client.sequences(QUERY).train[0].rows_tf

    cpu = values[:30, 0]
    np.testing.assert_allclose(rows_tf[:, 1], (cpu - cpu.mean()) / cpu.std(), atol=1e-5)


def test_a_run_of_many_chunks_is_one_run(store, client):
    values = noise(400_000)
    append(store, values)
    bytes_sent = 300_000 * 2 * 4
    assert bytes_sent > 2 * CHUNK_BYTES

    sequences = client.sequences(QUERY)

    (train,) = sequences.train
    restored = sequences.scale.restore(train.rows_tf[:, 0])
    np.testing.assert_allclose(restored, values[:300_000, 1], rtol=1e-3)
    assert len(train.rows_tf) - 5 == sequences.train_sequences


def test_a_gap_makes_two_runs(store, client):
    append(store, noise(20))
    append(store, noise(20), first_step=60)

    sequences = client.sequences(replace(QUERY, train_fraction=1.0))

    assert [len(run.rows_tf) for run in sequences.train] == [20, 20]
    assert sequences.train[1].first_time_ns == START_NS + 60 * STEP_NS
    assert sequences.train_sequences == 2 * 15


def test_the_offer_counts_what_is_sent(store, client):
    append(store, noise(20))
    append(store, noise(20), first_step=60)

    sequences = client.sequences(QUERY)

    assert client.train_sequences(QUERY) == sequences.train_sequences
    assert sequences.train_sequences == sum(len(run.rows_tf) - 5 for run in sequences.train)


def test_latest_is_the_newest_lookback_in_units(store, client):
    values = noise(40)
    append(store, values)

    latest = client.latest(QUERY)

    restored = latest.scale.restore(latest.rows_lf[:, 0])
    np.testing.assert_allclose(restored, values[-4:, 1], rtol=1e-5)
    assert latest.last_time_ns == START_NS + 39 * STEP_NS
    assert latest.interval_ns == STEP_NS


def test_nodes_are_those_of_the_store(store, client):
    store.create_window("b")
    append(store, noise(1))

    assert client.nodes() == ["a", "b"]


@pytest.mark.parametrize("call", ["train_sequences", "sequences", "latest"])
def test_an_unknown_node_is_told_with_those_that_there_are(store, client, call):
    append(store, noise(40))

    with pytest.raises(NoSequences, match=r"no window of node 'nobody'; .*: a$"):
        getattr(client, call)(replace(QUERY, node="nobody"))


@pytest.mark.parametrize("call", ["train_sequences", "sequences", "latest"])
def test_an_unknown_metric_is_told_with_those_that_there_are(store, client, call):
    append(store, noise(40))

    with pytest.raises(NoSequences, match=r"'memory'.*cpu, power"):
        getattr(client, call)(replace(QUERY, metric="memory"))


@pytest.mark.parametrize("call", ["train_sequences", "sequences"])
def test_too_few_rows_are_told_with_how_many_are_missing(store, client, call):
    # 6 of 8 steps are training at 0.75.
    append(store, noise(5))

    with pytest.raises(NoSequences, match=r"; 3 more rows are missing$"):
        getattr(client, call)(QUERY)


def test_too_few_rows_for_a_forecast_are_told(store, client):
    append(store, noise(3))

    with pytest.raises(NoSequences, match=r"has 3 steps; the lookback needs 4$"):
        client.latest(QUERY)


def test_a_store_that_does_not_answer_is_no_lack_of_rows():
    def away() -> MemoryStore:
        raise StoreUnavailable("the store at nowhere:1 does not answer")

    server = Server(away, "127.0.0.1:0")
    server.start()
    try:
        with (
            ProcessorClient(f"127.0.0.1:{server.port}", wait_for_ready=False) as client,
            pytest.raises(ProcessorUnavailable, match=f"127.0.0.1:{server.port}: UNAVAILABLE: "),
        ):
            client.nodes()
    finally:
        server.stop(0)


def test_a_dead_power_sensor_is_said_and_the_other_metric_is_learned(store, client):
    # 41 rows of exactly 0 W last ten minutes.
    values = noise(41)
    values[:, 1] = 0
    append(store, values)
    power, cpu = replace(QUERY, features=()), replace(QUERY, metric="cpu", features=())
    reason = "'power' of node 'a' is unavailable: exactly 0 for 600 s"
    with pytest.raises(NoSequences, match=reason):
        client.train_sequences(power)
    with pytest.raises(NoSequences, match=reason):
        client.sequences(power)
    assert client.sequences(cpu).train_sequences == 25
    append(store, noise(8), first_step=41)
    # The zeros are no steps: of the 8 real ones 6 are for training, one sequence.
    learned = client.sequences(power)
    (train,) = learned.train
    assert learned.train_sequences == 1
    assert learned.scale.restore(train.rows_tf[:, 0]).min() > 10
