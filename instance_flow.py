"""Instance flow: one motion vector per object, painted over the object (section 3.2), and everything around it.

In training it is computed from dense flow and ids (Eq. 1-3) and partly hidden (Eq. 9); at inference it is painted from
a user's arrows (Eq. 4). Where the masked flow moves, the motion enhancement loss looks twice (Eq. 11).

    F = instance_flow(flow, segmentation)                                 # Eq. 1-3
    F, mask = random_mask(F, p=0.5, segmentation=segmentation[0])         # Eq. 9
    M = motion_mask(F[None], tau=0.1)                                     # Eq. 11

Symbols: O flow [T, 2, H, W] (dx right, dy down, pixels per frame step, frame t -> t+1), S ids (0 = background, 1..255
objects), M^(i) mask of object i in the first frame, F instance flow [2, H, W], p masking ratio, tau threshold in pixels
per frame step, v an arrow in pixels, delta = 1 / (frame steps that an arrow spans): v delta is pixels per frame step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

IDS = 256  # 0 is the background
REDUCTIONS = ("instance", "first_mask", "pixel", "start")
MASK_UNITS = ("instance", "pixel", "element")
ONE_OR_MORE = (2, "H", "W"), ("B", 2, "H", "W")  # of a flow field

# ------------------------------------------------------------------------------------------------------- what comes in


def check_shape(name: str, value: Tensor, *shapes: Sequence[int | str]) -> None:
    """Raises ValueError that begins with `name` for what is no tensor or has none of these shapes (if any are given).
    A letter in a shape stands for any size but 0."""
    wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected a tensor {wanted}".rstrip())
    pairs = [list(zip(value.shape, shape, strict=True)) for shape in shapes if len(shape) == value.ndim]
    if shapes and not any(all(size == of or (size and isinstance(of, str)) for size, of in pair) for pair in pairs):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {wanted}")


def check_floats(name: str, value: Tensor, *shapes: Sequence[int | str]) -> None:
    """As `check_shape`, and for whole numbers: a mean of them would be cut to one."""
    check_shape(name, value, *shapes)
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}, expected floating point")


def check_real(name: str, value: float) -> None:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a number")


def checked_ids(segmentation: Tensor, device: torch.device, name: str = "segmentation") -> Tensor:
    """Ids as int64 on `device`. Raises ValueError when one is not a whole number of 0 to 255."""
    if segmentation.is_floating_point() or segmentation.dtype == torch.bool:
        raise ValueError(f"{name} is {segmentation.dtype}, expected whole numbers")
    ids = segmentation.to(device, torch.int64)
    if segmentation.dtype == torch.uint8:  # no byte is out of range; to look would make a GPU and its host wait
        return ids
    if ids.numel() and not 0 <= ids.min() <= ids.max() < IDS:
        raise ValueError(f"{name} holds ids from {ids.min()} to {ids.max()}, expected 0 to {IDS - 1}")
    return ids


# ----------------------------------------------------------------------------------------- from dense flow: Eq. 1 - 3


def instance_flow(flow: Tensor, segmentation: Tensor, reduce: str = "instance") -> Tensor:
    """Mean motion of every object, painted over its first-frame mask (Eq. 1-3); the background gets none.

    flow [T, 2, H, W] or [B, T, 2, H, W]; segmentation: ids of all frames [T, H, W] or [B, T, H, W], or of the first
    alone [H, W] or [B, H, W]. Returns [2, H, W] or [B, 2, H, W] in the flow's dtype, pixels per frame step.

    Section 3.2 says "the average optical flow vectors for each object"; Eq. 1 and 2 leave open over which pixels:
    reduce="instance": over the object's mask in each frame, then over the frames that show it. That is displacement
        per step, which is what an arrow says, also of an object that leaves its first place.
    reduce="first_mask": over its first-frame mask in every frame (S_0 of Eq. 1; what leaves the mask counts as rest).
    reduce="pixel": no mean over the object; each pixel of its first-frame mask keeps its own (Eq. 2 to the letter).
    reduce="start": as "instance", of the first step alone: how an object was pushed, not what came of it.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}, expected one of {', '.join(REDUCTIONS)}")
    batched, ids = _batched(flow, segmentation)
    if reduce == "start":
        batched, ids = batched[:, :1], ids[:, :1]
    first = ids[:, :1]  # [B, 1, H, W]
    if reduce == "pixel":
        F = batched.mean(dim=1, dtype=torch.float64)
    else:
        means = _mean_of_ids(batched, first if reduce == "first_mask" else ids)  # [B, 2, IDS]
        F = means.gather(2, first.flatten(1)[:, None].expand(-1, 2, -1)).view(len(batched), 2, *flow.shape[-2:])
    F = torch.where(first > 0, F, 0.0).to(flow.dtype)
    return F[0] if flow.ndim == 4 else F


