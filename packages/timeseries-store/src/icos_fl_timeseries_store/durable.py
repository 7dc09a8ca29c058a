"""Windows and model states that survive: in memory to be read, on disk before a write is answered.

All of it runs on one event loop; threads only write and sync. What a writer is told is stored has
been written and synced before, and is in the window only then: nobody reads what could be lost.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from icos_fl_timeseries_store import codec
from icos_fl_timeseries_store.buffer import CAPACITY_ROWS_MAX, RowBuffer, check_capacity
from icos_fl_timeseries_store.contract import (
    DEFAULT_CAPACITY_ROWS,
    Appended,
    ModelVersion,
    Rows,
    Times,
    Values,
    WindowInfo,
)
from icos_fl_timeseries_store.errors import StoreDamaged, StoreError, StoreFull, StoreUnavailable
from icos_fl_timeseries_store.journal import FRAMES_AT, NEW, Journal, scan, sync_folder
from icos_fl_timeseries_store.names import MODEL, WINDOW

WAITING_BYTES_MAX: Final = 64 << 20
"""Of all that waits for the disk; one that is larger may come alone."""
JOURNAL_BYTES_MIN: Final = 1 << 20
"""A journal is not written anew before its changes take this many bytes."""
JOURNAL_FACTOR: Final = 2
"""Nor before they take this many times what the window takes: so the cost of an append is the same
for every size of a window."""

FIRST_CURSOR: Final = time.time_ns() // 1_000_000
"""Cursors of this process start here, above all that went with an end that was cut off: else a
reader would wait for a cursor that it has seen long ago, and miss what came since."""

_SUFFIX: Final = ".state"

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Budget:
    """Bytes that wait for the disk."""

    used: int = 0


@dataclass
class _Waiting:
    change: codec.Change
    size_bytes: int
    stored: "asyncio.Future[Any]" = field(default_factory=asyncio.Future)


class DurableWindow:
    """The window of one node. ``contract.Window`` tells what its methods do.

    Changes that come while the disk is busy go to it together. Writing it anew, when its file has
    grown, happens beside the appends.
    """

    def __init__(self, node: str, rows: RowBuffer, journal: Journal, budget: Budget) -> None:
        self._node = node
        self._rows = rows
        self._journal = journal
        self._budget = budget
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None
        self._compacting: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._readers: set[asyncio.Future[None]] = set()
        self._compact_at = _compact_at(journal.end)

    @classmethod
    def create(cls, node: str, path: Path, rows: RowBuffer, budget: Budget) -> "DurableWindow":
        """A window that has no file yet. Raises OSError. Blocks."""
        journal = Journal.beside(path, codec.window_to_parts(rows.snapshot()))
        journal.take_place()
        return cls(node, rows, journal, budget)

    @classmethod
    def load(cls, node: str, path: Path, budget: Budget) -> "DurableWindow":
        """The window that is in a file. Raises StoreDamaged, OSError. Blocks."""
        journal, payloads = Journal.open(path)
        window = cls(node, replayed(payloads), journal, budget)
        window._compact_at = _compact_at(FRAMES_AT + len(payloads[0]))
        return window

    async def append(
        self,
        columns: Sequence[str],
        times_ns_t: Times,
        values_tf: Values,
        units: Mapping[str, str] | None = None,
    ) -> Appended:
        times, values = self._rows.check(columns, times_ns_t, values_tf)
        new = codec.NewRows(tuple(columns), times, values, dict(units or {}))
        appended: Appended = await self._store(new, times.nbytes + values.nbytes)
        return appended

    async def resize(self, capacity_rows: int) -> None:
        check_capacity(capacity_rows)
        if capacity_rows != self._rows.capacity_rows:
            await self._store(codec.NewCapacity(capacity_rows), 0)

    def read(self, last: int | None = None, after: int | None = None) -> Rows:
        return self._rows.read(last=last, after=after)

    def info(self) -> WindowInfo:
        return self._rows.info()

    async def wait(self, after: int, timeout_seconds: float) -> int:
        if self._rows.cursor <= after:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._readers.add(changed)
            await asyncio.wait([changed], timeout=timeout_seconds)
            self._readers.discard(changed)
        return self._rows.cursor

    async def close(self) -> None:
        """Wait for what is being written, and give the file back."""
        for task in (self._writing, self._compacting):
            if task is not None:
                await task
        self._journal.close()

    async def _store(self, change: codec.Change, size_bytes: int) -> Any:
        if self._budget.used and self._budget.used + size_bytes > WAITING_BYTES_MAX:
            raise StoreFull(
                f"{self._budget.used} bytes wait for the disk; at most {WAITING_BYTES_MAX} may"
            )
        waiting = _Waiting(change, size_bytes)
        self._budget.used += size_bytes
        self._waiting.append(waiting)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await waiting.stored

    async def _write(self) -> None:
        while self._waiting:
            async with self._turn:
                batch, self._waiting = self._waiting, []
                try:
                    await self._commit(batch)
                except Exception as error:  # whoever waits must hear of it, whatever it is
                    if not isinstance(error, StoreError):
                        _log.exception("commit failed: node=%s", self._node)
                        error = StoreUnavailable(f"window of {self._node}: {error!r}")
                    for waiting in batch:
                        _settle(waiting.stored, error)
                finally:
                    self._budget.used -= sum(waiting.size_bytes for waiting in batch)

    async def _commit(self, batch: list[_Waiting]) -> None:
        """Put *batch* on disk, then into the window."""
        try:
            if self._journal.spoilt:
                await self._start_anew()
            parts = codec.changes_to_parts(self._rows.cursor, [item.change for item in batch])
            await asyncio.to_thread(self._journal.append, parts)
        except OSError as error:
            raise StoreFull(
                f"window of {self._node} cannot be written: {error.strerror}: {self._journal.path}"
            ) from None
        for waiting in batch:
            try:
                _settle(waiting.stored, waiting.change.apply(self._rows))
            except StoreError as error:
                _settle(waiting.stored, error)
        for changed in self._readers:
            _settle(changed, None)
        self._readers.clear()
        if self._journal.end > self._compact_at:
            self._compact()

    async def _start_anew(self) -> None:
        """Write all rows into a new file, as what is in the old one is unknown."""
        state = codec.window_to_parts(self._rows.snapshot())
        fresh = await asyncio.to_thread(Journal.beside, self._journal.path, state)
        await asyncio.to_thread(fresh.take_place)
        self._journal.close()
        self._journal = fresh
        self._compact_at = _compact_at(fresh.end)
        if fresh.spoilt:
            raise OSError(5, "the folder cannot be synced")

    def _compact(self) -> None:
        """Begin to write the window into a new file, without the changes that led to it."""
        if self._compacting is None or self._compacting.done():
            since = self._journal
            state = codec.window_to_parts(self._rows.snapshot())
            self._compacting = asyncio.create_task(self._finish_compacting(since, since.end, state))

    async def _finish_compacting(self, older: Journal, since: int, state: Any) -> None:
        fresh = None
        try:
            fresh = await asyncio.to_thread(Journal.beside, older.path, state)
            async with self._turn:
                if older is self._journal and not older.spoilt:
                    state_end = fresh.end
                    await asyncio.to_thread(fresh.take_place, older, since)
                    self._journal, fresh = fresh, None
                    self._compact_at = _compact_at(state_end)
        except OSError as error:
            fresh = None  # it has closed itself
            self._compact_at = self._journal.end + JOURNAL_BYTES_MIN
            _log.warning("journal not written anew: node=%s reason=%s", self._node, error.strerror)
        finally:
            if fresh is not None:
                fresh.discard()


def _compact_at(state_end: int) -> int:
    return state_end + max(JOURNAL_BYTES_MIN, JOURNAL_FACTOR * state_end)


def _settle(future: "asyncio.Future[Any]", outcome: object) -> None:
    """Give *future* its result, or its error, unless whoever waited has gone."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def replayed(payloads: Sequence[memoryview]) -> RowBuffer:
    """The window of a journal's frames: its state, then its changes."""
    rows = RowBuffer.restored(codec.window_from_payload(payloads[0]))
    for payload in payloads[1:]:
        _replay(payload, rows)
    rows.cursor = max(rows.cursor, FIRST_CURSOR)
    return rows


