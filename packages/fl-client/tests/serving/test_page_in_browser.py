"""The page in Debian's chromium, clicked through while rows come in."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from icos_fl_client.serving.page import Page
from icos_fl_service.security import Security, load_security
from icos_fl_service.security import TlsSettings as NoTls
from icos_fl_service.testing import CONTRAST_MIN, PATIENCE_SECONDS, Browser, chromium

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def browse(driver: Any, service: Any) -> Iterator[Callable[..., Browser]]:
    """Opens the page of the running *service*, whose node has half an hour of CPU and no power."""
    pages: list[Page] = []

    def opened(security: Security = Security(), rows: int = 120, **how: Any) -> Browser:  # noqa: B008
        if not pages:
            service.append(cpu=[20.0 + n % 7 for n in range(rows)], power=[0.0] * rows)
            service.until_now()
        page = Page("127.0.0.1:0", service.board, service.follower, lambda: security, recorded=True)
        pages.append(page)
        browser = Browser(driver, f"http://127.0.0.1:{page.port}/")
        browser.open(**how)
        return browser

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


def test_a_horizon_without_an_interval_says_why_until_there_is_one(service, browse):
    browser = browse(rows=30)
    browser.until("#unsure", "No interval yet: fewer than 20 forecasts this far ahead have come to")
    minute, five_minutes = browser.text("#horizons").splitlines()[-2:]
    assert ("none yet" in minute, "none yet" in five_minutes) == (False, True)
    service.append(cpu=[20.0 + n % 7 for n in range(60)], power=[0.0] * 60)
    waiting = WebDriverWait(browser.driver, PATIENCE_SECONDS)
    waiting.until(lambda _: not browser.find("#unsure").is_displayed())
    assert "none yet" not in browser.text("#horizons")


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
    assert browser.width() <= width
    contrasts = browser.contrasts()
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
            "shared.js",
            "page.js",
            "api/forecasts",
            "api/record?node=a&metric=cpu",
            "api/record?node=a&metric=power",
        )
    }
    assert browser.errors() == []


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
    with browser.offline():
        browser.until("#state", "The forecaster does not answer; what is shown is old")
    browser.until("#state", "Recorded rows")