def _batched(flow: Tensor, segmentation: Tensor) -> tuple[Tensor, Tensor]:
    """Checks shapes -> flow [B, T, 2, H, W], ids int64 [B, T or 1, H, W] on the flow's device. B: 1 if absent."""
    check_floats("flow", flow, ("T", 2, "H", "W"), ("B", "T", 2, "H", "W"))
    one_frame, all_frames = flow.shape[:-4] + flow.shape[-2:], flow.shape[:-3] + flow.shape[-2:]
    check_shape("segmentation", segmentation, one_frame, all_frames)
    if flow.ndim == 4:
        flow, segmentation = flow[None], segmentation[None]
    return flow, checked_ids(segmentation.reshape(len(flow), -1, *flow.shape[-2:]), flow.device)


def _mean_of_ids(flow: Tensor, ids: Tensor) -> Tensor:
    """[B, T, 2, H, W], [B, T or 1, H, W] -> mean vector of each id over its pixels, then its frames [B, 2, IDS]."""
    ids = ids.expand(-1, flow.shape[1], -1, -1).flatten(2)  # [B, T, HW]
    values = flow.flatten(3).double()  # sums over 10^5 pixels
    sums = values.new_zeros(*values.shape[:3], IDS).scatter_add_(3, ids[:, :, None].expand(-1, -1, 2, -1), values)
    count = values.new_zeros(*ids.shape[:2], IDS).scatter_add_(2, ids, torch.ones_like(values[:, :, 0]))[:, :, None]
    frames = (count > 0).sum(dim=1)  # [B, 1, IDS]
    return (sums / count.clamp(min=1)).sum(dim=1) / frames.clamp(min=1)


def marked_objects(flow: Tensor, segmentation: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which objects of a clip somebody marks who marks what he pushes and perhaps some others: bool [256].

    flow [T, 2, H, W], segmentation [T, H, W]. The object of the first frame that is fastest in the first step is
    marked, and of the others a random choice of a random number, none to all. What only appears later is not marked.
    """
    batched, ids = _batched(flow, segmentation)
    speed = _mean_of_ids(batched[:, :1], ids[:, :1])[0].norm(dim=0).cpu()  # [IDS]
    there = ids[0, 0].unique().cpu()
    there = there[there > 0]
    marked = torch.zeros(IDS, dtype=torch.bool)
    if len(there):
        fastest = there[speed[there].argmax()]
        others = there[torch.randperm(len(there), generator=generator)]
        count = torch.randint(len(there), (1,), generator=generator)
        marked[others[others != fastest][:count]] = True
        marked[fastest] = True
    return marked


# -------------------------------------------------------------------------------------------------- from arrows: Eq. 4


def paint_arrows(vectors: Tensor, ids: Tensor, segmentation: Tensor, delta: float) -> Tensor:
    """F_user = sum_i M^(i) v^(i) delta (Eq. 4).

    vectors [N, 2] (x right, y down) in pixels, ids [N] of the objects that they move, segmentation [H, W] of the first
    frame -> [2, H, W], float32, pixels per frame step; zero where no arrow is. Raises ValueError for an id that the
    segmentation does not have, for the background, and for two arrows on one object.
    """
    check_floats("vectors", vectors, ("N", 2), (0, 2))
    check_shape("ids", ids, (len(vectors),))
    check_shape("segmentation", segmentation, ("H", "W"))
    check_real("delta", delta)
    if not vectors.isfinite().all():
        raise ValueError("vectors hold a value that is not finite")
    segmentation = checked_ids(segmentation, segmentation.device)
    F = torch.zeros(2, *segmentation.shape, device=segmentation.device)
    if len(ids.unique()) < len(ids):
        raise ValueError(f"ids are {ids.tolist()}, expected each object once")
    for v, i in zip(vectors.to(F), ids.tolist(), strict=True):
        M = segmentation == i
        if i == 0 or not M.any():
            raise ValueError(f"there is no object {i} in the segmentation")
        F[:, M] = (v * delta)[:, None]
    return F


# ------------------------------------------------------------------------- random masking, motion mask: Eq. 9 and 11


def uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Random numbers of [0, 1) for a device, drawn where the generator lives; on the CPU if there is none."""
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator is {generator!r}, expected a torch.Generator")
    home = "cpu" if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=home).to(device)


