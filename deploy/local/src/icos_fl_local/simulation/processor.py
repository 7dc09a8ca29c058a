"""A real processor in front of a store in memory that holds the virtual nodes' windows.

    python -m icos_fl_local.simulation.processor HOST:PORT TRACES NODES

The rows are those that the bridge would make of the traces. Serves until SIGTERM or SIGINT.
"""

import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from icos_fl_processor.server import Server
from icos_fl_service import logs
from icos_fl_timeseries_store import MemoryStore

from icos_fl_local.simulation.parts import virtual_nodes
from icos_fl_local.traces import Trace, column_of, load


def filled_store(traces: Iterable[Trace]) -> MemoryStore:
    """A store with a window for each trace that holds all of its rows."""
    store = MemoryStore()
    for trace in traces:
        columns = [column_of(column) for column in trace.columns]
        units = dict(zip(columns, trace.units, strict=True))
        window = store.create_window(trace.node, len(trace.times_s))
        window.append(columns, trace.times_s * 10**9, trace.values_tf, units)
    return store


def main() -> None:
    """Exit status 0 when told to stop."""
    address, folder, nodes = sys.argv[1:]
    told_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_stop.set())
    logs.configure()
    store = filled_store(virtual_nodes(load(Path(folder)), int(nodes)))
    server = Server(lambda: store, address)
    server.start()
    told_to_stop.wait()
    server.stop()


if __name__ == "__main__":
    main()
