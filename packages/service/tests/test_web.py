"""A page's files and answers: to whom it tells what, and that a browser asks nobody else."""

import contextlib
import hashlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import trustme
from icos_fl_service import web
from icos_fl_service.grpc_server import ListenError
from icos_fl_service.security import Security, TlsSettings, load_security
from icos_fl_service.testing import WebClient
from icos_fl_service.web import Refusal, WebPage

TOKEN = "a token that is long enough".replace(" ", "-")


def tea(query: Any) -> Any:
    if query.get("kind", "mint") != "mint":
        raise Refusal(HTTPStatus.NOT_FOUND, "mint alone")
    return {"tea": "mint"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Of a page's own."""
    (tmp_path / "page.html").write_text("<!doctype html><title>Tea</title>")
    (tmp_path / "page.js").write_text('"use strict";')
    return tmp_path


@pytest.fixture
def serve(files: Path) -> Iterator[Callable[..., WebClient]]:
    """Serves tea as a Security says."""
    pages: list[WebPage] = []

    def made(security: Security = Security(), context: Any = None) -> WebClient:  # noqa: B008
        pages.append(WebPage("127.0.0.1:0", files, {"/api/tea": tea}, lambda: security))
        return WebClient(pages[-1].port, context)

    yield made
    for each in pages:
        each.close()


@pytest.fixture
def client(serve) -> WebClient:
    return serve()


@pytest.fixture
def known_token() -> Security:
    return Security(token_digests=frozenset({hashlib.sha256(TOKEN.encode()).digest()}))


def test_it_has_the_pages_own_files_and_those_of_every_page(client):
    assert client.get("/").read() == b"<!doctype html><title>Tea</title>"
    assert client.get("/page.js").headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert b"function plot(" in client.get("/shared.js").read()
    assert client.get("/page.css").headers["Content-Type"] == "text/css; charset=utf-8"


def test_what_is_answered_goes_by_the_query(client):
    assert client.json("/api/tea?kind=mint") == {"tea": "mint"}
    answer = client.get("/api/tea?kind=green")
    assert (answer.status, answer.read()) == (404, b"mint alone")


@pytest.mark.parametrize("path", ["/none", "/etc/passwd", "/../web.py", "//page.html"])
def test_what_is_not_there_is_not_found(client, path):
    assert client.get(path).status == 404


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/shared.js", "/api/tea", "/none"])
def test_every_answer_forbids_a_browser_to_ask_anybody_else(client, path):
    policy = client.get(path).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "*" not in policy


def test_nothing_is_changed_by_a_request(client):
    assert client.get("/api/tea", method="POST").status == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", ""])
def test_a_web_site_cannot_have_its_readers_browsers_ask_by_a_name_of_its_own(client, host):
    answer = client.get("/api/tea", Host=host)
    assert answer.status == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]", "[::1]:1"])
def test_who_sits_at_the_machine_is_answered(client, host):
    assert client.get("/api/tea", Host=host).status == 200


@pytest.mark.parametrize("path", ["/api/tea", "/none"])
def test_where_there_are_tokens_nothing_is_told_without_one(serve, known_token, path):
    client = serve(known_token)
    assert client.get(path).status == 401
    assert client.get(path, Authorization=f"Bearer {TOKEN}x").status == 401
    assert client.get("/").status == 200


def test_who_has_a_token_may_call_it_by_any_name(serve, known_token):
    client = serve(known_token)
    answer = client.get("/api/tea", Authorization=f"Bearer {TOKEN}", Host="edge-1.example")
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
    assert client.json("/api/tea") == {"tea": "mint"}


def test_who_connects_and_says_nothing_takes_the_place_of_others_for_a_while_alone(
    client, monkeypatch
):
    monkeypatch.setattr(web._Handler, "timeout", 5.0)
    with contextlib.ExitStack() as stack:
        for _ in range(web.CONNECTIONS_MAX):
            stack.enter_context(socket.create_connection(("127.0.0.1", client.port)))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.get("/")
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
                assert client.get("/").status == 200
                break
            assert time.monotonic() < until


def test_a_port_that_is_taken_is_told(client, files):
    with pytest.raises(ListenError, match=r"cannot serve the page on 127\.0\.0\.1:"):
        WebPage(f"127.0.0.1:{client.port}", files, {}, Security)


@pytest.mark.parametrize("address", ["0.0.0.0:80", "[::]:80", "edge-1:80"])
def test_readers_on_other_machines_need_a_token(address, tmp_path):
    with pytest.raises(ValueError, match=r"other machines reach the page on .*: give TOKENS"):
        web.check_readers(address, None)
    web.check_readers(address, tmp_path / "tokens")


@pytest.mark.parametrize("address", ["", "127.0.0.1:80", "localhost:0"])
def test_nobody_else_reads_a_page_on_loopback(address):
    web.check_readers(address, None)
