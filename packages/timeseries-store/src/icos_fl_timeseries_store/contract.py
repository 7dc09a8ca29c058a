"""What every store offers. The in-memory store and the dataClay store pass one specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

# Shapes: t rows, f columns. Times are nanoseconds since 1970-01-01 UTC.
Times = NDArray[np.int64]
Values = NDArray[np.float64]

DEFAULT_CAPACITY_ROWS = 300


@dataclass(frozen=True)
class Rows:
    """Rows of a window, oldest first."""

    columns: tuple[str, ...]
    units: tuple[str, ...]
    """One a column; empty where unknown."""
    times_ns_t: Times
    """Strictly increasing."""
    values_tf: Values
    """NaN where a row has no value in a column."""
    cursor: int
    """Give it to ``read`` or ``wait`` to get what changed after these rows."""


@dataclass(frozen=True)
class Appended:
    """What became of the rows of one append."""

    added: int
    """Rows with a timestamp that was not there."""
    merged: int
    """Rows whose timestamp was there: their values were written over it, NaN excepted."""
    too_old: int
    """Rows older than the oldest row of a full window: not stored."""
    removed: int
    """Oldest rows that left the window to make room."""
    cursor: int
    """The window's cursor after the append."""


@dataclass(frozen=True)
class WindowInfo:
    """A window without its rows."""

    rows: int
    capacity_rows: int
    columns: tuple[str, ...]
    units: tuple[str, ...]
    first_time_ns: int | None
    last_time_ns: int | None
    cursor: int


class Window(Protocol):
    """The newest rows of one node, at most ``capacity_rows`` of them, in order of time.

    Every method may raise StoreUnavailable. Any number of threads and processes may call at once:
    an append happens wholly or not at all, and none is lost. In dataClay, what an append has
    answered survives the death of any process and of the machine.
    """

    def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        """Upsert rows by time, in any order; a later row of the same time wins, value by value.

        A column that the window lacks is added; rows without it read as NaN. NaN never overwrites a
        value. *units* gives the unit of columns, by name; it is kept.

        Raises InvalidRows for shapes that do not fit, a column name twice, a time ≤ 0, or an
        infinite value.
        """
        ...

    def read(self, *, last: int | None = None, after: int | None = None) -> Rows:
        """All rows, or the newest *last*, or those that were added or changed after the cursor."""
        ...

    def info(self) -> WindowInfo:
        """What the window holds, without its rows."""
        ...

    def wait(self, after: int, timeout_seconds: float) -> int:
        """Return the cursor as soon as it is above *after*, or what it is at the timeout."""
        ...


@dataclass(frozen=True)
class ModelVersion:
    """One version of the global model of a metric."""

    round: int
    """The federated round that made it; 0 is the initial model."""
    weights: Mapping[str, NDArray[np.float32]]
    config: Mapping[str, str | int | float | bool]
    """The run configuration that is needed to build the model again."""
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Facts about it, such as ``eval-loss`` or ``created-unix-s``."""


class ModelState(Protocol):
    """Versions of the global model of one metric, as an owner (a node, the server) keeps them."""

    def put(self, version: ModelVersion, *, best: bool = False) -> None:
        """Keep *version* as the latest, and as the best if told so. Any round may follow any."""
        ...

    def get(self, which: Literal["latest", "best"] = "latest") -> ModelVersion | None:
        """The latest or the best version; None while there is none."""
        ...


class Store(Protocol):
    """A store of windows and model states. Close it, or use it as a context manager."""

    def check(self) -> None:
        """Return if every part of the store answers now; raises StoreUnavailable."""
        ...

    def nodes(self) -> list[str]:
        """Names of the nodes that have a window, sorted."""
        ...

    def create_window(self, node: str, capacity_rows: int = DEFAULT_CAPACITY_ROWS) -> Window:
        """The window of *node*, made if it is not there.

        A window that is there takes the new capacity; its oldest rows go if it shrinks.
        """
        ...

    def window(self, node: str) -> Window:
        """The window of *node*; raises UnknownNode if it has none."""
        ...

    def model_state(self, owner: str, metric: str) -> ModelState:
        """The model state of *metric* that *owner* keeps, made if it is not there."""
        ...

    def close(self) -> None:
        """Give back the connection."""
        ...

    def __enter__(self) -> "Store": ...

    def __exit__(self, *exc: object) -> None: ...
