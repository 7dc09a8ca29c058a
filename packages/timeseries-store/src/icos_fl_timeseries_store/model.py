"""The classes that live in dataClay's backend. Their dependencies are the backend's: numpy.

The objects themselves hold nothing but names: what they are about is in the backend's state folder,
found by the alias. So whatever dataClay forgets or remembers of an object, its rows are there.

Every method is a coroutine: the backend runs it on its one event loop, so a method is atomic up to
its first ``await`` and any number of writers lose no row, which dataClay's own threads would not
give (it locks nothing). A waiting reader takes no thread either.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from uuid import UUID

from dataclay import DataClayObject, activemethod
from dataclay.config import settings
from dataclay.exceptions import ObjectNotFound

from icos_fl_timeseries_store.contract import (
    Appended,
    ModelVersion,
    Rows,
    Times,
    Values,
    WindowInfo,
)
from icos_fl_timeseries_store.durable import DurableModelState, DurableWindow, StateFolder
from icos_fl_timeseries_store.metrics import measured
from icos_fl_timeseries_store.names import object_id


@cache
def _folder() -> StateFolder:
    """The backend's; nothing else calls the methods here."""
    return StateFolder(Path(settings.storage_path))


@cache
def _aliases() -> dict[UUID, str]:
    """Of all objects that have had a file, in this process or before."""
    return {object_id(alias): alias for alias in _folder().aliases()}


_used: dict[UUID, DataClayObject] = {}
"""Objects that were called. dataClay would forget one that it has not loaded, and look it up in the
key-value store for every call."""


def _alias_of(stored: DataClayObject) -> str:
    """Raises ObjectNotFound for an object that another process had, and never wrote."""
    number = stored._dc_meta.id
    if number not in _aliases():
        if not stored._dc_is_loaded:
            raise ObjectNotFound(number)
        _aliases()[number] = stored.alias
    _used[number] = stored
    return _aliases()[number]


class TimeSeriesData(DataClayObject):  # type: ignore[misc]
    """The sliding window of one node; ``contract.Window`` tells what its methods do."""

    alias: str
    capacity_rows: int

    def __init__(self, alias: str, capacity_rows: int) -> None:
        self._dc_meta.id = object_id(alias)
        self.alias = alias
        self.capacity_rows = capacity_rows

    async def _window(self) -> DurableWindow:
        alias = _alias_of(self)
        try:
            capacity_rows = self.capacity_rows if self._dc_is_loaded else None
            return await _folder().window(alias, capacity_rows)
        except KeyError:
            raise ObjectNotFound(self._dc_meta.id) from None

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        window = await self._window()
        return await window.append(columns, times_ns_t, values_tf, units)

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def read(self, last: int | None = None, after: int | None = None) -> Rows:
        window = await self._window()
        return window.read(last, after)

    @activemethod  # type: ignore[untyped-decorator]
    async def info(self) -> WindowInfo:
        window = await self._window()
        return window.info()

    @activemethod  # type: ignore[untyped-decorator]
    async def resize(self, capacity_rows: int) -> None:
        window = await self._window()
        await window.resize(capacity_rows)

    @activemethod  # type: ignore[untyped-decorator]
    async def wait(self, after: int, timeout_seconds: float) -> int:
        window = await self._window()
        return await window.wait(after, timeout_seconds)

    @activemethod  # type: ignore[untyped-decorator]
    async def repair(self) -> str:
        """Set a damaged file aside and keep what is intact of it; says what was done."""
        return await _folder().repair(_alias_of(self))


class ModelState(DataClayObject):  # type: ignore[misc]
    """One metric's global model as one owner keeps it: its ``latest`` and ``best`` version."""

    alias: str

    def __init__(self, alias: str) -> None:
        self._dc_meta.id = object_id(alias)
        self.alias = alias

    async def _state(self) -> DurableModelState:
        return await _folder().model_state(_alias_of(self))

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def put(self, version: ModelVersion, best: bool) -> None:
        state = await self._state()
        await state.put(version, best)

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def get(self, which: str) -> ModelVersion | None:
        state = await self._state()
        return state.get(which)
