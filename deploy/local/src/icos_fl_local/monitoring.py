"""A configuration for Prometheus that scrapes all parts of a deployment."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from icos_fl_local.deployment import HOST, RUN, Deployment, supernode

_FOLDER = Path(__file__).parents[3] / "monitoring"
_RULES = [_FOLDER / "alerts.yml", _FOLDER / "forecasts.yml"]
# As deploy/monitoring's example names them, which alerts and dashboard go by.
_SERVICE = {"backend": "store", "bridge": "otlp-bridge"}


def write(deployment: Deployment, source: str) -> None:
    """Write it into the state folder; with the alerts where this is the repository.

    *source* becomes a label of all: from recorded traces no new rows are to be expected.
    """
    nodes = {supernode(node): node for node in deployment.nodes}
    jobs: dict[str, list[dict[str, Any]]] = {"icos-fl": [], "icos-fl-run": []}
    for name, port in deployment.metrics_ports.items():
        labels = {"service": _SERVICE.get(name, name), "source": source}
        if name in nodes:
            labels |= {"service": "supernode", "node": nodes[name]}
        job = "icos-fl-run" if name == RUN else "icos-fl"
        jobs[job].append({"targets": [f"{HOST}:{port}"], "labels": labels})
    configuration = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [str(rules) for rules in _RULES if rules.is_file()],
        "scrape_configs": [
            {"job_name": job, "static_configs": targets} for job, targets in jobs.items()
        ],
    }
    with deployment.state.prometheus.open("w") as stream:
        YAML().dump(configuration, stream)
