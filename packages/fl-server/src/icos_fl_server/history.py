"""The run as it goes, in ``history.json``: docs/architecture.md has its form."""

import json
import time
from pathlib import Path
from typing import Any

from icos_fl_server.checkpoints import write_atomically

Facts = dict[str, Any]


class History:
    """Written anew, as a whole, whenever something happens."""

    def __init__(self, folder: Path, run: str) -> None:
        self._path = folder / "history.json"
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
        self.write()

    def plan(self, metrics: tuple[str, ...], rounds_total: int) -> None:
        """What the run is going to do."""
        self.facts |= {"metrics": list(metrics), "rounds_total": rounds_total}
        self.write()

    def node(self, name: str, examples: dict[str, int], cause: str) -> None:
        """What a node offered to learn from when it was asked."""
        self.facts["nodes"][name] = {"metrics": examples, "cause": cause}

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

    def end(self, state: str, reason: str = "") -> None:
        """``finished``; ``failed`` or ``quiesced`` with the reason."""
        self.facts["state"], self.facts["reason"] = state, reason
        self.write()

    def write(self) -> None:
        write_atomically(self._path, json.dumps(self.facts, indent=1).encode())
