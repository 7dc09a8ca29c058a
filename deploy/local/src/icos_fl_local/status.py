"""What every part of a deployment says of itself, asked all at once on its /status."""

import http.client
import json
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from icos_fl_local.errors import UsageError
from icos_fl_local.state import StateFolder

_HOST = "127.0.0.1"
_ASK_SECONDS = 5.0
_CONNECT_SECONDS = 0.5
_RUN = "run"

Facts = dict[str, Any]


def of_addresses(addresses: Sequence[str], *, as_json: bool) -> int:
    """Print the status of the part at each address, ``[http://]HOST:PORT``.

    Return 0 if all of them and the newest run are well, else 1. Raises UsageError.
    """
    with ThreadPoolExecutor(len(addresses)) as threads:
        found = list(threads.map(_ask, addresses))
    print(json.dumps(found) if as_json else "\n".join(map(_line, found)))
    runs = [facts["run"]["state"] for facts in found if facts.get("run")]
    well = all(facts["health"] == "healthy" for facts in found)
    return 0 if well and not any(state.endswith("failed") for state in runs) else 1


def of_deployment(state: StateFolder, *, as_json: bool) -> int:
    """Print each component, the windows and the last run.

    Return 0 if nothing is wrong, 1 if a component or the last run is not well, and else, where
    something is wrong with a window, what ``icos-fl-store watch --once`` returns for it.
    """
    description = state.read_running()
    ports = description["metrics_ports"]
    with ThreadPoolExecutor(len(description["components"])) as threads:
        asked = {
            name: threads.submit(partial(_component, facts, ports.get(name)))
            for name, facts in description["components"].items()
        }
        components = {name: answer.result() for name, answer in asked.items()}
    windows = components["processor"].pop("windows", {})
    rows = {node: windows.get(node, {}).get("rows") or 0 for node in description["nodes"]}
    conditions = {node: windows[node]["conditions"] for node in rows if node in windows}
    worst = min((found[0]["exit_status"] for found in conditions.values() if found), default=0)
    last = _last_run(state, description["started_unix_s"])
    healthy = (
        description["state"] == "running"
        and all(facts["health"] == "healthy" for facts in components.values())
        and (last is None or last["state"] != "failed")
    )
    found = {
        "state": description["state"],
        "healthy": healthy and not worst,
        "quiesced": state.quiesced.exists(),
        "pid": description["pid"],
        "source": description["source"],
        "metrics": description["metrics"],
        "components": components,
        "page": description.get("page", ""),
        "controller_page": description.get("controller_page", ""),
        "prometheus": str(state.prometheus),
        "rows": rows,
        "conditions": conditions,
        "run": last,
    }
    print(json.dumps(found) if as_json else _text(found))
    return worst if healthy else 1


def _component(facts: Facts, metrics_port: int | None) -> Facts:
    """What is known of a component, with what it says itself if it says anything."""
    found = facts | {"metrics_port": metrics_port, "waits_for": "", "reason": ""}
    if facts["pid"] is None and "ended" in facts:
        told = {"health": "down", "reason": "it will be started again"}
    elif facts["pid"] is None or not Path(f"/proc/{facts['pid']}").exists():
        told = {"health": "down", "reason": "its process is not there"}
    elif not is_listening(facts["port"]):
        told = {"health": "down", "reason": f"nobody listens on port {facts['port']}"}
    elif metrics_port:
        told = _ask(f"{_HOST}:{metrics_port}")
        told.pop("address")
    else:
        told = {"health": "healthy"}
    return found | told | {"up": told["health"] != "down"}


def is_listening(port: int) -> bool:
    """Never asks for anything: a scrape of its own would freeze Scaphandre's values."""
    try:
        socket.create_connection((_HOST, port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _ask(address: str) -> Facts:
    """The status at *address*, or why there is none. Raises UsageError for no address."""
    url = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = url.port
    except ValueError:
        port = None
    if url.scheme not in ("http", "https") or not url.hostname or not port:
        raise UsageError(f"{address}: not of the form [http://]HOST:PORT")
    connection = (
        http.client.HTTPConnection(url.hostname, port, timeout=_ASK_SECONDS)
        if url.scheme == "http"
        else http.client.HTTPSConnection(
            url.hostname, port, timeout=_ASK_SECONDS, context=ssl.create_default_context()
        )
    )
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"it answers {answer.status} {answer.reason}")
        return {"address": address, **json.loads(body)}
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return {"address": address, "health": "down", "reason": f"no status: {reason}"}
    finally:
        connection.close()


def _last_run(state: StateFolder, since_unix_s: float) -> Facts | None:
    folder = state.last_run(since_unix_s)
    if folder is None:
        return None
    history = json.loads((folder / "history.json").read_text())
    rounds = history["rounds"]
    return {
        "folder": str(folder),
        "state": history["state"],
        "reason": history["reason"],
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": history["rounds_total"],
        "metrics": history["metrics"],
    }


def _line(facts: Facts) -> str:
    """Of a part that was asked by its address."""
    lines = [f"{_words(facts)} at {facts['address']}{_why(facts)}"]
    for window, found in facts.get("windows", {}).items():
        rows = "no rows" if found["rows"] is None else f"{found['rows']:,} rows"
        lines += [f"  window of {window}: {rows}", *_conditions(found["conditions"])]
    if run := facts.get("run"):
        reason = f": {run['reason']}" if run["reason"] else ""
        lines.append(f"  run {run['id']} {run['state']}{reason}")
    return "\n".join(lines)


def _words(facts: Facts) -> str:
    parts = [facts["health"], facts.get("part", ""), facts.get("version", "")]
    apps = ", ".join(f"{name} {version}" for name, version in facts.get("apps", {}).items())
    return " ".join(filter(None, parts)) + (f" ({apps})" if apps else "")


def _why(facts: Facts) -> str:
    waits = f"waits for {facts['waits_for']}: " if facts.get("waits_for") else ""
    return f"; {waits}{facts['reason']}" if facts.get("reason") else ""


def _text(found: Facts) -> str:
    quiesced = ", quiesced: no run begins" if found["quiesced"] else ""
    lines = [f"{found['state']} (pid {found['pid']}), source {found['source']}{quiesced}"]
    for name, facts in found["components"].items():
        metrics = f", metrics {facts['metrics_port']}" if facts["metrics_port"] else ""
        words = _words({**facts, "part": name})
        if ended := facts.get("ended"):
            metrics += f", died {ended['times']}×, last {ended['how']}"
        lines.append(
            f"  {words}: pid {facts['pid'] or '-'}, port {facts['port']}{metrics}{_why(facts)}"
        )
    for node, rows in found["rows"].items():
        lines += [f"  window of {node}: {rows:,} rows"]
        lines += [f"  {line}" for line in _conditions(found["conditions"].get(node, []))]
    last = found["run"]
    if last is None:
        lines.append("  no run yet")
    else:
        reason = f": {last['reason']}" if last["reason"] else ""
        lines.append(f"  run {last['state']}{reason}, round {last['round']} of {last['rounds']}")
    if found["page"]:
        lines.append(f"  look at its nodes: {found['page']}")
    if found["controller_page"]:
        lines.append(f"  look at its runs: {found['controller_page']}")
    lines.append(f"  monitor it: prometheus --config.file={found['prometheus']}")
    return "\n".join(lines)


def _conditions(found: Sequence[Facts]) -> list[str]:
    """A line for each thing that is wrong with a window."""
    return [
        f"  {' '.join(filter(None, [wrong['column'], wrong['condition']]))}: {wrong['reason']}"
        for wrong in found
    ]
