"""Flower's strategies by name, with what each needs beside the settings that all share."""

from collections.abc import Callable

from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
)

STRATEGIES: dict[str, Callable[..., FedAvg]] = {
    "FedAvg": FedAvg,
    "FedProx": FedProx,
    "FedAvgM": FedAvgM,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "Krum": Krum,
}

NODES_MIN = {"Krum": 3}
"""Replies below which a strategy's rule means nothing: Krum compares a node with n - 2 others."""


def make(name: str, proximal_mu: float) -> FedAvg:
    """A strategy that takes all nodes that it is given: which ones is decided for all metrics at
    once, so that one message can serve them all."""
    extra = {"proximal_mu": proximal_mu} if name == "FedProx" else {}
    return STRATEGIES[name](min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **extra)
