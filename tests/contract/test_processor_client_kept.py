"""A client that keeps steps asks for what is new, and has what a client without any has."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_client.data import Sequences
from icos_fl_client.errors import NoSequences
from icos_fl_client.kept import KeptSteps, Steps
from icos_fl_client.processor_client import ProcessorClient, Query
from icos_fl_processor.server import SERVICE, Server
from icos_fl_timeseries_store import MemoryStore

SECOND = 1_000_000_000
STEP_NS = 15 * SECOND
START_NS = 1_700_000_000 * SECOND
COLUMNS = ("power", "cpu")
QUERY = Query(
    node="a",
    metric="power",
    features=("cpu",),
    lookback=3,
    horizon=2,
    interval_seconds=15.0,
    train_fraction=0.75,
)


@dataclass
class Node:
    """A processor over a store in memory, and what is asked of it about the window *name*."""

    store: MemoryStore
    port: int
    name: str = "a"

    def append(self, values: np.ndarray, first_step: float = 0, capacity: int = 1000) -> None:
        times = START_NS + ((first_step + np.arange(len(values))) * STEP_NS).astype(np.int64)
        self.store.create_window(self.name, capacity).append(COLUMNS, times, values)

    def all(self, query: Query = QUERY) -> Sequences:
        with ProcessorClient(f"127.0.0.1:{self.port}", deadline_seconds=30) as client:
            return client.sequences(replace(query, node=self.name))

    def kept(self, folder: Path, query: Query = QUERY) -> Sequences:
        """As a task would: nothing is left but *folder*."""
        address = f"127.0.0.1:{self.port}"
        with ProcessorClient(address, deadline_seconds=30, kept=KeptSteps(folder)) as client:
            return client.sequences(replace(query, node=self.name))

    def new_steps(self, version: bytes) -> tuple[int, bytes]:
        """How many steps are sent to who has *version*, and the version that they make."""
        request = pb.GetSequencesRequest(series=QUERY.series(), kept=pb.KeptSteps(version=version))
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            answers = list(pb_grpc.ProcessorServiceStub(channel).GetSequences(request, timeout=30))
        sent = sum(len(answer.piece.values) for answer in answers)
        return sent // (8 * len(COLUMNS)), answers[0].header.version


@contextmanager
def running(store: MemoryStore) -> Iterator[Node]:
    server = Server(lambda: store, "127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=30):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        yield Node(store, server.port)
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with running(MemoryStore()) as node:
        yield node


@pytest.fixture
def node() -> Iterator[Node]:
    with running(MemoryStore()) as node:
        yield node


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(50, 10, (count, len(COLUMNS)))


def facts(sequences: Sequences) -> dict[str, object]:
    """All of it, rows bit by bit."""
    return {
        **vars(sequences),
        "train": [(run.first_time_ns, run.rows_tf.tobytes()) for run in sequences.train],
        "validation": [(run.first_time_ns, run.rows_tf.tobytes()) for run in sequences.validation],
    }


def facts_or_reason(fetch: Callable[[], Sequences]) -> object:
    try:
        return facts(fetch())
    except NoSequences as error:
        return str(error)


def test_an_unchanged_window_costs_no_row(node):
    node.append(noise(40))
    sent, version = node.new_steps(b"")

    assert sent == 40
    assert node.new_steps(version) == (0, version)


def test_a_new_row_is_all_that_is_sent_when_an_old_one_leaves(node):
    node.append(noise(40), capacity=40)
    _, version = node.new_steps(b"")
    node.append(noise(1, seed=1), first_step=40, capacity=40)

    assert node.new_steps(version)[0] == 1


def test_a_row_that_changed_in_the_middle_is_all_that_is_sent(node):
    node.append(noise(40))
    _, version = node.new_steps(b"")
    node.append(noise(1, seed=1), first_step=20)

    assert node.new_steps(version)[0] == 1


def test_rows_that_jitter_are_not_sent_again(node):
    node.append(noise(40))
    _, version = node.new_steps(b"")
    node.append(noise(1, seed=1), first_step=40.1)

    assert node.new_steps(version)[0] == 1


def test_an_unknown_version_gets_all_rows(node):
    node.append(noise(40))

    assert node.new_steps(b"of another processor")[0] == 40


def test_a_processor_that_restarted_sends_all_rows(node, tmp_path):
    node.append(noise(40))
    _, version = node.new_steps(b"")

    with running(node.store) as restarted:
        assert restarted.new_steps(version)[0] == 40


def test_a_window_that_lost_its_rows_gives_what_is_there_now(node, tmp_path):
    node.append(noise(40))
    node.kept(tmp_path)
    node.append(noise(1, seed=1), first_step=99, capacity=1)
    node.append(noise(30, seed=2), first_step=100)

    assert facts(node.kept(tmp_path)) == facts(node.all())


def test_a_file_of_other_steps_than_the_processor_remembers_is_not_used(node, tmp_path):
    node.append(noise(40))
    node.kept(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-16])

    assert facts(node.kept(tmp_path)) == facts(node.all())


def test_kept_steps_that_an_answer_does_not_fit_are_fetched_again(node, tmp_path):
    class Short(KeptSteps):
        def load(self, series: bytes) -> Steps | None:
            whole = super().load(series)
            return whole and replace(whole, values_sf=whole.values_sf[:5])

    node.append(noise(40))
    node.kept(tmp_path)

    address = f"127.0.0.1:{node.port}"
    with ProcessorClient(address, deadline_seconds=30, kept=Short(tmp_path)) as client:
        assert facts(client.sequences(QUERY)) == facts(node.all())


def test_a_large_window_is_not_written_anew_for_each_row(node, tmp_path):
    node.append(noise(500))
    node.kept(tmp_path)
    (file,) = tmp_path.iterdir()
    written = []
    for step in range(500, 506):
        node.append(noise(1, seed=step), first_step=step)
        assert facts(node.kept(tmp_path)) == facts(node.all())
        written.append(file.stat().st_ino)

    assert len(set(written[:5])) == 1
    assert written[5] != written[4]


def test_two_queries_keep_two_files(node, tmp_path):
    node.append(noise(40))
    node.kept(tmp_path)
    node.kept(tmp_path, replace(QUERY, features=()))

    assert len(list(tmp_path.iterdir())) == 2


changes = st.tuples(
    st.integers(1, 30),  # rows
    st.sampled_from([0.0, 0.0, 0.0, 0.05, -0.05, 3.0, 200.0, -5.0, -40.0]),  # steps off the end
    st.booleans(),  # a column without values
    st.sampled_from([25, 60]),  # capacity
)
queries = st.builds(
    replace,
    st.just(QUERY),
    train_fraction=st.sampled_from([0.75, 1.0]),
    interval_seconds=st.sampled_from([15.0, 0.0, 30.0, 45.0]),
)


@settings(max_examples=60, deadline=None)
@given(rounds=st.lists(st.tuples(changes, st.booleans()), min_size=2, max_size=8), query=queries)
def test_whatever_is_appended_what_is_kept_and_fetched_is_what_there_is(shared, rounds, query):
    node = replace(shared, name=uuid4().hex)
    newest = 100.0
    with tempfile.TemporaryDirectory() as folder:
        for seed, ((rows, offset, absent, capacity), fetched) in enumerate(rounds):
            values = noise(rows, seed)
            if absent:
                values[: rows // 2, 1] = np.nan
            node.append(values, newest + offset, capacity)
            newest = max(newest, newest + offset + rows)
            if fetched:
                kept = facts_or_reason(lambda: node.kept(Path(folder), query))
                assert kept == facts_or_reason(lambda: node.all(query))
