"""The metrics of a Prometheus registry, exported over OTLP/gRPC. Needs the extra ``otlp``."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

EXPORT_SECONDS = 60.0
EXPORT_PATIENCE_SECONDS = 5.0
"""The longest that one export may take, retries included; the next one sends all of it anyway."""

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}
_CUMULATIVE = export.AggregationTemporality.CUMULATIVE


class Export:
    """Exports *registry* to *endpoint*, now, every EXPORT_SECONDS, and once more on ``close``."""

    def __init__(self, registry: CollectorRegistry, endpoint: str, service: str) -> None:
        self._registry = registry
        self._resource = Resource.create({SERVICE_NAME: service})
        self._exporter = OTLPMetricExporter(
            endpoint=endpoint,
            insecure=endpoint.startswith("http://"),
            timeout=EXPORT_PATIENCE_SECONDS,
        )
        self._started_ns = time.time_ns()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics export", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Export what there is, and end."""
        self._stopping.set()
        self._thread.join(2 * EXPORT_PATIENCE_SECONDS)
        self._exporter.shutdown(timeout_millis=1000 * EXPORT_PATIENCE_SECONDS)

    def _run(self) -> None:
        self._exporter.export(self._collected())
        while not self._stopping.wait(EXPORT_SECONDS):
            self._exporter.export(self._collected())
        self._exporter.export(self._collected())

    def _collected(self) -> export.MetricsData:
        metrics = metrics_of(self._registry.collect(), self._started_ns, time.time_ns())
        scope = export.ScopeMetrics(InstrumentationScope("icos_fl_service"), metrics, "")
        return export.MetricsData([export.ResourceMetrics(self._resource, [scope], "")])


def metrics_of(families: Iterable[Metric], start_ns: int, now_ns: int) -> list[export.Metric]:
    """OpenTelemetry's metrics of *families*, with the names that its Prometheus rules give them.

    Counters become monotonic sums without ``_total``, histograms and gauges stay what they are;
    all are cumulative since *start_ns*. Other kinds are left out.
    """
    metrics = []
    for family in families:
        data: export.DataT
        if family.type == "counter":
            points = _points(family.samples, f"{family.name}_total", start_ns, now_ns)
            data = export.Sum(points, _CUMULATIVE, is_monotonic=True)
        elif family.type == "gauge":
            data = export.Gauge(_points(family.samples, family.name, 0, now_ns))
        elif family.type == "histogram":
            data = export.Histogram(_histograms(family, start_ns, now_ns), _CUMULATIVE)
        else:
            continue
        unit = _UNITS.get(family.name.rpartition("_")[2], "")
        if data.data_points:
            metrics.append(export.Metric(family.name, family.documentation, unit, data))
    return metrics


def _points(
    samples: Sequence[Sample], name: str, start_ns: int, now_ns: int
) -> list[export.NumberDataPoint]:
    return [
        export.NumberDataPoint(sample.labels, start_ns, now_ns, sample.value)
        for sample in samples
        if sample.name == name
    ]


def _histograms(family: Metric, start_ns: int, now_ns: int) -> list[export.HistogramDataPoint]:
    """One point a series; Prometheus' buckets count what is below too, OpenTelemetry's do not."""
    series: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        part = sample.labels.get("le", sample.name.removeprefix(f"{family.name}_"))
        series.setdefault(tuple(sorted(labels.items())), {})[part] = sample.value
    return [_histogram(dict(labels), parts, start_ns, now_ns) for labels, parts in series.items()]


def _histogram(
    labels: Mapping[str, str], parts: Mapping[str, float], start_ns: int, now_ns: int
) -> export.HistogramDataPoint:
    named = ("count", "sum", "created")
    bounds = sorted((float(le), count) for le, count in parts.items() if le not in named)
    below = [0.0, *(count for _, count in bounds[:-1])]
    return export.HistogramDataPoint(
        attributes=labels,
        start_time_unix_nano=start_ns,
        time_unix_nano=now_ns,
        count=int(parts["count"]),
        sum=parts["sum"],
        bucket_counts=[int(count - less) for (_, count), less in zip(bounds, below, strict=True)],
        explicit_bounds=[bound for bound, _ in bounds[:-1]],
        min=None,  # type: ignore[arg-type]
        max=None,  # type: ignore[arg-type]
    )
