"""What the forecast service of a node costs: latency, CPU seconds an hour, memory.

    uv run python benchmarks/forecaster.py [--json] [--seconds N]

A real store, and the service as a process beside it: three metrics, three horizons (1 minute, 5
minutes, 1 hour) on a grid of 15 s, a row every 3 s as time goes by. Its history is full (4,096
steps) before anything is measured, since the cost grows until then, and the default model takes
part.

latency     from a row being stored to the forecast from it on /metrics, which is asked every 20 ms;
            in a phase of its own, whose CPU seconds do not count
CPU         user and system time of the process over N seconds (default 120), as seconds an hour
memory      resident at the end

Exit status 1 if a target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from icos_fl_client.forecasting.history import STEPS_MAX
from icos_fl_client.node import build_model, weights_of
from icos_fl_client.settings import RunConfig, parse
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import ModelVersion, Store, Window, connect
from icos_fl_timeseries_store.testing import running_store

METRICS = ("cpu_usage", "memory_usage", "power_consumption")
UNITS = dict(zip(METRICS, ("%", "MiB", "W"), strict=True))
ROW_SECONDS, STEP_SECONDS = 3, 15
ROWS = STEPS_MAX * STEP_SECONDS // ROW_SECONDS
LATENCY_SECONDS_MAX, CPU_SECONDS_MAX, MEMORY_MB_MAX = 1.0, 20.0, 150.0
LATENCY_STEPS = 8


def values_of(first: int, count: int) -> np.ndarray:
    """A load that comes and goes, with noise (count, metrics)."""
    place_t = first + np.arange(count)
    wave_t = np.sin(place_t / 200) + 0.3 * np.sin(place_t / 17)
    noise_tf = np.random.default_rng(first).normal(0, 0.1, (count, len(METRICS)))
    return np.array([50.0, 4000.0, 120.0]) * (1 + 0.4 * wave_t[:, None] + noise_tf) + 5


def fill(store: Store, now_ns: int) -> Window:
    """A window whose newest row is now, and a model of each metric."""
    window = store.create_window("edge", ROWS + 1)
    times_ns_t = now_ns - np.arange(ROWS)[::-1] * ROW_SECONDS * 10**9
    for start in range(0, ROWS, 5000):
        part = slice(start, start + 5000)
        values_tf = values_of(start, len(times_ns_t[part]))
        window.append(METRICS, times_ns_t[part], values_tf, UNITS)
    for metric in METRICS:
        run = parse(RunConfig, {"metric": metric}, "run config")
        weights = weights_of(build_model(run, metric))
        version = ModelVersion(1, weights, run.model_config_of(metric), {"created-unix-s": 1.0})
        store.model_state("edge", metric).put(version)
    return window


def newest_on(port: int) -> float:
    """Unix time of the newest step on /metrics; 0 while there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return 0.0
    prefix = 'icos_fl_forecast_time_seconds{metric="power_consumption"'
    lines = [line for line in text.splitlines() if line.startswith(prefix)]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


class Rows:
    """Appends a row every ROW_SECONDS, on the times that the rows before had."""

    def __init__(self, window: Window, now_ns: int) -> None:
        self._window = window
        self._next_ns = now_ns + ROW_SECONDS * 10**9
        self._place = ROWS

    def append(self) -> float:
        """Wait for the time of the next row and store it; when it was stored."""
        time.sleep(max(0.0, (self._next_ns - time.time_ns()) / 1e9))
        times_ns_t = np.array([self._next_ns])
        self._window.append(METRICS, times_ns_t, values_of(self._place, 1), UNITS)
        self._next_ns += ROW_SECONDS * 10**9
        self._place += 1
        return time.monotonic()


def measure(seconds: float) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_store(Path(folder) / "store") as settings,
        connect(settings) as store,
    ):
        now_ns = time.time_ns()
        window = fill(store, now_ns)
        port = free_port()
        environment = {
            "ICOS_FL_FORECASTER_LISTEN_ADDRESS": f"127.0.0.1:{free_port()}",
            "ICOS_FL_FORECASTER_METRICS_ADDRESS": f"127.0.0.1:{port}",
            "ICOS_FL_FORECASTER_STORE__PORT": str(settings.port),
            "ICOS_FL_FORECASTER_STATE_FOLDER": f"{folder}/state",
        }
        command = [sys.executable, "-m", "icos_fl_client.serving"]
        log = (Path(folder) / "log").open("wb")
        with subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log
        ) as process:
            try:
                return _measure(psutil.Process(process.pid), Rows(window, now_ns), port, seconds)
            finally:
                process.terminate()


def _measure(process: psutil.Process, rows: Rows, port: int, seconds: float) -> dict[str, float]:
    latencies, newest = [], 0.0
    while not newest:  # the history is replayed
        time.sleep(0.5)
        newest = newest_on(port)
    caught_up = process.cpu_times()
    while time.time() - newest_on(port) > STEP_SECONDS + 2 * ROW_SECONDS:
        rows.append()  # those that were due while it was
    for _ in range(LATENCY_STEPS * STEP_SECONDS // ROW_SECONDS):
        before = newest_on(port)
        stored = rows.append()
        while time.monotonic() < stored + LATENCY_SECONDS_MAX + 0.5:
            if newest_on(port) > before:
                latencies.append(time.monotonic() - stored)
                break
            time.sleep(0.02)
    begun, cpu = time.monotonic(), process.cpu_times()
    while time.monotonic() < begun + seconds:
        rows.append()
    spent = process.cpu_times()
    hours = (time.monotonic() - begun) / 3600
    return {
        "forecasts_timed": len(latencies),
        "latency_s_median": statistics.median(latencies),
        "latency_s_worst": max(latencies),
        "cpu_s_an_hour": (spent.user + spent.system - cpu.user - cpu.system) / hours,
        "cpu_s_to_replay_the_history": caught_up.user + caught_up.system,
        "resident_mb": process.memory_info().rss / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long CPU is measured")
    arguments = parser.parse_args()
    figures = measure(arguments.seconds)
    targets = {
        "latency_s_worst": LATENCY_SECONDS_MAX,
        "cpu_s_an_hour": CPU_SECONDS_MAX,
        "resident_mb": MEMORY_MB_MAX,
    }
    met = all(figures[name] <= most for name, most in targets.items())
    if arguments.json:
        print(json.dumps({"benchmark": "forecaster", **figures, "targets": targets}, indent=2))
        return 0 if met else 1
    for name, figure in figures.items():
        target = f", target at most {targets[name]:g}" if name in targets else ""
        missed = " MISSED" if figure > targets.get(name, figure) else ""
        print(f"{name:30}{figure:9.3f}{target}{missed}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
