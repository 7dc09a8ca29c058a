"""What a node's tasks tell Prometheus, through the SuperExec that runs them."""

from collections.abc import Mapping

from icos_fl.federation.v1 import records
from icos_fl_warm_runtime import TASK_REGISTRY
from prometheus_client import Counter, Gauge

_SEQUENCES = Counter(
    "icos_fl_client_trained_sequences",
    "Sequences trained on, each once a training",
    ["metric"],
    registry=TASK_REGISTRY,
)
_SECONDS = Counter(
    "icos_fl_client_training_seconds", "Time in training", ["metric"], registry=TASK_REGISTRY
)
UNSERVED = Counter(
    "icos_fl_client_unserved",
    "Times that the server asked for a metric in vain",
    ["metric"],
    registry=TASK_REGISTRY,
)
MODEL_ROUND = Gauge(
    "icos_fl_client_model_round",
    "Round of the newest global model that the node has kept",
    ["metric"],
    registry=TASK_REGISTRY,
)
_NEWEST = {
    name: Gauge(
        f"icos_fl_client_{name.replace('-', '_')}", text, ["metric"], registry=TASK_REGISTRY
    )
    for name, text in (
        ("train-loss", "Loss of the newest training"),
        ("eval-loss", "Loss of the newest global model on the node's validation part"),
        ("mae", "Mean absolute error of the newest global model, in the metric's unit"),
        ("naive-mae", "The same of repeating the last value"),
    )
}


def tell(kind: str, metric: str, numbers: Mapping[str, int | float]) -> None:
    """*numbers* of training or evaluating *metric*, as the reply has them."""
    if kind == records.TRAIN:
        _SEQUENCES.labels(metric).inc(numbers.get(records.NUM_EXAMPLES, 0))
        _SECONDS.labels(metric).inc(numbers.get("seconds", 0))
    for name in _NEWEST.keys() & numbers.keys():
        _NEWEST[name].labels(metric).set(numbers[name])
