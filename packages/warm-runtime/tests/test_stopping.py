"""SIGTERM ends SuperLink and SuperNode at once, whoever is being held."""

import time

import psutil


def test_processes_that_hold_requests_end_promptly(new_federation, wait_until):
    federation = new_federation()
    federation.superlink()
    federation.supernode(0)
    run = federation.run(rounds=1, nodes=1)
    run.end()  # all connections are open, and all ask again
    for name in ("supernode-0", "superlink"):
        tree = federation.tree(name)
        began = time.monotonic()
        federation.processes[name].terminate()
        federation.processes[name].wait(30)
        seconds = time.monotonic() - began
        print(f"\n{name} ended {seconds:.1f} s after SIGTERM")
        assert seconds < 5
        _, left = psutil.wait_procs(tree, 10)
        assert not left
        log = federation.log(name)
        assert "Traceback" not in log, log
