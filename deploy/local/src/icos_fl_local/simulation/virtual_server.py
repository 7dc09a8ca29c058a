"""The ServerApp of a simulation: that of icos-fl-server, whose messages go out a few at a time.

To find the messages of each node, Flower's simulation runtime looks ten times a second at all that
are not answered yet, once a node: with as many messages as nodes its cost grows with their square.
"""

import os
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from icos_fl_server.app import app as server_app

_MESSAGES_A_CORE = 4
_LOOK_SECONDS = 0.01

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    server_app(PacedGrid(grid, _MESSAGES_A_CORE * len(os.sched_getaffinity(0))), context)


class PacedGrid(Grid):
    """A grid with at most *messages_max* messages under way.

    ``push_messages`` returns when the last message is under way, and keeps the replies that came
    until then for ``pull_messages``. A message that is never answered makes room when it expires.
    """

    def __init__(self, grid: Grid, messages_max: int) -> None:
        self._grid = grid
        self._messages_max = messages_max
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """An id a message; empty for one that was refused."""
        ids = []
        under_way: set[str] = set()
        for message in messages:
            while len(under_way) >= self._messages_max:
                arrived = {reply_to(reply): reply for reply in self._grid.pull_messages(under_way)}
                self._replies |= arrived
                under_way -= arrived.keys()
                if not arrived:
                    time.sleep(_LOOK_SECONDS)
            sent = list(self._grid.push_messages([message]))
            ids.append(sent[0] if sent and sent[0] else "")
            under_way |= set(filter(None, sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there to those of the messages."""
        wanted = set(message_ids)
        kept = [self._replies.pop(message_id) for message_id in wanted & self._replies.keys()]
        missing = wanted - {reply_to(reply) for reply in kept}
        return kept + (list(self._grid.pull_messages(missing)) if missing else [])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies until *timeout* seconds after the last message went out."""
        missing = set(filter(None, self.push_messages(messages)))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while True:
            arrived = self.pull_messages(missing)
            replies += arrived
            missing -= {reply_to(reply) for reply in arrived}
            if not missing or (deadline is not None and time.monotonic() >= deadline):
                return replies
            time.sleep(_LOOK_SECONDS)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)


def reply_to(reply: Message) -> str:
    """The id of the message that *reply* answers."""
    return str(reply.metadata.reply_to_message_id)
