"""Health of the bridge and the processor, each a process, while a part of a real store is away."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store.testing import StoreProcesses, store_processes

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Running:
    store: StoreProcesses
    channels: list[grpc.Channel]

    def wait_for(self, status: int) -> None:
        """Until both services say so."""
        for channel in self.channels:
            request = health_pb2.HealthCheckRequest()
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                request, timeout=120, wait_for_ready=True
            )
            assert any(answer.status == status for answer in watch)
            watch.cancel()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A store that no row has come to yet."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("store")
        store = stack.enter_context(store_processes(folder))
        channels = []
        for module, prefix in (("otlp_bridge", "BRIDGE"), ("processor", "PROCESSOR")):
            address = f"127.0.0.1:{free_port()}"
            environment = {
                f"ICOS_FL_{prefix}_LISTEN_ADDRESS": address,
                f"ICOS_FL_{prefix}_STORE__PORT": str(store.settings.port),
                f"ICOS_FL_{prefix}_STORE__TIMEOUT_SECONDS": "3",
            }
            command = [sys.executable, "-m", f"icos_fl_{module}"]
            service = subprocess.Popen(command, env={**os.environ, **environment})
            stack.callback(service.wait, 30)
            stack.callback(service.terminate)
            channels.append(stack.enter_context(grpc.insecure_channel(address)))
        found = Running(store, channels)
        found.wait_for(SERVING)
        yield found


@pytest.mark.parametrize("part", ["kv", "metadata", "backend"])
def test_health_follows_a_part_that_hangs(running: Running, part: str):
    hanging = running.store.processes[part]
    hanging.send_signal(signal.SIGSTOP)
    try:
        running.wait_for(NOT_SERVING)
    finally:
        hanging.send_signal(signal.SIGCONT)
    running.wait_for(SERVING)


def test_health_follows_a_backend_that_is_killed(running: Running):
    backend = running.store.processes["backend"]
    backend.kill()
    backend.wait()
    running.wait_for(NOT_SERVING)
    running.store.start("backend")
    running.wait_for(SERVING)
