"""What a federation gives to a node that it has never seen, in its first hour and its first day.

    uv run python benchmarks/newcomers.py [--json] [--traces DIR] [--seeds 3]

Each node in turn is new: it begins at the cut, without a past, and the others have trained on their
rows before the cut (federations.py). Its mixture is told without a model, and with that of 1, 2, 4
and all other nodes; and each model by itself. Figures are mean absolute errors as ratios to
repeating the last value: median / worst over nodes and metrics, of the mean over seeds. There is no
target: whatever comes out is the answer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import federations
import numpy as np
from icos_fl_local import traces
from replays import TASKS, Array, Replay, Series, Task, load_series

HOUR_SECONDS, DAY_SECONDS = 3600, 86_400
CHOSEN = ("15 s grid, 5 min", "300 s grid, 1 h")


def ratio(found: Replay, said_th: Array, rows: int) -> float:
    """Over the forecasts of the first *rows*; where nothing is said, the last value is repeated."""
    last_th = found.said_tkh[:, 0]
    first = np.flatnonzero(np.isfinite(last_th[:, 0]))[:rows]
    said_th = np.where(np.isnan(said_th), last_th, said_th)
    error, naive = (np.abs(each - found.actual_th)[first] for each in (said_th, last_th))
    return float(np.nansum(error) / np.nansum(naive))


def measure(series: Series, found: Replay, answer: dict[str, Any], task: Task) -> dict[str, Any]:
    figures: dict[str, Any] = {"node": series.node, "metric": series.metric}
    for span, seconds in (("first hour", HOUR_SECONDS), ("first day", DAY_SECONDS)):
        rows = seconds // task.interval_s
        figures[span] = {"without a model": ratio(found, found.yhat_th, rows)}
        for federation, (mixed_vth, alone_vth) in answer.items():
            for label, said_vth in (("with", mixed_vth), ("alone", alone_vth)):
                ratios = [ratio(found, said_th, rows) for said_th in said_vth]
                figures[span][f"{label}: model of {federation}"] = float(np.mean(ratios))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--traces", type=Path, default=traces.SHIPPED, help="folder of CSV files")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each federation")
    arguments = parser.parse_args()
    all_traces = traces.load(arguments.traces)
    results: dict[str, list[dict[str, Any]]] = {}
    for task in (task for task in TASKS if task.name in CHOSEN):
        by_metric: dict[str, list[Series]] = {}
        for series in load_series(all_traces, task):
            by_metric.setdefault(series.metric, []).append(series)
        for metric, of_metric in by_metric.items():
            seeds = range(arguments.seeds)
            for series, found, answer in federations.newcomers(of_metric, task.steps, seeds):
                print(f"{task.name}: {series.node} {metric}", file=sys.stderr, flush=True)
                results.setdefault(task.name, []).append(measure(series, found, answer, task))
    if arguments.json:
        print(json.dumps({"benchmark": "newcomers", "tasks": results}, indent=2))
        return 0
    for name, figures in results.items():
        for span in ("first hour", "first day"):
            print(f"\n{name}, {span}")
            labels = dict.fromkeys(label for each in figures for label in each[span])
            for label in labels:
                ratios = [each[span][label] for each in figures if label in each[span]]
                middle, worst = np.median(ratios), max(ratios)
                print(f"  {label:28}{middle:.3f} / {worst:.3f} of {len(ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
