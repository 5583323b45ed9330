"""What a user brings, made ready for the model: a picture of any size, its arrows, ids and depth, read or estimated.

    inputs = read_inputs(arguments, "arrows.json", device)     # in pixels of the user's picture
    inputs, canvas = fit(inputs, width=512, height=320)        # in pixels of the model's

Objects: what arrows.json says, else `--segment`: SAM 2 at an arrow's tail, or the region of its colour. Depth: a file,
else `--depth`: Depth-Anything-V2. Both networks come with the optional package transformers; "auto" takes them only
where package and weights are on this machine already, and never downloads.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from inputs.arrows import Arrows, apply_shapes, arrows_to_flow, told_mask
from inputs.find import at_hand, choose_finder, estimate_depth, grow_region

# -------------------------------------------------------------------------------------- pictures that a user brings


def _open_picture(path: str | os.PathLike) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: {reason}") from None


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]: upright by its EXIF tag, transparent parts over white, 16 bit cut to 8."""
    picture = _open_picture(path)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def read_segmentation(path: str | os.PathLike) -> np.ndarray:
    """Ids uint8 [H, W] from a gray or palette picture (value = id) or a colour picture (colour = object, black = 0)."""
    picture = _open_picture(path)
    if picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"{path}: holds the id {values.max()}, expected 0 to 255")
        return values.astype(np.uint8)
    packed = np.asarray(picture.convert("RGB")).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    colors, ids = np.unique(np.append(packed, 0), return_inverse=True)  # black is always among them, and first
    if len(colors) > 256:
        raise ValueError(f"{path}: has {len(colors)} colours, expected one for each object, 255 at most")
    return ids[:-1].reshape(packed.shape).astype(np.uint8)


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Depth float32 [H, W] in any unit from a gray picture (8 or 16 bit, larger = farther) or a .npy file.

    Raises ValueError when a value is not a positive number: zero is how depth cameras mark "unknown".
    """
    if Path(path).suffix == ".npy":
        try:
            depth = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        picture = _open_picture(path)
        depth = np.asarray(picture if picture.mode[0] in "IF" else picture.convert("L"))
    if depth.ndim != 2:
        raise ValueError(f"{path}: has shape {depth.shape}, expected [H, W]")
    depth = depth.astype(np.float32)
    if not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError(f"{path}: holds the depth {np.nan_to_num(depth, nan=0.0).min():g}, expected positive numbers")
    return depth


@dataclass
class Inputs:
    """What the user gave; maps that are absent are None."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    given: Arrows  # as in the file
    arrows: Arrows  # every arrow names its object
    ids: Tensor  # [H, W], shapes of arrows.json included
    depth: Tensor | None  # [H, W]
    origin: str  # where ids and depth come from, for people

    def told(self, frames: int, canvas: Canvas, device: str) -> dict[str, Tensor | None]:
        """What `dream` wants to be told, by its names: a batch of one, of the model's size."""
        image = torch.from_numpy(self.rgb).permute(2, 0, 1).float() / 127.5 - 1
        segmentation = self.ids if self.ids.any() else None
        maps = {"image": image, "segmentation": segmentation, "depth": self.depth}
        maps |= {"F": arrows_to_flow(self.arrows, self.ids, frames), "mask": told_mask(self.arrows, self.ids)}
        told = {n: None if value is None else canvas.pad(value)[None].to(device) for n, value in maps.items()}
        return told | {"camera": torch.tensor([self.arrows.camera], dtype=torch.float32, device=device)}


@dataclass(frozen=True)
class Canvas:
    """The model's picture, height x width, with the user's in its middle, whose edge is repeated around it."""

    height: int
    width: int
    inner: tuple[int, int]  # height, width of the user's picture after resizing

    @property
    def corner(self) -> tuple[int, int]:
        return (self.height - self.inner[0]) // 2, (self.width - self.inner[1]) // 2

    def pad(self, x: Tensor) -> Tensor:
        """[..., h, w] -> [..., height, width]."""
        (top, left), (h, w) = self.corner, self.inner
        rows = (torch.arange(self.height) - top).clamp(0, h - 1)
        columns = (torch.arange(self.width) - left).clamp(0, w - 1)
        return x[..., rows[:, None], columns]

    def crop(self, x: Tensor) -> Tensor:
        """[..., height, width] -> [..., h, w]."""
        (top, left), (h, w) = self.corner, self.inner
        return x[..., top : top + h, left : left + w]