def _replay(payload: memoryview, rows: RowBuffer) -> None:
    cursor, changes = codec.changes_from_payload(payload)
    rows.cursor = max(rows.cursor, cursor)
    for change in changes:
        with contextlib.suppress(StoreError):  # it was refused when it was new, too
            change.apply(rows)


class DurableModelState:
    """Versions of a model by name, in one file that is replaced as a whole."""

    def __init__(self, path: Path, versions: Mapping[str, ModelVersion], damage: str = "") -> None:
        self._path = path
        self._versions = dict(versions)
        self._damage = damage
        self._turn = asyncio.Lock()

    @classmethod
    def load(cls, path: Path) -> "DurableModelState":
        """What is at *path*: nothing yet, versions, or a damaged file. Raises OSError. Blocks."""
        if not path.exists():
            return cls(path, {})
        try:
            journal, payloads = Journal.open(path)
        except StoreDamaged as error:
            _log.error("model state damaged: %s", error)
            return cls(path, {}, str(error))
        journal.close()
        return cls(path, codec.models_from_payload(payloads[0]))

    async def put(self, version: ModelVersion, best: bool) -> None:
        """Keep *version*. A damaged file is set aside: the next round's model takes its place."""
        async with self._turn:
            kept = {**self._versions, "latest": version, **({"best": version} if best else {})}
            try:
                await asyncio.to_thread(self._replace, codec.models_to_parts(kept))
            except OSError as error:
                raise StoreFull(
                    f"model state cannot be written: {error.strerror}: {self._path}"
                ) from None
            self._versions, self._damage = kept, ""

    def get(self, which: str) -> ModelVersion | None:
        """Raises StoreDamaged while the file is, until the next ``put``."""
        if self._damage:
            raise StoreDamaged(self._damage)
        return self._versions.get(which)

    def _replace(self, state: Any) -> None:
        if self._damage:
            _set_aside(self._path)
        journal = Journal.beside(self._path, state)
        journal.take_place()
        journal.close()
        if journal.spoilt:
            raise OSError(5, "the folder cannot be synced")


