"""What ServerApps have written of their runs, as a page needs it: newest rounds alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from icos_fl_service.web import number

from icos_fl_server.errors import ServerError
from icos_fl_server.history import Facts

RUNS_MAX = 100
ROUNDS_MAX = 500
NODES_BYTES_MAX = 8 << 20
"""So much of a run's nodes.jsonl is read: its end."""

LOSSES = ("train_loss", "eval_loss", "mae", "naive_mae")


@dataclass(frozen=True)
class Run:
    """One whose history is in *folder*."""

    name: str
    """Its folder in the folder of runs."""
    folder: Path
    written_unix_s: float

    def history(self) -> Facts:
        """As docs/architecture.md has it. Raises ServerError."""
        path = self.folder / "history.json"
        try:
            found = path.stat()
            return _history(path, found.st_mtime_ns, found.st_size)
        except (OSError, ValueError) as error:
            raise ServerError(f"{path} cannot be read: {error}") from None

    def of_nodes(self) -> tuple[Facts, ...]:
        """What single nodes said, a round each; none where an older ServerApp has written."""
        path = self.folder / "nodes.jsonl"
        try:
            found = path.stat()
            return _lines(path, found.st_mtime_ns, found.st_size)
        except OSError:
            return ()


def runs_in(folder: Path) -> list[Run]:
    """Newest first: of *folder* itself, and of folders in it."""
    found = []
    for path in (folder / "history.json", *folder.glob("*/history.json")):
        try:
            written = path.stat().st_mtime
        except OSError:
            continue
        name = str(path.parent.relative_to(folder))
        found.append(Run(name, path.parent, written))
    return sorted(found, key=lambda run: run.written_unix_s, reverse=True)[:RUNS_MAX]


def told_of_run(history: Facts) -> Facts:
    """State, rounds, and the losses of all nodes together. Raises ServerError."""
    try:
        rounds = history["rounds"][-ROUNDS_MAX:]
        return {
            "id": str(history["run"]),
            "state": str(history["state"]),
            "reason": str(history["reason"]),
            "rounds_total": int(history["rounds_total"]),
            "rounds": [
                {
                    "round": int(entry["round"]),
                    "state": str(entry["state"]),
                    "reason": str(entry["reason"]),
                    "started": number(entry["started_unix_s"], digits=14),
                    "seconds": number(entry["seconds"]),
                    "epsilon": number(entry.get("privacy", {}).get("epsilon")),
                }
                for entry in rounds
            ],
            "losses": {
                str(metric): _series(entry["metrics"].get(metric, {}) for entry in rounds)
                for metric in history["metrics"]
            },
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from None


def told_of_nodes(history: Facts, lines: tuple[Facts, ...]) -> list[Facts]:
    """Of each node: what it offered, how it took part at last, and its newest losses.

    Raises ServerError.
    """
    try:
        last = next((entry for entry in reversed(history["rounds"]) if entry["nodes"]), None)
        newest: dict[str, Facts] = {}
        for line in lines:
            for name, of_metrics in line["nodes"].items():
                newest.setdefault(name, {}).update(of_metrics)
        return [
            {
                "name": name,
                "id": str(node.get("id", "")),
                "examples": {str(m): number(count) for m, count in node["metrics"].items()},
                "cause": str(node["cause"]),
                "versions": [str(version) for version in node.get("versions", [])],
                "last": _taken_part(name, last),
                "losses": {
                    str(metric): {fact: number(facts.get(fact)) for fact in LOSSES}
                    for metric, facts in newest.get(name, {}).items()
                },
            }
            for name, node in sorted(history["nodes"].items())
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from None


def told_of_node(history: Facts, lines: tuple[Facts, ...], name: str) -> Facts:
    """Losses of one node by round. Raises ServerError."""
    try:
        return {
            "rounds": [int(line["round"]) for line in lines],
            "losses": {
                str(metric): _series(line["nodes"].get(name, {}).get(metric, {}) for line in lines)
                for metric in history["metrics"]
            },
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _broken(error) from None


def _series(of_rounds: Iterable[Facts]) -> Facts:
    facts = list(of_rounds)
    return {fact: [number(each.get(fact)) for each in facts] for fact in LOSSES}


def _taken_part(name: str, entry: Facts | None) -> Facts | None:
    """In the newest round that has ended; None where the node was not asked."""
    if entry is None or name not in entry["nodes"]:
        return None
    of_node = entry["nodes"][name]
    return {
        "round": int(entry["round"]),
        "state": str(of_node["state"]),
        "cause": str(of_node["cause"]),
    }


def _broken(error: Exception) -> ServerError:
    return ServerError(f"the history is not in the form that is known: {error!r}")


# A page asks every two seconds, and reads what has changed alone.


@lru_cache(maxsize=4)
def _history(path: Path, _mtime_ns: int, _size: int) -> Facts:
    found: Facts = json.loads(path.read_bytes())
    return found


@lru_cache(maxsize=4)
def _lines(path: Path, _mtime_ns: int, size: int) -> tuple[Facts, ...]:
    with path.open("rb") as file:
        file.seek(max(0, size - NODES_BYTES_MAX))
        lines = file.read(NODES_BYTES_MAX).split(b"\n")
    found = []
    for line in lines:  # the first may lack its begin, the last its end
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return tuple(found[-ROUNDS_MAX:])
