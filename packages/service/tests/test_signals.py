"""Signals as a process gets them from another one."""

import signal
import subprocess
import sys

PROGRAM = """
import signal, threading, time
ready = threading.Event()
blas = threading.Thread(target=lambda: (ready.set(), time.sleep(60)), daemon=True)
blas.start()  # a thread that was there before, as those of numpy are
ready.wait()
from icos_fl_service.signals import Signals
signals = Signals(signal.SIGTERM, signal.SIGHUP)
print("ready", flush=True)
while (number := signals.wait()) != signal.SIGTERM:
    print(number.name, flush=True)
"""


def test_each_signal_is_told_and_the_last_one_ends_it():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == "SIGHUP\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_signal_that_comes_before_anybody_waits_is_kept():
    program = PROGRAM.replace("while (", "time.sleep(0.3)\nwhile (")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "SIGHUP\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
