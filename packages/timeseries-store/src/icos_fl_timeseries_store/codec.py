"""What the frames of a journal hold: a window, changes of it, or the versions of a model.

Each is a JSON header behind its length, then the arrays that it describes, little-endian, in order.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icos_fl_timeseries_store.buffer import RowBuffer, Snapshot
from icos_fl_timeseries_store.contract import Appended, ModelVersion, Times, Values
from icos_fl_timeseries_store.journal import Parts

_LENGTH: Final = struct.Struct("<I")
Array = NDArray[Any]


@dataclass(frozen=True)
class NewRows:
    """Rows for a window, as ``Window.append`` is given them."""

    columns: tuple[str, ...]
    times_ns_t: Times
    values_tf: Values
    units: Mapping[str, str]

    def apply(self, rows: RowBuffer) -> Appended:
        return rows.append(self.columns, self.times_ns_t, self.values_tf, self.units)


@dataclass(frozen=True)
class NewCapacity:
    """Another capacity for a window."""

    capacity_rows: int

    def apply(self, rows: RowBuffer) -> None:
        rows.resize(self.capacity_rows)


Change = NewRows | NewCapacity


def window_to_parts(rows: Snapshot) -> Parts:
    header = {
        "capacity_rows": rows.capacity_rows,
        "cursor": rows.cursor,
        "columns": rows.columns,
        "units": rows.units,
        "rows": len(rows.times_ns_t),
    }
    return _parts(header, [rows.times_ns_t, rows.values_tf, rows.revisions_t])


def window_from_payload(payload: memoryview) -> Snapshot:
    header, take = _header(payload)
    count, columns = header["rows"], tuple(header["columns"])
    return Snapshot(
        header["capacity_rows"],
        header["cursor"],
        columns,
        header["units"],
        take("<i8", (count,)),
        take("<f8", (count, len(columns))),
        take("<i8", (count,)),
    )


def changes_to_parts(cursor: int, changes: Sequence[Change]) -> Parts:
    """*cursor* is the window's before the first of the *changes*."""
    entries: list[dict[str, object]] = []
    arrays: list[Array] = []
    for change in changes:
        if isinstance(change, NewCapacity):
            entries.append({"capacity_rows": change.capacity_rows})
        else:
            rows = len(change.times_ns_t)
            entries.append({"columns": change.columns, "units": dict(change.units), "rows": rows})
            arrays += [change.times_ns_t, change.values_tf]
    return _parts({"cursor": cursor, "changes": entries}, arrays)


def changes_from_payload(payload: memoryview) -> tuple[int, Iterator[Change]]:
    header, take = _header(payload)

    def changes() -> Iterator[Change]:
        for entry in header["changes"]:
            if "capacity_rows" in entry:
                yield NewCapacity(entry["capacity_rows"])
            else:
                columns, rows = tuple(entry["columns"]), entry["rows"]
                times, values = take("<i8", (rows,)), take("<f8", (rows, len(columns)))
                yield NewRows(columns, times, values, entry["units"])

    return header["cursor"], changes()


def models_to_parts(versions: Mapping[str, ModelVersion]) -> Parts:
    """*versions* by name; one that has several names is written once."""
    distinct = {id(version): version for version in versions.values()}
    places = {key: place for place, key in enumerate(distinct)}
    entries: list[dict[str, object]] = []
    arrays: list[Array] = []
    for version in distinct.values():
        weights = {name: np.asarray(array) for name, array in version.weights.items()}
        entries.append(
            {
                "round": version.round,
                "config": dict(version.config),
                "metadata": dict(version.metadata),
                "weights": [
                    [n, a.dtype.newbyteorder("<").str, a.shape] for n, a in weights.items()
                ],
            }
        )
        arrays += weights.values()
    names = {name: places[id(version)] for name, version in versions.items()}
    return _parts({"names": names, "versions": entries}, arrays)


def models_from_payload(payload: memoryview) -> dict[str, ModelVersion]:
    header, take = _header(payload)
    versions = [
        ModelVersion(
            entry["round"],
            {name: take(kind, tuple(shape)) for name, kind, shape in entry["weights"]},
            entry["config"],
            entry["metadata"],
        )
        for entry in header["versions"]
    ]
    return {name: versions[place] for name, place in header["names"].items()}


def _parts(header: object, arrays: Sequence[Array]) -> Parts:
    text = json.dumps(header, default=_plain).encode()
    flat = [
        np.ascontiguousarray(a, a.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        for a in arrays
        if a.size
    ]
    return [_LENGTH.pack(len(text)) + text, *flat]


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's; JSON knows no others."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be stored")


def _header(payload: memoryview) -> tuple[Any, Callable[[str, tuple[int, ...]], Array]]:
    """The header, and what copies the next array of a type and shape out of the payload."""
    (length,) = _LENGTH.unpack_from(payload)
    at = _LENGTH.size + length

    def take(kind: str, shape: tuple[int, ...]) -> Array:
        nonlocal at
        dtype = np.dtype(kind)
        count = int(np.prod(shape))
        array = np.frombuffer(payload, dtype, count, at) if count else np.empty(0, dtype)
        at += count * dtype.itemsize
        return array.reshape(shape).astype(dtype.newbyteorder("="), copy=True)

    return json.loads(bytes(payload[_LENGTH.size : _LENGTH.size + length])), take
