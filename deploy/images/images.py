"""The images: of what each is built, its version, and how large it may be."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Image:
    """What is built of *folder*, and how large it may be: all of its files, with the base."""

    folder: str
    budget_mb: int
    version_file: str = "pyproject.toml"
    program: str = ""
    """What of deploy/build-sources is in it, by the name that it prints."""

    def version(self) -> str:
        """The first version in the file that has it."""
        text = (ROOT / self.folder / self.version_file).read_text()
        return re.findall(r"\d+\.\d+\.\d+", text)[0]


IMAGES = {
    "otlp-bridge": Image("packages/otlp-bridge", 300),
    "timeseries-store": Image("packages/timeseries-store", 300),
    "processor": Image("packages/processor", 300),
    "fl-server": Image("packages/fl-server", 520),
    "fl-client": Image("packages/fl-client", 1300),
    "otel-collector": Image("deploy/otel-collector", 200, "builder.yaml", "otelcol"),
    "scaphandre": Image("deploy/scaphandre", 100, "version", "scaphandre"),
    "gateway": Image("deploy/gateway", 100, "version"),
}
