"""Rounds on nodes in memory: who takes part, what is aggregated, what is told."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from icos_fl_server.errors import ServerError
from safetensors.numpy import load_file


def weights(run, metric="cpu_usage", which="latest"):
    return load_file(run.folder / "checkpoints" / metric / f"{which}.safetensors")["w"]


def config_of(message):
    return message.content.config_records["config"]


def raising(error):
    def behave(_node, _reply):
        raise error

    return behave


# The protocol


def test_weights_are_averaged_by_number_of_examples(run, make_node):
    run(make_node("a", 1.0, {"cpu_usage": 30}), make_node("b", 5.0, {"cpu_usage": 10}))
    assert weights(run) == pytest.approx([2.0, 2.0])  # (30 * 1 + 10 * 5) / 40


def test_a_round_is_one_message_a_node_for_all_metrics(run, make_node):
    both = {"cpu_usage": 10, "memory_usage": 10}
    run(
        make_node("a", examples=both),
        make_node("b", examples=both),
        metric="cpu_usage,memory_usage",
    )
    kinds = [sorted(m.metadata.message_type for m in push) for push in run.grid.pushes]
    assert kinds == [["query"] * 2, ["train"] * 2, ["evaluate"] * 2]
    message = run.grid.pushes[1][0]
    assert set(message.content) == {"config", "arrays"}
    assert config_of(message)["protocol"] == 2
    assert config_of(message)["weights-metrics"] == ["cpu_usage", "memory_usage"]
    assert message.content["arrays"]["weights"].numpy().tolist() == [0, 0, 0, 0]
    assert config_of(message)["train-metrics"] == ["cpu_usage", "memory_usage"]


def test_the_first_weights_come_from_the_first_node_by_name(run, make_node):
    run(make_node("b", start=7.0), make_node("a", start=3.0))
    assert weights(run) == pytest.approx([4.0, 4.0])


def test_the_loss_of_a_round_is_what_came_back_in_the_next(run, make_node):
    node = make_node("a")
    losses = iter([9.0, 4.0, 2.0])

    def behave(_node, reply):
        reply["metrics"]["evaluate.cpu_usage.eval-loss"] = next(losses)

    node.behave = behave
    rounds = run(node, num_server_rounds=2)["rounds"]
    # 9.0 judges the initial weights, which no round made.
    assert [r["metrics"]["cpu_usage"]["eval_loss"] for r in rounds] == [4.0, 2.0]


def test_the_best_checkpoint_is_the_one_with_the_lowest_loss(run, make_node):
    losses = iter([9.0, 1.0, 5.0])

    def behave(_node, reply):
        reply["metrics"]["evaluate.cpu_usage.eval-loss"] = next(losses)

    run(make_node("a", behave=behave), num_server_rounds=2)
    assert weights(run, which="best") == pytest.approx([1.0, 1.0])
    assert weights(run, which="latest") == pytest.approx([2.0, 2.0])


def test_losses_are_weighted_by_validation_examples(run, make_node):
    def many(_node, reply):
        reply["metrics"]["evaluate.cpu_usage.num-examples"] = 15

    nodes = make_node("a", loss=1.0), make_node("b", loss=5.0, behave=many)
    entry = run(*nodes)["rounds"][0]
    assert entry["metrics"]["cpu_usage"]["eval_loss"] == pytest.approx((5 * 1 + 15 * 5) / 20)


def test_the_model_round_is_the_round_that_made_the_weights(run, make_node):
    node = make_node("a", examples={"cpu_usage": 0})

    def comes_later(node, _reply):
        if len(node.trained()) == 1:
            node.examples["cpu_usage"] = 4

    node.behave = comes_later
    run(node, num_server_rounds=3)
    assert [config_of(m)["model-round"] for m in node.trained()] == [0, 0, 2]
    assert config_of(node.received[-1])["model-round"] == 3


def test_a_node_trains_the_metrics_that_it_has(run, make_node):
    history = run(
        make_node("a", examples={"cpu_usage": 10, "power": 10}),
        make_node("b", examples={"cpu_usage": 10}),
        metric="cpu_usage,power",
    )
    entry = history["rounds"][0]
    assert entry["metrics"]["cpu_usage"]["nodes"] == 2
    assert entry["metrics"]["power"]["nodes"] == 1
    assert entry["nodes"]["b"] == {"state": "ok", "cause": ""}
    b = history["nodes"]["b"]
    assert (b["metrics"], b["cause"]) == ({"cpu_usage": 10}, "no column power")


def test_a_share_of_the_nodes_is_asked(run, make_node):
    nodes = [make_node(name) for name in "abcd"]
    run(*nodes, fraction_fit=0.5, fraction_evaluate=0.25, min_evaluate_clients=1)
    batch = run.grid.pushes[1]
    assert sum(bool(config_of(m)["train-metrics"]) for m in batch) == 2
    assert sum(bool(config_of(m)["evaluate-metrics"]) for m in batch) == 1


def test_a_minimum_overrules_the_share(run, make_node):
    run(*[make_node(name) for name in "abcd"], fraction_fit=0.25, min_fit_clients=3)
    assert sum(bool(config_of(m)["train-metrics"]) for m in run.grid.pushes[1]) == 3


def test_who_only_judges_gets_an_evaluate_message_in_the_same_batch(run, make_node):
    run(*[make_node(name) for name in "abc"], fraction_fit=0.4)
    kinds = sorted(m.metadata.message_type for m in run.grid.pushes[1])
    assert kinds == ["evaluate", "evaluate", "train"]


def test_the_node_at_the_server_judges_and_never_trains(run, make_node):
    server = make_node("srv", loss=8.0)
    history = run(make_node("a", loss=1.0), server, server_node="srv", num_server_rounds=2)
    facts = history["rounds"][0]["metrics"]["cpu_usage"]
    assert server.trained() == []
    assert (facts["eval_loss"], facts["server_eval_loss"], facts["nodes"]) == (1.0, 8.0, 1)


def test_too_few_judges_leave_the_loss_unknown(run, make_node):
    entry = run(make_node("a"), make_node("b"), min_evaluate_clients=3)["rounds"][0]
    assert entry["metrics"]["cpu_usage"]["eval_loss"] is None


def test_a_node_without_a_validation_sequence_is_no_judge(run, make_node):
    def young(_node, reply):
        for name in ("eval-loss", "mae", "naive-mae"):
            del reply["metrics"][f"evaluate.cpu_usage.{name}"]
        reply["metrics"]["evaluate.cpu_usage.num-examples"] = 0

    nodes = make_node("a"), make_node("b", behave=young)
    entry = run(*nodes, min_evaluate_clients=2)["rounds"][0]
    assert entry["nodes"]["b"] == {"state": "ok", "cause": ""}
    assert entry["metrics"]["cpu_usage"]["nodes"] == 2
    assert entry["metrics"]["cpu_usage"]["eval_loss"] is None


# Nodes that do not do what they should: the round is theirs to lose, the run goes on


def test_a_round_without_any_data_is_skipped_and_the_next_one_tried(run, make_node):
    node = make_node("a", examples={"cpu_usage": 0})

    def comes_later(node, _reply):
        node.examples["cpu_usage"] = 4

    node.behave = comes_later
    first, second = run(node, num_server_rounds=2)["rounds"]
    assert (first["state"], first["reason"]) == ("skipped", "a: nothing to train on")
    assert first["nodes"]["a"]["state"] == "no-data"
    assert second["state"] == "finished"
    assert weights(run) == pytest.approx([1.0, 1.0])  # the weights stayed in the first


def test_a_run_in_which_nobody_ever_has_data_fails_with_the_reason(run, make_node):
    nodes = [make_node(name, examples={"cpu_usage": 0}) for name in "ab"]
    with pytest.raises(ServerError, match="a: nothing to train on; b: nothing to train on"):
        run(*nodes, num_server_rounds=5)
    assert [r["state"] for r in run.history["rounds"]] == ["skipped"] * 5
    assert run.history["state"] == "failed"
    assert "nothing to train on" in run.history["reason"]


def test_a_node_without_data_among_others_has_no_weight_and_fails_nobody(run, make_node):
    nodes = make_node("a", 2.0), make_node("b", 100.0, {"cpu_usage": 0})
    entry = run(*nodes, min_fit_clients=2)["rounds"][0]
    assert weights(run) == pytest.approx([2.0, 2.0])
    assert entry["nodes"]["b"]["state"] == "no-data"
    assert entry["metrics"]["cpu_usage"]["nodes"] == 1


def test_of_four_nodes_what_is_usable_is_aggregated_and_each_cause_told_once(
    run, make_node, capsys
):
    def extra(_node, reply):
        if "train.cpu_usage.num-examples" in reply["metrics"]:
            reply["metrics"]["train.cpu_usage.accuracy"] = 0.9
            reply["metrics"]["train.surprise.num-examples"] = 3
            reply["metrics"]["mood"] = 7

    def ended(_node, _reply):
        raise RuntimeError("ClientApp stopped responding.")

    nodes = [
        make_node("a", 1.0),
        make_node("b", behave=raising(ValueError("disk on fire"))),
        make_node("c", behave=ended),
        make_node("d", 3.0, behave=extra),
    ]
    history = run(*nodes, num_server_rounds=3)
    assert history["state"] == "finished"
    assert weights(run) == pytest.approx([6.0, 6.0])  # three rounds of (1 + 3) / 2
    for entry in history["rounds"]:
        assert entry["nodes"] == {
            "a": {"state": "ok", "cause": ""},
            "b": {"state": "failed", "cause": "ValueError: disk on fire"},
            "c": {"state": "failed", "cause": "RuntimeError: ClientApp stopped responding."},
            "d": {
                "state": "ok",
                "cause": "mood was not asked for and is left out; "
                "train.cpu_usage accuracy was not asked for and is left out; "
                "train.surprise was not asked for and is left out",
            },
        }
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line[:1] == "{"]
    named = [line["node"] for line in told if line["event"] == "cannot take part fully"]
    assert sorted(named) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (np.array([1, np.nan], np.float32), "tensor 'w' is not finite"),
        (np.array([1, np.inf], np.float32), "tensor 'w' is not finite"),
        (np.ones(3, np.float32), "tensor 'w' has shape (3,), the nodes' model has (2,)"),
    ],
)
def test_unusable_weights_cost_only_their_node(run, make_node, weigh, bad, cause):
    def behave(_node, reply):
        weigh(reply, {"cpu_usage": {"w": bad}})

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert weights(run) == pytest.approx([2.0, 2.0])
    assert entry["nodes"]["b"]["state"] == "unusable"
    assert entry["nodes"]["b"]["cause"].endswith(cause)


def test_weights_under_other_names_cost_only_their_node(run, make_node, weigh):
    def behave(_node, reply):
        weigh(reply, {"cpu_usage": {"v": np.ones(2, np.float32)}})

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert "tensor 'w' has shape none" in entry["nodes"]["b"]["cause"]


@pytest.mark.parametrize(
    ("array", "cause"),
    [
        (
            Array(np.array(["a", "b"])),
            "the array is of type <U1 and shape (2,), "
            "it must be of type float32 and one-dimensional",
        ),
        (
            Array(np.ones(2)),
            "the array is of type float64 and shape (2,), "
            "it must be of type float32 and one-dimensional",
        ),
        (
            Array(np.ones((1, 2), np.float32)),
            "the array is of type float32 and shape (1, 2), "
            "it must be of type float32 and one-dimensional",
        ),
        (Array(np.ones(3, np.float32)), "the array has 3 numbers, its layouts have 2"),
        (Array(np.ones(1, np.float32)), "the array has 1 numbers, its layouts have 2"),
        (
            Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"rubbish"),
            "the array is not in numpy's format",
        ),
        (
            Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"PK\x03\x04 a zip"),
            "the array is not in numpy's format",
        ),
    ],
    ids=["strings", "double", "two-dimensional", "too-long", "too-short", "rubbish", "zip"],
)
def test_an_array_that_is_not_what_its_message_says_costs_only_its_node(
    run, make_node, array, cause
):
    def behave(_node, reply):
        reply["arrays"] = ArrayRecord({"weights": array})

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert entry["nodes"]["b"] == {
        "state": "unusable",
        "cause": f"the weights cannot be read: {cause}",
    }
    assert weights(run) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    ("metrics", "layouts", "cause"),
    [
        (["cpu_usage"] * 2, ['[["w",[1]]]'] * 2, "metric 'cpu_usage' is in the array more than"),
        (["cpu_usage", "power"], ['[["w",[2]]]'], "1 layouts for 2 metrics"),
        (["cpu_usage"], ['[["w",[-2]]]'], "the layout of 'cpu_usage' is none: '[[\"w\",[-2]]]'"),
        (["cpu_usage"], ["[" * 9999], "the layout of 'cpu_usage' is none"),
        (["cpu_usage"], ['[["w",[1]],["w",[1]]]'], "the layout of 'cpu_usage' is none"),
        ([1], ['[["w",[2]]]'], "weights-metrics is no list of strings"),
    ],
)
def test_a_layout_that_is_none_costs_only_its_node(run, make_node, metrics, layouts, cause):
    def behave(_node, reply):
        reply["node"].update({"weights-metrics": metrics, "weights-layouts": layouts})

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert entry["nodes"]["b"]["cause"].startswith(f"the weights cannot be read: {cause}")
    assert weights(run) == pytest.approx([2.0, 2.0])


def test_weights_of_one_metric_that_are_unusable_leave_the_others(run, make_node, weigh):
    def behave(_node, reply):
        wrong, right = np.ones(3, np.float32), np.full(2, 4, np.float32)
        weigh(reply, {"cpu_usage": {"w": wrong}, "power": {"w": right}})

    both = {"cpu_usage": 10, "power": 10}
    nodes = make_node("a", 2.0, both), make_node("b", examples=both, behave=behave)
    entry = run(*nodes, metric="cpu_usage,power")["rounds"][0]
    assert entry["nodes"]["b"] == {
        "state": "ok",
        "cause": "weights of cpu_usage: tensor 'w' has shape (3,), the nodes' model has (2,)",
    }
    assert weights(run) == pytest.approx([2.0, 2.0])
    assert weights(run, "power") == pytest.approx([3.0, 3.0])


def test_a_reply_with_examples_and_no_weights_costs_only_its_node(run, make_node, weigh):
    def behave(_node, reply):
        weigh(reply, {})

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    cause = "no weights of cpu_usage in the reply"
    assert entry["nodes"]["b"] == {"state": "unusable", "cause": cause}


def test_a_node_of_another_protocol_is_told_with_both_numbers(run, make_node):
    def behave(_node, reply):
        reply["node"]["protocol"] = 3

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert entry["nodes"]["b"] == {
        "state": "unusable",
        "cause": "the node speaks protocol 3 of the federation, this server speaks 2",
    }


@pytest.mark.parametrize("examples", [-1, float("nan"), float("inf"), 0.5])
def test_a_number_of_examples_that_is_none_costs_only_its_node(run, make_node, examples):
    def behave(_node, reply):
        reply["metrics"]["train.cpu_usage.num-examples"] = examples

    entry = run(make_node("a", 2.0), make_node("b", behave=behave))["rounds"][0]
    assert entry["nodes"]["b"] == {
        "state": "unusable",
        "cause": f"num-examples of cpu_usage is {examples:g}",
    }
    assert weights(run) == pytest.approx([2.0, 2.0])


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(run, make_node):
    nodes = make_node("a", loss=2.0), make_node("b", loss=float("nan"))
    facts = run(*nodes)["rounds"][0]["metrics"]["cpu_usage"]
    assert (facts["train_loss"], facts["eval_loss"]) == (2.0, 2.0)


def test_a_silent_node_costs_the_round_timeout_and_nothing_else(run, make_node, silent):
    entry = run(make_node("a", 2.0), make_node("b", behave=raising(silent())))["rounds"][0]
    assert entry["nodes"]["b"] == {"state": "silent", "cause": "no reply in 0.3 s"}
    assert entry["nodes"]["a"]["state"] == "ok"
    assert weights(run) == pytest.approx([2.0, 2.0])


def test_one_round_below_the_minimum_is_skipped(run, make_node):
    def once(node, _reply):
        if len(node.trained()) == 1:
            raise ValueError("out of memory")

    history = run(
        make_node("a"), make_node("b", behave=once), min_fit_clients=2, num_server_rounds=2
    )
    first, second = history["rounds"]
    assert first["state"] == "skipped"
    assert first["reason"] == "2 nodes needed, 1 usable; b: ValueError: out of memory"
    assert second["state"] == "finished"


def test_three_rounds_below_the_minimum_end_the_run(run, make_node):
    nodes = make_node("a"), make_node("b", behave=raising(ValueError("out of memory")))
    with pytest.raises(ServerError, match="3 rounds in a row failed: 2 nodes needed, 1 usable"):
        run(*nodes, min_fit_clients=2, num_server_rounds=9)
    assert len(run.history["rounds"]) == 3
    assert run.history["state"] == "failed"


# The start, and who comes and goes


def test_too_few_nodes_end_the_run_after_the_node_timeout(run, make_node):
    with pytest.raises(ServerError, match=r"^2 nodes needed, 1 there after 0.2 s \(node-timeout\)"):
        run(make_node("a"), min_available_clients=2)
    assert run.history["state"] == "failed"


def test_nodes_that_all_leave_end_the_run_after_the_node_timeout(run, make_node):
    def leaves(_node, _reply):
        run.grid.nodes.clear()

    with pytest.raises(ServerError, match=r"1 nodes needed to train, 0 there after 0\.2 s"):
        run(make_node("a", behave=leaves), num_server_rounds=3)


def test_a_metric_that_no_node_has_is_told_with_what_they_offer(run, make_node):
    nodes = make_node("a"), make_node("b")
    with pytest.raises(ServerError, match=r"no node can learn 'power'; a offers cpu_usage [(]no"):
        run(*nodes, metric="cpu_usage,power")


def test_nodes_that_all_fail_the_query_are_told(run, make_node):
    with pytest.raises(ServerError, match="no node can learn 'cpu_usage'; id 101: OSError: no"):
        run(make_node("a", introduce=raising(OSError("no processor"))))


def test_the_first_answer_may_take_the_node_timeout(run, make_node, silent):
    with pytest.raises(ServerError, match=r"id 101: no reply in 0\.4 s"):
        run(make_node("a", introduce=raising(silent())), node_timeout=0.4, round_timeout=0.2)


def test_two_nodes_of_one_name_are_refused(run, make_node):
    with pytest.raises(ServerError, match="two nodes are named 'a'"):
        run(make_node("a"), make_node("a"))


def test_a_server_node_that_is_not_there_is_refused(run, make_node):
    with pytest.raises(ServerError, match="server-node='srv': no such node; there are a, b"):
        run(make_node("a"), make_node("b"), server_node="srv")


def test_a_node_that_comes_later_trains_from_the_round_after(run, make_node):
    late = make_node("z")

    def joins(_node, _reply):
        run.grid.nodes[900] = late

    rounds = run(make_node("a", behave=joins), num_server_rounds=3)["rounds"]
    assert [sorted(r["nodes"]) for r in rounds] == [["a"], ["a"], ["a", "z"]]


def test_a_restarted_node_takes_the_place_of_its_old_id(run, make_node):
    again = make_node("b")

    def restarts(_node, _reply):
        run.grid.nodes.pop(102, None)
        run.grid.nodes[900] = again

    nodes = make_node("a"), make_node("b", behave=restarts)
    history = run(*nodes, num_server_rounds=3)
    assert history["state"] == "finished"
    assert sorted(history["rounds"][2]["nodes"]) == ["a", "b"]
    assert len(again.trained()) == 1


def test_a_second_node_of_a_name_that_comes_later_is_kept_out(run, make_node):
    twin = make_node("a")

    def joins(_node, _reply):
        run.grid.nodes[900] = twin

    history = run(make_node("a", behave=joins), num_server_rounds=3)
    assert twin.trained() == []
    assert history["nodes"]["id 900"]["cause"] == "another node is named 'a'"


# Strategies


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("FedAvg", 4.0),
        ("FedProx", 4.0),
        ("FedAvgM", 4.0),
        ("FedMedian", 2.0),
        ("FedTrimmedAvg", 2.0),
    ],
)
def test_a_strategy_is_flowers_own(run, make_node, strategy, expected):
    nodes = [make_node("a", 1.0), make_node("b", 2.0), make_node("c", 9.0)]
    run(*nodes, strategy=strategy)
    assert weights(run) == pytest.approx([expected, expected])


def test_krum_takes_the_node_in_the_middle_of_the_others(run, make_node):
    steps = {"a": 1.0, "b": 1.1, "c": 1.3, "d": 50.0}
    run(*[make_node(name, step) for name, step in steps.items()], strategy="Krum")
    assert weights(run) == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize("strategy", ["FedAdam", "FedYogi"])
def test_an_adaptive_strategy_moves_towards_the_nodes(run, make_node, strategy):
    run(make_node("a", 1.0), make_node("b", 3.0), strategy=strategy)
    assert (weights(run) > 0).all()
    assert (weights(run) < 2).all()


def test_momentum_goes_on_in_the_next_round(run, make_node):
    run(make_node("a", 1.0), strategy="FedAvgM", num_server_rounds=2)
    # Round 1: 1; round 2: 1 + (0.9 * 1 + 1).
    assert weights(run) == pytest.approx([2.9, 2.9])


def test_momentum_goes_by_name_whatever_the_order_of_the_tensors(run, make_node, weigh):
    def trained(node, reply):
        if "arrays" in reply:
            names = "vw" if len(node.trained()) == 1 else "wv"
            values = {"v": np.full(2, 7, np.float32), "w": np.full(2, 3, np.float32)}
            weigh(reply, {"cpu_usage": {name: values[name] for name in names}})

    def introduced(_node, reply):
        weigh(reply, {"cpu_usage": {name: np.zeros(2, np.float32) for name in "vw"}})

    node = make_node("a", behave=trained, introduce=introduced)
    run(node, strategy="FedAvgM", num_server_rounds=2)
    saved = load_file(run.folder / "checkpoints" / "cpu_usage" / "latest.safetensors")
    # Round 1 goes from 0 to 7 and 3; round 2 adds 0.9 of that to each.
    assert saved["v"] == pytest.approx([13.3, 13.3])
    assert saved["w"] == pytest.approx([5.7, 5.7])


def test_fedprox_tells_the_nodes_its_mu(run, make_node):
    run(make_node("a"), strategy="FedProx", proximal_mu=0.25)
    assert config_of(run.grid.pushes[1][0])["proximal-mu"] == 0.25


@pytest.mark.parametrize("strategy", ["Krum", "FedTrimmedAvg"])
def test_a_strategy_that_needs_three_nodes_ends_with_two_before_the_first_round(
    run, make_node, strategy
):
    with pytest.raises(ServerError, match="3 nodes needed, 2 there"):
        run(make_node("a"), make_node("b"), strategy=strategy)
    assert run.history["rounds"] == []


def test_a_metric_that_too_few_nodes_have_for_the_strategy_is_told_before_the_first_round(
    run, make_node
):
    nodes = [make_node("a", examples={"cpu_usage": 1, "power": 1}), make_node("b"), make_node("c")]
    with pytest.raises(ServerError, match="strategy Krum needs 3 nodes, 1 can learn 'power'"):
        run(*nodes, strategy="Krum", metric="cpu_usage,power")
