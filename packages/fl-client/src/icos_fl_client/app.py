"""The ClientApp: records in, records out. protos/README.md tells what each message holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from icos_fl.federation.v1 import records

from icos_fl_client.errors import ClientError, NoSequences
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.settings import NodeConfig, RunConfig, parse

if TYPE_CHECKING:
    from icos_fl_client.node import Learner, Weights

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """What this node can learn, and with which weights it would start."""

    def answer(learner: "Learner", _config: ConfigRecord, reply: RecordDict) -> None:
        for metric in learner.run.metric:
            with _missing(reply, metric):
                weights, metrics = learner.offer(metric)
                reply[records.arrays(metric)] = _array_record(weights)
                reply[records.train(metric)] = MetricRecord(dict(metrics))

    return _reply(message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Judge the weights that came, keep them, and train them on."""

    def answer(learner: "Learner", config: ConfigRecord, reply: RecordDict) -> None:
        _evaluate_and_keep(learner, message.content, config, reply)
        for metric in _names(config, "train-metrics"):
            with _missing(reply, metric):
                received = _weights(message.content, metric)
                try:
                    weights, metrics = learner.train(
                        metric,
                        received,
                        _number(config, "server-round"),
                        float(config.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
                    )
                except NoSequences:
                    reply[records.train(metric)] = MetricRecord({records.NUM_EXAMPLES: 0})
                    raise
                reply[records.arrays(metric)] = _array_record(weights)
                reply[records.train(metric)] = MetricRecord(dict(metrics))

    return _reply(message, context, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the weights that came, and keep them."""

    def answer(learner: "Learner", config: ConfigRecord, reply: RecordDict) -> None:
        _evaluate_and_keep(learner, message.content, config, reply)

    return _reply(message, context, answer)


Answer = Callable[["Learner", ConfigRecord, RecordDict], None]


def _reply(message: Message, context: Context, answer: Answer) -> Message:
    from icos_fl_client.node import Learner  # torch: a bad setting is told without its import

    config = message.content.get(records.CONFIG, ConfigRecord())
    assert isinstance(config, ConfigRecord)
    if config.get("protocol") != records.PROTOCOL:
        raise ClientError(
            f"the server speaks protocol {config.get('protocol')!r} of the federation, "
            f"this node speaks {records.PROTOCOL}"
        )
    node = parse(NodeConfig, context.node_config, "node config")
    run = parse(RunConfig, context.run_config, "run config")
    reply = RecordDict()
    reply[records.NODE] = ConfigRecord(
        {"name": node.node_name, "missing-metrics": [], "missing-causes": []}
    )
    with ProcessorClient(node.processor_address) as processor:
        answer(Learner(node, run, processor), config, reply)
    return Message(content=reply, reply_to=message)


def _evaluate_and_keep(
    learner: "Learner", content: RecordDict, config: ConfigRecord, reply: RecordDict
) -> None:
    received = {
        metric: _weights(content, metric)
        for metric in _names(config, "metrics")
        if records.arrays(metric) in content
    }
    for metric in _names(config, "evaluate-metrics"):
        with _missing(reply, metric):
            metrics = learner.evaluate(metric, _weights(content, metric))
            reply[records.evaluate(metric)] = MetricRecord(dict(metrics))
    learner.keep(received, _number(config, "model-round"))


@contextmanager
def _missing(reply: RecordDict, metric: str) -> Iterator[None]:
    """A metric that cannot be served is named with its cause; the others are not touched."""
    from icos_fl_client.models import ModelError
    from icos_fl_client.training import TrainingError

    try:
        yield
    except (ClientError, ModelError, TrainingError) as error:
        node = reply[records.NODE]
        assert isinstance(node, ConfigRecord)
        metrics, causes = _names(node, "missing-metrics"), _names(node, "missing-causes")
        # What hinders the evaluation most often hinders the training too: it is told once.
        if (metric, str(error)) not in zip(metrics, causes, strict=True):
            node["missing-metrics"] = [*metrics, metric]
            node["missing-causes"] = [*causes, str(error)]


def _names(config: ConfigRecord, key: str) -> list[str]:
    value = config.get(key, [])
    assert isinstance(value, list)
    return [str(name) for name in value]


def _number(config: ConfigRecord, key: str) -> int:
    return int(config.get(key, 0))  # type: ignore[arg-type]


def _weights(content: RecordDict, metric: str) -> "Weights":
    if records.arrays(metric) not in content:
        raise ClientError(f"the server sent no weights for {metric}")
    record = content[records.arrays(metric)]
    assert isinstance(record, ArrayRecord)
    return {name: array.numpy() for name, array in record.items()}


def _array_record(weights: "Weights") -> ArrayRecord:
    from flwr.app import Array

    return ArrayRecord({name: Array(np.asarray(array)) for name, array in weights.items()})
