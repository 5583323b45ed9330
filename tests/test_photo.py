"""inputs/photo.py: pictures, ids and depth that a user brings."""

import argparse
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import Arrow, Arrows, Inputs, doubt_of, fit, read_depth, read_inputs, read_rgb, read_segmentation
from svd import VAE

DEMO = Path(__file__).parents[1] / "demo"
PIXELS = np.random.default_rng(0).integers(60, 256, size=(4, 6, 3), dtype=np.uint8)
GRAY = PIXELS[..., 0]
ONE_GRAY = np.equal(GRAY, GRAY[1, 2])
HOLE = np.where(np.arange(24).reshape(4, 6) % 5 == 0, 0, 255).astype(np.uint8)
COLORS = np.random.default_rng(1).integers(256, size=(256, 3), dtype=np.uint8)


def over_white(rgb):
    return np.where(HOLE[..., None] == 0, 255, rgb)


def in_three(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def with_hole(picture):
    picture.putalpha(Image.fromarray(HOLE))
    return picture


def palette():
    picture = Image.frombytes("P", (6, 4), GRAY.tobytes())
    picture.putpalette(COLORS.tobytes())
    return picture


def saved(picture, **settings):
    return lambda path: picture.save(path, **settings)


def deep_png(values):
    """A PNG of 16 bits a colour, which Pillow does not write."""

    def write(path):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

    return write


def first_of_two(picture, **settings):
    """The second is made here: saving one leaves marks on it that another format stumbles over."""
    return lambda path: picture.save(path, save_all=True, append_images=[Image.fromarray(255 - PIXELS)], **settings)


CMYK = Image.fromarray(PIXELS).convert("CMYK")
PHOTOS = {
    "palette.png": (saved(palette()), COLORS[GRAY]),
    "palette_clear.png": (
        saved(palette(), transparency=int(GRAY[1, 2])),
        np.where(ONE_GRAY[..., None], 255, COLORS[GRAY]),
    ),
    "gray_alpha.png": (saved(with_hole(Image.fromarray(GRAY))), over_white(in_three(GRAY))),
    "alpha.webp": (saved(with_hole(Image.fromarray(PIXELS)), lossless=True), over_white(PIXELS)),
    "gray_clear.png": (
        saved(Image.fromarray(GRAY), transparency=int(GRAY[1, 2])),
        in_three(np.where(ONE_GRAY, 255, GRAY)),
    ),
    "print.tiff": (saved(CMYK), PIXELS),
    "one_bit.png": (saved(Image.fromarray(HOLE > 0)), in_three(HOLE)),
    "float.tiff": (saved(Image.fromarray(GRAY.astype(np.float32) / 255)), in_three(GRAY)),
    "deep.png": (saved(Image.fromarray(GRAY.astype(np.uint16) * 257)), in_three(GRAY)),
    "deep_colors.png": (deep_png(PIXELS.astype(int) * 257), PIXELS),
    "stereo.mpo": (
        first_of_two(Image.fromarray(in_three(GRAY * 0 + 90)), format="MPO"),
        GRAY[..., None] * 0 + 90,
    ),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_of_every_kind(name, tmp_path):
    write, expected = PHOTOS[name]
    write(tmp_path / name)
    rgb = read_rgb(tmp_path / name)
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, np.broadcast_to(expected, (4, 6, 3)))


def cut_gif(path):
    Image.new("L", (9, 9), 90).save(path, save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    path.write_bytes(path.read_bytes()[:-28])  # in the head of the second


UNCLEAR = {
    "bright.tiff": (saved(Image.fromarray(GRAY.astype(np.float32))), r"holds floats from \d+ to \d+, expected 0 to 1"),
    "nan.tiff": (saved(Image.fromarray(GRAY * np.float32(np.nan))), "holds floats from nan to nan"),
    "wide.tiff": (saved(Image.fromarray(GRAY.astype(np.int32))), "has 32 bits, of which white is unknown"),
    "eight_in_sixteen.png": (saved(Image.fromarray(GRAY.astype(np.uint16))), "is black, no value is above 0 of 255"),
    "twelve_bits.png": (saved(Image.fromarray(GRAY.astype(np.uint16) << 4)), "is black, no value is above 15 of 255"),
    "eight_in_colors.png": (deep_png(PIXELS), "is black"),
    "negative.tiff": (saved(Image.fromarray(GRAY.astype(np.uint16) << 8), tiffinfo={262: 0}), "is a negative"),
    "raw.tiff": (saved(Image.fromarray(PIXELS), tiffinfo={50706: b"\1\4\0\0"}), "is a raw photo"),
    "preview.tiff": (saved(Image.fromarray(PIXELS), tiffinfo={254: 1}), "is a raw photo or only the preview of one"),
    "lab.tiff": (saved(Image.fromarray(PIXELS).convert("LAB")), "is a LAB picture: save it as RGB"),
    "moving.gif": (first_of_two(palette()), "holds 2 pictures"),
    "moving.png": (first_of_two(Image.fromarray(PIXELS)), "holds 2 pictures, expected one"),
    "moving.webp": (first_of_two(Image.fromarray(PIXELS)), "holds 2 pictures"),
    "pages.tiff": (first_of_two(Image.fromarray(PIXELS)), "holds 2 pictures"),
    "cut.gif": (cut_gif, "holds several pictures, and one is damaged"),
    "phone.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + b"0" * 99), "is a HEIC picture"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_photos_without_a_clear_meaning_are_refused(name, tmp_path):
    write, message = UNCLEAR[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}: {message}[^\n]*$"):
        read_rgb(tmp_path / name)


TURNS = {  # of EXIF: what a viewer does with the stored pixels
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("number", TURNS)
def test_every_picture_is_upright(number, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png", exif=exif)
    Image.fromarray(GRAY).save(tmp_path / "gray.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "rgb.png"), TURNS[number](PIXELS))
    for read in (read_segmentation, read_depth):
        np.testing.assert_array_equal(read(tmp_path / "gray.png"), TURNS[number](GRAY))
    bright = TURNS[number](GRAY) > GRAY.max() / 2
    area = Arrow((0, 0), (1, 1), mask=str(tmp_path / "gray.png")).area(*bright.shape)
    np.testing.assert_array_equal(area, bright)


BOOL = GRAY > 128
MASKS = {
    "float.tiff": (saved(Image.fromarray(BOOL * np.float32(0.25))), BOOL),
    "clear.png": (saved(with_hole(Image.fromarray(GRAY * 0 + 200))), HOLE > 0),
    "print.tiff": (saved(Image.fromarray(in_three(BOOL * np.uint8(200))).convert("CMYK")), BOOL),
    "nan.tiff": (saved(Image.fromarray(GRAY * np.float32(np.nan))), "holds numbers that are not finite"),
    "moving.gif": (UNCLEAR["moving.gif"][0], "holds 2 pictures"),
    "lab.tiff": (UNCLEAR["lab.tiff"][0], ""),
    "phone.heic": (UNCLEAR["phone.heic"][0], "is a HEIC picture"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind(name, tmp_path):
    (write, expected), arrow = MASKS[name], Arrow((0, 0), (1, 1), mask=str(tmp_path / name))
    write(tmp_path / name)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"^mask {tmp_path / name}: {expected}[^\n]*$"):
            arrow.area(4, 6)
    else:
        np.testing.assert_array_equal(arrow.area(4, 6), expected)


def told_by(tmp_path, arrows, **settings):
    """What the command line makes of a picture with a red box in it -> Inputs."""
    rgb = np.full((40, 60, 3), 90, np.uint8)
    rgb[10:25, 20:40] = (200, 40, 30)
    Image.fromarray(rgb).save(tmp_path / "image.png")
    (tmp_path / "arrows.json").write_text(json.dumps(arrows))
    told = {"image": str(tmp_path / "image.png"), "segment": "auto", "segment_model": "x/y", "segmentation": None}
    told |= {"depth": "auto", "depth_model": "x/y", "svd": None} | settings
    return read_inputs(argparse.Namespace(**told), str(tmp_path / "arrows.json"), "cpu")


def test_rest_needs_others_to_tell(tmp_path):
    """Without ids nothing is marked but what has an arrow, and "rest" would tell nobody anything, without a word."""
    for arrows in ([], [{"start": [30, 20], "end": [50, 20]}], [{"start": [3, 3], "end": [5, 3], "box": [0, 0, 9, 9]}]):
        with pytest.raises(ValueError, match=r'arrows\.json: rest is "still", but no other object is marked: --segm'):
            told_by(tmp_path, {"arrows": arrows, "rest": "still"})
    ids = np.zeros((40, 60), np.uint8)
    ids[5:9, 5:9] = 4
    Image.fromarray(ids).save(tmp_path / "ids.png")
    inputs = told_by(tmp_path, {"arrows": [], "rest": "still"}, segmentation=str(tmp_path / "ids.png"))
    assert inputs.told(4, fit(inputs, 60, 40)[1], "cpu")["mask"].sum() == 16


@pytest.mark.parametrize("soft", [True, False])
def test_soft_edges_of_ids_are_told(tmp_path, capsys, soft):
    """What a soft brush leaves around two things: each gray value is an object."""
    y, x = np.mgrid[:400, :600]
    near = np.maximum(*(120 - np.hypot(x - at, y - 200) for at in (180, 420)))
    ids = np.clip(near * (0.5 if soft else 1e9), 0, 1) if not soft else np.clip(near / 12 + 0.5, 0, 1)
    ids = (255 * ids).round().astype(np.uint8)
    rgb = np.full((400, 600, 3), 90, np.uint8)
    Image.fromarray(rgb).save(tmp_path / "image.png")
    Image.fromarray(ids).save(tmp_path / "ids.png")
    (tmp_path / "arrows.json").write_text('{"arrows": []}')
    names = {"image": "image.png", "segmentation": "ids.png"}
    told = {name: str(tmp_path / file) for name, file in names.items()}
    told |= {"segment": "auto", "segment_model": "x/y", "depth": "none", "depth_model": "x/y", "svd": None}
    read_inputs(argparse.Namespace(**told), str(tmp_path / "arrows.json"), "cpu")
    out = capsys.readouterr().out
    if soft:
        assert f"ids.png: has {len(np.unique(ids)) - 1} objects, " in out and "are its edges soft?" in out
    else:
        assert out == "" and len(np.unique(ids)) == 2


def test_plain_svd_is_told_the_picture_alone_and_says_so(tmp_path, capsys):
    arrows = {"arrows": [{"start": [30, 20], "end": [50, 20]}], "camera": [1, 0], "depth": "none.png"}
    inputs = told_by(tmp_path, arrows, svd="weights", segmentation="ids.png", depth="depth.png")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "--svd weights: plain SVD sees the picture alone, so these are not used: "
        f"{tmp_path / 'arrows.json'}, ids.png, depth.png"
    )
    assert inputs.given.arrows == inputs.arrows.arrows == () and inputs.given.camera == (0, 0)
    assert not inputs.ids.any() and inputs.depth is None and inputs.origin == "the picture alone"
    (tmp_path / "arrows.json").unlink()
    arguments = argparse.Namespace(**vars(argparse.Namespace(image=str(tmp_path / "image.png"), svd="weights")))
    vars(arguments).update(segment="auto", segmentation=None, depth="none")
    assert read_inputs(arguments, None, "cpu").ids.shape == (40, 60) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("start", "doubt"),
    [
        ([30, 20], None),  # the red box
        ([3, 20], "reaches the edge: is background in it?"),
        ([50, 30], "is small: is it a part only?"),
    ],
)
def test_a_doubtful_region_points_to_the_page(start, doubt, tmp_path, capsys, monkeypatch):
    def find(image, point):
        region = np.zeros(image.shape[:2], bool)
        x, y = map(int, point)
        if doubt:
            region[max(0, y - 1) : y + 2, x - 3 * (x < 10) : x + 3] = True
        else:
            region[10:25, 20:40] = True
        return region

    monkeypatch.setattr("inputs.photo.choose_finder", lambda *_: (find, "what stands out"))
    told_by(tmp_path, {"arrows": [{"start": start, "end": [50, 20]}]})
    printed = capsys.readouterr().out
    assert "% of the image" in printed and (doubt is None) == ("page/draw.html" not in printed)
    assert doubt is None or doubt in printed


def test_a_picture_that_the_model_cannot_show_gets_a_word():
    vae = VAE.from_pretrained(DEMO, "vae", torch.float32, "cpu").eval()

    def doubt(rgb):
        nothing = Arrows()
        ids = torch.zeros(rgb.shape[:2], dtype=torch.long)
        return doubt_of(*fit(Inputs(rgb, nothing, nothing, ids, None, ""), 128, 64), vae, "cpu")

    assert doubt(read_rgb(DEMO / "example.png")) == ""  # dominoes
    y, x = np.mgrid[:200, :300] / 6
    waves = 128 + 60 * np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x - 2 * y)], -1)
    for strange in (read_rgb(DEMO / "page.jpg"), waves.astype(np.uint8)):
        assert "; such pictures are strange to the model" in doubt(strange) and "dB only" in doubt(strange)


def test_read_rgb_formats(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "plain.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "plain.png"), pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(pixels, -1))
    clear = np.dstack([pixels, np.zeros((4, 6), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_rgb(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((2, 3), 0x8040, np.uint16)).save(tmp_path / "deep.png")
    assert (read_rgb(tmp_path / "deep.png") == 0x80).all()


def test_read_segmentation_gray_and_colour(tmp_path):
    ids = np.array([[0, 3, 200], [3, 3, 0]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "gray.png"), ids)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[np.array([[0, 1, 2], [1, 1, 0]])]
    Image.fromarray(colors).save(tmp_path / "color.png")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "color.png"), [[0, 2, 1], [2, 2, 0]])
    Image.fromarray(colors[:1, 1:]).save(tmp_path / "full.png")  # nothing is black: no object becomes the background
    np.testing.assert_array_equal(read_segmentation(tmp_path / "full.png"), [[2, 1]])
    noise = np.random.default_rng(0).integers(256, size=(30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo.png: has 901 colours"):
        read_segmentation(tmp_path / "photo.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png: holds the id 300"):
        read_segmentation(tmp_path / "large.png")


def test_read_depth(tmp_path):
    depth = np.array([[1000, 2500], [40000, 1]], np.uint16)
    Image.fromarray(depth).save(tmp_path / "d.png")
    np.testing.assert_array_equal(read_depth(tmp_path / "d.png"), depth)
    np.save(tmp_path / "d.npy", depth / 1000)
    np.testing.assert_allclose(read_depth(tmp_path / "d.npy"), depth / 1000, rtol=1e-6)
    Image.fromarray(depth * 0).save(tmp_path / "zero.png")
    with pytest.raises(ValueError, match="zero.png: holds the depth 0"):
        read_depth(tmp_path / "zero.png")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.npy"):
        read_depth(tmp_path / "bad.npy")


@pytest.mark.parametrize(
    ("said", "told", "moving"),
    [
        ({"arrows": []}, [], []),
        ({"arrows": [[5, 3]]}, [7], [7]),
        ({"arrows": [[2, 3]]}, [7], []),
        ({"arrows": [[5, 3]], "rest": "still"}, [7, 9], [7]),
        ({"arrows": [], "rest": "still"}, [7, 9], []),
    ],
)
def test_what_is_told_keeps_stay_from_nothing(said, told, moving):
    """F and mask on the model's canvas, after resizing, margin included."""
    ids = np.zeros((8, 20), np.uint8)
    ids[2:6, :5], ids[2:6, 12:18] = 7, 9  # one reaches the edge, which the margin repeats
    arrows = [{"start": [2, 3], "end": end, "instance": 7} for end in said["arrows"]]
    given = Arrows.from_dict(said | {"arrows": arrows, "camera": [0.5, -1]})
    rgb = np.zeros((8, 20, 3), np.uint8)
    inputs, canvas = fit(Inputs(rgb, given, given, torch.from_numpy(ids).long(), None, ""), 40, 40)
    found = inputs.told(5, canvas, "cpu")
    seen = found["segmentation"]
    assert found["depth"] is None and found["camera"].tolist() == [[0.5, -1]] and canvas.inner == (16, 40)
    assert found["image"].shape == (1, 3, 40, 40) and seen.shape == (1, 40, 40) and seen.unique().tolist() == [0, 7, 9]
    assert torch.equal(found["mask"][:, 0], torch.isin(seen, torch.tensor(told, dtype=torch.long)).float())
    assert torch.equal((found["F"] != 0).any(1), torch.isin(seen, torch.tensor(moving, dtype=torch.long)))


@pytest.mark.parametrize("read", [read_rgb, read_segmentation, read_depth])
def test_not_a_picture(read, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png: not an image"):
        read(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        read(tmp_path / "none.png")
