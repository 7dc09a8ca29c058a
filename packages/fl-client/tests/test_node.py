"""A node's model, its device, and what it does when there is little to learn from."""

import threading

import numpy as np
import pytest
import torch
from icos_fl_client.errors import ConfigError, NoSequences, WrongWeights
from icos_fl_client.node import (
    Learner,
    build_model,
    choose_device,
    load_weights,
    weights_of,
)
from icos_fl_client.settings import NodeConfig, RunConfig, parse
from icos_fl_timeseries_store import StoreUnavailable
from structlog.testing import capture_logs


def run_config(values, **changes) -> RunConfig:
    changed = {name.replace("_", "-"): value for name, value in changes.items()}
    return parse(RunConfig, values | changed, "run config")


@pytest.fixture
def node(address) -> NodeConfig:
    values = {"node-name": "a", "processor-address": address, "store-address": "127.0.0.1:1"}
    return parse(NodeConfig, values, "node config")


@pytest.fixture
def learner(node, processor, small_run) -> Learner:
    return Learner(node, run_config(small_run), processor)


def model(values, **changes) -> torch.nn.Module:
    return build_model(run_config(values, **changes), "cpu_usage")


def test_a_node_without_a_store_asks_none_to_keep_the_model(
    node, processor, small_run, monkeypatch
):
    values = node.model_dump(by_alias=True) | {"store-address": ""}
    nowhere = parse(NodeConfig, values, "node config")
    asked = []
    monkeypatch.setattr("icos_fl_client.node.connect", asked.append)

    with Learner(nowhere, run_config(small_run), processor) as learner:
        learner.keep({"cpu_usage": weights_of(model(small_run))}, 1)

    assert asked == []


def test_a_silent_store_holds_the_reply_up_for_a_moment_only(
    node, processor, small_run, monkeypatch
):
    monkeypatch.setattr("icos_fl_client.node.KEEP_SECONDS_MAX", 0.1)
    asked, answer = threading.Event(), threading.Event()

    def silent(_settings):
        asked.set()
        answer.wait()
        raise StoreUnavailable("the store did not answer")

    monkeypatch.setattr("icos_fl_client.node.connect", silent)
    with capture_logs() as told, Learner(node, run_config(small_run), processor) as learner:
        learner.keep({"cpu_usage": weights_of(model(small_run))}, 1)
        assert asked.wait(20)
    answer.set()

    assert [entry["event"] for entry in told] == ["global model not kept: the store is too slow"]


def test_weights_that_are_put_in_come_out_again(small_run):
    weights = weights_of(model(small_run, seed=1))
    other = model(small_run, seed=2)
    load_weights(other, weights)

    again = weights_of(other)

    assert list(again) == list(weights)
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_weights_are_float32_under_the_names_of_the_state(small_run):
    made = model(small_run)
    weights = weights_of(made)

    assert list(weights) == list(made.state_dict())
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_a_wrong_shape_names_the_tensor_and_both_shapes(small_run):
    weights = weights_of(model(small_run, hidden_layer_size=5))

    with pytest.raises(WrongWeights) as caught:
        load_weights(model(small_run), weights)
    assert str(caught.value) == (
        "tensor 'lstm.weight_ih_l0' of the weights has shape (20, 1), the model's has (16, 1)"
    )


def test_a_tensor_that_is_missing_is_named(small_run):
    weights = weights_of(model(small_run))
    del weights["head.bias"]

    with pytest.raises(WrongWeights, match=r"'head\.bias' of the weights has shape none"):
        load_weights(model(small_run), weights)


def test_a_tensor_that_the_model_lacks_is_named(small_run):
    weights = weights_of(model(small_run)) | {"extra": np.zeros((2, 3), np.float32)}

    with pytest.raises(WrongWeights, match=r"'extra' .* has shape \(2, 3\), the model's has none"):
        load_weights(model(small_run), weights)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_names_its_tensor(small_run, value):
    weights = {name: array.copy() for name, array in weights_of(model(small_run)).items()}
    weights["head.bias"][1] = value

    with pytest.raises(WrongWeights, match=r"^tensor 'head\.bias' of the weights is not finite$"):
        load_weights(model(small_run), weights)


def test_initial_weights_depend_on_the_seed_alone(small_run):
    first = weights_of(model(small_run, seed=3))
    torch.rand(7)
    again = weights_of(model(small_run, seed=3, learning_rate=0.5))
    other = weights_of(model(small_run, seed=4))

    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["head.weight"], other["head.weight"])


