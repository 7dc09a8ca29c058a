"""A node's sequences as they come from the processor, and the way back to units."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """Consecutive steps without a gap."""

    first_time_ns: int
    interval_ns: int
    rows_tf: NDArray[np.float32]
    """Normalised; the first column is the metric."""

    @property
    def times_ns_t(self) -> NDArray[np.int64]:
        return self.first_time_ns + np.arange(len(self.rows_tf)) * self.interval_ns


@dataclass(frozen=True)
class Scale:
    """Of the metric: value = normalised * standard_deviation + mean."""

    unit: str
    mean: float
    standard_deviation: float

    def restore(self, normalised: NDArray[np.floating]) -> NDArray[np.float64]:
        """In the metric's unit."""
        return normalised.astype(np.float64) * self.standard_deviation + self.mean


@dataclass(frozen=True)
class Sequences:
    """What there is to learn one metric from: runs of the training and the validation part."""

    metric: str
    train: list[Run]
    validation: list[Run]
    scale: Scale
    lookback: int
    horizon: int
    interval_ns: int
    train_sequences: int
    validation_sequences: int


@dataclass(frozen=True)
class Latest:
    """The input of the forecast that starts now."""

    rows_lf: NDArray[np.float32]
    scale: Scale
    interval_ns: int
    last_time_ns: int
