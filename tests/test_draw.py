"""page/draw.html in a headless Chromium, as a user would: draw, save, open again, and let the product read the files.

Chromium is driven through chromedriver in the W3C WebDriver protocol, plain JSON over HTTP; without both of them the
tests are skipped. A picture of the page, for the README:

    PYTHONPATH=. python tests/test_draw.py draw.png [picture.png arrows.json [ids.png]]
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from inputs import Arrows, apply_shapes, arrows_to_flow, read_rgb, read_segmentation
from inputs.find import grow_region
from show import color_wheel, flow_to_rgb

PAGE = Path(__file__).parents[1] / "page" / "draw.html"
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    "chromedriver": ("chromedriver",),
}
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --force-color-profile=srgb"""
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's JSON
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to this machine: never through a proxy


def program(name):
    return next(filter(None, map(shutil.which, PROGRAMS[name])), None)


needs_browser = pytest.mark.skipif(
    not (program("chromium") and program("chromedriver")), reason="needs chromium and chromedriver on the PATH"
)


class Browser:
    """A page of headless Chromium. Places are in pixels of the picture."""

    def __init__(self, folder, size=(1280, 800)):
        self.downloads = Path(folder) / "downloads"
        self.downloads.mkdir()
        command = [program("chromedriver"), "--port=0"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = next(line.split()[-1].rstrip(".") for line in self.driver.stdout if "successfully on port" in line)
        self.url = f"http://127.0.0.1:{port}/session"
        preferences = {
            "download.default_directory": str(self.downloads),
            "profile.default_content_setting_values.automatic_downloads": 1,
        }
        options = {
            "binary": program("chromium"),
            "args": [*FLAGS.split(), f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}"],
            "prefs": preferences,
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "unhandledPromptBehavior": "accept"}
        try:
            session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.kill()
            raise
        self.url += f"/{session['sessionId']}"
        self.ask("POST", "/timeouts", {"script": 20000})
        self.ask("POST", "/url", {"url": PAGE.as_uri()})

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with DIRECT.open(request, timeout=30) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def js(self, script, *arguments):
        return self.ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def find(self, name):
        return self.ask("POST", "/element", {"using": "css selector", "value": f"#{name}"})[ELEMENT]

    def click(self, name):
        self.ask("POST", f"/element/{self.find(name)}/click", {})

    def press(self, keys):
        """Keys one after the other; modifiers by WebDriver's code points are held until the end."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def open(self, *paths):
        """Chooses files in the page's file dialog, and waits until the page has read them."""
        self.js("$('help').textContent = ''; unsaved = false")  # no question about what is drawn
        text = "\n".join(str(path) for path in paths)
        self.ask("POST", f"/element/{self.find('files')}/value", {"text": text})
        return self.status()

    def status(self):
        for _ in range(200):
            text = self.js("return $('help').textContent")
            if text:
                return text
            time.sleep(0.02)
        raise TimeoutError("the page says nothing")

    def drag(self, *places, kind="mouse"):
        """Presses at the first place and moves over the others; one place is a click."""
        left, top, zoom = self.js("const f = $('paper').getBoundingClientRect(); return [f.left, f.top, zoom]")
        moves = [
            {"type": "pointerMove", "duration": 0, "x": round(left + x * zoom), "y": round(top + y * zoom)}
            for x, y in places
        ]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self.ask("POST", "/actions", {"actions": [pointer]})

    def slide(self, name, value):
        self.js("$(arguments[0]).value = arguments[1]; $(arguments[0]).oninput()", name, value)

    def work(self):
        """What undo goes back to: ids [H, W] and the rest."""
        work = self.js("return {...work, ids: [...work.ids], size: [height, width]}")
        ids = np.array(work.pop("ids"), np.uint8).reshape(work.pop("size"))
        return ids, work

    def save(self):
        """Presses Save -> the folder with what came, and its arrows.json."""
        before = set(self.downloads.iterdir())
        self.js("$('help').textContent = ''")
        self.click("save")
        name = self.status().split()[-1]
        for _ in range(200):
            new = set(self.downloads.iterdir()) - before
            if self.downloads / name in new and not any(path.suffix == ".crdownload" for path in new):
                return self.downloads / name
            time.sleep(0.02)
        raise TimeoutError(f"no {name} among {[path.name for path in new]}")

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))


