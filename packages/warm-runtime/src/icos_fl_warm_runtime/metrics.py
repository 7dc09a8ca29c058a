"""What a SuperExec tells Prometheus: of its tasks, and what those have counted themselves."""

import threading
from collections.abc import Iterable, Iterator

from icos_fl_service.settings import ServiceSettings
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from pydantic_settings import SettingsConfigDict

STARTED = Counter(
    "icos_fl_runtime_tasks_started",
    "Tasks, by whether a warm worker forked them or they started cold",
    ["kind", "start"],
)
SECONDS = Histogram(
    "icos_fl_runtime_task_seconds",
    "From the order to the end of forked tasks that completed, failed (an error was raised), or"
    " died without a word",
    ["kind", "outcome"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200),
)
WORKERS = Counter("icos_fl_runtime_workers_started", "Warm workers that were started", ["kind"])


def begin(kinds: Iterable[str]) -> None:
    """The first that fails is one more than 0 then, not a series of which nothing was known."""
    for kind in kinds:
        for outcome in ("completed", "failed", "died"):
            SECONDS.labels(kind, outcome)


_Series = tuple[str, tuple[tuple[str, str], ...]]


class RuntimeSettings(ServiceSettings):
    """``ICOS_FL_RUNTIME_*`` of a SuperLink, a SuperNode or a SuperExec."""

    model_config = SettingsConfigDict(env_prefix="ICOS_FL_RUNTIME_", frozen=True, extra="forbid")


class TaskCounts(Collector):
    """What tasks have counted: counters and histograms added up, of gauges the newest value.

    A task is gone within seconds, before it could be scraped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, tuple[Metric, dict[_Series, float]]] = {}

    def add(self, text: str) -> None:
        """Add what one task tells, in Prometheus' text format. Raises ValueError."""
        told = [
            family
            for family in text_string_to_metric_families(text)
            if not family.name.endswith("_created")  # of a process that is gone
        ]
        with self._lock:
            for family in told:
                _, values = self._families.setdefault(family.name, (family, {}))
                for sample in family.samples:
                    series = (sample.name, tuple(sample.labels.items()))
                    before = 0.0 if family.type == "gauge" else values.get(series, 0.0)
                    values[series] = before + sample.value

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        with self._lock:
            for family, values in self._families.values():
                metric = Metric(family.name, family.documentation, family.type)
                for (name, labels), value in values.items():
                    metric.samples.append(Sample(name, dict(labels), value))
                yield metric


TASK_COUNTS = TaskCounts()
REGISTRY.register(TASK_COUNTS)
