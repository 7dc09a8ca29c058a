"""No process outlives its deployment, however the launcher ends.

Linux gives two means. A *subreaper* inherits the orphans among its descendants, so that processes
which a component left behind can still be found. A *parent death signal* reaches a process when its
parent ends, ``kill -9`` included.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def prctl(option: int, value: int) -> None:
    """Raises OSError where the kernel refuses."""
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def adopt_orphans() -> None:
    """Make this process the parent of all orphans among its descendants."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int, parent: int) -> None:
    """Have the kernel send *signal_number* to this process when *parent* ends."""
    prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal_number)


def descendants(spare: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """Of this process, all that are alive but those in *spare* and their descendants."""
    spared = set(spare)
    for process in spare:
        with contextlib.suppress(psutil.Error):
            spared.update(process.children(recursive=True))
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process not in spared and _status(process) not in (None, psutil.STATUS_ZOMBIE)
    ]


def end_descendants(
    grace_seconds: float = 0.0, spare: Collection[psutil.Process] = ()
) -> list[str]:
    """End every descendant of this process and reap it; return the names of those that were there.

    Those in *spare* live on, with their own descendants. Loops until no other is left: one that is
    being killed may just have started another.
    """
    found: dict[int, str] = {}
    terminate_until = time.monotonic() + grace_seconds
    while True:
        alive = descendants(spare)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                if process.pid not in found:
                    found[process.pid] = process.name()
                    if grace_seconds:
                        process.terminate()
                if time.monotonic() >= terminate_until:
                    process.kill()
        _reap()
        if not alive:
            return list(found.values())
        psutil.wait_procs(alive, timeout=0.1)


def run_guarded(work: Callable[[], int], *, keep: bool = False) -> int:
    """Run *work* in a child that cannot leave anything behind; return its exit status.

    This process waits, passes signals on, and ends whatever is left when the child has ended in
    whatever way. With *keep* the child and its guard become a session of their own, and this
    process returns as soon as ``kept`` is called in the child. Returns twice, as ``os.fork`` does,
    so call it before there is a thread, and exit with what it returns.
    """
    if keep:
        return _relay(work)
    return _guard(work)


_guard_to_tell: int | None = None


def kept(log: Path) -> None:
    """In the child of ``run_guarded(keep=True)``: leave the terminal, write to *log*."""
    global _guard_to_tell
    if _guard_to_tell is None:
        return
    _redirect(log)
    os.kill(_guard_to_tell, signal.SIGUSR1)
    _guard_to_tell = None


def _relay(work: Callable[[], int]) -> int:
    read_end, write_end = os.pipe()
    launcher = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.setsid()
        die_with_parent(signal.SIGTERM, launcher)
        return _guard(work, kept_pipe=write_end)
    os.close(write_end)
    _pass_on(child)
    with os.fdopen(read_end, "rb") as pipe:
        if pipe.read() == b"kept":
            return 0
    return _wait(child)


def _guard(work: Callable[[], int], kept_pipe: int | None = None) -> int:
    global _guard_to_tell
    adopt_orphans()
    guard = os.getpid()
    # Blocked until this process is ready for it: unhandled, SIGUSR1 would end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        die_with_parent(signal.SIGTERM, guard)
        if kept_pipe is not None:
            os.close(kept_pipe)
            _guard_to_tell = guard
        return work()
    _pass_on(child)
    if kept_pipe is not None:
        signal.signal(signal.SIGUSR1, lambda *_: _let_relay_go(kept_pipe))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    status = _wait(child)
    left = end_descendants()
    if left:
        print(f"the launcher ended; killed what it left: {', '.join(left)}", file=sys.stderr)
    return status


def _let_relay_go(kept_pipe: int) -> None:
    prctl(_PR_SET_PDEATHSIG, 0)
    _redirect(Path(os.devnull))
    os.write(kept_pipe, b"kept")
    os.close(kept_pipe)


def _redirect(target: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with target.open("ab", buffering=0) as stream, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def _pass_on(child: int) -> None:
    def send(signal_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal_number)

    for number in _RELAYED:
        signal.signal(number, send)


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _status(process: psutil.Process) -> str | None:
    try:
        return str(process.status())
    except psutil.Error:
        return None


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
