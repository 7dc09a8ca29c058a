"""What a service is told by signals."""

import signal
import socket


class Signals:
    """Keeps the signals *numbers*, from now on, until somebody waits for them.

    Python's handlers write to a socket, whichever thread the kernel gives a signal to: none kills
    the process and none is missed, whatever the main thread does. To be made in that one.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers
        self._told, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

    def wait(self) -> signal.Signals:
        """The next one; one that came several times before may be told once."""
        while True:
            number = self._told.recv(1)[0]
            if number in self._numbers:
                return signal.Signals(number)
