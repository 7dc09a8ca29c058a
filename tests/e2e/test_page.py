"""The pages of a deployment, clicked through in chromium while its nodes learn.

uv run pytest -m slow tests/e2e/test_page.py
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from icos_fl_service.testing import Browser, chromium

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

UP_SECONDS = 500
PAGE_SECONDS = 300
SMALL = ("time-step=20", "horizon=5", "local-epochs=1", "batch-size=256", "node-timeout=600")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "icos_fl_local", *arguments]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def kept(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a deployment of two nodes that have learned for one round."""
    folder = tmp_path_factory.mktemp("kept")
    up = command("up", "--keep", "--nodes", "2", "--rounds", "1")
    up += [part for setting in SMALL for part in ("-c", setting)]
    try:
        subprocess.run(up, cwd=folder, check=True, timeout=UP_SECONDS)
        yield folder
    finally:
        subprocess.run(command("down"), cwd=folder, check=False, timeout=120)


@pytest.fixture(scope="module")
def training(kept: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Goes on until it is asked to end."""
    with subprocess.Popen(command("train", "--rounds", "1000"), cwd=kept) as process:
        yield process
        subprocess.run(command("quiesce"), cwd=kept, check=False, timeout=UP_SECONDS)


def browse(driver: Any, kept: Path, page: str) -> Browser:
    found = subprocess.run(command("status", "--json"), cwd=kept, capture_output=True, check=False)
    browser = Browser(driver, json.loads(found.stdout)[page])
    browser.open()
    return browser


def links(browser: Browser, count: int) -> list[Any]:
    """Of the nodes, as soon as there are so many."""
    there = (By.CSS_SELECTOR, "#nodes a")
    waiting = WebDriverWait(browser.driver, PAGE_SECONDS)
    waiting.until(lambda driver: len(driver.find_elements(*there)) == count)
    return browser.driver.find_elements(*there)


def round_of(browser: Browser) -> int:
    """That is under way."""
    said = browser.until("#run", "It runs: round ", PAGE_SECONDS)
    return int(said.removeprefix("It runs: round ").split()[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_nodes_page_shows_every_metric_while_the_nodes_learn(driver, kept, training):
    browser = browse(driver, kept, "page")
    for link in links(browser, 5):  # the forecaster has gone through their rows
        link.click()
        node, metric = link.get_attribute("hash").removeprefix("#").split("/")
        browser.until("#title", f"{metric.replace('_', ' ')} of {node}", PAGE_SECONDS)
        browser.until("#fared", "times the error of repeating the last value", PAGE_SECONDS)
        assert browser.until("#horizons", "1 hour", PAGE_SECONDS).count("\n") == 3
        browser.until("#model", "takes part; the node got it at ", PAGE_SECONDS)
    assert training.poll() is None
    assert browser.errors() == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_controllers_page_shows_rounds_and_every_node_as_they_come(driver, kept, training):
    browser = browse(driver, kept, "controller_page")
    number = round_of(browser)
    WebDriverWait(driver, PAGE_SECONDS).until(lambda _: round_of(browser) >= number + 2)
    browser.until("#loss figcaption", "Solid: loss of the round's model")
    everybody, *nodes = links(browser, 3)
    for node in nodes:
        node.click()
        browser.until("#title", node.find_element(By.TAG_NAME, "span").text, PAGE_SECONDS)
        browser.until("#facts", "It is online since ", PAGE_SECONDS)
        for part in ("It took part in round ", "It runs icos-fl-client "):
            browser.until("#facts", part)
        for radio in driver.find_elements(By.CSS_SELECTOR, "#metrics input"):
            radio.click()
            metric = radio.get_attribute("value").replace("_", " ")
            label = browser.find("#loss svg").get_attribute("aria-label")
            if browser.text("#young"):  # pfe1 has no memory
                assert metric == "memory available mib"
            else:
                assert label.startswith(f"Loss of {metric}, {browser.text('#title')}: ")
    everybody.click()
    browser.until("#title", "All nodes")
    assert len(driver.find_elements(By.CSS_SELECTOR, "#by-node tbody tr")) == 5
    assert training.poll() is None
    subprocess.run(command("quiesce"), cwd=kept, check=True, timeout=UP_SECONDS)
    browser.until("#run", "It was asked to end", PAGE_SECONDS)
    browser.find("#runs option:last-child").click()
    browser.until("#run", "It is finished: 1 of 1 rounds", PAGE_SECONDS)
    assert browser.errors() == []