def test_more_input_columns_widen_the_model_of_each_metric_by_those_that_it_is_not(small_run):
    run = run_config(small_run, metric="cpu_usage,power", features="power")
    widths = {m: build_model(run, m).lstm.input_size for m in run.metric}

    assert widths == {"cpu_usage": 2, "power": 1}


def test_the_servers_node_takes_the_servers_device(node, small_run):
    run = run_config(small_run, server_node="a", server_device="cpu")

    assert choose_device(node, run) == torch.device("cpu")


def test_other_nodes_take_what_is_there(node, small_run):
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.backends.mps.is_available():
        there = "mps"
    named = run_config(small_run, server_node="b", server_device="nonsense")
    automatic = run_config(small_run, server_node="a", server_device="auto")

    assert choose_device(node, named).type == there
    assert choose_device(node, automatic).type == there


def test_a_device_that_is_not_there_is_named(node, small_run):
    run = run_config(small_run, server_node="a", server_device="nonsense")

    with pytest.raises(ConfigError, match=r"^server-device='nonsense': [^\n]+$"):
        choose_device(node, run)


def test_no_accelerator_is_told_in_one_line(node, small_run):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    run = run_config(small_run, server_node="a", server_device="cuda")

    with pytest.raises(ConfigError, match=r"^server-device='cuda': [^\n]+$"):
        choose_device(node, run)


def test_an_offer_is_initial_weights_and_the_number_of_sequences(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(20), wave(10)], [])

    weights, metrics = learner.offer("cpu_usage")

    expected = weights_of(build_model(learner.run, "cpu_usage"))
    assert metrics == {"num-examples": 15 + 5}
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


def test_too_few_rows_to_train_on_are_told_in_the_processors_words(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(5)], [])
    weights = weights_of(build_model(learner.run, "cpu_usage"))

    with pytest.raises(NoSequences, match=r"^6 rows in a row are needed$"):
        learner.train("cpu_usage", weights, 1, 0.0)


def test_a_training_part_that_is_too_short_is_told(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(5)], [wave(20)])
    weights = weights_of(build_model(learner.run, "cpu_usage"))

    with pytest.raises(NoSequences, match=r"^a: cpu_usage has no sequence of 6 steps .* training"):
        learner.train("cpu_usage", weights, 1, 0.0)


def test_training_changes_weights_and_tells_what_it_cost(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [])
    before = weights_of(build_model(learner.run, "cpu_usage"))

    after, metrics = learner.train("cpu_usage", before, 1, 0.0)

    assert list(after) == list(before)
    assert not np.array_equal(before["head.weight"], after["head.weight"])
    assert set(metrics) == {"num-examples", "train-loss", "seconds"}
    assert metrics["num-examples"] == 35
    assert metrics["seconds"] > 0


def test_training_again_gives_the_same_weights(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(40)], [])
    before = weights_of(build_model(learner.run, "cpu_usage"))

    first, _ = learner.train("cpu_usage", before, 1, 0.0)
    again, _ = learner.train("cpu_usage", before, 1, 0.0)

    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_naive_error_is_in_the_metrics_unit(learner, windows):
    # Of a ramp by 3 a step, the last value is off by 3 and 6 at the two steps ahead.
    windows.put("a", "cpu_usage", [], [3 * np.arange(30.0)], "W", mean=40, deviation=8)
    weights = weights_of(build_model(learner.run, "cpu_usage"))

    metrics = learner.evaluate("cpu_usage", weights)

    assert set(metrics) == {"num-examples", "eval-loss", "mae", "naive-mae"}
    assert metrics["num-examples"] == 25
    assert metrics["naive-mae"] == pytest.approx(4.5, rel=1e-4)
    assert metrics["eval-loss"] == pytest.approx(metrics["mae"] / 4.5, rel=1e-4)


def test_no_validation_sequence_is_0_examples_and_no_fault(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(30)], [wave(5)])
    weights = weights_of(build_model(learner.run, "cpu_usage"))

    assert learner.evaluate("cpu_usage", weights) == {"num-examples": 0}


def test_sequences_are_fetched_once_for_judging_and_training(learner, windows, wave):
    windows.put("a", "cpu_usage", [wave(30)], [wave(10)])
    weights = weights_of(build_model(learner.run, "cpu_usage"))
    learner.evaluate("cpu_usage", weights)
    learner.train("cpu_usage", weights, 1, 0.0)

    assert len(windows.asked) == 1
