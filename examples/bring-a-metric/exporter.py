"""Sends what this machine receives over its networks to the bridge at HOST:PORT, until Ctrl-C."""

import signal
import socket
import sys
import threading
from collections.abc import Iterable

import psutil
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource


def received(_options: CallbackOptions) -> Iterable[Observation]:
    for interface, counted in psutil.net_io_counters(pernic=True).items():
        attributes = {"network.interface.name": interface, "network.io.direction": "receive"}
        yield Observation(counted.bytes_recv, attributes)


reader = PeriodicExportingMetricReader(
    OTLPMetricExporter(endpoint=sys.argv[1], insecure=True), export_interval_millis=3_000
)
# The node whose window it is: the name under which the other metrics of this machine come too.
resource = Resource({"host.name": socket.gethostname()})
# At its exit it would try for long to send what is left.
provider = MeterProvider([reader], resource, shutdown_on_exit=False)
provider.get_meter("bring-a-metric").create_observable_counter(
    "system.network.io", [received], unit="By"
)
stopping = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stopping.set())
print("sending every 3 s", flush=True)
stopping.wait()
