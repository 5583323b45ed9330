"""Every modality as a 3-channel picture in [-1, 1], and back: R_t = (O_t, S_t, D_t) passes through the VAE like RGB.

Each codec is invertible. Flow is (u, v, magnitude) through asinh; ids take colours of a fixed palette in an order that
the first frame shows; depth is inverse depth in the first frame's range. All take batches ([..., T, ...] with
[...] first frames), and nothing that turns a modality into a picture waits for a GPU.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

FLOW_RANGE = 32.0  # pixels per frame step that reach the ends of [-1, 1]; larger flow goes beyond, it is not cut off
CODEC_VERSION = 1  # raise it when a picture changes: latents of another version are never used again
DEPTH_MARGIN = 0.25  # room, in first-frame ranges of 1/depth, for what comes nearer or goes farther later


# -------------------------------------------------------------------------------------- modality <-> picture in [-1, 1]


def flow_to_picture(flow: Tensor) -> Tensor:
    """[..., 2, H, W] pixels -> [..., 3, H, W]: (u, v, 2 |f| - 1), each through asinh: small motion keeps precision."""
    squash = math.asinh(FLOW_RANGE)
    magnitude = flow.norm(dim=-3, keepdim=True)
    return torch.cat([flow.asinh() / squash, 2 * magnitude.asinh() / squash - 1], dim=-3)


def picture_to_flow(picture: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., 2, H, W]: direction from (u, v), length the geometric mean of theirs and of the third
    channel's. It is small if either is small, so noise in a picture of no motion decodes to almost none.
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


@cache
def _palette_on(device: torch.device) -> Tensor:
    return PALETTE.to(device)


def color_order(first: Tensor | None) -> Tensor:
    """First-frame ids [..., H, W] -> [..., 256]: palette index of every id; the ids themselves where no first frame is
    known.

    Colours go from left to right by centroid (then top to bottom), an order that anybody can read off the first frame;
    ids that only appear later come last.
    """
    if first is None:
        return torch.arange(256)
    height, width = first.shape[-2:]
    ids = first.long().flatten(-2)  # [..., H W]
    rows = torch.arange(height, device=ids.device).repeat_interleave(width)
    columns = torch.arange(width, device=ids.device).repeat(height)
    count = _totals(torch.ones_like(rows), ids)
    y, x = (torch.where(count > 0, _totals(axis, ids) / count, torch.inf) for axis in (rows, columns))  # absent: last
    ranked = y.argsort(dim=-1, stable=True)  # equal ones stay in the order of the ids
    ranked = ranked.gather(-1, x.gather(-1, ranked).argsort(dim=-1, stable=True))
    places = torch.arange(1, 256, device=ids.device).expand_as(ranked)
    return ids.new_zeros(*ids.shape[:-1], 256).scatter_(-1, ranked + 1, places)


def _totals(values: Tensor, ids: Tensor) -> Tensor:
    """Values [H W] of a frame's pixels, ids [..., H W] -> sums over the pixels of the ids 1 to 255, [..., 255]. Exact:
    whole numbers have the same sum in whatever order a GPU adds them."""
    sums = ids.new_zeros(*ids.shape[:-1], 256).scatter_add_(-1, ids, values.expand_as(ids))
    return sums[..., 1:].double()


def segmentation_to_picture(segmentation: Tensor, first: Tensor | None) -> Tensor:
    """Ids [..., T, H, W], first-frame ids [..., H, W] -> [..., T, 3, H, W]: the palette's colours, in the order of
    `color_order`."""
    ids = segmentation.long().flatten(-3)  # [..., T H W]
    if first is not None:
        ids = color_order(first).expand(*ids.shape[:-1], 256).gather(-1, ids)
    return _palette_on(ids.device)[ids.view(segmentation.shape)].movedim(-1, -3)


def picture_to_segmentation(picture: Tensor, first: Tensor | None) -> Tensor:
    """[..., T, 3, H, W] -> ids [..., T, H, W]: the nearest colour among the background and the ids that the first frame
    [..., H, W] shows.

    Without a first frame, the first eight colours (background and seven corners of the RGB cube) are the candidates.
    """
    colors, lead = picture.movedim(-3, -1).float(), picture.shape[:-4]  # [..., T, H, W, 3]
    every = torch.arange(256, device=picture.device)
    if first is None:
        ids = every[:8].expand(*lead, 8)
    else:
        shown = torch.zeros(*lead, 256, dtype=torch.bool, device=picture.device)
        shown = shown.scatter_(-1, first.long().flatten(-2).to(picture.device), True) | (every == 0)
        most = int(shown.sum(dim=-1).max())
        ids = torch.where(shown, every, 256).sort(dim=-1).values[..., :most]  # 256: no candidate, in samples with fewer
    order = color_order(first).to(picture.device).expand(*lead, 256)
    candidates = _palette_on(picture.device)[order.gather(-1, ids.clamp(max=255))]  # [..., N, 3]
    distance = torch.cdist(colors.flatten(-4, -2), candidates)  # [..., T H W, N]
    nearest = distance.masked_fill((ids == 256).unsqueeze(-2), torch.inf).argmin(dim=-1)
    return ids.gather(-1, nearest).view(colors.shape[:-1])


def depth_range(first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ends of the inverse depth scale, from the first frame [..., H, W] with a margin, each [...] in double precision;
    0 and 1 where no depth is known."""
    if first is None:
        return torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    low, high = (1 / first.amax(dim=(-2, -1))).double(), (1 / first.amin(dim=(-2, -1))).double()
    margin = DEPTH_MARGIN * torch.maximum(high - low, 0.1 * high)
    return (low - margin).clamp(min=0), high + margin


def _scale(first: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low end, length and high end of `depth_range`, each [..., 1, 1, 1], with device and precision of `like`."""
    low, high = depth_range(first)
    return tuple(end[..., None, None, None].to(like, non_blocking=True) for end in (low, high - low, high))


def depth_to_picture(depth: Tensor, first: Tensor | None) -> Tensor:
    """Depth [..., T, H, W] -> [..., T, 3, H, W]: inverse depth (near is bright), normalised by the range of the first
    frame [..., H, W]."""
    low, length, _ = _scale(first, depth)
    gray = (1 / depth - low) / length * 2 - 1
    return gray.unsqueeze(-3).expand(*gray.shape[:-2], 3, *gray.shape[-2:])


def picture_to_depth(picture: Tensor, first: Tensor | None) -> Tensor:
    """[..., T, 3, H, W] -> depth [..., T, H, W]; what decodes to "beyond infinity" becomes 100 times the nearest
    distance, or the farthest of the first frame where that is more."""
    low, length, high = _scale(first, picture)
    inverse, least = (picture.mean(dim=-3) + 1) / 2 * length + low, high / 100
    if first is not None:
        least = torch.minimum(least, 1 / first.amax(dim=(-2, -1))[..., None, None, None].to(least))
    return 1 / torch.maximum(inverse, least)
