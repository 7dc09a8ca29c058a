"""The services as processes: what survives a stop, a kill, and a folder that cannot be used."""

import os
import subprocess
import sys

import numpy as np
import pytest
from icos_fl_timeseries_store import connect
from icos_fl_timeseries_store.services import StateFolderError, usable_folder
from icos_fl_timeseries_store.testing import store_processes


def append(store, seconds):
    times = np.array(seconds, np.int64) * 1_000_000_000
    store.create_window("a").append(["x"], times, np.ones((len(times), 1)))


def run_store(folder, *arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "icos_fl_timeseries_store", *arguments],
        env={**os.environ, "ICOS_FL_STORE_STATE_DIR": str(folder), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_window_survives_a_clean_stop_of_all_services(tmp_path):
    for second in (1, 2):
        with store_processes(tmp_path) as running, connect(running.settings) as store:
            append(store, [second])
            rows = store.window("a").read()
    assert rows.times_ns_t.tolist() == [1_000_000_000, 2_000_000_000]


def test_a_killed_backend_starts_again_and_is_used_again(tmp_path):
    with store_processes(tmp_path) as running, connect(running.settings) as store:
        append(store, [1])
        running.processes["backend"].kill()
        running.processes["backend"].wait()
        running.start("backend")
        append(store, [2])
        assert store.window("a").read().times_ns_t.tolist()[-1] == 2_000_000_000


def test_commands_read_a_running_store(tmp_path):
    with store_processes(tmp_path) as running:
        with connect(running.settings) as store:
            append(store, [5])
        nodes = run_store(tmp_path, "nodes", environment=running.environment)
        window = run_store(tmp_path, "window", "a", "--csv", environment=running.environment)
        nobody = run_store(tmp_path, "window", "b", environment=running.environment)
    assert nodes.stdout == "a\n"
    assert window.stdout == "time_unix_s,x\n5,1\n"
    assert nobody.returncode == 1
    assert "no window of node 'b'; nodes with a window: a" in nobody.stderr


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_store(tmp_path / "file", "serve", "backend")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr
    assert f"uid {os.getuid()}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="changing the uid needs root")
def test_a_folder_of_another_user_is_named_with_the_uid(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    child = os.fork()
    if child == 0:
        os.setuid(4242)
        try:
            usable_folder(folder)
        except StateFolderError as error:
            os._exit(0 if "uid 4242" in str(error) and str(folder) in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_misspelt_setting_is_refused_with_the_right_name(tmp_path):
    done = run_store(tmp_path, "nodes", environment={"ICOS_FL_STORE_METADATA_PROT": "1"})
    assert done.returncode == 2
    assert "did you mean ICOS_FL_STORE_METADATA_PORT?" in done.stderr
