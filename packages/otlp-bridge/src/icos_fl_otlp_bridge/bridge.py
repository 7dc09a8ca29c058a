"""From a request to stored rows, whatever transport it came by."""

from collections import Counter
from dataclasses import dataclass, field

import structlog
from icos_fl_timeseries_store import InvalidRows, Store, StoreDamaged, Window
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from icos_fl_otlp_bridge import rows
from icos_fl_otlp_bridge.config import BridgeConfig
from icos_fl_otlp_bridge.rates import Rates
from icos_fl_otlp_bridge.reasons import Reason

NODE_LOG_CHARACTERS = 200
ERROR_LOG_CHARACTERS = 500

log = structlog.get_logger()


@dataclass
class Outcome:
    """What became of a request whose rows are stored."""

    rejected: Counter[Reason] = field(default_factory=Counter)
    """Points by reason."""
    without_rate: int = 0
    """Points that are the first of a counter, so that no rate could be computed yet."""
    points: int = 0
    """Points that were taken."""
    rows: int = 0
    """Rows that were stored."""


class Bridge:
    """Stores what a request holds for the configured columns. Any thread may call."""

    def __init__(self, config: BridgeConfig, store: Store, rates: Rates | None = None) -> None:
        self.metrics = config.metrics
        """Names of the metrics that a request needs to be parsed for."""
        self._config = config
        self._store = store
        self._converter = rows.Converter(config, rates)
        self._windows: dict[str, Window] = {}

    def convert(self, request: ExportMetricsServiceRequest) -> rows.Converted:
        """The request's rows, which take less memory than the request."""
        return self._converter.convert(request)

    def store(self, converted: rows.Converted) -> Outcome:
        """Store rows.

        Raises StoreUnavailable; the same request may then be sent again, whatever of it was stored:
        where one node's window is damaged, that is all of the others.
        """
        damaged: StoreDamaged | None = None
        outcome = Outcome(converted.rejected, converted.without_rate, converted.without_rate)
        if converted.unmatched_resources:
            log.debug("resources for others", count=converted.unmatched_resources)
        for node, node_rows in converted.rows.items():
            points = int(node_rows.points_t.sum())
            if node not in self._windows and len(self._windows) >= self._config.nodes_max:
                outcome.rejected[Reason.TOO_MANY_NODES] += points
                continue
            try:
                appended = self._window(node).append(
                    node_rows.columns,
                    node_rows.times_ns_t,
                    node_rows.values_tf,
                    {name: self._converter.units[name] for name in node_rows.columns},
                )
            except InvalidRows as error:
                reason = str(error)[:ERROR_LOG_CHARACTERS]
                log.warning("rows refused", node=node[:NODE_LOG_CHARACTERS], error=reason)
                outcome.rejected[Reason.INVALID_NODE] += points
                continue
            except StoreDamaged as error:
                damaged = error
                continue
            # Those too old are the first: rows come in order of time.
            too_old = int(node_rows.points_t[: appended.too_old].sum())
            outcome.rejected[Reason.TOO_OLD] += too_old
            outcome.points += points - too_old
            outcome.rows += appended.added + appended.merged
        if damaged:
            raise damaged
        outcome.rejected = +outcome.rejected
        return outcome

    def _window(self, node: str) -> Window:
        if node not in self._windows:
            self._windows[node] = self._store.create_window(node, self._config.window_rows)
        return self._windows[node]
