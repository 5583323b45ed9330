"""Whatever picture a user brings, of every format and mode that Pillow writes, whole or damaged: it is read, or refused
in one line that names the file."""

import warnings

import numpy as np
import pytest
from PIL import Image

from inputs import Arrow, read_depth, read_rgb, read_segmentation

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

quick = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same cases on every machine
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
FORMATS = ("PNG", "TIFF", "GIF", "BMP", "JPEG", "WEBP", "JPEG2000", "PPM", "TGA", "ICO")


def picture(mode, size, seed, scale):
    random = np.random.default_rng(seed)
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        with np.errstate(all="ignore"):
            return Image.fromarray((random.random(size[::-1]) * scale).astype(kind))
    bands = len(Image.new(mode, (1, 1)).getbands())
    bits = random.integers(0, 256, size=(size[1], size[0], bands), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(bits[..., 0] > 127)
    made = Image.frombytes(mode, size, bits.tobytes())
    if mode == "P":
        made.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return made


def is_read_or_refused(read, path):
    """What `read` makes of the file; None when it says in one line what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error) and "\n" not in str(error), repr(str(error))
        assert len(str(error)) < len(str(path)) + 200
        return None


def check_all(path):
    rgb = is_read_or_refused(read_rgb, path)
    assert rgb is None or (rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.max() > 15)
    ids, depth = (is_read_or_refused(read, path) for read in (read_segmentation, read_depth))
    assert ids is None or (ids.dtype == np.uint8 and ids.ndim == 2)
    assert depth is None or (depth.dtype == np.float32 and (depth > 0).all() and np.isfinite(depth).all())
    shape = next((map.shape[:2] for map in (rgb, ids, depth) if map is not None), (3, 5))
    is_read_or_refused(lambda path: Arrow((0, 0), (1, 1), mask=str(path)).area(*shape), path)


@quick
@hypothesis.given(
    mode=st.sampled_from(MODES),
    format=st.sampled_from(FORMATS),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
    scale=st.sampled_from((0.5, 1, 3, 255, 4095, 65535, 1e38, -1, np.nan, np.inf)),
    many=st.booleans(),
    exif=st.integers(0, 9),
    tags=st.dictionaries(st.sampled_from((254, 262, 50706)), st.integers(0, 3), max_size=2),
    damage=st.none() | st.tuples(st.floats(0, 1), st.integers(0, 255)),
    cut=st.none() | st.floats(0, 1),
)
def test_any_picture(tmp_path_factory, mode, format, size, seed, scale, many, exif, tags, damage, cut):
    path = tmp_path_factory.getbasetemp() / f"any.{format.lower()}"
    made = picture(mode, size, seed, scale)
    extra = {"save_all": True, "append_images": [picture(mode, size, seed + 1, scale)]} if many else {}
    extra |= {"exif": Image.Exif()} if exif and format not in ("TIFF", "BMP", "PPM", "TGA", "ICO", "GIF") else {}
    if "exif" in extra:
        extra["exif"][0x0112] = exif
    if format == "TIFF":
        extra["tiffinfo"] = tags
    try:
        made.save(path, format, **extra)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SystemError):
        hypothesis.reject()  # this format has no such pictures
    content = bytearray(path.read_bytes())
    if damage:
        content[int(damage[0] * (len(content) - 1))] = damage[1]
    path.write_bytes(content[: len(content) if cut is None else int(cut * len(content))])
    check_all(path)


@quick
@hypothesis.given(
    content=st.binary(max_size=80), start=st.sampled_from((b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"GIF89a"))
)
def test_any_bytes(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(start + content)
    check_all(path)
