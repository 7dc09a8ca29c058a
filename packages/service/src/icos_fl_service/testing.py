"""What tests of every service need."""

import contextlib
import os
import secrets
import socket

# Below the ports that Linux gives to outgoing connections (from 32,768 on), and beside those that
# the launcher takes (from 20,000 on). Tests that run side by side have ports of their own.
_FIRST = 10_000 + 2_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4)
_PORTS = range(_FIRST, _FIRST + 2_500)
_given: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens; never the same one twice in a process."""
    while True:
        port = secrets.choice(_PORTS)
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _given.add(port)
            return port
