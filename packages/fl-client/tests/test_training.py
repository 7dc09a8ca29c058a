"""Which sequences are trained on, what a step may not do, and what training is worth."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from icos_fl_client import training
from icos_fl_client.models import AnchorLSTM
from icos_fl_client.training import SequenceDataset, TrainingError, evaluate, train
from torch import nn

SHAPE = {"lookback": 8, "horizon": 4}
TRAINING = {**SHAPE, "batch_size": 32, "epochs": 3, "learning_rate": 0.01}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def wave(count: int, phase: float = 0.0) -> np.ndarray:
    return rows(*np.sin(np.arange(count) * 2 * np.pi / 16 + phase))


def new_model(**sizes: int) -> AnchorLSTM:
    torch.manual_seed(0)
    return AnchorLSTM(
        **({**SHAPE, "features": 1, "hidden_size": 8, "num_layers": 1} | sizes),
    )


def copy_of(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def distance(model: nn.Module, start: list[torch.Tensor]) -> float:
    return sum(
        float((w.detach() - w0).square().sum())
        for w, w0 in zip(model.parameters(), start, strict=True)
    )


class Repeat(nn.Module):
    """Repeats the last value, plus a weight."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x_blf: torch.Tensor) -> torch.Tensor:
        return x_blf[:, -1:, 0].expand(-1, 2) + self.bias


def test_sequences_are_every_window_of_a_run_and_none_crosses_to_the_next():
    data = SequenceDataset(
        [rows(0, 1, 2, 3, 4), rows(9, 9), rows(10, 11, 12, 13)], lookback=2, horizon=2
    )

    windows, targets = data.__getitems__(range(len(data)))

    assert windows[:, :, 0].tolist() == [[0, 1], [1, 2], [10, 11]]
    assert targets.tolist() == [[2, 3], [3, 4], [12, 13]]


def test_targets_are_the_first_column():
    run = np.array([[1, 10], [2, 20], [3, 30]], dtype=np.float32)

    window, target = SequenceDataset([run], lookback=2, horizon=1)[0]

    assert window.tolist() == [[1, 10], [2, 20]]
    assert target.tolist() == [3]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=5),
    lookback=st.integers(1, 4),
    horizon=st.integers(1, 4),
    batch_size=st.integers(1, 7),
)
def test_an_epoch_has_every_sequence_once(lengths, lookback, horizon, batch_size):
    runs = [rows(*(100 * i + np.arange(n))) for i, n in enumerate(lengths)]
    data = SequenceDataset(runs, lookback=lookback, horizon=horizon)
    expected = [
        100 * i + k for i, n in enumerate(lengths) for k in range(n - lookback - horizon + 1)
    ]

    batches = list(data.loader(batch_size, torch.Generator().manual_seed(0)))

    assert len(batches) == math.ceil(len(expected) / batch_size)
    assert expected == sorted(int(first) for x, _ in batches for first in x[:, 0, 0])


def test_training_beats_the_last_value_on_a_wave():
    shape = {"lookback": 16, "horizon": 8}
    model = new_model(**shape)

    trained = train(model, [wave(400)], **(TRAINING | shape | {"epochs": 15}))
    result = evaluate(model, [wave(100, phase=0.3)], **shape)

    assert trained.num_examples == 377
    assert trained.loss < 0.7
    assert result.mae < 0.7 * result.naive_mae


def test_the_same_seed_gives_the_same_weights():
    first, second, other = new_model(), new_model(), new_model()

    train(first, [wave(60)], **TRAINING, seed=1)
    train(second, [wave(60)], **TRAINING, seed=1)
    train(other, [wave(60)], **TRAINING, seed=2)

    assert distance(second, copy_of(first)) == 0
    assert distance(other, copy_of(first)) > 0


def test_too_short_runs_are_zero_examples_and_leave_the_weights():
    model = new_model()
    start = copy_of(model)

    result = train(model, [wave(11), wave(3)], **TRAINING)

    assert result.num_examples == 0
    assert math.isnan(result.loss)
    assert distance(model, start) == 0


def test_a_batch_that_is_not_finite_changes_nothing_and_the_others_train():
    model = new_model()
    start = copy_of(model)
    broken = wave(12)
    broken[-1] = np.nan

    result = train(model, [wave(40), broken], **{**TRAINING, "batch_size": 1})

    assert math.isfinite(result.loss)
    assert 0 < distance(model, start) < math.inf


def test_training_without_one_finite_batch_is_an_error():
    with pytest.raises(TrainingError, match="no batch of 1 sequences gave a finite loss"):
        train(new_model(), [np.full((12, 1), np.inf, np.float32)], **TRAINING)


def test_a_metric_that_never_changes_trains_to_no_error():
    result = train(new_model(), [rows(*[0.0] * 40)], **TRAINING)

    assert result.loss == 0


def test_fedprox_stays_nearer_to_the_global_weights():
    free, held = new_model(), new_model()
    start = copy_of(free)

    train(free, [wave(100)], **TRAINING)
    train(held, [wave(100)], **TRAINING, proximal_mu=10.0)

    assert distance(held, start) < 0.5 * distance(free, start)


def test_errors_are_means_over_sequences_and_steps():
    # Windows [0], [1], [3] are followed by [1, 3], [3, 6], [6, 10]: the last value is off by
    # 1, 3, 2, 5, 3 and 7, and one that adds 1 by 0, 2, 1, 4, 2 and 6.
    result = evaluate(Repeat(1.0), [rows(0, 1, 3, 6, 10)], lookback=1, horizon=2)

    assert result.num_examples == 3
    assert pytest.approx(21 / 6) == result.naive_mae
    assert pytest.approx(15 / 6) == result.mae
    assert pytest.approx(15 / 21) == result.loss


def test_the_loss_of_repeating_the_last_value_is_one():
    model = Repeat()

    trained = train(
        model, [rows(*np.arange(20.0) ** 2)], **{**TRAINING, "lookback": 1, "horizon": 2,
        "epochs": 1, "learning_rate": 0.0},
    )  # fmt: skip

    assert pytest.approx(1.0) == trained.loss


def test_nothing_to_evaluate_on_is_zero_examples():
    result = evaluate(new_model(), [wave(11)], **SHAPE)

    assert result.num_examples == 0
    assert math.isnan(result.mae)


def test_the_optimizer_is_torchs_adamw_without_its_imports():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    weights = list(ours.parameters())
    mine = training._AdamW(weights, 0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=training.WEIGHT_DECAY)
    for _ in range(5):
        x, y = torch.randn(4, 3), torch.randn(4, 2)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            nn.functional.l1_loss(model(x), y).backward()
            optimizer.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_training_does_not_import_the_compiler():
    code = (
        "import sys, numpy as np\n"
        "from icos_fl_client import models, training\n"
        "shape = {'lookback': 4, 'horizon': 2}\n"
        "model = models.AnchorLSTM(**shape, features=1, hidden_size=4, num_layers=1)\n"
        "run = np.sin(np.arange(40, dtype=np.float32))[:, None]\n"
        "training.train(model, [run], **shape, batch_size=8, epochs=1,"
        " learning_rate=0.01)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
