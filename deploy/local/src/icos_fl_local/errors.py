"""What ends a command of ``icos-fl`` with one clear line."""

import signal


class LocalError(Exception):
    """A refusal or a failure that the user can act on; the message is all that is printed."""

    exit_status = 1


class UsageError(LocalError):
    """Something on the command line that cannot be used."""

    exit_status = 2


class NothingRunning(LocalError):
    """No deployment runs in the state folder."""

    exit_status = 3


class Quiesced(LocalError):
    """A run ended before its last round, or did not begin, because it was asked to."""

    exit_status = 4


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. Not an Exception: nothing on the way may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_status = 128 + signal_number
