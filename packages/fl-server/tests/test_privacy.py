"""Differential privacy: what a node can change, how much noise there is, and what it costs."""

import json
import math
import sys

import numpy as np
import pytest
from icos_fl.federation.v1.weights import Flat
from icos_fl_server import strategies
from icos_fl_server.errors import ServerError
from icos_fl_server.models import Model
from icos_fl_server.privacy import Privacy
from icos_fl_server.settings import parse
from safetensors import safe_open

pytest.importorskip("dp_accounting", reason="icos-fl-server[dp] is not installed")

NO_NOISE = 1e-9
DP = {"dp_clipping_norm": 1.0, "dp_noise_multiplier": 2.0}


def config(**changes):
    values = {"metric": "cpu_usage", "dp-clipping-norm": 2.0, "dp-noise-multiplier": NO_NOISE}
    return parse(values | {key.replace("_", "-"): value for key, value in changes.items()})


def model_of(privacy: Privacy, weights: np.ndarray) -> Model:
    plain = strategies.make("FedAvg", proximal_mu=0.1)
    return Model(privacy.protect(plain), flat(weights), 0)


def flat(weights: np.ndarray) -> Flat:
    return Flat.of({"w": np.asarray(weights, np.float32)})


def round_of(model: Model, asked: int, *updates: np.ndarray, examples=lambda _: 1.0) -> np.ndarray:
    """How the model's weights change when of *asked* nodes these send such updates."""
    before = model.weights.vector.copy()
    number = model.round + 1
    model.configure(number, list(range(1, asked + 1)), None)
    replies = [
        (flat(before + update), {"num-examples": examples(i)}) for i, update in enumerate(updates)
    ]
    assert model.aggregate(number, number, replies) == ""
    return model.weights.vector - before


def epsilon_by_hand(noise_multiplier: float, releases: int, delta: float) -> float:
    """Rényi DP of the Gaussian mechanism (Mironov 2017, proposition 7), composed, as (ε, δ) by
    proposition 12 of Canonne, Kamath, Steinke 2020; the least over fractional orders."""
    orders = np.linspace(1.01, 200, 40_000)
    rdp = releases * orders / (2 * noise_multiplier**2)
    return float(
        np.min(rdp + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1))
    )


# What a node can change


def test_an_update_is_clipped_to_the_norm():
    model = model_of(Privacy(config()), np.zeros(100))
    change = round_of(model, 1, np.full(100, 50.0))
    assert np.linalg.norm(change) == pytest.approx(2.0, rel=1e-5)
    np.testing.assert_allclose(change, np.full(100, 0.2), rtol=1e-4)


def test_an_update_within_the_norm_stays_as_it_is():
    model = model_of(Privacy(config()), np.ones(4))
    change = round_of(model, 1, np.array([0.1, 0.2, -0.3, 0.4]))
    np.testing.assert_allclose(change, [0.1, 0.2, -0.3, 0.4], atol=1e-6)


@pytest.mark.parametrize("size", [1e3, 3e38])
def test_one_node_of_four_moves_the_model_by_a_fourth_of_the_norm_at_most(size):
    model = model_of(Privacy(config()), np.zeros(100))
    change = round_of(model, 4, np.full(100, size), *[np.zeros(100)] * 3)
    assert np.linalg.norm(change) == pytest.approx(0.5, rel=1e-4)


def test_a_node_with_many_examples_counts_as_any_other():
    model = model_of(Privacy(config()), np.zeros(2))
    change = round_of(
        model, 2, np.array([1.0, 0]), np.array([0, 1.0]), examples=lambda i: 10.0 ** (3 * i)
    )
    np.testing.assert_allclose(change, [0.5, 0.5], atol=1e-6)


def test_who_does_not_answer_counts_as_one_that_changed_nothing():
    model = model_of(Privacy(config()), np.zeros(2))
    change = round_of(model, 4, np.array([1.0, 0]))
    np.testing.assert_allclose(change, [0.25, 0], atol=1e-6)


@pytest.mark.parametrize("start", [0.0, 0.3, 1e10])
def test_a_node_that_changes_nothing_is_no_error(start):
    model = model_of(Privacy(config()), np.full(3, start))
    np.testing.assert_allclose(round_of(model, 2, np.zeros(3), np.zeros(3)), 0, atol=1e-7)


# Noise


def test_noise_has_the_stated_standard_deviation():
    noisy = config(dp_clipping_norm=0.5, dp_noise_multiplier=3.0)
    model = model_of(Privacy(noisy), np.zeros(200_000))
    change = round_of(model, 5, *[np.zeros(200_000)] * 4)
    # noise multiplier × clipping norm ÷ nodes asked; of 200,000 numbers known to 0.16 %
    assert np.std(change) == pytest.approx(3.0 * 0.5 / 5, rel=0.01)
    assert np.mean(change) == pytest.approx(0, abs=0.004)


def test_noise_differs_from_round_to_round_whatever_the_seed():
    noisy = config(dp_noise_multiplier=1.0, seed=7)
    model = model_of(Privacy(noisy), np.zeros(100))
    first, second = round_of(model, 2, np.zeros(100)), round_of(model, 2, np.zeros(100))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


