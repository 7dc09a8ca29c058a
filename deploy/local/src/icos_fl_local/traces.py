"""Recorded traces of machines: CSV files, one a node, the first column ``time_unix_s``.

Every other column is named ``<metric>_<unit>`` and holds finite numbers. A missing sample is a row
that is absent. Shapes: t rows, f columns.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIPPED = Path(__file__).parent / "traces"
"""The folder of the traces that come with the package."""

TIME_COLUMN = "time_unix_s"
POWER_METRIC = "scaph_host_power_microwatts"
"""Under this name, and in this unit, power is replayed where ``has_whole_microwatts``."""

TIME_MAX_S = 2**63 // 10**9
"""The last second that a window, which counts nanoseconds in 64 bits, can hold."""

_KNOWN_COLUMNS = {
    "power_w": "power_consumption",
    "cpu_percent": "cpu_usage",
    "memory_used_mib": "memory_usage",
}
_UNITS = {
    "w": "W",
    "percent": "%",
    "mib": "MiB",
    "kbps": "kBy/s",
    "v": "V",
    "a": "A",
    "ratio": "1",
}


class TraceError(Exception):
    """A trace that cannot be used; the message names the file and, where there is one, the cell."""


@dataclass(frozen=True)
class Trace:
    """One node's recorded rows, oldest first."""

    node: str
    columns: tuple[str, ...]
    """As the file names them; ``column_of`` gives the window's name."""
    units: tuple[str, ...]
    times_s: NDArray[np.int64]
    """UTC seconds since 1970-01-01, strictly increasing."""
    values_tf: NDArray[np.float64]
    """Finite."""

    @property
    def interval_seconds(self) -> float:
        """The median distance of rows; 1 for a trace of one row."""
        return float(np.median(np.diff(self.times_s))) if len(self.times_s) > 1 else 1.0

    @cached_property
    def has_whole_microwatts(self) -> bool:
        """Whether there is power, and each value comes back from whole microwatts as it was."""
        if "power_w" not in self.columns:
            return False
        watts = self.values_tf[:, self.columns.index("power_w")]
        return bool((np.abs(watts) < 1e9).all() and (np.rint(watts * 1e6) / 1e6 == watts).all())


def column_of(trace_column: str) -> str:
    """The window's name of a trace's column: one that users know, or the trace's own."""
    return _KNOWN_COLUMNS.get(trace_column, trace_column)


def unit_of(trace_column: str) -> str:
    """The unit that the ending of a trace's column stands for; empty where it stands for none."""
    return _UNITS.get(trace_column.rpartition("_")[2], "")


def load(folder: Path, nodes: int | None = None) -> list[Trace]:
    """The traces in *folder* and its sub-folders, sorted by node; the first *nodes* of them.

    A node is named by its file, and by folder and file where two files have one name. Raises
    TraceError.
    """
    if not folder.is_dir():
        raise TraceError(f"{folder} is not a folder")
    files = _files_by_node(folder)
    if not files:
        raise TraceError(f"{folder} has no CSV file")
    if nodes is not None and not 1 <= nodes <= len(files):
        traces = "1 trace" if len(files) == 1 else f"{len(files)} traces"
        raise TraceError(f"{folder} has {traces}, {nodes} nodes were asked for")
    return [_read(node, file) for node, file in sorted(files.items())[:nodes]]


def bridge_config(traces: Sequence[Trace]) -> dict[str, Any]:
    """The otlp-bridge's configuration that takes each value that ``replay.send`` sends as it is.

    A row a second keeps the traces' own times; a window holds a whole trace.
    """
    columns: dict[str, dict[str, Any]] = {}
    for trace in traces:
        for name, unit in zip(trace.columns, trace.units, strict=True):
            column = columns.setdefault(column_of(name), {"unit": unit, "sources": []})
            source = _bridge_source(trace, name)
            if source not in column["sources"]:
                column["sources"].append(source)
    return {
        "node_attribute": "host.name",
        "interval_seconds": 1,
        "window_rows": max(len(trace.times_s) for trace in traces),
        "columns": columns,
    }


def _bridge_source(trace: Trace, column: str) -> dict[str, Any]:
    if column == "power_w" and trace.has_whole_microwatts:
        return {"terms": [{"metric": POWER_METRIC}], "divide_by": 1_000_000}
    return {"terms": [{"metric": column}]}


