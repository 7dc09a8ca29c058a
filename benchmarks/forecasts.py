"""What forecasts are worth on recorded machines: their error, their intervals, a change of load.

    uv run python benchmarks/forecasts.py [--json] [--traces DIR] [--plot FILE.png] [--seeds N]

Each trace is replayed, step by step, into the combination that a node runs, which learns from the
node's own past alone. The settings were chosen on the first 40 % of each node's rows, and on
machines that are not among the traces (a server of the same source, and 14 other series of the
Numenta benchmark); the forecasts that start after them are scored (rolling origin, every step ahead
up to the horizon, no target across a gap). That part of the traces that are not shipped had been
scored twice before the mixture's last settings were chosen. Those of the memory and the intervals
were chosen without a look at it; a look then showed one node worse off than it may be, and the
drift and the memory's largest growth were changed by what the other part told. The newest row of a
step was added by what the first 40 % told. So figures of other machines are the better judge.
Everything is told by node and metric.

error       mean absolute error as a ratio to that of repeating the last value, over the 60 % and
            over each slice of 30 % in it, a slice every 5 %; beside it that of the simple
            forecaster that is best in hindsight
intervals   coverage, and the Winkler score as a ratio to that of intervals from the newest 200
            errors of the last value
change      a node without a past that is idle, and then under its highest load: rows until the
            error over the next 20 rows is within 1.1 of that of the forecaster that is best after
            the change
models      with --seeds: the default model as one more forecaster, trained by a federation, by each
            node alone and on all rows pooled, every node cut at the same moment (federations.py)

Memory on the 15 s grid has no target, and is told too. Traces under 500 steps are left out. Takes
some minutes on one core, with --seeds 3 half an hour. Exit status 1 if a target is missed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import federations
import numpy as np
from icos_fl_client.forecasting import Combination
from icos_fl_local import traces
from icos_fl_processor.windows import resample
from numpy.lib.stride_tricks import sliding_window_view
from replays import (
    TASKS,
    Array,
    Figures,
    Replay,
    Series,
    Task,
    errors,
    load_series,
    newest_rows,
    replay,
    score,
)

COVERAGE_OFF_MAX, WINKLER_MAX, SLICE_MAX = 0.04, 0.8, 1.07
PART_STEPS, PART_STRIDE = 120, 20
CHANGE_ROWS, CHANGE_RATIO_MAX = 20, 1.1


def changes(all_traces: list[traces.Trace]) -> Iterator[tuple[Figures, Series, Replay]]:
    """Each node without a past: half an hour at its idlest, and right after it at its busiest."""
    task = TASKS[0]
    for trace in all_traces:
        metrics = [name for name in ("cpu_percent", "power_w") if name in trace.columns]
        if trace.interval_seconds > task.interval_s or metrics[:1] != ["cpu_percent"]:
            continue
        values_tf = trace.values_tf[:, [trace.columns.index(name) for name in metrics]]
        steps = resample(trace.times_s * 10**9, values_tf, task.interval_s * 10**9)
        found_csf = np.stack([steps.values_sf, newest_rows(trace.times_s, values_tf, steps)])
        parts = [
            found_csf[:, start : start + PART_STEPS]
            for run in steps.runs
            for start in range(run.start, run.stop - PART_STEPS + 1, PART_STRIDE)
        ]
        if len(parts) > 1:
            parts.sort(key=lambda part_csf: float(part_csf[0, :, 0].mean()))
            found_csf = np.concatenate([parts[0], parts[-1]], axis=1)
            for place, metric in enumerate(metrics):
                time_s_t = np.arange(2.0 * PART_STEPS)
                values_t, rows_t = found_csf[:, :, place]
                series = Series(trace.node, metric, values_t, rows_t, time_s_t)
                yield _after_change(series, replay(series, task.steps))


def _after_change(series: Series, found: Replay) -> tuple[Figures, Series, Replay]:
    error_th = np.abs(found.yhat_th - found.actual_th)[PART_STEPS:]
    error_tkh = np.abs(found.said_tkh - found.actual_th[:, None])[PART_STEPS:]
    error_tkh = np.where(np.isnan(error_tkh), error_tkh[:, :1], error_tkh)
    best = int(np.argmin(np.nansum(error_tkh, axis=(0, 2))))
    whole = len(error_th) - error_tkh.shape[2]  # from there on not all steps ahead have come
    ours_t, best_t = error_th[:whole].mean(axis=1), error_tkh[:whole, best].mean(axis=1)
    sums = [sliding_window_view(each, CHANGE_ROWS).sum(axis=1) for each in (ours_t, best_t)]
    back = np.flatnonzero(sums[0] <= CHANGE_RATIO_MAX * sums[1])
    figures = {
        "node": series.node,
        "metric": series.metric,
        "before": float(series.values_t[:PART_STEPS].mean()),
        "after": float(series.values_t[PART_STEPS:].mean()),
        "best_forecaster": Combination([1]).names[best],
        "rows_until_back": int(back[0]) if len(back) else None,
        "ratio_after_the_change": float(ours_t.sum() / best_t.sum()),
    }
    return figures, series, found


def plot(file: Path, found: list[tuple[Figures, Series, Replay]]) -> None:
    """The newest forecast of each value at the longest step, its intervals, and what came."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(10, 2.6 * len(found)), squeeze=False)
    steps = TASKS[0].steps
    for axis, (figures, series, each) in zip(axes[:, 0], found, strict=True):
        place = np.arange(len(series.values_t)) - PART_STEPS
        ahead = place + steps
        low_95, low_80, high_80, high_95 = each.quantile_tqh[:, :, -1].T
        axis.fill_between(ahead, low_95, high_95, color="tab:blue", alpha=0.15, label="95 %")
        axis.fill_between(ahead, low_80, high_80, color="tab:blue", alpha=0.3, label="80 %")
        axis.plot(ahead, each.yhat_th[:, -1], color="tab:blue", label="forecast, 20 steps before")
        axis.plot(place, series.values_t, color="black", linewidth=1, label="came")
        axis.axvline(0, color="tab:red", linewidth=1)
        back = figures["rows_until_back"]
        axis.set_title(f"{series.node} {series.metric}: back after {back} rows", fontsize=9)
        axis.set_xlim(place[0], place[-1])
    axes[0, 0].legend(loc="upper left", fontsize=7)
    axes[-1, 0].set_xlabel("rows of 15 s after the change")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def verdicts(task: Task, scores: list[Figures]) -> list[tuple[str, float, float]]:
    """What there is a target for: name, figure, and the most that it may be."""
    counted = [s for s in scores if task.counts(s["metric"])]
    ratios = [s["ratio"] for s in counted]
    away = [abs(s[f"coverage_{p}"] - p / 100) for s in counted for p in (80, 95)]
    return [
        ("60 %, median", float(np.median(ratios)), task.median_max),
        ("60 %, worst", max(ratios), task.worst_max),
        ("worst slice of 30 %", max(s["ratio_of_the_worst_slice"] for s in counted), SLICE_MAX),
        ("coverage off by, worst", max(away), COVERAGE_OFF_MAX),
        *(
            (
                f"Winkler {p} %, median",
                float(np.median([s[f"winkler_ratio_{p}"] for s in counted])),
                WINKLER_MAX,
            )
            for p in (80, 95)
        ),
    ]


