"""Which names a node, an owner and a metric may have, in every store."""

import re

from icos_fl_timeseries_store.errors import InvalidRows

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,199}")


def checked_name(name: str) -> str:
    """*name*, if a store can have it. Raises InvalidRows."""
    if not _NAME.fullmatch(name):
        raise InvalidRows(
            f"name {name!r}; it must be 1 to 200 letters, digits and ._:@-, one of the former first"
        )
    return name
