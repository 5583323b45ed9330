"""The motion representation R_t = (O_t, S_t, D_t) of a batch: its file, and its modalities as pictures and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from clips.pictures import (
    depth_to_picture,
    flow_to_picture,
    picture_to_depth,
    picture_to_flow,
    picture_to_segmentation,
    segmentation_to_picture,
)
from sources import open_safetensors
from weights import whole_file


@dataclass
class Motion:
    """R_t of a batch; None = absent.

    flow [B, T, 2, H, W]: pixels per frame step, dx to the right, dy down, frame t -> t + 1. segmentation [B, T, H, W]:
    ids, 0 = background. depth [B, T, H, W]: any positive unit, along the viewing axis.
    """

    flow: Tensor | None
    segmentation: Tensor | None
    depth: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Motion:
        """`change` of all that is there."""
        return Motion(**{name: None if value is None else change(value) for name, value in vars(self).items()})

    def to(self, device: str | torch.device) -> Motion:
        return self.map(lambda value: value.to(device))

    def save(self, path: str | os.PathLike) -> None:
        """`motion.safetensors`: the file between the stages, for looking at and editing; a tensor for each field, by
        its name, in the shapes and units above. Raises ValueError for what `load` would not read."""
        motion = self.map(Tensor.cpu).checked(path)
        parts = {name: value.contiguous() for name, value in vars(motion).items() if value is not None}
        with whole_file(path) as partial:
            save_file(parts, partial)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        needs: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> Motion:
        """Numbers of any usual type, as `checked` gives them back. Raises FileNotFoundError, or ValueError that names
        file and part: damaged, no motion, or no video of what `needs` names, of that size (height, width) and length.
        """
        with open_safetensors(path) as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        if not parts or parts.keys() - RANGES.keys():
            raise ValueError(f"{path}: holds {', '.join(sorted(parts)) or 'nothing'}, expected {', '.join(RANGES)}")
        if missing := [name for name in needs if name not in parts]:
            raise ValueError(f"{path}: has no {', '.join(missing)}, which this model paints from")
        motion = cls(**{name: parts.get(name) for name in RANGES}).checked(path)
        first = next(name for name in RANGES if name in parts)
        batch, count, height, width = extent(parts[first])
        if size not in (None, (height, width)):
            raise ValueError(f"{path}: {first} is {width}x{height}, the image {size[1]}x{size[0]}")
        if needs and (batch != 1 or count < 2):
            raise ValueError(f"{path}: has {batch} videos of {count} frames, expected one, of 2 or more")
        if frames not in (None, count):
            raise ValueError(f"{path}: has {count} frames, --frames says {frames}")
        return motion

    def checked(self, path: str | os.PathLike) -> Motion:
        """The same as float32 and, ids, int64. Raises ValueError that names `path` and the part for another shape or
        type, for parts that do not fit together, and for a number that is no flow, id or depth."""
        try:
            motion = Motion(
                **{name: value if value is None else usual(name, value) for name, value in vars(self).items()}
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        extents = {name: extent(value) for name, value in vars(motion).items() if value is not None}
        if len(set(extents.values())) > 1:
            told = [f"{name} {b} x {t} frames of {w}x{h}" for name, (b, t, h, w) in extents.items()]
            raise ValueError(f"{path}: its parts do not fit together: {', '.join(told)}")
        return motion


TYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32}
TYPES |= {torch.int64, torch.uint16, torch.uint32, torch.uint64}
RANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {  # not of NaN
    "flow": (lambda x: x.abs() < 1e9, "pixels (1e9 and more means unknown in files of flow)"),
    "segmentation": (lambda x: (x >= 0) & (x <= 255) & (x == x.floor()), "ids: whole numbers of 0 to 255"),
    "depth": (lambda x: (x > 1e-30) & (x < 1e30), "a distance above 0"),
}


def extent(value: Tensor) -> tuple[int, int, int, int]:
    """B, T, H, W of a part."""
    return (*value.shape[:2], *value.shape[-2:])


def usual(name: str, value: Tensor) -> Tensor:
    """A part in its usual type. Raises ValueError that names it."""
    shape = ["B", "T", "2", "H", "W"] if name == "flow" else ["B", "T", "H", "W"]
    if value.ndim != len(shape) or 0 in value.shape or (name == "flow" and value.shape[2] != 2):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [{', '.join(shape)}]")
    if value.dtype not in TYPES:
        raise ValueError(f"{name} is of {value.dtype}, expected {'int64' if name == 'segmentation' else 'float32'}")
    numbers, (fits, expected) = value.double(), RANGES[name]
    if not (good := fits(numbers)).all():
        raise ValueError(f"{name} holds {numbers[~good][0].item():g}, expected {expected}")
    return value.long() if name == "segmentation" else value.float()


def render(modality: str, value: Tensor, first: Tensor | None = None) -> Tensor:
    """A modality [B, T, ...] as pictures [B, T, 3, H, W]; `first` is S_0 or D_0 [B, H, W]: sets colours and scale."""
    if modality == "rgb":
        return value
    if modality == "flow":
        return flow_to_picture(value)
    return {"segmentation": segmentation_to_picture, "depth": depth_to_picture}[modality](value, first)


def unrender(modality: str, pictures: Tensor, first: Tensor | None = None) -> Tensor:
    """The inverse of `render`."""
    if modality == "rgb":
        return pictures
    if modality == "flow":
        return picture_to_flow(pictures)
    return {"segmentation": picture_to_segmentation, "depth": picture_to_depth}[modality](pictures, first)


def draft_video(image: Tensor, segmentation: Tensor) -> Tensor:
    """I_0 [B, 3, H, W] and S_t [B, T, H, W] -> [B, T, 3, H, W]: I_0, on which whatever pixel has come to another object
    has the mean colour that this object has in I_0. Not the paper's; a small Stage II need only correct it.

    An object that I_0 does not show gets the mean colour of the background.
    """
    ids, first = segmentation.flatten(1), segmentation[:, 0].flatten(1)
    count = int(segmentation.max()) + 1
    member = nnf.one_hot(first, count).to(image)  # [B, H W, ids]
    size = member.sum(dim=1)[:, None]
    mean = image.flatten(2) @ member / size.clamp(min=1)  # [B, 3, ids]
    mean = torch.where(size > 0, mean, mean[:, :, :1])
    painted = mean.gather(2, ids[:, None].expand(-1, 3, -1)).view(len(image), 3, *segmentation.shape[1:])
    stays = (segmentation == segmentation[:, :1])[:, None]
    return rearrange(torch.where(stays, image[:, :, None], painted), "b c t h w -> b t c h w")
