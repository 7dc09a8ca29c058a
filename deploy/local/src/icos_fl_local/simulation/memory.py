"""How much memory a simulation takes, over all of its processes."""

import threading
from types import TracebackType

import psutil

_SAMPLE_SECONDS = 1.0
_MIB = 2**20


class PeakMemory:
    """Looks once a second at this process and its descendants. Use it as a context manager.

    Counts proportional set size: memory that processes share is counted once.
    """

    def __init__(self) -> None:
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def restart(self) -> None:
        """Forget what was seen so far."""
        self._peak_bytes = 0

    @property
    def peak_mib(self) -> int:
        """The most that all processes had at once since the start."""
        return round(self._peak_bytes / _MIB)

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            this = psutil.Process()
            total = sum(map(_pss_bytes, [this, *this.children(recursive=True)]))
            self._peak_bytes = max(self._peak_bytes, total)


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0
