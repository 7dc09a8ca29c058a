"""How the cost of a simulated round grows with the nodes, and whether it finds what `up` finds.

    uv run python benchmarks/simulation.py [--json] [--nodes 10,100,1000] [--only growth|equality]

growth      ``icos-fl simulate`` with the default Flower app on the traces that ship, three rounds:
            seconds a round after the first, and the most memory that all processes had at once
            (proportional set size, so that what they share counts once). Neither may grow faster
            than the nodes do, against the fewest nodes. On a machine that others use, seconds tell
            of them too: CPU seconds a round, which hardly do, are told beside, without a limit.
equality    ``icos-fl up`` and ``icos-fl simulate`` with four nodes, five rounds, the same traces
            and run configuration, seeds 0 to 2: each metric's mean absolute error of the last
            round. Their means may differ by no more than the standard deviation of the deployed
            runs over the seeds.

Takes half an hour on two cores, most of it for 1,000 nodes. Exit status 1 if a limit is passed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROUNDS = 3
LOOK_SECONDS = 0.25
LIMITED = ("seconds_a_round", "peak_memory_mib")
FIGURES = ("seconds_a_round", "cpu_seconds_a_round", "peak_memory_mib")
EQUAL_NODES, EQUAL_ROUNDS, SEEDS = 4, 5, (0, 1, 2)

Measured = dict[str, Any]


class CpuTime:
    """CPU seconds of a process and its descendants, looked at again and again."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._seconds: dict[psutil.Process, float] = {}
        self._looks: list[tuple[float, float]] = []

    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self._seconds[process] = times.user + times.system
        self._looks.append((time.time(), sum(self._seconds.values())))

    def between(self, start_unix_s: float, end_unix_s: float) -> float:
        times, seconds = zip(*self._looks, strict=True)
        first, last = np.interp([start_unix_s, end_unix_s], times, seconds)
        return float(last - first)


def icos_fl(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON; its progress goes to our standard error.

    A simulation's runs get ``cpu_seconds``, of each round.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--json", "--out", f"{folder}/out", "--state-dir", f"{folder}/state")
        command = [sys.executable, "-m", "icos_fl_local", *arguments, *options]
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, stdout=out, cwd=folder)
            cpu = CpuTime(process.pid)
            while process.poll() is None:
                cpu.look()
                time.sleep(LOOK_SECONDS)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
            out.seek(0)
            answer: dict[str, Any] = json.load(out)
        for run in answer.get("runs", ()):
            history = json.loads(Path(run["folder"], "history.json").read_text())
            starts = [entry["started_unix_s"] for entry in history["rounds"]]
            run["cpu_seconds"] = [
                cpu.between(start, start + seconds)
                for start, seconds in zip(starts, run["seconds"], strict=True)
            ]
    return answer


def growth(sizes: list[int]) -> list[Measured]:
    measured: list[Measured] = []
    for nodes in sizes:
        result = icos_fl("simulate", "--nodes", str(nodes), "--rounds", str(ROUNDS))
        run = result["runs"][0]
        row = {
            "nodes": nodes,
            "rows": result["rows"],
            "seconds": run["seconds"],
            "seconds_a_round": run["seconds_a_round"],
            "cpu_seconds_a_round": statistics.fmean(run["cpu_seconds"][1:]),
            "peak_memory_mib": run["peak_memory_mib"],
        }
        first = measured[0] if measured else row
        row["limit"] = nodes / first["nodes"]
        for key in FIGURES:
            row[f"growth_of_{key}"] = row[key] / first[key]
        measured.append(row)
    return measured


def equality() -> list[Measured]:
    size = ("--nodes", str(EQUAL_NODES), "--rounds", str(EQUAL_ROUNDS))
    deployed = [_last_errors(icos_fl("up", *size, "-c", f"seed={seed}")) for seed in SEEDS]
    found = icos_fl("simulate", *size, "--seeds", str(len(SEEDS)))
    simulated = [{m: error["mae"] for m, error in run["errors"].items()} for run in found["runs"]]
    return [
        {
            "metric": metric,
            "deployed": [errors[metric] for errors in deployed],
            "simulated": [errors[metric] for errors in simulated],
            "difference": abs(_mean(deployed, metric) - _mean(simulated, metric)),
            "limit": statistics.stdev(errors[metric] for errors in deployed),
        }
        for metric in found["metrics"]
    ]


def _last_errors(result: dict[str, Any]) -> dict[str, float]:
    last = result["history"]["rounds"][-1]
    return {metric: facts["mae"] for metric, facts in last["metrics"].items()}


def _mean(errors: list[dict[str, float]], metric: str) -> float:
    return statistics.fmean(one[metric] for one in errors)


def print_growth(measured: list[Measured]) -> None:
    headings = "".join(f"{name:>14}{'growth':>9}" for name in ("s a round", "CPU s", "peak MiB"))
    print(f"{'nodes':>7}{headings}{'limit':>8}")
    for row in measured:
        figures = "".join(f"{row[key]:14,.2f}{row[f'growth_of_{key}']:9.2f}" for key in FIGURES)
        print(f"{row['nodes']:7,}{figures}{row['limit']:8.0f}")


def print_equality(measured: list[Measured]) -> None:
    print(f"{'metric':<22}{'deployed':>11}{'simulated':>11}{'difference':>12}{'limit':>9}")
    for row in measured:
        means = statistics.fmean(row["deployed"]), statistics.fmean(row["simulated"])
        print(
            f"{row['metric']:<22}{means[0]:11.4f}{means[1]:11.4f}"
            f"{row['difference']:12.2g}{row['limit']:9.2g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--nodes", default="10,100,1000", help="default: %(default)s")
    parser.add_argument("--only", choices=["growth", "equality"])
    arguments = parser.parse_args()
    result: dict[str, list[Measured]] = {"growth": [], "equality": []}
    if arguments.only != "equality":
        result["growth"] = growth(sorted(map(int, arguments.nodes.split(","))))
    if arguments.only != "growth":
        result["equality"] = equality()
    if arguments.json:
        print(json.dumps(result))
    else:
        print_growth(result["growth"])
        print_equality(result["equality"])
    grows = any(
        row[f"growth_of_{key}"] > row["limit"] for row in result["growth"] for key in LIMITED
    )
    differs = any(row["difference"] > row["limit"] for row in result["equality"])
    sys.exit(1 if grows or differs else 0)


if __name__ == "__main__":
    main()
