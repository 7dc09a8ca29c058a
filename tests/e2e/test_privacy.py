"""A federation of real parts with differential privacy.

uv run pytest -m slow tests/e2e/test_privacy.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RUN = {
    "time-step": 20,
    "horizon": 5,
    "local-epochs": 1,
    "batch-size": 256,
    "dp-clipping-norm": 1.0,
    "dp-noise-multiplier": 0.5,
}


def test_a_federation_learns_with_noise_and_says_what_it_spent(tmp_path: Path):
    given = [part for key, value in RUN.items() for part in ("-c", f"{key}={value}")]
    up = ("up", "--nodes", "2", "--rounds", "2")
    metrics = ("--metric", "cpu_usage", "--metric", "memory_available_mib")
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_local", *up, *metrics, *given],
        cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    history = json.loads((tmp_path / ".icos-fl/runs/0001/history.json").read_text())
    spent = [entry["privacy"] for entry in history["rounds"]]
    assert [entry["state"] for entry in history["rounds"]] == ["finished"] * 2
    assert [facts["releases"] for facts in spent] == [2, 4]
    assert 0 < spent[0]["epsilon"] < spent[1]["epsilon"]