@contextlib.contextmanager
def browser(**settings):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Browser(folder, **settings)
        try:
            yield page
        finally:
            page.close()


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


def scene(path, width=200, height=120):
    """A red disk and a blue box on a wall that gets darker, with some noise; all edges are sharp."""
    rng = np.random.default_rng(0)
    wall = 170 - 0.2 * np.arange(width)[None, :, None] - 0.3 * np.arange(height)[:, None, None] + np.zeros(3)
    image = Image.fromarray((wall + rng.normal(0, 2, wall.shape)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse([30, 40, 70, 80], fill=(200, 50, 40))
    draw.rectangle([120, 30, 159, 89], fill=(40, 70, 190))
    image.save(path)
    return path


@pytest.fixture
def picture(tmp_path, page):
    path = scene(tmp_path / "photo.png")
    assert "200 x 120" in page.open(path)
    page.press("a")
    return path


def product_reads(path, picture, frames=14):
    """What sample.py does with a picture and its arrows.json -> arrows, ids, F [2, H, W]."""
    arrows = Arrows.load(path)
    ids = read_segmentation(arrows.segmentation) if arrows.segmentation else None
    arrows, ids, told = apply_shapes(arrows, read_rgb(picture), ids)
    assert ids.shape == read_rgb(picture).shape[:2]
    assert bool(told) == (arrows.segmentation is None and len(arrows.arrows) > 0)
    return arrows, ids, arrows_to_flow(arrows, torch.from_numpy(ids).long(), frames)


def centre_mask(inside):
    y, x = np.mgrid[:120, :200] + 0.5
    return inside(x, y)


def overlay(page):
    """The painted layer of the page, uint8 [H, W, 4]."""
    values = page.js(
        "const c = $('overlay'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let s = ''; for (let i = 0; i < d.length; i += 4096) s += String.fromCharCode(...d.subarray(i, i + 4096));"
        "return btoa(s)"
    )
    return np.frombuffer(base64.b64decode(values), np.uint8).reshape(120, 200, 4)


@needs_browser
def test_click_drag_save_and_go_on(page, picture):
    page.click("tool-grow")
    page.drag((50, 60))
    page.click("tool-arrow")
    page.drag((50, 60), (80, 50), (95, 40))
    page.drag((140, 60), (140, 100), kind="touch")  # not marked yet: found by its colour
    saved = page.save()
    arrows, ids, F = product_reads(saved, picture)

    assert Image.open(arrows.segmentation).mode == "L"
    rgb = read_rgb(picture)
    for number, start in ((1, (50, 60)), (2, (140, 60))):
        theirs = grow_region(rgb, start)
        assert theirs.sum() > 1000 and (theirs != (ids == number)).mean() < 0.0005
    zoom = page.js("return zoom")
    for arrow, start, end in zip(arrows.arrows, ((50, 60), (140, 60)), ((95, 40), (140, 100)), strict=True):
        assert np.allclose([arrow.start, arrow.end], [start, end], atol=0.1 + 1 / zoom)
        v = np.subtract(arrow.end, arrow.start) / 13
        assert np.allclose(F[:, torch.from_numpy(ids == arrow.instance)].numpy(), v[:, None], atol=1e-6)
    assert (F[:, torch.from_numpy(ids == 0)] == 0).all()

    text, picture_of_ids = saved.read_bytes(), Path(arrows.segmentation).read_bytes()
    page.open(picture)  # nothing is drawn on it
    assert not page.work()[0].any()
    assert "2 arrows" in page.open(saved, arrows.segmentation)
    again = page.save()
    assert Path(Arrows.load(again).segmentation).read_bytes() == picture_of_ids
    stem = Path(arrows.segmentation).name
    assert again.read_bytes() == text.replace(stem.encode(), Path(Arrows.load(again).segmentation).name.encode())


@needs_browser
def test_a_large_photo_is_grown_as_the_product_does(page, tmp_path):
    """Both make it smaller first, here by 3; arrows and ids keep the pixels of the photo."""
    small = Image.open(scene(tmp_path / "small.png"))
    photo = tmp_path / "photo.png"
    small.resize((1403, 842), Image.Resampling.BICUBIC).save(photo)
    page.open(photo)
    page.drag((350, 420), (560, 350))
    saved = page.save()
    arrows, ids, F = product_reads(saved, photo)
    theirs = grow_region(read_rgb(photo), (350, 420))
    assert ids.shape == (842, 1403) and 0.04 < theirs.mean() < 0.07
    assert (theirs != (ids == 1)).mean() < 0.0005
    assert np.allclose(F[:, 420, 350], np.subtract(arrows.arrows[0].end, arrows.arrows[0].start) / 13, atol=1e-5)


@needs_browser
def test_a_photo_is_upright_here_and_there(page, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    Image.open(scene(tmp_path / "lying.png")).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    assert "120 x 200" in page.open(tmp_path / "photo.jpg")
    page.press("a")
    page.drag((60, 50), (20, 60))  # the disk
    theirs = grow_region(read_rgb(tmp_path / "photo.jpg"), (60, 50))
    assert theirs.shape == (200, 120) and theirs.sum() > 1000 and (theirs != (page.work()[0] == 1)).mean() < 0.002


@needs_browser
def test_the_camera_is_dragged_and_arrows_move_by_keys(page, picture):
    page.press("g")
    page.drag((50, 60))
    right, down, shift = "\ue014", "\ue015", "\ue008"
    page.press([right])
    page.press([shift, down])
    page.press("c")
    page.drag((100, 114), (150, 60))
    arrows, _, _ = product_reads(page.save(), picture)
    assert np.allclose(np.subtract(arrows.arrows[0].end, arrows.arrows[0].start), (1, 10))
    assert np.allclose(arrows.camera, (0.75, 0.5), atol=0.02)
    page.press("a")


@needs_browser
def test_flow_has_the_colours_of_the_paper(page, picture):
    page.drag((50, 60), (92.5, 41.5))
    page.drag((140, 60), (110, 75))
    page.click("flow")
    _, _, F = product_reads(page.save(), picture)
    painted = overlay(page)
    page.click("flow")
    assert (painted[..., 3] == 255).all()
    assert np.abs(painted[..., :3].astype(int) - flow_to_rgb(F)).max() <= 2
    assert len(np.unique(painted.reshape(-1, 4), axis=0)) == 3

    vectors = np.random.default_rng(1).normal(0, 2, (60, 2)).astype(np.float32)
    vectors = np.concatenate([vectors, [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3], [1e-3, -1e-9]]]).astype(np.float32)
    theirs = page.js("return arguments[0].map((v) => flowColor(v, 3))", vectors.tolist())
    ours = flow_to_rgb(torch.from_numpy(vectors.T[..., None]), max_magnitude=3.0)[:, 0]
    assert np.abs(np.array(theirs) - ours).max() <= 2

    drawn = page.js("return [...$('wheel').getContext('2d').getImageData(0, 0, 176, 176).data]")
    drawn, wheel = np.array(drawn).reshape(176, 176, 4), color_wheel(176).astype(int)
    assert np.abs(drawn[..., :3] - wheel)[drawn[..., 3] > 0].max() <= 2


@needs_browser
def test_undo_and_redo_every_step(page, picture):
    states = [page.work()]
    page.drag((50, 60), (70, 60))
    states.append(page.work())
    page.press("x")
    page.drag((10, 5), (20, 30), (30, 20))
    states.append(page.work())
    page.press("e")
    page.drag((45, 60), (60, 60))
    states.append(page.work())
    page.press("c")
    page.drag((100, 80), (150, 30))
    states.append(page.work())
    assert len({repr((ids.tobytes(), rest)) for ids, rest in states}) == 5

    def same(state):
        ids, rest = page.work()
        return (ids == state[0]).all() and rest == state[1]

    control, shift = "\ue009", "\ue008"
    for state in reversed(states[:-1]):
        page.press([control, "z"])
        assert same(state)
    for state in states[1:]:
        page.press([control, shift, "z"])
        assert same(state)
    page.js("document.querySelector('#list button').click()")
    page.press("\ue017")  # Delete: the selected object goes, and its arrow with it
    ids, rest = page.work()
    assert np.unique(ids).tolist() == [0, 2] and "1" in states[4][1]["arrows"] and rest["arrows"] == {}
    page.click("undo")
    assert same(states[4])
    page.click("undo")
    assert same(states[3]) and page.js("return !$('redo').disabled")
    page.press("x")
    page.drag((170, 100), (190, 110))  # a new step forgets what could be redone
    assert page.js("return $('redo').disabled")


def mark_box(page, *places):
    page.press("x")
    page.drag(*places)


def mark_polygon(page, corner, opposite):
    page.press("p")
    (x0, y0), (x1, y1) = corner, opposite
    for place in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)):
        page.drag(place)


