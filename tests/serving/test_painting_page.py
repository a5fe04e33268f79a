"""The painting page in Chromium, with a server that requires an API key."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.serving import example_masks
from tests.browser import browser  # noqa: F401  a fixture
from tests.serving.painting import PaintingPage
from tests.serving.running import pixels, png, serving

KEY = "a-secret-key"
HAIR, SKIN, HAT = (CELEBAMASK_HQ.names.index(name) for name in ("hair", "skin", "hat"))
LEFT, RIGHT = (CELEBAMASK_HQ.names.index(name) for name in ("l_brow", "r_brow"))


def example(name):
    return pixels((example_masks.FOLDER / example_masks.file_name(name)).read_bytes())


@pytest.fixture(scope="module")
def page_server(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY)
    with serving(weights, "--max_batch", "4", "--api_key_file", str(file)) as running:
        yield running


@pytest.fixture(scope="module")
def unlocked(page_server, browser, tmp_path_factory):  # noqa: F811
    """The page after the key was typed, which the tab remembers."""
    page = PaintingPage(browser, page_server.url, tmp_path_factory.mktemp("downloads"))
    browser.open(page_server.url, width=1280, height=800)
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    assert "API key" in page.find("#key-reason").text
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.wait(lambda: page.find("#key").get_property("value") == "" and page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys(KEY, Keys.ENTER)
    page.wait(lambda: page.faces() > 0)
    return page


@pytest.fixture
def page(unlocked):
    """The page at its start. At the end there is no message of the console, and no request to another address."""
    unlocked.open()
    yield unlocked
    assert unlocked.browser.messages() == []
    requested = unlocked.browser.requests()
    assert all(url.startswith((f"{unlocked.url}/", f"blob:{unlocked.url}/")) for url in requested), requested


def test_painting_changes_mask_and_face_and_can_be_undone(page):
    mask, face = page.mask(), page.face()
    np.testing.assert_array_equal(mask, example("Long hair"))
    page.choose_class("hat")
    page.until_repainted(lambda: page.drag((0.2, 0.1), (0.5, 0.05), (0.8, 0.1)))
    painted, other_face = page.mask(), page.face()
    changed = painted != mask
    assert changed.sum() > 1000
    assert (painted[changed] == HAT).all()
    assert not np.array_equal(face, other_face)
    page.until_repainted(lambda: page.chord(Keys.CONTROL, "z"))
    np.testing.assert_array_equal(page.mask(), mask)
    np.testing.assert_array_equal(page.face(), face)
    page.until_repainted(lambda: page.click("#redo"))
    np.testing.assert_array_equal(page.mask(), painted)
    np.testing.assert_array_equal(page.face(), other_face)


def test_fill_takes_the_connected_area_of_one_class(page):
    mask = page.mask()
    page.choose("tool", "fill")
    page.choose_class("hat")
    page.until_repainted(lambda: page.drag((0.5, 0.05)))
    area = page.mask() == HAT
    assert area[int(0.05 * 256), 128]
    assert (mask[area] == HAIR).all()
    border = np.zeros_like(area)
    border[:-1] |= area[1:]
    border[1:] |= area[:-1]
    border[:, :-1] |= area[:, 1:]
    border[:, 1:] |= area[:, :-1]
    assert (mask[border & ~area] != HAIR).all()


@pytest.mark.parametrize("tool", ["line", "ellipse"])
def test_shapes_follow_the_pointer_and_are_one_step(page, tool):
    mask = page.mask()
    page.choose("tool", tool)
    page.choose_class("hat")
    page.until_repainted(lambda: page.drag((0.3, 0.3), (0.9, 0.9), (0.6, 0.5)))
    rows, columns = np.nonzero(page.mask() == HAT)
    width = 12 if tool == "line" else 0
    assert (rows.min(), rows.max()) == pytest.approx((0.3 * 256, 0.5 * 256), abs=width / 2 + 1)
    assert (columns.min(), columns.max()) == pytest.approx((0.3 * 256, 0.6 * 256), abs=width / 2 + 1)
    page.until_repainted(lambda: page.click("#undo"))
    np.testing.assert_array_equal(page.mask(), mask)


def test_eraser_and_eyedropper(page):
    page.choose("tool", "eyedropper")
    page.drag((0.5, 0.3))
    assert page.find("#current-class").text == "Skin"
    page.choose("tool", "eraser")
    page.until_repainted(lambda: page.drag((0.5, 0.3)))
    assert page.mask()[int(0.3 * 256), 128] == 0


def test_edges_are_hard_at_every_zoom(page):
    """Each pixel on the screen has the colour of a class, also where the zoom is no whole number."""
    page.choose_class("hat")
    page.drag((0.1, 0.15), (0.9, 0.2))
    for zoom in ("100 %", "150 %", "225 %"):
        page.wait(lambda zoom=zoom: page.find("#zoom-value").text == zoom)
        # The outline of the brush is drawn over the mask while the pointer is there.
        page.browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
        page.mask()  # raises for a colour that is no class's
        seen = pixels(page.find("#board-view").screenshot_as_png)[..., :3]
        colors = {tuple(color) for color in np.unique(seen[20:-20, 20:-20].reshape(-1, 3), axis=0).tolist()}
        assert colors <= {tuple(color) for color in CELEBAMASK_HQ.colors}
        page.click("#zoom-in")


def test_mirrored_drawing_swaps_left_and_right(page):
    page.click("#blank")
    page.click("#mirror")
    page.choose_class("l_brow")
    page.until_repainted(lambda: page.drag((0.6, 0.3), (0.8, 0.35)))
    mask = page.mask()
    assert (mask == LEFT).sum() > 300
    np.testing.assert_array_equal(mask[:, ::-1] == RIGHT, mask == LEFT)
    page.choose("tool", "fill")
    page.choose_class("skin")
    page.until_repainted(lambda: page.drag((0.5, 0.9)))
    np.testing.assert_array_equal(page.mask() == SKIN, mask == 0)


@pytest.mark.parametrize("form", ["indices", "palette", "colors"])
def test_loads_masks(page, tmp_path, form):
    mask = draw_face(7, 256)[1]
    image = Image.fromarray(mask)
    if form == "palette":
        image.putpalette(np.array(CELEBAMASK_HQ.colors, np.uint8).tobytes())
    if form == "colors":
        image = Image.fromarray(np.array(CELEBAMASK_HQ.colors, np.uint8)[mask])
    image.save(tmp_path / "mask.png")
    page.until_repainted(lambda: page.give("open-mask", tmp_path / "mask.png"))
    np.testing.assert_array_equal(page.mask(), mask)


def test_refuses_a_file_that_is_no_mask_and_continues(page, tmp_path):
    mask = page.mask()
    (tmp_path / "mask.png").write_bytes(png(np.full((8, 8, 3), (1, 2, 3), np.uint8)))
    page.give("open-mask", tmp_path / "mask.png")
    page.wait(lambda: "This is no mask" in page.banner())
    np.testing.assert_array_equal(page.mask(), mask)
    page.click("#banner-close")
    assert page.banner() == ""
    page.until_repainted(lambda: page.drag((0.5, 0.5)))


def test_a_photo_becomes_a_mask(page, page_server, tmp_path):
    photo = png(draw_face(3, 64)[0])
    (tmp_path / "photo.png").write_bytes(photo)
    headers = {"Content-Type": "image/png", "Authorization": f"Bearer {KEY}"}
    expected = pixels(page_server.client().post("/v1/segment", content=photo, headers=headers).content)
    page.until_repainted(lambda: page.give("open-photo", tmp_path / "photo.png"))
    scale = 256 // len(expected)
    np.testing.assert_array_equal(page.mask(), expected.repeat(scale, 0).repeat(scale, 1))


def test_edits_a_photo_where_its_mask_changes(page, tmp_path):
    photo = draw_face(3, 128)[0]
    (tmp_path / "anna.png").write_bytes(png(photo))
    page.until_repainted(lambda: page.choose("mode", "quality"))
    page.until_repainted(lambda: page.give("edit-photo", tmp_path / "anna.png"))
    assert page.find("#photo-name").text == "anna.png"
    before = page.mask()
    assert before.shape == (128, 128)
    page.choose_class("hat")
    page.until_repainted(lambda: page.drag((0.4, 0.15), (0.6, 0.15)))
    content = page.download("save-image", "anna_0.png")
    edited = pixels(content)
    assert edited.shape == photo.shape
    differs = (edited != photo).any(-1)
    rows, columns = np.nonzero(page.mask() != before)
    assert differs[rows, columns].mean() > 0.9
    # Nothing changes but the region and the band around it, 1/32 of the model's square, which is the photograph.
    assert not differs[rows.max() + 20 :].any()
    page.click("#undo")
    page.wait(lambda: page.find("#face").get_attribute("aria-label") == "Photograph anna.png")
    page.until_repainted(lambda: page.click("#stop-editing"))
    assert page.mask().shape == (256, 256)
    assert not page.find("#photo-bar").is_displayed()


def test_downloads(page):
    file = page.download("save-mask", "mask.png")
    assert Image.open(io.BytesIO(file)).mode == "L"
    mask = pixels(file)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, page.mask())
    np.testing.assert_array_equal(pixels(page.download("save-image", "face_0.png")), page.face())
    settings = json.loads(page.download("save-settings", "settings.json"))
    assert settings["seeds"] == [0]
    assert settings["solver"] == "euler"
    assert settings["model"].startswith("CelebAMask-HQ")


def test_a_link_reproduces_mask_settings_and_face(page):
    page.choose_class("hat")
    page.until_repainted(lambda: page.drag((0.2, 0.1), (0.8, 0.2)))
    page.until_repainted(lambda: page.slide("#guidance", 2.5))
    page.until_repainted(lambda: page.click("#new-person"))
    page.until_repainted(lambda: page.choose("count", 2))
    page.choose("variation", 1)
    seed, mask, face = page.find("#seed").get_property("value"), page.mask(), page.face()
    page.wait(lambda: "face=1" in page.browser.evaluate("location.hash"))
    fragment = page.browser.evaluate("location.hash")
    assert len(fragment) < 4000
    page.open()
    assert not np.array_equal(page.mask(), mask)
    page.driver.get("about:blank")
    page.open(fragment)
    np.testing.assert_array_equal(page.mask(), mask)
    np.testing.assert_array_equal(page.face(), face)
    assert page.find("#seed").get_property("value") == seed
    assert page.find("#guidance").get_property("value") == "2.5"


def test_a_damaged_link_is_refused_with_a_message(page):
    page.wait(lambda: "mask=" in page.browser.evaluate("location.hash"))
    fragment = page.browser.evaluate("location.hash")
    page.driver.get("about:blank")
    page.open(fragment[: len(fragment) // 2])
    assert "The link cannot be opened" in page.banner()
    np.testing.assert_array_equal(page.mask(), example("Long hair"))


def test_paints_by_keyboard_alone(page):
    mask = page.mask()
    page.keys(Keys.TAB, Keys.ENTER)  # the link to the mask
    assert page.browser.evaluate("document.activeElement.id") == "board-view"
    hat = CELEBAMASK_HQ.names.index("hat") - HAIR
    page.keys(*["."] * hat)
    assert page.find("#current-class").text == "Hat"
    page.until_repainted(lambda: page.keys(Keys.ENTER, *[Keys.ARROW_RIGHT] * 10, Keys.ENTER))
    changed = page.mask() != mask
    rows, columns = np.nonzero(changed)
    assert (page.mask()[changed] == HAT).all()
    assert columns.max() - columns.min() == pytest.approx(10 * 4 + 12, abs=1)
    assert rows.max() - rows.min() == pytest.approx(12, abs=1)
    page.wait(lambda: "Hat, column 169, row 129" in page.find("#announcer").get_attribute("textContent"))
    page.keys(Keys.ARROW_UP, *"o", Keys.SPACE, Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ESCAPE)
    np.testing.assert_array_equal(page.mask() != mask, changed)
    page.until_repainted(lambda: page.chord(Keys.CONTROL, "z"))
    np.testing.assert_array_equal(page.mask(), mask)
    page.keys("?")
    assert page.find("#shortcuts").is_displayed()
    page.keys(Keys.ESCAPE)
    assert not page.find("#shortcuts").is_displayed()


def test_one_finger_paints_and_two_zoom(page):
    page.open(width=390, height=844)
    mask = page.mask()
    page.choose_class("hat")
    page.until_repainted(lambda: page.touch([(0.2, 0.1), (0.5, 0.1), (0.8, 0.1)]))
    painted = page.mask()
    assert ((painted == HAT) == (painted != mask)).all()
    assert (painted == HAT).sum() > 1000
    page.touch([(0.4, 0.5), (0.3, 0.5), (0.2, 0.5)], [(0.6, 0.5), (0.7, 0.5), (0.8, 0.5)])
    assert float(page.find("#zoom-value").text.removesuffix("%")) > 150
    np.testing.assert_array_equal(page.mask(), painted)


def test_every_control_is_reached_by_the_tabulator(page):
    reached = []
    for _ in range(60):
        page.keys(Keys.TAB)
        name = page.browser.evaluate("document.activeElement.id || document.activeElement.name || ''")
        if name in reached and name not in ("", "board-view"):
            break
        reached.append(name)
    wanted = {"copy-link", "help", "class", "tool", "mirror", "undo", "redo", "board-view", "size", "zoom-in", "mode"}
    wanted |= {
        "new-person",
        "blank",
        "open-mask",
        "open-photo",
        "edit-photo",
        "steps",
        "guidance",
        "count",
        "seed",
        "keep",
    }
    assert wanted <= set(reached)


def test_a_new_person_after_each_stroke_unless_kept(page):
    seed = page.find("#seed").get_property("value")
    page.until_repainted(lambda: page.drag((0.5, 0.5)))
    assert page.find("#seed").get_property("value") == seed
    page.click("#keep")
    page.until_repainted(lambda: page.drag((0.4, 0.5)))
    assert page.find("#seed").get_property("value") != seed


def test_quality_streams_intermediate_faces(page):
    page.choose("mode", "quality")
    page.wait(page.is_idle)
    page.slide("#steps", 40)
    before = page.faces()
    page.until_repainted(lambda: page.drag((0.5, 0.5)))
    page.wait(lambda: page.browser.evaluate("document.getElementById('progress').hidden"))
    assert page.faces() - before >= 3


def test_variations_lie_side_by_side(page):
    page.until_repainted(lambda: page.choose("count", 4))
    face = page.face()
    assert len(page.driver.find_elements("css selector", "#variations canvas")) == 4
    page.choose("variation", 2)
    assert not np.array_equal(page.face(), face)
    page.choose("variation", 0)
    np.testing.assert_array_equal(page.face(), face)


def test_waits_for_a_server_that_is_gone_and_continues(page):
    page.browser.command("Network.enable")
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.command("Network.emulateNetworkConditions", offline=True, **conditions)
    face = page.face()
    page.drag((0.2, 0.2), (0.8, 0.2))
    page.wait(lambda: "cannot be reached" in page.banner())
    page.until_repainted(lambda: page.browser.command("Network.emulateNetworkConditions", offline=False, **conditions))
    page.wait(lambda: page.banner() == "")
    assert not np.array_equal(page.face(), face)
    assert all("ERR_INTERNET_DISCONNECTED" in message for message in page.browser.messages())


@pytest.mark.parametrize(
    ("status", "text"), [(503, "The server is starting. The page tries again in 1 s"), (422, "No.")]
)
def test_errors_of_the_server_are_shown(page, status, text):
    problem = json.dumps({"error": text.split(".")[0]})
    page.driver.execute_script(
        """const [status, problem] = arguments, send = window.fetch;
        window.fetch = async () => {
            window.fetch = send;
            return new Response(problem, {status, headers: {"Retry-After": "1"}});
        };""",
        status,
        problem,
    )
    page.drag((0.5, 0.5))
    page.wait(lambda: text in page.banner())
    if status == 422:
        page.until_repainted(lambda: page.click("#banner-retry"))
    page.wait(lambda: page.banner() == "")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, False), (1280, True)])
def test_accessible_and_within_the_width(page, width, dark):
    page.open(width=width, dark=dark)
    page.until_repainted(lambda: page.choose("count", 4))
    assert page.browser.evaluate("document.documentElement.scrollWidth") <= width
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    focusable = [node for node in nodes if any(one["name"] == "focusable" for one in node.get("properties", ()))]
    nameless = [node for node in focusable if not node["name"]["value"] and node["role"]["value"] != "RootWebArea"]
    assert len(focusable) > 50
    assert nameless == []
    if importlib.util.find_spec("axe_core_python") is None:
        pytest.skip("The package axe-core-python, which has axe-core, is not installed.")
    spec = importlib.util.find_spec("axe_core_python")
    page.driver.execute_script((Path(spec.origin).parent / "axe.min.js").read_text())
    for show in ("", "document.getElementById('shortcuts').showModal()") if width == 360 else ("",):
        page.driver.execute_script(show)
        found = page.driver.execute_async_script(
            "axe.run({resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
        )
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []


def test_example_masks_are_those_of_the_command():
    listed = json.loads((example_masks.FOLDER / "examples.json").read_text())
    assert listed == example_masks.listing()
    files = {file.name for file in example_masks.FOLDER.glob("*.png")}
    assert files == {example["file"] for example in listed["examples"]}
    np.testing.assert_array_equal(example("Glasses"), example_masks.example_mask("Glasses"))
