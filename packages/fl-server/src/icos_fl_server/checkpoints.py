"""Weights on disk, one file a version, each there as a whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icos_fl.federation.v1.weights import Flat, Layout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from icos_fl_server.errors import ServerError

ROUNDS_KEPT = 5
"""Files of single rounds that stay, beside latest and best."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write *data* so that a crash leaves the old file or the new one. Raises ServerError."""
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ServerError where *path* cannot be written."""
    try:
        yield
    except OSError as error:
        raise ServerError(
            f"result-dir: {path} cannot be written by uid {os.getuid()}: {error.strerror}"
        ) from None


@dataclass(frozen=True)
class Checkpoint:
    """One version of a metric's model."""

    round: int
    weights: Flat
    privacy: str = ""
    """What was spent on it, as the run's account has it; empty without differential privacy."""


class Checkpoints:
    """The checkpoints of one run: a folder a metric, with rounds, latest and best."""

    def __init__(self, folder: Path, run_config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._run_config = json.dumps(dict(run_config), default=str)

    def save(self, metric: str, checkpoint: Checkpoint) -> None:
        """Keep it as its round's file and as the latest."""
        data = self._pack(metric, checkpoint)
        folder = self._folder / metric
        write_atomically(folder / f"round-{checkpoint.round:05d}.safetensors", data)
        write_atomically(folder / "latest.safetensors", data)
        # By age, not by number: an earlier run in the same folder may have gone further.
        files = sorted(folder.glob("round-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for old in files[:-ROUNDS_KEPT]:
            old.unlink()

    def save_best(self, metric: str, checkpoint: Checkpoint) -> None:
        """Keep it as the one with the lowest evaluation loss so far."""
        path = self._folder / metric / "best.safetensors"
        write_atomically(path, self._pack(metric, checkpoint))

    def _pack(self, metric: str, checkpoint: Checkpoint) -> bytes:
        metadata = {
            "metric": metric,
            "round": str(checkpoint.round),
            "run-config": self._run_config,
            **({"privacy": checkpoint.privacy} if checkpoint.privacy else {}),
        }
        packed: bytes = save(checkpoint.weights.named(), metadata)
        return packed


def load_run(folder: Path, metrics: tuple[str, ...]) -> dict[str, Checkpoint]:
    """The latest checkpoints in a run's result folder, or in its checkpoints folder, by metric.

    A metric without one is left out. Raises ServerError if there is none at all, or for a file
    that is no checkpoint.
    """
    inner = folder / "checkpoints"
    base = inner if inner.is_dir() else folder
    if not base.is_dir():
        raise ServerError(f"resume={folder}: no such folder")
    paths = {metric: base / metric / "latest.safetensors" for metric in metrics}
    found = {metric: _load(path) for metric, path in paths.items() if path.exists()}
    if not found:
        raise ServerError(f"resume={folder}: no checkpoint of {', '.join(metrics)} in it")
    return found


def _load(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(int(metadata["round"]), Flat.of(weights), metadata.get("privacy", ""))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ServerError(f"resume: {path} is not a checkpoint: {error}") from None


def difference(given: Layout, expected: Layout) -> str:
    """The first tensor of *given* whose shape is not that of *expected*; empty if there is none."""
    shapes_given, shapes_expected = dict(given), dict(expected)
    for name in [*shapes_expected, *shapes_given]:
        shapes = [shapes.get(name, "none") for shapes in (shapes_given, shapes_expected)]
        if shapes[0] != shapes[1]:
            return f"tensor {name!r} has shape {shapes[0]}, the nodes' model has {shapes[1]}"
    return ""
