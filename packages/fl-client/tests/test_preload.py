"""What a warm worker imports, so that no task has to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import sys
from importlib import import_module
from importlib.metadata import entry_points
for point in entry_points(group="icos_fl.clientapp"):
    import_module(point.value)
import json
from pathlib import Path
threads = len(list(Path("/proc/self/task").iterdir()))
from icos_fl_client.node import Learner, NodeConfig, ProcessorClient, RunConfig, build_model, weights_of
from icos_fl_client.settings import parse
node = parse(NodeConfig, json.loads(sys.argv[1]), "node config")
run = parse(RunConfig, json.loads(sys.argv[2]), "run config")
before = set(sys.modules)
with ProcessorClient(node.processor_address) as processor, Learner(node, run, processor) as learner:
    weights = weights_of(build_model(run, "cpu_usage"))
    learner.evaluate("cpu_usage", weights)
    learner.keep({"cpu_usage": weights}, 1)
    learner.train("cpu_usage", weights, 1, 0.0)
print(json.dumps({"threads": threads, "imported": sorted(set(sys.modules) - before)}))
"""  # noqa: E501


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_warm_worker_has_one_thread_and_its_tasks_import_nothing(
    windows, wave, address, dataclay, small_run
):
    windows.put("a", "cpu_usage", [wave(30)], [wave(10)])
    node = {
        "node-name": "a",
        "processor-address": address,
        "store-address": f"{dataclay.host}:{dataclay.port}",
    }

    done = subprocess.run(
        [sys.executable, "-c", TASK, json.dumps(node), json.dumps(small_run)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert json.loads(done.stdout) == {"threads": 1, "imported": []}
