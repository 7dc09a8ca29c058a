"""Which nodes take part: waiting for them, and choosing some of them for a round."""

import random
import time
from collections.abc import Collection
from typing import Any, Never

import structlog
from flwr.serverapp import Grid

from icos_fl_server.errors import ServerError

_LOOK_SECONDS = 0.5

log = structlog.get_logger()


def wait_for_nodes(grid: Grid, needed: int, timeout_seconds: float) -> list[int]:
    """Ids of the connected nodes, as soon as *needed* are there. Raises ServerError at the end."""
    deadline = time.monotonic() + timeout_seconds
    seen = -1
    while True:
        ids = sorted(grid.get_node_ids())
        if len(ids) >= needed:
            return ids
        if len(ids) != seen:
            seen = len(ids)
            log.info("waiting for nodes", needed=needed, there=seen)
        if time.monotonic() >= deadline:
            raise ServerError(
                f"{needed} nodes are needed (min-available-clients), {len(ids)} there after "
                f"{timeout_seconds:g} s (node-timeout)"
            )
        time.sleep(_LOOK_SECONDS)


def sample(ids: Collection[int], fraction: float, minimum: int, choose: random.Random) -> list[int]:
    """The share *fraction* of *ids*, at least *minimum* where there are so many."""
    size = min(len(ids), max(int(len(ids) * fraction), minimum))
    return sorted(choose.sample(sorted(ids), size))


class FixedNodes(Grid):
    """A grid that knows its nodes beforehand, for a strategy's ``configure_train``.

    A strategy asks the grid for nodes and waits until there are enough; here the choice was made
    before, for all metrics at once. It sends nothing.
    """

    def __init__(self, ids: list[int], grid: Grid) -> None:
        self._ids = ids
        self._grid = grid

    def get_node_ids(self) -> list[int]:
        return self._ids

    @property
    def run(self) -> Any:
        return self._grid.run

    def _sends_nothing(self, *_args: object, **_kwargs: object) -> Never:
        raise TypeError("this grid sends nothing")

    set_run = create_message = _sends_nothing
    push_messages = pull_messages = send_and_receive = _sends_nothing
