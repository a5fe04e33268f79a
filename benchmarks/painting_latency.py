"""The painting page's latency in a real browser: from the end of a stroke to the new face.

    python run.py serve --weights faces.safetensors
    python -m benchmarks.painting_latency --url http://127.0.0.1:8000 --steps 1

Needs the packages of the group `dev`, and Chromium (`make browser`). Server and browser share the machine. A stroke is
drawn by mouse events, about 16 ms apart, in a random place and class. Its time runs from the time stamp of its last
movement, after which the mask does not change, to the task after the next frame with the face for the painted mask. The
button is released a little later. The first face is timed from the start of the navigation.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from tests.browser import open_browser
from tests.serving.painting import PaintingPage

_MOVES = 12
_MOVE_SECS = 0.016
_PAUSE_SECS = 0.3

# Collects one number per stroke. The listeners run before the page's own, so the time starts first.
_MEASURE = """
const [mask, face] = ['mask', 'face'].map((id) => document.getElementById(id));
window.latencies = [];
let moved = 0, isReleased = false, shown = {};
const record = () => {
  if (!isReleased || shown.version !== mask.dataset.version) return;
  isReleased = false;
  window.latencies.push(shown.time - moved);
};
addEventListener('pointerdown', (event) => { moved = event.timeStamp; }, true);
addEventListener('pointermove', (event) => { if (event.buttons) moved = event.timeStamp; }, true);
addEventListener('pointerup', () => { isReleased = true; setTimeout(record); }, true);
addEventListener('finished', () => {
  const version = face.dataset.version;
  requestAnimationFrame(() => setTimeout(() => { shown = {version, time: performance.now()}; record(); }));
});
"""


def _stroke(page: PaintingPage, rng: random.Random) -> None:
    """Draws a stroke as a hand does, and waits for its face."""
    page.choose("class", rng.choice([1, 2, 4, 5, 11, 12, 13, 14, 17, 18]))
    (x0, y0), (x1, y1) = [(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)) for _ in range(2)]
    done = len(page.browser.evaluate("window.latencies"))  # pyright: ignore
    page.press(x0, y0)
    for i in range(1, _MOVES + 1):
        page.move(x0 + (x1 - x0) * i / _MOVES, y0 + (y1 - y0) * i / _MOVES)
        time.sleep(_MOVE_SECS)
    page.release(x1, y1)
    page.wait(lambda: len(page.browser.evaluate("window.latencies")) > done)  # pyright: ignore
    time.sleep(_PAUSE_SECS)


def measure(url: str, strokes: int, steps: int, seed: int) -> dict[str, object]:
    """Returns the latencies of strokes.

    Args:
      url: of a running server.
      strokes: to measure, after three that are not.
      steps: of the sampler.
      seed: of places and classes.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder)) as browser:
        page = PaintingPage(browser, url, Path(folder))
        page.open()
        first = float(page.browser.evaluate("window.firstFace"))  # pyright: ignore
        page.slide("#steps", steps)
        page.driver.execute_script(_MEASURE)
        for _ in range(3):
            _stroke(page, rng)
        page.driver.execute_script("window.latencies.length = 0")
        load = os.getloadavg()[0]
        for _ in range(strokes):
            _stroke(page, rng)
        times = [float(one) for one in page.browser.evaluate("window.latencies")]  # pyright: ignore
    cuts = statistics.quantiles(times, n=20)
    return {
        "strokes": strokes,
        "steps": steps,
        "first_face_ms": round(first),
        "p50_ms": round(statistics.median(times), 1),
        "p95_ms": round(cuts[-1], 1),
        "max_ms": round(max(times), 1),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Prints the latencies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--strokes", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(measure(given.url, given.strokes, given.steps, given.seed), indent=2))


if __name__ == "__main__":
    main()
