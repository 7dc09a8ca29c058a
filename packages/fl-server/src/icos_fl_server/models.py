"""The global model of one metric, and how the nodes' replies become its new weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from icos_fl.federation.v1 import records
from icos_fl.federation.v1.weights import Flat

from icos_fl_server.checkpoints import Checkpoint
from icos_fl_server.messages import Numbers, vector_record
from icos_fl_server.nodes import FixedNodes
from icos_fl_server.privacy import Private


@dataclass
class Model:
    """The global model of one metric: a vector, which is all that a strategy needs."""

    strategy: Strategy
    weights: Flat
    round: int
    """That made these weights; counts on where a run resumes."""
    best_loss: float = math.inf

    @property
    def checkpoint(self) -> Checkpoint:
        ledger = self.strategy.ledger() if isinstance(self.strategy, Private) else ""
        return Checkpoint(self.round, self.weights, ledger)

    def configure(self, number: int, node_ids: list[int], grid: Grid) -> dict[int, dict[str, Any]]:
        """What the strategy tells each node that trains in round *number*."""
        messages = self.strategy.configure_train(
            number,
            vector_record(self.weights.vector),
            ConfigRecord(),
            FixedNodes(node_ids, grid),
        )
        return {
            message.metadata.dst_node_id: dict(message.content.config_records["config"])
            for message in messages
        }

    def aggregate(
        self, number: int, made_in_round: int, replies: Sequence[tuple[Flat, Numbers]]
    ) -> str:
        """New weights from *replies*; or the reason why the old ones stay."""
        messages = [_as_flower_expects(*reply) for reply in replies]
        record, _ = self.strategy.aggregate_train(number, messages)
        name = type(self.strategy).__name__
        if record is None:
            return f"{name} made no weights"
        # Back to float32: some strategies compute in float64.
        vector = np.asarray(record[records.WEIGHTS].numpy(), np.float32)
        if not np.isfinite(vector).all():
            return f"{name} made weights that are not finite"
        self.weights = Flat(vector, self.weights.layout)
        self.round = made_in_round
        return ""


def _as_flower_expects(weights: Flat, numbers: Numbers) -> Message:
    """One ArrayRecord and one MetricRecord with the weight alone: an extra key ends Flower's
    aggregation for all nodes."""
    content = RecordDict(
        {
            "arrays": vector_record(weights.vector),
            "metrics": MetricRecord({records.NUM_EXAMPLES: int(numbers[records.NUM_EXAMPLES])}),
        }
    )
    return Message(content=content, message_type=MessageType.TRAIN, dst_node_id=0)
