"""The door: ``POST /enrol`` behind the gateway."""

import signal
import sys
import threading
import time

import structlog
import uvicorn
from icos_fl_service import logs, status
from icos_fl_service.metrics import Metrics, MetricsAddressError
from icos_fl_service.settings import load_or_exit, split_address
from icos_fl_warm_runtime.certificates import renew_at_sighup
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from icos_fl_server.enrolment.invitations import Invitations
from icos_fl_server.enrolment.refusals import Reason, Refused
from icos_fl_server.enrolment.settings import EnrolmentSettings
from icos_fl_server.enrolment.superlink import SuperLink, fingerprint, public_key_of

BODY_BYTES_MAX = 4096
REQUESTS_MAX = 32
"""At the same time; more are told 503. How many an address may send is the gateway's to bound."""

CLOCK_AHEAD_SECONDS, CLOCK_BEHIND_SECONDS = 5.0, 300.0
"""Flower refuses what a node has signed outside of this."""

_ENROLMENTS = Counter("icos_fl_enrolments", "Requests to join, by what came of them", ["result"])

log = structlog.get_logger()


class Enrolment(BaseModel):
    """What a node sends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=200)
    secret: str = Field(max_length=200)
    public_key: str = Field(max_length=1000)
    time_unix_s: float


class Door:
    """Takes nodes in, one after the other."""

    def __init__(self, invitations: Invitations, superlink: SuperLink, gateway: str) -> None:
        self._invitations = invitations
        self._superlink = superlink
        self._gateway = gateway
        self._one_at_a_time = threading.Lock()

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(routes=[Route("/enrol", self._post, methods=["POST"])])

    def enrol(self, asked: Enrolment) -> int:
        """The id of the node, which the SuperLink knows from now on. Raises Refused."""
        key = public_key_of(asked.public_key)
        public_key = " ".join(asked.public_key.split()[:2])  # without a comment
        with self._one_at_a_time, self._invitations.locked():
            self._invitations.check(asked.name, asked.secret, public_key)
            ahead = asked.time_unix_s - time.time()
            if not -CLOCK_BEHIND_SECONDS < ahead < CLOCK_AHEAD_SECONDS:
                where = "ahead of" if ahead > 0 else "behind"
                raise Refused(
                    Reason.CLOCK_OFF,
                    f"the node's clock is {abs(ahead):,.0f} s {where} the controller's, and Flower "
                    "would refuse what it signs: set both by NTP",
                )
            node_id = self._superlink.registered(key, asked.name)
            self._invitations.use(asked.name, public_key)
            node_id = node_id or self._superlink.register(key, asked.name)
        log.info("node enrolled", node=asked.name, node_id=node_id, key=fingerprint(key))
        return node_id

    async def _post(self, request: Request) -> Response:
        try:
            asked = _enrolment(await _body(request))
            node_id = await run_in_threadpool(self.enrol, asked)
        except Refused as refused:
            _ENROLMENTS.labels(refused.reason.label).inc()
            log.warning("node refused", reason=refused.reason.label)
            answer = {"error": refused.reason.label, "message": str(refused)}
            return JSONResponse(answer, refused.reason.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        _ENROLMENTS.labels("enrolled").inc()
        return JSONResponse(
            {"name": asked.name, "node_id": str(node_id), "superlink": self._gateway}
        )


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise Refused(Reason.REQUEST_TOO_LARGE, f"more than {BODY_BYTES_MAX} bytes")
    return body


def _enrolment(body: bytes) -> Enrolment:
    try:
        return Enrolment.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused(
            Reason.REQUEST_UNUSABLE, f"{where}: {first['msg']}" if where else first["msg"]
        ) from None


def serve() -> None:
    """``icos-fl-server enrolment``: until SIGTERM or SIGINT."""
    settings = load_or_exit(EnrolmentSettings)
    logs.configure()
    logs.configure_libraries()
    if not settings.gateway:
        sys.exit("icos-fl-server: ICOS_FL_ENROLMENT_GATEWAY: host:port of the gateway is needed")
    door = Door(
        Invitations(settings.folder),
        SuperLink(settings.superlink, settings.authority),
        settings.gateway,
    )
    host, port = split_address(settings.listen_address)
    config = uvicorn.Config(
        door.app(), host, port,
        ssl_certfile=settings.certificate, ssl_keyfile=str(settings.key),
        http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
        limit_concurrency=REQUESTS_MAX, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=15,
    )  # fmt: skip
    try:
        config.load()
    except OSError as error:  # of ssl, which does not say which file
        sys.exit(f"icos-fl-server: {settings.certificate} and {settings.key}: {error}")
    try:
        metrics = Metrics(
            "icos-fl-server",
            settings.metrics_address,
            settings.metrics_otlp_endpoint,
            lambda: status.of("icos-fl-server", "enrolment"),
        )
    except MetricsAddressError as error:
        sys.exit(f"icos-fl-server: {error}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn's own raise them again at their end
    renew_at_sighup()
    log.info("enrolment serves", address=settings.listen_address, superlink=settings.superlink)
    uvicorn.Server(config).run()
    metrics.close()
