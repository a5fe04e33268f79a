"""The painting page in a browser, as a person uses it: pointer, keyboard, files; and what is seen."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from sisma_jax.data.classes import CELEBAMASK_HQ
from tests.browser import Browser

COUNT_FACES = """addEventListener('face', () => {
    window.firstFace ??= performance.now();
    window.faces = (window.faces ?? 0) + 1;
});"""
_COLORS = {tuple(color): index for index, color in enumerate(CELEBAMASK_HQ.colors)}


class PaintingPage:
    """The page of a server.

    Attributes:
      browser: that shows the page.
      url: of the server.
      downloads: folder of the files that the page gives.
    """

    def __init__(self, browser: Browser, url: str, downloads: Path):
        self.browser, self.url, self.downloads = browser, url, downloads
        self.driver = browser.driver
        browser.command("Page.addScriptToEvaluateOnNewDocument", source=COUNT_FACES)
        browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def open(self, fragment: str = "", *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Opens the page, and waits for the first face."""
        self.browser.open(f"{self.url}/{fragment}", width=width, height=height, dark=dark)
        self.wait(lambda: self.faces() > 0 and self.is_idle())

    def wait(self, condition: Callable[[], object], secs: float = 30) -> None:
        WebDriverWait(self.driver, secs, poll_frequency=0.02).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def choose(self, name: str, value: object) -> None:
        """Clicks on a radio button, whose label covers it."""
        self.driver.execute_script("arguments[0].click()", self.find(f'input[name="{name}"][value="{value}"]'))

    def choose_class(self, name: str) -> None:
        self.choose("class", CELEBAMASK_HQ.names.index(name))

    def slide(self, slider: str, value: float) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.driver.execute_script(script, self.find(slider), value)

    def faces(self) -> int:
        """How often a face was drawn since the page was opened."""
        return int(self.browser.evaluate("window.faces ?? 0"))  # pyright: ignore

    def is_idle(self) -> bool:
        return self.browser.evaluate("document.getElementById('status').dataset.phase") == "idle"

    def until_repainted(self, act: Callable[[], object]) -> None:
        """Does something, and waits for the face that it leads to."""
        before = self.faces()
        act()
        self.wait(lambda: self.faces() > before and self.is_idle())

    def mask(self) -> np.ndarray:
        """Class indices of the mask, by the colours that its canvas shows; a colour of no class is an error."""
        colors = self.canvas("mask")
        assert (colors[..., 3] == 255).all()
        shown, positions = np.unique(colors[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
        labels = [_COLORS[tuple(int(part) for part in color)] for color in shown]
        return np.array(labels, np.uint8)[positions].reshape(colors.shape[:2])

    def face(self) -> np.ndarray:
        return self.canvas("face")[..., :3]

    def canvas(self, name: str) -> np.ndarray:
        """The RGBA pixels of a canvas, after the next frame is drawn."""
        script = """const done = arguments[arguments.length - 1];
            requestAnimationFrame(() => requestAnimationFrame(() =>
                done(document.getElementById(arguments[0]).toDataURL())))"""
        url = self.driver.execute_async_script(script, name)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place on the screen of a point of the mask, given as fractions of its sides."""
        area = self.browser.evaluate(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.getElementById('mask').getBoundingClientRect())"
        )
        left, top, width, height = area  # pyright: ignore
        return left + x * width, top + y * height

    def press(self, x: float, y: float) -> None:
        """Presses the mouse at a point of the mask, as fractions of its sides."""
        self._mouse("mousePressed", x, y, buttons=1)

    def move(self, x: float, y: float) -> None:
        self._mouse("mouseMoved", x, y, buttons=1)

    def release(self, x: float, y: float) -> None:
        self._mouse("mouseReleased", x, y, buttons=0)

    def drag(self, *points: Sequence[float]) -> None:
        """Presses the mouse at the first point, moves it, and releases it at the last; fractions of the mask."""
        self.press(*points[0])
        for point in points[1:]:
            self.move(*point)
        self.release(*points[-1])

    def touch(self, *fingers: Sequence[Sequence[float]]) -> None:
        """Moves fingers together, each along its points of the mask, as fractions of its sides."""
        for i, points in enumerate(zip(*fingers, strict=True)):
            places = [self.at(*point) for point in points]
            touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
            kind = "touchStart" if i == 0 else "touchMove"
            self.browser.command("Input.dispatchTouchEvent", type=kind, touchPoints=touches)
        self.browser.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _mouse(self, kind: str, x: float, y: float, buttons: int) -> None:
        left, top = self.at(x, y)
        self.browser.command(
            "Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", buttons=buttons, clickCount=1
        )

    def keys(self, *keys: str) -> None:
        """Types, with the focus where it is."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def chord(self, *keys: str) -> None:
        chain = ActionChains(self.driver, duration=0)
        for key in keys[:-1]:
            chain = chain.key_down(key)
        chain = chain.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            chain = chain.key_up(key)
        chain.perform()

    def give(self, button: str, file: Path) -> None:
        """Chooses a file in the dialog that a button opens."""
        self.find(f"#{button}-file").send_keys(str(file))

    def download(self, button: str, name: str) -> bytes:
        """Clicks on an entry of the menu, and returns the content of the file."""
        file = self.downloads / name
        file.unlink(missing_ok=True)
        self.click("#downloads summary")
        self.click(f"#{button}")
        self.wait(lambda: file.exists() and file.stat().st_size > 0)
        return file.read_bytes()

    def banner(self) -> str:
        """The text of the error that is shown, or nothing."""
        return self.find("#banner").text
