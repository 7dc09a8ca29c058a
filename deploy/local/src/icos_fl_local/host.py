"""This machine's load and power, measured with psutil and sent by the OpenTelemetry SDK."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

POWERCAP = Path("/sys/class/powercap")

_EXPORT_TIMEOUT_SECONDS = 5.0
# psutil's names by OpenTelemetry's name of the mode. Guests' time is in user and nice.
_MODES = {
    "user": ("user",),
    "nice": ("nice",),
    "system": ("system",),
    "idle": ("idle",),
    "iowait": ("iowait",),
    "interrupt": ("irq", "softirq", "interrupt"),
    "steal": ("steal",),
}


class HostSource:
    """A running source. ``stop`` sends what was measured last and ends its thread."""

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = provider

    def stop(self) -> None:
        """Stop measuring; returns within seconds even if the endpoint is gone."""
        self._provider.shutdown(timeout_millis=2_000 * _EXPORT_TIMEOUT_SECONDS)


def start(
    endpoint: str, node: str, interval_seconds: float, powercap: Path = POWERCAP
) -> HostSource:
    """Send this machine's metrics to *endpoint* (host:port) as *node*, every *interval_seconds*.

    They are ``system.cpu.utilization`` (a ratio by processor and mode), ``system.memory.usage``
    (bytes used: total minus available) and, where the energy counters under *powercap* can be read,
    ``hw.host.power`` (watts of all processor packages).
    """
    exporter = OTLPMetricExporter(endpoint=endpoint, insecure=True, timeout=_EXPORT_TIMEOUT_SECONDS)
    reader = PeriodicExportingMetricReader(
        exporter,
        export_interval_millis=1_000 * interval_seconds,
        export_timeout_millis=1_000 * _EXPORT_TIMEOUT_SECONDS,
    )
    provider = MeterProvider([reader], Resource({"host.name": node}), shutdown_on_exit=False)
    meter = provider.get_meter("icos_fl_local.host")
    meter.create_observable_gauge(
        "system.cpu.utilization", [CpuUtilization()], unit="1", description="share of time by mode"
    )
    meter.create_observable_gauge(
        "system.memory.usage", [_memory_usage], unit="By", description="total minus available"
    )
    packages = packages_of(powercap)
    if packages:
        meter.create_observable_gauge(
            "hw.host.power", [PackagePower(packages)], unit="W", description="processor packages"
        )
    return HostSource(provider)


class CpuUtilization:
    """The share of time that each processor spent in each mode since the call before."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times(percpu=True)

    def __call__(self, _options: CallbackOptions) -> Iterable[Observation]:
        """One observation a processor and mode; none of a processor whose clock has not moved."""
        now = psutil.cpu_times(percpu=True)
        observations = []
        for cpu, (start, end) in enumerate(zip(self._before, now, strict=False)):
            # A counter that the kernel corrects can go back a little: that is no time spent.
            seconds = {
                mode: sum(max(0.0, getattr(end, n, 0.0) - getattr(start, n, 0.0)) for n in names)
                for mode, names in _MODES.items()
            }
            total = sum(seconds.values())
            if total > 0:
                observations += [
                    Observation(spent / total, {"cpu.logical_number": cpu, "cpu.mode": mode})
                    for mode, spent in seconds.items()
                ]
        self._before = now
        return observations


def _memory_usage(_options: CallbackOptions) -> Iterable[Observation]:
    memory = psutil.virtual_memory()
    return [Observation(memory.total - memory.available, {"system.memory.state": "used"})]


@dataclass(frozen=True)
class Package:
    """The energy counter of a processor package."""

    energy_file: Path
    range_microjoules: int
    """The counter begins again at 0 after this value."""

    def read_microjoules(self) -> int:
        """The counter; raises OSError or ValueError where it cannot be read."""
        return int(self.energy_file.read_text())


def packages_of(powercap: Path) -> list[Package]:
    """The packages under *powercap* whose counters can be read; sub-domains are part of them."""
    packages = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                limit = int((zone / "max_energy_range_uj").read_text())
                package = Package(zone / "energy_uj", limit)
                package.read_microjoules()
                packages.append(package)
    return packages


class PackagePower:
    """The mean power of all packages since the call before."""

    def __init__(self, packages: list[Package]) -> None:
        self._packages = packages
        self._before: tuple[float, list[int]] | None = None
        with contextlib.suppress(OSError, ValueError):
            self._before = self._read()

    def __call__(self, _options: CallbackOptions) -> Iterable[Observation]:
        """One observation; none where a counter cannot be read: a part is not the whole."""
        try:
            now = self._read()
        except (OSError, ValueError):
            self._before = None
            return []
        before, self._before = self._before, now
        if before is None or now[0] <= before[0]:
            return []
        microjoules = sum(
            energy - past if energy >= past else energy - past + package.range_microjoules
            for package, past, energy in zip(self._packages, before[1], now[1], strict=True)
        )
        return [Observation(microjoules / 1e6 / (now[0] - before[0]), {"hw.id": "packages"})]

    def _read(self) -> tuple[float, list[int]]:
        return time.monotonic(), [package.read_microjoules() for package in self._packages]