def tell(task: Task, scores: list[Figures]) -> bool:
    """Print a task's table; whether all targets are met."""
    print(f"\n{task.name}: mean absolute error as a ratio to repeating the last value")
    print(
        f"{'node':14}{'metric':22}{'60 %':>6}{'slice':>7}{'last step':>10}  {'best simple':18}"
        f"{'80 %':>6}{'95 %':>6}{'W 80':>6}{'W 95':>6}"
    )
    for s in scores:
        simple = f"{s['best_simple_ratio']:.3f} {s['best_simple']}"
        print(
            f"{s['node']:14}{s['metric']:22}{s['ratio']:6.3f}{s['ratio_of_the_worst_slice']:7.3f}"
            f"{s['ratio_of_the_last_step']:10.3f}  {simple:18}"
            f"{s['coverage_80']:6.1%}{s['coverage_95']:6.1%}"
            f"{s['winkler_ratio_80']:6.2f}{s['winkler_ratio_95']:6.2f}"
        )
    ratios = [s["best_simple_ratio"] for s in scores]
    median = np.median(ratios)
    print(f"best simple forecaster in hindsight: median {median:.3f}, worst {max(ratios):.3f}")
    found = verdicts(task, scores)
    for name, figure, most in found:
        verdict = "met" if figure <= most else "MISSED"
        print(f"  {name:24}{figure:7.3f}, target at most {most:g}: {verdict}")
    tell_models(task, scores)
    return all(figure <= most for _, figure, most in found)


