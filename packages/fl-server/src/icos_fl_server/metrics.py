"""A run as Prometheus sees it while it lasts: what its history holds, told when it is scraped."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import structlog
from icos_fl_service import status
from icos_fl_service.metrics import Metrics, MetricsAddressError
from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from icos_fl_server.history import Facts

log = structlog.get_logger()


@contextlib.contextmanager
def told(facts: Facts, address: str) -> Iterator[None]:
    """Serve the *facts* of a history on *address* while the block lasts; not at all if it is empty.

    An address that cannot be used is a warning: no run fails for it.
    """
    with contextlib.ExitStack() as ending:
        if address:
            try:
                ending.callback(
                    Metrics("icos-fl-server", address, "", lambda: _status(facts)).close
                )
            except MetricsAddressError as error:
                log.warning("no metrics of this run", reason=str(error))
            collector = RunCollector(facts)
            REGISTRY.register(collector)
            ending.callback(REGISTRY.unregister, collector)
        yield


def _status(facts: Facts) -> Facts:
    run = {"id": facts["run"], "state": facts["state"], "reason": facts["reason"]}
    rounds = {"round": len(facts["rounds"]), "rounds": facts["rounds_total"]}
    return status.of("icos-fl-server", "run") | {"run": run | rounds}


class RunCollector(Collector):
    """Reads the facts of a history anew at each scrape."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        rounds = list(self._facts["rounds"])
        state = GaugeMetricFamily("icos_fl_run_state", "1 for the run's state", labels=["state"])
        state.add_metric([self._facts["state"]], 1)
        yield state
        yield GaugeMetricFamily(
            "icos_fl_run_rounds_planned", "Rounds of the run", self._facts["rounds_total"]
        )
        for word in ("finished", "skipped"):
            yield GaugeMetricFamily(
                f"icos_fl_run_rounds_{word}",
                f"Rounds that are {word}",
                sum(entry["state"] == word for entry in rounds),
            )
        ended = [entry for entry in rounds if entry["seconds"] is not None]
        if ended:
            yield GaugeMetricFamily(
                "icos_fl_run_last_round_seconds", "Time of the last round", ended[-1]["seconds"]
            )
        if rounds:
            yield _nodes(rounds[-1])
        for fact in ("train_loss", "eval_loss", "mae", "naive_mae"):
            yield _newest(rounds, fact)


def _nodes(entry: Facts) -> Metric:
    family = GaugeMetricFamily(
        "icos_fl_run_nodes", "Nodes of the newest round that have answered", labels=["state"]
    )
    states = Counter(node["state"] for node in list(entry["nodes"].values()))
    for word, count in states.items():
        family.add_metric([word], count)
    return family


def _newest(rounds: list[Facts], fact: str) -> Metric:
    """The newest value of *fact* that is known of each metric."""
    family = GaugeMetricFamily(f"icos_fl_run_{fact}", f"{fact} by metric", labels=["metric"])
    known = {}
    for entry in rounds:
        for metric, facts in list(entry["metrics"].items()):
            if facts.get(fact) is not None:
                known[metric] = facts[fact]
    for metric, value in known.items():
        family.add_metric([metric], value)
    return family