def mark_stroke(page, corner, opposite):
    page.press("b")
    page.press("n")  # not added to what is selected
    page.slide("size", 16)
    (x0, y0), (x1, y1) = corner, opposite
    page.drag((x0, (y0 + y1) / 2), ((x0 + x1) / 2, (y0 + y1) / 2), (x1, (y0 + y1) / 2))


@needs_browser
@pytest.mark.parametrize("draw", [mark_box, mark_polygon, mark_stroke])
def test_what_is_marked_under_an_arrows_tail_takes_the_arrow_over(page, picture, draw):
    page.drag((50, 60), (95, 40))  # guesses the red disk
    guess, told = page.work()
    draw(page, (40, 50), (60, 70))
    ids, work = page.work()
    (number,) = np.unique(ids[ids > 0]).tolist()  # one object: the guess is gone
    area = ids == number
    assert 300 < area.sum() < 700 and (guess == 1).sum() > 1200 and area[60, 50] and not area[42, 50]
    assert work["arrows"] == {str(number): told["arrows"]["1"]} and work["guesses"] == {}
    arrows, _, F = product_reads(page.save(), picture)
    assert len(arrows.arrows) == 1 and (F[:, torch.from_numpy(area)] != 0).all()
    page.press(["\ue009", "z"])  # one step
    ids, work = page.work()
    assert (ids == guess).all() and work == told


