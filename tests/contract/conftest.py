"""What consumers say in their needs.toml, and what a provider's answer lacks of it."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TYPES = {"<int>": int, "<float>": float, "<str>": str, "<list>": list}


def needs(of: str) -> list[Any]:
    """Of the provider *of*, as parameters of a test: what each consumer needs."""
    found = []
    for file in sorted(ROOT.glob("*/*/needs.toml")):
        for need in tomllib.loads(file.read_text())["need"]:
            if need["of"] == of:
                consumer = file.parent.name
                found.append(pytest.param(need, id=f"{consumer} needs {need['what']}"))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument need_of_PROVIDER is about each need of that provider."""
    for name in metafunc.fixturenames:
        if name.startswith("need_of_"):
            provider = name.removeprefix("need_of_").replace("_", "-")
            metafunc.parametrize(name, needs(provider))


def differences(needed: Any, got: Any, where: str) -> list[str]:
    """Where *got*, which may have more, is not what is *needed*; a line each."""
    if isinstance(needed, str) and needed in TYPES:
        return [] if type(got) is TYPES[needed] else [f"{where}: {got!r} is no {needed}"]
    if isinstance(needed, dict) and isinstance(got, dict):
        missing = [f"{where}.{key}: missing" for key in needed if key not in got]
        return missing + [
            line
            for key, value in needed.items()
            if key in got
            for line in differences(value, got[key], f"{where}.{key}")
        ]
    if isinstance(needed, list) and isinstance(got, list):
        if len(needed) != len(got):
            return [f"{where}: {len(got)} of {got!r}, needed are {len(needed)}"]
        return [
            line
            for place, (value, other) in enumerate(zip(needed, got, strict=True))
            for line in differences(value, other, f"{where}[{place}]")
        ]
    if isinstance(needed, float) and isinstance(got, int | float):
        same = math.isclose(needed, got, rel_tol=1e-5) or (math.isnan(needed) and math.isnan(got))
    else:
        same = type(needed) is type(got) and needed == got
    return [] if same else [f"{where}: {got!r}, needed is {needed!r}"]


@pytest.fixture(scope="session")
def lacking() -> Callable[[Any, Any, str], list[str]]:
    """lacking(needed, got, where)"""
    return differences


@pytest.fixture(scope="session")
def needs_of() -> Callable[[str], list[dict[str, Any]]]:
    """needs_of(provider)"""
    return lambda of: [parameter.values[0] for parameter in needs(of)]
