"""The motion representation R_t = (O_t, S_t, D_t) of a batch: its file, and its modalities as pictures and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors import safe_open
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
        its name, in the shapes and units above."""
        parts = {name: value.cpu().contiguous() for name, value in vars(self).items() if value is not None}
        with whole_file(path) as partial:
            save_file(parts, partial)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Motion:
        """Raises ValueError that names the file when it is missing, damaged, misshapen or holds NaN."""
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except Exception as error:
            raise ValueError(f"{path}: {error}") from None
        unknown = set(parts) - {"flow", "segmentation", "depth"}
        if unknown or not parts:
            raise ValueError(
                f"{path}: holds {', '.join(sorted(parts)) or 'nothing'}, expected flow, segmentation, depth"
            )
        for name, value in parts.items():
            if value.ndim != (5 if name == "flow" else 4):
                raise ValueError(f"{path}: {name} has shape {list(value.shape)}")
            if not torch.isfinite(value.float()).all():
                raise ValueError(f"{path}: {name} holds a value that is not finite")
        return cls(**{name: parts.get(name) for name in ("flow", "segmentation", "depth")})


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
