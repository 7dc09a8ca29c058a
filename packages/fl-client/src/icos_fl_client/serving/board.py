"""The newest outlook of each node and metric, for whoever asks and whoever waits."""

import threading
from collections.abc import Callable

from icos_fl_client.serving.outlook import Outlook

Key = tuple[str, str]
"""Node and metric."""


class Board:
    """Any number of threads may use it at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._posted: dict[Key, tuple[int, Outlook]] = {}
        self._count = 0

    def post(self, outlook: Outlook) -> None:
        """Put *outlook* in the place of the one before; who waits is told if it says otherwise."""
        with self._changed:
            key = outlook.node, outlook.metric
            number, before = self._posted.get(key, (0, None))
            if before is None or _news(before) != _news(outlook):
                self._count += 1
                number = self._count
                self._changed.notify_all()
            self._posted[key] = number, outlook

    def outlooks(self) -> list[Outlook]:
        """All, sorted by node and metric."""
        return self.since(0)[1]

    def since(self, count: int) -> tuple[int, list[Outlook]]:
        """What was posted after *count*, and what to give the next time."""
        with self._changed:
            found = sorted(key for key, (number, _) in self._posted.items() if number > count)
            return self._count, [self._posted[key][1] for key in found]

    def wait(self, count: int, timeout_seconds: float, ended: Callable[[], bool]) -> None:
        """Return as soon as something was posted after *count*, at the timeout, or when *ended*.

        Who may have ended is looked at as often as somebody calls ``wake``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._count > count or ended(), timeout_seconds)

    def wake(self) -> None:
        """Have who waits look whether he has ended."""
        with self._changed:
            self._changed.notify_all()


def _news(outlook: Outlook) -> tuple[object, ...]:
    model = outlook.model and (outlook.model.round, outlook.model.metadata.get("created-unix-s"))
    return outlook.last_time_ns, outlook.none and outlook.none.reason, model, outlook.no_model
