"""The classes that live in dataClay's backend. Their dependencies are the backend's: numpy.

Every method is a coroutine: the backend runs it on its one event loop, so a method without an
``await`` inside is atomic and any number of writers lose no row, which dataClay's own threads would
not give (it locks nothing). A waiting reader takes no thread either.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dataclay import DataClayObject, activemethod

from icos_fl_timeseries_store.buffer import RowBuffer
from icos_fl_timeseries_store.contract import (
    Appended,
    ModelVersion,
    Rows,
    Times,
    Values,
    WindowInfo,
)
from icos_fl_timeseries_store.metrics import measured

_waiting: defaultdict[Any, set[asyncio.Future[None]]] = defaultdict(set)
"""Who waits for new rows, by object id. Not part of the objects: it ends with the process."""

_FIRST_CURSOR = time.time_ns() // 1_000_000
"""Cursors of this process start here, above all that a killed one gave to rows that it lost: else a
reader would wait for a cursor that it has seen long ago, and miss what came since."""


async def _load(stored: DataClayObject, attribute: str) -> Any:
    """An attribute of *stored*, read from disk first where dataClay has unloaded the object.

    dataClay refuses to load on its event loop, so a thread touches the attribute there.
    """
    while not stored._dc_is_loaded:
        await asyncio.to_thread(getattr, stored, attribute)
    return getattr(stored, attribute)


class TimeSeriesData(DataClayObject):  # type: ignore[misc]
    """The sliding window of one node; ``contract.Window`` tells what its methods do."""

    rows: RowBuffer

    def __init__(self, capacity_rows: int) -> None:
        self.rows = RowBuffer(capacity_rows)

    async def _rows(self) -> RowBuffer:
        rows: RowBuffer = await _load(self, "rows")
        rows.cursor = max(rows.cursor, _FIRST_CURSOR)
        return rows

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        rows = await self._rows()
        appended = rows.append(columns, times_ns_t, values_tf, units)
        for waiting in _waiting.pop(self._dc_meta.id, ()):
            if not waiting.done():
                waiting.set_result(None)
        return appended

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def read(self, last: int | None = None, after: int | None = None) -> Rows:
        rows = await self._rows()
        return rows.read(last=last, after=after)

    @activemethod  # type: ignore[untyped-decorator]
    async def info(self) -> WindowInfo:
        rows = await self._rows()
        return rows.info()

    @activemethod  # type: ignore[untyped-decorator]
    async def resize(self, capacity_rows: int) -> None:
        rows = await self._rows()
        rows.resize(capacity_rows)

    @activemethod  # type: ignore[untyped-decorator]
    async def wait(self, after: int, timeout_seconds: float) -> int:
        rows = await self._rows()
        if rows.cursor <= after:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            _waiting[self._dc_meta.id].add(changed)
            await asyncio.wait([changed], timeout=timeout_seconds)
            _waiting[self._dc_meta.id].discard(changed)
            rows = await self._rows()
        return rows.cursor


class ModelState(DataClayObject):  # type: ignore[misc]
    """One metric's global model as one owner keeps it: its ``latest`` and ``best`` version."""

    versions: dict[str, ModelVersion]

    def __init__(self) -> None:
        self.versions = {}

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def put(self, version: ModelVersion, best: bool) -> None:
        versions = await _load(self, "versions")
        self.versions = {**versions, "latest": version, **({"best": version} if best else {})}

    @activemethod  # type: ignore[untyped-decorator]
    @measured
    async def get(self, which: str) -> ModelVersion | None:
        version: ModelVersion | None = (await _load(self, "versions")).get(which)
        return version
