"""The example is built by its name, as a node does it, trained, and worth it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from icos_fl_client.models import build
from icos_fl_client.training import evaluate, train

SHAPE = {"lookback": 24, "horizon": 8}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "src")


def sine(count: int, phase: float) -> np.ndarray:
    return np.sin(np.arange(count) * 2 * np.pi / 20 + phase).astype(np.float32)[:, None]


def test_a_brought_model_beats_the_last_value_on_a_sine():
    torch.manual_seed(0)
    model = build("bring_a_model:build", features=1, hidden_size=1, num_layers=1, **SHAPE)

    train(
        model, [sine(500, 0.0)], batch_size=32, epochs=20, learning_rate=0.01, seed=0, **SHAPE
    )  # fmt: skip
    result = evaluate(model, [sine(200, 1.0)], **SHAPE)

    assert result.num_examples == 169
    assert result.mae < 0.2 * result.naive_mae


def test_a_brought_model_takes_further_features():
    model = build("bring_a_model:build", features=3, hidden_size=1, num_layers=1, **SHAPE)

    assert model(torch.zeros(2, 24, 3)).shape == (2, 8)
