"""clips/maps.py: what a file of ids, depth or flow means, and what has no clear meaning."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clips import read_depth, read_ids
from clips.maps import open_picture, read_flow

IDS = np.array([[0, 7, 2], [7, 200, 0]], np.uint8)
METRES = np.array([[3.5, 0.25, 90], [1, 2, 7]], np.float32)
COLORS = np.random.default_rng(0).integers(256, size=(256, 3), dtype=np.uint8)


def palette(colors=COLORS):
    picture = Image.frombytes("P", (3, 2), IDS.tobytes())
    picture.putpalette(colors.ravel().tolist())
    return picture


def with_alpha(alpha):
    """IDS, whose second pixel is as opaque as told."""
    opaque = np.full(IDS.shape, 255, np.uint8)
    opaque[0, 1] = alpha
    return Image.merge("LA", (Image.fromarray(IDS), Image.fromarray(opaque)))


def deep_colors(path):
    """A PNG with 16 bits a colour: its blue differs only in the byte that Pillow drops."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + b"".join(struct.pack(">HHH", 0, 0, int(v)) for v in row) for row in IDS)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


ONE_CLEAR = np.where(np.arange(6).reshape(2, 3) == 1, 0, IDS)
GRAYS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
ID_FILES = {
    "gray.png": (Image.fromarray(IDS), IDS),
    "deep.png": (Image.fromarray(IDS.astype(np.uint16)), IDS),
    "deep.tiff": (Image.fromarray(IDS.astype(np.int32)), IDS),
    "palette.png": (palette(), IDS),
    "two.png": (Image.fromarray(IDS > 0), IDS > 0),
    "float.tiff": (Image.fromarray(IDS.astype(np.float32)), IDS),
    "opaque.png": (with_alpha(255), IDS),
    "clear.png": (with_alpha(0), ONE_CLEAR),
    "gray_as_rgb.png": (Image.fromarray(IDS).convert("RGB"), IDS),
    "gray_as_rgba.png": (with_alpha(0).convert("RGBA"), ONE_CLEAR),
    "whole.npy": (IDS.astype(np.float64), IDS),
    "wide.npy": (IDS.astype(np.int64), IDS),
    "bool.npy": (IDS > 0, IDS > 0),
}


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif callable(content):
        content(path)
    else:
        content.save(path)
    return path


@pytest.mark.parametrize("name", ID_FILES)
def test_ids_are_the_values_of_a_picture(tmp_path, name):
    content, expected = ID_FILES[name]
    path = write(tmp_path / name, content)
    for colors in (False, True):
        ids = read_ids(path, colors)
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("read", [read_ids, read_depth])
def test_a_picture_is_upright_by_its_exif_tag(tmp_path, read):
    picture = Image.fromarray(IDS + 1)
    exif = picture.getexif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.rot90(IDS + 1, -1))


@pytest.mark.parametrize("mode", ["P", "L"])
def test_the_transparent_value_of_a_picture_is_background(tmp_path, mode):
    picture = palette() if mode == "P" else Image.fromarray(IDS)
    picture.save(tmp_path / "a.png", transparency=7)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), np.where(IDS == 7, 0, IDS))


def test_colours_are_objects_only_where_that_is_asked_for(tmp_path):
    palette().convert("RGB").save(tmp_path / "a.png")
    ids = read_ids(tmp_path / "a.png", colors=True)
    assert len(np.unique(ids)) == 4 and ids[0, 0] == ids[1, 2] and ids[0, 1] == ids[1, 0] and (ids > 0).all()
    with pytest.raises(ValueError, match=r"a\.png: is a colour picture \(RGB\)"):
        read_ids(tmp_path / "a.png")


REFUSED_IDS = {
    "half.png": (with_alpha(128), "has half transparent pixels"),
    "half.tiff": (Image.fromarray(IDS + np.float32(0.5)), "holds the id 0.5, expected whole numbers from 0 to 255"),
    "nan.tiff": (Image.fromarray(IDS * np.float32(np.nan)), "holds the id nan"),
    "blurred.jpg": (Image.fromarray(IDS), "is a JPEG picture, which may change ids"),
    "ordered anew.png": (
        palette(np.where(np.arange(256)[:, None] == 7, 0, COLORS | 1)),
        "has a palette whose black is 7 and whose 0, the background, is a colour: save it as RGB or gray",
    ),
    "renumbered.gif": (palette(), "is a GIF picture, which may change ids"),
    "print.tiff": (Image.fromarray(IDS).convert("CMYK"), "is a CMYK picture"),
    "lab.tiff": (Image.fromarray(IDS).convert("RGB").convert("LAB"), "is a LAB picture"),
    "many.tiff": (lambda path: palette().save(path, save_all=True, append_images=[palette()]), "holds 2 pictures"),
    "deep_colors.png": (deep_colors, "has colours of 16 bits"),
    "large.npy": (IDS.astype(int) + 300, "holds the id 300"),
    "negative.npy": (IDS.astype(int) - 1, "holds the id -1"),
    "part.npy": (IDS + 0.25, "holds the id 0.25"),
    "batch.npy": (IDS[None], r"has shape \(1, 2, 3\), expected \[H, W\]"),
    "text.npy": (IDS.astype(str), "holds <U3, expected one array of numbers"),
    "empty.npy": (b"", "No data left in file"),
    "text.png": (b"hello", "not an image"),
    "phone.png": (b"\0\0\0\x18ftypheic" + b"0" * 99, "is a HEIC picture: save it as JPEG or PNG"),
    "cut.png": (lambda path: write(path, Image.new("L", (99, 99))) and path.write_bytes(path.read_bytes()[:60]), ""),
}


