"""A store in the memory of one process: for tests, and for the processor used as a library."""

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

from icos_fl_timeseries_store.buffer import RowBuffer
from icos_fl_timeseries_store.contract import (
    DEFAULT_CAPACITY_ROWS,
    Appended,
    ModelState,
    ModelVersion,
    Rows,
    Times,
    Values,
    Window,
    WindowInfo,
)
from icos_fl_timeseries_store.errors import UnknownNode
from icos_fl_timeseries_store.names import checked_name


class MemoryWindow:
    """A Window on a RowBuffer under one lock."""

    def __init__(self, capacity_rows: int) -> None:
        self._buffer = RowBuffer(capacity_rows)
        self._changed = threading.Condition()

    def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        with self._changed:
            appended = self._buffer.append(columns, times_ns_t, values_tf, units)
            self._changed.notify_all()
            return appended

    def read(self, *, last: int | None = None, after: int | None = None) -> Rows:
        with self._changed:
            return self._buffer.read(last=last, after=after)

    def info(self) -> WindowInfo:
        with self._changed:
            return self._buffer.info()

    def wait(self, after: int, timeout_seconds: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._buffer.cursor > after, timeout_seconds)
            return self._buffer.cursor

    def resize(self, capacity_rows: int) -> None:
        """Hold *capacity_rows* rows from now on."""
        with self._changed:
            self._buffer.resize(capacity_rows)


class MemoryModelState:
    """A ModelState of two references."""

    def __init__(self) -> None:
        self._versions: dict[str, ModelVersion] = {}

    def put(self, version: ModelVersion, *, best: bool = False) -> None:
        self._versions["latest"] = version
        if best:
            self._versions["best"] = version

    def get(self, which: Literal["latest", "best"] = "latest") -> ModelVersion | None:
        return self._versions.get(which)


class MemoryStore:
    """A Store whose content ends with it."""

    def __init__(self) -> None:
        self._windows: dict[str, MemoryWindow] = {}
        self._models: dict[tuple[str, str], MemoryModelState] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        self.nodes()

    def nodes(self) -> list[str]:
        with self._lock:
            return sorted(self._windows)

    def create_window(self, node: str, capacity_rows: int = DEFAULT_CAPACITY_ROWS) -> Window:
        with self._lock:
            window = self._windows.setdefault(checked_name(node), MemoryWindow(capacity_rows))
        window.resize(capacity_rows)
        return window

    def window(self, node: str) -> Window:
        with self._lock:
            if checked_name(node) not in self._windows:
                raise UnknownNode(node, sorted(self._windows))
            return self._windows[node]

    def model_state(self, owner: str, metric: str) -> ModelState:
        checked_name(f"{owner}.{metric}")
        with self._lock:
            return self._models.setdefault((owner, metric), MemoryModelState())

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
