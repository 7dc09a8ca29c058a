"""DLinear: a linear map of the window's trend plus one of what remains.

A. Zeng, M. Chen, L. Zhang and Q. Xu, *Are Transformers Effective for Time Series Forecasting?*,
AAAI 2023, https://arxiv.org/abs/2205.13504. Here the last value is taken off first and put back at
the end, since levels shift.
"""

import torch
from torch import Tensor, nn

TREND_STEPS = 9


class DLinear(nn.Module):
    def __init__(self, lookback: int, horizon: int, features: int) -> None:
        super().__init__()
        self.trend = nn.Linear(lookback * features, horizon)
        self.remainder = nn.Linear(lookback * features, horizon)
        for layer in (self.trend, self.remainder):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows (batch, lookback, features) to forecasts (batch, horizon).

        Column 0 is the metric; the forecast is in its unit.
        """
        last = x[:, -1:]
        centred = (x - last).transpose(1, 2)
        before = nn.functional.pad(centred, (TREND_STEPS - 1, 0), mode="replicate")
        trend = nn.functional.avg_pool1d(before, TREND_STEPS, stride=1)
        change = self.trend(trend.flatten(1)) + self.remainder((centred - trend).flatten(1))
        return torch.add(last[:, :, 0], change)


def build(
    *, lookback: int, horizon: int, features: int, hidden_size: int, num_layers: int
) -> nn.Module:
    """The factory that ``model`` names. A linear model has no use for the last two settings."""
    del hidden_size, num_layers
    return DLinear(lookback, horizon, features)
