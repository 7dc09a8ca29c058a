"""``icos-fl-store watch`` as a process: what it prints, and the exit status for monitoring."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.testing import store_processes


def command(settings, *arguments, stdout=subprocess.PIPE):
    environment = {"ICOS_FL_STORE_METADATA_PORT": str(settings.port)}
    return subprocess.Popen(
        [sys.executable, "-m", "icos_fl_timeseries_store", "watch", *arguments],
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def watch(settings, *arguments):
    """Exit status, standard output and standard error of a watch that ends by itself."""
    process = command(settings, *arguments)
    out, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return process.returncode, out, errors


@pytest.fixture(autouse=True)
def interruptible():
    """Where a shell started pytest in the background, it and its children would ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def store(dataclay_settings):
    with connect(dataclay_settings) as connected:
        yield connected


@pytest.fixture
def feed(store):
    """Fills a new window with a row every 3 s up to now; tells its name."""

    def make(*, seconds_ago=0, without=(), **columns):
        """Rows whose newest is as old as that, but not those *without*."""
        node = f"node-{uuid.uuid4().hex[:8]}"
        values = np.array(list(columns.values()), float).T
        newest = time.time_ns() - seconds_ago * 1_000_000_000
        times = newest - np.arange(len(values))[::-1] * 3_000_000_000
        values, times = np.delete(values, without, 0), np.delete(times, without)
        store.create_window(node).append(list(columns), times, values, {"power": "W", "cpu": "%"})
        return node

    return make


def test_a_live_node_exits_with_0(dataclay_settings, feed):
    node = feed(power=50 + np.arange(100) % 7, cpu=np.arange(100) % 11)
    assert watch(dataclay_settings, node, "--once")[0] == 0


def test_ten_minutes_of_no_power_exit_with_12_and_say_so(dataclay_settings, feed):
    node = feed(power=np.zeros(200), cpu=np.arange(200) % 11)
    status, out, _ = watch(dataclay_settings, node, "--once", "--json")
    (line,) = out.splitlines()
    (found,) = json.loads(line)["conditions"]
    assert status == 12
    assert (found["condition"], found["column"]) == ("unavailable", "power")
    assert found["reason"].startswith("exactly 0 for 597 s, 120 s are the limit")
    status, out, _ = watch(dataclay_settings, node, "--once")
    assert status == 12
    assert "power unavailable: exactly 0 for 597 s" in " ".join(out.split())


LIVE = np.arange(300) % 11


@pytest.mark.parametrize(
    ("rows", "expected", "line"),
    [
        ({"cpu": LIVE, "seconds_ago": 600}, 11, "stale: the newest row is 60"),
        ({"cpu": np.full(300, 17.25)}, 13, "cpu stuck: 300 values in a row are 17.25, over 897 s"),
        ({"cpu": LIVE, "without": range(100, 200)}, 15, "gappy: 100 of 300 rows of the newest"),
        (
            {"cpu": LIVE, "power": np.where(np.arange(300) % 4, 50.0 + LIVE, np.nan)},
            16,
            "power nan: 75 of 300 values of the newest 300 rows are missing",
        ),
        (
            {"cpu": LIVE, "power": np.where(np.arange(300) < 150, 50.0 + LIVE, np.nan)},
            10,
            "power silent: no value for 450 s while rows go on",
        ),
    ],
    ids=lambda given: str(given) if isinstance(given, int) else "",
)
def test_what_is_wrong_is_said_and_is_the_exit_status(
    dataclay_settings, feed, rows, expected, line
):
    status, out, _ = watch(dataclay_settings, feed(**rows), "--once")
    assert status == expected
    assert line in " ".join(out.split())


def test_a_file_gives_the_ranges(dataclay_settings, feed, tmp_path):
    node = feed(power=np.append(50 + np.arange(100) % 7, 900))
    file = tmp_path / "expectations.toml"
    file.write_text("[columns.power]\nmaximum = 400.0\n")
    assert watch(dataclay_settings, node, "--once", "--expectations", str(file))[0] == 14
    file.write_text("[columns.power]\nmaximun = 400.0\n")
    status, _, errors = watch(dataclay_settings, node, "--once", "--expectations", str(file))
    assert status == 2
    assert "columns.power.maximun: Extra inputs are not permitted" in errors


def test_a_node_without_a_window_exits_with_10(dataclay_settings):
    status, out, _ = watch(dataclay_settings, "nobody", "--once", "--json")
    assert (status, json.loads(out)["conditions"][0]["condition"]) == (10, "silent")


def test_a_store_that_is_not_there_exits_with_1(dataclay_settings):
    nowhere = dataclay_settings.model_copy(update={"port": free_port()})
    status, _, errors = watch(nowhere, "--once")
    assert (status, len(errors.splitlines())) == (1, 1)


def test_json_lines_come_as_rows_come(dataclay_settings, store, feed):
    node = feed(cpu=np.arange(10))
    process = command(dataclay_settings, node, "--json", "--interval", "60")
    try:
        assert json.loads(process.stdout.readline())["rows"] == 10
        store.window(node).append(["cpu"], np.array([time.time_ns()]), np.array([[1.0]]))
        later = json.loads(process.stdout.readline())
        assert (later["rows"], later["added"]) == (11, 1)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_on_a_terminal_the_view_is_drawn_anew(dataclay_settings, store, feed):
    node = feed(cpu=np.arange(10))
    terminal, theirs = pty.openpty()
    process = command(dataclay_settings, node, "--interval", "60", stdout=theirs)
    os.close(theirs)
    try:
        shown = read_until(terminal, "10 rows")
        assert "\x1b[" in shown
        store.window(node).append(["cpu"], np.array([time.time_ns()]), np.array([[1.0]]))
        read_until(terminal, "11 rows")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        os.close(terminal)
    assert process.returncode == 130


def read_until(terminal: int, text: str) -> str:
    """What comes until *text* is in it; the terminal ends with the process."""
    shown = ""
    while text not in shown:
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_a_watch_goes_on_while_the_store_is_away(tmp_path):
    with store_processes(tmp_path) as running:
        with connect(running.settings) as store:
            store.create_window("a").append(["cpu"], np.array([10**9]), np.array([[1.0]]))
        process = command(running.settings, "a", "--json", "--interval", "0.5", "--recorded")
        try:
            assert json.loads(process.stdout.readline())["rows"] == 1
            running.processes["backend"].terminate()
            running.processes["backend"].wait(40)
            lines = map(json.loads, process.stdout)
            assert next(line["problem"] for line in lines if "problem" in line)
            running.start("backend")
            assert next(line["rows"] for line in lines if "rows" in line) == 1
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
    assert process.returncode == 130
