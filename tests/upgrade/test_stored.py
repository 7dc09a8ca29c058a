"""What one version of the store has kept is read and gone on with by the other, and back again."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from icos_fl_timeseries_store.testing import store_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLIENT = """
import json, sys
import numpy as np
from icos_fl_timeseries_store import ModelVersion, StoreSettings, connect

port, number = map(int, sys.argv[1:])
with connect(StoreSettings(port=port)) as store:
    if "a" in store.nodes():
        rows = store.window("a").read()
        model = store.model_state("a", "cpu_usage").get()
        best = store.model_state("a", "cpu_usage").get("best")
        print(json.dumps({
            "columns": rows.columns, "units": rows.units, "times": rows.times_ns_t.tolist(),
            "values": np.nan_to_num(rows.values_tf, nan=-1.0).tolist(), "round": model.round,
            "best": best.round, "weights": model.weights["w"].tolist(),
            "config": dict(model.config), "metadata": dict(model.metadata),
        }))
    window = store.create_window("a", 4)
    columns = ["cpu_usage"] if number % 2 else ["cpu_usage", "power"]
    window.append(columns, np.array([number * 1000]), np.full((1, len(columns)), float(number)),
                  {"cpu_usage": "%", "power": "W"})
    store.model_state("a", "cpu_usage").put(
        ModelVersion(number, {"w": np.full(3, number, np.float32)}, {"model": "m:f", "horizon": 4},
                     {"eval-loss": 0.5}),
        best=number == 1,
    )
"""


def expected(numbers: int) -> dict[str, Any]:
    """What there is after the first *numbers* writes."""
    newest = range(1, numbers + 1)[-4:]
    return {
        "columns": ["cpu_usage", "power"][: min(numbers, 2)],
        "units": ["%", "W"][: min(numbers, 2)],
        "times": [1000 * number for number in newest],
        "values": [
            [float(number), -1.0 if number % 2 else float(number)][: min(numbers, 2)]
            for number in newest
        ],
        "round": numbers,
        "best": 1,
        "weights": [float(numbers)] * 3,
        "config": {"model": "m:f", "horizon": 4},
        "metadata": {"eval-loss": 0.5},
    }


def test_an_upgrade_a_rollback_and_an_upgrade_again_keep_windows_and_models(
    environment: Callable[..., Path], tmp_path: Path
):
    written = 0
    for server, clients in (("old", "old"), ("new", "old new"), ("old", "new old"), ("new", "new")):
        python = environment(server)
        # In place of the Python of the tests, that of the version.
        becomes = ("sh", "-c", f'shift; exec "{python}" "$@"', "sh")
        with store_processes(tmp_path / "store", becomes) as store:
            for client in clients.split():
                done = subprocess.run(
                    [environment(client), "-c", CLIENT, str(store.settings.port), str(written + 1)],
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                if written:
                    assert json.loads(done.stdout) == expected(written)
                written += 1
