"""A task that dies in any way costs its round its reply, and nothing else."""

import signal
import time
from pathlib import Path

import psutil
import pytest

FAULTS = {
    "raises": "disk on fire",
    "exits-0": "the ClientApp: its process ended by itself, with exit status 0",
    "exits-3": "the ClientApp: its process ended by itself, with exit status 3",
    "is-killed": "the ClientApp: its process was killed by SIGKILL",
    "dies-sending": "the ClientApp: its process ended by itself, with exit status 5",
    "cannot-send": "the ClientApp: it could not send its reply",
}
DELAY_SECONDS_MAX = 5.0
"""Of a machine that is busy with other tests. Flower takes 40 to 60 s, when a token expires."""

HANG_SECONDS = 4.0
SILENCE_SECONDS = 8.0


@pytest.fixture(scope="module")
def rounds(federation):
    """By fault: a normal round, the one in which a node fails, the one after it."""
    numbers = {fault: 3 + 2 * place for place, fault in enumerate(FAULTS)}
    faults = {number: {"fault": fault, "node": 1} for fault, number in numbers.items()}
    facts = federation.run(faults, rounds=2 + 2 * len(FAULTS)).end(240)
    print(f"\nthe first round: {facts[0]['seconds']:.2f} s")
    return {fault: (facts[1], *facts[n - 1 : n + 1]) for fault, n in numbers.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_ends_at_once_with_what_became_of_the_task(rounds, fault):
    normal, failed, _ = rounds[fault]
    print(f"\n{fault}: {failed['seconds']:.2f} s, a normal round {normal['seconds']:.2f} s")
    assert failed["replied"] == [0]
    assert list(failed["errors"]) == ["1"]
    assert FAULTS[fault] in failed["errors"]["1"]
    assert failed["seconds"] < normal["seconds"] + DELAY_SECONDS_MAX


@pytest.mark.parametrize("fault", FAULTS)
def test_the_round_after_a_fault_has_both_nodes_again(rounds, fault):
    normal, _, after = rounds[fault]
    assert (after["replied"], after["errors"]) == ([0, 1], {})
    assert after["seconds"] < normal["seconds"] + DELAY_SECONDS_MAX


@pytest.fixture(scope="module")
def hung(federation):
    faults = {
        number: {"fault": fault, "node": 1, "ttl": HANG_SECONDS, "timeout": HANG_SECONDS}
        for number, fault in ((2, "hangs"), (4, "hangs-in-c"))
    }
    return federation.run(faults, rounds=5).end(180)


@pytest.mark.parametrize("number", [2, 4])
def test_a_task_that_hangs_costs_its_round_the_timeout(hung, number):
    failed = hung[number - 1]
    print(f"\nround of {HANG_SECONDS} s: {failed['seconds']:.2f} s")
    assert failed["replied"] == [0]
    assert failed["seconds"] + 0.1 >= HANG_SECONDS
    assert failed["seconds"] < HANG_SECONDS + 3.5  # as Flower's own grid


@pytest.mark.parametrize("number", [2, 4])
def test_the_round_after_one_that_hangs_has_both_nodes_again(hung, number):
    after = hung[number]
    print(f"\nthe round after: {after['seconds']:.2f} s")
    assert (after["replied"], after["errors"]) == ([0, 1], {})
    assert after["seconds"] < HANG_SECONDS + DELAY_SECONDS_MAX


def test_a_task_that_hangs_is_ended_by_the_kernel(hung, federation):
    told = "its process ran for longer than its message was to live, and was ended"
    assert federation.log("supernode-1").count(told) == 2


def test_a_supernode_that_never_answers_costs_its_round_the_timeout(federation):
    """It hangs as a whole, and goes on after the round."""
    silent = {"hold": True, "timeout": SILENCE_SECONDS, "ttl": SILENCE_SECONDS}
    run = federation.run({1: {"timeout": 120}, 2: silent}, rounds=3)
    assert run.round(1, 150)["replied"] == [0, 1]
    node = federation.processes["supernode-1"]
    node.send_signal(signal.SIGSTOP)
    try:
        run.let_go(2)
        hung = run.round(2)
    finally:
        node.send_signal(signal.SIGCONT)
    print(f"\nround of {SILENCE_SECONDS} s: {hung['seconds']:.2f} s")
    assert hung["replied"] == [0]
    assert SILENCE_SECONDS - 0.1 <= hung["seconds"] < SILENCE_SECONDS + 3.5  # as Flower's own grid
    assert run.round(3)["replied"] == [0, 1]
    run.end()


def test_what_a_task_leaks_goes_with_it(federation, wait_until):
    leaks = range(3, 7)
    run = federation.run(
        {n: {"fault": "leaks", "node": 1, "hold": n in (3, 7)} for n in (*leaks, 7)}, rounds=8
    )
    run.round(2)
    before = memory_mib(federation, wait_until)
    run.let_go(3)
    for number in leaks:
        assert run.round(number)["replied"] == [0, 1]
    after = memory_mib(federation, wait_until)
    run.let_go(7)
    run.end()
    print(f"\na node: {before:.0f} MiB before, {after:.0f} MiB after {len(leaks)} leaks of 500 MB")
    assert after < before + 50


def memory_mib(federation, wait_until) -> float:
    """Of node 1's processes while it has no task, without files that others may share."""
    wait_until(lambda: not federation.tasks("supernode-1"), 30, federation.logs)
    rollups = [
        Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        for process in federation.tree("supernode-1")
    ]
    lines = [line for text in rollups for line in text.splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def test_a_serverapp_that_exits_fails_its_run_within_seconds(federation, wait_until):
    run = federation.run({2: {"fault": "server-exits"}}, rounds=3)
    run.round(1)
    began = time.monotonic()
    wait_until(lambda: run.status() == "finished:failed", 30, federation.logs)
    print(f"\nfailed after {time.monotonic() - began:.1f} s, the question included")


def test_a_worker_killed_in_mid_task_costs_the_round_the_reply_alone(federation):
    run = federation.run({2: {"fault": "waits", "node": 1}}, rounds=3)
    task = run.task(2)
    (worker,) = federation.workers("supernode-1")
    assert task.parent() == worker
    worker.kill()
    failed = run.round(2)
    assert failed["replied"] == [0]
    expected = (
        "the ClientApp: the worker that it was forked from: its process was killed by SIGKILL"
    )
    assert failed["errors"] == {"1": expected}
    after = run.round(3)
    assert (after["replied"], after["errors"]) == ([0, 1], {})
    psutil.wait_procs([task], 5)
    assert not task.is_running()
    run.end()


def test_a_worker_killed_between_tasks_is_made_anew(federation, wait_until):
    run = federation.run({2: {"hold": True}}, rounds=2)
    run.round(1)
    wait_until(lambda: not federation.tasks("supernode-1"), 30, federation.logs)
    (worker,) = federation.workers("supernode-1")
    worker.kill()
    run.let_go(2)
    after = run.round(2)
    assert (after["replied"], after["errors"]) == ([0, 1], {})
    run.end()