def _set_aside(path: Path) -> Path:
    """Give the file at *path* a second name, which it keeps when another takes its place."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    aside.hardlink_to(path)
    return aside


class StateFolder:
    """The windows and model states of one folder, each opened when it is first asked for.

    Files are named for what they hold, not for objects of dataClay: whatever it forgets of them,
    they are found.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = {WINDOW: folder / "windows", MODEL: folder / "models"}
        for part in self._paths.values():
            part.mkdir(parents=True, exist_ok=True)
            for left in part.glob(f"*{NEW}"):
                left.unlink()
        sync_folder(folder)
        self._budget = Budget()
        self._opened: dict[str, asyncio.Task[Any]] = {}

    def aliases(self) -> list[str]:
        """Of all that has a file."""
        return [
            prefix + path.name.removesuffix(_SUFFIX)
            for prefix, folder in self._paths.items()
            for path in sorted(folder.glob(f"*{_SUFFIX}"))
        ]

    def path(self, alias: str) -> Path:
        """The file of *alias*."""
        prefix = WINDOW if alias.startswith(WINDOW) else MODEL
        return self._paths[prefix] / (alias.removeprefix(prefix) + _SUFFIX)

    async def window(self, alias: str, capacity_rows: int | None) -> DurableWindow:
        """The window of *alias*; where it has no file, a new one of *capacity_rows*.

        Raises KeyError where it has none and no capacity is given; StoreDamaged, StoreFull.
        """
        path, node = self.path(alias), alias.removeprefix(WINDOW)
        if alias not in self._opened and capacity_rows is None and not path.exists():
            raise KeyError(alias)

        def open_it() -> DurableWindow:
            if capacity_rows is None or path.exists():
                return DurableWindow.load(node, path, self._budget)
            rows = RowBuffer(capacity_rows)
            rows.cursor = FIRST_CURSOR
            return DurableWindow.create(node, path, rows, self._budget)

        return await self._open(alias, open_it)

    async def model_state(self, alias: str) -> DurableModelState:
        """The model state of *alias*; it gets a file with its first version."""
        return await self._open(alias, lambda: DurableModelState.load(self.path(alias)))

    async def repair(self, alias: str) -> str:
        """Set the damaged file of a window aside, keep what is intact; says what was done."""
        opening = self._opened.get(alias)
        with contextlib.suppress(StoreError):
            if opening is not None:
                await opening
                return "it is not damaged"
        report = await asyncio.to_thread(self._repair, alias)
        self._opened.pop(alias, None)
        return report

    def _repair(self, alias: str) -> str:
        path = self.path(alias)
        found = scan(path.read_bytes())
        if not found.damage:
            return "it is not damaged"
        if found.starts_with_state:
            rows = replayed(found.payloads)
        else:
            rows = RowBuffer(CAPACITY_ROWS_MAX)
            for payload in found.payloads:
                _replay(payload, rows)
            rows.resize(max(len(rows), DEFAULT_CAPACITY_ROWS))
            rows.cursor = max(rows.cursor, FIRST_CURSOR)
        fresh = Journal.beside(path, codec.window_to_parts(rows.snapshot()))
        aside = _set_aside(path)
        fresh.take_place()
        fresh.close()
        return f"{len(rows)} rows kept; the damaged file is now {aside}"

    async def _open(self, alias: str, open_it: Callable[[], T]) -> T:
        """Open once, whoever asks meanwhile; damage stays known, what passes is tried again."""
        if alias not in self._opened:
            self._opened[alias] = asyncio.create_task(asyncio.to_thread(open_it))
        opening = self._opened[alias]
        try:
            # The caller may be cancelled; the others go on waiting.
            opened: T = await asyncio.shield(opening)
            return opened
        except StoreError:
            raise
        except OSError as error:
            if self._opened.get(alias) is opening:
                del self._opened[alias]
            raise StoreFull(
                f"{alias} cannot be opened: {error.strerror}: {self.path(alias)}"
            ) from None
        except Exception as error:
            raise StoreDamaged(f"{self.path(alias)} is of another version: {error!r}") from error