@needs_browser
def test_what_was_marked_by_hand_stays_when_an_arrow_leaves_it(page, picture):
    mark_box(page, (20, 20), (100, 100))
    page.press("a")
    page.drag((50, 60), (95, 40))
    page.drag((140, 60), (140, 100))  # of another object
    other = page.work()[1]["arrows"]["2"]
    mark_box(page, (110, 20), (112, 25))  # under no tail: takes nothing over
    assert set(page.work()[1]["arrows"]) == {"1", "2"}
    mark_box(page, (40, 50), (60, 70))
    ids, work = page.work()
    assert (ids == 1).sum() > 5000 and 380 < (ids == 4).sum() < 450 and ids[60, 50] == 4
    assert set(work["arrows"]) == {"2", "4"} and work["arrows"]["2"] == other


@needs_browser
def test_an_arrow_where_nothing_stands_out_waits_for_its_object(page, picture, tmp_path):
    page.drag((180, 15), (150, 20))  # on the wall
    assert "Nothing stands out here" in page.status()
    ids, work = page.work()
    assert not ids.any() and list(work["arrows"]) == ["1"]
    page.click("undo")
    assert page.work()[1]["arrows"] == {}
    page.click("redo")
    assert "not marked yet" in page.js("return $('list').innerText")
    page.js("$('help').textContent = ''")
    page.click("save")
    assert "Arrow 1 has no object yet" in page.status() and not list(page.downloads.glob("*.crdownload"))
    page.drag((50, 60), (70, 60))  # another arrow does not take its number
    assert set(page.work()[1]["arrows"]) == {"1", "2"}
    page.js("document.querySelector('#list button').click()")
    mark_box(page, (165, 30), (185, 50))  # wherever it is, the arrow waits for it
    ids, work = page.work()
    assert 380 < (ids == 1).sum() < 450 and set(work["arrows"]) == {"1", "2"}
    page.press(["\ue009", "z"])
    page.press(["\ue009", "z"])
    assert set(page.work()[1]["arrows"]) == {"1"}
    page.js("document.querySelector('#list button').click()")
    page.press("\ue017")  # Delete: no object is there, its arrow goes
    assert page.work()[1]["arrows"] == {} and page.js("return freeId(work)") == 1
    path = tmp_path / "arrows.json"
    path.write_text(json.dumps({"arrows": [{"start": [180, 15], "end": [150, 20]}]}))
    page.open(picture)
    assert "1 arrows, 0 objects; nothing stands out at the start of arrow 1" in page.open(path)


