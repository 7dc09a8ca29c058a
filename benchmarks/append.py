"""What an append to a small and to a large window costs, in dataClay and in memory.

``uv run python benchmarks/append.py [--json]`` starts a dataClay of its own on free ports. Both
windows are full, so every append also removes as many rows as it adds. The windows take turns, so
that what else the machine does falls on all of them; so does a bare write and sync of the same
bytes, without which no append to dataClay is answered.

There are so many appends that the files of both windows are written anew at least once: the means
have that in them.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from icos_fl_timeseries_store import MemoryStore, connect
from icos_fl_timeseries_store.contract import Store, Window
from icos_fl_timeseries_store.testing import running_store

ROWS = 60
COLUMNS = ("power_consumption", "cpu_usage", "memory_usage", "disk_usage")
CAPACITIES = {"small": 300, "large": 100_000}
APPENDS = 4500
WARM_UP = 5
STEP_NS = 2 * 10**9
FILL_ROWS = 10_000
LIMIT_LARGE_TO_SMALL = 1.5

Figures = dict[str, dict[str, float]]


@dataclass
class Appender:
    """Appends the next rows to one window, and keeps how long each append took."""

    window: Window
    next_row: int
    seconds: list[float]

    def append(self, rows: int) -> None:
        times = np.arange(self.next_row, self.next_row + rows, dtype=np.int64) * STEP_NS
        values = np.random.default_rng(self.next_row).normal(100.0, 10.0, (rows, len(COLUMNS)))
        start = time.perf_counter()
        appended = self.window.append(COLUMNS, times, values)
        self.seconds.append(time.perf_counter() - start)
        if appended.added != rows:
            raise RuntimeError(f"{appended.added} of {rows} rows were added")
        self.next_row += rows


def appenders(store: Store) -> dict[str, Appender]:
    """A full window of each capacity."""
    filled = {}
    for name, capacity in CAPACITIES.items():
        appender = Appender(store.create_window(f"benchmark-{name}", capacity), 1, [])
        while (missing := capacity + 1 - appender.next_row) > 0:
            appender.append(min(FILL_ROWS, missing))
        filled[name] = appender
    return filled


class Disk:
    """Writes and syncs as many bytes as an append has, and keeps how long that took."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._bytes = bytes(ROWS * (1 + len(COLUMNS)) * 8)
        self.seconds: list[float] = []

    def write(self) -> None:
        start = time.perf_counter()
        self._file.write(self._bytes)
        os.fdatasync(self._file.fileno())
        self.seconds.append(time.perf_counter() - start)


def measure(store: Store, disk: Disk | None = None) -> dict[str, list[float]]:
    """Seconds of each append, by window."""
    windows = appenders(store)
    for _ in range(WARM_UP):
        for appender in windows.values():
            appender.append(ROWS)
    for appender in windows.values():
        appender.seconds.clear()
    for _ in range(APPENDS):
        for appender in windows.values():
            appender.append(ROWS)
        if disk is not None:
            disk.write()
    return {name: appender.seconds for name, appender in windows.items()}


def run() -> Figures:
    """Milliseconds and rows a second of each window, and the ratios of their medians."""
    seconds = {f"memory, {name}": times for name, times in measure(MemoryStore()).items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_store(Path(folder)) as settings,
        connect(settings) as store,
    ):
        disk = Disk(Path(folder) / "disk")
        seconds |= {f"dataclay, {name}": times for name, times in measure(store, disk).items()}
        seconds["disk"] = disk.seconds
    mean = {name: statistics.fmean(times) for name, times in seconds.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(name: str, to: str, of: dict[str, float] = median) -> float:
        return round(of[name] / of[to], 2)

    return {
        "median_ms": {name: round(1e3 * value, 3) for name, value in median.items()},
        "mean_ms": {name: round(1e3 * value, 3) for name, value in mean.items()},
        "p95_ms": {n: round(1e3 * float(np.quantile(t, 0.95)), 3) for n, t in seconds.items()},
        "rows_a_second": {name: round(ROWS / value) for name, value in median.items()},
        "ratio": {
            "dataclay, large to small": ratio("dataclay, large", "dataclay, small"),
            "dataclay, large to small, means": ratio("dataclay, large", "dataclay, small", mean),
            "memory, large to small": ratio("memory, large", "memory, small"),
            "small, dataclay to disk": ratio("dataclay, small", "disk"),
        },
    }


def main() -> int:
    """Print the figures, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    as_json = parser.parse_args().json
    figures = run()
    if as_json:
        print(json.dumps({"capacity_rows": CAPACITIES, "rows_an_append": ROWS, **figures}))
        return 0
    sizes = ", ".join(f"{name} {rows:,} rows" for name, rows in CAPACITIES.items())
    print(
        f"append of {ROWS} rows x {len(COLUMNS)} columns to full windows ({sizes}), {APPENDS} times"
    )
    for name, value in figures["median_ms"].items():
        rows = figures["rows_a_second"][name]
        p95 = figures["p95_ms"][name]
        mean = figures["mean_ms"][name]
        print(
            f"  {name:16} median {value:7.3f} ms, mean {mean:7.3f} ms, 95 % below {p95:7.3f} ms,"
            f" {rows:>9,.0f} rows/s"
        )
    for name, value in figures["ratio"].items():
        limit = f" (limit {LIMIT_LARGE_TO_SMALL})" if name.startswith("dataclay, large") else ""
        print(f"  ratio, {name}: {value}{limit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
