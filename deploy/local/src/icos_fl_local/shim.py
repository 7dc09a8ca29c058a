"""shim.py PARENT COMMAND…: become COMMAND, and be killed when PARENT ends, whatever ends it.

Imports little, since it runs before every component. The parent death signal survives the exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before the call
        raise SystemExit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - becoming it is what this is for
