"""The forecaster's page of a deployment, clicked through in chromium while its nodes learn.

uv run pytest -m slow tests/e2e/test_page.py
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

UP_SECONDS = 250
PAGE_SECONDS = 120
SMALL = ("-c", "time-step=20", "-c", "horizon=5", "-c", "local-epochs=1", "-c", "batch-size=256")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "icos_fl_local", *arguments]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Driver(programs[1]))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def kept(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a deployment of two nodes that have learned for one round."""
    folder = tmp_path_factory.mktemp("kept")
    up = command("up", "--keep", "--nodes", "2", "--rounds", "1", *SMALL)
    try:
        subprocess.run(up, cwd=folder, check=True, timeout=UP_SECONDS)
        yield folder
    finally:
        subprocess.run(command("down"), cwd=folder, check=False, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_shows_every_metric_while_the_nodes_learn(driver: Any, kept: Path):
    found = subprocess.run(command("status", "--json"), cwd=kept, capture_output=True, check=False)
    waiting = WebDriverWait(driver, PAGE_SECONDS)

    def wait_for(selector: str, part: str) -> str:
        """What *selector* finds says, as soon as *part* is in it."""
        words = "return document.querySelector(arguments[0]).innerText"
        return waiting.until(
            lambda _: part in (said := driver.execute_script(words, selector)) and said,
            f"{selector} has no {part!r}",
        )

    with subprocess.Popen(command("train", "--rounds", "1000"), cwd=kept) as training:
        try:
            driver.get(json.loads(found.stdout)["page"])
            # Of all nodes: the forecaster has gone through their rows.
            waiting.until(lambda _: len(driver.find_elements(By.CSS_SELECTOR, "#nodes a")) == 5)
            links = driver.find_elements(By.CSS_SELECTOR, "#nodes a")
            for link in links:
                link.click()
                node, metric = link.get_attribute("hash").removeprefix("#").split("/")
                wait_for("#title", f"{metric.replace('_', ' ')} of {node}")
                wait_for("#fared", "times the error of repeating the last value")
                assert wait_for("#horizons", "1 hour").count("\n") == 3
                wait_for("#model", "takes part; the node got it at ")
            assert training.poll() is None
        finally:
            subprocess.run(command("quiesce"), cwd=kept, check=False, timeout=120)
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