def run_grid(
    all_traces: list[traces.Trace], tasks: list[Task], seeds: range
) -> dict[str, list[Figures]]:
    """Scores of the tasks of one grid; with models where there are seeds to train with."""
    steps = max(task.steps for task in tasks)
    scores: dict[str, list[Figures]] = {task.name: [] for task in tasks}
    by_metric: dict[str, list[tuple[Series, Replay]]] = {}
    for series in load_series(all_traces, tasks[0]):
        print(f"{tasks[0].name}: {series.node} {series.metric}", file=sys.stderr, flush=True)
        found = replay(series, steps)
        by_metric.setdefault(series.metric, []).append((series, found))
        for task in tasks:
            scores[task.name].append(score(series, found, task.steps))
    for metric, of_metric in by_metric.items() if seeds else ():
        print(f"{tasks[0].name}: models of {metric}", file=sys.stderr, flush=True)
        compared = federations.compare(of_metric, steps, seeds)
        for task in tasks:
            for figures, (series, found) in (
                (figures, each)
                for figures in scores[task.name]
                for each in of_metric
                if (figures["node"], figures["metric"]) == (each[0].node, metric)
            ):
                if series.node in compared:
                    figures["models"] = _with_models(
                        series, found, compared[series.node], task, seeds
                    )
    return scores


def _with_models(
    series: Series, found: Replay, said: tuple[Array, Array], task: Task, seeds: range
) -> Figures:
    """By kind, of the mixture with the model and of the model alone: ratios, one a seed."""
    of_variants = [
        [errors(series, found, said_th, task.steps) for said_th in said_vth] for said_vth in said
    ]
    answer: Figures = {}
    for place, kind in enumerate(federations.KINDS):
        mixed, alone = (each[place * len(seeds) : (place + 1) * len(seeds)] for each in of_variants)
        answer[kind] = {
            "ratio": [figures["ratio"] for figures in mixed],
            "ratio_of_the_worst_slice": [f["ratio_of_the_worst_slice"] for f in mixed],
            "alone": [figures["ratio"] for figures in alone],
        }
    return answer


def tell_models(task: Task, scores: list[Figures]) -> None:
    """Print what a model adds, as median / worst over nodes and metrics, one a seed."""
    counted = [s for s in scores if task.counts(s["metric"]) and "models" in s]
    if not counted:
        return
    ratios = [s["ratio"] for s in counted]
    print(f"  without a model           {np.median(ratios):.3f} / {max(ratios):.3f}")
    for kind in federations.KINDS:
        for name, label in (("ratio", f"with the {kind} model"), ("alone", f"{kind} model alone")):
            of_seeds = zip(*(s["models"][kind][name] for s in counted), strict=True)
            told = ", ".join(f"{np.median(each):.3f} / {max(each):.3f}" for each in of_seeds)
            print(f"  {label:26}{told}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--traces", type=Path, default=traces.SHIPPED, help="folder of CSV files")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the changes of load in")
    parser.add_argument(
        "--seeds", type=int, default=0, help="train the default model too, with so many seeds"
    )
    arguments = parser.parse_args()
    all_traces = traces.load(arguments.traces)
    results: dict[str, list[Figures]] = {}
    for interval_s in sorted({task.interval_s for task in TASKS}):
        tasks = [task for task in TASKS if task.interval_s == interval_s]
        results |= run_grid(all_traces, tasks, range(arguments.seeds))
    changed = list(changes(all_traces))
    if arguments.plot:
        plot(arguments.plot, changed)
    if arguments.json:
        targets = {
            task.name: [
                {"name": name, "figure": figure, "target_max": most, "met": figure <= most}
                for name, figure, most in verdicts(task, results[task.name])
            ]
            for task in TASKS
            if results[task.name]
        }
        answer = {"benchmark": "forecasts", "tasks": results, "targets": targets}
        print(json.dumps(answer | {"changes": [figures for figures, _, _ in changed]}, indent=2))
        return 0 if all(t["met"] for each in targets.values() for t in each) else 1
    met = [tell(task, results[task.name]) for task in TASKS if results[task.name]]
    print("\nchange from idle to highest load, 15 s grid, 5 min: rows until within 1.1 of the best")
    for figures, _, _ in changed:
        print(
            f"{figures['node']:14}{figures['metric']:14}{figures['before']:7.1f} ->"
            f"{figures['after']:7.1f}: {figures['rows_until_back']} rows, ratio to"
            f" {figures['best_forecaster']} {figures['ratio_after_the_change']:.3f}"
        )
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
