"""A SuperNode that takes the place of one that was killed, with its key.

Flower refuses it, and it ends, until the SuperLink has missed two of the dead one's heartbeats.
"""

import fcntl
import hashlib
import time
from contextlib import suppress
from importlib import import_module
from itertools import count
from logging import WARNING
from pathlib import Path
from typing import IO, Any

import httpx
from flwr.supercore import log
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.utils import get_flwr_home
from icos_fl_service import status

SUPERLINK = "superlink"

_PREDECESSOR_SECONDS = 75
"""Until a SuperNode that was killed counts as gone, and some more."""

_WAITING = "it takes a SuperNode of this key to be online; waiting until that counts as gone"


def take_over_at_start() -> None:
    """From now on, Flower's SuperNode in this process signs a dead predecessor off, or waits until
    the SuperLink has missed it."""
    connection: Any = import_module("flwr.supernode.fleet_http_connection")

    class Client(connection.FleetHttpClient):  # type: ignore[misc]
        """Flower's, with another ActivateNode."""

        has_own_key = True
        place: "Place | None" = None

        def RegisterNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            self.has_own_key = False  # a new one at each start, which nobody had before
            return super().RegisterNode(request)

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            place = self.place = Place(request.public_key) if self.has_own_key else None
            for attempt in count():
                try:
                    answer = super().ActivateNode(request)
                except httpx.HTTPStatusError as error:
                    if not _is_taken(error) or attempt > _PREDECESSOR_SECONDS:
                        raise
                else:
                    if place:
                        place.take(answer.node_id)
                    return answer
                if place and place.dead_id is not None:
                    self._sign_off(place.dead_id)
                    place.dead_id = None
                    continue
                if attempt <= 1:
                    log(WARNING, "The SuperLink: %s", _WAITING)
                status.waits_for(SUPERLINK, _WAITING)
                time.sleep(1)
            raise AssertionError

        def _sign_off(self, node_id: int) -> None:
            request: Any = import_module("flwr.proto.fleet_pb2").DeactivateNodeRequest
            with suppress(httpx.HTTPError):  # it may be gone by now
                self.DeactivateNode(request(node_id=node_id))

    connection.FleetHttpClient = Client


class Place:
    """The place of a node on this machine: one process has it, until its end however it ends.

    Kept in Flower's folder. Where that cannot be written, or another process has the place,
    nothing is known.
    """

    def __init__(self, public_key: bytes) -> None:
        self.dead_id: int | None = None
        """Of the node that had it before, and has not signed off."""
        self._file: IO[str] | None = None
        name = hashlib.sha256(public_key).hexdigest()[:16]
        try:
            folder = Path(get_flwr_home()) / "icos-fl-nodes"
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / name).open("a+")
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        self._file = file
        file.seek(0)
        with suppress(ValueError):  # it is new, or was cut off
            self.dead_id = int(file.read())

    def take(self, node_id: int) -> None:
        """It is that node's now."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.truncate(0)
            self._file.write(str(node_id))
            self._file.flush()


def _is_taken(error: httpx.HTTPStatusError) -> bool:
    told = FlowerError.from_json(error.response.text)
    return told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
