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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clips import open_picture, read_depth, read_ids
from inputs.arrows import SHOWN, Arrows, apply_shapes, arrows_to_flow, told_mask
from inputs.find import at_hand, choose_finder, estimate_depth, grow_region
from svd import VAE

# -------------------------------------------------------------------------------------- pictures that a user brings


SPECK = 0.0005  # of the picture: an id that is smaller is no object that somebody marks
LEAST_DECIBELS = 27  # from a picture to what the VAE gives back: between what it was trained on and photos
DARKEST = 15  # of 255: where nothing is brighter, values were read in the wrong range
ONE_OF_MANY = ("MPO", "PSD")  # formats whose first picture is the photo: others are previews, gain maps or layers
REDUCED, WHITE_IS_ZERO, DNG = 254, 262, 50706  # TIFF tags


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]: upright by its EXIF tag, transparent parts over white, 16 bit cut to 8, floats
    from 0 to 1. Raises ValueError, or FileNotFoundError, that names the file: of one without a clear meaning, too."""
    picture = open_picture(path)
    if reason := _unclear(picture):
        raise ValueError(f"{path}: {reason}")
    if picture.mode[0] in "IF":
        picture = Image.fromarray(_as_bytes(picture, path))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    rgb = np.array(picture.convert("RGB"))
    if rgb.max() <= DARKEST:
        raise ValueError(f"{path}: is black, no value is above {rgb.max()} of 255: was it saved with too many bits?")
    return rgb


def _unclear(picture: Image.Image) -> str | None:
    """What keeps a file from being one photo."""
    tags = getattr(picture, "tag_v2", {})
    try:
        count = getattr(picture, "n_frames", 1)
    except Exception:  # Pillow raises whatever damaged bytes lead it to
        return "holds several pictures, and one is damaged"
    if count > 1 and picture.format not in ONE_OF_MANY:
        return f"holds {count} pictures, expected one: save the one that you mean"
    if DNG in tags or tags.get(REDUCED) in (1, 3, 5, 7):  # the first bit
        return "is a raw photo or only the preview of one: save it as JPEG or PNG"
    if picture.mode[0] in "IF" and tags.get(WHITE_IS_ZERO) == 0:
        return "is a negative, white is 0: save it with black as 0"
    if picture.mode[0] not in "IF" and picture.mode not in SHOWN:
        return f"is a {picture.mode} picture: save it as RGB"
    return None


def _as_bytes(picture: Image.Image, path: str | os.PathLike) -> np.ndarray:
    """A gray picture of 16 bits or floats -> uint8 [H, W]."""
    values = np.asarray(picture)
    if picture.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{path}: holds floats from {values.min():g} to {values.max():g}, expected 0 to 1 (white)")
        return (255 * values).round().astype(np.uint8)
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # theirs are 16 bits in numbers of 32
        raise ValueError(f"{path}: has 32 bits, of which white is unknown: save it with 8 or 16")
    return (values.astype(np.int64) >> 8).astype(np.uint8)


def read_segmentation(path: str | os.PathLike) -> np.ndarray:
    """Ids uint8 [H, W] from a gray or palette picture (value = id), a colour picture (colour = object, black = 0) or a
    .npy file. Errors as `read_rgb`'s."""
    return read_ids(path, colors=True)


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


@torch.no_grad()
def doubt_of(inputs: Inputs, canvas: Canvas, vae: VAE, device: str) -> str:
    """A word for people, with a semicolon before it, about a picture that the model's VAE cannot show; else nothing.

    The demo's VAE gives 120 first frames of simulated dominoes back with 28.1 to 34.8 dB, 14 photos with 18.1 to 26.3.
    """
    image = canvas.pad(torch.from_numpy(inputs.rgb).permute(2, 0, 1).float() / 127.5 - 1)[None].to(device)
    back = vae.decode(vae.encode(image)[:, None])[:, 0].float()
    decibels = -10 * canvas.crop((back - image) / 2).square().mean().log10().item()
    if decibels >= LEAST_DECIBELS:
        return ""
    return f"; such pictures are strange to the model: its VAE gives this one back with {decibels:.1f} dB only"


# -------------------------------------------------------------------------------------------------------------- reading


