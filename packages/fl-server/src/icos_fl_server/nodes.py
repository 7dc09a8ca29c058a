"""Which nodes take part: waiting for them, and choosing some of them for a round."""

import random
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Never

import numpy as np
import structlog
from flwr.serverapp import Grid
from icos_fl.federation.v1.records import NUM_EXAMPLES

from icos_fl_server.errors import ServerError
from icos_fl_server.messages import Reply

LOOK_SECONDS = 0.5

log = structlog.get_logger()


def wait_for_nodes(
    grid: Grid, needed: int, timeout_seconds: float, look: Callable[[], None]
) -> list[int]:
    """Ids of the connected nodes, as soon as *needed* are there. Raises ServerError at the end.

    What *look* raises, which is called meanwhile, ends it too.
    """
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
                f"{needed} nodes needed, {len(ids)} there "
                f"after {timeout_seconds:g} s (node-timeout)"
            )
        look()
        time.sleep(LOOK_SECONDS)


def sample(ids: Collection[int], fraction: float, minimum: int, choose: random.Random) -> list[int]:
    """The share *fraction* of *ids*, at least *minimum* where there are so many."""
    size = min(len(ids), max(int(len(ids) * fraction), minimum))
    return sorted(choose.sample(sorted(ids), size))


class Roster:
    """The nodes that have said who they are."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.offers: dict[str, dict[str, int]] = {}
        """By name: training sequences of each metric that the node can learn."""

    def known(self, connected: Iterable[int]) -> list[int]:
        """Those of *connected* that have a name, in the order of their names."""
        return sorted((i for i in connected if i in self.names), key=self.names.__getitem__)

    def admit(self, node_id: int, reply: Reply, connected: Collection[int]) -> bool:
        """Take the node in; not if another node of its name is connected.

        A SuperNode that was started again without its key has a new id, and takes the place of its
        old one as soon as that counts as gone.
        """
        others = [i for i, name in self.names.items() if name == reply.name and i != node_id]
        if any(other in connected for other in others):
            return False
        for other in others:
            del self.names[other]
        self.names[node_id] = reply.name
        counts = {m: numbers.get(NUM_EXAMPLES, 0.0) for m, numbers in reply.train.items()}
        self.offers[reply.name] = {m: int(n) for m, n in counts.items() if np.isfinite(n)}
        return True


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