def test_two_runs_that_were_forked_of_one_process_draw_other_noise():
    changes = []
    for _ in range(2):
        np.random.seed(1)  # as both would have it
        model = model_of(Privacy(config(dp_noise_multiplier=1.0)), np.zeros(100))
        changes.append(round_of(model, 2, np.zeros(100)))
    assert abs(np.corrcoef(*changes)[0, 1]) < 0.5


# What it costs


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize(("noise_multiplier", "releases"), [(1.0, 1), (4.0, 1), (4.0, 30)])
def test_epsilon_is_that_of_the_formula(noise_multiplier, releases, delta):
    privacy = Privacy(config(dp_noise_multiplier=noise_multiplier, dp_delta=delta))
    model = model_of(privacy, np.zeros(3))
    for _ in range(releases):
        round_of(model, 2, np.ones(3))
    expected = epsilon_by_hand(noise_multiplier, releases, delta)
    assert privacy.spent() == {
        "epsilon": pytest.approx(expected, rel=0.02),
        "delta": delta,
        "releases": releases,
    }


def test_the_models_of_all_metrics_are_on_one_account():
    privacy = Privacy(config(dp_noise_multiplier=4.0))
    for model in (model_of(privacy, np.zeros(3)), model_of(privacy, np.zeros(5))):
        round_of(model, 2, np.zeros(len(model.weights.vector)))
    assert privacy.spent()["epsilon"] == pytest.approx(epsilon_by_hand(4.0, 2, 1e-5), rel=0.02)


def test_a_round_without_a_release_costs_nothing(run, make_node):
    def refuse(*_):
        raise RuntimeError("no")

    nodes = [make_node("a"), make_node("b", behave=refuse)]
    nodes[0].behave = lambda node, reply: refuse() if len(node.trained()) == 2 else None
    history = run(*nodes, num_server_rounds=3, **DP)
    spent = [entry["privacy"]["releases"] for entry in history["rounds"]]
    assert ([entry["state"] for entry in history["rounds"]], spent) == (
        ["finished", "skipped", "finished"],
        [1, 1, 2],
    )


def test_epsilon_is_in_the_history_of_each_round_and_in_the_log(run, make_node, capsys):
    metrics = {"cpu_usage": 10, "memory_usage": 10}
    nodes = [make_node(name, examples=metrics) for name in "ab"]
    history = run(*nodes, metric="cpu_usage,memory_usage", num_server_rounds=3, **DP)
    spent = [entry["privacy"] for entry in history["rounds"]]
    assert [facts["releases"] for facts in spent] == [2, 4, 6]
    assert [facts["delta"] for facts in spent] == [1e-5] * 3
    assert [facts["epsilon"] for facts in spent] == [
        pytest.approx(epsilon_by_hand(2.0, releases, 1e-5), rel=0.02) for releases in (2, 4, 6)
    ]
    lines = [line for line in capsys.readouterr().err.splitlines() if "round finished" in line]
    assert [json.loads(line)["epsilon"] for line in lines] == [facts["epsilon"] for facts in spent]


def test_without_it_the_history_says_nothing_of_it(run, make_node):
    assert "privacy" not in run(make_node("a"))["rounds"][0]


def test_a_run_that_goes_on_counts_what_was_spent_before(run, make_node):
    run(make_node("a"), num_server_rounds=2, **DP)
    history = run(make_node("a"), resume=str(run.folder), **DP)
    assert history["rounds"][0]["privacy"]["releases"] == 3
    history = run(make_node("a"), resume=str(run.folder), **DP | {"dp_noise_multiplier": 3.0})
    assert history["rounds"][0]["privacy"]["releases"] == 4
    with safe_open(run.folder / "checkpoints/cpu_usage/latest.safetensors", "np") as file:
        assert json.loads(file.metadata()["privacy"]) == [[2.0, 3], [3.0, 1]]


def test_a_checkpoint_that_was_made_without_is_refused(run, make_node):
    run(make_node("a"))
    with pytest.raises(ServerError, match="of cpu_usage was made without differential privacy"):
        run(make_node("a"), resume=str(run.folder), **DP)


# What is refused


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dp-noise-multiplier": 1.0}, "dp-noise-multiplier=1.0: needs dp-clipping-norm"),
        ({"dp-clipping-norm": 1.0}, "dp-noise-multiplier=0.0: needs dp-clipping-norm"),
        ({"dp-clipping-norm": -1.0}, "dp-clipping-norm=-1.0: Input should be greater than or"),
        ({"dp-delta": 1.0}, "dp-delta=1.0: Input should be less than 1"),
        (
            {"dp-clipping-norm": 1.0, "dp-noise-multiplier": 1.0, "strategy": "FedMedian"},
            "the ε that is spent is known of averages, FedAvg and FedProx; strategy is 'FedMedian'",
        ),
    ],
)
def test_what_flower_does_not_count_is_refused(values, said):
    with pytest.raises(ServerError) as caught:
        parse({"metric": "cpu_usage"} | values)
    assert said in str(caught.value)


def test_every_strategy_is_either_taken_or_refused():
    for name in strategies.STRATEGIES:
        plain = strategies.make(name, proximal_mu=0.1)
        if name in strategies.AVERAGES:
            Privacy(config(strategy=name)).protect(plain)
        else:
            with pytest.raises(ServerError):
                config(strategy=name)
            with pytest.raises(ValueError, match="requires a strategy using"):
                Privacy(config()).protect(plain)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ServerError, match=r"icos-fl-server\[dp\], which is not installed"):
        Privacy(config())
