"""Flower's run configuration: the app's defaults, what the data asks for, what the user says."""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from icos_fl_local.errors import UsageError

Value = str | int | float | bool
FLOWER_APP = Path(__file__).with_name("flower_app")
FORECAST_SECONDS = 300
_INTERVAL_SECONDS_MIN = 15.0
_DEFAULT_METRICS = ("power_consumption", "cpu_usage", "memory_usage")
_MEMORY_INSTEAD = "memory_available_mib"


def defaults() -> dict[str, Value]:
    """All keys of the Flower app with their defaults."""
    with (FLOWER_APP / "pyproject.toml").open("rb") as stream:
        config: dict[str, Value] = tomllib.load(stream)["tool"]["flwr"]["app"]["config"]
    return config


def parse(overrides: Sequence[str], option: str = "-c") -> dict[str, Value]:
    """``key=value`` of the command line, checked against the defaults' keys and types.

    A value is TOML, but text needs no quotes. Raises UsageError.
    """
    known = defaults()
    parsed: dict[str, Value] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator:
            raise UsageError(f"{option} {override}: not of the form key=value")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else f"; keys: {', '.join(known)}"
            raise UsageError(f"{option} {override}: no run-config key {key!r}{hint}")
        if key in parsed:
            raise UsageError(f"{option} {override}: {key} is given twice")
        parsed[key] = _value(key, text.strip(), known[key], option)
    return parsed


def _value(key: str, text: str, default: Value, option: str) -> Value:
    kind = type(default)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and type(value) is not str:
        value = text
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"{option} {key}={text}: {key} takes {wanted} (default {_toml(default)})")
    checked: Value = value
    return checked


def choose_metrics(asked: Sequence[str], columns: Iterable[str]) -> list[str]:
    """The metrics to learn, of those that some node has; raises UsageError for others."""
    there = sorted(set(columns))
    if asked:
        for metric in asked:
            if metric not in there:
                raise UsageError(
                    f"no node has the metric {metric!r}; there are: {', '.join(there)}"
                )
        return list(dict.fromkeys(asked))
    chosen = [metric for metric in _DEFAULT_METRICS if metric in there]
    if "memory_usage" not in chosen and _MEMORY_INSTEAD in there:
        chosen.append(_MEMORY_INSTEAD)
    if not chosen:
        raise UsageError(
            f"no node has any of {', '.join(_DEFAULT_METRICS)}; "
            f"choose with --metric from: {', '.join(there)}"
        )
    return chosen


def complete(
    overrides: Mapping[str, Value],
    metrics: Sequence[str],
    nodes: int,
    sampling_seconds: float,
    store_address: str,
) -> dict[str, Value]:
    """The configuration of a run: defaults, then what the data asks for, then *overrides*.

    *sampling_seconds* is the coarsest node's distance of rows: no grid may be finer. The horizon
    covers the next five minutes.
    """
    config = defaults() | {
        "metric": ",".join(metrics),
        "interval": max(_INTERVAL_SECONDS_MIN, float(sampling_seconds)),
        "min-available-clients": nodes,  # all are ours, so a run can wait for all
        "store-address": store_address,
    }
    if "interval" in overrides:
        config["interval"] = overrides["interval"]
    step_seconds = float(config["interval"]) or sampling_seconds
    config["horizon"] = max(1, math.ceil(FORECAST_SECONDS / step_seconds))
    return config | dict(overrides)


def to_toml(config: Mapping[str, Value]) -> str:
    """As ``flwr run --run-config FILE`` reads it."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in config.items())


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c
            for c in value.replace("\\", "\\\\").replace('"', '\\"')
        )
        return f'"{escaped}"'
    return repr(value)
