"""shim.py PARENT COMMAND…: become COMMAND, and be killed when PARENT ends, whatever ends it.

Imports little, since it runs before every component. The parent death signal survives the exec. (A
preexec_fn would ask for it in the forked child, which is not safe once gRPC has its threads.)
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tied(*command: str) -> list[str]:
    """*command*, as one that the kernel kills when this process ends.

    Or when the thread ends that starts it.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before the call
        raise SystemExit(1)
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - becoming it is what this is for
