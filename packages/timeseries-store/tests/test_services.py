"""The services as processes: what survives a stop, a kill, and a folder that cannot be used."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from functools import partial

import numpy as np
import pytest
from dataclay.config import get_runtime
from icos_fl_timeseries_store import StoreUnavailable, UnknownNode, connect, services
from icos_fl_timeseries_store.services import (
    SERVICES,
    ServiceSettings,
    StateFolderError,
    usable_folder,
)
from icos_fl_timeseries_store.testing import free_port, store_processes


def ns(*seconds):
    return np.array(seconds, np.int64) * 1_000_000_000


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


async def flush_all(store):
    clients = get_runtime().backend_clients
    await clients.update()
    for client in clients.values():
        await client.flush_all()


def run_store(folder, *arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "icos_fl_timeseries_store", *arguments],
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


def test_a_killed_backend_starts_again_and_is_used_again(running, store, node):
    append(store, [1], node)
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    until_available(lambda: append(store, [2], node))
    assert seconds_of(store.window(node)) == [2]


def test_two_writers_make_a_lost_window_anew_once(running, store, node):
    writers = [store.create_window(node) for _ in range(2)]
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    for second, writer in enumerate(writers, 1):
        until_available(partial(writer.append, ["x"], ns(second), np.ones((1, 1))))
    assert seconds_of(store.window(node)) == [1, 2]


def test_a_reader_finds_the_window_that_a_writer_made_anew(running, store, node):
    writer = store.create_window(node)
    reader = store.window(node)
    end_backend(running, signal.SIGKILL)
    running.start("backend")
    with pytest.raises(UnknownNode):
        until_available(reader.read)
    writer.append(["x"], ns(1), np.ones((1, 1)))
    assert seconds_of(reader) == [1]


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


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare"
)
@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("mount -t tmpfs -o size=4k none {0}; head -c 8192 /dev/zero > {0}/full", "No space left"),
        ("mount -t tmpfs -o ro none {0}", "Read-only file system"),
    ],
)
@pytest.mark.parametrize("service", ["kv", "backend"])
def test_a_full_or_read_only_disk_is_one_line(tmp_path, service, mount, reason):
    command = [sys.executable, "-m", "icos_fl_timeseries_store", "serve", service]
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{mount.format(tmp_path)} 2>&-; exec "$@"',
            "sh",
            *command,
        ],
        env={**os.environ, "ICOS_FL_STORE_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert str(tmp_path / "state") in line
    assert f"uid {os.getuid()}: {reason}" in line
    assert "choose another folder" in line


def test_a_misspelt_setting_is_refused_with_the_right_name(tmp_path):
    done = run_store(tmp_path, "nodes", environment={"ICOS_FL_STORE_METADATA_PROT": "1"})
    assert done.returncode == 2
    assert "did you mean ICOS_FL_STORE_METADATA_PORT?" in done.stderr
