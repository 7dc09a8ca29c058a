"""Looks at the machine before a deployment starts, and says for each trouble how to cure it."""

import contextlib
import errno
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_PYTHON_MIN, _PYTHON_BELOW = (3, 11), (3, 13)
DISK_GIB_MIN = 2.0
MEMORY_GIB_MIN = 4.0
_GIB = 2**30
_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Check:
    """What one look found."""

    name: str
    ok: bool
    found: str
    cure: str = ""

    def line(self) -> str:
        """For people."""
        if self.ok:
            return f"ok  {self.name}: {self.found}"
        return f"bad {self.name}: {self.found}; {self.cure}"

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return asdict(self)


def examine(state_folder: Path, ports: Mapping[str, int]) -> list[Check]:
    """All checks; *ports* are those that the user gave, by component."""
    return [
        _python(),
        _ports(ports),
        _folder(state_folder),
        _disk(state_folder),
        _memory(),
        rapl(_POWERCAP),
    ]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    ok = _PYTHON_MIN <= sys.version_info[:2] < _PYTHON_BELOW
    return Check(
        "python", ok, version, "" if ok else "use Python 3.11 or 3.12 (uv python install 3.12)"
    )


def _ports(ports: Mapping[str, int]) -> Check:
    taken = []
    for component, port in ports.items():
        problem = port_problem(port)
        if problem:
            taken.append(f"{component}={port} ({problem})")
    numbers = list(ports.values())
    taken += [
        f"{port} (given twice)" for port in sorted({p for p in numbers if numbers.count(p) > 1})
    ]
    if taken:
        cure = "give another --port NAME=PORT, or none to have a free one found"
        return Check("ports", False, f"cannot use 127.0.0.1: {', '.join(taken)}", cure)
    if not ports:
        return Check("ports", True, "free ones on 127.0.0.1 are found")
    return Check("ports", True, f"free on 127.0.0.1: {', '.join(map(str, numbers))}")


def port_problem(port: int) -> str:
    """Why 127.0.0.1:*port* cannot be listened on; empty if it can."""
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return ""


def _folder(folder: Path) -> Check:
    folder = folder.absolute()
    there = _nearest(folder)
    try:
        _write_probe(there)
        for entry in ("lock", "deployment.json", "logs", "runs", "flwr", "store"):
            path = folder / entry
            if _exists(path) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        return Check("state folder", False, *_folder_trouble(folder, there, error))
    return Check("state folder", True, f"{folder} can be written by uid {os.getuid()}")


def _write_probe(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()


def _folder_trouble(folder: Path, there: Path, error: OSError) -> tuple[str, str]:
    culprit = Path(error.filename) if error.filename and _exists(Path(error.filename)) else there
    uid = os.getuid()
    owner = culprit.stat().st_uid if _exists(culprit) else "unknown"
    found = (
        f"{folder} cannot be written by uid {uid}: {culprit} (owner uid {owner}): "
        f"{(error.strerror or str(error)).lower()}"
    )
    if error.errno == errno.ENOSPC:
        return found, "free some space there, or give another --state-dir"
    if error.errno == errno.EACCES:
        return found, f"run 'sudo chown -R {uid} {culprit}', or give another --state-dir"
    return found, "give another --state-dir"


def _disk(folder: Path) -> Check:
    free_gib = shutil.disk_usage(_nearest(folder.absolute())).free / _GIB
    ok = free_gib >= DISK_GIB_MIN
    cure = f"free {DISK_GIB_MIN - free_gib:.1f} GiB there, or give a --state-dir on another disk"
    found = f"{free_gib:.1f} GiB free at {folder.absolute()}, {DISK_GIB_MIN:g} GiB needed"
    return Check("disk", ok, found, "" if ok else cure)


def _memory() -> Check:
    available_gib = psutil.virtual_memory().available / _GIB
    ok = available_gib >= MEMORY_GIB_MIN
    found = f"{available_gib:.1f} GiB available, {MEMORY_GIB_MIN:g} GiB needed for four nodes"
    return Check("memory", ok, found, "" if ok else "end other programs, or take a larger machine")


def rapl(powercap: Path) -> Check:
    """Whether power can be measured. Never in the way: --source host goes on without it."""
    counters = sorted(powercap.glob("intel-rapl*/energy_uj"))
    if not counters:
        return Check("rapl", True, "this machine tells no power; --source host goes on without it")
    if all(os.access(counter, os.R_OK) for counter in counters):
        return Check("rapl", True, f"{len(counters)} energy counters can be read")
    return Check(
        "rapl",
        True,
        "there, but only root may read it; --source host goes on without power "
        f"(cure: sudo chmod a+r {powercap}/intel-rapl*/energy_uj)",
    )


def _nearest(folder: Path) -> Path:
    """The folder itself, or its nearest parent that is there."""
    while not _exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True
