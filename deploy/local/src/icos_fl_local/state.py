"""The state folder: all that a deployment keeps, and how other commands find it."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icos_fl_local.errors import LocalError, NothingRunning, Quiesced

DEFAULT = Path(".icos-fl")
UV_RUN = "uv run " if "UV_RUN_RECURSION_DEPTH" in os.environ else ""
"""Before a command that is told to somebody who called this one so."""
RUNS_KEPT = 500
"""Of ``runs``; one that is learned again every five minutes has as many in two days."""
_LOCK = "lock"
_DESCRIPTION = "deployment.json"


class StateFolder:
    """One folder: ``logs/``, ``runs/``, ``flwr/``, ``store/``, ``deployment.json`` and locks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.option = "" if folder == DEFAULT else f" --state-dir {folder}"
        """What commands need to find it."""
        self.logs = self.folder / "logs"
        self.runs = self.folder / "runs"
        self.flower = self.folder / "flwr"
        self.expectations = self.folder / "expectations.toml"
        """What healthy windows look like, if the user has written it."""
        self.prometheus = self.folder / "prometheus.yml"
        """Scrapes all parts of the deployment."""
        self.quiesced = self.folder / "quiesced"
        """While it is there, no run begins."""
        self._run_lock = self.folder / "run.lock"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one deployment; the kernel gives it back however the process ends.

        Raises LocalError, which names the process that holds it.
        """
        for folder in (self.folder, self.logs, self.runs, self.flower):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("a+") as stream:
            if not _lock(stream.fileno(), wait=False):
                raise self._taken()
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield

    def ensure_free(self) -> None:
        """Raises LocalError as ``lock`` does."""
        if self.is_running():
            raise self._taken()

    @contextlib.contextmanager
    def one_run_at_a_time(self, given: str) -> Iterator[str]:
        """Wait until no other process has a run of this deployment under way; the folder of ours.

        That is *given*, or if that is empty a new one in ``runs``. Raises Quiesced if none is to
        begin.
        """
        with self._run_lock.open("a") as stream:
            _lock(stream.fileno(), wait=True)
            if self.quiesced.exists():
                raise Quiesced(f"no run begins until '{UV_RUN}icos-fl train{self.option}'")
            folder = given or str(self.new_run())
            stream.truncate(0)
            stream.write(folder)
            stream.flush()
            self._forget_runs()
            yield folder

    def run_under_way(self) -> Path | None:
        """The result folder of the run that some process has under way."""
        with self._run_lock.open("a+") as stream:
            if _lock(stream.fileno(), wait=False):
                return None
            stream.seek(0)
            return Path(stream.read())

    def is_running(self) -> bool:
        """Does a launcher hold the folder?"""
        try:
            with (self.folder / _LOCK).open("r+") as stream:
                return not _lock(stream.fileno(), wait=False)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def write(self, description: Mapping[str, Any]) -> None:
        """Replace the description of the deployment, at once or not at all."""
        path = self.folder / _DESCRIPTION
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(description, indent=1))
        temporary.replace(path)

    def read(self) -> dict[str, Any]:
        """The description of the deployment that is or was here; raises NothingRunning if none."""
        try:
            description: dict[str, Any] = json.loads((self.folder / _DESCRIPTION).read_text())
        except FileNotFoundError:
            raise self._nothing() from None
        except (OSError, ValueError) as error:
            raise LocalError(f"{self.folder / _DESCRIPTION}: cannot be read: {error}") from None
        return description

    def read_running(self) -> dict[str, Any]:
        """``read`` of a deployment that runs now; raises NothingRunning if none does.

        Of one that ended by itself, that says why.
        """
        description = self.read()
        if self.is_running():
            return description
        if description.get("state") == "failed":
            raise NothingRunning(
                f"{self.folder}: the deployment has ended: {description['reason']}; "
                f"log: {self.logs / 'launcher.log'}"
            )
        raise self._nothing()

    def last_run(self, since_unix_s: float) -> Path | None:
        """The folder of the newest run whose history was written since then."""
        written = {path: path.stat().st_mtime for path in self.runs.glob("*/history.json")}
        newest = max(written, key=lambda path: written[path], default=None)
        if newest is None or written[newest] < since_unix_s:
            return None
        return newest.parent

    def last_checkpoints(self, since_unix_s: float, metrics: Sequence[str]) -> Path | None:
        """The newest since then that has some of *metrics*: from others nothing can go on."""
        written = {
            path: path.stat().st_mtime
            for path in self.runs.glob("*/checkpoints")
            if any((path / metric).is_dir() for metric in metrics)
        }
        newest = max(written, key=lambda path: written[path], default=None)
        return newest if newest is not None and written[newest] >= since_unix_s else None

    def new_run(self) -> Path:
        """A name for the next run's folder, which is not made."""
        numbers = [int(path.name) for path in self.runs.iterdir() if path.name.isdigit()]
        return self.runs / f"{max(numbers, default=0) + 1:04}"

    def _forget_runs(self) -> None:
        """Delete the oldest, but for those that have a metric's newest checkpoints."""
        runs = [path for path in self.runs.iterdir() if path.name.isdigit()]
        runs.sort(key=lambda path: int(path.name))
        if len(runs) > RUNS_KEPT:
            newest = {each.name: run for run in runs for each in run.glob("checkpoints/*")}
            for run in set(runs[:-RUNS_KEPT]) - set(newest.values()):
                shutil.rmtree(run, ignore_errors=True)

    def _nothing(self) -> NothingRunning:
        return NothingRunning(
            f"{self.folder}: no deployment runs there; "
            f"start one with '{UV_RUN}icos-fl up --keep{self.option}'"
        )

    def _taken(self) -> LocalError:
        holder = (self.folder / _LOCK).read_text().strip() or "unknown"
        return LocalError(
            f"{self.folder}: a deployment runs there already (pid {holder}); "
            f"end it with '{UV_RUN}icos-fl down{self.option}', or give another --state-dir"
        )


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
