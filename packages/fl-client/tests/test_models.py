"""Shapes of the default model, its bounds, and what is said about a model that cannot be used."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_client.forecasting.anchor_lstm import anchors
from icos_fl_client.models import AnchorLSTM, ModelError, build
from torch import nn

SIZES = {"lookback": 12, "horizon": 3, "features": 1, "hidden_size": 4, "num_layers": 1}


def model(**sizes: int) -> AnchorLSTM:
    torch.manual_seed(0)
    return AnchorLSTM(**(SIZES | sizes)).eval()


def spoilt(**sizes: int) -> AnchorLSTM:
    """With weights that no training would give."""
    spoilt_model = model(**sizes)
    with torch.no_grad():
        for weight in spoilt_model.parameters():
            weight.copy_(torch.randn_like(weight) * 50)
    return spoilt_model


@pytest.mark.parametrize(("features", "layers", "lookback"), [(1, 1, 12), (3, 2, 12), (1, 1, 1)])
def test_a_batch_of_windows_gives_the_whole_horizon(features, layers, lookback):
    network = model(features=features, num_layers=layers, lookback=lookback)

    assert network(torch.randn(5, lookback, features)).shape == (5, 3)


def test_untrained_it_is_close_to_repeating_the_last_value():
    x = torch.randn(64, 12, 1)

    error = (model()(x) - x[:, -1:, 0]).abs().mean()

    assert error < 0.3 * x.std()


def test_a_flat_window_is_repeated_whatever_the_weights():
    x = torch.full((2, 12, 1), 7.25)

    assert torch.equal(torch.full((2, 3), 7.25), spoilt()(x))


def test_a_window_with_values_far_outside_of_training_gives_finite_forecasts():
    x = torch.tensor([0.0, 1e6] * 6).view(1, 12, 1)

    assert spoilt()(x).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12),
    shift=st.integers(-50, 50),
)
def test_a_shift_of_the_window_shifts_the_forecast(values, shift):
    network = model()
    x = torch.tensor(values).view(1, 12, 1)

    with torch.no_grad():
        moved = network(x + shift)
        expected = network(x) + shift

    assert torch.allclose(expected, moved, atol=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12))
def test_no_weights_leave_the_range_of_the_anchors(values):
    x = torch.tensor(values).view(1, 12, 1)
    changes = torch.einsum(
        "bl,hal->bha", x[:, :, 0] - x[:, -1:, 0], torch.tensor(anchors(12, 3)).float()
    )
    bounds = x[:, -1:, 0] + changes.min(dim=-1).values, x[:, -1:, 0] + changes.max(dim=-1).values

    with torch.no_grad():
        forecast = spoilt()(x)

    assert (bounds[0] - 1e-3 <= forecast).all()
    assert (forecast <= bounds[1] + 1e-3).all()


def test_anchors_are_the_last_value_means_and_drifts():
    window = torch.tensor([0.0, 2.0, 4.0, 6.0])

    changes_ha = torch.einsum(
        "l,hal->ha", window - window[-1], torch.tensor(anchors(lookback=4, horizon=2)).float()
    )

    # last; means of 2 and of 4; drift of 2 a step; the same damped by 0.9 a step
    assert torch.allclose(torch.tensor([0.0, -1.0, -3.0, 2.0, 1.8]), changes_ha[0])
    assert torch.allclose(torch.tensor([0.0, -1.0, -3.0, 4.0, 3.42]), changes_ha[1])


def test_the_default_size_has_under_ten_thousand_weights():
    network = model(lookback=40, horizon=20, hidden_size=16)

    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 4276


def test_the_default_model_is_built_by_its_name():
    assert isinstance(build("icos_fl_client.models:AnchorLSTM", **SIZES), AnchorLSTM)


def a_number(**_sizes: int) -> int:
    return 1


def too_long(*, lookback: int, horizon: int, **_sizes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(lookback, horizon + 1))


def failing(**_sizes: int) -> nn.Module:
    raise ValueError("no such layer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AnchorLSTM", "'AnchorLSTM' is not of the form module:factory"),
        ("no_such_package:build", "cannot import no_such_package"),
        ("icos_fl_client.models:Transformer", "icos_fl_client.models has no Transformer"),
        ("icos_fl_client.models:SCALE_MIN", "is not callable"),
        (f"{__name__}:failing", "cannot be built: no such layer"),
        (f"{__name__}:a_number", "made a int, not a torch.nn.Module"),
        (f"{__name__}:too_long", r"maps \(2, 12, 1\) to \(2, 4\), not to \(2, 3\)"),
    ],
)
def test_an_unusable_model_is_named_with_the_reason(name, message):
    with pytest.raises(ModelError, match=message):
        build(name, **SIZES)
