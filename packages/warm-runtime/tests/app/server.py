"""Averages what the nodes send, and tells after each round who replied, who did not, and why."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    folder = Path(str(config["folder"]))
    faults = json.loads(str(config["faults"]) or "{}")
    ids = nodes(grid, int(config["nodes"]))
    names: dict[int, int] = {}
    weights = np.zeros(int(config["floats"]), np.float32)
    for number in range(1, int(config["rounds"]) + 1):
        while (folder / f"hold-{number}").exists():
            time.sleep(0.02)
        fault = faults.get(str(number), {})
        if fault.get("fault") == "server-exits":
            os._exit(3)
        timeout = float(fault.get("timeout", config["timeout"]))
        told = {"round": number, "fault": fault.get("fault", ""), "node": fault.get("node", -1)}
        content = {"arrays": ArrayRecord({"w": Array(weights)}), "config": ConfigRecord(told)}
        messages = [
            Message(RecordDict(content), node, "train", ttl=float(fault.get("ttl", 3600)))
            for node in ids
        ]
        began = time.monotonic()
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        seconds = time.monotonic() - began
        good = [reply for reply in replies if not reply.has_error()]
        for reply in good:
            names[reply.metadata.src_node_id] = int(reply.content["metrics"]["node"])
        fact = {
            "round": number,
            "seconds": seconds,
            "replied": sorted(int(reply.content["metrics"]["node"]) for reply in good),
            "errors": {
                str(names.get(reply.metadata.src_node_id)): reply.error.reason
                for reply in replies
                if reply.has_error()
            },
        }
        if good:
            weights = np.mean([reply.content["arrays"]["w"].numpy() for reply in good], axis=0)
        tell(folder, fact)
    tell(folder, {"over": True, "weight": float(weights[0])})


def nodes(grid: Grid, count: int) -> list[int]:
    while len(ids := list(grid.get_node_ids())) < count:
        time.sleep(0.05)
    return ids


def tell(folder: Path, fact: dict) -> None:
    with (folder / "facts.jsonl").open("a") as file:
        file.write(json.dumps(fact) + "\n")
