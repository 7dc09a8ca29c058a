"""Nodes in memory behind Flower's own Grid interface: a SuperLink without a process."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from icos_fl.federation.v1.weights import Flat, pack, unpack
from icos_fl_server.app import app

Change = Callable[["Node", RecordDict], None]


def weigh(reply: RecordDict, models: dict[str, dict[str, np.ndarray]]) -> None:
    """Put *models*, by metric, into *reply* in place of what it has."""
    array, facts = pack({metric: Flat.of(weights) for metric, weights in models.items()})
    reply["node"].update(facts)
    reply["arrays"] = ArrayRecord({"weights": Array(array)})


@dataclass
class Node:
    """Trains by adding *step* to every weight; *behave* changes or refuses its replies."""

    name: str
    step: float = 1.0
    examples: dict[str, int] = field(default_factory=lambda: {"cpu_usage": 10})
    loss: float = 1.0
    start: float = 0.0
    shape: tuple[int, ...] = (2,)
    behave: Change | None = None
    """Called with every reply to train or evaluate."""
    introduce: Change | None = None
    """Called with every reply to a query."""
    received: list[Message] = field(default_factory=list)

    def answer(self, message: Message) -> RecordDict:
        self.received.append(message)
        config = message.content.config_records["config"]
        query = message.metadata.message_type == "query"
        reply = RecordDict({"node": ConfigRecord({"protocol": 2, "name": self.name})})
        numbers = reply["metrics"] = MetricRecord()
        models = {}
        asked = config["metrics"] if query else config.get("train-metrics", [])
        missing = [metric for metric in asked if metric not in self.examples]
        reply["node"]["missing-metrics"] = missing
        reply["node"]["missing-causes"] = [f"no column {metric}" for metric in missing]
        for metric in asked:
            if metric in missing:
                continue
            examples = self.examples[metric]
            numbers[f"train.{metric}.num-examples"] = examples
            if query:
                weights = np.full(self.shape, self.start, np.float32)
            else:
                received = unpack(message.content["arrays"]["weights"].numpy(), config)
                weights = received[metric].named()["w"] + self.step
                numbers[f"train.{metric}.train-loss"] = self.loss
                numbers[f"train.{metric}.seconds"] = 0.1
            if query or examples:
                models[metric] = {"w": weights}
        if models:
            weigh(reply, models)
        for metric in config.get("evaluate-metrics", []):
            if metric in self.examples:
                judged = {"num-examples": 5, "eval-loss": self.loss, "mae": 2.0, "naive-mae": 3.0}
                for name, value in judged.items():
                    numbers[f"evaluate.{metric}.{name}"] = value
        change = self.introduce if query else self.behave
        if change:
            change(self, reply)
        return reply

    def trained(self) -> list[Message]:
        return [m for m in self.received if m.metadata.message_type == "train"]


class Silent(Exception):
    """Raised by a node that never replies."""


def over_the_wire(message: Message) -> Message:
    """The message as it comes out of Flower's own serialisation, with its id."""
    objects = get_all_nested_objects(message)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    received = cast(Message, inflate_object_from_contents(message.object_id, contents))
    received.metadata.__dict__["_message_id"] = message.object_id
    return received


class MemoryGrid(Grid):
    """Delivers messages to nodes, and turns what a node raises into Flower's error reply."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = dict(enumerate(nodes, start=101))
        self.pushes: list[list[Message]] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_args: Any, **_kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_args: Any, **_kwargs: Any) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        batch = list(messages)
        self.pushes.append(batch)
        return [self._deliver(message) for message in batch]

    def _deliver(self, message: Message) -> str | None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:
            return None
        received = over_the_wire(message)
        try:
            reply = Message(node.answer(received), reply_to=received)
        except Silent:
            return received.metadata.message_id
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(code=3, reason=reason), reply_to=received)
        self._replies[received.metadata.message_id] = over_the_wire(reply)
        return received.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]


class Run:
    """One run of the ServerApp on nodes in memory, and what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "results"
        self.grid = MemoryGrid([])
        self.config: dict[str, Any] = {
            "metric": "cpu_usage",
            "num-server-rounds": 1,
            "min-available-clients": 1,
            "node-timeout": 0.2,
            "round-timeout": 0.3,
            "result-dir": str(self.folder),
        }

    def __call__(self, *nodes: Node, **config: Any) -> dict[str, Any]:
        """Run to the end; returns the history. Raises what the ServerApp raises."""
        if nodes:
            self.grid = MemoryGrid(nodes)
        changed = {key.replace("_", "-"): value for key, value in config.items()}
        context = Context(7, 0, {}, RecordDict(), self.config | changed)
        app(self.grid, context)
        return self.history

    @property
    def history(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "history.json").read_text())
        return facts


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who a process is, as the SuperLink tells a ServerApp's process at its start."""
    for name, value in (("_task_id", 1), ("_run_id", 7), ("_node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def make_grid() -> type[MemoryGrid]:
    return MemoryGrid


@pytest.fixture
def make_node() -> type[Node]:
    return Node


@pytest.fixture(name="weigh")
def fixture_weigh() -> Callable[[RecordDict, dict[str, dict[str, np.ndarray]]], None]:
    return weigh


@pytest.fixture
def silent() -> type[Exception]:
    return Silent
