"""The run as it goes, in ``history.json`` and ``nodes.jsonl``: see docs/architecture.md."""

import json
import time
from pathlib import Path
from typing import Any

from icos_fl_server.checkpoints import write_atomically, writing

Facts = dict[str, Any]


class History:
    """``history.json`` is written anew, as a whole, whenever something happens.

    What single nodes say of a round is a line of ``nodes.jsonl``: with many nodes and rounds it is
    too much to be written again and again.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._path = folder / "history.json"
        self._nodes = folder / "nodes.jsonl"
        self.facts: Facts = {
            "protocol": 1,
            "run": run,
            "state": "waiting",
            "reason": "",
            "metrics": [],
            "rounds_total": 0,
            "nodes": {},
            "rounds": [],
        }
        with writing(self._nodes):
            self._nodes.unlink(missing_ok=True)
        self.write()

    def plan(self, metrics: tuple[str, ...], rounds_total: int) -> None:
        """What the run is going to do."""
        self.facts |= {"metrics": list(metrics), "rounds_total": rounds_total}
        self.write()

    def node(
        self, name: str, node_id: int, examples: dict[str, int], cause: str, versions: list[str]
    ) -> None:
        """What a node offered to learn from when it was asked, and what it runs."""
        self.facts["nodes"][name] = {
            "id": str(node_id),  # JSON's readers would round it
            "metrics": examples,
            "cause": cause,
            "versions": versions,
        }

    def begin_round(self, number: int) -> Facts:
        """A round that runs from now on."""
        self.facts["state"] = "running"
        entry = {
            "round": number,
            "state": "running",
            "reason": "",
            "started_unix_s": time.time(),
            "seconds": None,
            "metrics": {},
            "nodes": {},
        }
        self.facts["rounds"].append(entry)
        self.write()
        return entry

    def end_round(self, entry: Facts, state: str, reason: str = "") -> None:
        """``finished``, or ``skipped`` with the reason."""
        entry["state"], entry["reason"] = state, reason
        entry["seconds"] = time.time() - entry["started_unix_s"]
        self.write()

    def of_nodes(self, number: int, facts: Facts) -> None:
        """Losses and errors of round *number*, by node and metric. Raises ServerError."""
        with writing(self._nodes), self._nodes.open("a") as file:
            file.write(json.dumps({"round": number, "nodes": facts}, allow_nan=False) + "\n")

    def end(self, state: str, reason: str = "") -> None:
        """``finished``; ``failed`` or ``quiesced`` with the reason."""
        self.facts["state"], self.facts["reason"] = state, reason
        self.write()

    def write(self) -> None:
        write_atomically(self._path, json.dumps(self.facts, indent=1).encode())