@needs_browser
def test_the_slider_still_finds_what_an_arrow_waits_for(page, picture):
    page.drag((180, 15), (150, 20))
    page.slide("reach", 12)
    ids, work = page.work()
    assert ids[15, 180] == 1 and list(work["arrows"]) == ["1"] and page.js("return $('help').className") == "error"


@needs_browser
def test_a_leak_is_no_object_here_or_there(page, tmp_path):
    """A wall of two tones: each lies along three sides. A box in front of both is an object."""
    image = np.full((120, 200, 3), 90, np.uint8)
    image[60:] = 160
    image[50:70, 90:110] = (200, 40, 30)
    path = tmp_path / "photo.png"
    Image.fromarray(image).save(path)
    page.open(path)
    page.press("a")
    for place in ((20, 20), (20, 100)):
        page.drag(place, (100, 30))
        assert "Nothing stands out here" in page.status()
        with pytest.raises(ValueError, match="nothing stands out"):
            grow_region(image, place)
    page.drag((100, 60), (150, 60))
    assert (page.work()[0] == 3).sum() == grow_region(image, (100, 60)).sum() > 300
    image[:], image[5:115, 5:195], image[15:105, 15:185] = 90, 200, 90  # what the frame surrounds is its hole
    Image.fromarray(image).save(path)
    page.open(path)
    page.drag((10, 60), (100, 30))
    assert "Nothing stands out here" in page.status() and not page.work()[0].any()


@needs_browser
def test_a_narrow_window_leaves_the_picture_half_of_it(tmp_path):
    with browser(size=(500, 700)) as narrow:
        narrow.open(scene(tmp_path / "photo.png", 200, 130))
        inner = narrow.js("return [innerWidth, innerHeight, document.documentElement.scrollWidth]")
        size = narrow.js("const r = $('paper').getBoundingClientRect(); return [r.width, r.height]")
        assert inner[0] <= 500 and inner[2] <= inner[0] and size[0] * size[1] > 0.45 * inner[0] * inner[1]
        assert narrow.js("return $('save').getBoundingClientRect().right") <= inner[0]
        narrow.drag((50, 60), (95, 40))
        assert (narrow.work()[0] == 1).sum() > 1000


