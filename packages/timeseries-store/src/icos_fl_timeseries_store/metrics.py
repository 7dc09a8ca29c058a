"""What a store's backend tells Prometheus of its own work."""

import functools
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from prometheus_client import Counter, Histogram

from icos_fl_timeseries_store.contract import Appended

P = ParamSpec("P")
T = TypeVar("T")

_SECONDS = Histogram(
    "icos_fl_store_call_seconds",
    "How long calls of windows and model states took in the backend",
    ["call"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_ERRORS = Counter("icos_fl_store_errors", "Calls that raised", ["call", "error"])
_ROWS = Counter(
    "icos_fl_store_rows",
    "Rows of appends: added, merged into one that was there, too old, or removed to make room",
    ["result"],
)
_RESULTS = ("added", "merged", "too_old", "removed")


def begin() -> None:
    """Of a backend: a store into which no row comes tells 0, and not nothing."""
    for result in _RESULTS:
        _ROWS.labels(result)


def measured(call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """*call*, with its time, its errors, and where it appends, its rows counted."""
    name = call.__qualname__.partition(".")[0] + "." + call.__name__

    @functools.wraps(call)
    async def counted(*args: P.args, **kwargs: P.kwargs) -> T:
        began = time.perf_counter()
        try:
            result = await call(*args, **kwargs)
        except Exception as error:
            _ERRORS.labels(name, type(error).__name__).inc()
            raise
        _SECONDS.labels(name).observe(time.perf_counter() - began)
        if isinstance(result, Appended):
            for kind in _RESULTS:
                _ROWS.labels(kind).inc(getattr(result, kind))
        return result

    return counted
