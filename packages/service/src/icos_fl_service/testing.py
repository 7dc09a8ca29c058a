"""What tests of every service need."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import ssl
from collections.abc import Iterator
from typing import Any, NoReturn

# Below the ports that Linux gives to outgoing connections (from 32,768 on), and beside those that
# the launcher takes (from 20,000 on). Tests that run side by side have ports of their own.
_FIRST = 10_000 + 2_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4)
_PORTS = range(_FIRST, _FIRST + 2_500)
_given: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens; never the same one twice in a process."""
    while True:
        port = secrets.choice(_PORTS)
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _given.add(port)
            return port


class WebClient:
    """Asks a page on *port* of this machine, over TLS where there is a *context*."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.port = port
        self._context = context

    def get(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """The answer, whatever its status."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if self._context:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=30, context=self._context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=names)
        return connection.getresponse()

    def json(self, path: str, **headers: str) -> Any:
        """What is answered with 200, in strict JSON. Raises AssertionError."""
        answer = self.get(path, **headers)
        text = answer.read().decode()
        assert answer.status == 200, text
        return json.loads(text, parse_constant=_no_json)


def _no_json(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


PATIENCE_SECONDS = 60
CONTRAST_MIN = 4.5
"""What WCAG 2 asks for at level AA."""
_CONTRASTS = """
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


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A driver of Debian's chromium; the test is skipped where that is not installed."""
    import pytest
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


class Browser:
    """Chromium with the page at *origin*, ``http://HOST:PORT/``; what it had logged is dropped."""

    def __init__(self, driver: Any, origin: str) -> None:
        self.driver = driver
        self.origin = origin
        driver.get_log("browser")
        driver.get_log("performance")

    def open(self, width: int = 1280, *, dark: bool = False) -> None:
        """Load the page in a window so wide, on a phone below 600."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(self.origin)

    def find(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """What is seen of the first element; nothing if there is none."""
        found: str = self.driver.execute_script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        )
        return found

    def until(self, selector: str, part: str, patience_seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until what *selector* finds has *part* in its text; returns that."""
        from selenium.webdriver.support.wait import WebDriverWait

        waiting = WebDriverWait(self.driver, patience_seconds)
        found: str = waiting.until(
            lambda _: part in (said := self.text(selector)) and said,
            f"{selector} has no {part!r}",
        )
        return found

    def press(self, *keys: str) -> None:
        """Keys, one after the other, where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def tab_to(self, selector: str) -> Any:
        """Press Tab until what *selector* finds has the focus."""
        for _ in range(40):
            self.press("\ue004")  # Tab
            if self.driver.switch_to.active_element == self.find(selector):
                return self.find(selector)
        raise AssertionError(f"Tab does not come to {selector}")

    def width(self) -> int:
        """Of all that there is to scroll to."""
        found: int = self.driver.execute_script("return document.documentElement.scrollWidth")
        return found

    def contrasts(self) -> list[tuple[float, str]]:
        """Of every text that is seen to what is behind it, by WCAG 2's formula."""
        found: list[tuple[float, str]] = self.driver.execute_script(_CONTRASTS)
        return found

    def requested(self) -> set[str]:
        """Addresses that were asked for since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [each for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {each["params"]["request"]["url"] for each in sent}

    def errors(self) -> list[str]:
        """What the console has of them since the last call."""
        told = self.driver.get_log("browser")
        return [each["message"] for each in told if each["level"] == "SEVERE"]

    @contextlib.contextmanager
    def offline(self) -> Iterator[None]:
        """While the block lasts, nobody can be reached."""
        limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        name = "Network.emulateNetworkConditions"
        self.driver.execute_cdp_cmd(name, {"offline": True, **limits})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd(name, {"offline": False, **limits})
