"""Serves the page: what the newest run does, or an older one did, and who is there."""

import signal
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from importlib import resources
from pathlib import Path

import structlog
from icos_fl_service import logs, status
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.metrics import Metrics, MetricsAddressError
from icos_fl_service.security import Security, SecurityError, load_security, renew_until_stopped
from icos_fl_service.settings import load_or_exit
from icos_fl_service.signals import Signals
from icos_fl_service.web import Refusal, WebPage

from icos_fl_server.enrolment.superlink import REMOVED, Node, SuperLink
from icos_fl_server.errors import ServerError
from icos_fl_server.history import Facts
from icos_fl_server.page.runs import Run, runs_in, told_of_node, told_of_nodes, told_of_run
from icos_fl_server.page.settings import PageSettings

DISTRIBUTION = "icos-fl-server"
ASK_SECONDS = 5.0
"""Between two questions to the SuperLink, which logs each."""

log = structlog.get_logger()


class Members:
    """Who is online: *superlink* is asked while somebody wants to know, from now to ``close``."""

    def __init__(self, superlink: SuperLink) -> None:
        self._superlink = superlink
        self._nodes: tuple[Node, ...] = ()
        self.why_not = "the SuperLink has not answered yet"
        """Why that is not known now; empty where it is."""
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="members", daemon=True)
        self._thread.start()

    def newest(self) -> tuple[Node, ...]:
        """Those that were not removed, as of the last answer; newer ones will be there later."""
        self._wanted.set()
        return self._nodes

    def close(self) -> None:
        """Ask no more."""
        self._closing.set()
        self._wanted.set()

    def _run(self) -> None:
        while self._wanted.wait() and not self._closing.is_set():
            self._wanted.clear()
            try:
                nodes = self._superlink.nodes()
                self._nodes = tuple(node for node in nodes if node.state != REMOVED)
                self.why_not = ""
            except Exception as error:  # of any kind: else it would not be asked again
                if not self.why_not:
                    log.warning("the SuperLink does not answer", reason=str(error))
                self.why_not = str(error) or type(error).__name__
            self._closing.wait(ASK_SECONDS)


class Page(WebPage):
    """Serves what is in *folder*, and who the *members* are where that is known: see WebPage."""

    def __init__(
        self,
        address: str,
        folder: Path,
        members: Members | None,
        security: Security,
    ) -> None:
        self._security = security
        self._folder = folder
        self._members = members
        static = resources.files("icos_fl_server.page") / "static"
        answers = {"/api/run": self._run, "/api/node": self._node}
        super().__init__(address, static, answers, lambda: self._security)

    def take_over(self, security: Security) -> None:
        """Connections from now on go by it."""
        self._security = security

    def _run(self, query: Mapping[str, str]) -> Facts:
        runs = runs_in(self._folder)
        run = self._chosen(runs, query)
        told: Facts = {
            "now": time.time(),
            "runs": [{"name": each.name, "written": each.written_unix_s} for each in runs],
            "name": run and run.name,
            "run": None,
            "nodes": [],
            "problem": "",
            "superlink": None if self._members is None else {"problem": self._members.why_not},
        }
        try:
            if run:
                history = run.history()
                told["run"] = told_of_run(history)
                told["nodes"] = told_of_nodes(history, run.of_nodes())
        except ServerError as error:
            told["problem"] = str(error)
        if self._members:
            newest = run is None or run == runs[0]
            _add_members(told["nodes"], self._members.newest(), newest=newest)
        return told

    def _node(self, query: Mapping[str, str]) -> Facts:
        run = self._chosen(runs_in(self._folder), query)
        if run is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "no run yet")
        try:
            return told_of_node(run.history(), run.of_nodes(), query.get("node", ""))
        except ServerError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None

    def _chosen(self, runs: list[Run], query: Mapping[str, str]) -> Run | None:
        """The one that is asked for, or the newest."""
        if "run" not in query:
            return runs[0] if runs else None
        for run in runs:
            if run.name == query["run"]:
                return run
        raise Refusal(HTTPStatus.NOT_FOUND, f"no run {query['run']!r}")


def _add_members(nodes: list[Facts], members: tuple[Node, ...], *, newest: bool) -> None:
    """Who is online, to *nodes* of a run; and if it is the *newest*, those that take no part.

    A node without a key has a new id at each start, and no name: the old ones are nobody.
    """
    by_id = {str(member.node_id): member for member in members}
    for node in nodes:
        node["online"] = _online(by_id.get(node["id"]))
    known = {node["id"] for node in nodes}
    for node_id, member in sorted(by_id.items(), key=lambda item: item[1].name):
        if newest and node_id not in known and (member.name or member.state != "offline"):
            name = member.name or f"id {node_id}"
            nodes.append({"name": name, "id": node_id, "last": None, "online": _online(member)})


def _online(member: Node | None) -> Facts:
    if member is None:
        return {"state": "unknown", "since": ""}
    return {"state": member.state, "since": member.since}


def serve() -> None:
    """``icos-fl-server page``: until SIGTERM or SIGINT; SIGHUP renews certificates and tokens."""
    settings = load_or_exit(PageSettings)
    logs.configure()
    logs.configure_libraries()
    signals = Signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        security = load_security(settings.tls, settings.tokens)
        members = settings.superlink and Members(SuperLink(settings.superlink, settings.authority))
        page = Page(settings.listen_address, settings.runs, members or None, security)
        metrics = Metrics(
            DISTRIBUTION,
            settings.metrics_address,
            settings.metrics_otlp_endpoint,
            lambda: status.of(DISTRIBUTION, "page"),
        )
    except (ListenError, MetricsAddressError, SecurityError) as error:
        sys.exit(f"icos-fl-server: {error}")
    log.info("page serves", address=settings.listen_address, port=page.port)
    renew_until_stopped(signals, settings, page.take_over)
    log.info("stopping")
    page.close()
    if members:
        members.close()
    metrics.close()
