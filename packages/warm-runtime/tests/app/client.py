"""Adds one to the weights, unless it is the node that is to fail."""

import ctypes
import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from icos_fl_warm_runtime import TASK_REGISTRY
from prometheus_client import Counter, Gauge

app = ClientApp()
ADDED = Counter("app_added", "Numbers that one was added to", registry=TASK_REGISTRY)
ROUND = Gauge("app_round", "The newest round", ["node"], registry=TASK_REGISTRY)


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    number = int(context.node_config["number"])
    ROUND.labels(str(number)).set(config["round"])
    if number == config["node"]:
        fail(str(config["fault"]), int(config["round"]), Path(str(context.run_config["folder"])))
    weights = message.content["arrays"]["w"].numpy()
    ADDED.inc(len(weights))
    content = {
        "arrays": ArrayRecord({"w": Array(weights + 1)}),
        "metrics": MetricRecord({"node": number}),
    }
    return Message(RecordDict(content), reply_to=message)


def fail(fault: str, number: int, folder: Path) -> None:
    from flwr.supernode.runtime import run_clientapp

    if fault == "raises":
        raise ValueError("disk on fire")
    if fault.startswith("exits-"):
        os._exit(int(fault.removeprefix("exits-")))
    if fault == "is-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "dies-sending":  # the reply is announced, its objects do not come
        run_clientapp.push_objects = lambda *_args, **_options: os._exit(5)
    if fault == "cannot-send":
        run_clientapp.push_message = cannot_send
    if fault == "leaks":
        globals()["kept"] = np.ones(62_500_000)  # 500 MB, every page touched
    if fault == "hangs":
        while True:
            time.sleep(3600)
    if fault == "hangs-in-c":
        ctypes.PyDLL(None).pause()  # a PyDLL's functions hold the interpreter's lock
    if fault == "waits":
        path = folder / f"task-{number}"
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)
        while not (folder / f"go-{number}").exists():
            time.sleep(0.02)


def cannot_send(*_args: object) -> None:
    raise ConnectionError("no route to host")
