"""Sends the weights back, or trains ICOS-FL's LSTM with them on recorded rows.

Imports torch, as the client of nearly every Flower app does, whether it then computes or not.
"""

import os
import signal
import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from icos_fl_client import models, training

app = ClientApp()

STEPS, LOOKBACK, HORIZON, COLUMNS, EPOCHS, HIDDEN = 260, 30, 5, 4, 3, 16


@app.train()
def train(message: Message, context: Context) -> Message:
    """Three epochs of 226 sequences of 30 steps of four columns."""
    weights = message.content.array_records["arrays"]["weights"].numpy()
    began = time.perf_counter()
    number = int(str(message.content.config_records["config"]["server-round"]))
    if context.node_config["number"] == 0 and number % 2 == 0:
        _fail(str(context.run_config["fault"]))
    seconds = time.perf_counter() - began
    if context.run_config["compute"] == "lstm":
        weights, seconds = _train(weights, int(context.node_config["number"]))
    content = RecordDict(
        {
            "arrays": ArrayRecord({"weights": Array(weights)}),
            "metrics": MetricRecord({"num-examples": 1, "seconds": seconds}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The mean of the weights, or the model's loss with them."""
    weights = message.content.array_records["arrays"]["weights"].numpy()
    loss = float(weights.mean())
    if context.run_config["compute"] == "lstm":
        loss = _evaluate(weights, int(context.node_config["number"]))
    metrics = MetricRecord({"num-examples": 1, "loss": loss})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _fail(fault: str) -> None:
    """On the first node, in every second round."""
    if fault == "raise":
        raise ValueError("as asked")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "leak":
        _leaked.append(np.ones(500 * 2**20, np.uint8))


_leaked: list[np.ndarray] = []


def _rows(number: int) -> np.ndarray:
    """A recorded load's like: daily wave, noise and steps, another for each node."""
    chance = np.random.default_rng(number)
    steps_t = np.arange(STEPS)
    columns = [
        np.sin(steps_t / (5 + column)) + 0.1 * chance.standard_normal(STEPS)
        for column in range(COLUMNS)
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _model(weights: np.ndarray) -> torch.nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.build(
        "icos_fl_client.models:AnchorLSTM",
        lookback=LOOKBACK,
        horizon=HORIZON,
        features=COLUMNS,
        hidden_size=HIDDEN,
        num_layers=1,
    )
    if weights.any():
        vector = torch.tensor(weights[: sum(p.numel() for p in model.parameters())])
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
    return model


def _train(weights: np.ndarray, number: int) -> tuple[np.ndarray, float]:
    model = _model(weights)
    began = time.perf_counter()
    training.train(
        model,
        [_rows(number)],
        lookback=LOOKBACK,
        horizon=HORIZON,
        batch_size=64,
        epochs=EPOCHS,
        learning_rate=0.002,
        device=torch.device("cpu"),
        seed=number,
        proximal_mu=0.0,
    )
    seconds = time.perf_counter() - began
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    trained = np.zeros_like(weights)
    trained[: len(vector)] = vector
    return trained, seconds


def _evaluate(weights: np.ndarray, number: int) -> float:
    result = training.evaluate(
        _model(weights),
        [_rows(number)],
        lookback=LOOKBACK,
        horizon=HORIZON,
        device=torch.device("cpu"),
    )
    return result.loss
