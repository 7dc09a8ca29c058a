"""Asks again and again whether what a service needs is there."""

import functools
import threading
from collections.abc import Callable

import structlog
from prometheus_client import Counter, Gauge

from icos_fl_service import status

PROBE_SECONDS = 2.0
"""How often is asked what does not answer."""

_FAILURES = Counter("icos_fl_service_probe_failures", "Probes that what the service needs failed")

log = structlog.get_logger()


@functools.cache
def _ready() -> Gauge:
    """There from the first probe on: a process that needs nothing is neither ready nor not."""
    return Gauge("icos_fl_service_ready", "1 while what the service needs answers, else 0")


class Probe:
    """Calls *ask* on a thread of its own again and again, and *changed* with the answer.

    That is after PROBE_SECONDS, and after *seconds* when the answer was yes.
    What *ask* raises is a no; errors other than *expected* are logged with their traceback, and do
    not end the probe either: else health would stay at its last word.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        changed: Callable[[bool], None],
        expected: type[Exception] = OSError,
        what: str = "store",
        seconds: float = PROBE_SECONDS,
    ) -> None:
        self._ask = ask
        self._changed = changed
        self._expected = expected
        self._what = what
        self._seconds = seconds
        self.why_not = f"the {what} has not answered yet"
        """The last error of *ask*."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{what} probe", daemon=True)
        _ready().set(0)
        status.waits_for(what, self.why_not)

    def start(self) -> None:
        """Ask from now on."""
        self._thread.start()

    def stop(self, patience_seconds: float) -> None:
        """Ask no more, and wait for a question under way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(patience_seconds)
        _ready().set(0)

    def _run(self) -> None:
        answered = None
        while not self._stopping.is_set():
            answers = self._answers()
            _ready().set(answers)
            if answers:
                status.has(self._what)
            else:
                status.waits_for(self._what, self.why_not)
            if answers is not answered:
                answered = answers
                self._changed(answers)
                if answers:
                    log.info(f"{self._what} answers")
                else:
                    log.warning(f"{self._what} does not answer", reason=self.why_not)
            self._stopping.wait(self._seconds if answers else PROBE_SECONDS)

    def _answers(self) -> bool:
        try:
            self._ask()
        except Exception as error:
            self.why_not = str(error)
            _FAILURES.inc()
            if not isinstance(error, self._expected):
                log.exception(f"unexpected error of the {self._what}")
            return False
        return True
