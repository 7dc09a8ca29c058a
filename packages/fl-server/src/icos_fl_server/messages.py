"""Records to facts and back, and a send-and-receive that does not wait for longer than needed."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat, WeightsError, pack, unpack
from icos_fl_warm_runtime import Pace

TTL_SLACK_SECONDS = 2.0
"""What a message lives longer than its sender waits: enough for its own way to the SuperLink, and
little, as a node may end a task whose message has expired."""

_PAUSE_SECONDS_MAX = 1.0
"""An empty answer that took so long was held back by the SuperLink until it had to be given."""

_CAUSE_LENGTH_MAX = 300
_VERSIONS_MAX, _VERSION_LENGTH_MAX = 8, 60

_RAISED = re.compile(r"<class '(?:[\w<>]+\.)*(\w+)'>:<'(.*)'>", re.DOTALL)
"""How Flower reports an exception of a ClientApp."""

Numbers = dict[str, float]


@dataclass
class Reply:
    """What one node answered, as far as it can be used."""

    name: str
    weights: dict[str, Flat] = field(default_factory=dict)
    train: dict[str, Numbers] = field(default_factory=dict)
    evaluate: dict[str, Numbers] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    """By metric: why it is not in the reply."""
    versions: list[str] = field(default_factory=list)
    """What the node says that it runs; empty where it is too old to say it."""
    unknown: list[str] = field(default_factory=list)
    """Keys of numbers that are of no known kind."""


@dataclass(frozen=True)
class Failure:
    """A node that did not answer with content."""

    state: str
    """``failed``, ``unusable`` or ``silent``."""
    cause: str


class Models(NamedTuple):
    """The models of all metrics as messages carry them, made once for all nodes."""

    record: ArrayRecord
    facts: dict[str, list[str]]
    """What the ConfigRecord says of the record."""


def models_of(weights: Mapping[str, Flat]) -> Models:
    array, facts = pack(weights)
    return Models(vector_record(array), facts)


def vector_record(vector: np.ndarray[Any, Any]) -> ArrayRecord:
    return ArrayRecord({records.WEIGHTS: Array(vector)})


def request(
    message_type: str,
    node_id: int,
    config: Mapping[str, Any],
    timeout_seconds: float,
    models: Models | None = None,
) -> Message:
    """One message of the federation's protocol, to be answered within *timeout_seconds*."""
    facts = {"protocol": records.PROTOCOL, **config} | (models.facts if models else {})
    content = RecordDict({records.CONFIG: ConfigRecord(facts)})
    if models:
        content[records.ARRAYS] = models.record
    ttl = timeout_seconds + TTL_SLACK_SECONDS
    return Message(content=content, message_type=message_type, dst_node_id=node_id, ttl=ttl)


class _Pending(NamedTuple):
    node_id: int
    timeout_seconds: float
    deadline: float


def exchange(grid: Grid, messages: list[Message]) -> dict[int, Reply | Failure]:
    """Send, and collect the replies by node id; who is silent at its timeout is a Failure.

    Flower's own send_and_receive looks for replies every 3 s; a round of a small model is shorter.
    A SuperLink may hold an empty answer back until there is a reply: it is asked again at once.
    """
    began = time.monotonic()  # sending is part of what a timeout is for
    sent = list(grid.push_messages(messages))
    pending: dict[str, _Pending] = {}
    answers: dict[int, Reply | Failure] = {}
    for index, message in enumerate(messages):
        node_id = message.metadata.dst_node_id
        timeout = message.metadata.ttl - TTL_SLACK_SECONDS
        # Flower returns None for a message that it refuses, and nothing at all for too large ones.
        if index < len(sent) and sent[index]:
            pending[sent[index]] = _Pending(node_id, timeout, began + timeout)
        else:
            answers[node_id] = Failure("failed", "the SuperLink did not take the message")
    pace = Pace(_PAUSE_SECONDS_MAX)
    while pending:
        came = False
        for reply in grid.pull_messages(list(pending)):
            if of := pending.pop(reply.metadata.reply_to_message_id, None):
                answers[of.node_id] = _decode(reply)
                came = True
        now = time.monotonic()
        for key, of in list(pending.items()):
            if now >= of.deadline:
                del pending[key]
                silent = f"no reply in {of.timeout_seconds:g} s"
                answers[of.node_id] = Failure("silent", silent)
        if came:
            pace.start_again()
        elif pending:
            pace.sleep(until=min(of.deadline for of in pending.values()))
    return answers


def _decode(message: Message) -> Reply | Failure:
    if message.has_error():
        return Failure("failed", _one_line(message.error.reason or ""))
    content = message.content
    node = content.get(records.NODE)
    if not isinstance(node, ConfigRecord) or not isinstance(node.get("name"), str):
        return Failure("unusable", f"the reply has no record {records.NODE!r} with a name")
    if node.get("protocol") != records.PROTOCOL:
        return Failure(
            "unusable",
            f"the node speaks protocol {node.get('protocol')!r} of the federation, "
            f"this server speaks {records.PROTOCOL}",
        )
    reply = Reply(str(node["name"]))
    missing = zip(_list(node, "missing-metrics"), _list(node, "missing-causes"), strict=False)
    reply.causes.update(missing)
    told = _list(node, "versions")[:_VERSIONS_MAX]
    reply.versions = [version[:_VERSION_LENGTH_MAX] for version in told]
    try:
        reply.weights = unpack(_array(content), node)
    except WeightsError as error:
        return Failure("unusable", f"the weights cannot be read: {error}")
    numbers = content.get(records.METRICS, MetricRecord())
    for key, value in numbers.items() if isinstance(numbers, MetricRecord) else ():
        kind, metric, name = records.split_number(key)
        known = {records.TRAIN: reply.train, records.EVALUATE: reply.evaluate}.get(kind)
        if known is None or not metric or isinstance(value, list):
            reply.unknown.append(key)
        else:
            known.setdefault(metric, {})[name] = float(value)
    return reply


def _array(content: RecordDict) -> np.ndarray[Any, Any]:
    record = content.get(records.ARRAYS, None)
    if record is None:
        return np.empty(0, np.float32)
    if not isinstance(record, ArrayRecord) or list(record) != [records.WEIGHTS]:
        raise WeightsError(f"{records.ARRAYS!r} is no ArrayRecord of one array {records.WEIGHTS!r}")
    try:
        array = record[records.WEIGHTS].numpy()
    except Exception:  # what numpy raises depends on the bytes, which are a stranger's
        array = None
    if not isinstance(array, np.ndarray):
        raise WeightsError("the array is not in numpy's format")
    return array


def _list(record: ConfigRecord, key: str) -> list[str]:
    value = record.get(key, [])
    return [str(item) for item in value] if isinstance(value, list) else []


def _one_line(reason: str) -> str:
    """What a ClientApp raised, without Flower's brackets; of several lines the last one says it."""
    if raised := _RAISED.fullmatch(reason.strip()):
        reason = f"{raised[1]}: {raised[2]}"
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines or ["the ClientApp ended without a reply"])[-1][:_CAUSE_LENGTH_MAX]
