"""Names in the Flower messages between fl-server and fl-client.

Flower's Message API carries records by name in a RecordDict, and transfers every record and every
array by a request of its own, on each hop. So one message serves all metrics that are being
learned, with one record of each kind: protos/README.md tells what is in them, and
``icos_fl.federation.v1.weights`` how the models of all metrics become one array.
"""

from typing import Final

PROTOCOL: Final = 2
"""Sent as ``protocol`` in the ConfigRecord of every message; who does not speak it refuses it."""

CONFIG: Final = "config"
"""ConfigRecord from the server: what the node is asked to do, and for which metrics."""

NODE: Final = "node"
"""ConfigRecord of every reply: the node's name, and why a metric is missing from the reply."""

ARRAYS: Final = "arrays"
"""ArrayRecord with the one array WEIGHTS; not there if no metric has weights in the message."""

WEIGHTS: Final = "weights"
"""Key of the array, (numbers,) float32, of the models of all metrics, one after the other."""

METRICS: Final = "metrics"
"""MetricRecord of a reply: all its numbers, under the keys that ``number`` makes."""

TRAIN: Final = "train"
"""Kind of a number of training a metric's model."""

EVALUATE: Final = "evaluate"
"""Kind of a number of evaluating a metric's model as it was received."""

NUM_EXAMPLES: Final = "num-examples"
"""The number that weights a node: sequences trained on, or evaluated."""


def number(kind: str, metric: str, name: str) -> str:
    """Key of the number *name* of *metric*, such as ``train.cpu_usage.num-examples``."""
    return f"{kind}.{metric}.{name}"


def split_number(key: str) -> tuple[str, str, str]:
    """Kind, metric and name of a key; a metric may have dots in it, the others have none."""
    kind, _, rest = key.partition(".")
    metric, _, name = rest.rpartition(".")
    return kind, metric, name
