"""Coverage-guided fuzzing of what an exporter's bytes meet: gzip, protobuf, JSON, rows, the window.

    uv run --with atheris python packages/otlp-bridge/fuzz/decoder.py -max_total_time=600

Arguments are libFuzzer's; a folder among them keeps the inputs found. Seeds are made anew each
time. An exception that is no refusal, a value that is not finite in a window, and more than 2 GB of
memory end it, with the input in a file of the folder for temporary files.
"""

import gzip
import json
import math
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["icos_fl_otlp_bridge", "google.protobuf.json_format"]):
    from google.protobuf import json_format
    from icos_fl_otlp_bridge import BridgeConfig, envelope, json_request
    from icos_fl_otlp_bridge.bridge import Bridge
    from icos_fl_otlp_bridge.errors import ExportRefused
    from icos_fl_otlp_bridge.inflate import gunzip

from icos_fl_service import logs
from icos_fl_timeseries_store import MemoryStore
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

envelope.SMALL_BYTES = 0  # else what is this small would not be estimated
MAX_BYTES = 1 << 20
PROTOBUF, JSON, GZIP = b"p", b"j", b"z"
INPUTS_A_STORE = 1_000
START_NS = 1_700_000_000 * 10**9
CONFIG = BridgeConfig.model_validate(
    {
        "nodes_max": 10,
        "columns": {
            name: {"sources": [{"terms": [{"metric": "m", **term}]}]}
            for name, term in {
                "value": {},
                "rate": {"rate": True},
                "chosen": {"where": [{"attribute": "k", "matches": "v.*"}], "combine": "mean"},
                "count": {"take": "count"},
                "mean": {"take": "mean"},
                "sum_rate": {"take": "sum", "rate": True},
                "quantile": {"take": "quantile", "quantile": 0.9},
            }.items()
        },
    }
)


class Target:
    """Takes one input after another, with a new store now and then."""

    def __init__(self) -> None:
        self._inputs = 0
        self._renew()

    def __call__(self, data: bytes) -> None:
        if self._inputs % INPUTS_A_STORE == 0:
            self._renew()
        self._inputs += 1
        kind, encoded = data[:1], data[1:]
        decoder = json_request if kind == JSON else envelope
        try:
            if kind == GZIP:
                encoded = gunzip(encoded, MAX_BYTES)
            decoder.decoded_bytes(encoded, self._bridge.metrics)
            request = decoder.parse(encoded, self._bridge.metrics)
        except ExportRefused:
            return
        self._bridge.store(self._bridge.convert(request))
        for node in self._store.nodes():
            values = self._store.window(node).read(last=3).values_tf
            if any(math.isinf(value) for value in values.flat):
                raise AssertionError(f"a value that is not finite in the window of {node!r}")

    def _renew(self) -> None:
        self._store = MemoryStore()
        self._bridge = Bridge(CONFIG, self._store)


def seeds() -> list[bytes]:
    """A valid request of every type of metric, in every encoding."""
    found = []
    for kind in ("gauge", "sum", "histogram", "exponential_histogram", "summary"):
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="host.name").value.string_value = "a"
        metric = resource.scope_metrics.add().metrics.add(name="m")
        data = getattr(metric, kind)
        for number in range(2):
            point = data.data_points.add(time_unix_nano=START_NS + number * 3 * 10**9)
            point.attributes.add(key="k").value.string_value = "v1"
            if kind in ("gauge", "sum"):
                point.as_int = number
            else:
                point.count, point.sum = 2, 3.0
            if kind == "histogram":
                point.bucket_counts.extend([1, 1])
                point.explicit_bounds.append(1.0)
            elif kind == "exponential_histogram":
                point.zero_count = 1
                point.positive.bucket_counts.append(1)
            elif kind == "summary":
                point.quantile_values.add(quantile=0.9, value=1.0)
        if kind not in ("gauge", "summary"):
            data.aggregation_temporality = 2
        serialized = request.SerializeToString()
        document = json_format.MessageToDict(request, use_integers_for_enums=True)
        found += [
            PROTOBUF + serialized,
            JSON + json.dumps(document).encode(),
            GZIP + gzip.compress(serialized),
        ]
    return found


def main() -> None:
    """Fuzz with libFuzzer's arguments."""
    logs.configure("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        limits = ["-rss_limit_mb=2048", "-max_len=4096", "-timeout=10"]
        limits.append(f"-artifact_prefix={tempfile.gettempdir()}/icos-fl-otlp-bridge-")
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], folder], Target())
        atheris.Fuzz()


if __name__ == "__main__":
    main()
