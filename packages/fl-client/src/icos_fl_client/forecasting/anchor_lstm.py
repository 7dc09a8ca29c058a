"""The default model without torch: a forward pass from the arrays of a checkpoint.

Shapes: l steps of a window (lookback), h steps ahead (horizon), a anchors, g the four gates of u
hidden units; b windows of a batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icos_fl_client.forecasting.forecasters import Steps
from icos_fl_client.forecasting.history import Array, History

SCALE_MIN = 1e-3
"""A window that moves less than this (in standard deviations of the training part) is flat."""
TOKEN_MAX = 10.0
MEAN_STEPS = (2, 4, 8, 16, 32)
DRIFT_STEPS = (8,)
DRIFT_DAMPING = 0.9


def anchors(lookback: int, horizon: int) -> Array:
    """Simple forecasts as weights (h, a, l) of the window's values minus the last one.

    The first is the last value (all weights 0), then come means and drifts, plain and damped.
    """
    means = sorted({*(k for k in MEAN_STEPS if k < lookback), lookback})
    rows_al = np.zeros((1 + len(means), lookback))
    for row_l, steps in zip(rows_al[1:], means, strict=True):
        row_l[-steps:] = 1 / steps
    anchors_hal = [np.repeat(rows_al[None], horizon, axis=0)]
    ahead_h = np.arange(1, horizon + 1)
    damped_h = DRIFT_DAMPING * (1 - DRIFT_DAMPING**ahead_h) / (1 - DRIFT_DAMPING)
    for steps in sorted({min(k, lookback - 1) for k in DRIFT_STEPS} - {0}):
        slope_l = np.zeros(lookback)
        slope_l[-1 - steps] = -1 / steps
        anchors_hal += [each_h[:, None, None] * slope_l for each_h in (ahead_h, damped_h)]
    return np.concatenate(anchors_hal, axis=1)


class AnchorLSTM:
    """``icos_fl_client.models:AnchorLSTM`` of one input column, in evaluation mode.

    *weights* are its state by name, *lookback* that of its run, *deviation* the standard deviation
    by which the metric was normalised in training. Raises ValueError for weights that are not of
    such a model.
    """

    names = ("model",)

    def __init__(
        self, weights: Mapping[str, NDArray[Any]], *, lookback: int, deviation: float = 1.0
    ) -> None:
        self._lookback = lookback
        self._least_scale = SCALE_MIN * deviation
        try:
            self._layers = [
                [
                    np.asarray(weights[f"lstm.{kind}_l{layer}"], np.float64)
                    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                for layer in range(sum(name.startswith("lstm.weight_ih_l") for name in weights))
            ]
            self._head_gu = np.asarray(weights["head.weight"], np.float64)
            self._bias_g = np.asarray(weights["head.bias"], np.float64)
        except KeyError as error:
            raise ValueError(f"the weights have no {error}") from None
        count = anchors(lookback, 1).shape[1]
        horizon = len(self._bias_g) // count
        if (
            not self._layers
            or self._layers[0][0].shape[1] != 1
            or horizon * count != len(self._bias_g)
        ):
            shapes = {name: array.shape for name, array in weights.items()}
            raise ValueError(f"{shapes} is no model of one column and {lookback} steps of input")
        self._anchors_hal = anchors(lookback, horizon)

    def forecast(self, history: History, steps_h: Steps) -> Array:
        """Forecasts (1, h); NaN where the run is shorter than the lookback, or h is too far."""
        window_l = history.newest(self._lookback)
        yhat_h = np.full(len(steps_h), np.nan)
        if len(window_l) == self._lookback:
            reached_h = steps_h <= len(self._anchors_hal)
            yhat_h[reached_h] = self.predict(window_l[None])[0][steps_h[reached_h] - 1]
        return yhat_h[None]

    def predict(self, window_bl: Array) -> Array:
        """What follows each window, all steps ahead (b, h), in the unit of the windows."""
        last_b1 = window_bl[:, -1:]
        centred_bl = window_bl - last_b1
        scale_b1 = np.abs(centred_bl).mean(axis=1, keepdims=True)
        tokens_bl = centred_bl / np.maximum(scale_b1, self._least_scale)
        state_bu = self._read(np.clip(tokens_bl, -TOKEN_MAX, TOKEN_MAX))
        horizon, count, _ = self._anchors_hal.shape
        logits_bha = (state_bu @ self._head_gu.T + self._bias_g).reshape(-1, horizon, count)
        weights_bha = np.exp(logits_bha - logits_bha.max(axis=-1, keepdims=True))
        weights_bha /= weights_bha.sum(axis=-1, keepdims=True)
        anchors_bha = np.einsum("bl,hal->bha", centred_bl, self._anchors_hal)
        return np.asarray(last_b1 + (weights_bha * anchors_bha).sum(axis=-1))

    def _read(self, tokens_bl: Array) -> Array:
        """The last hidden state (b, u) of the last layer."""
        inputs = tokens_bl.T[:, :, None]
        for input_gi, hidden_gu, input_bias_g, hidden_bias_g in self._layers:
            drive_lbg = inputs @ input_gi.T + (input_bias_g + hidden_bias_g)
            units = hidden_gu.shape[1]
            # A sigmoid is 0.5 (1 + tanh(x / 2)), so one tanh does for all four gates.
            slope_g = np.repeat([0.5, 0.5, 1.0, 0.5], units)
            state_bu = cell_bu = np.zeros((len(tokens_bl), units))
            states = []
            for drive_bg in drive_lbg:
                bent_bg = np.tanh(slope_g * (drive_bg + state_bu @ hidden_gu.T))
                open_bg = 0.5 * (1 + bent_bg)
                opened_bu, kept_bu = open_bg[:, :units], open_bg[:, units : 2 * units]
                cell_bu = kept_bu * cell_bu + opened_bu * bent_bg[:, 2 * units : 3 * units]
                state_bu = open_bg[:, 3 * units :] * np.tanh(cell_bu)
                states.append(state_bu)
            inputs = np.stack(states)
        return np.asarray(inputs[-1])
