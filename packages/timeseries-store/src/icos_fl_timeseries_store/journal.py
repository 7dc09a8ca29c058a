"""A file that holds one state: as it was once, then every change since. All bytes are checked.

The file starts with a block that carries the mark: how many bytes have been acknowledged. Frames
follow, each a magic word, a CRC32, a length and a payload. The first is the whole state; a change
is one more frame at the end, and on disk before the next is begun. So after a kill or a power cut
the last frame alone may be torn, and only behind the mark: any other fault is damage. From time to
time the state is written into a new file, which takes the old one's place in one step.
"""

import contextlib
import itertools
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from icos_fl_timeseries_store.errors import StoreDamaged

Parts = Sequence[bytes | memoryview]
"""A payload, in pieces, so that large arrays need not be copied together."""

FRAMES_AT: Final = 4096
_MAGIC: Final = b"ICOSFL\x00\x01"
_MARK_AT: Final = 16
_MARK: Final = struct.Struct("<QI")
_FRAME_MAGIC: Final = b"\xf1RAM"
_FRAME: Final = struct.Struct("<4sIQ")
_WRITE_BYTES: Final = 1 << 30
_COPY_BYTES: Final = 1 << 20
NEW: Final = ".new"
"""What the names of files end with that have not taken their place."""
_numbers = itertools.count()

_log = logging.getLogger(__name__)


class Journal:
    """An open file of frames. Not safe for threads: its owner takes turns.

    Every method that writes raises OSError; what it was told to write is then not there.
    """

    def __init__(self, path: Path, descriptor: int, end: int, aside: Path | None = None) -> None:
        self.path = path
        self.end = end
        """Bytes that are acknowledged: where the next frame starts."""
        self.spoilt = False
        """A write failed in a way that leaves unknown what the disk holds: start a new file."""
        self._descriptor = descriptor
        self._aside = aside

    @classmethod
    def beside(cls, path: Path, state: Parts) -> "Journal":
        """A new file beside *path* that holds *state*; ``take_place`` makes it the file at *path*.

        If it does not come to that, ``discard`` it.
        """
        aside = path.with_name(f"{path.name}.{next(_numbers)}{NEW}")
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            frame = _frame(state)
            end = _write(descriptor, FRAMES_AT, frame)
            _write(descriptor, 0, [_MAGIC.ljust(_MARK_AT, b"\0"), _mark(end)])
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            aside.unlink(missing_ok=True)
            raise
        return cls(path, descriptor, end, aside)

    def take_place(self, older: "Journal | None" = None, since: int = 0) -> None:
        """Become the file at the path, with all that *older* has got from byte *since* on.

        Raises OSError, and *older* stays. Where the folder alone cannot be synced, this is the file
        now, and spoilt: whatever is added needs another one first.
        """
        if self._aside is None:
            raise ValueError(f"{self.path} has its place")
        try:
            if older is not None and older.end > since:
                for at in range(since, older.end, _COPY_BYTES):
                    changes = os.pread(older._descriptor, min(_COPY_BYTES, older.end - at), at)
                    self.end = _write(self._descriptor, self.end, [changes])
                _write(self._descriptor, _MARK_AT, [_mark(self.end)])
                os.fsync(self._descriptor)
            self._aside.rename(self.path)
        except BaseException:
            self.discard()
            raise
        self._aside = None
        if older is not None:
            older.close()
        try:
            sync_folder(self.path.parent)
        except OSError as error:
            _log.error("folder not synced: folder=%s reason=%s", self.path.parent, error.strerror)
            self.spoilt = True

    @classmethod
    def open(cls, path: Path) -> tuple["Journal", list[memoryview]]:
        """The file at *path* and its payloads, the state first. Raises StoreDamaged, or OSError.

        A torn end, which nobody was told of as stored, is cut off with a line in the log.
        """
        data = path.read_bytes()
        found = scan(data)
        if found.damage:
            raise StoreDamaged(f"{path}: {found.damage}; icos-fl-store repair keeps what is intact")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if found.end < len(data):
                _log.warning(
                    "torn end cut off: file=%s bytes=%d kept=%d",
                    *(path, len(data) - found.end, found.end),
                )
                os.ftruncate(descriptor, found.end)
            # A killed process may have left the last frame in the page cache, unmarked.
            _write(descriptor, _MARK_AT, [_mark(found.end)])
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, found.end), found.payloads

    def append(self, change: Parts) -> None:
        """Add a frame; it is on disk when this returns."""
        try:
            end = _write(self._descriptor, self.end, _frame(change))
        except OSError:
            self.spoilt = True
            os.ftruncate(self._descriptor, self.end)
            self.spoilt = False
            raise
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self.spoilt = True  # the kernel may have dropped the pages: asking again proves nothing
            raise
        self.end = end
        with contextlib.suppress(OSError):  # it may lag: then a torn end is looked for in more
            _write(self._descriptor, _MARK_AT, [_mark(end)])

    def close(self) -> None:
        """Give the file back; nothing waits to be written."""
        os.close(self._descriptor)

    def discard(self) -> None:
        """Close and delete a file that has not taken its place."""
        self.close()
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Scan:
    """What a file's bytes hold."""

    payloads: list[memoryview]
    """Of every intact frame, wherever it is."""
    starts_with_state: bool
    end: int
    """Where the intact frames end, counted from the first."""
    damage: str
    """Why it is not what was acknowledged; empty if it is."""


