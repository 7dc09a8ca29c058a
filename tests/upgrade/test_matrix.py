"""Exactly one component of the other version: old among new, and new among old; and back again.

``uv run pytest -m slow tests/upgrade -s`` prints the matrix. Old is the last release of each
package, new is what is here. A component is replaced as an upgrade does it: while an exporter sends
and a federated run is under way.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROW = "{:<26}{:>6}{:>8}{:>14}{:>6}{:>8}{:>6}{:>7}{:>11}{:>9}"
HEAD = ("component", "is", "others", "acknowledged", "lost", "rounds", "lost", "after", "forecasts",
        "seconds")  # fmt: skip
RUNTIME = "icos-fl-warm-runtime"
IMPATIENT = "0.1.0"
"""The nodes of this icos-fl-client have nothing to learn from while the store is away, and say so:
a run ends by it. So with them the store is upgraded between runs."""
ROUNDS = 6


@dataclass(frozen=True)
class Component:
    """What is upgraded at once."""

    processes: tuple[str, ...]
    package: str = ""
    """All that is in these processes, unless a package is named."""
    between_runs: tuple[str, ...] = ()
    """Processes that a run does not survive."""


STORE = ("valkey", "metadata", "backend", "proxy")
LINK, LINK_EXEC = ("superlink",), ("superlink-exec",)
NODE = ("supernode-a", "supernode-a-exec")
COMPONENTS = {
    "otlp-bridge": Component(("bridge",)),
    "timeseries-store": Component(STORE),
    "processor": Component(("processor",)),
    "fl-server": Component(LINK, between_runs=LINK_EXEC),
    "fl-client of a node": Component(NODE),
    "warm-runtime at fl-server": Component(LINK, RUNTIME, LINK_EXEC),
    "warm-runtime at fl-client": Component(NODE, RUNTIME),
}


@pytest.fixture(scope="module")
def table(last_releases: Mapping[str, Any]) -> Iterator[list[tuple[object, ...]]]:
    """Rows of the matrix, which is printed at the end."""
    rows: list[tuple[object, ...]] = []
    yield rows
    releases = ", ".join(
        f"{each.package} {each.version}{' (as today)' if each.is_today else ''}"
        for each in last_releases.values()
    )
    print(f"\n\nold: {releases}\n\n{ROW.format(*HEAD)}")
    print("\n".join(ROW.format(*row) for row in rows))


def finished(history: Mapping[str, Any]) -> list[int]:
    return [entry["round"] for entry in history["rounds"] if entry["state"] == "finished"]


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_component_of_the_other_version(
    name: str,
    running: Any,
    environment: Callable[..., Path],
    last_releases: Mapping[str, Any],
    table: list[tuple[object, ...]],
):
    began, component = time.monotonic(), COMPONENTS[name]
    other_side = "new" if running.side == "old" else "old"
    impatient = running.side == "old" and last_releases["icos-fl-client"].version == IMPATIENT
    if impatient and component.processes == STORE:
        component = Component((), between_runs=STORE)
    both = (*component.processes, *component.between_runs)
    other = (
        environment(running.side, component.package)
        if component.package
        else environment(other_side)
    )
    try:
        with running.under_load(f"load-{len(table)}") as load:
            with running.training(ROUNDS) as run:
                running.replace(component.processes, other)
                during = run.result()
            running.replace(component.between_runs, other)
            after = running.train(rounds=1)
            forecasts = running.forecast(other if component.processes == NODE else running.python)
    finally:
        running.replace(both, running.python)
    rows = {"a": 240, "b": 240, load.node: load.acknowledged}
    lost = running.lost(rows)
    table.append(
        (name, other_side, running.side, sum(rows.values()), lost, len(finished(during)),
         ROUNDS - len(finished(during)), len(finished(after)), len(forecasts),
         f"{time.monotonic() - began:.0f}")
    )  # fmt: skip
    assert load.problem is None
    assert load.acknowledged > 0
    assert lost == 0
    assert len(finished(during)) >= ROUNDS - 1
    assert {node: facts["state"] for node, facts in after["rounds"][0]["nodes"].items()} == {
        "a": "ok",
        "b": "ok",
    }
    assert {node: len(values) for node, values in forecasts.items()} == {"a": 4, "b": 4}
