"""Measures of generated motion and video: tensors in, figures out.

Two kinds. Against the truth of the same clip: errors of flow, ids and depth, and what happened to objects. Between sets
of videos: Frechet distances, their features, and the trackers that FVMD needs.

    FVD    Unterthiner et al. 2019: logits of a network trained on Kinetics, whose weights the user brings (`I3D`)
    FVMD   Liu et al. 2024 (arXiv 2407.16124): histograms of speed and acceleration of 400 tracked points
    rfvd   stand-ins that need no weights: random 3-D convolutions of pictures (rfvd_app) or of frame differences
           (rfvd_mot). They are not FVD and compare with nothing but themselves.

A distance means something only beside others with the same features, tracker, frames, size and number of clips; FVMD
is told apart by its tracker. PIPs++ is that of the published metric (`Pips`, weights from a file of the user's);
Lucas-Kanade needs none.

Symbols: T frames, H W pixels, O flow [T, 2, H, W] in pixels a frame, S ids [T, H, W] (0 = background), D depth
[T, H, W]; truth has a star. `Sums` are what a figure is made of, for one clip: (numerator, denominator), or (right,
all, right, all) of two classes whose accuracies are averaged; clips are added before they are divided. Videos are
[T, 3, H, W] in [-1, 1]; tracks [M, 16, N, 2] (x, y), M windows, in pixels of a picture whose short side is 256.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from trackers import chain_flow

Maps = dict[str, Tensor]
Sums = tuple[float, ...]

MOVING = 0.1  # pixels a frame: what is slower rests
TILT = 30.0  # degrees from the vertical: what leans more has fallen (as `simulate.has_fallen`)
HEIGHT = 0.85  # of the height in the first frame: what is lower has fallen
RIGHT_WAY = 0.25  # of the true displacement along its direction: what moves as far goes the right way
CONTACT = 0.02  # of the distance: neighbouring pixels of two objects that differ by less in depth touch
CONTACT_PIXELS = 5  # so many of them make a contact (0.999 balanced accuracy on true masks and depth)
RESAMPLES = 1000  # of the bootstrap
SET_RESAMPLES = 100  # of that of a Frechet distance
WINDOW = 16  # frames that FVMD looks at
GRID = 20  # points along each side
SHORT_SIDE = 256  # pixels in which tracks are measured, whatever the size of the video


# ------------------------------------------------------------------------------------------------- figures of one clip


def flow_error(flow: Tensor, truth: Tensor) -> dict[str, Sums]:
    """End-point error |O - O*| of flow [T, 2, H, W] in pixels: over all pixels, over those with |O*| > 0.1, and the
    latter over the error of zero flow, sum |O - O*| / sum |O*| (1 = as bad as no motion)."""
    error, length = (flow - truth).norm(dim=1), truth.norm(dim=1)
    moving = length > MOVING
    wrong = error[moving].sum().item()
    return {
        "epe_all": (error.sum().item(), error.numel()),
        "epe_moving": (wrong, moving.sum().item()),
        "epe_relative": (wrong, length[moving].sum().item()),
    }


def mean_iou(ids: Tensor, truth: Tensor, background: bool = False) -> float:
    """Intersection over union of each id that `truth` shows, averaged; ids of any shape [...]. NaN without ids."""
    present = truth.unique()
    present = present if background else present[present > 0]
    same = torch.stack([((ids == i) & (truth == i)).sum() / ((ids == i) | (truth == i)).sum() for i in present])
    return same.mean().item() if len(same) else math.nan


def id_overlap(ids: Tensor, truth: Tensor) -> dict[str, Sums]:
    """Ids [T, H, W] against the true ones: mean IoU over the ids of the clip, background included; per object at the
    last frame, in the mean over frames, and frame by frame; and IoU of "any object" at the last frame."""
    per_frame = [mean_iou(a, b) for a, b in zip(ids, truth, strict=True)]
    silhouette = mean_iou((ids[-1] > 0).long(), (truth[-1] > 0).long())
    figures = {
        "ids_miou": mean_iou(ids, truth, background=True),
        "iou_last": per_frame[-1],
        "iou_mean": float(np.nanmean(per_frame)),
        "silhouette_last": silhouette,
    } | {f"iou_frame_{t}": value for t, value in enumerate(per_frame)}
    return {name: mean_of(value) for name, value in figures.items()}


def psnr(video: Tensor, truth: Tensor) -> float:
    """-10 log10 of the mean squared error of pictures in [-1, 1], on a scale of 0 to 1; 99 dB at most."""
    error = ((video - truth) / 2).square().mean().item()
    return min(99.0, -10 * math.log10(max(error, 1e-12)))


def depth_error(depth: Tensor, truth: Tensor, ids: Tensor) -> dict[str, Sums]:
    """AbsRel, the mean of |D - D*| / D*, over all pixels and over those of objects (true ids [T, H, W])."""
    error, objects = (depth - truth).abs() / truth, ids > 0
    return {
        "depth_absrel": (error.sum().item(), error.numel()),
        "depth_absrel_objects": (error[objects].sum().item(), objects.sum().item()),
    }


def centroids(ids: Tensor, objects: list[int]) -> Tensor:
    """Ids [T, H, W] -> [T, N, 2] (x, y); an object that is not seen stays where it was last (NaN: never seen)."""
    y, x = torch.meshgrid(*(torch.arange(n, device=ids.device).float() for n in ids.shape[1:]), indexing="ij")
    masks = torch.stack([(ids == i).float() for i in objects], dim=1)  # [T, N, H, W]
    count = masks.sum(dim=(2, 3))
    places = torch.stack([(masks * axis).sum(dim=(2, 3)) / count for axis in (x, y)], dim=-1)
    for t in range(1, len(places)):
        places[t] = torch.where(count[t, :, None] > 0, places[t], places[t - 1])
    return places


def centroid_error(ids: Tensor, truth: Tensor, objects: list[int]) -> dict[str, Sums]:
    """Distance in pixels between an object's centroid and the true one: ADE over all frames, FDE at the last."""
    distance = (centroids(ids, objects) - centroids(truth, objects)).norm(dim=-1)
    return {"centroid_ade": mean_of(distance.nanmean().item()), "centroid_fde": mean_of(distance[-1].nanmean().item())}


