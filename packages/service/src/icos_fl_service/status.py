"""What this process says of itself on ``/status``: what it waits for, and what else it knows.

Of a process there is one, as of Prometheus' default registry.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Facts = dict[str, Any]

_waits: dict[str, str] = {}
_facts: dict[str, Callable[[], Any]] = {}


def waits_for(what: str, reason: str) -> None:
    """From now on this process waits for *what*, as *reason* says."""
    _waits[what] = reason


def has(what: str) -> None:
    """It does not wait for *what* any more."""
    _waits.pop(what, None)


def tell(name: str, fact: Callable[[], Any]) -> None:
    """From now on ``/status`` has *name*, with what *fact* returns: JSON's types."""
    _facts[name] = fact


def of(distribution: str, part: str = "") -> Facts:
    """The status of this process, which *distribution* is; *part* is its name if that differs."""
    waits = dict(_waits)
    return {
        "part": part or distribution.removeprefix("icos-fl-"),
        "version": version(distribution),
        "health": "waiting" if waits else "healthy",
        "waits_for": ", ".join(waits),
        "reason": "; ".join(waits.values()),
    } | {name: fact() for name, fact in _facts.items()}
