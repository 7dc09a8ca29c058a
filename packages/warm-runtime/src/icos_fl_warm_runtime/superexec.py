"""The SuperExec of a SuperLink or SuperNode, forked from it before it has threads.

At rest a node is these two processes, and what both have imported is most of their memory. Forked,
they share it, and the SuperExec imports nothing again.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, c_char_p
from importlib import import_module
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any, NoReturn

from flwr.supercore import log

_PR_SET_NAME = 15
_LOOK_SECONDS = 0.05


def starter(run: Callable[[], None]) -> Callable[..., Any]:
    """What starts a SuperExec as ``subprocess.Popen`` would: *run* in a fork of this process.

    Where it cannot be forked, a process of its own.
    """
    try:
        return ForkedSuperExec(run).start
    except RuntimeError as error:
        log(WARNING, "The SuperExec imports for itself what its host has: %s", error)
    ours = [sys.executable, "-m", "icos_fl_warm_runtime", "superexec"]
    return lambda command, **kwargs: subprocess.Popen([*ours, *command[1:]], **kwargs)


class ForkedSuperExec:
    """Waits, from its host's first moment, for the host to start it. Looks like a Popen from then.

    *run* becomes the SuperExec, with its options in sys.argv. Raises RuntimeError in a process that
    has threads.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        import_module("flwr.supercore.cli.flower_superexec")
        import_module("icos_fl_warm_runtime.executor")
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1:
            raise RuntimeError(f"{threads} threads run: a forked process may hang on their locks")
        gc.collect()
        gc.freeze()  # collecting would touch, and so copy, every page
        read_end, self._order = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._order)
            _become(run, read_end)
        os.close(read_end)

    def start(self, command: list[str], **kwargs: Any) -> "ForkedSuperExec":
        """What ``subprocess.Popen`` would do for ``flower-superexec …``."""
        order = {"options": command[1:], "detached": kwargs.get("start_new_session", False)}
        # One that has died by now is told of below, as one that dies later.
        with suppress(BrokenPipeError), os.fdopen(self._order, "w") as pipe:
            pipe.write(json.dumps(order))
        threading.Thread(target=self._end_with_it, daemon=True).start()
        return self

    def _end_with_it(self) -> None:
        """A host whose SuperExec has died would never do a task again: who starts it anew, does so
        with both."""
        with suppress(ChildProcessError):  # it was waited for, as it was told to end
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            if ended is not None and ended.si_status not in (0, signal.SIGTERM, signal.SIGINT):
                how = "killed by signal" if ended.si_code == os.CLD_KILLED else "exit status"
                log(ERROR, "The SuperExec has ended (%s %d), and so do I", how, ended.si_status)
                os.kill(os.getpid(), signal.SIGTERM)

    def terminate(self) -> None:
        """Ask it to end."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired after *timeout* seconds."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("flower-superexec", timeout)
            time.sleep(_LOOK_SECONDS)


def _become(run: Callable[[], None], order: int) -> NoReturn:
    status = 0
    try:
        with os.fdopen(order) as pipe:
            told = pipe.read()
        if told:  # else its host has ended
            facts = json.loads(told)
            if facts["detached"]:
                os.setsid()
            CDLL(None).prctl(_PR_SET_NAME, c_char_p(b"superexec"), 0, 0, 0)
            sys.argv = ["flower-superexec", *facts["options"]]
            run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
