"""Names of the records in the Flower messages between fl-server and fl-client, version 1.

Flower's Message API carries records by name in a RecordDict. One message serves every metric that
is being learned, so that a node starts one task a round, not one a metric: the records of a metric
end in its name. protos/README.md tells which message holds which.
"""

from typing import Final

PROTOCOL: Final = 1
"""Sent as ``protocol`` in the config of every message; a node refuses another one."""

CONFIG: Final = "config"
"""ConfigRecord from the server: what the node is asked to do, and for which metrics."""

NODE: Final = "node"
"""ConfigRecord of every reply: the node's name, and why a metric is missing from the reply."""

NUM_EXAMPLES: Final = "num-examples"
"""Key of the weight of a reply in each MetricRecord: sequences trained on, or evaluated."""


def arrays(metric: str) -> str:
    """Name of the ArrayRecord with the weights of *metric*'s model."""
    return f"arrays.{metric}"


def train(metric: str) -> str:
    """Name of the MetricRecord of training *metric*'s model."""
    return f"train.{metric}"


def evaluate(metric: str) -> str:
    """Name of the MetricRecord of evaluating *metric*'s model as it was received."""
    return f"evaluate.{metric}"
