"""The real sources of a node: the Collector and, where power can be read, Scaphandre."""

import os
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from icos_fl_local.deployment import HOST, Deployment
from icos_fl_local.errors import LocalError
from icos_fl_local.supervisor import Component

COLLECTOR, SCAPHANDRE = "collector", "scaphandre"
SAMPLING_SECONDS = 3.0
"""Of the Collector's configuration."""

_DEPLOY = Path(__file__).parents[3]
_POWERCAP = Path("/sys/class/powercap")
_SHARE = Path("/var/scaphandre")
_MODULES = Path("/proc/modules")
# Rows are to be seen soon: an operator's batches of 180 s would be a long wait for a first look.
_BATCH_SECONDS = 6
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Power:
    """Whether Scaphandre can measure on this machine."""

    options: tuple[str, ...] | None
    """That it needs to; None if it cannot."""
    found: str
    """For people."""


@dataclass(frozen=True)
class Sources:
    """The programs that measure this machine."""

    otelcol: Path
    scaphandre: Path | None
    power: Power

    @property
    def names(self) -> tuple[str, ...]:
        """Their components, in the order in which they start."""
        return (COLLECTOR,) if self.scaphandre is None else (SCAPHANDRE, COLLECTOR)

    def components(self, deployment: Deployment) -> list[Component]:
        """Scaphandre, if it can measure, and the Collector, which sends to the bridge."""
        return [*self._scaphandre(deployment), self._collector(deployment)]

    def _scaphandre(self, deployment: Deployment) -> list[Component]:
        if self.scaphandre is None:
            return []
        port = deployment.ports[SCAPHANDRE]
        command = (
            *(str(self.scaphandre), *(self.power.options or ())),
            *("prometheus", "--address", HOST, "--port", str(port)),
        )
        # Asked by nobody but the Collector: whoever asks its /metrics too freezes its values.
        return [deployment.component(SCAPHANDRE, command)]

    def _collector(self, deployment: Deployment) -> Component:
        files = ["config.yaml"] if self.scaphandre is None else ["config.yaml", "power.yaml"]
        folder = _DEPLOY / "otel-collector"
        env = {
            "ICOS_FL_NODE": deployment.nodes[0],
            "ICOS_FL_COLLECTOR_BRIDGE": deployment.address("bridge"),
            "ICOS_FL_COLLECTOR_STATE_DIR": str(deployment.state.folder / COLLECTOR),
            "ICOS_FL_COLLECTOR_HEALTH_ADDRESS": deployment.address(COLLECTOR),
            "ICOS_FL_COLLECTOR_BATCH_TIMEOUT": f"{_BATCH_SECONDS}s",
        }
        if self.scaphandre is not None:
            env["ICOS_FL_SCAPHANDRE_ADDRESS"] = deployment.address(SCAPHANDRE)
        return deployment.component(
            COLLECTOR,
            (str(self.otelcol), *(f"--config={folder / name}" for name in files)),
            env,
            healthy,
            ("bridge", *self.names[:-1]),
        )


def find() -> Sources:
    """The programs as ``deploy/build-sources`` left them; raises LocalError without a Collector."""
    script = _DEPLOY / "build-sources"
    if not script.is_file():
        raise LocalError(f"--source collector: {script} is not there; it needs the repository")
    looked = subprocess.run(
        [str(script), "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    paths = dict(line.split("=", 1) for line in looked.stdout.splitlines())
    if "otelcol" not in paths:
        raise LocalError(f"--source collector: the Collector is not built; run {script} once")
    power = power_of(_POWERCAP, Path(os.environ.get("SCAPHANDRE_POWERCAP_PATH", _SHARE)), _MODULES)
    if power.options is not None and "scaphandre" not in paths:
        power = Power(None, f"Scaphandre is not built (run {script} once): no power")
    scaphandre = Path(paths["scaphandre"]) if power.options is not None else None
    return Sources(Path(paths["otelcol"]), scaphandre, power)


def power_of(powercap: Path, share: Path, modules: Path) -> Power:
    """How Scaphandre can read power here; it would end at once where it cannot.

    *powercap* has the machine's energy counters, *share* those that a hypervisor shares with a
    virtual machine. The kernel's list of *modules* must be there whichever it is.
    """
    if not modules.exists():
        return Power(None, f"no {modules}, which Scaphandre needs: no power")
    if _readable(powercap):
        return Power((), f"power from {powercap}")
    if _readable(share):
        return Power(("--vm",), f"power from {share}, shared by the hypervisor")
    return Power(None, f"no energy counter can be read in {powercap} or {share}: no power")


def _readable(folder: Path) -> bool:
    counters = list(folder.glob("intel-rapl:*/energy_uj"))
    return bool(counters) and all(os.access(counter, os.R_OK) for counter in counters)


def healthy(port: int) -> bool:
    """Does the Collector's health check on the port say that it runs?"""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=_PROBE_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
