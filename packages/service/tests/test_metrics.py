"""The /metrics of a service, over real HTTP."""

import json
import queue
import socket
import sys
import threading
import urllib.error
import urllib.request
from importlib.metadata import version

import pytest
from icos_fl_service import status as told
from icos_fl_service.metrics import Metrics, MetricsAddressError, check
from icos_fl_service.probe import Probe


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_metrics_are_served_until_the_end():
    metrics = Metrics("icos-fl-service", "127.0.0.1:0")
    assert 'icos_fl_service_info{service="icos-fl-service",version="' in scrape(metrics.port)
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics.port)


@pytest.fixture
def status():
    """The /status of this process."""
    metrics = Metrics("icos-fl-service", "127.0.0.1:0")

    def ask() -> dict[str, object]:
        url = f"http://127.0.0.1:{metrics.port}/status"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"] == "application/json"
            return json.load(answer)

    yield ask
    metrics.close()


def test_a_status_tells_version_and_health(status):
    assert status() == {
        "part": "service",
        "version": version("icos-fl-service"),
        "health": "healthy",
        "waits_for": "",
        "reason": "",
    }


def test_a_status_tells_what_a_probe_waits_for_and_why(status):
    changes, is_there = queue.Queue(), threading.Event()

    def ask():
        if not is_there.is_set():
            raise OSError("refused")

    probe = Probe(ask, changes.put, what="store")
    assert status()["reason"] == "the store has not answered yet"
    probe.start()
    assert changes.get(timeout=10) is False
    found = status()
    assert (found["health"], found["waits_for"], found["reason"]) == ("waiting", "store", "refused")
    is_there.set()
    assert changes.get(timeout=10) is True
    assert status()["health"] == "healthy"
    probe.stop(10)


def test_a_status_tells_what_else_is_known(status, monkeypatch):
    monkeypatch.setattr(told, "_facts", {})
    told.tell("windows", lambda: {"a": 3})
    assert status()["windows"] == {"a": 3}


def test_without_an_address_nothing_is_served():
    metrics = Metrics("icos-fl-service")
    assert metrics.port is None
    metrics.close()


@pytest.mark.parametrize(
    "try_address", [check, lambda address: Metrics("icos-fl-service", address)]
)
@pytest.mark.parametrize("port", [None, 70_000])
def test_an_address_that_cannot_be_used_is_one_line(port, try_address):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{port or taken.getsockname()[1]}"
        with pytest.raises(MetricsAddressError) as caught:
            try_address(address)
    assert str(caught.value).startswith(f"cannot serve metrics on {address}: ")


def test_an_address_is_free_again_after_it_was_checked():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    check(address)
    check("")
    metrics = Metrics("icos-fl-service", address)
    assert "icos_fl_service_info" in scrape(metrics.port)
    metrics.close()


@pytest.mark.parametrize(
    "try_endpoint",
    [
        lambda endpoint: check(otlp_endpoint=endpoint),
        lambda endpoint: Metrics("icos-fl-service", "127.0.0.1:0", endpoint),
    ],
)
def test_an_exporter_that_is_not_installed_is_one_line(try_endpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "icos_fl_service.otlp", None)
    with pytest.raises(MetricsAddressError) as caught:
        try_endpoint("http://a:4317")
    assert str(caught.value) == (
        "cannot export metrics to http://a:4317: install icos-fl-service[otlp]"
    )
