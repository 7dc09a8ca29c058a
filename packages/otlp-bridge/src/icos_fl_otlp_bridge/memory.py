"""What decoding may take. It is estimated before: two bytes of a request may become hundreds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from icos_fl_otlp_bridge.errors import Overloaded, TooLarge

DECODED_BYTES_MAX: Final = 384 << 20
"""Of one request, with all that is made of it until its rows are there."""
SMALL_BYTES: Final = 8 << 20
"""Requests that take no more wait for no other."""
BYTE_BYTES_MAX: Final = 64
"""What a byte of a request takes at the most, whatever it is: measured."""


def check_decoded(encoded_bytes: int, decoded_bytes: int) -> None:
    """Raises TooLarge."""
    if decoded_bytes > DECODED_BYTES_MAX:
        raise TooLarge(
            f"the request's {encoded_bytes} bytes take {decoded_bytes} or more when decoded, over "
            f"the limit of {DECODED_BYTES_MAX}; send it in parts"
        )


class Turns:
    """Large requests are decoded one at a time; with those that wait there are at most *large_max*.

    So the others' workers go on with what is small.
    """

    def __init__(self, large_max: int) -> None:
        self._large_max = large_max
        self.large = 0
        """Large requests in hand."""
        self._counting = threading.Lock()
        self._turn = threading.Lock()

    @contextmanager
    def of(self, decoded_bytes: int) -> Iterator[None]:
        """A turn for what takes *decoded_bytes*. Raises Overloaded where too many wait."""
        if decoded_bytes <= SMALL_BYTES:
            yield
            return
        with self._counting:
            if self.large == self._large_max:
                raise Overloaded(f"{self.large} large requests are in hand, which is the limit")
            self.large += 1
        try:
            with self._turn:
                yield
        finally:
            with self._counting:
                self.large -= 1
