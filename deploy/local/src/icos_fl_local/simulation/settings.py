"""The combinations of a sweep, from the command line."""

import itertools
from collections.abc import Mapping, Sequence

from icos_fl_local import run_config
from icos_fl_local.errors import UsageError
from icos_fl_local.run_config import Value

Setting = dict[str, Value]
"""Swept keys of the run configuration, with one value each."""

RUNS_MAX = 1_000
_OURS = ("result-dir", "store-address")
"""Each run has a folder of its own, and there is no store."""


def parse_sweeps(sweeps: Sequence[str], overrides: Mapping[str, Value]) -> dict[str, list[Value]]:
    """``KEY=V1,V2,…`` of the command line; raises UsageError."""
    parsed: dict[str, list[Value]] = {}
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        key = key.strip()
        texts = [value.strip() for value in text.split(",")]
        if not text or "" in texts:
            raise UsageError(f"--sweep {sweep}: not of the form KEY=VALUE,VALUE,…")
        values = [run_config.parse([f"{key}={value}"], "--sweep")[key] for value in texts]
        if key in parsed:
            raise UsageError(f"--sweep {sweep}: {key} is given twice")
        if key in overrides:
            raise UsageError(f"--sweep {sweep}: {key} has one value already: {overrides[key]}")
        if twice := [value for value in values if values.count(value) > 1]:
            raise UsageError(f"--sweep {sweep}: {twice[0]} is given twice")
        parsed[key] = values
    for key in (*parsed, *overrides):
        if key in _OURS:
            raise UsageError(f"{key}: not for simulate, which sets it itself")
    if "seed" in parsed:
        raise UsageError("--sweep seed=…: --seeds K runs each setting with K seeds")
    if "metric" in parsed:
        raise UsageError("--sweep metric=…: errors of different metrics cannot be compared")
    return parsed


def combinations(sweeps: Mapping[str, Sequence[Value]]) -> list[Setting]:
    """Each value of each key with each of the others; one empty setting for no sweep."""
    return [
        dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())
    ]


def each_value_once(sweeps: Mapping[str, Sequence[Value]]) -> list[Setting]:
    """Few settings that have each value somewhere: enough to find one that no run takes."""
    longest = max(map(len, sweeps.values()), default=1)
    return [
        {key: values[min(turn, len(values) - 1)] for key, values in sweeps.items()}
        for turn in range(longest)
    ]
