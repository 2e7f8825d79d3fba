"""The page of photos in a browser: what it shows first, its zoom, its divider."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acla.analysis import gallery

pytest.importorskip("jinja2", reason="needs the extra report")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HEIGHT, WIDTH, Y, X = 1500, 2000, 1100, 1600  # of a photo, and of the patch in it that changes
PROBE = """<script>
const [frame, pair] = [document.querySelector(".frame"), document.querySelector(".pair")];
const [menu, slider] = [document.getElementById("zoom"), pair.querySelector("input")];
const state = () => ({
  width: pair.offsetWidth, seen: frame.clientWidth,
  x: (frame.scrollLeft + frame.clientWidth / 2) / pair.offsetWidth,
  y: (frame.scrollTop + frame.clientHeight / 2) / pair.offsetHeight,
  cut: getComputedStyle(pair).getPropertyValue("--at"),
});
const pause = () => new Promise((done) => setTimeout(done, 200));
window.addEventListener("load", async () => {
  const states = {};
  await pause();
  states.open = state();
  for (const value of ["4", "fit", "1"]) {
    menu.value = value;
    menu.dispatchEvent(new Event("change"));
    await pause();
    states[value] = state();
  }
  slider.value = 25;
  slider.dispatchEvent(new Event("input"));
  states.moved = state();
  document.body.dataset.states = JSON.stringify(states);
});
</script>"""


class Body(HTMLParser):
    states = None

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            self.states = dict(attrs).get("data-states")


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, dict]:
    """What the page measures as it opens, at zooms, and with the divider moved."""
    if not BROWSER:
        pytest.skip("no chromium is installed")
    folder: Path = tmp_path_factory.mktemp("page")
    levels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    Image.fromarray(levels).save(folder / "a.jpg", quality=50)
    levels[Y - 40 : Y + 40, X - 40 : X + 40] = 200
    Image.fromarray(levels).save(folder / "b.png")
    page = folder / "page.html"
    gallery.main([str(folder / "a.jpg"), str(folder / "b.png"), str(page)])
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/p",
    ]
    command += ["--window-size=1000,800", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    body = Body()
    body.feed(done.stdout)
    return json.loads(body.states)


def test_it_opens_on_what_changed_most_pixel_by_pixel(states):
    first = states["open"]
    assert first["width"] == WIDTH > first["seen"]
    assert abs(first["x"] * WIDTH - X) < 200
    assert abs(first["y"] * HEIGHT - Y) < 200
    assert float(first["cut"]) == pytest.approx(X / WIDTH, abs=0.07)


def test_zoom_keeps_the_place(states):
    first, near, whole, again = (states[name] for name in ("open", "4", "fit", "1"))
    assert near["width"] == 4 * WIDTH
    assert whole["width"] <= 1000
    assert again["width"] == WIDTH
    for place in (near, again):
        assert abs(place["x"] - first["x"]) < 0.01
        assert abs(place["y"] - first["y"]) < 0.01


def test_the_divider_moves(states):
    assert float(states["moved"]["cut"]) == 0.25
