"""The services as processes: what survives a stop, a kill, and a folder that cannot be used."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import valkey
from dataclay.config import get_runtime
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import (
    ModelVersion,
    StoreDamaged,
    StoreFull,
    StoreUnavailable,
    connect,
    services,
)
from icos_fl_timeseries_store.services import SERVICES, ServiceSettings
from icos_fl_timeseries_store.testing import small_disk, store_processes

UID = 4242
"""Of nobody."""
AS_NOBODY = (
    *("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *("--pdeathsig", "KILL"),  # it would be forgotten with the uid
    # Python may be in somebody's home.
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)


def ns(*seconds):
    return np.array(seconds, np.int64) * 1_000_000_000


def did_not_run(why):
    warnings.warn(f"DID NOT RUN: {why}", stacklevel=2)
    pytest.skip(f"DID NOT RUN: {why}")


@pytest.fixture
def disk(tmp_path):
    """One of 2 MB for the state of a store."""
    with contextlib.ExitStack() as stack:
        try:
            small = stack.enter_context(small_disk(tmp_path / "store", 2))
        except OSError as error:
            did_not_run(error)
        yield small


@pytest.fixture
def nobodys_folder():
    """A folder that is reached, and owned, by UID; what runs there has no home."""
    works = [*AS_NOBODY, sys.executable, "-c", "import icos_fl_timeseries_store"]
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        if subprocess.run(works, capture_output=True, check=False).returncode == 0:
            os.chown(folder, UID, UID)
            yield Path(folder)
            return
    did_not_run("becoming another user needs root and setpriv")


def append(store, seconds, node="a"):
    store.create_window(node).append(["x"], ns(*seconds), np.ones((len(seconds), 1)))


def seconds_of(window):
    return (window.read().times_ns_t // 1_000_000_000).tolist()


def until_available(call, seconds=20):
    """What *call* returns as soon as the store is there again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def until_true(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not until_available(condition):
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def flush_all(store):
    clients = get_runtime().backend_clients
    await clients.update()
    for client in clients.values():
        await client.flush_all()


def run_store(folder, *arguments, environment=None, within=()):
    return subprocess.run(
        [*within, sys.executable, "-m", "icos_fl_timeseries_store", *arguments],
        env={**os.environ, "ICOS_FL_STORE_STATE_DIR": str(folder), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One store for all tests that kill its backend and start it again."""
    with store_processes(tmp_path_factory.mktemp("store")) as processes:
        yield processes


@pytest.fixture
def store(running):
    with connect(running.settings) as connected:
        yield connected


@pytest.fixture
def node():
    return f"node-{uuid.uuid4().hex[:8]}"


def end_backend(running, sign):
    process = running.processes["backend"]
    process.send_signal(sign)
    process.wait(40)


def test_a_window_survives_a_clean_stop_of_all_services(tmp_path):
    for second in (1, 2):
        with store_processes(tmp_path) as running, connect(running.settings) as store:
            append(store, [second])
            rows = store.window("a").read()
    assert rows.times_ns_t.tolist() == [1_000_000_000, 2_000_000_000]


def test_a_window_survives_the_loss_of_the_whole_key_value_store(tmp_path):
    for second in (1, 2):
        with store_processes(tmp_path) as running, connect(running.settings) as store:
            if second == 2:
                assert seconds_of(store.window("a")) == [1]
                assert store.model_state("server", "cpu").get().round == 1
            append(store, [second])
            store.model_state("server", "cpu").put(ModelVersion(second, {}, {}))
            for process in running.processes.values():
                process.kill()
                process.wait()
        shutil.rmtree(tmp_path / "kv")


def test_a_window_survives_a_clean_stop_of_the_backend_under_a_writer(running, node):
    quick = running.settings.model_copy(update={"timeout_seconds": 0.5})
    with connect(quick) as store:
        append(store, [1], node)
        end_backend(running, signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                append(store, [2], node)
        running.start("backend")
        assert until_available(lambda: seconds_of(store.window(node))) == [1]


def test_a_window_survives_a_key_value_store_that_stops_first(running, store, node):
    append(store, [1], node)
    for service in ("kv", "backend"):
        running.processes[service].terminate()
        running.processes[service].wait(40)
    for service in ("kv", "backend"):
        running.start(service)
    assert until_available(lambda: seconds_of(store.window(node))) == [1]


def test_a_backend_ends_while_the_key_value_store_hangs(running, store, node):
    append(store, [1], node)
    running.processes["kv"].send_signal(signal.SIGSTOP)
    try:
        end_backend(running, signal.SIGTERM)
    finally:
        running.processes["kv"].send_signal(signal.SIGCONT)
    running.start("backend")
    assert until_available(lambda: seconds_of(store.window(node))) == [1]


def test_a_killed_backend_comes_back_with_every_row(running, store, node):
    append(store, [1], node)
    window = store.window(node)
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    assert until_available(lambda: seconds_of(window)) == [1]
    append(store, [2], node)
    assert seconds_of(store.window(node)) == [1, 2]


def test_the_columns_units_and_capacity_survive_a_kill(running, store, node):
    store.create_window(node, 7).append(["x"], ns(1), np.ones((1, 1)), {"x": "W"})
    before = store.window(node).info()
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    after = until_available(lambda: store.window(node).info())
    assert dataclasses.replace(after, cursor=before.cursor) == before
    assert after.cursor >= before.cursor


def test_a_model_survives_a_kill(running, store, node):
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(0.5).reshape(())}
    state = store.model_state(node, "cpu_usage")
    state.put(ModelVersion(3, weights, {"horizon": 20}, {"eval-loss": 0.5}), best=True)
    state.put(ModelVersion(4, weights, {"horizon": 20}))
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    latest = until_available(lambda: store.model_state(node, "cpu_usage").get())
    best = state.get("best")
    assert (latest.round, best.round, best.metadata) == (4, 3, {"eval-loss": 0.5})
    np.testing.assert_array_equal(best.weights["w"], weights["w"])
    assert best.weights["b"].shape == ()
    assert best.weights["w"].dtype == np.float32


def test_no_row_hides_below_a_cursor_from_before_a_kill(running, store, node):
    for second in (1, 2, 3):
        append(store, [second], node)
    seen = store.window(node).read().cursor
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    until_available(lambda: append(store, [4], node))
    window = store.window(node)
    assert window.wait(seen, 0) > seen
    assert (window.read(after=seen).times_ns_t // 1_000_000_000).tolist() == [4]


def test_a_key_value_store_that_lost_all_is_told_what_there_is(running, store, node):
    append(store, [1], node)
    reader = store.window(node)
    kv = valkey.Valkey("127.0.0.1", int(running.environment["ICOS_FL_STORE_KV_PORT"]))
    kv.flushall()
    until_true(lambda: node in store.nodes())
    assert seconds_of(reader) == seconds_of(store.window(node)) == [1]
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    assert until_available(lambda: seconds_of(reader)) == [1]


def test_what_was_written_before_windows_had_files_is_taken_over(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "state-before-journals", tmp_path / "store")
    for _ in range(2):
        with store_processes(tmp_path / "store") as running, connect(running.settings) as store:
            rows = store.window("edge-1").read()
            state = store.model_state("edge-1", "cpu_usage")
            latest, best = state.get("latest"), state.get("best")
            assert store.window("edge-1").info().capacity_rows == 5
        assert (rows.times_ns_t // 1_000_000_000).tolist() == [3, 4, 5, 6, 7]
        assert (rows.columns, rows.units) == (("power", "cpu"), ("W", ""))
        assert rows.values_tf[0].tolist() == [4, 5]
        assert (latest.round, best.round, best.metadata) == (3, 2, {"eval-loss": 0.5})
        assert best.weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sorted(path.name for path in (tmp_path / "store" / "objects").iterdir()) == [
        ".lock",
        "BACKEND_ID",
        "models",
        "windows",
    ]


def test_a_backend_whose_identity_was_lost_serves_its_windows(running, store, node):
    append(store, [1], node)
    end_backend(running, signal.SIGKILL)
    (running.folder / "objects" / "BACKEND_ID").write_text("")
    running.start("backend")
    assert until_available(lambda: seconds_of(store.window(node))) == [1]
    until_available(lambda: append(store, [2], node))
    assert seconds_of(store.window(node)) == [1, 2]


def test_damage_is_told_by_the_command_and_can_be_repaired(running, store, node):
    for second in (1, 2, 3):
        append(store, [second], node)
    end_backend(running, signal.SIGKILL)
    path = running.folder / "objects" / "windows" / f"{node}.state"
    content = bytearray(path.read_bytes())
    content[content.rindex(ns(2).tobytes())] ^= 1
    path.write_bytes(content)
    running.start("backend")
    until_available(lambda: append(store, [1], f"{node}-whole"))
    with pytest.raises(StoreDamaged, match="a broken frame"):
        append(store, [4], node)

    def command(*arguments):
        return run_store(running.folder, *arguments, environment=running.environment)

    check, show = command("check"), command("window", node)
    assert check.returncode == show.returncode == 1
    assert f"{node}: damaged: " in check.stdout
    assert str(path) in show.stderr
    assert "2 rows kept" in command("repair", node).stdout
    assert command("check").returncode == 0
    append(store, [4], node)
    assert seconds_of(store.window(node)) == [1, 3, 4]


def test_a_second_backend_on_the_same_state_is_refused(running):
    done = run_store(
        running.folder,
        *("serve", "backend"),
        environment={**running.environment, "ICOS_FL_STORE_BACKEND_PORT": str(free_port())},
    )
    assert done.returncode == 1
    assert "is in use by another backend" in done.stderr


def test_a_window_unloaded_to_disk_is_loaded_again(running, store, node):
    append(store, [1], node)
    store.call(flush_all(store))
    append(store, [2], node)
    assert seconds_of(store.window(node)) == [1, 2]


def test_an_alias_that_a_killed_writer_left_is_taken_over(running, node):
    quick = running.settings.model_copy(update={"timeout_seconds": 1.0})
    with connect(quick) as store:
        metadata = get_runtime().metadata_service
        store.call(metadata.new_alias(f"window.{node}", "admin", uuid.uuid4()))
        append(store, [1], node)
        assert seconds_of(store.window(node)) == [1]


def test_a_backend_that_hangs_is_unavailable_at_the_deadline(running, node):
    quick = running.settings.model_copy(update={"timeout_seconds": 0.5})
    with connect(quick) as store:
        window = store.create_window(node)
        running.processes["backend"].send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"did not answer in 0\.5 s"):
                window.info()
            assert time.monotonic() - began < 5
        finally:
            running.processes["backend"].send_signal(signal.SIGCONT)


def test_a_backend_that_is_away_is_said_at_once_at_no_cost_and_found_at_once(running, store, node):
    window = store.create_window(node)
    end_backend(running, signal.SIGKILL)
    try:
        began, used = time.monotonic(), time.process_time()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="failed to connect"):
                window.info()
        assert time.monotonic() - began < store.timeout_seconds / 2
        assert time.process_time() - used < 1
    finally:
        running.start("backend")
    assert window.info().rows == 0


def test_a_metadata_service_that_hangs_costs_one_deadline(running, node):
    quick = running.settings.model_copy(update={"timeout_seconds": 1.0})
    with connect(quick) as store:
        running.processes["metadata"].send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="did not answer in 1 s"):
                store.create_window(node)
            assert time.monotonic() - began < 1.5
        finally:
            running.processes["metadata"].send_signal(signal.SIGCONT)


@pytest.mark.parametrize("service", ["kv", "metadata"])
def test_writers_and_readers_go_on_while_a_service_is_dead(running, store, node, service):
    append(store, [1], node)
    window = store.create_window(node)
    running.processes[service].kill()
    running.processes[service].wait()
    try:
        with pytest.raises(StoreUnavailable):
            store.nodes()
        window.append(["x"], ns(2), np.ones((1, 1)))
        assert seconds_of(window) == [1, 2]
    finally:
        running.start(service)
    until_true(lambda: node in store.nodes())  # of a node that is new, the backend tells it


def test_commands_read_a_running_store(running, store, node):
    append(store, [5], node)
    nodes, window, nobody = (
        run_store(running.folder, *arguments, environment=running.environment)
        for arguments in (["nodes"], ["window", node, "--csv"], ["window", "nobody"])
    )
    assert node in nodes.stdout.splitlines()
    assert window.stdout == "time_unix_s,x\n5,1\n"
    assert nobody.returncode == 1
    assert "no window of node 'nobody'; nodes with a window: " in nobody.stderr


def test_watch_prints_one_json_object_a_look(running, store, node):
    append(store, [5, 6], node)
    done = run_store(
        running.folder, "watch", node, "--json", "--once", environment=running.environment
    )
    report = json.loads(done.stdout)
    assert (report["node"], report["rows"], report["interval_seconds"]) == (node, 2, 1.0)


@pytest.mark.parametrize("service", SERVICES)
def test_a_port_in_use_is_one_line_with_its_setting(tmp_path, service):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        name = f"ICOS_FL_STORE_{service.upper()}_PORT"
        done = run_store(tmp_path, "serve", service, environment={name: str(port)})
    assert done.returncode == 1
    assert done.stderr == (
        f"icos-fl-store: {service} cannot listen on 127.0.0.1:{port}: Address already in use; "
        f"set {name} or ICOS_FL_STORE_HOST\n"
    )


def test_a_backend_without_a_key_value_store_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "KV_PATIENCE_SECONDS", 0.1)
    settings = ServiceSettings(kv_port=free_port(), backend_port=free_port(), state_dir=tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(
        StoreUnavailable, match=f"no key-value store at 127.0.0.1:{settings.kv_port}"
    ):
        services.serve("backend", settings)


@pytest.mark.parametrize(
    "arguments", [["watch", "--interval", "0"], ["window", "a", "--last", "-3"]]
)
def test_an_option_out_of_range_names_the_value(tmp_path, arguments):
    done = run_store(tmp_path, *arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr
    assert "must be" in done.stderr


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_store(tmp_path / "file", "serve", "backend")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr
    assert f"uid {os.getuid()}" in done.stderr
    assert "Traceback" not in done.stderr


def refusal(done):
    """The one line that a service said before it ended."""
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "choose another folder" in line
    return line


@pytest.mark.parametrize("service", ["kv", "backend"])
def test_a_folder_of_another_user_is_one_line_with_the_uid(nobodys_folder, service):
    os.chown(nobodys_folder, 0, 0)
    done = run_store(nobodys_folder, "serve", service, within=AS_NOBODY)
    folder = nobodys_folder / ("kv" if service == "kv" else "objects")
    assert f"state folder {folder} cannot be written by uid {UID}: Permission" in refusal(done)


def test_a_file_of_another_user_is_one_line_with_the_uid(nobodys_folder):
    (nobodys_folder / "objects" / "windows").mkdir(parents=True)
    (nobodys_folder / "objects" / "windows" / "a.state").write_bytes(b"")
    for path in nobodys_folder.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o644)
    done = run_store(nobodys_folder, "serve", "backend", within=AS_NOBODY)
    assert f"by uid {UID}: windows/a.state: Permission denied; " in refusal(done)


def test_a_store_runs_as_a_uid_without_a_name_and_a_home(nobodys_folder, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    with store_processes(nobodys_folder, AS_NOBODY) as running, connect(running.settings) as store:
        append(store, [1])
        assert seconds_of(store.window("a")) == [1]
    assert (nobodys_folder / "objects" / "windows" / "a.state").stat().st_uid == UID


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("nr_inodes=1", "No space left on device")],
)
@pytest.mark.parametrize("service", ["kv", "backend"])
def test_a_disk_on_which_no_folder_can_be_made_is_one_line(tmp_path, service, options, reason):
    try:
        with small_disk(tmp_path, 1, options=options) as disk:
            done = run_store(tmp_path / "state", "serve", service, within=disk.within)
    except OSError as error:
        did_not_run(error)
    line = refusal(done)
    assert str(tmp_path / "state") in line
    assert f"uid {os.getuid()}: {reason}" in line


def break_file_system(image):
    """Have ext4 find an error in the file system that is mounted from *image*."""
    losetup = ["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)]
    device = subprocess.run(losetup, capture_output=True, text=True, check=True).stdout.strip()
    (Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error").write_text("for a test")


def refused_append(store, seconds):
    """Append until a row is refused: what is left of the file's last page takes a few.

    Adds those that were stored to *seconds*, and returns the refusal.
    """
    while True:
        try:
            append(store, [seconds[-1] + 1])
        except StoreFull as error:
            return str(error)
        seconds.append(seconds[-1] + 1)


def test_a_store_on_a_full_disk_is_read_from_also_after_a_start_and_goes_on_by_itself(disk):
    with store_processes(disk.folder, disk.within) as running, connect(running.settings) as store:
        stored = [1]
        append(store, stored)
        state = store.model_state("a", "x")
        state.put(ModelVersion(1, {}, {}))
        disk.fill()
        full = "window of a cannot be written: No space left on device"
        assert full in refused_append(store, stored)
        for process in running.processes.values():
            process.kill()
            process.wait()
        for service in SERVICES:
            running.start(service)
        assert until_available(lambda: seconds_of(store.window("a"))) == stored
        assert full in refused_append(store, stored)
        with pytest.raises(StoreFull, match="No space left"):
            append(store, [1], "b")
        with pytest.raises(StoreFull, match="No space left"):
            state.put(ModelVersion(2, {}, {}))
        assert state.get().round == 1
        disk.make_room()
        stored.append(2000)
        append(store, [2000])
        append(store, [1], "b")
        state.put(ModelVersion(2, {}, {}))
        end_backend(running, signal.SIGKILL)
        running.start("backend")
        assert until_available(lambda: seconds_of(store.window("a"))) == stored
        assert store.nodes() == ["a", "b"]
        assert state.get().round == 2


def test_a_store_whose_disk_breaks_is_read_from(tmp_path):
    image = tmp_path / "image"
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(
                small_disk(tmp_path / "store", 16, image, "errors=remount-ro")
            )
        except OSError as error:
            did_not_run(error)
        running = stack.enter_context(store_processes(disk.folder, disk.within))
        store = stack.enter_context(connect(running.settings))
        append(store, [1])
        try:
            break_file_system(image)
        except OSError as error:
            did_not_run(error)
        with pytest.raises(StoreFull, match="Read-only file system"):
            append(store, [2])
        assert seconds_of(store.window("a")) == [1]


def test_a_misspelt_setting_is_refused_with_the_right_name(tmp_path):
    done = run_store(tmp_path, "nodes", environment={"ICOS_FL_STORE_METADATA_PROT": "1"})
    assert done.returncode == 2
    assert "did you mean ICOS_FL_STORE_METADATA_PORT?" in done.stderr
