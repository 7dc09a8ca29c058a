"""Every strategy makes of one vector what it makes of the same numbers as a list of tensors."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from icos_fl.federation.v1.weights import Flat
from icos_fl_server import strategies
from icos_fl_server.models import Model
from icos_fl_server.nodes import FixedNodes

SHAPES = {"lstm.weight": (4, 3), "lstm.bias": (4,), "head.weight": (2, 2, 2), "scale": ()}
NODES = 5
ROUNDS = 3


def draw(seed):
    numbers = np.random.default_rng(seed)
    return {name: numbers.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def as_record(weights):
    return ArrayRecord({name: Array(np.asarray(tensor)) for name, tensor in weights.items()})


def by_tensor(strategy, weights, replies, number):
    """One round as Flower's users have it: a list of tensors to and from the strategy."""
    record, grid = as_record(weights), FixedNodes(list(range(1, NODES + 1)), None)
    list(strategy.configure_train(number, record, ConfigRecord(), grid))
    messages = []
    for tensors, examples in replies:
        metrics = MetricRecord({"num-examples": examples})
        content = RecordDict({"arrays": as_record(tensors), "metrics": metrics})
        messages.append(Message(content=content, message_type="train", dst_node_id=0))
    record, _ = strategy.aggregate_train(number, messages)
    return {name: array.numpy().astype(np.float32) for name, array in record.items()}


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_a_strategy_on_one_vector_does_what_it_does_on_tensors(name):
    tensors = draw(0)
    of_tensors = strategies.make(name, proximal_mu=0.1)
    model = Model(strategies.make(name, proximal_mu=0.1), Flat.of(tensors), 0)
    for number in range(1, ROUNDS + 1):
        # An outlier last, for what is robust; 0.1 keeps the adaptive ones away from sign changes.
        replies = [(draw(10 * number + node), 10 * node) for node in range(1, NODES)]
        replies.append(({n: t + np.float32(9) for n, t in tensors.items()}, 50))
        tensors = by_tensor(of_tensors, tensors, replies, number)
        model.configure(number, list(range(1, NODES + 1)), None)
        flat = [(Flat.of(weights), {"num-examples": float(n)}) for weights, n in replies]
        assert model.aggregate(number, number, flat) == ""
        for tensor, array in model.weights.named().items():
            np.testing.assert_allclose(array, tensors[tensor], rtol=1e-6, atol=1e-7)
    assert model.round == ROUNDS
