"""What a SuperLink, a SuperNode and a SuperExec say on /status."""

import argparse
import ssl
from importlib.metadata import entry_points
from typing import Any

import httpx
from icos_fl_service import status

from icos_fl_warm_runtime.long_poll import STATUS_PATH
from icos_fl_warm_runtime.worker import ENTRY_POINTS

_HOST_SECONDS = 2.0


def tell_of_retries(module: Any, what: str) -> None:
    """While *module*'s requests have to be repeated, it is *what* that the process waits for."""
    make = module.make_simple_http_retry_invoker

    def make_telling() -> Any:
        invoker = make()
        succeeded, failed = invoker.on_success, invoker.on_backoff

        def on_success(state: Any) -> None:
            status.has(what)
            succeeded(state)

        def on_backoff(state: Any) -> None:
            status.waits_for(what, str(state.exception) or type(state.exception).__name__)
            failed(state)

        invoker.on_success, invoker.on_backoff = on_success, on_backoff
        return invoker

    module.make_simple_http_retry_invoker = make_telling


def tell_of_runs(app: Any) -> None:
    """The newest run of a SuperLink, and how many nodes are online, in its status."""
    state = app.state.linkstate_factory.state

    def newest() -> dict[str, str] | None:
        runs = state().get_run_info(order_by="pending_at", ascending=False, limit=1)
        if not runs:
            return None
        told = runs[0].status
        words = ":".join(filter(None, (told.status, told.sub_status)))
        return {"id": str(runs[0].run_id), "state": words, "reason": told.details}

    status.tell("run", newest)
    status.tell("nodes_online", lambda: len(state().get_node_info(statuses=["online"])))


def status_of(name: str) -> dict[str, Any]:
    """Of this process, which is Flower's *name*, with the packages that its tasks are of."""
    command = "flwr-clientapp" if name == "supernode" else "flwr-serverapp"
    points = entry_points(group=ENTRY_POINTS[command]) if name != "superexec" else ()
    apps = {point.dist.name: point.dist.version for point in points if point.dist}
    return status.of("icos-fl-warm-runtime", name) | ({"apps": apps} if apps else {})


def status_of_host(name: str) -> dict[str, Any]:
    """Of the *name* that started this SuperExec, as it tells it itself."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runtime-api-address")
    parser.add_argument("--root-certificates")
    options = parser.parse_known_args()[0]
    scheme = "https" if options.root_certificates else "http"
    verify = ssl.create_default_context(cafile=options.root_certificates)
    url = f"{scheme}://{options.runtime_api_address}{STATUS_PATH}"
    try:
        facts: dict[str, Any] = httpx.get(url, verify=verify, timeout=_HOST_SECONDS).json()
    except (httpx.HTTPError, ValueError) as error:
        reason = f"it does not answer: {error or type(error).__name__}"
        return status_of(name) | {"health": "waiting", "waits_for": name, "reason": reason}
    return facts
