"""Train and judge a model on a node's own sequences. No service is called here.

Shapes: n rows of all runs, b sequences of a batch, l steps of input, h steps ahead, f columns.
Values are z-scores; column 0 is the metric itself.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.data import DataLoader, Dataset, Sampler

Run = NDArray[np.float32]
"""Consecutive steps (t, f), without a gap."""

GRADIENT_NORM_MAX = 1.0
WEIGHT_DECAY = 1e-4
EVALUATION_BATCH_SIZE = 1024
# Below this a metric counts as one that never changes: its errors are not divided by their size.
NAIVE_MIN = 1e-3


class TrainingError(Exception):
    """Training that gave nothing usable; the message says why."""


@dataclass(frozen=True)
class TrainResult:
    num_examples: int
    """Sequences trained on."""
    loss: float
    """Mean over the last epoch, as a share of the error of repeating the last value on the same
    sequences: below 1 is better than that. NaN without sequences."""
    seconds: float


@dataclass(frozen=True)
class EvalResult:
    """How a model did; all NaN without sequences."""

    num_examples: int
    loss: float
    """``mae`` as a share of ``naive_mae``, that is, in the unit of the training loss."""
    mae: float
    """Mean absolute error over all sequences and steps, in standard deviations."""
    naive_mae: float
    """The same of repeating the last value."""


class SequenceDataset(Dataset[tuple[Tensor, Tensor]]):
    """Every sequence of every run; none crosses from one run to the next.

    Rows lie once on the device, and a batch is gathered from them by index: the loader gives whole
    batches (b, l, f) and (b, h), with no Python for each sequence.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        lookback: int,
        horizon: int,
        device: torch.device | str = "cpu",
    ) -> None:
        length = lookback + horizon
        starts, offset, rows = [], 0, [r for r in runs if len(r) >= length]
        for run in rows:
            starts.append(np.arange(offset, offset + len(run) - length + 1))
            offset += len(run)
        flat = np.concatenate(rows) if rows else np.zeros((length, 1))
        rows_nf = torch.as_tensor(flat, dtype=torch.float32).to(device)
        # A view: also the sequences that cross from one run to the next, which no start names.
        self._sequences_nft = rows_nf.unfold(0, length, 1)
        self._starts = torch.as_tensor(np.concatenate(starts) if starts else np.zeros(0, np.int64))
        self._starts = self._starts.to(device)
        self._lookback = lookback

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x_blf, y_bh = self.__getitems__([index])
        return x_blf[0], y_bh[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The batch of these sequences: windows (b, l, f) and what came (b, h)."""
        chosen_b = self._starts[torch.as_tensor(indices, device=self._starts.device)]
        sequences_btf = self._sequences_nft[chosen_b].transpose(1, 2)
        return sequences_btf[:, : self._lookback], sequences_btf[:, self._lookback :, 0]

    def naive_mae(self) -> float:
        """Mean error of repeating the last value, over what is finite; NaN where nothing is."""
        values_nt = self._sequences_nft[self._starts, 0, self._lookback - 1 :]
        return float((values_nt[:, 1:] - values_nt[:, :1]).abs().nanmean())

    def loader(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches in an order drawn from *generator*, or oldest first without one."""
        order = _Batches(len(self), batch_size, generator)
        return DataLoader(self, batch_sampler=order, collate_fn=_as_it_is)


class _Batches(Sampler[Any]):
    """Indices of each batch as a tensor; Torch's own sampler makes a list of Python integers."""

    def __init__(self, count: int, batch_size: int, generator: torch.Generator | None) -> None:
        self._count, self._batch_size, self._generator = count, batch_size, generator

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self._generator is None:
            order_n = torch.arange(self._count)
        else:
            order_n = torch.randperm(self._count, generator=self._generator)
        return iter(torch.split(order_n, self._batch_size) if self._count else ())


def train(
    model: nn.Module,
    runs: Sequence[Run],
    *,
    lookback: int,
    horizon: int,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    device: torch.device | str = "cpu",
    seed: int = 0,
    proximal_mu: float = 0.0,
) -> TrainResult:
    """Train *model* in place on every sequence of *runs*, *epochs* times.

    A positive *proximal_mu* adds FedProx's ``mu / 2 * |w - w0|²`` to what is minimised, w0 being
    the weights at the call. A batch whose loss or gradient is not finite changes nothing.

    Raises TrainingError if that is so for every batch of the last epoch.
    """
    began = time.perf_counter()
    data = SequenceDataset(runs, lookback=lookback, horizon=horizon, device=device)
    if not len(data):
        return TrainResult(0, math.nan, 0.0)
    naive_mae = data.naive_mae()
    unit = max(naive_mae, NAIVE_MIN) if math.isfinite(naive_mae) else 1.0
    torch.manual_seed(seed)
    batches = data.loader(batch_size, torch.Generator().manual_seed(seed))
    model.to(device).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    anchor = [p.detach().clone() for p in weights] if proximal_mu > 0 else []
    optimizer = _AdamW(weights, learning_rate)
    loss = math.nan
    for _ in range(epochs):
        total, examples = torch.zeros((), device=device), 0
        for x_blf, y_bh in batches:
            batch_loss = nn.functional.l1_loss(model(x_blf), y_bh) / unit
            if _step(weights, optimizer, batch_loss, anchor, proximal_mu):
                total += batch_loss.detach() * len(y_bh)
                examples += len(y_bh)
        loss = float(total) / examples if examples else math.nan
    if math.isnan(loss):
        raise TrainingError(f"no batch of {len(data)} sequences gave a finite loss and gradient")
    return TrainResult(len(data), loss, time.perf_counter() - began)


def evaluate(
    model: nn.Module,
    runs: Sequence[Run],
    *,
    lookback: int,
    horizon: int,
    device: torch.device | str = "cpu",
) -> EvalResult:
    """Judge *model* on every sequence of *runs*, beside repeating the last value."""
    data = SequenceDataset(runs, lookback=lookback, horizon=horizon, device=device)
    if not len(data):
        return EvalResult(0, math.nan, math.nan, math.nan)
    model.to(device).eval()
    total, naive = 0.0, 0.0
    with torch.inference_mode():
        for x_blf, y_bh in data.loader(EVALUATION_BATCH_SIZE):
            total += float((model(x_blf) - y_bh).abs().sum())
            naive += float((x_blf[:, -1:, 0] - y_bh).abs().sum())
    mae, naive_mae = total / (len(data) * horizon), naive / (len(data) * horizon)
    return EvalResult(len(data), mae / max(naive_mae, NAIVE_MIN), mae, naive_mae)


def _step(
    weights: Sequence[Tensor],
    optimizer: "_AdamW",
    loss: Tensor,
    anchor: Sequence[Tensor],
    proximal_mu: float,
) -> bool:
    """Take one step of the optimizer; False, with nothing changed, if not all is finite."""
    if anchor:
        distances = [(w - w0).square().sum() for w, w0 in zip(weights, anchor, strict=True)]
        loss = loss + proximal_mu / 2 * torch.stack(distances).sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    # A loss that is not a number can have a gradient that is one.
    if not math.isfinite(float(norm + loss.detach())):
        return False
    if float(norm) > GRADIENT_NORM_MAX:
        nn.utils.clip_grads_with_norm_(weights, GRADIENT_NORM_MAX, norm)
    optimizer.step()
    return True


class _AdamW:
    """torch.optim.AdamW with its defaults, by torch's own function for a step.

    Making the class's object imports torch._dynamo: 3 s of CPU in every process, and Flower starts
    one for each message.
    """

    def __init__(self, weights: Sequence[Tensor], learning_rate: float) -> None:
        self._weights = weights
        self._learning_rate = learning_rate
        self._means = [torch.zeros_like(w) for w in weights]
        self._squares = [torch.zeros_like(w) for w in weights]
        self._steps = [torch.zeros((), device=w.device) for w in weights]

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights that have a gradient."""
        moving = [
            (w, w.grad, mean, square, step)
            for w, mean, square, step in zip(
                self._weights, self._means, self._squares, self._steps, strict=True
            )
            if w.grad is not None
        ]
        weights, gradients, means, squares, steps = map(list, zip(*moving, strict=True))
        adamw(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._learning_rate,
            weight_decay=WEIGHT_DECAY,
            eps=1e-8,
            maximize=False,
        )


def _as_it_is(batch: Any) -> Any:
    return batch
