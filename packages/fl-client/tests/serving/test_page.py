"""The page's own answers: what it tells, to whom, and that a browser asks nobody else."""

import contextlib
import hashlib
import http.client
import json
import math
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme
from icos_fl_client.serving import page
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower, Following
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.page import Page
from icos_fl_client.serving.settings import ForecasterSettings
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.security import Security, TlsSettings, load_security

TOKEN = "a token that is long enough".replace(" ", "-")


class Client:
    """Asks a page on *port*."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.port = port
        self._context = context

    def get(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if self._context:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=30, context=self._context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=names)
        return connection.getresponse()

    def json(self, path: str, **headers: str) -> Any:
        answer = self.get(path, **headers)
        text = answer.read().decode()
        assert answer.status == 200, text
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Client]]:
    """Serves the page of a *service*, or of one without rows, as a Security says."""
    pages: list[Page] = []

    def made(security: Security = Security(), service: Any = None, context: Any = None) -> Client:  # noqa: B008
        board, follower = Board(), Follower(Following(1, (1,)), Board(), KeptState(None))
        if service:
            board, follower = service.board, service.follower
        pages.append(Page("127.0.0.1:0", board, follower, lambda: security, recorded=True))
        return Client(pages[-1].port, context)

    yield made
    for each in pages:
        each.close()


@pytest.fixture
def idle(serve) -> Client:
    """Of a page without rows."""
    return serve()


@pytest.fixture
def client(serve, service) -> Client:
    """Of the page of the running *service*."""
    return serve(service=service)


@pytest.fixture
def known_token() -> Security:
    return Security(token_digests=frozenset({hashlib.sha256(TOKEN.encode()).digest()}))


def test_it_tells_what_is_expected_of_each_metric(service, client):
    service.append(cpu=[10.0] * 30, power=[100.0] * 30)
    service.until_now()
    service.until_now("power")
    cpu, power = client.json("/api/forecasts")["forecasts"]
    assert (cpu["node"], cpu["metric"], cpu["unit"], cpu["value"]) == ("a", "cpu", "%", 10.0)
    assert [(each["ahead"], each["yhat"]) for each in cpu["horizons"]] == [("1m", 10), ("5m", 10)]
    assert power["value"] == 100.0


def test_before_twenty_have_finished_there_is_no_interval_and_json_has_no_nan(service, client):
    service.append(cpu=[10.0] * 10)
    service.until_now()
    (cpu,) = client.json("/api/forecasts")["forecasts"]
    assert cpu["horizons"][0]["lower_80"] is None


def test_a_metric_without_a_forecast_says_why(service, client):
    service.append(cpu=[float(n % 7) for n in range(20)], power=[0.0] * 20)
    service.until(lambda found: found.HasField("none"), "power")
    power = client.json("/api/forecasts")["forecasts"][1]
    assert power["none"]["reason"] == "unavailable"
    assert "yhat" not in power["horizons"][0]


def test_it_tells_how_full_windows_are_and_what_is_wrong_with_them(service, client):
    service.append(cpu=[float(n % 7) for n in range(20)], power=[0.0] * 20)
    service.until(lambda found: found.HasField("none"), "power")
    (node,) = client.json("/api/forecasts")["nodes"]
    assert (node["name"], node["rows"], node["capacity_rows"]) == ("a", 20, 10_000)
    assert [(e["column"], e["condition"]) for e in node["conditions"]] == [("power", "unavailable")]


def test_what_had_been_said_stands_at_the_step_that_it_was_of(service, client):
    service.append(cpu=[10.0] * 10 + [30.0] * 10)
    service.until_now()
    record = client.json("/api/record?node=a&metric=cpu")
    minute = record["horizons"][0]
    assert record["values"] == [10.0] * 10 + [30.0] * 10
    assert minute["yhat"][:4] == [None] * 4  # nobody had said anything of them
    assert minute["yhat"][4:10] == [10.0] * 6
    assert minute["yhat"][13] == 10.0  # what was said at the last step of the old level


def test_a_forecaster_is_compared_with_the_last_value_in_the_cases_in_which_it_spoke(
    service, client
):
    service.append(cpu=[10.0] * 10 + [30.0] * 10)
    service.until_now()
    minute = client.json("/api/record?node=a&metric=cpu")["horizons"][0]
    last = next(each for each in minute["errors"] if each["name"] == "last")
    # 16 steps were forecast; at the four after the change it was off by 20.
    assert (last["cases"], last["error"], last["ratio"]) == (16, 20 * 4 / 16, 1.0)
    said = next(each for each in minute["errors"] if each["name"] == "combination")
    assert said["cases"] == 16


def test_coverage_is_the_share_of_what_came_inside(service, client):
    service.append(cpu=[10.0 + n % 2 for n in range(100)])
    service.until_now()
    record = client.json("/api/record?node=a&metric=cpu")
    for horizon in record["horizons"]:
        bounds = zip(horizon["lower_80"], record["values"], horizon["upper_80"], strict=True)
        inside = [low <= came <= high for low, came, high in bounds if low is not None]
        assert math.isclose(sum(inside) / len(inside), horizon["coverage_80"], rel_tol=1e-5)


def test_what_nobody_follows_is_not_found(idle):
    assert idle.get("/api/record?node=a&metric=none").status == 404
    assert idle.get("/etc/passwd").status == 404
    assert idle.get("/../page.py").status == 404


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/api/forecasts", "/none"])
def test_every_answer_forbids_a_browser_to_ask_anybody_else(idle, path):
    policy = idle.get(path).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "*" not in policy


def test_nothing_is_changed_by_a_request(idle):
    assert idle.get("/api/forecasts", method="POST").status == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", ""])
def test_a_web_site_cannot_have_its_readers_browsers_ask_by_a_name_of_its_own(idle, host):
    answer = idle.get("/api/forecasts", Host=host)
    assert answer.status == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]", "[::1]:1"])
def test_who_sits_at_the_machine_is_answered(idle, host):
    assert idle.get("/api/forecasts", Host=host).status == 200


@pytest.mark.parametrize("path", ["/api/forecasts", "/api/record?node=a&metric=cpu"])
def test_where_there_are_tokens_nothing_is_told_without_one(serve, known_token, path):
    client = serve(known_token)
    assert client.get(path).status == 401
    assert client.get(path, Authorization=f"Bearer {TOKEN}x").status == 401
    assert client.get("/").status == 200


def test_who_has_a_token_may_call_it_by_any_name(serve, known_token):
    client = serve(known_token)
    answer = client.get("/api/forecasts", Authorization=f"Bearer {TOKEN}", Host="edge-1.example")
    assert answer.status == 200


def test_it_has_the_certificate_of_the_service(serve, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    key = tmp_path / "key.pem"
    key.touch(0o600)
    certificate.private_key_pem.write_to_path(key)
    tls = TlsSettings(certificate=tmp_path / "certificate.pem", key=key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = serve(load_security(tls, None), context=context)
    assert client.json("/api/forecasts")["nodes"] == []


def test_who_connects_and_says_nothing_takes_the_place_of_others_for_a_while_alone(
    idle, monkeypatch
):
    monkeypatch.setattr(page._Handler, "timeout", 5.0)
    with contextlib.ExitStack() as stack:
        for _ in range(page.CONNECTIONS_MAX):
            stack.enter_context(socket.create_connection(("127.0.0.1", idle.port)))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            idle.get("/")
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
                assert idle.get("/").status == 200
                break
            assert time.monotonic() < until


def test_a_port_that_is_taken_is_told(idle):
    follower = Follower(Following(1, (1,)), Board(), KeptState(None))
    with pytest.raises(ListenError, match=r"cannot serve the page on 127\.0\.0\.1:"):
        Page(f"127.0.0.1:{idle.port}", Board(), follower, Security)


@pytest.mark.parametrize("insecure", ["true", "false"])
def test_an_address_that_others_reach_needs_a_token(insecure):
    with pytest.raises(ValueError, match=r"TOKENS"):
        ForecasterSettings(page_address="0.0.0.0:8080", insecure=insecure)


def test_with_a_token_it_may_be_reached(tmp_path):
    settings = ForecasterSettings(
        page_address="0.0.0.0:8080", insecure=True, tokens=tmp_path / "tokens"
    )
    assert settings.page_address == "0.0.0.0:8080"
