"""The page of runs in Debian's chromium, while a run goes on."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from icos_fl_server.page.service import Page
from icos_fl_service.security import Security, load_security
from icos_fl_service.security import TlsSettings as NoTls
from icos_fl_service.testing import CONTRAST_MIN, Browser, chromium

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.keys import Keys

HOSTILE = '<img src=x onerror=alert(1)> "&'
TOKEN = "a-token-that-is-long-enough"


class History:
    """A run of two metrics and two nodes, as a ServerApp writes it, round by round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {
            "run": "7",
            "state": "running",
            "reason": "",
            "metrics": ["cpu_usage", "power_consumption"],
            "rounds_total": 9,
            "nodes": {
                name: {"id": str(i), "metrics": {"cpu_usage": 1200}, "cause": "", "versions": told}
                for i, (name, told) in enumerate(
                    {"edge-1": ["icos-fl-client 0.3.0"], HOSTILE: []}.items()
                )
            },
            "rounds": [],
        }
        folder.mkdir()
        self.write()

    def round(self, **of_second: str) -> None:
        """One more, in which the second node does as *of_second* says."""
        number = len(self.facts["rounds"]) + 1
        facts = {"train_loss": 1 / number, "eval_loss": 1.1 / number, "mae": 2.0, "naive_mae": 4.0}
        of_metrics = dict.fromkeys(self.facts["metrics"], facts)
        good = {"state": "ok", "cause": ""}
        self.facts["rounds"].append(
            {
                "round": number,
                "state": "finished",
                "reason": "",
                "started_unix_s": 1.8e9,
                "seconds": 2.5,
                "metrics": of_metrics,
                "nodes": {"edge-1": good, HOSTILE: good | of_second},
            }
        )
        with (self.folder / "nodes.jsonl").open("a") as stream:
            stream.write(json.dumps({"round": number, "nodes": {"edge-1": of_metrics}}) + "\n")
        self.write()

    def write(self) -> None:
        (self.folder / "new").write_text(json.dumps(self.facts))
        (self.folder / "new").replace(self.folder / "history.json")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "0001")


@pytest.fixture
def browse(driver: Any, history: History) -> Iterator[Callable[..., Browser]]:
    """Opens the page of *history*."""
    pages = []

    def opened(security: Security = Security(), **how: Any) -> Browser:  # noqa: B008
        page = Page("127.0.0.1:0", history.folder.parent, None, security)
        pages.append(page)
        browser = Browser(driver, f"http://127.0.0.1:{page.port}/")
        browser.open(**how)
        return browser

    yield opened
    driver.get("about:blank")
    for page in pages:
        page.close()


def test_rounds_and_losses_are_shown_as_they_come(browse, history):
    browser = browse()
    browser.until("#run", "0 of 9 rounds")
    browser.until("#young", "No round has come to its end with cpu usage yet")
    history.round()
    browser.until("#run", "1 of 9 rounds")
    browser.until("#pace", "A round takes 2.5 s")
    history.round(state="silent", cause="no reply in 600 s")
    browser.until("#run", "2 of 9 rounds")
    browser.until("#nodes", "no reply in 600 s")
    label = browser.find("#loss svg").get_attribute("aria-label")
    assert label == "Loss of cpu usage, all nodes: 0.55 in round 2, 1.1 in round 1."
    browser.find("#loss summary").click()
    browser.until("#loss table", "0.55")
    history.facts |= {"state": "failed", "reason": "3 rounds in a row failed"}
    history.write()
    browser.until("#run", "It has failed: 2 of 9 rounds. 3 rounds in a row failed")


def test_a_name_that_is_markup_stays_text(browse, history):
    history.round(state="failed", cause="<script>alert(1)</script>")
    browser = browse()
    browser.until("#nodes", HOSTILE)
    browser.find("#nodes li:nth-child(2) a").click()
    browser.until("#title", HOSTILE)
    browser.until("#facts", "It failed in round 1: <script>alert(1)</script>")
    assert browser.driver.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.errors() == []


def test_a_node_tells_its_part_its_versions_and_errors(browse, history):
    history.round()
    browser = browse()
    browser.until("#nodes", "edge-1")
    browser.find('#nodes a[href="#edge-1"]').click()
    browser.until("#facts", "It took part in round 1.")
    browser.until("#facts", "It runs icos-fl-client 0.3.0.")
    browser.until("#by-node", "0.50")
    browser.until("#loss", "loss")
    label = browser.find("#error svg").get_attribute("aria-label")
    assert label == "Error of cpu usage, edge-1: 2 in round 1, of repeating the last value 4."
    browser.driver.back()
    browser.until("#title", "All nodes")


def test_it_is_used_by_keyboard_alone_and_shows_where_one_is(browse, history):
    history.round()
    browser = browse()
    browser.until("#nodes", "edge-1")
    link = browser.tab_to('#nodes a[href="#edge-1"]')
    assert link.value_of_css_property("outline-width") == "3px"
    browser.press(Keys.ENTER)
    browser.until("#title", "edge-1")
    browser.tab_to("#metrics input:checked")
    browser.press(Keys.ARROW_RIGHT)
    label = browser.find("#loss svg").get_attribute("aria-label")
    assert label.startswith("Loss of power consumption, edge-1")
    browser.tab_to("#loss summary")
    browser.press(Keys.ENTER)
    browser.until("#loss table", "last value's")


def test_an_older_run_can_be_chosen(browse, history, tmp_path):
    other = History(tmp_path / "0002")
    other.facts["state"] = "quiesced"
    other.write()
    browser = browse()
    browser.until("#run", "It was asked to end")
    browser.tab_to("#runs")
    browser.press(Keys.ARROW_DOWN)
    browser.until("#run", "It runs")
    browser.until("#state", "An older run")


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(browse, history, width, dark):
    history.round()
    history.round(state="silent", cause="no reply in 600 s")
    browser = browse(width=width, dark=dark)
    browser.until("#by-node", "0.50")
    assert browser.width() <= width
    contrasts = browser.contrasts()
    assert [found for found in contrasts if found[0] < CONTRAST_MIN] == []
    assert len(contrasts) > 40


def test_nobody_else_is_asked_and_nothing_is_refused(browse, history):
    history.round()
    browser = browse()
    browser.until("#by-node", "0.50")
    browser.find('#nodes a[href="#edge-1"]').click()
    browser.until("#title", "edge-1")
    assert {url for url in browser.requested() if not url.startswith("data:")} == {
        browser.origin + path
        for path in (
            "",
            "page.css",
            "shared.js",
            "page.js",
            "api/run",
            "api/node?run=0001&node=edge-1",
        )
    }
    assert browser.errors() == []


def test_it_asks_for_a_token_and_says_when_the_controller_is_gone(browse, history, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(TOKEN)
    browser = browse(load_security(NoTls(), tokens))
    browser.until("#token", "This page asks for a token")
    browser.find("#secret").send_keys(TOKEN, Keys.ENTER)
    browser.until("#state", "Live")
    with browser.offline():
        browser.until("#state", "The controller does not answer; what is shown is old")
    browser.until("#state", "Live")


def test_it_says_when_a_run_is_written_no_more(browse, history):
    history.round()
    os.utime(history.folder / "history.json", (1.7e9, 1.7e9))
    browser = browse()
    browser.until("#problem", "Nothing was written of this run for")
