"""inputs/find.py: region growing on drawn scenes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from inputs import find
from inputs.find import grow_region


def overlap(region, truth):
    return (region & truth).sum() / (region | truth).sum()


def scene(texture=0.0, noise=4.0, seed=0):
    """A disc with stripes of `texture` gray levels and a bar 3 pixels wide on a gray ramp, 64x96."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :96]
    image = np.repeat((90 + 0.4 * x)[..., None], 3, 2)
    disc, bar = (x - 30) ** 2 + (y - 32) ** 2 < 180, (abs(x - 70) < 2) & (abs(y - 30) < 25)
    image[disc] = (190, 80, 60)
    image[disc & (x // 3 % 2 == 0)] += texture
    image[bar] = (40, 60, 160)
    return (image + random.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8), disc, bar


@pytest.mark.parametrize("texture, noise", [(0, 0), (0, 6), (20, 4), (0, 20), (40, 8)])
def test_grow_region_finds_objects(texture, noise):
    for seed in range(4):
        image, disc, bar = scene(texture, noise, seed)
        for x, y in ((30, 32), (24, 36)):
            assert overlap(grow_region(image, (x, y)), disc) > 0.88
        if noise < 10:  # three pixels wide
            assert overlap(grow_region(image, (70.5, 30)), bar) > 0.8


def test_grow_region_fills_holes_and_reaches_the_border():
    image, disc, _ = scene(noise=2)
    image[30:34, 33:37] = 255  # a highlight
    assert overlap(grow_region(image, (25, 30)), disc) > 0.9
    image[(abs(np.mgrid[:64, :96] - np.array([32, 30])[:, None, None]) <= 4).all(0)] = (20, 90, 200)  # another colour
    region = grow_region(image, (22, 32))
    assert region[28:37, 26:35].all() and overlap(region, disc) > 0.9
    image = np.full((30, 40, 3), 60, np.uint8)
    image[:12, :9] = (30, 160, 60)
    region = grow_region(image, (0, 0))
    assert overlap(region, (image[..., 1] == 160)) > 0.95 and region.shape == (30, 40)


def test_grow_region_is_not_stopped_by_specks():
    image, disc, _ = scene(noise=0)
    image[np.random.default_rng(0).random((64, 96)) < 0.08] = 255
    image[31:34, 29:32] = (190, 80, 60)
    assert overlap(grow_region(image, (30, 32)), disc) > 0.95
    image = np.full((40, 50, 3), 77, np.uint8)
    image[0, :2] = 200
    with pytest.raises(ValueError, match="nothing stands out"):
        grow_region(image, (0, 0))


def test_grow_region_finds_blurred_objects():
    image, disc, _ = scene()
    image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    image = (image + np.random.default_rng(0).normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
    for point in ((30, 32), (24, 32), (33, 25)):
        assert overlap(grow_region(image, point), disc) > 0.8


def test_grow_region_follows_shading():
    """A ball that goes from light to dark by many times the step at its outline's weakest place."""
    y, x = np.mgrid[:64, :64]
    ball = (x - 32) ** 2 + (y - 32) ** 2 < 400
    image = np.full((64, 64, 3), 40.0)
    image[ball] = np.stack([120 + 2.2 * (x - 32), 90 + 1.6 * (x - 32), 60 + x - 32], -1)[ball]
    assert overlap(grow_region(image.astype(np.uint8), (32, 32)), ball) > 0.9


@pytest.mark.parametrize("kind", ["even", "background", "gradient", "noisy gradient", "glow", "noise"])
def test_grow_region_refuses_to_swallow_the_image(kind):
    if kind == "even":
        image = np.full((40, 50, 3), 77, np.uint8)
    elif kind == "background":
        image = scene()[0]
    elif kind == "noise":
        image = np.random.default_rng(0).normal(120, 20, (64, 96, 3)).astype(np.uint8)
    else:
        y, x = np.mgrid[:40, :90]
        gray = (3 * np.hypot(x - 48, y - 8) if kind == "glow" else 2.5 * x)[..., None].repeat(3, 2)
        gray += np.random.default_rng(0).normal(0, 4, gray.shape) * (kind == "noisy gradient")
        image = gray.clip(0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match=r"nothing stands out around \(45, 5\), or it is more than 50%"):
        grow_region(image, (45, 5))


def test_grow_region_stops_before_it_leaks():
    """The box and the wall behind it, together, differ more from the strip than from each other: the lake of both lasts
    longest, and is no object."""
    image, box = np.full((60, 90, 3), 130, np.uint8), np.zeros((60, 90), bool)
    box[20:40, 30:55] = True
    image[:6], image[box] = 255, 100
    assert overlap(grow_region(image, (40, 30)), box) > 0.95
    with pytest.raises(ValueError, match="nothing stands out"):
        grow_region(image, (50, 2))  # a tenth of the picture, along three sides
    image[:6] = 130  # even without the strip, the wall is none
    for wall in ((5, 5), (80, 50)):
        with pytest.raises(ValueError, match=r"its background; mark the object in page/draw\.html"):
            grow_region(image, wall)


@pytest.mark.parametrize(("share", "edge", "found"), [(0.36, False, True), (0.36, True, False), (0.25, True, True)])
def test_a_large_region_is_an_object_where_it_touches_no_edge(share, edge, found):
    height, width = 80, 100
    image, side = np.full((height, width, 3), 60, np.uint8), round((share * height * width) ** 0.5)
    top = height - side if edge else (height - side) // 2
    image[top : top + side, 20 : 20 + side] = (170, 60, 40)
    if found:
        assert overlap(grow_region(image, (40, top + 10)), image[..., 0] == 170) > 0.95
    else:
        with pytest.raises(ValueError, match="nothing stands out"):
            grow_region(image, (40, top + 10))


def test_holes_do_not_make_a_region_larger_than_half():
    """A frame that touches no edge: what it surrounds is its hole."""
    image = np.full((80, 100, 3), 60, np.uint8)
    image[4:76, 4:96] = (170, 60, 40)
    image[10:70, 10:90] = 60
    with pytest.raises(ValueError, match="or it is more than 50%"):
        grow_region(image, (6, 30))


def test_a_transformers_without_sam_2_is_one_line(monkeypatch, tmp_path):
    """Of before 4.56; and one whose import fails."""
    logging = SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    old = SimpleNamespace(__version__="4.50.0", utils=SimpleNamespace(logging=logging))
    monkeypatch.setattr(find, "check_model", lambda *_: None)
    for module, message in (
        (old, "transformers 4.50.0 has no Sam2Model: pip install -U transformers"),
        (None, "import"),
    ):
        monkeypatch.setitem(sys.modules, "transformers", module)
        with pytest.raises(ValueError, match=f"^--segment-model {tmp_path}: .*{message}[^\\n]*$"):
            find.sam_finder(str(tmp_path), "cpu", local=True)
