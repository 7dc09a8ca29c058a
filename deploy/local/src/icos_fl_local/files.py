"""Keys and certificates on disk."""

import os
import tempfile
from pathlib import Path

from icos_fl_local.errors import LocalError


def write(path: Path, content: bytes, mode: int, uid: int) -> None:
    """All of it or nothing, on disk, and nobody but *uid* (-1: who runs this) ever reads a key.

    Raises LocalError.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            _give(path, descriptor, uid)
            os.fchmod(descriptor, mode)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
        _sync(path.parent)
    except OSError as error:
        raise refused(path, "written", error) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def refused(path: Path, what: str, error: OSError) -> LocalError:
    """What to say of a *path* that cannot be *what*, such as read."""
    cure = "run it as the folder's owner, or " if isinstance(error, PermissionError) else ""
    return LocalError(
        f"{path}: cannot be {what}: {error.strerror} (uid {os.getuid()}); "
        f"{cure}give another --folder"
    )


def _give(path: Path, descriptor: int, uid: int) -> None:
    try:
        os.fchown(descriptor, uid, -1)
    except PermissionError:
        raise LocalError(
            f"{path}: cannot be given to uid {uid} by uid {os.getuid()}; run it as root"
        ) from None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
