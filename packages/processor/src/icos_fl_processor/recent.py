"""A small cache: what was used last, up to a number of bytes, and of values a kind."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[Hashable, Hashable]


class Recent(Generic[T]):
    """Keeps the values that were used last while all together are at most *bytes_max*.

    Of the keys with one first part only the *versions_max* that were used last: the second part is
    a version, and a window has a new one with every row, while the old ones are of little use.
    A value is made once however many threads ask for it at once; they wait for the first.
    """

    def __init__(self, bytes_max: int, versions_max: int, bytes_of: Callable[[T], int]) -> None:
        self._bytes_max = bytes_max
        self._versions_max = versions_max
        self._bytes_of = bytes_of
        self._values: OrderedDict[Key, T] = OrderedDict()
        self._making: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Key, make: Callable[[], T]) -> T:
        """The value of *key*, made if it is not kept; what *make* raises is raised."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self._keep(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            return value

    def find(self, key: Key) -> T | None:
        """The value of *key*, or None if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def _keep(self, key: Key, value: T) -> None:
        with self._lock:
            self._values[key] = value
            versions = [known for known in self._values if known[0] == key[0]]
            for known in versions[: -self._versions_max]:
                del self._values[known]
            while sum(map(self._bytes_of, self._values.values())) > self._bytes_max:
                self._values.popitem(last=False)
