"""When to ask again after an empty answer."""

import math
import time

HELD_SECONDS = 0.5
"""An empty answer that took this long was held back by who gave it: ask again at once."""

_FIRST_PAUSE_SECONDS = 0.02


class Pace:
    """The pause between one question and the next, for peers that hold answers and that do not.

    A held answer needs none. Quick empty ones double it, from 20 ms to *longest_seconds*.
    """

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self.start_again()

    def start_again(self) -> None:
        """The answer was not empty."""
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._asked = time.monotonic()

    def sleep(self, until: float = math.inf) -> None:
        """The answer was empty: wait until it is time to ask again, at most to *until*."""
        now = time.monotonic()
        if now - self._asked >= HELD_SECONDS:
            self.start_again()
            return
        time.sleep(max(0.0, min(self._pause_seconds, until - now)))
        self._pause_seconds = min(2 * self._pause_seconds, self._longest_seconds)
        self._asked = time.monotonic()
