"""The page in Debian's chromium, clicked through while rows come in."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from icos_fl_client.serving.page import Page
from icos_fl_service.security import Security, load_security
from icos_fl_service.security import TlsSettings as NoTls

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PATIENCE_SECONDS = 60
TOKEN = "a-token-that-is-long-enough"
CONTRAST_MIN = 4.5
CONTRASTS = """
const box = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const parts = (color) => {
  box.clearRect(0, 0, 1, 1);
  box.fillStyle = color;
  box.fillRect(0, 0, 1, 1);
  return [...box.getImageData(0, 0, 1, 1).data];
};
const luminance = (color) => {
  const [r, g, b] = parts(color).slice(0, 3).map((part) => part / 255).map(
    (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (of) => {
  for (; of; of = of.parentElement) {
    const color = getComputedStyle(of).backgroundColor;
    if (parts(color)[3] === 255) return color;
  }
  return "white";
};
const hasText = (of) => [...of.childNodes].some(
  (child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
const seen = [...document.querySelectorAll("body *")].filter(
  (of) => of.checkVisibility() && hasText(of));
return seen.map((of) => {
  const style = getComputedStyle(of);
  const color = of instanceof SVGElement ? style.fill : style.color;
  const [dark, light] = [luminance(color), luminance(ground(of))].sort((a, b) => a - b);
  return [(light + 0.05) / (dark + 0.05), of.textContent];
});
"""
"""Of every text that is seen to what is behind it, by WCAG 2's formula."""


class Browser:
    """Chromium with the page of *port*."""

    def __init__(self, driver: Any, port: int) -> None:
        self.driver = driver
        self.origin = f"http://127.0.0.1:{port}/"

    def open(self, width: int = 1280, *, dark: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(self.origin)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        )

    def until(self, selector: str, part: str) -> None:
        """Wait until what *selector* finds has *part* in its text."""
        waiting = WebDriverWait(self.driver, PATIENCE_SECONDS)
        waiting.until(lambda _: part in self.text(selector), f"{selector} has no {part!r}")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def tab_to(self, selector: str) -> Any:
        """Press Tab until what *selector* finds has the focus."""
        for _ in range(40):
            self.press(Keys.TAB)
            if self.driver.switch_to.active_element == self.find(selector):
                return self.find(selector)
        raise AssertionError(f"Tab does not come to {selector}")

    def requested(self) -> set[str]:
        """Addresses that were asked for since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {each["params"]["request"]["url"] for each in sent}


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Driver(programs[1]))
    yield found
    found.quit()


@pytest.fixture
def browse(driver: Any, service: Any) -> Iterator[Callable[..., Browser]]:
    """Opens the page of the running *service*, whose node has half an hour of CPU and no power."""
    service.append(cpu=[20.0 + n % 7 for n in range(120)], power=[0.0] * 120)
    service.until_now()
    pages = []

    def opened(security: Security = Security(), **how: Any) -> Browser:  # noqa: B008
        page = Page("127.0.0.1:0", service.board, service.follower, lambda: security, recorded=True)
        pages.append(page)
        browser = Browser(driver, page.port)
        browser.open(**how)
        return browser

    driver.get_log("browser")
    driver.get_log("performance")
    yield opened
    driver.get("about:blank")
    for page in pages:
        page.close()


def test_forecasts_are_there_and_move_on_as_rows_come(service, browse):
    browser = browse()
    browser.until("#title", "cpu of a")
    browser.until("#now", f"{20 + 119 % 7} %")
    browser.until("#horizons", "5 minutes")
    browser.until("#model", "No model takes part")
    service.append(cpu=[77.0], power=[0.0])
    browser.until("#now", "77 %")
    browser.until("#nodes", "77 %")


def test_a_new_round_of_the_federation_is_shown(service, browse, new_model):
    browser = browse()
    browser.until("#model", "No model takes part")
    service.store.model_state("a", "cpu").put(new_model(made_in=4))
    browser.until("#model", "Round 4 takes part")


def test_a_click_shows_another_metric_and_why_it_has_no_forecast(browse):
    browser = browse()
    browser.until("#nodes", "unavailable")
    browser.until("#nodes", "unavailable power: exactly 0")
    browser.find('#nodes a[href="#a/power"]').click()
    browser.until("#title", "power of a")
    browser.until("#none", "No forecast (unavailable): exactly 0")
    assert not browser.find("#expected").is_displayed()
    browser.driver.back()
    browser.until("#title", "cpu of a")


def test_it_is_used_by_keyboard_alone_and_shows_where_one_is(browse):
    browser = browse()
    browser.until("#nodes", "unavailable")
    link = browser.tab_to('#nodes a[href="#a/power"]')
    assert link.value_of_css_property("outline-style") == "solid"
    assert link.value_of_css_property("outline-width") == "3px"
    browser.press(Keys.ENTER)
    browser.until("#title", "power of a")
    browser.driver.back()
    browser.until("#title", "cpu of a")
    browser.tab_to("#ahead input:checked")
    browser.press(Keys.ARROW_LEFT)
    browser.until("#record figcaption", "1 minute before")
    browser.tab_to("#record summary")
    browser.press(Keys.ENTER)
    browser.until("#record table", "had been said")


def test_what_plots_show_is_said_in_words_and_numbers(browse):
    browser = browse()
    browser.until("#fared", "off by")
    label = browser.find("#record svg").get_attribute("aria-label")
    assert "what had been said 5 minutes before" in label
    browser.find("#record summary").click()
    browser.until("#record table", "80 % interval")
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#record tbody tr")) == 120


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(browse, width, dark):
    browser = browse(width=width, dark=dark)
    browser.until("#fared", "off by")
    wide = browser.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    contrasts = browser.driver.execute_script(CONTRASTS)
    assert [found for found in contrasts if found[0] < CONTRAST_MIN] == []
    assert len(contrasts) > 50


def test_nobody_else_is_asked_and_nothing_is_refused(browse):
    browser = browse()
    browser.until("#fared", "off by")
    browser.find('#nodes a[href="#a/power"]').click()
    browser.until("#title", "power of a")
    assert {url for url in browser.requested() if not url.startswith("data:")} <= {
        browser.origin + path
        for path in (
            "",
            "page.css",
            "page.js",
            "api/forecasts",
            "api/record?node=a&metric=cpu",
            "api/record?node=a&metric=power",
        )
    }
    told = [each for each in browser.driver.get_log("browser") if each["level"] == "SEVERE"]
    assert told == []


def test_it_asks_for_a_token_where_one_is_needed(browse, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(TOKEN)
    browser = browse(load_security(NoTls(), tokens))
    browser.until("#token", "This page asks for a token")
    assert not browser.find("#content").is_displayed()
    browser.find("#secret").send_keys("wrong", Keys.ENTER)
    browser.until("#state", "This token is not known")
    browser.find("#secret").send_keys(TOKEN, Keys.ENTER)
    browser.until("#fared", "off by")


def test_it_says_when_the_forecaster_is_gone(browse, service):
    browser = browse()
    browser.until("#state", "Recorded rows")
    browser.driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    try:
        browser.until("#state", "The forecaster does not answer; what is shown is old")
    finally:
        browser.driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
        )
    browser.until("#state", "Recorded rows")
