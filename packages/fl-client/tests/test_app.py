"""The ClientApp with real messages: replies are those of protos/README.md, whatever is missing."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat, pack, unpack
from icos_fl_client import processor_client
from icos_fl_client.app import app
from icos_fl_client.errors import ClientError, ConfigError
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.settings import RunConfig, parse
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import connect
from icos_fl_warm_runtime import TASK_REGISTRY

Ask = Callable[..., RecordDict]


def message(kind: str, arrays: dict[str, Any], **config: Any) -> Message:
    array, told = pack({metric: Flat.of(weights) for metric, weights in arrays.items()})
    facts = {"protocol": 2, "server-round": 1, "model-round": 0, **told}
    content = RecordDict({records.CONFIG: ConfigRecord(facts | config)})
    if arrays:
        content["arrays"] = ArrayRecord({"weights": Array(array)})
    return delivered(kind, content)


def delivered(kind: str, content: RecordDict) -> Message:
    """A message of the server as a SuperNode hands it on."""
    metadata = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=600.0,
        message_type=kind,
        src_task_id=1,
        dst_task_id=2,
    )
    return Message(content=content, metadata=metadata)


def node(content: RecordDict) -> dict[str, Any]:
    return dict(content["node"])


def numbers(content: RecordDict, kind_and_metric: str) -> dict[str, Any]:
    """By name; empty if the reply has none of this kind and metric."""
    start = f"{kind_and_metric}."
    found = content.get("metrics", {}).items()
    return {key.removeprefix(start): value for key, value in found if key.startswith(start)}


def said(content: RecordDict) -> set[str]:
    """Kinds and metrics that the reply has numbers of, and metrics that it has weights of."""
    keys = {key.rpartition(".")[0] for key in content.get("metrics", {})}
    return keys | set(content["node"]["weights-metrics"])


def arrays(content: RecordDict, metric: str) -> dict[str, np.ndarray]:
    return unpack(content["arrays"]["weights"].numpy(), content["node"])[metric].named()


@pytest.fixture
def ask(address, dataclay, small_run) -> Ask:
    """Sends a message to node "a", which has its processor and its store."""

    def send(
        kind: str,
        given: dict[str, Any] | None = None,
        *,
        metric: str = "cpu_usage",
        node_config: dict[str, Any] | None = None,
        run_config: dict[str, Any] | None = None,
        **config: Any,
    ) -> RecordDict:
        node = {
            "node-name": "a",
            "processor-address": address,
            "store-address": f"{dataclay.host}:{dataclay.port}",
        } | (node_config or {})
        run = small_run | {"metric": metric} | (run_config or {})
        facts = {name.replace("_", "-"): value for name, value in config.items()}
        asked = message(kind, given or {}, metrics=metric.split(","), **facts)
        context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
        return app(asked, context).content

    return send


@pytest.fixture
def weights(small_run) -> Callable[..., dict[str, np.ndarray]]:
    def make(**changes: Any) -> dict[str, np.ndarray]:
        run = parse(RunConfig, small_run | changes, "run config")
        return weights_of(build_model(run, "cpu_usage"))

    return make


def test_a_query_offers_weights_and_sequences_of_each_metric(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(30)], [wave(10)])
    windows.put("a", "power", [wave(20)], [wave(10)], "W")

    content = ask("query", metric="cpu_usage,power", server_round=0)

    assert set(content) == {"node", "arrays", "metrics"}
    assert said(content) == {"cpu_usage", "train.cpu_usage", "power", "train.power"}
    assert numbers(content, "train.cpu_usage") == {"num-examples": 25}
    assert numbers(content, "train.power") == {"num-examples": 15}
    facts = {"protocol": 2, "name": "a", "missing-metrics": [], "missing-causes": []}
    assert facts.items() <= node(content).items()
    assert node(content)["weights-metrics"] == ["cpu_usage", "power"]
    offered, expected = arrays(content, "cpu_usage"), weights()
    assert list(offered) == list(expected)
    assert all(np.array_equal(offered[name], expected[name]) for name in expected)


def test_training_judges_what_came_and_trains_on_from_it(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])
    given = weights(seed=1)
    judged = ask("evaluate", {"cpu_usage": given}, evaluate_metrics=["cpu_usage"])

    content = ask(
        "train",
        {"cpu_usage": given},
        train_metrics=["cpu_usage"],
        evaluate_metrics=["cpu_usage"],
    )

    assert set(content) == {"node", "arrays", "metrics"}
    assert said(content) == {"cpu_usage", "train.cpu_usage", "evaluate.cpu_usage"}
    trained = numbers(content, "train.cpu_usage")
    assert set(trained) == {"num-examples", "train-loss", "seconds"}
    assert trained["num-examples"] == 35
    assert numbers(content, "evaluate.cpu_usage") == numbers(judged, "evaluate.cpu_usage")
    after = arrays(content, "cpu_usage")
    assert not np.array_equal(given["head.weight"], after["head.weight"])
    assert {name: a.shape for name, a in after.items()} == {n: a.shape for n, a in given.items()}


def test_prometheus_is_told_what_the_reply_tells(ask, windows, wave, weights):
    windows.put("told", "cpu_usage", [wave(40)], [wave(20)])
    begun = trained_sequences("cpu_usage")

    content = ask(
        "train",
        {"cpu_usage": weights(), "power": weights()},
        metric="cpu_usage,power",
        node_config={"node-name": "told"},
        train_metrics=["cpu_usage", "power"],
        evaluate_metrics=["cpu_usage"],
        model_round=3,
    )

    assert trained_sequences("cpu_usage") - begun == 35
    trained, judged = (numbers(content, f"{kind}.cpu_usage") for kind in ("train", "evaluate"))
    assert told("icos_fl_client_train_loss", "cpu_usage") == trained["train-loss"]
    assert told("icos_fl_client_mae", "cpu_usage") == judged["mae"]
    assert told("icos_fl_client_naive_mae", "cpu_usage") == judged["naive-mae"]
    assert told("icos_fl_client_model_round", "cpu_usage") == 3
    assert told("icos_fl_client_unserved_total", "power") >= 1


def told(name: str, metric: str) -> float | None:
    return TASK_REGISTRY.get_sample_value(name, {"metric": metric})


def trained_sequences(metric: str) -> float:
    return told("icos_fl_client_trained_sequences_total", metric) or 0.0


def test_training_without_evaluation_evaluates_nothing(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(40)], [wave(20)])

    content = ask("train", {"cpu_usage": weights()}, train_metrics=["cpu_usage"])

    assert said(content) == {"cpu_usage", "train.cpu_usage"}


def test_an_evaluation_is_of_what_was_asked_for(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(30)], [wave(20)])
    windows.put("a", "power", [wave(30)], [wave(20)], "W")

    content = ask(
        "evaluate",
        {"cpu_usage": weights(), "power": weights()},
        metric="cpu_usage,power",
        evaluate_metrics=["power"],
    )

    assert set(content) == {"node", "metrics"}
    assert said(content) == {"evaluate.power"}
    judged = numbers(content, "evaluate.power")
    assert set(judged) == {"num-examples", "eval-loss", "mae", "naive-mae"}
    assert judged["num-examples"] == 15


def test_fedprox_holds_weights_nearer_to_what_came(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(60)], [])
    given = weights()

    def moved(**config: Any) -> float:
        content = ask("train", {"cpu_usage": given}, train_metrics=["cpu_usage"],
                      run_config={"local-epochs": 20, "learning-rate": 0.05}, **config)  # fmt: skip
        after = arrays(content, "cpu_usage")
        return sum(float(np.square(after[n] - given[n]).sum()) for n in given)

    assert moved(proximal_mu=100.0) < moved() / 2


@pytest.mark.parametrize("kind", ["query", "evaluate"])
def test_a_metric_that_the_node_lacks_is_named_and_the_others_are_served(
    ask, windows, wave, weights, kind
):
    windows.put("a", "cpu_usage", [wave(30)], [wave(20)])

    content = ask(
        kind,
        {"cpu_usage": weights(), "power": weights()},
        metric="power,cpu_usage",
        evaluate_metrics=["power", "cpu_usage"],
    )

    found = node(content)
    assert [told.split()[0] for told in found["versions"]] == ["icos-fl-client", "flwr", "torch"]
    assert found["missing-metrics"] == ["power"]
    assert found["missing-causes"] == ["node 'a' has no column 'power'; it has: cpu_usage"]
    record = {"query": "train.cpu_usage", "evaluate": "evaluate.cpu_usage"}[kind]
    assert numbers(content, record)["num-examples"] > 0


def test_a_node_with_empty_windows_has_0_examples_no_weights_and_the_cause(ask, windows, weights):
    windows.put("a", "cpu_usage", [], [])

    content = ask(
        "train",
        {"cpu_usage": weights()},
        train_metrics=["cpu_usage"],
        evaluate_metrics=["cpu_usage"],
    )

    assert set(content) == {"node", "metrics"}
    assert said(content) == {"train.cpu_usage"}
    assert numbers(content, "train.cpu_usage") == {"num-examples": 0}
    found = node(content)
    assert found["missing-metrics"] == ["cpu_usage"]
    assert found["missing-causes"] == ["6 rows in a row are needed"]


@pytest.mark.parametrize(
    ("validation", "cause"),
    [
        (0, "6 rows in a row are needed"),
        (
            20,
            "a: cpu_usage has no sequence of 6 steps without a gap in its training part",
        ),
    ],
)
def test_0_examples_have_their_cause_when_only_training_was_asked_for(
    ask, windows, wave, weights, validation, cause
):
    windows.put("a", "cpu_usage", [wave(5)], [wave(validation)])

    content = ask("train", {"cpu_usage": weights()}, train_metrics=["cpu_usage"])

    assert set(content) == {"node", "metrics"}
    assert said(content) == {"train.cpu_usage"}
    assert numbers(content, "train.cpu_usage") == {"num-examples": 0}
    assert node(content)["missing-causes"] == [cause]


def test_a_window_too_young_to_be_judged_is_trained_on(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(30)], [wave(5)])

    content = ask(
        "train",
        {"cpu_usage": weights()},
        train_metrics=["cpu_usage"],
        evaluate_metrics=["cpu_usage"],
    )

    assert numbers(content, "train.cpu_usage")["num-examples"] == 25
    assert numbers(content, "evaluate.cpu_usage") == {"num-examples": 0}
    assert node(content)["missing-metrics"] == []


def test_a_node_with_empty_windows_offers_nothing_but_the_cause(ask, windows):
    windows.put("a", "cpu_usage", [], [])

    content = ask("query", server_round=0)

    assert set(content) == {"node"}
    assert node(content)["missing-causes"] == ["6 rows in a row are needed"]


def test_weights_of_another_model_are_the_cause_of_their_metric_alone(ask, windows, wave, weights):
    for metric in ("cpu_usage", "power"):
        windows.put("a", metric, [wave(30)], [wave(20)])
    asked = ["cpu_usage", "power"]

    content = ask(
        "train",
        {"cpu_usage": weights(**{"hidden-layer-size": 9}), "power": weights()},
        metric="cpu_usage,power",
        train_metrics=asked,
        evaluate_metrics=asked,
    )

    assert said(content) == {"power", "train.power", "evaluate.power"}
    found = node(content)
    assert found["missing-metrics"] == ["cpu_usage"]
    assert found["missing-causes"] == [
        "tensor 'lstm.weight_ih_l0' of the weights has shape (36, 1), the model's has (16, 1)"
    ]


def test_weights_that_were_not_sent_are_the_cause(ask, windows, wave):
    windows.put("a", "cpu_usage", [wave(30)], [wave(20)])

    content = ask("train", {}, train_metrics=["cpu_usage"])

    assert node(content)["missing-causes"] == ["the server sent no weights for cpu_usage"]


def test_weights_of_another_length_than_told_are_refused_with_both(ask, weights):
    told = pack({"cpu_usage": Flat.of({"head.bias": np.zeros(2)})})[1]
    config = {name.replace("-", "_"): value for name, value in told.items()}

    with pytest.raises(ClientError) as caught:
        ask("evaluate", {"cpu_usage": {"head.bias": np.zeros(3)}}, **config)
    assert str(caught.value) == (
        "the server's weights cannot be read: the array has 3 numbers, its layouts have 2"
    )


def test_a_processor_that_is_away_is_the_cause(ask, windows, address, weights, monkeypatch):
    monkeypatch.setattr(processor_client, "_ASK_AGAIN", "{}")  # half a minute
    windows.failure = (grpc.StatusCode.UNAVAILABLE, "the store does not answer")

    content = ask("train", {"cpu_usage": weights()}, train_metrics=["cpu_usage"])

    assert node(content)["missing-causes"] == [
        f"the processor at {address}: UNAVAILABLE: the store does not answer"
    ]


def test_a_model_that_cannot_be_built_is_the_cause(ask, windows, wave):
    windows.put("a", "cpu_usage", [wave(30)], [wave(20)])

    content = ask("query", run_config={"model": "nowhere:build"})

    (cause,) = node(content)["missing-causes"]
    assert cause.startswith("model 'nowhere:build': cannot import nowhere")


def test_another_protocol_is_refused_with_both_numbers(ask):
    with pytest.raises(ClientError) as caught:
        ask("query", protocol=1)
    assert str(caught.value) == (
        "the server speaks protocol 1 of the federation, this node speaks 2"
    )


def test_a_message_without_configuration_is_refused(small_run):
    asked = delivered("query", RecordDict())
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=small_run)

    with pytest.raises(ClientError, match="protocol None"):
        app(asked, context)


def test_a_bad_node_config_is_told_before_anything_is_done(ask, windows):
    with pytest.raises(ConfigError, match=r"^bad node config: threads=-1: "):
        ask("query", node_config={"threads": -1})
    assert windows.asked == []


def test_a_bad_run_config_is_told_before_anything_is_done(ask, windows):
    with pytest.raises(ConfigError, match=r"^bad run config: horizon=0: "):
        ask("query", run_config={"horizon": 0})
    assert windows.asked == []


def test_the_global_model_is_kept_with_what_builds_it_again(
    ask, windows, wave, weights, dataclay, small_run
):
    windows.put("kept", "cpu_usage", [wave(30)], [wave(20)])
    given = weights(seed=5)
    began = time.time()

    ask(
        "train",
        {"cpu_usage": given},
        node_config={"node-name": "kept"},
        train_metrics=["cpu_usage"],
        server_round=4,
        model_round=3,
    )

    with connect(dataclay) as store:
        version = store.model_state("kept", "cpu_usage").get()
    assert version.round == 3
    assert all(np.array_equal(version.weights[name], given[name]) for name in given)
    assert began <= version.metadata["created-unix-s"] <= time.time()
    again = parse(RunConfig, version.config, "kept")
    assert (again.time_step, again.horizon, again.hidden_layer_size) == (4, 2, 4)


def test_a_model_that_was_sent_for_no_task_is_kept_too(ask, windows, weights, dataclay):
    ask("evaluate", {"cpu_usage": weights()}, node_config={"node-name": "idle"}, model_round=7)

    with connect(dataclay) as store:
        assert store.model_state("idle", "cpu_usage").get().round == 7


def test_weights_that_fit_no_model_are_not_kept(ask, weights, dataclay):
    wrong = weights(**{"hidden-layer-size": 9})
    ask(
        "evaluate",
        {"cpu_usage": wrong, "power": weights()},
        metric="cpu_usage,power",
        node_config={"node-name": "misfit"},
    )

    with connect(dataclay) as store:
        assert store.model_state("misfit", "cpu_usage").get() is None
        assert store.model_state("misfit", "power").get() is not None


def test_weights_that_are_not_finite_do_not_replace_the_model_that_is_kept(ask, weights, dataclay):
    broken = {name: array * np.float32("nan") for name, array in weights().items()}
    for number, given in ((1, weights()), (2, broken)):
        ask(
            "evaluate",
            {"cpu_usage": given},
            node_config={"node-name": "diverged"},
            model_round=number,
        )

    with connect(dataclay) as store:
        assert store.model_state("diverged", "cpu_usage").get().round == 1


def test_a_store_that_is_away_costs_the_round_nothing(ask, windows, wave, weights):
    windows.put("a", "cpu_usage", [wave(30)], [wave(20)])

    content = ask(
        "train",
        {"cpu_usage": weights()},
        node_config={"store-address": f"127.0.0.1:{free_port()}"},
        train_metrics=["cpu_usage"],
    )

    assert numbers(content, "train.cpu_usage")["num-examples"] == 25
    assert node(content)["missing-metrics"] == []
