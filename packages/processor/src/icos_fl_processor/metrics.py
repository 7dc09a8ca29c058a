"""What the processor tells Prometheus of its own work; icos_fl_service counts its calls."""

from prometheus_client import Counter, Gauge

SEQUENCES = Counter(
    "icos_fl_processor_sequences_served", "Sequences in the answers that were begun", ["part"]
)
STORE_ERRORS = Counter(
    "icos_fl_processor_store_errors", "Calls that ended because the store did not answer"
)
WATCHERS = Gauge("icos_fl_processor_watchers", "Clients that watch a window now")

WINDOW_ROWS = Gauge("icos_fl_window_rows", "Rows in the window of a node", ["node"])
WINDOW_CAPACITY_ROWS = Gauge(
    "icos_fl_window_capacity_rows", "Rows that the window of a node can hold", ["node"]
)
WINDOW_LAST_ROW = Gauge(
    "icos_fl_window_last_row_timestamp_seconds", "Time of the newest row of a node", ["node"]
)
WINDOW_CONDITION = Gauge(
    "icos_fl_window_condition",
    "1 for each thing that is wrong with a window; column is empty where it is all of it",
    ["node", "column", "condition"],
)
