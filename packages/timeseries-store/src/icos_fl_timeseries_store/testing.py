"""A real store for tests: the four services as processes on free ports of 127.0.0.1.

They end with the process that started them, however that ends.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port

from icos_fl_timeseries_store.services import SERVICES, Service
from icos_fl_timeseries_store.settings import StoreSettings


@dataclass
class StoreProcesses:
    """The processes of a running store, to be killed and started again by a test."""

    folder: Path
    environment: dict[str, str]
    within: tuple[str, ...] = ()
    """A command that becomes the command that follows it."""
    processes: dict[Service, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(port=int(self.environment["ICOS_FL_STORE_METADATA_PORT"]))

    def start(self, *services: Service) -> None:
        """Start *services* at the same time, and wait until their ports answer."""
        for service in services:
            self._begin(service)
        for service in services:
            self._wait(service)

    def _begin(self, service: Service) -> None:
        log = (self.folder / f"{service}.log").open("ab")
        process = subprocess.Popen(
            tied(*self.within, sys.executable, "-m", "icos_fl_timeseries_store", "serve", service),
            env={**os.environ, **self.environment},
            stdout=log,
            stderr=log,
        )
        log.close()
        self.processes[service] = process

    def _wait(self, service: Service) -> None:
        process = self.processes[service]
        port = int(self.environment[f"ICOS_FL_STORE_{service.upper()}_PORT"])
        deadline = time.monotonic() + 240  # of a busy machine
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            if process.poll() is not None or time.monotonic() > deadline:
                text = (self.folder / f"{service}.log").read_text(errors="replace")
                raise RuntimeError(f"{service} did not start:\n{text[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End all processes, the clients of a service before the service."""
        for service in reversed(SERVICES):
            process = self.processes.get(service)
            if process is None or process.poll() is not None:
                continue
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def store_processes(folder: Path, within: tuple[str, ...] = ()) -> Iterator[StoreProcesses]:
    """The services with their state in *folder*, as processes that a test may kill."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {f"ICOS_FL_STORE_{name.upper()}_PORT": str(free_port()) for name in SERVICES} | {
        "ICOS_FL_STORE_STATE_DIR": str(folder)
    }
    running = StoreProcesses(folder, environment, within)
    try:
        running.start("kv")
        running.start("metadata")
        running.start("backend", "proxy")  # neither needs the other
        yield running
    finally:
        running.stop()


@dataclass(frozen=True)
class SmallDisk:
    """A file system at *folder*, which only processes see that are started *within*."""

    folder: Path
    within: tuple[str, ...]
    seen_at: Path
    """Where all others find it."""

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.seen_at / "filler").open("wb", 0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))

    def make_room(self) -> None:
        """Undo ``fill``."""
        (self.seen_at / "filler").unlink()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block whoever writes or syncs hangs in the kernel. Not for a tmpfs."""
        subprocess.run([*self.within, "fsfreeze", "--freeze", str(self.folder)], check=True)
        try:
            yield
        finally:
            subprocess.run([*self.within, "fsfreeze", "--unfreeze", str(self.folder)], check=True)


@contextlib.contextmanager
def small_disk(
    folder: Path, megabytes: int, image: Path | None = None, options: str = "rw"
) -> Iterator[SmallDisk]:
    """A tmpfs, or an ext4 in the file *image*. Raises OSError where none can be mounted.

    Mounted in a namespace of its own, which ends with this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    at = shlex.quote(str(folder))
    mount = f"mount -t tmpfs -o size={megabytes}m,{options} none {at}"
    if image is not None:
        file = shlex.quote(str(image))
        make = f"truncate -s {megabytes}M {file} && mkfs.ext4 -q {file}"
        mount = f"test -e {file} || {{ {make}; }} && mount -o loop,{options} {file} {at}"
    with subprocess.Popen(
        tied("unshare", "--mount", "sh", "-c", f"{mount} && echo mounted && exec sleep infinity"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "mounted\n":
                raise OSError(f"no disk can be mounted here: {holder.stderr.read().strip()}")
            within = ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")
            yield SmallDisk(folder, within, Path(f"/proc/{holder.pid}/root{folder}"))
        finally:
            holder.kill()


@contextlib.contextmanager
def running_store(folder: Path) -> Iterator[StoreSettings]:
    """``connect`` to what this yields; the store ends with the block."""
    with store_processes(folder) as running:
        yield running.settings
