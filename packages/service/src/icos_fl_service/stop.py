"""How a service is told to stop."""

import signal
import threading


def stop_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set from now on."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    return told
