"""An epoch of the client's training on sequences, against a bare loop over tensors in memory.

    uv run python benchmarks/training.py [--json]

Both train the default model on the same windows in batches of the same size, with the same
optimizer and loss, for the three epochs of a round, in turns. They take the threads that a node
takes where NODES of them share the machine: its cores divided among them, one at least. Figures are
medians of CPU time an epoch: nothing here waits, so other processes disturb them less.

train       ``icos_fl_client.training.train``: rows to tensors, sequences gathered in a DataLoader,
            gradients clipped and checked
bare        windows and targets lie cut in memory before the clock starts; nothing is clipped or
            checked
"""

import argparse
import json
import os
import statistics
import sys
import time

import numpy as np
import torch
from icos_fl_client.models import AnchorLSTM
from icos_fl_client.training import WEIGHT_DECAY, SequenceDataset, train
from numpy.typing import NDArray

Array = NDArray[np.float32]
LOOKBACK, HORIZON, BATCH = 40, 20, 64
LEARNING_RATE = 0.002
EPOCHS = 3
NODES = 2
# Rows and turns: an epoch of the small one takes milliseconds, so its median needs more of them.
SIZES = ((300, 61), (100_000, 3))
TARGET = 1.1


def walk(rows: int) -> Array:
    steps = np.random.default_rng(0).normal(size=(rows, 1)).cumsum(axis=0)
    return np.asarray((steps - steps.mean()) / steps.std(), dtype=np.float32)


def new_model() -> AnchorLSTM:
    torch.manual_seed(0)
    return AnchorLSTM(
        lookback=LOOKBACK, horizon=HORIZON, features=1, hidden_size=16, num_layers=1
    ).train()


def bare_epoch_seconds(windows: torch.Tensor, targets: torch.Tensor) -> float:
    model = new_model()
    began = time.process_time()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(windows)), BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.l1_loss(model(windows[chosen]), targets[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return (time.process_time() - began) / EPOCHS


def train_epoch_seconds(rows: Array) -> float:
    model = new_model()
    began = time.process_time()
    train(
        model,
        [rows],
        lookback=LOOKBACK,
        horizon=HORIZON,
        batch_size=BATCH,
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
    )
    return (time.process_time() - began) / EPOCHS


def measure(rows_count: int, turns: int) -> dict[str, float]:
    rows = walk(rows_count)
    data = SequenceDataset([rows], lookback=LOOKBACK, horizon=HORIZON)
    windows, targets = (t.contiguous() for t in data.__getitems__(range(len(data))))
    bare_epoch_seconds(windows[: 2 * BATCH], targets[: 2 * BATCH])  # torch's first calls
    trained, bare = [], []
    for _ in range(turns):
        trained.append(train_epoch_seconds(rows))
        bare.append(bare_epoch_seconds(windows, targets))
    train_seconds, bare_seconds = statistics.median(trained), statistics.median(bare)
    return {
        "rows": rows_count,
        "sequences": len(data),
        "train_seconds": train_seconds,
        "bare_seconds": bare_seconds,
        "ratio": train_seconds / bare_seconds,
        "target_max": TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // NODES)
    torch.set_num_threads(threads)
    results = [measure(*size) for size in SIZES]
    if arguments.json:
        print(
            json.dumps({"benchmark": "training", "threads": threads, "epochs": results}, indent=2)
        )
        return 0
    print(f"{threads} threads: {NODES} nodes on a machine of {os.cpu_count()} cores")
    for r in results:
        verdict = "met" if r["ratio"] <= TARGET else "MISSED"
        print(
            f"{r['rows']:>7} rows, {r['sequences']:>7} sequences: an epoch of train "
            f"{r['train_seconds']:.4f} s, bare loop {r['bare_seconds']:.4f} s, "
            f"ratio {r['ratio']:.2f} (target at most {TARGET}: {verdict})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
