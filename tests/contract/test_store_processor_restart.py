"""A processor in its own process whose store's backend is killed and started again."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from icos_fl.processor.v1 import processor_service_pb2 as pb
from icos_fl.processor.v1 import processor_service_pb2_grpc as pb_grpc
from icos_fl_service.shim import tied
from icos_fl_service.testing import free_port
from icos_fl_timeseries_store import StoreSettings, connect
from icos_fl_timeseries_store.testing import store_processes

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def wait_for_health(channel: grpc.Channel, status: int) -> None:
    request = health_pb2.HealthCheckRequest()
    watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120, wait_for_ready=True)
    for answer in watch:
        if answer.status == status:
            watch.cancel()
            return


def append(settings: StoreSettings) -> None:
    times = (1_700_000_000 + np.arange(20) * 15) * 1_000_000_000
    with connect(settings) as store:
        store.create_window("a").append(["power"], times, np.ones((20, 1)))


def test_health_and_answers_return_with_the_backend(tmp_path: Path):
    address = f"127.0.0.1:{free_port()}"
    with store_processes(tmp_path / "store") as running:
        settings = running.settings
        append(settings)
        environment = {
            "ICOS_FL_PROCESSOR_LISTEN_ADDRESS": address,
            "ICOS_FL_PROCESSOR_STORE__PORT": str(settings.port),
            "ICOS_FL_PROCESSOR_STORE__TIMEOUT_SECONDS": "3",
        }
        processor = subprocess.Popen(
            tied(sys.executable, "-m", "icos_fl_processor"), env={**os.environ, **environment}
        )
        try:
            with grpc.insecure_channel(address) as channel:
                wait_for_health(channel, SERVING)
                backend = running.processes["backend"]
                backend.kill()
                backend.wait()
                wait_for_health(channel, NOT_SERVING)
                running.start("backend")
                wait_for_health(channel, SERVING)
                append(settings)  # a kill may have cost the rows: that is the store's matter
                request = pb.DescribeWindowRequest(series=pb.SeriesSpec(node="a"))
                found = pb_grpc.ProcessorServiceStub(channel).DescribeWindow(request, timeout=30)
            assert found.rows == 20
            processor.terminate()
            assert processor.wait(30) == 0
        finally:
            processor.kill()
            processor.wait()
