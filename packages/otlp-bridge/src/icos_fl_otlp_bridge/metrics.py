"""The bridge's own metrics, in prometheus_client's default registry."""

from typing import Final

from prometheus_client import Counter, Histogram

POINTS_TAKEN: Final = Counter(
    "icos_fl_bridge_points_taken", "Data points that were stored, or needed for a rate"
)
POINTS_REJECTED: Final = Counter(
    "icos_fl_bridge_points_rejected", "Data points that were rejected, by reason", ["reason"]
)
ROWS: Final = Counter("icos_fl_bridge_rows", "Rows that were stored, or written over")
STORE_ERRORS: Final = Counter(
    "icos_fl_bridge_store_errors",
    "Exports refused for now by the store: it does not answer, is full, or a window is damaged",
    ["reason"],
)
for _reason in ("unavailable", "full", "damaged"):
    STORE_ERRORS.labels(_reason)
EXPORTS_REFUSED: Final = Counter(
    "icos_fl_bridge_exports_refused",
    "Exports that ended with an error, by transport and status code",
    ["transport", "code"],
)
EXPORT_SECONDS: Final = Histogram(
    "icos_fl_bridge_export_seconds",
    "From a request's last byte until its rows are stored, by transport",
    ["transport"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CONFIG_TAKEN_OVER: Final = Counter(
    "icos_fl_bridge_reloads", "Configurations taken over or refused at SIGHUP", ["result"]
)
