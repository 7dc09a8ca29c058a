"""What one enrolled node can do to the others' model, and what keeps it from more."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from icos_fl_server.checkpoints import load_run
from icos_fl_server.errors import ServerError

HONEST = {"a": 1.0, "b": 1.1, "c": 1.2, "d": 1.3}


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def learned(run) -> float:
    return float(load_run(run.folder, ("cpu_usage",))["cpu_usage"].weights.vector[0])


@pytest.mark.parametrize("poison", [1e6, -1e6, 3e38])
@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum"])
def test_a_robust_strategy_stays_within_what_honest_nodes_sent(run, make_node, strategy, poison):
    nodes = [make_node(name, step) for name, step in HONEST.items()]
    run(*nodes, make_node("evil", poison), strategy=strategy)
    assert 1.0 <= learned(run) <= 1.3


@pytest.mark.parametrize("strategy", ["FedMedian", "FedTrimmedAvg", "Krum"])
def test_a_robust_strategy_does_not_go_by_the_examples_that_a_node_claims(run, make_node, strategy):
    nodes = [make_node(name, step) for name, step in HONEST.items()]
    run(*nodes, make_node("evil", 1e6, {"cpu_usage": 10**12}), strategy=strategy)
    assert 1.0 <= learned(run) <= 1.3


def test_a_plain_average_goes_where_one_node_wants_it(run, make_node):
    """Not defended, and said so: docs/security.md."""
    nodes = [make_node(name, step) for name, step in HONEST.items()]
    run(*nodes, make_node("evil", 1e6, {"cpu_usage": 10**12}))
    assert learned(run) == pytest.approx(1e6, rel=1e-3)


def test_clipping_bounds_what_one_node_does_to_an_average(run, make_node):
    pytest.importorskip("dp_accounting", reason="icos-fl-server[dp] is not installed")
    nodes = [make_node(name, step) for name, step in HONEST.items()]
    run(
        *nodes,
        make_node("evil", -1e6, {"cpu_usage": 10**12}),
        dp_clipping_norm=2.0,
        dp_noise_multiplier=1e-6,
    )
    # Of two weights each: the honest ones' steps are within the norm, the other's is 2 / √2.
    assert learned(run) == pytest.approx((1.0 + 1.1 + 1.2 + 1.3 - 2**0.5) / 5, abs=1e-4)


def pickled_array(path: Path) -> bytes:
    """numpy's own format, with an object in it."""
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(path)], object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("made", [pickled_array, lambda path: pickle.dumps(Payload(path))])
def test_a_pickle_in_a_nodes_array_is_not_run(run, make_node, tmp_path, made):
    data = made(tmp_path / "proof")
    pickle.loads(pickle.dumps(Payload(tmp_path / "works")))
    assert (tmp_path / "works").exists()  # it would run where it is unpickled

    def behave(_node, reply):
        array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
        reply["arrays"] = ArrayRecord({"weights": array})

    entry = run(make_node("a", 2.0), make_node("evil", behave=behave))["rounds"][0]
    assert entry["nodes"]["evil"]["cause"] == (
        "the weights cannot be read: the array is not in numpy's format"
    )
    assert not (tmp_path / "proof").exists()
    assert learned(run) == 2.0


def test_a_pickle_in_a_checkpoints_place_is_not_run(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/latest.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with pytest.raises(ServerError, match="is not a checkpoint"):
        load_run(tmp_path, ("cpu",))
    assert not (tmp_path / "proof").exists()
