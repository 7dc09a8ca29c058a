"""Which names a node, an owner and a metric may have, in every store."""

import re
from typing import Final
from uuid import UUID, uuid5

from icos_fl_timeseries_store.errors import InvalidRows

WINDOW: Final = "window."
"""What the alias of a node's window starts with."""
MODEL: Final = "model."
"""What the alias of a model state starts with."""
_OBJECTS = UUID("5b6f3a0e-7a3c-4a55-9d27-2f8a4de1c0b7")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,199}")


def checked_name(name: str) -> str:
    """*name*, if a store can have it. Raises InvalidRows."""
    if not _NAME.fullmatch(name):
        raise InvalidRows(
            f"name {name!r}; it must be 1 to 200 letters, digits and ._:@-, one of the former first"
        )
    return name


def object_id(alias: str) -> UUID:
    """The dataClay object of *alias*, the same for all time.

    So an object that is made anew, by whomever, is the one that was there, and finds its files.
    """
    return uuid5(_OBJECTS, alias)
