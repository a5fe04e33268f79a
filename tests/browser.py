"""A headless Chromium for tests of pages: Debian's packages chromium and chromium-driver, driven by Selenium.

`make browser` installs them. Nothing is downloaded by the tests: pages are files, or come from a server on loopback.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium has none for root, who runs the tests in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
)


class Browser:
    """One page at a time, with what it logs and requests."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, page: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a file or an address at a viewport of `width` x `height` CSS pixels, and forgets what was logged."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(page if isinstance(page, str) else page.resolve().as_uri())

    def evaluate(self, expression: str) -> object:
        """Returns the value of a JavaScript expression in the page."""
        return self.driver.execute_script(f"return {expression};")

    def messages(self) -> list[str]:
        """Returns the errors and warnings of the console since the page was opened; each is returned once."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Returns the addresses that the page has requested since it was opened, without data URIs; each once."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [parameters["request"]["url"] for parameters in sent]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Writes the whole page, not only what is in the viewport, as a PNG file."""
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("window.innerWidth")
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.driver.save_screenshot(str(path))

    def command(self, name: str, **arguments: object) -> None:
        """Sends a command of the Chrome DevTools Protocol."""
        self.driver.execute_cdp_cmd(name, arguments)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Starts Chromium with an empty profile for the block; skips the test where Chromium is not installed.

    Args:
      profile: empty folder for the files of the browser.
    """
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("Chromium is not installed; `make browser` installs it on Debian.")
    options = Options()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With the path of the driver, Selenium does not look for one to download.
    driver = webdriver.Chrome(options=options, service=Service(executable_path=chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of a file, which imports this fixture."""
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
