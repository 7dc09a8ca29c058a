"""Records to facts and back, and a send-and-receive that does not wait for longer than needed."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from icos_fl.federation.v1 import records

from icos_fl_server.checkpoints import Weights

_POLL_SECONDS_MIN, _POLL_SECONDS_MAX = 0.1, 1.0
_CAUSE_LENGTH_MAX = 300

_RAISED = re.compile(r"<class '(?:[\w<>]+\.)*(\w+)'>:<'(.*)'>", re.DOTALL)
"""How Flower reports an exception of a ClientApp."""

Numbers = dict[str, float]


@dataclass
class Reply:
    """What one node answered, as far as it can be used."""

    name: str
    weights: dict[str, Weights] = field(default_factory=dict)
    train: dict[str, Numbers] = field(default_factory=dict)
    evaluate: dict[str, Numbers] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    """By metric: why it is not in the reply."""


@dataclass(frozen=True)
class Failure:
    """A node that did not answer with content."""

    state: str
    """``failed``, ``unusable`` or ``silent``."""
    cause: str


def exchange(
    grid: Grid, messages: list[Message], timeout_seconds: float
) -> dict[int, Reply | Failure]:
    """Send, and collect the replies by node id; who is silent at the timeout is a Failure.

    Flower's own send_and_receive looks for replies every 3 s; a round of a small model is shorter.
    """
    sent = list(grid.push_messages(messages))
    pending: dict[str, int] = {}
    answers: dict[int, Reply | Failure] = {}
    for index, message in enumerate(messages):
        # Flower returns None for a message that it refuses, and nothing at all for too large ones.
        if index < len(sent) and sent[index]:
            pending[sent[index]] = message.metadata.dst_node_id
        else:
            cause = "the SuperLink did not take the message"
            answers[message.metadata.dst_node_id] = Failure("failed", cause)
    deadline = time.monotonic() + timeout_seconds
    pause = _POLL_SECONDS_MIN
    while pending:
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            node_id = pending.pop(reply.metadata.reply_to_message_id, None)
            if node_id is not None:
                answers[node_id] = _decode(reply)
        if not pending or time.monotonic() >= deadline:
            break
        pause = _POLL_SECONDS_MIN if replies else min(2 * pause, _POLL_SECONDS_MAX)
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
    for node_id in pending.values():
        answers[node_id] = Failure("silent", f"no reply in {timeout_seconds:g} s")
    return answers


def request(
    message_type: str,
    node_id: int,
    config: Mapping[str, Any],
    weights: Mapping[str, ArrayRecord],
    ttl_seconds: float,
) -> Message:
    """One message of the federation's protocol."""
    content = RecordDict()
    content[records.CONFIG] = ConfigRecord({"protocol": records.PROTOCOL, **config})
    for metric, record in weights.items():
        content[records.arrays(metric)] = record
    return Message(content=content, message_type=message_type, dst_node_id=node_id, ttl=ttl_seconds)


def to_record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in weights.items()})


def from_record(record: ArrayRecord) -> Weights:
    return {name: array.numpy() for name, array in record.items()}


def _decode(message: Message) -> Reply | Failure:
    if message.has_error():
        return Failure("failed", _one_line(message.error.reason or ""))
    content = message.content
    node = content.get(records.NODE)
    if not isinstance(node, ConfigRecord) or not isinstance(node.get("name"), str):
        return Failure("unusable", f"the reply has no record {records.NODE!r} with a name")
    reply = Reply(str(node["name"]))
    missing = zip(_list(node, "missing-metrics"), _list(node, "missing-causes"), strict=False)
    reply.causes.update(missing)
    for key, record in content.items():
        kind, _, metric = key.partition(".")
        if isinstance(record, ArrayRecord) and kind == "arrays":
            try:
                reply.weights[metric] = from_record(record)
            except (ValueError, TypeError, EOFError) as error:
                return Failure("unusable", f"{key} cannot be decoded: {error}")
        elif isinstance(record, MetricRecord) and kind == "train":
            reply.train[metric] = _numbers(record)
        elif isinstance(record, MetricRecord) and kind == "evaluate":
            reply.evaluate[metric] = _numbers(record)
    return reply


def _numbers(record: MetricRecord) -> Numbers:
    return {key: float(value) for key, value in record.items() if not isinstance(value, list)}


def _list(record: ConfigRecord, key: str) -> list[str]:
    value = record.get(key, [])
    return [str(item) for item in value] if isinstance(value, list) else []


def _one_line(reason: str) -> str:
    """What a ClientApp raised, without Flower's brackets; of several lines the last one says it."""
    if raised := _RAISED.fullmatch(reason.strip()):
        reason = f"{raised[1]}: {raised[2]}"
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines or ["the ClientApp ended without a reply"])[-1][:_CAUSE_LENGTH_MAX]
