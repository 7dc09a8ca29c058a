"""The exporter's counter becomes the column of the example's configuration, in a real bridge."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from icos_fl_otlp_bridge import Server, load_config
from icos_fl_timeseries_store import MemoryStore, Rows

EXAMPLE = Path(__file__).parents[1]
PATIENCE_SECONDS = 120.0


def test_what_a_machine_receives_is_a_column_in_kilobytes_a_second():
    store = MemoryStore()
    server = Server(load_config(EXAMPLE / "columns.yaml"), lambda: store, "127.0.0.1:0", 1 << 20, 4)
    server.start()
    address = f"127.0.0.1:{server.port}"
    exporter = subprocess.Popen([sys.executable, str(EXAMPLE / "exporter.py"), address])
    try:
        rows = first_rates(store)
        server.stop()
        exporter.send_signal(signal.SIGINT)
        assert exporter.wait(PATIENCE_SECONDS) == 0  # though nobody takes what it has left
    finally:
        exporter.kill()
        exporter.wait()
        server.stop()
    assert (rows.columns, rows.units) == (("network_receive",), ("kBy/s",))
    assert np.nanmin(rows.values_tf) >= 0


def first_rates(store: MemoryStore) -> Rows:
    """The window, when a second export has made a rate of the first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if store.nodes() == [socket.gethostname()]:
            rows = store.window(socket.gethostname()).read()
            if np.isfinite(rows.values_tf).any():
                return rows
        time.sleep(0.1)
    raise AssertionError(f"no rate in {PATIENCE_SECONDS:g} s")
