"""What of a node's reply can be aggregated, and why the rest of it cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat

from icos_fl_server.checkpoints import difference
from icos_fl_server.messages import Numbers, Reply

TRAIN_KEYS = {records.NUM_EXAMPLES, "train-loss", "seconds"}
EVALUATE_KEYS = {records.NUM_EXAMPLES, "eval-loss", "mae", "naive-mae"}


@dataclass
class Sorted:
    """A node's training reply, sorted by metric."""

    usable: dict[str, tuple[Flat, Numbers]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """The node has nothing to train on, with its own cause or an empty one."""
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """``ok``, ``unusable`` or ``no-data``, as the history has it."""
        if self.usable:
            return "ok"
        return "unusable" if self.unusable else "no-data"


def sort_reply(reply: Reply, expected: Mapping[str, Flat]) -> Sorted:
    """Sort *reply* by the metrics of *expected*, the global weights that the node trained on."""
    result = Sorted()
    for metric, weights in expected.items():
        numbers = reply.train.get(metric, {})
        examples = numbers.get(records.NUM_EXAMPLES)
        if examples is None and metric in reply.causes:
            result.missing[metric] = reply.causes[metric]
        elif examples is None:
            result.unusable[metric] = f"no {records.NUM_EXAMPLES} of training {metric} in the reply"
        elif not np.isfinite(examples) or examples < 0 or examples != int(examples):
            result.unusable[metric] = f"{records.NUM_EXAMPLES} of {metric} is {examples:g}"
        elif examples == 0:
            result.missing[metric] = ""
        elif metric not in reply.weights:
            result.unusable[metric] = f"no weights of {metric} in the reply"
        elif cause := _flaw(reply.weights[metric], weights):
            result.unusable[metric] = f"weights of {metric}: {cause}"
        else:
            # In the order of the global weights: a strategy goes by position, not by name.
            result.usable[metric] = reply.weights[metric].arranged(weights.layout), numbers
    return result


def extras(reply: Reply, metrics: Mapping[str, object]) -> list[str]:
    """What is in *reply* that nobody asked for. It is left out: an extra key ends Flower's own
    aggregation for all nodes."""
    found = []
    for kind, known, of_metric in (
        ("train", TRAIN_KEYS, reply.train),
        ("evaluate", EVALUATE_KEYS, reply.evaluate),
    ):
        for metric, numbers in of_metric.items():
            if metric not in metrics:
                found.append(f"{kind}.{metric}")
            else:
                found += [f"{kind}.{metric} {key}" for key in sorted(numbers.keys() - known)]
    found += [f"weights of {metric}" for metric in reply.weights if metric not in metrics]
    return sorted(found + reply.unknown)


def weighted(replies: list[Numbers], key: str) -> float | None:
    """Mean of *key* weighted by examples over the replies in which both are finite."""
    pairs = [(n.get(key, np.nan), n.get(records.NUM_EXAMPLES, np.nan)) for n in replies]
    pairs = [(value, weight) for value, weight in pairs if np.isfinite([value, weight]).all()]
    total = sum(weight for _, weight in pairs if weight > 0)
    if not total:
        return None
    return float(sum(value * weight for value, weight in pairs if weight > 0) / total)


def _flaw(weights: Flat, expected: Flat) -> str:
    """Why *weights* cannot be averaged with others; empty if they can."""
    if cause := difference(weights.layout, expected.layout):
        return cause
    if not np.isfinite(weights.vector).all():
        tensors = weights.named().items()
        name = next(name for name, tensor in tensors if not np.isfinite(tensor).all())
        return f"tensor {name!r} is not finite"
    return ""
