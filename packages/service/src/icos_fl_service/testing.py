"""What tests of every service need."""

import contextlib
import secrets
import socket

# Below the ports that Linux gives to outgoing connections (from 32,768 on), and beside those that
# the launcher takes (from 20,000 on).
_PORTS = range(10_000, 20_000)
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
