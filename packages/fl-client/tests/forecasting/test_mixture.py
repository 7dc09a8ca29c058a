import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from icos_fl_client.forecasting.mixture import Mixture, PolynomialWeights

ALL = np.ones((2, 1), bool)


def test_weights_are_those_computed_by_hand():
    weights = PolynomialWeights([0.5, 0.5], [0.5], 1)
    weights.learn(np.array([[[2.0], [1.0]]]))
    # Prior times regret by its square: 0.5 * 2 / 4 and 0.5 * 1 / 1.
    assert weights.weights(ALL).tolist() == [[[1 / 3], [2 / 3]]]

    weights.learn(np.array([[[0.0], [0.5]]]))
    # Regrets 1 and 1, squares 2 and 0.5 + 0.25.
    assert np.allclose(weights.weights(ALL), [[[3 / 11], [8 / 11]]], rtol=1e-12)


def test_alternative_that_lost_more_has_no_weight():
    weights = PolynomialWeights([0.5, 0.5], [1.0], 1)
    weights.learn(np.array([[[-1.0], [3.0]]]))

    assert weights.weights(ALL).tolist() == [[[0.0], [1.0]]]


def test_prior_decides_before_there_is_a_regret():
    assert PolynomialWeights([0.75, 0.25], [1.0], 1).weights(ALL).tolist() == [[[0.75], [0.25]]]


def test_what_is_not_there_gives_its_weight_to_the_others():
    weights = PolynomialWeights([0.75, 0.25], [1.0], 1)

    assert weights.weights(np.array([[False], [True]])).tolist() == [[[0.0], [1.0]]]


def test_nothing_known_changes_and_forgets_nothing():
    weights = PolynomialWeights([0.5, 0.5], [0.5], 1)
    weights.learn(np.array([[[2.0], [1.0]]]))
    before = weights.regret_mkh.tolist(), weights.square_mkh.tolist()
    weights.learn(np.full((1, 2, 1), np.nan))

    assert before == (weights.regret_mkh.tolist(), weights.square_mkh.tolist())


@given(arrays(float, (30, 3, 2), elements=st.floats(-1e6, 1e6)), st.integers(1, 2))
def test_shares_sum_to_one_and_the_mixture_is_inside_the_forecasts(said_tkh, sleeping):
    mixture = Mixture(3, np.array([1, 2]))
    actual_t = said_tkh[:, 0, 0] + said_tkh[:, 1, 1]
    for said_kh, actual in zip(said_tkh, actual_t, strict=True):
        mixed_mh, yhat_h = mixture.mix(said_kh)
        mixture.learn(said_kh, mixed_mh, yhat_h, np.full(2, actual))

    there_kh = np.ones((3, 2), bool)
    there_kh[sleeping] = False
    said_kh = np.where(there_kh, said_tkh[0], np.nan)
    _, yhat_h = mixture.mix(said_kh)
    share_kh = mixture.shares(there_kh)
    slack = 1e-9 * np.abs(said_tkh[0]).max() + 1e-300  # halves of the smallest floats are none
    assert np.allclose(1.0, share_kh.sum(axis=0))
    assert (share_kh >= 0).all()
    assert (share_kh[sleeping] == 0).all()
    assert (yhat_h >= np.nanmin(said_kh, axis=0) - slack).all()
    assert (yhat_h <= np.nanmax(said_kh, axis=0) + slack).all()
    assert np.allclose((share_kh * np.nan_to_num(said_kh)).sum(axis=0), yhat_h, atol=slack)


def test_mixture_finds_the_forecast_that_is_right():
    mixture = Mixture(3, np.array([1]))
    rng = np.random.default_rng(0)
    for actual in rng.normal(size=200):
        said_kh = np.array([[rng.normal()], [actual + 0.01], [rng.normal()]])
        mixed_mh, yhat_h = mixture.mix(said_kh)
        mixture.learn(said_kh, mixed_mh, yhat_h, np.array([actual]))

    assert mixture.shares(np.ones((3, 1), bool))[1, 0] > 0.99


def test_what_is_half_forgotten_weighs_the_same_and_moves_quicker():
    weights = PolynomialWeights([0.5, 0.5], [1.0], 1)
    weights.learn(np.array([[[2.0], [1.0]]]))
    weights.forget(np.array([[0.5]]))
    assert weights.weights(ALL).tolist() == [[[1 / 3], [2 / 3]]]

    weights.learn(np.array([[[0.0], [0.5]]]))
    # Regrets 1 and 1, squares 2 and 0.5 + 0.25.
    assert np.allclose(weights.weights(ALL), [[[3 / 11], [8 / 11]]], rtol=1e-12)


def test_quick_mixers_begin_a_run_anew_and_slow_ones_go_on():
    mixture, there_kh = Mixture(2, np.array([1])), np.ones((2, 1), bool)
    mixture.learn(np.array([[0.0], [1.0]]), np.zeros((4, 1)), np.zeros(1), np.ones(1))
    mixture.begin_run()

    # What repeats the last value has lost, so a mixer that knows it gives it no weight.
    assert mixture.mixers.weights(there_kh)[:, 0, 0].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_the_further_ahead_the_less_a_new_run_forgets():
    steps_h = np.array([1, 20, 40, 200])
    mixture, zeros_h = Mixture(2, steps_h), np.zeros(4)
    said_kh = np.stack([zeros_h, zeros_h + 1])
    mixture.learn(said_kh, np.zeros((4, 4)), zeros_h, zeros_h + 1)
    before = mixture.mixers.regret_mkh[0, 1]
    mixture.begin_run()

    assert np.allclose([0.0, 0.0, 0.5, 0.9] * before, mixture.mixers.regret_mkh[0, 1], rtol=1e-12)


def test_steps_of_a_group_share_the_judgement_of_the_mixers_and_no_others_do():
    weights = PolynomialWeights([0.5, 0.5], [1.0], 3)
    weights.learn(np.array([[[2.0, -6.0, 5.0], [1.0, 1.0, -1.0]]]))

    # Of the first two steps the first has lost 2 more on the mean, and the second 1 less.
    together = weights.weights_together([slice(0, 2), slice(2, 3)])
    assert together.tolist() == [[[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]]


def test_nothing_is_learned_from_a_last_value_that_was_right():
    mixture, said_kh = Mixture(3, np.array([1])), np.array([[0.1], [0.1], [0.7]])
    mixture.mixers.learn(np.array([[[0.3], [0.1], [-0.2]]] * 4))
    mixed_mh, mixture_h = mixture.mix(said_kh)
    before = mixture.mixers.square_mkh[:2].tolist()
    mixture.learn(said_kh, mixed_mh, mixture_h, np.array([0.1]))

    assert mixture_h.tolist() == [0.1]
    discount_m11 = np.array([0.98, 0.998])[:, None, None]
    assert mixture.mixers.square_mkh[:2].tolist() == (discount_m11 * before).tolist()
