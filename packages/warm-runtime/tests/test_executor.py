"""The executor and its worker: real processes, tasks whose host is gone."""

import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from icos_fl_service.testing import free_port
from icos_fl_warm_runtime import executor as executor_module
from icos_fl_warm_runtime import kept_folder
from icos_fl_warm_runtime import worker as worker_module
from icos_fl_warm_runtime.executor import ForkExecutor

COMMAND = "flwr-serverapp"


def spec(task_id: int, port: int) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=TaskType.SERVER_APP,
        runtime_api_address=f"127.0.0.1:{port}",
        token="token",
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=os.getpid(),
        suppress_output=True,
        task_id=task_id,
    )


@pytest.fixture
def executor():
    executor = ForkExecutor()
    yield executor
    executor.close()
    for one in executor._workers.values():
        one._process.wait(10)


def test_a_task_that_comes_just_as_the_worker_ends_is_taken_by_a_new_one(executor, wait_until):
    executor.launch(spec(1, free_port()))
    first = executor._workers[COMMAND]
    # Stopped, it takes no task, as a worker that no longer listens and has not yet ended.
    first._process.send_signal(signal.SIGSTOP)
    launching = threading.Thread(target=executor.launch, args=[spec(2, free_port())])
    launching.start()
    wait_until(lambda: 2 in first._ordered, 30, str)
    first._process.kill()
    launching.join(60)
    assert not launching.is_alive()
    second = executor._workers[COMMAND]
    assert second is not first
    assert list(second._running) == [2]


def test_a_worker_that_takes_no_task_is_ended(executor, monkeypatch):
    executor.launch(spec(1, free_port()))
    worker = executor._workers[COMMAND]
    worker._process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(executor_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(executor_module, "TAKEN_SECONDS", 0.2)
    assert not worker.take(spec(2, free_port()))
    assert worker._process.wait(10) == -signal.SIGKILL


def test_the_kept_folder_goes_with_the_executor(executor):
    executor.launch(spec(1, free_port()))
    assert executor._kept.is_dir()
    assert executor._kept.stat().st_mode & 0o077 == 0
    executor.close()
    assert not executor._kept.exists()


def test_where_nothing_is_warm_there_is_no_kept_folder():
    assert kept_folder() is None


def test_of_a_worker_that_refuses_the_tasks_start_cold(executor, wait_until, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cold = tmp_path / COMMAND
    cold.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
    cold.chmod(0o755)
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[icos_fl.serverapp]\nbroken = no_such_module\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor.launch(spec(1, free_port()))
    assert "no_such_module cannot be imported" in executor._workers[COMMAND].refusal
    first = executor._workers[COMMAND]
    executor.launch(spec(2, free_port()))
    assert executor._workers[COMMAND] is first
    started = tmp_path / "started"
    wait_until(lambda: started.exists() and len(started.read_text().splitlines()) == 2, 10, str)


def test_closing_ends_the_worker_and_its_tasks(executor, wait_until):
    executor.launch(spec(1, free_port()))
    worker = psutil.Process(executor._workers[COMMAND]._process.pid)
    tasks = worker.children()
    assert len(tasks) == 1
    executor.close()
    _, left = psutil.wait_procs([worker, *tasks], worker_module.STOP_SECONDS + 5)
    assert not left
    executor.close()  # as Flower does


def test_an_idle_worker_ends_by_itself(tmp_path):
    ours, theirs = socket.socketpair()
    start = worker_module.START.replace("worker.main", "worker.IDLE_SECONDS = 0.1; worker.main")
    with ours, theirs:
        worker = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs.fileno()), COMMAND, str(tmp_path)],
            pass_fds=[theirs.fileno()],
        )
        assert worker.wait(60) == 0


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "its process ended by itself, with exit status 0"),
        (-9, "its process was killed by SIGKILL"),
        (-14, "its process ran for longer than its message was to live, and was ended"),
    ],
)
def test_an_ending_is_told_in_words(status, words):
    assert worker_module.ending(status) == words
