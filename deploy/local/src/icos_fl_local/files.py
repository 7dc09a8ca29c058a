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
            os.fchown(descriptor, uid, -1)
            os.fchmod(descriptor, mode)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
        _sync(path.parent)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise refused(path, "written", error) from None


def refused(path: Path, what: str, error: OSError) -> LocalError:
    """What to say of a *path* that cannot be *what*, such as read."""
    return LocalError(
        f"{path}: cannot be {what}: {error.strerror} (uid {os.getuid()}); "
        "run it as the folder's owner, or give another --folder"
    )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