@needs_browser
def test_shapes_are_those_of_the_product(page, picture, tmp_path):
    page.press("p")
    corners = [(20, 10), (60, 15), (40, 30)]
    for corner in [*corners, corners[0]]:
        page.drag(corner)
    page.press("x")
    page.drag((100, 100), (119, 90))
    page.press("b")
    page.press("n")  # otherwise the brush adds to the box, which is selected
    page.slide("size", 8)
    page.drag((10, 100), (40, 100))
    page.drag((25, 90), (25, 110))  # a second stroke belongs to the same object
    ids, _ = page.work()
    assert np.unique(ids).tolist() == [0, 1, 2, 3]
    error = 1.5 / page.js("return zoom")
    assert abs((ids == 1).sum() - 350) < 60 * 2 * error and abs((ids == 2).sum() - 190) < 30 * 2 * error
    stroke = centre_mask(lambda x, y: np.hypot(x - x.clip(10, 40), y - 100) < 4)
    stroke |= centre_mask(lambda x, y: np.hypot(x - 25, y - y.clip(90, 110)) < 4)
    assert (stroke != (ids == 3)).sum() < 0.3 * stroke.sum()

    shapes = {
        "arrows": [
            {"start": [50, 60], "end": [60, 60], "polygon": [[30.2, 40], [70, 47.5], [45, 83], [90, 20.5]]},
            {"start": [10, 10], "end": [9, 8.5], "box": [118.5, 30, 160.5, 55.2]},
            {"start": [140, 80], "end": [140, 80]},
        ],
        "camera": [0.7, -0.25],
        "delta": 0.125,
        "depth": "depth.png",
        "rest": "still",
    }
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(shapes))
    page.open(picture)
    page.open(path)
    saved = page.save()
    _, theirs, flow = product_reads(saved, picture)
    _, ours, expected = product_reads(path, picture)
    assert np.unique(ours).tolist() == [0, 1, 2, 3]
    assert (theirs != ours)[(ours != 3) & (theirs != 3)].sum() == 0  # polygon and box to the pixel
    assert (theirs != ours).mean() < 0.0005  # the region by colour, almost
    assert torch.equal(flow[:, torch.from_numpy(ours == theirs)], expected[:, torch.from_numpy(ours == theirs)])
    content = json.loads(saved.read_text())
    settings = [content[key] for key in ("camera", "delta", "depth", "rest")]
    assert settings == [[0.7, -0.25], 0.125, "depth.png", "still"]
    listed = page.js("return document.getElementById('list').innerText")
    assert listed.count("told to stay") == 1 and "px per frame" in listed  # the arrow of no length


def ids_pictures():
    """Name -> a picture of the ids 1, 3, 200, and how it is saved."""
    ids = np.zeros((120, 200), np.uint8)
    ids[40:60, 30:50], ids[10:20, 100:150], ids[70:110, 150:190] = 1, 3, 200
    gray, colors = Image.fromarray(ids), np.random.default_rng(3).integers(1, 255, (256, 3), dtype=np.uint8)
    palette = Image.frombytes("P", gray.size, ids.tobytes())
    palette.putpalette(np.random.default_rng(2).integers(0, 256, 768, dtype=np.uint8).tobytes())
    colored = Image.fromarray(colors[ids] * (ids > 0)[..., None])
    hole = Image.fromarray(np.where(ids == 3, 0, 255).astype(np.uint8))
    cut, both = colored.convert("RGBA"), Image.merge("LA", (gray, hole))
    cut.putalpha(hole)
    return {
        "1": (Image.fromarray(ids > 0), {}),
        "L": (gray, {}),
        "L with one clear value": (gray, {"transparency": 200}),
        "LA": (gray.convert("LA"), {}),
        "LA with a hole": (both, {}),
        "P": (palette, {}),
        "P with one clear index": (palette, {"transparency": 3}),
        "P with few bits": (Image.fromarray((ids % 4).astype(np.uint8)).convert("P"), {"bits": 2}),
        "RGB": (colored, {}),
        "RGB with one clear colour": (colored, {"transparency": tuple(colors[200].tolist())}),
        "RGB of gray": (gray.convert("RGB"), {}),
        "RGBA": (colored.convert("RGBA"), {}),
        "RGBA with a hole": (cut, {}),
        "RGBA of gray with a hole": (both.convert("RGBA"), {}),
    }


