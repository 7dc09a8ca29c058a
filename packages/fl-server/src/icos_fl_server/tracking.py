"""Weights & Biases, for those who ask for it: one run a metric."""

from types import ModuleType
from typing import Any

from icos_fl_server.errors import ServerError

PROJECT = "ICOS-FL"


class Tracking:
    """Logs each round of each metric; does nothing unless it is enabled."""

    def __init__(self, metrics: tuple[str, ...], config: dict[str, Any], *, enabled: bool) -> None:
        self._runs: dict[str, Any] = {}
        if enabled:
            wandb = _wandb()
            for metric in metrics:
                try:
                    self._runs[metric] = wandb.init(
                        project=PROJECT,
                        name=f"{metric}-ServerApp",
                        config=config,
                        reinit="create_new",
                    )
                except wandb.Error as error:
                    raise ServerError(f"use-wandb: {error}") from None

    def round(self, metric: str, number: int, facts: dict[str, Any]) -> None:
        """The facts of *metric* in one round; the round is the step."""
        if metric in self._runs:
            numbers = {key: value for key, value in facts.items() if value is not None}
            self._runs[metric].log(numbers, step=number)

    def end(self, *, failed: bool) -> None:
        for run in self._runs.values():
            run.finish(exit_code=int(failed))


def _wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise ServerError(
            "use-wandb is true, but the package wandb is not installed: install "
            "icos-fl-server[wandb], or set use-wandb=false"
        ) from None
    return wandb