def permanence(ids: Tensor, truth: Tensor) -> dict[str, Sums]:
    """Of all frames in which an object can truly be seen, those in which ids [T, H, W] show a tenth of it at least."""
    seen = kept = 0
    for i in truth.unique().tolist():
        area, true_area = (ids == i).sum(dim=(1, 2)), (truth == i).sum(dim=(1, 2))
        visible = (true_area > 0) & (i > 0)
        seen, kept = seen + visible.sum().item(), kept + (visible & (area * 10 >= true_area)).sum().item()
    return {"permanence": (kept, seen)}


def mean_of(value: float) -> Sums:
    """One value of a mean over clips; NaN says nothing."""
    return (0.0, 0.0) if math.isnan(value) else (value, 1.0)


def two_classes(said: Iterable, true: Iterable, among: Iterable) -> Sums:
    """Balanced accuracy: (right of the true ones, all true ones, right of the others, all others)."""
    among = set(among)
    said, true = set(said) & among, set(true) & among
    others = among - true
    return len(said & true), len(true), len(others - said), len(others)


def combine(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 2] -> a / b, or [..., 4] -> mean of a / b and c / d; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., ::2] / sums[..., 1::2]).mean(axis=-1)


def summarise(rows: list[dict[str, Sums]]) -> dict[str, dict]:
    """Figures by clip -> value, 95 % bootstrap interval over clips, and the number of clips that have it, by name."""
    draws, summary = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows))), {}
    for name in dict.fromkeys(name for row in rows for name in row):
        size = max(len(row.get(name, ())) for row in rows)
        sums = np.array([row.get(name, (0.0,) * size) for row in rows], float)
        resampled = combine(sums[draws].sum(axis=1))
        low, high = np.nanpercentile(resampled, [2.5, 97.5]) if np.isfinite(resampled).any() else (np.nan, np.nan)
        counted = int((sums[:, 1::2].sum(axis=1) > 0).sum())
        summary[name] = {"value": float(combine(sums.sum(axis=0))), "interval": [float(low), float(high)]}
        summary[name]["clips"] = counted
    return summary