def _files_by_node(folder: Path) -> dict[str, Path]:
    files = sorted(folder.rglob("*.csv"))
    stems = Counter(file.stem for file in files)
    named: dict[str, Path] = {}
    for file in files:
        node = file.stem
        if stems[node] > 1:
            node = "-".join(file.relative_to(folder).with_suffix("").parts)
        if node in named:
            raise TraceError(f"{named[node]} and {file} would both be the node {node!r}")
        named[node] = file
    return named


def _read(node: str, file: Path) -> Trace:
    lines = _lines(file)
    columns = _columns(file, lines)
    if len(lines) == 1:
        raise TraceError(f"{file}: a header, but no rows")
    if "" in lines:  # which the fast way would skip
        _raise_for_bad_cell(file, lines, columns)
    try:
        table = np.loadtxt(lines[1:], delimiter=",", ndmin=2, comments=None)
    except ValueError as error:
        _raise_for_bad_cell(file, lines, columns)
        raise TraceError(f"{file}: {error}") from None
    times = table[:, 0]
    # Not above, rather than below: a NaN is neither.
    good = len(table) == len(lines) - 1 and table.shape[1] == len(columns)
    good = good and bool(np.isfinite(table).all() and (np.diff(times) > 0).all())
    if not (good and times[0] >= 1 and times[-1] < TIME_MAX_S and (times == np.floor(times)).all()):
        _raise_for_bad_cell(file, lines, columns)
        raise TraceError(f"{file}: not a table of {len(columns)} columns")
    return Trace(
        node=node,
        columns=columns[1:],
        units=tuple(unit_of(column) for column in columns[1:]),
        times_s=times.astype(np.int64),
        values_tf=np.ascontiguousarray(table[:, 1:]),
    )


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{file}:{line}: byte {data[error.start]:#04x} is not UTF-8") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise TraceError(f"{file}: empty, expected a header that begins with {TIME_COLUMN}")
    return lines


def _columns(file: Path, lines: list[str]) -> tuple[str, ...]:
    columns = next(csv.reader(io.StringIO(lines[0])), [])
    if columns[:1] != [TIME_COLUMN]:
        found = columns[0] if columns else ""
        raise TraceError(f"{file}:1: first column is {found!r}, expected {TIME_COLUMN}")
    if len(columns) == 1:
        raise TraceError(f"{file}:1: no column beside {TIME_COLUMN}")
    names = [column_of(column) for column in columns]
    for number, (column, name) in enumerate(zip(columns, names, strict=True), start=1):
        if not column.strip():
            raise TraceError(f"{file}:1: column {number} has no name")
        if names.count(name) > 1:
            raise TraceError(f"{file}:1: column {column} is there twice")
    return tuple(columns)


def _raise_for_bad_cell(file: Path, lines: list[str], columns: tuple[str, ...]) -> None:
    """Look for the first cell that is to blame, once the fast way has found that there is one."""
    before = 0.0
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        if len(cells) != len(columns):
            raise TraceError(f"{file}:{number}: expected {len(columns)} values, found {len(cells)}")
        for column, cell, problem in _cell_problems(columns, cells):
            raise TraceError(f"{file}:{number}: column {column}: {cell!r} {problem}")
        time = float(cells[0])
        if time <= before and number > 2:
            raise TraceError(
                f"{file}:{number}: column {TIME_COLUMN}: {cells[0]!r} "
                "does not come after the row before"
            )
        before = time


def _cell_problems(columns: tuple[str, ...], cells: list[str]) -> Iterator[tuple[str, str, str]]:
    for column, cell in zip(columns, cells, strict=True):
        try:
            # Python reads 1_000 and digits of other scripts; a CSV file means neither.
            value = float(cell) if cell.isascii() and "_" not in cell else None
        except ValueError:
            value = None
        if not cell.strip():
            yield column, cell, "is empty; a missing sample is a row that is absent"
        elif value is None:
            yield column, cell, "is not a number"
        elif not math.isfinite(value):
            yield column, cell, "is not finite"
        elif column == TIME_COLUMN and not (value.is_integer() and 1 <= value < TIME_MAX_S):
            yield column, cell, f"is not a whole number of seconds from 1 to {TIME_MAX_S}"