def random_mask(
    F: Tensor,
    p: float,
    unit: str = "instance",
    segmentation: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides parts of the instance flow: F~ = F M_mask, M_mask 0 with probability p, the masking ratio (Eq. 9).

    F [2, H, W] or [B, 2, H, W]. A part is, by `unit`, one "element" of 2xHxW (Eq. 9 to the letter), one "pixel", or one
    "instance", which is what a user with one arrow for five dominoes looks like and needs the first frame's ids,
    `segmentation` [H, W] or [B, H, W]. All parts may be hidden at once: F~ = 0 means that nothing is told.

    Returns F~ and the mask (1 = kept), both of F's dtype; the mask has 2 channels for elements, otherwise 1.
    A sample's draws depend on F's shape and its place in the batch only, and on the generator's device.
    """
    if not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"p is {p}, expected a probability")
    check_floats("F", F, *ONE_OR_MORE)
    shapes = {"element": F.shape, "pixel": F.shape[:-3] + (1,) + F.shape[-2:], "instance": F.shape[:-3] + (IDS,)}
    if unit not in shapes:
        raise ValueError(f"unit is {unit!r}, expected one of {', '.join(shapes)}")
    lots = uniform(shapes[unit], generator, F.device)
    kept = lots >= p  # lots are below 1
    if unit == "instance":
        check_shape("segmentation", segmentation, F.shape[:-3] + F.shape[-2:])
        kept = kept.gather(-1, checked_ids(segmentation, F.device).flatten(-2)).view(shapes["pixel"])
    mask = kept.to(F.dtype)
    return F * mask, mask


def motion_mask(F: Tensor, tau: float) -> Tensor:
    """M' of Eq. 11: 1 where the (masked) flow F [B, 2, H, W] is longer than tau, else 0; [B, 1, H, W], F's dtype."""
    check_floats("F", F, *ONE_OR_MORE)
    check_real("tau", tau)
    return (F.norm(dim=-3, keepdim=True) > tau).to(F.dtype)


# ------------------------------------------------------------------------------------ sparse optical flow: Table 3


def sparse_flow(flow: Tensor, segmentation: Tensor, points: int, generator: torch.Generator | None = None) -> Tensor:
    """Vectors of dense flow at `points` sampled pixels, zero elsewhere, as in MOFA-Video.

    Shapes as in `instance_flow`. A vector is the mean over time of the flow at a pixel of an object's first-frame mask.
    The row of Table 3 takes `sparse_points` of F instead, in training as in sampling: see docs/choices.md.
    """
    return sparse_points(instance_flow(flow, segmentation, reduce="pixel"), points, generator)


def sparse_points(F: Tensor, points: int, generator: torch.Generator | None = None) -> Tensor:
    """The control of Table 3's "sparse optical flow": F [2, H, W] or [B, 2, H, W] at `points` pixels, zero elsewhere.

    They are drawn without replacement, each with the same chance, among those where F is not zero; all of them when
    there are fewer.
    """
    if not isinstance(points, Integral) or points < 0:
        raise ValueError(f"points is {points!r}, expected a whole number of at least 0")
    check_floats("F", F, *ONE_OR_MORE)
    flat = F.reshape(-1, 2, F.shape[-2] * F.shape[-1])
    lots = uniform((len(flat), flat.shape[-1]), generator, F.device)
    lots = torch.where((flat != 0).any(dim=1), lots, -1.0)
    chosen = lots.topk(min(points, flat.shape[-1]), dim=1).indices[:, None].expand(-1, 2, -1)  # [B, 2, points]
    return torch.zeros_like(flat).scatter_(2, chosen, flat.gather(2, chosen)).view_as(F)  # a lot of -1 has flow 0