# ------------------------------------------------------------------------------------------- what happened to an object


def carry(flow: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Carries what is seen in the first frame along chained flow: flow [T, 2, H, W], ids [H, W] -> points [T, K, 2]
    (x, y), four in each pixel of an object, and their ids [K]."""
    y, x = first.nonzero(as_tuple=True)
    quarter = torch.tensor([[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]], device=flow.device)
    points = (torch.stack([x, y], dim=-1)[:, None] + quarter).flatten(0, 1)
    return chain_flow(flow, points), first[y, x].repeat_interleave(4)


def rasterise(points: Tensor, owner: Tensor, depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Points [K, 2] with ids [K] and depth [K] -> ids [H, W]; the nearer point wins. A gap of one pixel between two
    pixels of the same object, above and below or left and right, is filled."""
    height, width = size
    x, y = points.round().long().T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cell, far_first = (y * width + x)[inside], depth[inside].argsort(descending=True)
    rank = torch.full((height * width,), -1, device=points.device)
    rank.scatter_reduce_(0, cell[far_first], torch.arange(len(cell), device=points.device), "amax")
    ids = torch.where(rank >= 0, owner[inside][far_first][rank.clamp(min=0)] if len(cell) else 0, 0).view(size)
    around = nnf.pad(ids, (1, 1, 1, 1))
    for a, b in ((around[1:-1, :-2], around[1:-1, 2:]), (around[:-2, 1:-1], around[2:, 1:-1])):
        ids = torch.where((ids == 0) & (a == b), a, ids)
    return ids


def lies(before: Tensor, after: Tensor) -> bool:
    """Whether an object that covers points [K, 2] (x, y) at first and [K', 2] in the end has fallen: its principal
    axis is more than 30 degrees from the vertical, or its height below 0.85 of the first. Heights leave out the outer
    2 % on each side, which strays may be; what has vanished has no height."""
    if len(after) < 3:
        return True
    heights = [(y.quantile(0.98) - y.quantile(0.02) + 1).item() for y in (before[:, 1].float(), after[:, 1].float())]
    axis = torch.linalg.eigh(after.double().T.cov()).eigenvectors[:, -1].abs()
    return math.degrees(math.atan2(axis[0], axis[1])) > TILT or heights[1] < HEIGHT * heights[0]


def fallen_ids(first: Tensor, last: Tensor) -> set[int]:
    """Ids of the first frame [H, W] that lie in the last, by their masks."""
    places = [{i: (ids == i).nonzero().flip(1) for i in objects_of(first)} for ids in (first, last)]
    return {i for i in objects_of(first) if lies(places[0][i], places[1][i])}


def fallen_points(points: Tensor, owner: Tensor) -> set[int]:
    """Ids that lie in the end, by the points [T, K, 2] that `carry` followed, hidden ones included."""
    return {i for i in owner.unique().tolist() if lies(points[0, owner == i], points[-1, owner == i])}


def objects_of(first: Tensor) -> list[int]:
    return [i for i in first.unique().tolist() if i > 0]


def displacement(points: Tensor, owner: Tensor, instance: int) -> Tensor:
    """Mean way of an object's points [T, K, 2] from first to last frame, [2] in pixels."""
    return (points[-1] - points[0])[owner == instance].mean(dim=0)


def right_way(way: Tensor, truth: Tensor) -> bool:
    """Whether `way` [2] goes a quarter of the true way at least, along its direction."""
    return (way @ truth >= RIGHT_WAY * truth @ truth).item()


def moved_ids(points: Tensor, owner: Tensor) -> set[int]:
    """Ids whose points [T, K, 2] end more than one pixel from where they began, in the mean."""
    return {i for i in owner.unique().tolist() if displacement(points, owner, i).norm() > 1}


def half_time(flow: Tensor) -> float:
    """Time in frames at which half of all motion of the clip, the sum of |O| [T, 2, H, W], is done; NaN: no motion."""
    done = np.concatenate([[0], flow.norm(dim=1).sum(dim=(1, 2)).cumsum(0).cpu().double().numpy()])
    return float(np.interp(done[-1] / 2, done, np.arange(len(done)))) if done[-1] > 0 else math.nan


def contact_pairs(ids: Tensor, depth: Tensor) -> set[tuple[int, int]]:
    """Pairs of objects that touch: five or more pairs of neighbouring pixels, in all frames together, of ids [T, H, W]
    whose depths [T, H, W] differ by less than 2 % of the distance."""
    found, (height, width) = [], ids.shape[1:]
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = (slice(None), slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (slice(None), slice(dy, height), slice(max(0, dx), width + min(0, dx)))
        a, b = ids[here], ids[there]
        touch = (a != b) & (a > 0) & (b > 0) & ((depth[here] - depth[there]).abs() < CONTACT * depth[here])
        found.append(torch.stack([a[touch], b[touch]], dim=1).sort(dim=1).values)
    pairs, count = torch.cat(found).unique(dim=0, return_counts=True)
    return {tuple(pair) for pair in pairs[count >= CONTACT_PIXELS].tolist()}


def ids_by_color(video: Tensor, first_ids: Tensor) -> Tensor:
    """Video [T, 3, H, W] -> ids [T, H, W]: each pixel goes to the object, or background, that has the nearest colour
    in the first frame, where ids [H, W] are known; then twice to the majority of its 3 x 3 neighbours, in which it has
    three votes itself, so that corners stay.

    Colours are those of 60 pixels of every object, 180 of the background: sides and shadows have colours of their own.
    """
    ids, colors, owners = first_ids.unique(), [], []
    for k, i in enumerate(ids):
        pixels = video[0][:, first_ids == i].T
        some = torch.linspace(0, len(pixels) - 1, min(len(pixels), 60 if i > 0 else 180)).round().long()
        colors.append(pixels[some.to(pixels.device)])
        owners.append(torch.full((len(some),), k, device=video.device))
    colors, owners = torch.cat(colors), torch.cat(owners)
    nearest = torch.stack([owners[torch.cdist(frame.movedim(0, -1), colors).argmin(dim=-1)] for frame in video])
    for _ in range(2):
        own = nnf.one_hot(nearest, len(ids)).movedim(-1, 1).float()  # [T, N, H, W]
        nearest = (9 * nnf.avg_pool2d(own, 3, stride=1, padding=1) + 2 * own).argmax(dim=1)
    return ids[nearest]


# ------------------------------------------------------------------------------------- what the figures are, by clip


@dataclass
class Scene:
    """A held-out clip and what else would have happened there: truth by kind of push, and the simulator's meta."""

    path: Path
    truth: dict[str, Maps]  # "arrow" (the clip itself), "opposite", "stronger", "none"
    meta: dict[str, dict]

    @property
    def pushed(self) -> int:
        return self.meta["arrow"]["pushed"]


def physics_figures(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Generated maps (of the clip's own push) against the truth, pixel by pixel, object by object.

    contacts: from ids and depth. contacts_video, fallen_video: from the video alone, by colour, so that a model without
    ids and depth (One-stage*) can be compared."""
    made, true, meta = made["arrow"], scene.truth["arrow"], scene.meta["arrow"]
    objects, figures = objects_of(true["segmentation"][0]), {}
    if "segmentation" in made:
        ids, true_ids = made["segmentation"], true["segmentation"]
        figures |= id_overlap(ids, true_ids) | centroid_error(ids, true_ids, objects) | permanence(ids, true_ids)
    if "depth" in made:
        figures |= depth_error(made["depth"], true["depth"], true["segmentation"])
    if "flow" in made:
        figures |= flow_error(made["flow"], true["flow"]) | object_motion(made["flow"], scene)
    if "fallen" in meta:
        figures |= fallen_figures(made, scene)
    if "contacts" in meta:
        pairs = {(a, b) for a in objects for b in objects if a < b}
        touching = {(a, b) for a, b, _ in meta["contacts"] if a > 0}
        if {"segmentation", "depth"} <= made.keys():
            figures["contacts"] = two_classes(contact_pairs(made["segmentation"], made["depth"]), touching, pairs)
        if objects and "rgb_own" in made:  # of a video, only what overlaps in the picture is seen
            seen = ids_by_color(made["rgb_own"], true["segmentation"][0])
            figures["contacts_video"] = two_classes(contact_pairs(seen, torch.ones(seen.shape)), touching, pairs)
            fallen = set(meta["fallen"]) & set(objects)
            figures["fallen_video"] = two_classes(fallen_ids(true["segmentation"][0], seen[-1]), fallen, objects)
    return figures


def object_motion(flow: Tensor, scene: Scene) -> dict[str, Sums]:
    """Which objects move, by points carried along the flow [T, 2, H, W]; and how the pushed object obeys its arrow:
    angle in degrees between arrow and mean flow, and the ratio of their lengths."""
    true = scene.truth["arrow"]
    first = true["segmentation"][0]
    points, owner = carry(flow, first)
    truly = moved_ids(*carry(true["flow"], first))
    figures = {"moved": two_classes(moved_ids(points, owner), truly, objects_of(first))}
    if scene.pushed:
        arrow = displacement(*carry(true["flow"], first), scene.pushed)
        way = displacement(points, owner, scene.pushed)
        cosine = (way @ arrow / (way.norm() * arrow.norm()).clamp(min=1e-6)).clamp(-1, 1)
        figures["control_angle"] = mean_of(math.degrees(math.acos(cosine)))
        figures["control_length"] = mean_of((way.norm() / arrow.norm().clamp(min=1e-6)).item())
    return figures


def fallen_figures(made: Maps, scene: Scene) -> dict[str, Sums]:
    """Which objects lie in the end, against the simulator: single objects (balanced accuracy), whole clips, and whole
    clips in which a wide gap stops the chain; by frame-0 ids carried along the flow, and by the generated ids."""
    first, meta, said = scene.truth["arrow"]["segmentation"][0], scene.meta["arrow"], {}
    if "flow" in made:
        said["carried"] = fallen_points(*carry(made["flow"], first))
    if "segmentation" in made:
        said["ids"] = fallen_ids(first, made["segmentation"][-1])
    figures, fallen = {}, set(meta["fallen"]) & set(objects_of(first))
    for name, ids in said.items():
        figures[f"fallen_{name}"] = two_classes(ids, fallen, objects_of(first))
        figures[f"all_right_{name}"] = mean_of(ids == fallen)
        if meta.get("wide_gap") and scene.pushed:
            figures[f"gap_{name}"] = mean_of(ids == fallen)
    return figures


def other_pushes(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Opposite, harder and no push in the same scene, by carried points; each against its own simulation.

    both_ways: the pushed object goes at least a quarter of its true way along the true direction, for the push and
    for its opposite. both_all_right: for both, exactly those that should have fallen have. standing: without an
    arrow, objects that do not fall. quiet: mean |O| without an arrow over mean |O| with it. sooner: with the harder
    push, half of all motion is done earlier than with the given one."""
    first, flows = scene.truth["arrow"]["segmentation"][0], {name: maps["flow"] for name, maps in made.items()}
    carried = {name: carry(flow, first) for name, flow in flows.items()}
    still, count = fallen_points(*carried["none"]), len(objects_of(first))
    figures = {"standing": (count - len(still), count)}
    if scene.pushed:
        ways, right = [], []
        for name in ("arrow", "opposite"):
            true = displacement(*carry(scene.truth[name]["flow"], first), scene.pushed)
            ways.append(right_way(displacement(*carried[name], scene.pushed), true))
            right.append(fallen_points(*carried[name]) == set(scene.meta[name]["fallen"]) & set(objects_of(first)))
        figures |= {"both_ways": mean_of(all(ways)), "both_all_right": mean_of(all(right))}
        figures["quiet"] = tuple(flows[name].norm(dim=1).mean().item() for name in ("none", "arrow"))
        times = [half_time(flows[name]) for name in ("stronger", "arrow")]
        figures["sooner"] = mean_of(times[0] < times[1])  # NaN, no motion, is not sooner
    return figures


def demo_figures(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Everything that the demo model is judged by. made: maps by push; "rgb" of "arrow" is painted from true motion,
    "rgb_own" from the source's own, whose ids are "told"."""
    arrow, true = made["arrow"], scene.truth["arrow"]
    figures, first = fallen_figures(arrow, scene), true["segmentation"][0]
    if "segmentation" in arrow:
        figures |= id_overlap(arrow["segmentation"], true["segmentation"])
    if "flow" in arrow:
        figures |= flow_error(arrow["flow"], true["flow"]) | other_pushes(made, scene)
        points, owner = carry(arrow["flow"], first)
        y, x = first.nonzero(as_tuple=True)
        last = rasterise(points[-1], owner, true["depth"][0, y, x].repeat_interleave(4), first.shape)
        figures["iou_last_carried"] = mean_of(mean_iou(last, true["segmentation"][-1]))
    if scene.pushed:  # where nothing is pushed, a still picture is perfect, and its decibels would drown the others
        figures["psnr"] = mean_of(psnr(arrow["rgb"], true["rgb"]))
        figures["psnr_own"] = mean_of(psnr(arrow["rgb_own"], true["rgb"]))
    if "told" in arrow:
        seen = ids_by_color(arrow["rgb_own"], first)
        figures["painted_ids"] = mean_of(mean_iou(seen, arrow["told"], background=True))
    return figures


# --------------------------------------------------------------------------------------------------- Frechet distance


def frechet_distance(x: Tensor, y: Tensor, eps: float = 0.0, ddof: int = 1) -> float:
    """|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr sqrt(S_x S_y) of features [N, D] and [M, D].

    No D x D matrix square root: with S_x = a^T a and S_y = b^T b (a, b centred, over sqrt(N - ddof)), the last trace is
    the sum of the singular values of a b^T, exact for any N, and 0 between a set and itself. ddof 1 is numpy's
    covariance (FVMD), 0 that of the reference FVD. eps > 0 adds eps I to both covariances in the product only, as the
    published FVMD does with 1e-5 (so that a set is -2 D eps from itself). Raises ValueError: shapes, not finite, N < 2.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features are {list(x.shape)} and {list(y.shape)}, expected [N, D] and [M, D], N, M > 1")
    x, y = x.double(), y.double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("features hold a value that is not finite")
    a, b = ((z - z.mean(dim=0)) / math.sqrt(len(z) - ddof) for z in (x, y))
    trace = root_trace(a, b) if eps == 0 else regular_root_trace(a, b, eps)
    return ((x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace).item()


def root_trace(a: Tensor, b: Tensor) -> Tensor:
    """tr sqrt(a^T a b^T b), the nuclear norm of a b^T; rows beyond D are first folded into D by QR."""
    a, b = (torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z for z in (a, b))
    return torch.linalg.svdvals(a @ b.T).sum()


def regular_root_trace(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """tr sqrt((a^T a + eps I)(b^T b + eps I)) by symmetric matrices, in the span of the rows of a and b only: in every
    direction outside of it, the root is eps."""
    rows = torch.cat([a, b])
    rest = max(a.shape[1] - len(rows), 0)
    if rest:
        Q = torch.linalg.qr(rows.T).Q
        a, b = a @ Q, b @ Q
    one = eps * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    values, vectors = torch.linalg.eigh(a.T @ a + one)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(half @ (b.T @ b + one) @ half).clamp(min=0).sqrt()
    return roots.sum() + eps * rest


# ------------------------------------------------------------------------------------------------- features for FVMD


def motion_histogram(tracks: Tensor) -> Tensor:
    """Tracks [M, 16, 400, 2] (points of a 20 x 20 grid, row by row) -> FVMD's features [M, 1024] in float64.

    Velocity V and acceleration A (first differences of position and of V, zero where they do not exist) are each cut
    into 4 x 4 x 4 blocks of 4 frames and 5 x 5 points; a block's histogram has 8 directions, into which each vector
    puts ceil(log2(|u| + 1)) / 8, at most 1. As in the published package, directions are atan2(x, y) in single
    precision: multiples of 45 degrees lie on a bin's edge, and rounding decides.
    """
    if tracks.shape[1:] != (WINDOW, GRID * GRID, 2):
        raise ValueError(f"tracks have shape {list(tracks.shape)}, expected [M, {WINDOW}, {GRID * GRID}, 2]")
    tracks = tracks.float()
    velocity, acceleration = torch.zeros_like(tracks), torch.zeros_like(tracks)
    velocity[:, 1:] = tracks[:, 1:] - tracks[:, :-1]
    acceleration[:, 2:] = velocity[:, 2:] - velocity[:, 1:-1]
    return torch.cat([_histogram(velocity), _histogram(acceleration)], dim=1)


def _histogram(vectors: Tensor) -> Tensor:
    """[M, 16, 400, 2] -> [M, 512], index ((frames * 4 + y) * 4 + x) * 8 + direction."""
    pi, eighth = vectors.new_tensor(math.pi), vectors.new_tensor(2 * math.pi / 8)  # single precision, as the angle
    turned = torch.atan2(vectors[..., 0], vectors[..., 1]) + pi
    direction = turned.div(eighth, rounding_mode="floor").clamp(0, 7).long()  # not floor(a / b): that rounds up first
    length = vectors.norm(dim=-1).clamp(max=255)
    weight = (length + 1).log2().clamp(0, 8).ceil() / 8
    t, y, x = torch.meshgrid(torch.arange(WINDOW) // 4, torch.arange(GRID) // 5, torch.arange(GRID) // 5, indexing="ij")
    block = ((t * 4 + y) * 4 + x).reshape(WINDOW, -1).to(vectors.device)
    index = (block * 8 + direction).flatten(1)
    zeros = torch.zeros(len(vectors), 512, dtype=torch.float64, device=vectors.device)
    return zeros.scatter_add_(1, index, weight.double().flatten(1))


def tracked_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with a short side of 256: the pixels in which tracks are measured."""
    scale = SHORT_SIDE / min(height, width)
    return round(height * scale), round(width * scale)


def query_points(height: int, width: int) -> Tensor:
    """FVMD's grid [400, 2] (x, y), 8 pixels from the edges of a picture."""
    y, x = (8 + torch.arange(GRID) / (GRID - 1) * (n - 16) for n in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def rescale(points: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Points [..., 2] (x, y; pixel centres are whole numbers) of a picture of size (H, W), when it is resized."""
    factor = points.new_tensor([new[1] / old[1], new[0] / old[0]])
    return (points + 0.5) * factor - 0.5


def tracked_features(track: Callable[[Tensor, Tensor], Tensor], video: Tensor, enlarge: bool = False) -> Tensor:
    """FVMD's features [T - 15, 1024] of a video, or of flow for `chain_flow` [T, C, H, W]: all windows of 16 frames.

    `track` (video [16, C, H, W], points [400, 2] -> [16, 400, 2]) works in the video's own pixels, or with `enlarge`
    on the video resized to a short side of 256, where tracks are measured in any case. Raises ValueError for a clip
    of less than 16 frames."""
    if len(video) < WINDOW:
        raise ValueError(f"a clip has {len(video)} frames, FVMD needs {WINDOW} at least")
    size = tracked_size(*video.shape[-2:])
    if enlarge:
        video = nnf.interpolate(video, size, mode="bilinear", antialias=True)
    own = video.shape[-2:]
    points = rescale(query_points(*size), size, own).to(video.device)
    tracks = [track(video[s : s + WINDOW], points) for s in range(len(video) - WINDOW + 1)]
    return motion_histogram(rescale(torch.stack(tracks), own, size)).cpu()


# ---------------------------------------------------------------------------------------------------- features for FVD


def file_digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def as_bytes(video: Tensor) -> Tensor:
    """[T, 3, H, W] in [-1, 1] -> 0 to 255, whole numbers in float: every metric sees what a file would hold."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round()


class I3D:
    """FVD's network: `i3d_torchscript.pt` (Kinetics-400 logits), from a file, or from a hub id such as
    flateon/FVD-I3D-torchscript. Raises ValueError or FileNotFoundError that name it."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        path = Path(source)
        if not path.is_file():
            if source.count("/") != 1 or path.exists():
                raise FileNotFoundError(f"{source}: no such file; expected i3d_torchscript.pt or a hub id")
            path = _download(source, "i3d_torchscript.pt")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: is no torchscript file ({str(error).splitlines()[0]})") from None
        self.sha256 = file_digest(path)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """[T, 3, H, W] -> 400 logits [1, 400]; the network resizes to 224 x 224, bilinearly, aspect ignored."""
        if len(video) < 10:
            raise ValueError(f"a clip has {len(video)} frames, FVD needs 10 at least")
        clip = rearrange(as_bytes(video).byte(), "t c h w -> 1 c t h w")
        return self.network(clip, rescale=True, resize=True, return_features=True).float().cpu()


def _download(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def random_features(video: Tensor, seed: int, motion: bool) -> Tensor:
    """Channel means [1, 224] of three random 3-D convolutions (32, 64, 128 channels; kernels of zero mean and unit
    norm, from `seed`, on the CPU) of a video [T, 3, H, W], or with `motion` of the differences between its frames.

    On pictures they see appearance and hardly any motion; on differences they see motion, and noise more than all."""
    generator, means = torch.Generator().manual_seed(seed), []
    video = as_bytes(video) / 127.5 - 1
    x = rearrange(video[1:] - video[:-1] if motion else video, "t c h w -> 1 c t h w")
    for channels in (32, 64, 128):
        kernel = torch.randn(channels, x.shape[1], 3, 3, 3, generator=generator)
        kernel -= kernel.mean(dim=(1, 2, 3, 4), keepdim=True)
        kernel /= kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
        x = nnf.conv3d(x, kernel.to(x), stride=(1, 2, 2), padding=1).relu()
        means.append(x.mean(dim=(2, 3, 4)))
    return torch.cat(means, dim=1).cpu()


def set_distance(
    pairs: list[tuple[list[Tensor], list[Tensor]]],
    halves: bool = False,
    ddof: int = 1,
    scaled: bool = False,
) -> dict:
    """Frechet distance of sets of clips (features [M, D] of each), in the mean over pairs of sets.

    halves: of one half of the clips against the other (a floor). scaled: in units of the second set's spread, for
    features of arbitrary scale. The bootstrap over clips is too high, because clips repeat in a sample: its 95 %
    interval is moved so that its mean is the value."""
    random, count = np.random.default_rng(0), len(pairs[0][0])
    mixed = random.permutation(count)
    left, right = (mixed[::2], mixed[1::2]) if halves else (mixed, mixed)
    if min(len(left), len(right)) < 2:
        return {"value": math.nan, "interval": [math.nan, math.nan], "clips": len(right)}

    units = [torch.cat(y).std(dim=0) if scaled else torch.ones(()) for _, y in pairs]
    units = [unit.clamp(min=0.01 * unit.mean().item() + 1e-12) for unit in units]

    def mean(left: np.ndarray, right: np.ndarray) -> float:
        sets = [(torch.cat([x[i] for i in left]), torch.cat([y[i] for i in right])) for x, y in pairs]
        return float(
            np.mean([frechet_distance(x / unit, y / unit, ddof=ddof) for (x, y), unit in zip(sets, units, strict=True)])
        )

    value, drawn = mean(left, right), []
    for _ in range(SET_RESAMPLES):
        draw, other = (random.integers(len(side), size=len(side)) for side in (left, right))
        drawn.append(mean(left[draw], right[other] if halves else right[draw]))
    low, high = np.percentile(drawn, [2.5, 97.5]) - np.mean(drawn) + value
    return {"value": value, "interval": [float(low), float(high)], "clips": len(right)}
