"""What one node does for one metric: offer, judge, train and keep a model."""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import structlog
import torch
from icos_fl_timeseries_store import ModelVersion, StoreError, StoreSettings, connect
from numpy.typing import NDArray

from icos_fl_client import models, training
from icos_fl_client.data import Sequences
from icos_fl_client.errors import ConfigError, NoSequences, WrongWeights
from icos_fl_client.metrics import MODEL_ROUND
from icos_fl_client.processor_client import ProcessorClient
from icos_fl_client.settings import NodeConfig, RunConfig

Weights = dict[str, NDArray[np.float32]]
Metrics = dict[str, int | float]

KEEP_SECONDS_MAX = 5.0
"""The longest that a reply waits for the node's own store, after training."""

log = structlog.get_logger()


def build_model(run: RunConfig, metric: str) -> torch.nn.Module:
    """The run's model of *metric* with weights that its seed alone decides."""
    torch.manual_seed(run.seed)
    return models.build(
        run.model,
        lookback=run.time_step,
        horizon=run.horizon,
        features=1 + len(run.features_of(metric)),
        hidden_size=run.hidden_layer_size,
        num_layers=run.num_layers,
    )


def weights_of(model: torch.nn.Module) -> Weights:
    """The model's state as float32 arrays, by name, in order."""
    return {
        name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()
    }


def check_weights(model: torch.nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Raises WrongWeights where *weights* are not finite numbers in the shapes of *model*'s."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(array.shape) for name, array in weights.items()}
    for name in expected | given:
        if expected.get(name) != given.get(name):
            raise WrongWeights(
                f"tensor {name!r} of the weights has shape {given.get(name, 'none')}, "
                f"the model's has {expected.get(name, 'none')}"
            )
        if not np.isfinite(weights[name]).all():
            raise WrongWeights(f"tensor {name!r} of the weights is not finite")


def load_weights(model: torch.nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Put *weights* into *model*. Raises WrongWeights."""
    check_weights(model, weights)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})


def choose_device(node: NodeConfig, run: RunConfig) -> torch.device:
    """The accelerator that is there, or the CPU; the server's node takes ``server-device``.

    Raises ConfigError for a device that is not there.
    """
    if run.server_node and node.node_name == run.server_node and run.server_device != "auto":
        try:
            return torch.zeros(0, device=run.server_device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            cause = str(error).partition("\n")[0]
            raise ConfigError(f"server-device={run.server_device!r}: {cause}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass
class Learner:
    """One node in one round. Use it as a context manager: its end waits for what ``keep`` began.

    Sequences are fetched, and models built, once a metric, whatever is done with them.
    """

    node: NodeConfig
    run: RunConfig
    processor: ProcessorClient

    def __post_init__(self) -> None:
        if self.node.threads:
            torch.set_num_threads(self.node.threads)
        self._device = choose_device(self.node, self.run)
        self._sequences: dict[str, Sequences] = {}
        self._models: dict[str, torch.nn.Module] = {}
        self._keeping: threading.Thread | None = None

    def __enter__(self) -> "Learner":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._keeping:
            self._keeping.join(KEEP_SECONDS_MAX)
            if self._keeping.is_alive():
                log.warning(
                    "global model not kept: the store is too slow",
                    node=self.node.node_name,
                    waited_seconds=KEEP_SECONDS_MAX,
                )

    def offer(self, metric: str) -> tuple[Weights, Metrics]:
        """Initial weights and the number of training sequences; raises NoSequences."""
        count = self.processor.train_sequences(self.run.query(self.node.node_name, metric))
        return weights_of(build_model(self.run, metric)), {"num-examples": count}

    def evaluate(self, metric: str, weights: Weights) -> Metrics:
        """How *weights* do on the validation part; errors in the metric's unit.

        Without a sequence there: 0 examples. A young window has its first ones for training.
        """
        sequences = self._fetch(metric)
        model = self._model(metric)
        load_weights(model, weights)
        result = training.evaluate(
            model,
            [run.rows_tf for run in sequences.validation],
            lookback=self.run.time_step,
            horizon=self.run.horizon,
            device=self._device,
        )
        if not result.num_examples:
            return {"num-examples": 0}
        deviation = sequences.scale.standard_deviation
        return {
            "num-examples": result.num_examples,
            "eval-loss": result.loss,
            "mae": result.mae * deviation,
            "naive-mae": result.naive_mae * deviation,
        }

    def train(
        self, metric: str, weights: Weights, server_round: int, proximal_mu: float
    ) -> tuple[Weights, Metrics]:
        """Train *weights* on the training part; raises NoSequences if it has no sequence."""
        sequences = self._fetch(metric)
        if not sequences.train_sequences:
            raise NoSequences(
                f"{self.node.node_name}: {metric} has no sequence of "
                f"{self.run.time_step + self.run.horizon} steps without a gap in its training part"
            )
        model = self._model(metric)
        load_weights(model, weights)
        del self._models[metric]  # what is returned shares its memory
        result = training.train(
            model,
            [run.rows_tf for run in sequences.train],
            lookback=self.run.time_step,
            horizon=self.run.horizon,
            batch_size=self.run.batch_size,
            epochs=self.run.local_epochs,
            learning_rate=self.run.learning_rate,
            device=self._device,
            seed=self.run.seed + server_round,
            proximal_mu=proximal_mu,
        )
        metrics: Metrics = {"num-examples": result.num_examples, "seconds": result.seconds}
        if math.isfinite(result.loss):
            metrics["train-loss"] = result.loss
        return weights_of(model), metrics

    def keep(self, received: Mapping[str, Weights], model_round: int) -> None:
        """Keep the global models in the node's own store, to forecast from with the server gone.

        The store is asked while this node goes on, so that the reply does not wait for it. One
        that is down costs the forecasts their newest model, not the federation its node. Without
        a store nothing is kept.
        """
        if self.node.store is None:
            return
        fitting = {m: weights for m, weights in received.items() if self._fits(m, weights)}
        if fitting:
            arguments = (self.node.store, fitting, model_round)
            self._keeping = threading.Thread(target=self._put, args=arguments, daemon=True)
            self._keeping.start()

    def _put(self, where: StoreSettings, fitting: dict[str, Weights], model_round: int) -> None:
        try:
            with connect(where) as store:
                for metric, weights in fitting.items():
                    store.model_state(self.node.node_name, metric).put(
                        ModelVersion(
                            round=model_round,
                            weights=weights,
                            config=self.run.model_config_of(metric),
                            metadata={"created-unix-s": time.time()},
                        )
                    )
                    MODEL_ROUND.labels(metric).set(model_round)
        except StoreError as error:
            log.warning("global model not kept", node=self.node.node_name, error=str(error))

    def _fits(self, metric: str, weights: Weights) -> bool:
        """Weights that do not fit would break every forecast to come."""
        try:
            check_weights(self._model(metric), weights)
        except (WrongWeights, models.ModelError) as error:
            log.warning("global model does not fit", metric=metric, error=str(error))
            return False
        return True

    def _model(self, metric: str) -> torch.nn.Module:
        """Its weights are whatever was done with it last. Raises ModelError."""
        if metric not in self._models:
            self._models[metric] = build_model(self.run, metric)
        return self._models[metric]

    def _fetch(self, metric: str) -> Sequences:
        if metric not in self._sequences:
            self._sequences[metric] = self.processor.sequences(
                self.run.query(self.node.node_name, metric)
            )
        return self._sequences[metric]