@pytest.mark.parametrize("name", REFUSED_IDS)
def test_ids_without_a_clear_meaning_are_refused(tmp_path, name):
    content, message = REFUSED_IDS[name]
    path = write(tmp_path / name, content)
    for colors in (False, True):
        with pytest.raises(ValueError, match=rf"^{path}: {message}[^\n]*$"):
            read_ids(path, colors)


DEPTH_FILES = {
    "float.tiff": (Image.fromarray(METRES), METRES),
    "deep.png": (Image.fromarray(METRES.astype(np.uint16) + 1), METRES.astype(int) + 1),
    "gray.png": (Image.fromarray(IDS + 1), IDS + 1.0),
    "gray_as_rgb.png": (Image.fromarray(IDS + 1).convert("RGB"), IDS + 1.0),
    "gray_palette.png": (palette(np.roll(GRAYS, -1, axis=0)), IDS + 1.0),
    "opaque.png": (Image.fromarray(IDS + 1).convert("LA"), IDS + 1.0),
    "double.npy": (METRES.astype(np.float64), METRES),
}


@pytest.mark.parametrize("name", DEPTH_FILES)
def test_depth_is_the_value_of_a_gray_picture(tmp_path, name):
    content, expected = DEPTH_FILES[name]
    depth = read_depth(write(tmp_path / name, content))
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, expected)


REFUSED_DEPTH = {
    "color_map.png": (Image.fromarray(COLORS[IDS]), "is a colour picture, and colours are no distances"),
    "palette.png": (palette(), "is a colour picture, and colours are no distances"),
    "clear.png": (with_alpha(0), "has transparent pixels, whose depth is unknown"),
    "zero.png": (Image.fromarray(IDS), "holds the depth 0, expected positive numbers"),
    "nan.tiff": (Image.fromarray(METRES * np.float32(np.nan)), "holds the depth nan"),
    "infinite.npy": (np.where(METRES > 50, np.inf, METRES), "holds the depth inf"),
    "large.npy": (METRES * np.float64(1e300), "holds the depth inf"),
    "tiny.npy": (METRES * np.float64(1e-300), "holds the depth 0"),
    "batch.npy": (METRES[None], r"has shape \(1, 2, 3\)"),
    "complex.npy": (METRES * 1j, "holds complex"),
    "stack.tiff": (
        lambda path: Image.fromarray(METRES).save(path, save_all=True, append_images=[palette()]),
        "holds 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED_DEPTH)
def test_depth_without_a_clear_meaning_is_refused(tmp_path, name):
    content, message = REFUSED_DEPTH[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^{path}: {message}[^\n]*$"):
        read_depth(path)


@pytest.mark.parametrize("read", [read_ids, read_depth, open_picture, read_flow])
@pytest.mark.parametrize("name", ["none.png", "none.npy"])
def test_a_file_that_is_not_there(tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/{name}: no such file$"):
        read(tmp_path / name)


def flo(vectors, width=7, height=5):
    return struct.pack("<fii", 202021.25, width, height) + vectors.astype("<f4").tobytes()


def test_flow_files(tmp_path):
    flow = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    content = struct.pack("<fii", 202021.25, 7, 5)
    for y in range(5):
        for x in range(7):
            content += struct.pack("<ff", flow[0, y, x], flow[1, y, x])
    np.testing.assert_array_equal(read_flow(write(tmp_path / "a.flo", content)), flow)
    np.testing.assert_array_equal(read_flow(write(tmp_path / "a.npy", flow)), flow)
    for wrong, message in (
        (content[:-4], "has 288 bytes, 7x5 vectors need 292"),
        (b"abc" * 9, "not a .flo file"),
        (b"", "not a .flo file"),
        (flo(flow, -7, -5), "has 292 bytes, -7x-5"),
    ):
        with pytest.raises(ValueError, match=rf"b\.flo: {message}"):
            read_flow(write(tmp_path / "b.flo", wrong))
    with pytest.raises(ValueError, match=r"has shape \(5, 7, 2\)"):
        read_flow(write(tmp_path / "b.npy", flow.transpose(1, 2, 0)))


@pytest.mark.parametrize("mark", [1e10, -1.7e9, np.nan, np.inf])
def test_flow_that_is_marked_as_unknown_is_refused(tmp_path, mark):
    vectors = np.zeros((5, 7, 2))
    vectors[3, :2] = mark
    told = r"unknown flow, at 2 of 35 pixels: every pixel needs one"
    for path in (write(tmp_path / "a.flo", flo(vectors)), write(tmp_path / "a.npy", vectors.transpose(2, 0, 1))):
        with pytest.raises(ValueError, match=rf"^{path}: holds [^ ]+, {told}$"):
            read_flow(path)
