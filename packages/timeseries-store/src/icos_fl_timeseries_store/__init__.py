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
    StoreError,
    StoreUnavailable,
    UnknownNode,
)
from icos_fl_timeseries_store.settings import StoreSettings

__all__ = [
    "DEFAULT_CAPACITY_ROWS",
    "Appended",
    "InvalidRows",
    "ModelState",
    "ModelVersion",
    "Rows",
    "Store",
    "StoreError",
    "StoreSettings",
    "StoreUnavailable",
    "UnknownNode",
    "Window",
    "WindowInfo",
]
