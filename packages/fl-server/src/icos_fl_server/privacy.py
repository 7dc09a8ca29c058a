"""Differential privacy of a run: Flower's clipping, noise and account, over all metrics.

Who is protected is a node: what it sends changes the sum by no more than the clipping norm. The
server itself sees what nodes send; it is from the weights that little can be learned of one.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import (
    GaussianPrivacyEvent,
    Grid,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from icos_fl.federation.v1 import records

from icos_fl_server.errors import ServerError
from icos_fl_server.settings import RunConfig

_POPULATION = 1_000_000
"""Flower wants one that does not change, and counts nothing by it: which nodes were chosen is no
secret here, so that choosing few of many protects none."""


class Privacy:
    """One account for the models of all metrics: each new model of each is a release."""

    def __init__(self, config: RunConfig) -> None:
        self._noise_multiplier = config.dp_noise_multiplier
        self._clipping_norm = config.dp_clipping_norm
        self.accountant = _accountant(config.dp_delta)
        # Flower draws from numpy's own generator, and processes that were forked of one would draw
        # the same: noise that two runs share can be taken out again.
        np.random.seed()

    def protect(self, strategy: FedAvg) -> Strategy:
        """*strategy* with clipping before it and noise after it."""
        return Private(
            strategy, self._noise_multiplier, self._clipping_norm, 1, accountant=self.accountant
        )

    def resume(self, ledgers: dict[str, str]) -> None:
        """Count what was spent on the checkpoints that a run starts from, by metric.

        Raises ServerError for one that was made without.
        """
        for metric, ledger in ledgers.items():
            if not ledger:
                raise ServerError(
                    f"resume: the checkpoint of {metric} was made without differential privacy, "
                    "so it may tell anything; start anew, without resume"
                )
        # Each holds what was spent until it was made, by all metrics: the longest has the others.
        found: list[list[tuple[float, int]]] = [json.loads(text) for text in ledgers.values()]
        for noise_multiplier, count in max(found, key=_releases, default=[]):
            event = GaussianPrivacyEvent(noise_multiplier, 1, _POPULATION)
            self.accountant.compose(event, count)

    def spent(self) -> dict[str, Any]:
        """Until now, as the history has it."""
        spent = self.accountant.get_privacy_spent()
        return {"epsilon": spent.epsilon, "delta": spent.delta, "releases": spent.num_releases}


class Private(DifferentialPrivacyServerSideFixedClipping):
    """Flower's strategy for nodes that come and go.

    The sum is divided by the number of nodes that were asked, and every node counts the same. Who
    did not answer counts as one that changed nothing: what a node adds, and what its absence
    takes away, is never more than the clipping norm.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Strategy."""
        self.num_sampled_clients = len(list(grid.get_node_ids()))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """See Strategy."""
        sent = [_vector(reply.content.array_records["arrays"]) for reply in replies]
        current = _vector(self.current_arrays)
        silent = self.num_sampled_clients - len(sent)
        vectors = [*sent, *[current] * silent]
        return super().aggregate_train(server_round, [self._reply(v, current) for v in vectors])

    def ledger(self) -> str:
        """What the account has: noise multipliers, and the releases with each, as JSON."""
        assert self.accountant is not None
        found: dict[float, int] = {}
        for entry in self.accountant.state_dict()["compositions"]:  # type: ignore[attr-defined]
            noise_multiplier = entry["event"]["noise_multiplier"]
            found[noise_multiplier] = found.get(noise_multiplier, 0) + entry["count"]
        return json.dumps(list(found.items()))

    def _reply(self, vector: np.ndarray[Any, Any], current: np.ndarray[Any, Any]) -> Message:
        """As Flower expects it of a node of weight 1."""
        if np.linalg.norm(vector - current) < _least(self.clipping_norm):
            # Flower divides by the length of the update.
            vector = current.copy()
            vector[0] += max(_least(self.clipping_norm), np.spacing(abs(vector[0])))
        content = RecordDict(
            {
                "arrays": ArrayRecord({records.WEIGHTS: Array(vector)}),
                "metrics": MetricRecord({records.NUM_EXAMPLES: 1}),
            }
        )
        return Message(content=content, message_type=MessageType.TRAIN, dst_node_id=0)


def _least(clipping_norm: float) -> float:
    return 1e-9 * clipping_norm


def _vector(record: ArrayRecord) -> np.ndarray[Any, Any]:
    # In float32 the square of what a node sends could be infinite, or 0.
    return record[records.WEIGHTS].numpy().astype(np.float64)


def _releases(ledger: list[tuple[float, int]]) -> int:
    return sum(count for _, count in ledger)


def _accountant(delta: float) -> PrivacyAccountant:
    from flwr.serverapp import RdpAccountant

    config = PrivacyConfig(
        target_delta=delta,
        population_size=_POPULATION,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
    try:
        return RdpAccountant(config)
    except ImportError:
        raise ServerError(
            "dp-noise-multiplier: the ε that is spent is counted by icos-fl-server[dp], "
            "which is not installed here"
        ) from None
