"""The ClientApp: records in, records out. protos/README.md tells what each message holds."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat, Weights, WeightsError, pack, unpack
from icos_fl_warm_runtime import kept_folder

from icos_fl_client import metrics
from icos_fl_client.errors import ClientError, NoSequences
from icos_fl_client.kept import KeptSteps
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.settings import NodeConfig, RunConfig, parse

if TYPE_CHECKING:
    from icos_fl_client.node import Learner

TOLD = ("icos-fl-client", "flwr", "torch")
"""Distributions whose versions the controller shows."""

app = ClientApp()


@dataclass
class Answer:
    """What a reply is going to say."""

    weights: dict[str, Flat] = field(default_factory=dict)
    numbers: dict[str, int | float] = field(default_factory=dict)
    missing: dict[tuple[str, str], None] = field(default_factory=dict)
    """Metric and cause. What hinders the evaluation most often hinders the training too: it is
    told once."""

    def say(self, kind: str, metric: str, numbers: Mapping[str, int | float]) -> None:
        """*numbers* of training or evaluating *metric*."""
        for name, value in numbers.items():
            self.numbers[records.number(kind, metric, name)] = value

    @contextmanager
    def serving(self, metric: str) -> Iterator[None]:
        """A metric that cannot be served is named with its cause; the others are not touched."""
        from icos_fl_client.models import ModelError
        from icos_fl_client.training import TrainingError

        try:
            yield
        except (ClientError, ModelError, TrainingError) as error:
            self.missing[metric, str(error)] = None
            metrics.UNSERVED.labels(metric).inc()

    def content(self, node: str) -> RecordDict:
        """The records of *node*'s reply; a record of nothing is left out."""
        array, facts = pack(self.weights)
        told = ConfigRecord({"protocol": records.PROTOCOL, "name": node, **facts})
        told["missing-metrics"] = [metric for metric, _ in self.missing]
        told["missing-causes"] = [cause for _, cause in self.missing]
        told["versions"] = [f"{name} {version(name)}" for name in TOLD]
        content = RecordDict({records.NODE: told})
        if self.numbers:
            content[records.METRICS] = MetricRecord({**self.numbers})
        if self.weights:
            content[records.ARRAYS] = ArrayRecord({records.WEIGHTS: Array(array)})
        return content


@app.query()
def query(message: Message, context: Context) -> Message:
    """What this node can learn, and with which weights it would start."""

    def serve(learner: "Learner", _config: ConfigRecord, answer: Answer) -> None:
        for metric in learner.run.metric:
            with answer.serving(metric):
                weights, numbers = learner.offer(metric)
                answer.weights[metric] = Flat.of(weights)
                answer.say(records.TRAIN, metric, numbers)

    return _reply(message, context, serve)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Judge the weights that came, keep them, and train them on."""

    def serve(learner: "Learner", config: ConfigRecord, answer: Answer) -> None:
        received = _evaluate_and_keep(learner, message.content, config, answer)
        for metric in _names(config, "train-metrics"):
            with answer.serving(metric):
                try:
                    weights, numbers = learner.train(
                        metric,
                        _of(received, metric),
                        _number(config, "server-round"),
                        float(config.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
                    )
                except NoSequences:
                    answer.say(records.TRAIN, metric, {records.NUM_EXAMPLES: 0})
                    raise
                answer.weights[metric] = Flat.of(weights)
                answer.say(records.TRAIN, metric, numbers)
                metrics.tell(records.TRAIN, metric, numbers)

    return _reply(message, context, serve)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the weights that came, and keep them."""

    def serve(learner: "Learner", config: ConfigRecord, answer: Answer) -> None:
        _evaluate_and_keep(learner, message.content, config, answer)

    return _reply(message, context, serve)


Serve = Callable[["Learner", ConfigRecord, Answer], None]


def _reply(message: Message, context: Context, serve: Serve) -> Message:
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
    answer = Answer()
    with (
        ProcessorClient(
            node.processor_address, kept=_kept(), credentials=node.processor_credentials
        ) as processor,
        Learner(node, run, processor) as learner,
    ):
        serve(learner, config, answer)
    return Message(content=answer.content(node.node_name), reply_to=message)


def _kept() -> KeptSteps | None:
    """Where the node's tasks find the steps of those before; None where nothing outlives a task."""
    folder = kept_folder()
    return KeptSteps(folder) if folder is not None else None


def _evaluate_and_keep(
    learner: "Learner", content: RecordDict, config: ConfigRecord, answer: Answer
) -> dict[str, Weights]:
    """Judge the metrics that the server asks for; returns what it sent, by metric."""
    received = _received(content, config)
    for metric in _names(config, "evaluate-metrics"):
        with answer.serving(metric):
            numbers = learner.evaluate(metric, _of(received, metric))
            answer.say(records.EVALUATE, metric, numbers)
            metrics.tell(records.EVALUATE, metric, numbers)
    learner.keep(received, _number(config, "model-round"))
    return received


def _names(config: ConfigRecord, key: str) -> list[str]:
    value = config.get(key, [])
    assert isinstance(value, list)
    return [str(name) for name in value]


def _number(config: ConfigRecord, key: str) -> int:
    return int(config.get(key, 0))  # type: ignore[arg-type]


def _received(content: RecordDict, config: ConfigRecord) -> dict[str, Weights]:
    array = np.empty(0, np.float32)
    if records.ARRAYS in content:
        record = content[records.ARRAYS]
        assert isinstance(record, ArrayRecord)
        array = record[records.WEIGHTS].numpy()
    try:
        return {metric: flat.named() for metric, flat in unpack(array, config).items()}
    except WeightsError as error:
        raise ClientError(f"the server's weights cannot be read: {error}") from None


def _of(received: Mapping[str, Weights], metric: str) -> Weights:
    if metric not in received:
        raise ClientError(f"the server sent no weights for {metric}")
    return received[metric]