def _read_map(read: Callable[[str], np.ndarray], path: str, rgb: np.ndarray) -> np.ndarray:
    """Ids or depth, which must have the size of `rgb`. Raises ValueError or FileNotFoundError that name the file."""
    value = read(path)
    if value.shape != rgb.shape[:2]:
        size, wanted = (f"{shape[1]}x{shape[0]}" for shape in (value.shape, rgb.shape))
        raise ValueError(f"{path}: is {size}, the image is {wanted}")
    return value


def read_inputs(arguments: argparse.Namespace, arrows_path: str | None, device: str) -> Inputs:
    """What the command line names. Raises ValueError or FileNotFoundError of one line that name file and value."""
    for flag, word in (("segment", "sam"), ("depth", "estimate")):
        if getattr(arguments, flag) == word and importlib.util.find_spec("transformers") is None:
            raise ValueError(f"--{flag} {word} needs transformers: pip install transformers")
    rgb = read_rgb(arguments.image)
    if arguments.svd:
        return _picture_alone(arguments, arrows_path, rgb)
    given = Arrows.load(arrows_path) if arrows_path else Arrows()
    path = arguments.segmentation or given.segmentation
    ids = _read_map(read_segmentation, path, rgb) if path else None
    depth, depth_origin = read_or_estimate_depth(arguments, given, rgb, device)
    unnamed = ids is None and any(arrow.instance is None and arrow.shape is None for arrow in given.arrows)
    find, how = choose_finder(arguments, device) if unnamed else (grow_region, "")
    arrows, ids, told = apply_shapes(given, rgb, ids, find, how)
    for line in told:
        print(line)
    if told:
        print("Only the arrows' objects are marked. Mark every object that can move: --segmentation ids.png")
    if given.rest and not set(np.unique(ids)) - {0} - {arrow.instance for arrow in arrows.arrows}:
        raise ValueError(f'{given.name}: rest is "{given.rest}", but no other object is marked: --segmentation ids.png')
    if path and (doubt := soft_edges(ids)):
        print(f"{path}: {doubt}")
    objects = f"objects from {path}" if path else f"objects: {how}" if unnamed else "objects as the arrows say"
    depth = None if depth is None else torch.from_numpy(depth)
    return Inputs(rgb, given, arrows, torch.from_numpy(ids).long(), depth, f"{objects}; {depth_origin}")


def soft_edges(ids: np.ndarray) -> str:
    """What speaks against ids [H, W] that somebody painted, for people; "" if nothing does. A soft brush leaves a rim
    of many values, each an id of a few pixels."""
    sizes = np.bincount(ids.ravel(), minlength=256)[1:]
    count, specks = np.count_nonzero(sizes), np.count_nonzero((sizes > 0) & (sizes < SPECK * ids.size))
    if specks < 8 or 2 * specks < count:
        return ""
    return f"has {count} objects, {specks} of a few pixels: are its edges soft? Paint ids with a hard brush"


def _picture_alone(arguments: argparse.Namespace, arrows_path: str | None, rgb: np.ndarray) -> Inputs:
    """For plain SVD, which is told nothing else. Says so where the user brought more."""
    depth = None if arguments.depth in ("auto", "none") else arguments.depth
    if unused := [name for name in (arrows_path, arguments.segmentation, depth) if name]:
        print(f"--svd {arguments.svd}: plain SVD sees the picture alone, so these are not used: {', '.join(unused)}")
    nothing = Arrows(name=arrows_path or "arrows")
    return Inputs(rgb, nothing, nothing, torch.zeros(rgb.shape[:2], dtype=torch.long), None, "the picture alone")


def read_or_estimate_depth(
    arguments: argparse.Namespace, given: Arrows, rgb: np.ndarray, device: str
) -> tuple[np.ndarray | None, str]:
    """`--depth`: a file, or auto (the file of arrows.json, else an estimate where that needs no download), estimate or
    none -> depth [H, W] and where it comes from."""
    told, model = arguments.depth, arguments.depth_model
    path = {"auto": given.depth, "estimate": None, "none": None}.get(told, told)
    if path:
        return _read_map(read_depth, path, rgb), f"depth from {path}"
    if told == "estimate" or (told == "auto" and at_hand(model)):
        return estimate_depth(rgb, model, device, local=told == "auto"), f"depth by {model}"
    return None, "no depth"
