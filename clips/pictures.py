"""Every modality as a 3-channel picture in [-1, 1], and back: R_t = (O_t, S_t, D_t) passes through the VAE like RGB.

Each codec is invertible. Flow is (u, v, magnitude) through asinh; ids take colours of a fixed palette in an order that
the first frame shows; depth is inverse depth in the first frame's range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOW_RANGE = 32.0  # pixels per frame step that reach the ends of [-1, 1]; larger flow goes beyond, it is not cut off
DEPTH_MARGIN = 0.25  # room, in first-frame ranges of 1/depth, for what comes nearer or goes farther later


# -------------------------------------------------------------------------------------- modality <-> picture in [-1, 1]


def flow_to_picture(flow: Tensor) -> Tensor:
    """[..., 2, H, W] pixels -> [..., 3, H, W]: (u, v, 2 |f| - 1), each through asinh: small motion keeps precision."""
    squash = math.asinh(FLOW_RANGE)
    magnitude = flow.norm(dim=-3, keepdim=True)
    return torch.cat([flow.asinh() / squash, 2 * magnitude.asinh() / squash - 1], dim=-3)


def picture_to_flow(picture: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., 2, H, W]: direction from (u, v), length the geometric mean of theirs and of the third
    channel's, which is small where either is: noise in a picture of no motion stays below it.
    """
    squash = math.asinh(FLOW_RANGE)
    flow = (picture[..., :2, :, :] * squash).sinh()
    length = flow.norm(dim=-3, keepdim=True)
    magnitude = ((picture[..., 2:, :, :] + 1) / 2 * squash).sinh().clamp(min=0)
    return flow * (magnitude / length.clamp(min=1e-6)).sqrt()


def _palette() -> Tensor:
    """[256, 3]: black for the background, the other corners of the RGB cube, neighbours far apart, then what is left of
    a 7x7x7 grid, always the colour farthest from all before it."""
    axis = torch.linspace(-1, 1, 7)
    grid = torch.cartesian_prod(axis, axis, axis)
    corners = ["000", "100", "011", "010", "101", "001", "110", "111"]  # RGB
    palette = torch.tensor([[2.0 * int(bit) - 1 for bit in corner] for corner in corners])
    distance = (grid[:, None] - palette).square().sum(-1).amin(1)
    while len(palette) < 256:
        palette = torch.cat([palette, grid[distance.argmax(), None]])
        distance = torch.minimum(distance, (grid - palette[-1]).square().sum(-1))
    return palette


PALETTE = _palette()


def color_order(first: Tensor | None) -> Tensor:
    """First-frame ids [H, W] -> [256]: palette index of every id; the ids themselves where no first frame is known.

    Colours go from left to right by centroid (then top to bottom), an order that anybody can read off the first frame;
    ids that only appear later come last.
    """
    if first is None:
        return torch.arange(256)
    height, width = first.shape
    count = torch.bincount(first.flatten(), minlength=256).double()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    center_x, center_y = (
        torch.bincount(first.flatten(), axis.flatten().double().to(first.device), minlength=256) / count
        for axis in (x, y)
    )
    keys = zip(
        (count == 0).tolist(), center_x.nan_to_num().tolist(), center_y.nan_to_num().tolist(), range(256), strict=True
    )
    ids = [key[-1] for key in sorted(list(keys)[1:])]
    order = torch.zeros(256, dtype=torch.long)
    order[torch.tensor(ids)] = torch.arange(1, 256)
    return order.to(first.device)


def segmentation_to_picture(segmentation: Tensor, first: Tensor | None) -> Tensor:
    """Ids [T, H, W], first-frame ids [H, W] -> [T, 3, H, W] in the palette's colours, in the order of `color_order`."""
    colors = PALETTE.to(segmentation.device)[color_order(first)]
    return colors[segmentation].movedim(-1, -3)


def picture_to_segmentation(picture: Tensor, first: Tensor | None) -> Tensor:
    """[T, 3, H, W] -> ids [T, H, W]: the nearest colour among the background and the ids that the first frame shows.

    Without a first frame, the first eight colours (background and seven corners of the RGB cube) are the candidates.
    """
    ids = torch.arange(8) if first is None else torch.cat([first.new_zeros(1), first.flatten()]).unique()
    ids = ids.to(picture.device)
    colors = PALETTE.to(picture.device)[color_order(first).to(picture.device)[ids]]
    return ids[torch.cdist(picture.movedim(-3, -1).float(), colors).argmin(-1)]


def depth_range(first: Tensor | None) -> tuple[float, float]:
    """Ends of the inverse depth scale, from the first frame [H, W] with a margin; (0, 1) where no depth is known."""
    if first is None:
        return 0.0, 1.0
    low, high = (1 / first.max()).item(), (1 / first.min()).item()
    margin = DEPTH_MARGIN * max(high - low, 0.1 * high)
    return max(low - margin, 0.0), high + margin


def depth_to_picture(depth: Tensor, first: Tensor | None) -> Tensor:
    """Depth [T, H, W] -> [T, 3, H, W]: inverse depth (near is bright), normalised by the first frame's range."""
    low, high = depth_range(first)
    gray = (1 / depth - low) / (high - low) * 2 - 1
    return gray.unsqueeze(-3).expand(*gray.shape[:-2], 3, *gray.shape[-2:])


def picture_to_depth(picture: Tensor, first: Tensor | None) -> Tensor:
    """[T, 3, H, W] -> depth [T, H, W]; what decodes to "beyond infinity" becomes 100 times the nearest distance."""
    low, high = depth_range(first)
    inverse = (picture.mean(dim=-3) + 1) / 2 * (high - low) + low
    return 1 / inverse.clamp(min=high / 100)
