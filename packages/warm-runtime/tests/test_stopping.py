"""How SuperLink and SuperNode end, whoever is being held."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


@pytest.fixture(scope="module")
def one_node(new_federation):
    federation = new_federation()
    federation.superlink()
    federation.supernode(0)
    return federation


def test_a_supernode_whose_superexec_is_killed_ends_and_can_be_started_anew(one_node):
    node = one_node.processes["supernode-0"]
    (superexec,) = psutil.Process(node.pid).children()
    superexec.kill()
    node.wait(10)
    assert "The SuperExec has ended (killed by signal 9)" in one_node.log("supernode-0")
    one_node.supernode(0)


def test_processes_that_hold_requests_end_promptly(one_node, wait_until):
    federation = one_node
    run = federation.run(rounds=1, nodes=1)
    run.end()  # all connections are open, and all ask again
    held = federation.run({2: {"hold": True}}, rounds=2, nodes=1)
    held.round(1)
    flwr = Path(sys.executable).parent / "flwr"
    following = subprocess.Popen(
        [flwr, "log", held.id, "local", "--stream"],
        env=federation.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert following.stdout is not None
    assert any(b"Starting logstream" in line for line in following.stdout)
    for name in ("supernode-0", "superlink"):
        tree = federation.tree(name)
        began = time.monotonic()
        federation.processes[name].terminate()
        federation.processes[name].wait(30)
        seconds = time.monotonic() - began
        print(f"\n{name} ended {seconds:.1f} s after SIGTERM")
        assert seconds < 8
        _, left = psutil.wait_procs(tree, 10)
        assert not left
        log = federation.log(name)
        assert "The SuperExec has ended (exit" not in log, log
        assert "Traceback" not in log, log
    following.kill()
    following.communicate()
