"""How figures are printed: what each is called, in which order, and its value with its interval."""

from __future__ import annotations

import math

LABELS = {  # what is printed, in this order; ↑ more is better, ↓ less is better
    "ids_miou": "ids mIoU, all frames, with background ↑",
    "epe_relative": "flow error on moving pixels / that of zero flow ↓",
    "epe_moving": "flow error on moving pixels, px ↓",
    "epe_all": "flow error on all pixels, px ↓",
    "psnr": "Stage II given true motion: PSNR, dB, pushed clips ↑",
    "psnr_own": "Stage II given own motion: PSNR, dB, pushed clips ↑",
    "painted_ids": "Stage II given own motion: mIoU of ids by colour with its ids ↑",
    "fallen_carried": "which have fallen, frame-0 ids carried by flow, balanced accuracy ↑",
    "fallen_ids": "which have fallen, generated ids, balanced accuracy ↑",
    "all_right_carried": "clips with all of them right, carried ↑",
    "all_right_ids": "clips with all of them right, ids ↑",
    "gap_carried": "wide-gap clips with all of them right, carried ↑",
    "gap_ids": "wide-gap clips with all of them right, ids ↑",
    "iou_last": "mask IoU per object, last frame, ids ↑",
    "iou_last_carried": "mask IoU per object, last frame, carried ↑",
    "silhouette_last": "silhouette IoU, last frame, ids ↑",
    "both_ways": "push and opposite push: both go the right way ↑",
    "both_all_right": "push and opposite push: all that fell right in both ↑",
    "standing": "all told to stay: objects that stay standing ↑",
    "quiet": "all told to stay: mean flow / that with the arrow ↓",
    "sooner": "push 1.6 times as hard: half of the motion sooner ↑",
    "iou_mean": "mask IoU per object, mean over frames ↑",
    "depth_absrel": "depth AbsRel, all pixels ↓",
    "depth_absrel_objects": "depth AbsRel, objects ↓",
    "centroid_ade": "centroid ADE, px ↓",
    "centroid_fde": "centroid FDE, px ↓",
    "contacts": "which pairs touch, ids and depth, balanced accuracy ↑",
    "contacts_video": "which pairs touch, video by colour, balanced accuracy ↑",
    "fallen_video": "which have fallen, video by colour, balanced accuracy ↑",
    "moved": "which objects move, carried, balanced accuracy ↑",
    "control_angle": "angle between arrow and motion, degrees ↓",
    "control_length": "length of motion / length of arrow (1)",
    "permanence": "object frames in which the object is still there ↑",
}


def cell(figure: dict | None) -> str:
    """A figure with its interval: three digits after the point, or none where it is large."""
    if figure is None or math.isnan(figure["value"]):
        return "-"
    digits = 3 if abs(figure["value"]) < 10 else 1
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


COLUMNS = {"model": "model", "still": "nothing moves", "codec": "truth through the VAE", "truth": "truth"}


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(figures: dict[str, dict]) -> str:
    """Figures by source and name -> a table: a figure a line, a source a column."""
    names = dict.fromkeys(name for found in figures.values() for name in found)
    shown = [name for name in LABELS if name in names] + [n for n in names if n not in LABELS and " " in n]
    lines = [line(["figure", *(COLUMNS.get(source, source) for source in figures), "clips"])]
    lines.append("|---" * (len(figures) + 2) + "|")
    for name in shown:
        counted = max(found[name]["clips"] for found in figures.values() if name in found)
        lines.append(
            line([LABELS.get(name, name), *(cell(found.get(name)) for found in figures.values()), str(counted)])
        )
    return "\n".join(lines)
