import numpy as np
import pytest
import torch
from icos_fl_client.forecasting import History
from icos_fl_client.forecasting.anchor_lstm import AnchorLSTM
from icos_fl_client.models import AnchorLSTM as Trained
from icos_fl_client.node import weights_of

LOOKBACK, HORIZON = 12, 5


def trained(layers: int = 1, features: int = 1) -> Trained:
    """With weights as far from 0 as training leaves some of them."""
    torch.manual_seed(0)
    model = Trained(
        lookback=LOOKBACK, horizon=HORIZON, features=features, hidden_size=8, num_layers=layers
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    return model


def windows() -> np.ndarray:
    """Lively, calm, flat and jumping ones, as z-scores."""
    rng = np.random.default_rng(0)
    lively_bl = rng.normal(size=(50, LOOKBACK)).cumsum(axis=1)
    flat_bl = np.full((1, LOOKBACK), 1.5)
    jump_bl = np.where(np.arange(LOOKBACK) < LOOKBACK - 1, 0.0, 40.0)[None]
    return np.concatenate([lively_bl, 1e-5 * lively_bl, flat_bl, jump_bl])


@pytest.mark.parametrize("layers", [1, 2])
def test_it_forecasts_what_torch_does(layers):
    model = trained(layers)
    with torch.inference_mode():
        expected = model(torch.tensor(windows()[:, :, None], dtype=torch.float32)).numpy()

    actual = AnchorLSTM(weights_of(model), lookback=LOOKBACK).predict(windows())
    assert np.abs(actual - expected).max() < 1e-5


def test_in_the_metrics_unit_it_forecasts_the_same():
    numpy_model = AnchorLSTM(weights_of(trained()), lookback=LOOKBACK)
    watts_model = AnchorLSTM(weights_of(trained()), lookback=LOOKBACK, deviation=8.0)

    expected = 8 * numpy_model.predict(windows()) + 150
    assert np.allclose(watts_model.predict(8 * windows() + 150), expected, atol=1e-9)


def test_it_forecasts_as_soon_as_one_lookback_is_there_and_as_far_as_it_learned():
    model, history = AnchorLSTM(weights_of(trained()), lookback=LOOKBACK), History()
    steps_h = np.array([1, HORIZON, HORIZON + 1])
    said = []
    for value in range(LOOKBACK):
        history.append(float(value))
        said.append(np.isfinite(model.forecast(history, steps_h)[0]).tolist())

    assert said == [[False] * 3] * (LOOKBACK - 1) + [[True, True, False]]


def test_weights_of_several_columns_are_refused():
    with pytest.raises(ValueError, match="no model of one column"):
        AnchorLSTM(weights_of(trained(features=2)), lookback=LOOKBACK)


def test_weights_that_no_such_lookback_has_are_refused():
    # 12 steps of input have 7 anchors, 40 have 9, and 7 times the horizon is no multiple of 9.
    with pytest.raises(ValueError, match="no model of one column and 40 steps"):
        AnchorLSTM(weights_of(trained()), lookback=40)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="have no"):
        AnchorLSTM({"linear.weight": np.zeros((1, 1))}, lookback=LOOKBACK)
