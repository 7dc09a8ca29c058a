"""A writer is killed, and its disk loses its power, at random moments: what is there afterwards.

The writer's files are written anew all the time, beside its appends.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from icos_fl_service.shim import tied
from icos_fl_timeseries_store.durable import StateFolder
from icos_fl_timeseries_store.testing import small_disk

SEED = 20261125
OPTIONS = "noauto_da_alloc"
"""ext4 would else sync of its own what takes the place of another file."""
WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
import numpy as np
from icos_fl_timeseries_store import ModelVersion, durable
durable.JOURNAL_BYTES_MIN, durable.JOURNAL_FACTOR = 1, 0

async def write(words):
    def say(word, row):
        nonlocal words
        os.write(1, f"{word} {row}\\n".encode())  # whole or not at all, whenever it is killed
        words -= 1
        if words == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    state = durable.StateFolder(Path(sys.argv[1]))
    window, model = await state.window("window.a", 50), await state.model_state("model.a.x")
    row = max(window.read(last=1).times_ns_t, default=0)
    while True:
        row += 1
        await window.append(["x"], np.array([row]), np.full((1, 1), row))
        say("row", row)
        if row % 5 == 0:
            weights = {"w": np.full(1000, row, np.float32)}
            await model.put(ModelVersion(int(row), weights, {}), True)
            say("model", row)

for words in sys.stdin:
    life = os.fork()
    if life == 0:
        asyncio.run(write(int(words)))
    print("pid", life, flush=True)
    os.waitpid(life, 0)
    print("ended", life, flush=True)
"""


class Writer:
    """Writes one row after another, in one life after another."""

    def __init__(self, folder: Path, within: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            tied(*within, sys.executable, "-c", WRITER, str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.acknowledged = {"row": 0, "model": 0}

    def _next(self) -> tuple[str, int]:
        word, number = self._process.stdout.readline().split()
        if word in self.acknowledged:
            self.acknowledged[word] = int(number)
        return word, int(number)

    def live(self, words: int, stop: bool = False) -> int:
        """Begin a life, and return its process id when it has written something *words* times.

        With *stop* it does nothing more.
        """
        self._process.stdin.write(f"{words if stop else 0}\n")
        self._process.stdin.flush()
        heard = [self._next() for _ in range(1 + words)]
        return dict(heard)["pid"]

    def end(self, life: int) -> None:
        os.kill(life, signal.SIGKILL)
        while self._next()[0] != "ended":
            pass

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def check(folder, acknowledged):
    """That *folder* holds what was acknowledged, and what came next at most."""

    async def read():
        state = StateFolder(folder)
        window, model = await state.window("window.a", None), await state.model_state("model.a.x")
        rows, version = window.read(), model.get("best")
        await window.close()
        return rows, version

    rows, version = asyncio.run(read())
    times = rows.times_ns_t.tolist()
    assert acknowledged["row"] <= times[-1] <= acknowledged["row"] + 1
    assert times == list(range(max(1, times[-1] - 49), times[-1] + 1))
    assert rows.values_tf[:, 0].tolist() == times
    if version is None:
        assert acknowledged["model"] == 0
        return
    assert acknowledged["model"] <= version.round <= times[-1]
    assert version.weights["w"].tolist() == [version.round] * 1000


def test_two_hundred_kills_leave_all_that_was_acknowledged(tmp_path):
    chance = random.Random(SEED)
    with contextlib.closing(Writer(tmp_path)) as writer:
        for _ in range(200):
            life = writer.live(chance.randrange(1, 12))
            time.sleep(chance.uniform(0, 0.003))
            writer.end(life)
            check(tmp_path, writer.acknowledged)


def is_stopped(pid):
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) == {"T"}


def test_thirty_power_cuts_leave_all_that_was_acknowledged(tmp_path):
    """What the file system has not written to its device when the writer stops is lost."""
    chance = random.Random(SEED)
    image, copy = tmp_path / "image", tmp_path / "copy"
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 16, image, OPTIONS))
        except OSError as error:
            warnings.warn(f"DID NOT RUN: {error}", stacklevel=1)
            pytest.skip(f"DID NOT RUN: {error}")
        writer = stack.enter_context(contextlib.closing(Writer(disk.folder / "state", disk.within)))
        for number in range(30):
            life = writer.live(chance.randrange(5, 60), stop=number % 3 > 0)
            os.kill(life, signal.SIGSTOP)
            while not is_stopped(life):
                time.sleep(0.001)
            shutil.copyfile(image, copy)
            writer.end(life)
            with small_disk(tmp_path / "after", 16, copy) as after:
                check(after.seen_at / "state", writer.acknowledged)
            copy.unlink()