@needs_browser
@pytest.mark.parametrize("name", ids_pictures())
def test_ids_of_every_kind_of_picture(page, picture, tmp_path, name):
    image, settings = ids_pictures()[name]
    image.save(tmp_path / "ids.png", **settings)
    assert "ids.png: 0 arrows" in page.open(tmp_path / "ids.png")
    ours = page.work()[0]
    assert (ours == read_segmentation(tmp_path / "ids.png")).all() and len(np.unique(ours)) >= 2


@needs_browser
def test_ids_without_a_clear_meaning_are_refused_as_by_the_product(page, picture, tmp_path):
    page.drag((50, 60), (70, 60))
    before, gray, path = page.work(), Image.new("L", (200, 120), 7), tmp_path / "ids.png"
    mist = {"half transparent": gray.convert("LA"), "is an animation": gray, "16 bits": gray.convert("I;16")}
    mist["half transparent"].putalpha(128)
    for message, image in mist.items():
        many = {"save_all": True, "append_images": [Image.new("L", (200, 120), 9)]} if "animation" in message else {}
        image.save(path, **many)
        assert message in page.open(path)
        if "16" not in message:  # of gray, the product reads them
            with pytest.raises(ValueError, match="half transparent|holds 2 pictures"):
                read_segmentation(path)
    after = page.work()
    assert (before[0] == after[0]).all() and before[1] == after[1]


@needs_browser
def test_mistakes_are_told_and_change_nothing(page, picture, tmp_path):
    page.drag((50, 60), (70, 60))
    before = page.work()
    good = {"start": [50, 60], "end": [60, 60]}
    entries = {
        "not JSON": None,
        "expected a list": {"arrow": []},
        "arrow 2: start (500,61) is outside the 200x120 picture": {"arrows": [good, good | {"start": [500, 61]}]},
        "arrow 1: start, end are": {"arrows": [{"start": [50, "60"], "end": [1, 2]}]},
        "arrow 2: is on the same object": {"arrows": [good, {"start": [52, 60], "end": [1, 2]}]},
        "arrow 1: no pixel of the picture": {"arrows": [good | {"box": [300, 5, 400, 9]}]},
        "camera is": {"arrows": [], "camera": [1]},
        "delta is": {"arrows": [], "delta": 0},
        "rest is": {"arrows": [], "rest": "moving"},
        "arrow 1: instance 9 is not among the ids": {"arrows": [good | {"instance": 9}]},
    }
    for message, content in entries.items():
        path = tmp_path / "bad.json"
        path.write_text("{" if content is None else json.dumps(content))
        told = page.open(path)
        assert "bad.json: " in told and (content is None or message in told)
    Image.fromarray(np.zeros((12, 20), np.uint8)).save(tmp_path / "ids.png")
    assert "ids.png: is 20x12, the picture is 200x120" in page.open(tmp_path / "ids.png")
    after = page.work()
    assert (before[0] == after[0]).all() and before[1] == after[1]


def test_page_is_one_file_without_network():
    text = PAGE.read_text()
    assert len(text) > 10000 and "src=" not in text and "@import" not in text and "fetch(" not in text
    links = [part.split('"')[0] for part in text.split('href="')[1:]]
    assert all(link.startswith("data:") for link in links)
    assert all(part.startswith("//www.w3.org/2000/svg") for part in text.split("http:")[1:]) and "https:" not in text


def write_screenshot(path, *files, size=(1280, 900)):
    """A picture of the page with a picture, arrows and ids in it; without files: with the test's scene."""
    with browser(size=size) as page, tempfile.TemporaryDirectory() as folder:
        print(page.open(*(map(os.path.abspath, files) if files else [scene(Path(folder) / "photo.png")])))
        if not files:
            page.drag((50, 60), (95, 40))
            page.drag((140, 60), (140, 100))
        page.js("say()")
        page.screenshot(path)


if __name__ == "__main__":
    write_screenshot(*sys.argv[1:])
