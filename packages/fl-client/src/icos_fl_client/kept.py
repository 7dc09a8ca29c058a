"""Steps that a node keeps from round to round, in files: each round is a process of its own.

One file a series, written beside and renamed, so a process that is killed leaves a whole file or
none. Whatever is wrong with a file costs all steps being asked for again, and no more.
"""

import contextlib
import hashlib
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

UNUSED_SECONDS_MAX = 86_400.0
"""Files that no round used for so long are removed."""

# Magic, name of the series, columns, bytes of the version; then the CRC-32 of those and all that
# follows, and zeros up to where values are aligned.
_HEAD = struct.Struct("<8s32sII")
_CHECK = struct.Struct("<I4x")
_SUFFIX = ".steps"
_MAGIC = b"icosfl\x00\x01"

log = structlog.get_logger()


Values = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """Steps of a series, s of them in f columns, in the columns' units."""

    version: bytes
    """The processor's name for exactly these steps."""
    values_sf: Values
    """A view on the file, where it comes from one."""


NO_STEPS = Steps(b"", np.empty((0, 1)))


class KeptSteps:
    """The steps in *folder*, which nobody but the node's own processes may write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, series: bytes) -> Steps | None:
        """What was kept under the name *series*; None for nothing, or nothing whole."""
        path = self._path(series)
        try:
            with path.open("rb") as file:
                os.utime(file.fileno())
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: an empty file
            log.warning("kept steps cannot be read", file=str(path), error=str(error))
            return None
        steps = _decoded(data, _digest(series))
        if steps is None:
            log.warning("kept steps are torn or foreign, and fetched again", file=str(path))
        return steps

    def save(self, series: bytes, version: bytes, parts: Sequence[Values]) -> None:
        """Keep the steps *parts*, one after the other, under the name *series*.

        A folder that cannot be written is only told.
        """
        path = self._path(series)
        try:
            with tempfile.NamedTemporaryFile(
                dir=self._folder, suffix=_SUFFIX, delete=False
            ) as file:
                beside = Path(file.name)
                try:
                    file.writelines(_encoded(version, parts, _digest(series)))
                    file.flush()
                    # Not replaced: for that, file systems wait until the new file is on the disk.
                    path.unlink(missing_ok=True)
                    beside.rename(path)
                except BaseException:
                    beside.unlink()
                    raise
        except OSError as error:
            log.warning("steps not kept", file=str(path), error=str(error))

    def remove_unused(self) -> None:
        """Remove what no round used for UNUSED_SECONDS_MAX: series of the past, torn writes."""
        oldest = time.time() - UNUSED_SECONDS_MAX
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*" + _SUFFIX):
                with contextlib.suppress(OSError):
                    if path.lstat().st_mtime < oldest:
                        path.unlink()

    def _path(self, series: bytes) -> Path:
        return self._folder / (_digest(series).hex() + _SUFFIX)


def _digest(series: bytes) -> bytes:
    return hashlib.sha256(series).digest()


def _encoded(version: bytes, parts: Sequence[Values], digest: bytes) -> list[bytes | memoryview]:
    columns = {part.shape[1] for part in parts} or {1}
    head = _HEAD.pack(_MAGIC, digest, *columns, len(version))
    values = [np.ascontiguousarray(part, "<f8").data.cast("B") for part in parts if part.size]
    check = zlib.crc32(head + version)
    for part in values:
        check = zlib.crc32(part, check)
    return [head, _CHECK.pack(check), version, *values]


def _decoded(data: mmap.mmap, digest: bytes) -> Steps | None:
    """None where *data* is not, whole, what was encoded under *digest*."""
    body = _HEAD.size + _CHECK.size
    if len(data) < body:
        return None
    magic, its_digest, columns, version_bytes = _HEAD.unpack_from(data)
    (check,) = _CHECK.unpack_from(data, _HEAD.size)
    rest = memoryview(data)[body:]
    if (magic, its_digest) != (_MAGIC, digest):
        return None
    if check != zlib.crc32(rest, zlib.crc32(data[: _HEAD.size])):
        return None
    values = np.frombuffer(rest[version_bytes:], "<f8")
    return Steps(bytes(rest[:version_bytes]), values.reshape(-1, columns))
