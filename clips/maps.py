"""Maps that people bring, a file each: ids, depth and flow of one picture. What has no clear meaning is refused.

Every error is of one line and begins with the path: ValueError, or FileNotFoundError for a file that is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sources import first_line

UNKNOWN_FLOW = 1e9  # .flo files mark pixels without flow by larger values (the Middlebury benchmark)
GRAY = ("1", "L", "LA", "P", "PA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # Pillow's modes of one value a pixel
CHANGED = ("AVIF", "GIF", "JPEG", "JPEG2000", "MPO", "WEBP")  # formats that blur values or number palettes anew


# ---------------------------------------------------------------------------------------------------------------- files


def open_picture(path: str | os.PathLike, exact: bool = False) -> Image.Image:
    """A picture file, decoded, and upright by its EXIF tag. `exact` refuses what would lose values without a word:
    several pictures in a file (the first would be taken), and colours of 16 bits (Pillow cuts them to 8)."""
    try:
        picture = Image.open(path)
        if exact and getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"holds {picture.n_frames} pictures, expected one")
        if exact and len(picture.getbands()) > 1 and ";16" in str(picture.tile):
            raise ValueError("has colours of 16 bits, expected 8")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: {_unidentified(path)}") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise ValueError(f"{path}: {first_line(error)}") from None


def _unidentified(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "is a HEIC picture: save it as JPEG or PNG"
    return "not an image"


def read_array(path: str | os.PathLike) -> np.ndarray:
    """The numbers of a .npy file."""
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # NumPy, zipfile and the memory of a damaged header
        raise ValueError(f"{path}: {first_line(error)}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        held = values.dtype if isinstance(values, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: holds {held}, expected one array of numbers")
    return values


def _alpha(picture: Image.Image) -> np.ndarray | None:
    """Opacity uint8 [H, W]; None where all is opaque."""
    clear = picture.info.get("transparency")
    if picture.getbands()[-1] == "A":
        alpha = np.asarray(picture.getchannel("A"))
    elif clear is None:
        return None
    elif picture.mode == "P":
        alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    else:  # one gray value or colour is transparent
        same = np.asarray(picture) == np.array(clear)
        alpha = np.where(same.all(axis=-1) if same.ndim == 3 else same, 0, 255)
    return None if (alpha == 255).all() else alpha


def _values(picture: Image.Image, path: str | os.PathLike) -> np.ndarray:
    """[H, W] of a gray picture, also of one that keeps its gray as equal red, green and blue; [H, W, 3] of a colour
    picture. Palettes give their indices."""
    bands = picture.getbands()
    if picture.mode in GRAY:
        return np.asarray(picture if len(bands) == 1 else picture.getchannel(0))
    if bands[:3] != ("R", "G", "B"):
        raise ValueError(f"{path}: is a {picture.mode} picture, expected gray, a palette or RGB")
    rgb = np.asarray(picture)[..., :3]
    return rgb[..., 0] if (rgb == rgb[..., :1]).all() else rgb


# ----------------------------------------------------------------------------------------------------------------- maps


def read_ids(path: str | os.PathLike, colors: bool = False) -> np.ndarray:
    """Ids uint8 [H, W] from .npy, a gray or palette picture (value = id, 0 = background, transparent = background) or,
    with `colors`, a colour picture (colour = object, black = background).

    Without `colors` a colour picture is refused: no two frames of a video would agree on which colour is which id.
    """
    if Path(path).suffix == ".npy":
        return _checked_ids(read_array(path), path)
    picture = open_picture(path, exact=True)
    if picture.format in CHANGED:
        raise ValueError(f"{path}: is a {picture.format} picture, which may change ids: save them as PNG")
    values, alpha = _values(picture, path), _alpha(picture)
    if alpha is not None:
        if not np.isin(alpha, (0, 255)).all():
            raise ValueError(f"{path}: has half transparent pixels: an id is there or not")
        values = np.where(alpha.reshape(alpha.shape + (1,) * (values.ndim - 2)) == 0, 0, values)
    if picture.mode in ("P", "PA"):
        _check_palette(picture, values, path)
    if values.ndim == 2:
        return _checked_ids(values, path)
    if not colors:
        raise ValueError(f"{path}: is a colour picture ({picture.mode}), expected gray or palette: value = id")
    packed = values.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    found, ids = np.unique(np.append(packed, 0), return_inverse=True)  # black is always among them, and first
    if len(found) > 256:
        raise ValueError(f"{path}: has {len(found)} colours, expected one for each object, 255 at most")
    return ids[:-1].reshape(packed.shape).astype(np.uint8)


def _check_palette(picture: Image.Image, indices: np.ndarray, path: str | os.PathLike) -> None:
    """Refuses a palette that a program has ordered anew, so that its indices are no longer ids: another one than 0 is
    black, the colour of the background, and 0 is not."""
    colors = np.array(picture.getpalette("RGB")).reshape(-1, 3)
    black = [i for i in np.unique(indices) if i < len(colors) and not colors[i].any()]
    if colors[0].any() and black:
        told = f"has a palette whose black is {black[0]} and whose 0, the background, is a colour"
        raise ValueError(f"{path}: {told}: save it as RGB or gray")


def _checked_ids(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    if values.ndim != 2:
        raise ValueError(f"{path}: has shape {values.shape}, expected [H, W]")
    wrong = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))
    if wrong.any():
        raise ValueError(f"{path}: holds the id {values[wrong][0]:g}, expected whole numbers from 0 to 255")
    return values.astype(np.uint8)


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Depth float32 [H, W] in any unit, larger = farther, from .npy or a gray picture (8 or 16 bit, or float).

    Refuses what is not a positive number, as zero is how depth cameras mark "unknown", and colour pictures: the colours
    of a colour map are no distances.
    """
    if Path(path).suffix == ".npy":
        depth = read_array(path)
    else:
        picture = open_picture(path, exact=True)
        if _alpha(picture) is not None:
            raise ValueError(f"{path}: has transparent pixels, whose depth is unknown")
        depth = _values(picture.convert("RGB") if picture.mode in ("P", "PA") else picture, path)
        if depth.ndim == 3:
            told = "is a colour picture, and colours are no distances: save depth as 16-bit gray or .npy"
            raise ValueError(f"{path}: {told}")
    if depth.ndim != 2:
        raise ValueError(f"{path}: has shape {depth.shape}, expected [H, W]")
    with np.errstate(over="ignore"):  # infinity is refused below
        depth = depth.astype(np.float32)
    wrong = ~(np.isfinite(depth) & (depth > 0))
    if wrong.any():
        raise ValueError(f"{path}: holds the depth {depth[wrong][0]:g}, expected positive numbers")
    return depth