def fit(inputs: Inputs, width: int, height: int) -> tuple[Inputs, Canvas]:
    """Resizes picture, maps and arrows into width x height, the aspect kept. Raises ValueError that names an arrow
    whose object is too small to be left."""
    old_height, old_width = inputs.rgb.shape[:2]
    scale = min(width / old_width, height / old_height)
    h, w = max(1, round(old_height * scale)), max(1, round(old_width * scale))
    canvas = Canvas(height, width, (h, w))
    if (h, w) == (old_height, old_width):
        return inputs, canvas
    rgb = np.array(Image.fromarray(inputs.rgb).resize((w, h), Image.Resampling.LANCZOS))
    ids, depth = _nearest(inputs.ids.byte(), h, w), None if inputs.depth is None else _nearest(inputs.depth, h, w)
    arrows = inputs.arrows.scaled(w / old_width, h / old_height)
    for number, arrow in enumerate(arrows.arrows, 1):
        if not (ids == arrow.instance).any():
            raise ValueError(
                f"{arrows.name}: arrow {number}: its object is too small: nothing is left of it at {w}x{h}"
            )
    return replace(inputs, rgb=rgb, ids=ids.long(), depth=depth, arrows=arrows), canvas


def _nearest(values: Tensor, height: int, width: int) -> Tensor:
    """[H, W] -> [height, width]. For ids, and for depth: between two distances there is nothing to be seen."""
    picture = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture))


# -------------------------------------------------------------------------------------------------------------- reading


def _read(read: Callable[[str], np.ndarray], path: str, rgb: np.ndarray | None = None) -> np.ndarray:
    """A picture file by one of the readers above; a map must have the size of `rgb`. Raises ValueError or
    FileNotFoundError that name the file, also of one that is damaged behind its header."""
    try:
        value = read(path)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from None
    if rgb is not None and value.shape != rgb.shape[:2]:
        size, wanted = (f"{shape[1]}x{shape[0]}" for shape in (value.shape, rgb.shape))
        raise ValueError(f"{path}: is {size}, the image is {wanted}")
    return value


def read_inputs(arguments: argparse.Namespace, arrows_path: str | None, device: str) -> Inputs:
    """What the command line names. Raises ValueError or FileNotFoundError of one line that name file and value."""
    for flag, word in (("segment", "sam"), ("depth", "estimate")):
        if getattr(arguments, flag) == word and importlib.util.find_spec("transformers") is None:
            raise ValueError(f"--{flag} {word} needs transformers: pip install transformers")
    rgb = _read(read_rgb, arguments.image)
    given = Arrows.load(arrows_path) if arrows_path else Arrows()
    path = arguments.segmentation or given.segmentation
    ids = _read(read_segmentation, path, rgb) if path else None
    depth, depth_origin = read_or_estimate_depth(arguments, given, rgb, device)
    unnamed = ids is None and any(arrow.instance is None and arrow.shape is None for arrow in given.arrows)
    find, how = choose_finder(arguments, device) if unnamed else (grow_region, "")
    arrows, ids, told = apply_shapes(given, rgb, ids, find, how)
    for line in told:
        print(line)
    if told:
        print("Only the arrows' objects are marked. Mark every object that can move: --segmentation ids.png")
    objects = f"objects from {path}" if path else f"objects: {how}" if unnamed else "objects as the arrows say"
    depth = None if depth is None else torch.from_numpy(depth)
    return Inputs(rgb, given, arrows, torch.from_numpy(ids).long(), depth, f"{objects}; {depth_origin}")


def read_or_estimate_depth(
    arguments: argparse.Namespace, given: Arrows, rgb: np.ndarray, device: str
) -> tuple[np.ndarray | None, str]:
    """`--depth`: a file, or auto (the file of arrows.json, else an estimate where that needs no download), estimate or
    none -> depth [H, W] and where it comes from."""
    told, model = arguments.depth, arguments.depth_model
    path = {"auto": given.depth, "estimate": None, "none": None}.get(told, told)
    if path:
        return _read(read_depth, path, rgb), f"depth from {path}"
    if told == "estimate" or (told == "auto" and not arguments.svd and at_hand(model)):
        return estimate_depth(rgb, model, device, local=told == "auto"), f"depth by {model}"
    return None, "no depth"
