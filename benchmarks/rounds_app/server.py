"""Flower's own FedAvg, which tells after each round when it ended."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

FLOATS = 50_000


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, between a first and a last line of facts."""
    config = context.run_config
    nodes = int(config["nodes"])
    path = Path(str(config["times"]))
    slowest: list[float] = [0.0]

    def longest(replies: list[RecordDict], _weighted_by: str) -> MetricRecord:
        seconds = [
            float(str(record["seconds"]))
            for reply in replies
            for record in reply.metric_records.values()
        ]
        slowest[0] = max(seconds)
        return MetricRecord({"seconds": slowest[0]})

    def tell(number: int, _arrays: ArrayRecord) -> MetricRecord:
        with path.open("a") as file:
            fact = {"round": number, "at": time.time(), "training_seconds": slowest[0]}
            file.write(json.dumps(fact) + "\n")
        return MetricRecord({"round": number})

    strategy = FedAvg(
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
        train_metrics_aggr_fn=longest,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"weights": Array(np.zeros(FLOATS, np.float32))}),
        num_rounds=int(config["rounds"]),
        evaluate_fn=tell,
    )
