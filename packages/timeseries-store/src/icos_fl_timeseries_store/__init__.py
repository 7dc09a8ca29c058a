"""The sliding window and the model state of a node, kept in dataClay."""

from icos_fl_timeseries_store.contract import (
    DEFAULT_CAPACITY_ROWS,
    Appended,
    ModelState,
    ModelVersion,
    Rows,
    Store,
    Window,
    WindowInfo,
)
from icos_fl_timeseries_store.errors import (
    InvalidRows,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UnknownNode,
)
from icos_fl_timeseries_store.memory import MemoryStore
from icos_fl_timeseries_store.settings import StoreSettings


def connect(settings: StoreSettings) -> Store:
    """The store on dataClay at *settings*. Raises StoreUnavailable if it does not answer.

    dataClay is imported here, so that whoever needs the contract alone does not pay for it.
    """
    from icos_fl_timeseries_store.dataclay_store import connect as connect_dataclay

    return connect_dataclay(settings)


__all__ = [
    "DEFAULT_CAPACITY_ROWS",
    "Appended",
    "InvalidRows",
    "MemoryStore",
    "ModelState",
    "ModelVersion",
    "Rows",
    "Store",
    "StoreDamaged",
    "StoreError",
    "StoreFull",
    "StoreSettings",
    "StoreUnavailable",
    "UnknownNode",
    "Window",
    "WindowInfo",
    "connect",
]
