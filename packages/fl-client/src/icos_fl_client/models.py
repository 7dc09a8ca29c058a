"""Torch modules that forecast one metric, and how to name one's own.

Shapes: b windows of a batch, l steps of input (lookback), f columns, h steps to forecast (horizon),
a anchors. Values are z-scores by the training part's statistics; column 0 is the metric itself.
"""

import importlib
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from icos_fl_client.forecasting.anchor_lstm import SCALE_MIN, TOKEN_MAX, anchors

DROPOUT = 0.2
# Logit of repeating the last value before training, where the other anchors start at 0.
LAST_VALUE_LOGIT = 4.0


class ModelError(Exception):
    """A model that cannot be loaded or built; the message names it and says why."""


class ModelFactory(Protocol):
    """What ``model = "module:factory"`` of the run configuration names.

    The module that it returns maps a window (b, l, f) to the metric's next values (b, h), in the
    unit of column 0.
    """

    def __call__(
        self, *, lookback: int, horizon: int, features: int, hidden_size: int, num_layers: int
    ) -> nn.Module: ...


def build(
    model: str, *, lookback: int, horizon: int, features: int, hidden_size: int, num_layers: int
) -> nn.Module:
    """Import *model* ("module:factory"), call it, and check the shape of what its module returns.

    Raises ModelError.
    """
    try:
        module = _factory(model)(
            lookback=lookback,
            horizon=horizon,
            features=features,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {model!r} cannot be built: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"model {model!r} made a {type(module).__name__}, not a torch.nn.Module")
    _check_output(model, module, (2, lookback, features), (2, horizon))
    return module


def _factory(model: str) -> Callable[..., object]:
    module_name, colon, name = model.partition(":")
    if not (colon and module_name and name):
        raise ModelError(f"model {model!r} is not of the form module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except AttributeError as error:
        raise ModelError(f"model {model!r}: {module_name} has no {name}") from error
    except Exception as error:
        raise ModelError(f"model {model!r}: cannot import {module_name}: {error}") from error
    if not callable(factory):
        raise ModelError(f"model {model!r} is not callable")
    return cast(Callable[..., object], factory)


def _check_output(
    model: str, module: nn.Module, input_shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(input_shape))
    except Exception as error:
        raise ModelError(f"model {model!r} fails on input {input_shape}: {error}") from error
    module.train(was_training)
    if not isinstance(output, Tensor) or tuple(output.shape) != expected:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"model {model!r} maps {input_shape} to {got}, not to {expected}")


class AnchorLSTM(nn.Module):
    """An LSTM that reads the shape of the window and mixes anchors, one mixture a step ahead.

    The anchors are the last value, means of the last values and damped drifts. The mixture is
    convex, so a forecast cannot leave the range of the anchors: levels shift between sessions, and
    an unbounded output leaves its training range there. For the same reason the LSTM sees
    (x - last) / spread of the window and no absolute level. Untrained, it nearly repeats the last
    value; on a flat window it does so exactly, whatever its weights. Without torch it is
    icos_fl_client.forecasting.anchor_lstm.
    """

    anchors_hal: Tensor

    def __init__(
        self, *, lookback: int, horizon: int, features: int, hidden_size: int, num_layers: int
    ) -> None:
        super().__init__()
        self.horizon = horizon
        # Not part of the weights: nodes exchange what they learn, not constants.
        anchors_hal = torch.tensor(anchors(lookback, horizon), dtype=torch.float32)
        self.register_buffer("anchors_hal", anchors_hal, persistent=False)
        self.lstm = nn.LSTM(features, hidden_size, num_layers, batch_first=True)
        self.dropout = nn.Dropout(DROPOUT)
        count = self.anchors_hal.shape[1]
        self.head = nn.Linear(hidden_size, horizon * count)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()
            self.head.bias.view(horizon, count)[:, 0] = LAST_VALUE_LOGIT

    def forward(self, x_blf: Tensor) -> Tensor:
        """Map windows (b, l, f) to forecasts (b, h), both z-scores."""
        last_b1f = x_blf[:, -1:]
        centred_blf = x_blf - last_b1f
        scale_b1f = centred_blf.abs().mean(dim=1, keepdim=True).clamp_min(SCALE_MIN)
        tokens_blf = (centred_blf / scale_b1f).clamp(-TOKEN_MAX, TOKEN_MAX)
        _, (state, _) = self.lstm(tokens_blf)
        logits_bha = self.head(self.dropout(state[-1])).view(len(x_blf), self.horizon, -1)
        anchors_bha = torch.einsum("bl,hal->bha", centred_blf[:, :, 0], self.anchors_hal)
        change_bh = (logits_bha.softmax(dim=-1) * anchors_bha).sum(dim=-1)
        return cast(Tensor, last_b1f[:, :, 0] + change_bh)
