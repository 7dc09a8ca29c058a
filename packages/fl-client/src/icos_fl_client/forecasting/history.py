"""What a node has seen of one metric, on a regular grid.

Shapes: t steps, oldest first. A gap of up to GAP_STEPS_MAX steps is bridged by the value before it,
for those who look back; a longer one begins a new *run*, and nobody looks or is judged across it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STEPS_MAX = 4096
"""Steps that are remembered. At 15 s a step these are 17 hours."""
GAP_STEPS_MAX = 4
"""Where a machine goes on as it was; after more nobody knows."""


class Newest:
    """The newest rows of what is appended, as one contiguous view."""

    def __init__(self, rows_max: int, *shape: int, dtype: Any = np.float64) -> None:
        self._rows_max = rows_max
        # The room at the end: when it is full the newest rows move to the front.
        self._rows = np.zeros((rows_max + max(rows_max // 8, 1), *shape), dtype)
        self._end = 0

    def __len__(self) -> int:
        return min(self._end, self._rows_max)

    @property
    def rows(self) -> NDArray[Any]:
        """Oldest first; the next ``append`` may overwrite them."""
        return self._rows[self._end - len(self) : self._end]

    def append(self, row: Any) -> None:
        if self._end == len(self._rows):
            kept = self._rows_max - 1
            self._rows[:kept] = self._rows[self._end - kept :].copy()
            self._end = kept
        self._rows[self._end] = row
        self._end += 1

    def fill(self, rows: NDArray[Any]) -> None:
        """Take *rows* in the place of all."""
        self._end = min(len(rows), self._rows_max)
        self._rows[: self._end] = rows[len(rows) - self._end :]


class History:
    """The newest steps of one metric."""

    def __init__(self, steps_max: int = STEPS_MAX) -> None:
        self.count = 0
        """Steps ever appended, which are numbered from 0."""
        self.row = np.nan
        """The newest row of the newest step, which tells where the machine is at its end."""
        self._values = Newest(steps_max)
        self._filled = Newest(steps_max)
        self._starts = Newest(steps_max, dtype=np.int64)
        self._gap = GAP_STEPS_MAX + 1

    @property
    def values_t(self) -> Array:
        """As they came, NaN where there was none."""
        return self._values.rows

    @property
    def filled_t(self) -> Array:
        """With short gaps bridged; NaN where a run is over."""
        return self._filled.rows

    @property
    def starts_t(self) -> NDArray[np.int64]:
        """Number of the first step of the run that each step is in."""
        return self._starts.rows

    def newest(self, steps: int) -> Array:
        """The newest *steps* bridged values of the run, or all if it is shorter."""
        if not self.count or np.isnan(self.filled_t[-1]):
            return np.zeros(0)
        return self.filled_t[-min(steps, self.count - int(self.starts_t[-1])) :]

    def append(self, value: float, row: float | None = None) -> None:
        """The next step and its newest *row*, if told; what is not finite is no value."""
        self.row = value if row is None else row
        present = bool(np.isfinite(value))
        if present and self._gap > GAP_STEPS_MAX:
            start = self.count
        else:
            start = int(self.starts_t[-1]) if self.count else 0
        self._gap = 0 if present else self._gap + 1
        bridged = value
        if not present:
            bridged = self.filled_t[-1] if 0 < self._gap <= GAP_STEPS_MAX else np.nan
        self._values.append(value if present else np.nan)
        self._filled.append(bridged)
        self._starts.append(start)
        self.count += 1

    def state(self) -> dict[str, NDArray[Any]]:
        """All that ``restore`` needs."""
        return {
            "values": self.values_t.copy(),
            "filled": self.filled_t.copy(),
            "starts": self.starts_t.copy(),
            "count-gap": np.array([self.count, self._gap]),
        }

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        self._values.fill(state["values"])
        self._filled.fill(state["filled"])
        self._starts.fill(state["starts"])
        self.count, self._gap = (int(number) for number in state["count-gap"])
