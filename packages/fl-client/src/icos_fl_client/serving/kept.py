"""What a forecaster has learned, in a folder, so that a restart goes on with it."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import structlog
from numpy.typing import NDArray

log = structlog.get_logger()


class KeptState:
    """A file for each node and metric in *folder*; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, node: str, metric: str) -> dict[str, NDArray[Any]] | None:
        """What was saved; None if nothing was, or the file is damaged, which is logged."""
        if self._folder is None:
            return None
        path = self._path(self._folder, node, metric)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            self.refuse(node, metric, f"{path} cannot be read: {error}")
            return None

    def save(self, node: str, metric: str, state: Mapping[str, NDArray[Any]]) -> None:
        """All of it, or what was there stays; that it cannot be written is logged."""
        if self._folder is None or not state:
            return
        path = self._path(self._folder, node, metric)
        written = path.with_suffix(".new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with written.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **state)
                stream.flush()
                os.fsync(stream.fileno())
            written.replace(path)
        except OSError as error:
            log.warning("state not kept", node=node, metric=metric, reason=str(error))

    def refuse(self, node: str, metric: str, reason: str) -> None:
        """Tell that what is kept is of no use."""
        log.warning("forecasts begin anew", node=node, metric=metric, reason=reason)

    def _path(self, folder: Path, node: str, metric: str) -> Path:
        return folder / f"{quote(node, safe='')}@{quote(metric, safe='')}.npz"
