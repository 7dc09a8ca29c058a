"""No process outlives the one that started it."""

import os
import select
import signal
import subprocess
import sys

import pytest

PARENT = """
import subprocess
from icos_fl_service.shim import tied
print(subprocess.Popen(tied("sleep", "600")).pid, flush=True)
input()
"""


def has_ended(descriptor, seconds):
    """Whether the process of a pidfd ends within *seconds*."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_tied_command_ends_with_the_process_that_started_it(number):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not has_ended(child, 0.2)
            parent.send_signal(number)
            assert has_ended(child, 20)
        finally:
            if not has_ended(child, 0):
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)


def test_a_tied_command_whose_parent_has_ended_does_not_begin():
    done = subprocess.run(
        [sys.executable, "-m", "icos_fl_service.shim", "1", "echo", "begun"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
