"""A run that is asked to end between two rounds, and how others know that it has ended.

The ServerApp holds ``run.lock`` in its result folder; the kernel gives it back however the process
ends. A word in that file asks the run to end.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icos_fl_server.errors import ServerError

_LOCK = "run.lock"
_LOOK_SECONDS = 0.2


class Quiesced(Exception):
    """The run ends here, as it was asked to."""


class Request:
    """What others ask of the run in *folder*."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Can be made while the block lasts. Raises ServerError if another run has the folder."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+b")
        except OSError as error:
            raise ServerError(
                f"result-dir: {self._path} cannot be written by uid {os.getuid()}: {error.strerror}"
            ) from None
        with file:
            if not _take(file.fileno()):
                raise ServerError(f"result-dir: another run goes on in {self._path.parent}")
            file.truncate(0)  # what was asked of the run before
            yield

    def look(self) -> None:
        """Raises Quiesced if the run is asked to end."""
        if self._path.stat().st_size:
            raise Quiesced


def quiesce(folder: Path, timeout_seconds: float) -> list[str]:
    """Have what runs in *folder*, or in folders in it, end with the round in hand, and wait for it.

    Returns a line a run, none if nothing runs. Raises ServerError after *timeout_seconds*, and
    where no run ever was: that is not the folder.
    """
    deadline = time.monotonic() + timeout_seconds
    found = [lock for lock in [folder / _LOCK, *folder.glob(f"*/{_LOCK}")] if lock.exists()]
    if not found:
        raise ServerError(
            f"{folder}: no run was ever in it, nor in a folder of it; give the run's result-dir, "
            "as its ServerApp sees it"
        )
    locks = [lock for lock in found if _is_held(lock)]
    for lock in locks:
        lock.write_bytes(b"quiesce\n")
    for lock in locks:
        while _is_held(lock):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{lock.parent}: the round in hand has not ended within {timeout_seconds:g} s;"
                    " the run still ends with it"
                )
            time.sleep(_LOOK_SECONDS)
    return [_how_it_ended(lock.parent) for lock in locks]


def _how_it_ended(folder: Path) -> str:
    history = json.loads((folder / "history.json").read_text())
    reason = f": {history['reason']}" if history["reason"] else ""
    return f"{folder}: {history['state']}{reason}"


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            return not _take(file.fileno())
    except FileNotFoundError:
        return False


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
