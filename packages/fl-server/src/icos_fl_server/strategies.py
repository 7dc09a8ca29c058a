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

AVERAGES = ("FedAvg", "FedProx")
"""Those whose new weights are the mean of what nodes sent, and nothing else."""

NODES_MIN = {"Krum": 3, "FedTrimmedAvg": 3}
"""Replies below which a strategy's rule means nothing: Krum compares a node with its n - 2 nearest,
the trimmed mean drops the lowest and the highest value."""

TRIMMED_SHARE = 1 / 3
"""Of each end. Flower's own 0.2 drops nothing below five nodes."""


def make(name: str, proximal_mu: float) -> FedAvg:
    """A strategy that takes all nodes that it is given: which ones is decided for all metrics at
    once, so that one message can serve them all."""
    extra: dict[str, dict[str, float]] = {
        "FedProx": {"proximal_mu": proximal_mu},
        "FedAvgM": {"server_momentum": 0.9},
        "FedTrimmedAvg": {"beta": TRIMMED_SHARE},
    }
    return STRATEGIES[name](
        min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **extra.get(name, {})
    )