def scan(data: bytes) -> Scan:
    """Look for frames in the *data* of a file, also behind such as are broken."""
    view = memoryview(data)
    payloads: list[memoryview] = []
    at, end = FRAMES_AT, -1
    behind = 0
    starts_with_state = False
    while at < len(data):
        payload = _payload_at(view, at)
        if payload is None:
            end = at if end < 0 else end
            at = data.find(_FRAME_MAGIC, at + 1)
            if at < 0:
                break
            continue
        starts_with_state |= at == FRAMES_AT
        behind += end >= 0
        payloads.append(payload)
        at += _FRAME.size + len(payload)
    end = end if end >= 0 else at
    return Scan(payloads, starts_with_state, end, _damage(data, end, behind))


def _damage(data: bytes, end: int, behind: int) -> str:
    if not data.startswith(_MAGIC):
        return "it does not start as the file of a store does"
    if behind:
        return f"a broken frame at byte {end}, with {behind} intact frames behind it"
    acknowledged = _acknowledged(data)
    if end < max(acknowledged, FRAMES_AT + 1):
        return f"it is intact up to byte {end}; {acknowledged} bytes were acknowledged"
    return ""


def _acknowledged(data: bytes) -> int:
    field = data[_MARK_AT : _MARK_AT + _MARK.size]
    if len(field) < _MARK.size:
        return 0
    end, checksum = _MARK.unpack(field)
    return int(end) if zlib.crc32(field[:8]) == checksum else 0


def _payload_at(data: memoryview, at: int) -> memoryview | None:
    if at + _FRAME.size > len(data):
        return None
    magic, checksum, length = _FRAME.unpack_from(data, at)
    start = at + _FRAME.size
    if magic != _FRAME_MAGIC or length > len(data) - start:
        return None
    if zlib.crc32(data[at + 8 : start + length]) != checksum:
        return None
    return data[start : start + length]


def _frame(payload: Parts) -> list[bytes | memoryview]:
    length = struct.pack("<Q", sum(len(part) for part in payload))
    checksum = zlib.crc32(length)
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    return [_FRAME_MAGIC + struct.pack("<I", checksum) + length, *payload]


def _mark(end: int) -> bytes:
    number = struct.pack("<Q", end)
    return number + struct.pack("<I", zlib.crc32(number))


def _write(descriptor: int, at: int, parts: Parts) -> int:
    """Write *parts* from byte *at* on, and return where they end."""
    for part in parts:
        left = memoryview(part)
        while len(left):
            written = os.pwrite(descriptor, left[:_WRITE_BYTES], at)
            left, at = left[written:], at + written
    return at


def sync_folder(folder: Path) -> None:
    """Have the names in *folder* survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
