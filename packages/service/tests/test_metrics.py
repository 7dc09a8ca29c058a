"""The /metrics of a service, over real HTTP."""

import socket
import sys
import urllib.error
import urllib.request

import pytest
from icos_fl_service.metrics import Metrics, MetricsAddressError, check


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_metrics_are_served_until_the_end():
    metrics = Metrics("icos-fl-service", "127.0.0.1:0")
    assert 'icos_fl_service_info{service="icos-fl-service",version="' in scrape(metrics.port)
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics.port)


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
