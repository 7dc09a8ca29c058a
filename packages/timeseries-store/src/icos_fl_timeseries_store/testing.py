"""A real store for tests: the four services as processes on free ports of 127.0.0.1."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from icos_fl_timeseries_store.services import SERVICES, Service
from icos_fl_timeseries_store.settings import StoreSettings


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass
class StoreProcesses:
    """The processes of a running store, to be killed and started again by a test."""

    folder: Path
    environment: dict[str, str]
    processes: dict[Service, subprocess.Popen[bytes]]

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(port=int(self.environment["ICOS_FL_STORE_METADATA_PORT"]))

    def start(self, service: Service, within: tuple[str, ...] = ()) -> None:
        """Start *service*, by the command *within*, and wait until its port answers."""
        log = (self.folder / f"{service}.log").open("ab")
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "icos_fl_timeseries_store", "serve", service],
            env={**os.environ, **self.environment},
            stdout=log,
            stderr=log,
        )
        log.close()
        self.processes[service] = process
        port = int(self.environment[f"ICOS_FL_STORE_{service.upper()}_PORT"])
        deadline = time.monotonic() + 60
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
def store_processes(folder: Path) -> Iterator[StoreProcesses]:
    """The services with their state in *folder*, as processes that a test may kill."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {f"ICOS_FL_STORE_{name.upper()}_PORT": str(free_port()) for name in SERVICES} | {
        "ICOS_FL_STORE_STATE_DIR": str(folder)
    }
    running = StoreProcesses(folder, environment, {})
    try:
        for service in SERVICES:
            running.start(service)
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def running_store(folder: Path) -> Iterator[StoreSettings]:
    """``connect`` to what this yields; the store ends with the block."""
    with store_processes(folder) as running:
        yield running.settings