def read_flow(path: str | os.PathLike) -> np.ndarray:
    """Flow float32 [2, H, W] from .npy, or .flo (magic 202021.25, int32 width and height, then interleaved float32)."""
    flow = read_array(path) if Path(path).suffix == ".npy" else _read_flo(path)
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"{path}: has shape {flow.shape}, expected [2, H, W]")
    with np.errstate(over="ignore"):
        flow = flow.astype(np.float32)
    unknown = ~(np.abs(flow) <= UNKNOWN_FLOW)
    if unknown.any():
        told = f"{flow[unknown][0]:g}, unknown flow, at {unknown.any(axis=0).sum()} of {flow[0].size} pixels"
        raise ValueError(f"{path}: holds {told}: every pixel needs one")
    return flow


def _read_flo(path: str | os.PathLike) -> np.ndarray:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    if len(content) < 12 or np.frombuffer(content, "<f4", 1) != np.float32(202021.25):
        raise ValueError(f"{path}: not a .flo file")
    width, height = (int(side) for side in np.frombuffer(content, "<i4", 2, offset=4))
    if min(width, height) < 1 or len(content) != 12 + 8 * width * height:
        raise ValueError(f"{path}: has {len(content)} bytes, {width}x{height} vectors need {12 + 8 * width * height}")
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)
