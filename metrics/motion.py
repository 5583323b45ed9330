"""Errors of generated flow, ids, depth and video against the truth of the same clip: tensors in, figures out.

Symbols: T frames, H W pixels, O flow [T, 2, H, W] in pixels a frame, S ids [T, H, W] (0 = background), D depth
[T, H, W]; `Maps` are these and rgb [T, 3, H, W] in [-1, 1] of one clip, by the names of `Clip.tensors`. `Sums` are what
a figure is made of, for one clip: (numerator, denominator), or (right, all, right, all) of two classes whose accuracies
are averaged; clips are added before they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Maps = dict[str, Tensor]
Sums = tuple[float, ...]

MOVING = 0.1  # pixels a frame: what is slower rests
RESAMPLES = 1000  # of the bootstrap


def frozen(maps: Maps) -> Maps:
    """Nothing moves: the first frame again and again, flow 0."""
    repeated = {name: maps[name][:1].expand_as(maps[name]) for name in ("rgb", "segmentation", "depth")}
    return maps | repeated | {"flow": torch.zeros_like(maps["flow"])}


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
    """Intersection over union of each id that `truth` shows, averaged; ids of any shape [...]. Where `truth` shows no
    id, as when all have left the picture: 1 if `ids` shows none either, else 0."""
    present = truth.unique()
    present = present if background else present[present > 0]
    same = [((ids == i) & (truth == i)).sum() / ((ids == i) | (truth == i)).sum() for i in present]
    return torch.stack(same).mean().item() if same else float(not ids.any())


def id_overlap(ids: Tensor, truth: Tensor) -> dict[str, Sums]:
    """Ids [T, H, W] against the true ones: mean IoU over the ids of the clip, background included; per object at the
    last frame, in the mean over frames, and frame by frame; and IoU of "any object" at the last frame."""
    per_frame = [mean_iou(a, b) for a, b in zip(ids, truth, strict=True)]
    silhouette = mean_iou((ids[-1] > 0).long(), (truth[-1] > 0).long())
    figures = {
        "ids_miou": mean_iou(ids, truth, background=True),
        "iou_last": per_frame[-1],
        "iou_mean": float(np.mean(per_frame)),
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
    masks = (ids[:, None] == torch.tensor(objects, device=ids.device).view(-1, 1, 1)).float()  # [T, N, H, W]
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


def resample(*groups: list[dict[str, Sums]]) -> dict[str, tuple[float, np.ndarray, int]]:
    """Figures by clip -> by name: the value, what it is of RESAMPLES draws of the clips [R], and the number of clips
    that have it. Rows with as many clips see the same draws, so that two rows can be compared draw by draw.

    Of several groups of clips (scenarios): the mean over those that have the figure, clips drawn anew in each."""
    found = {}
    for name in dict.fromkeys(name for rows in groups for row in rows for name in row):
        values, resampled, counted = [], [], 0
        for k, rows in enumerate(rows for rows in groups if any(name in row for row in rows)):
            size = max(len(row.get(name, ())) for row in rows)
            sums = np.array([row.get(name, (0.0,) * size) for row in rows], float)
            draws = np.random.default_rng([0, k]).integers(len(rows), size=(RESAMPLES, len(rows)))
            value = combine(sums.sum(axis=0))
            if len(groups) > 1 and np.isnan(value):
                continue
            values.append(value)
            resampled.append(combine(sums[draws].sum(axis=1)))
            counted += int((sums[:, 1::2].sum(axis=1) > 0).sum())
        means = np.mean(resampled, axis=0) if resampled else np.full(1, np.nan)
        found[name] = (float(np.mean(values)) if values else math.nan, means, counted)
    return found


def interval_of(drawn: np.ndarray) -> list[float]:
    """The 95 % interval of resampled values [R]; NaN, where a draw had no clip that counts, says nothing."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return [float(low), float(high)]


def summarise(*groups: list[dict[str, Sums]]) -> dict[str, dict]:
    """Figures by clip -> value, 95 % bootstrap interval over clips, and the number of clips that have it, by name.

    Of several groups of clips (scenarios): the mean over those that have the figure, clips drawn anew in each."""
    return {
        name: {"value": value, "interval": interval_of(drawn), "clips": clips}
        for name, (value, drawn, clips) in resample(*groups).items()
    }


def by_scenario(rows: dict[str, list[dict[str, Sums]]], scenarios: list[str]) -> dict[str, dict[str, dict]]:
    """Figures of every clip by source, and the clips' scenarios -> `summarise` by scenario and source, and as "mean"
    that of all scenarios but driving, whose camera moves, and branch, which is dominoes again."""
    places = {name: [i for i, of in enumerate(scenarios) if of == name] for name in dict.fromkeys(scenarios)}
    picked = {name: {source: [some[i] for i in ours] for source, some in rows.items()} for name, ours in places.items()}
    found = {name: {source: summarise(some) for source, some in parts.items()} for name, parts in picked.items()}
    rest = [parts for name, parts in picked.items() if name not in ("driving", "branch")]
    return found | {"mean": {source: summarise(*(parts[source] for parts in rest)) for source in rows}}
