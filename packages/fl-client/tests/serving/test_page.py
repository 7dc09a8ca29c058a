"""The page's own answers: what it tells of a node."""

import math
from collections.abc import Callable, Iterator

import pytest
from icos_fl_client.serving.board import Board
from icos_fl_client.serving.follower import Follower, Following
from icos_fl_client.serving.kept import KeptState
from icos_fl_client.serving.page import Page
from icos_fl_client.serving.settings import ForecasterSettings
from icos_fl_service.security import Security
from icos_fl_service.testing import WebClient


@pytest.fixture
def serve() -> Iterator[Callable[[Board, Follower], WebClient]]:
    """Serves the page of a board and its follower."""
    pages: list[Page] = []

    def made(board: Board, follower: Follower) -> WebClient:
        pages.append(Page("127.0.0.1:0", board, follower, Security, recorded=True))
        return WebClient(pages[-1].port)

    yield made
    for each in pages:
        each.close()


@pytest.fixture
def idle(serve) -> WebClient:
    """Of a page without rows."""
    return serve(Board(), Follower(Following(1, (1,)), Board(), KeptState(None)))


@pytest.fixture
def client(serve, service) -> WebClient:
    """Of the page of the running *service*."""
    return serve(service.board, service.follower)


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


@pytest.mark.parametrize("insecure", ["true", "false"])
def test_an_address_that_others_reach_needs_a_token(insecure):
    with pytest.raises(ValueError, match=r"TOKENS"):
        ForecasterSettings(page_address="0.0.0.0:8080", insecure=insecure)


def test_with_a_token_it_may_be_reached(tmp_path):
    settings = ForecasterSettings(
        page_address="0.0.0.0:8080", insecure=True, tokens=tmp_path / "tokens"
    )
    assert settings.page_address == "0.0.0.0:8080"
