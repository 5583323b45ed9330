"""How figures are printed: what each is called, in which order, and its value with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable

LABELS = {  # what is printed, in this order; ↑ more is better, ↓ less is better
    "hit": "will it be hit, balanced accuracy ↑",
    "ids_miou": "ids mIoU, all frames, with background ↑",
    "epe_relative": "flow error on moving pixels / that of zero flow ↓",
    "epe_moving": "flow error on moving pixels, px ↓",
    "epe_all": "flow error on all pixels, px ↓",
    "psnr": "Stage II given true motion: PSNR, dB, clips that move ↑",
    "psnr_own": "Stage II given own motion: PSNR, dB, clips that move ↑",
    "psnr_video": "PSNR, dB, clips that move ↑",
    "ids_video": "ids by colour: mIoU with those of the true video ↑",
    "moved_video": "which objects move, video by colour, balanced accuracy ↑",
    "painted_ids": "Stage II given own motion: mIoU of ids by colour with its ids ↑",
    "fallen_carried": "dominoes: which have fallen, frame-0 ids carried by flow, balanced accuracy ↑",
    "fallen_ids": "dominoes: which have fallen, generated ids, balanced accuracy ↑",
    "all_right_carried": "clips with all of them right, carried ↑",
    "all_right_ids": "clips with all of them right, ids ↑",
    "gap_carried": "wide-gap clips with all of them right, carried ↑",
    "gap_ids": "wide-gap clips with all of them right, ids ↑",
    "iou_last": "mask IoU per object, last frame, ids ↑",
    "silhouette_last": "silhouette IoU, last frame, ids ↑",
    "both_ways": "push and opposite push: both go the right way ↑",
    "both_all_right": "push and opposite push: all that fell right in both ↑",
    "ego_pairs": "driving: two ego motions, after each the other car does what it truly does ↑",
    "lead_way": "driving: the lead car goes where its arrow says ↑",
    "standing": "all told to stay: objects that stay standing ↑",
    "quiet": "all told to stay: mean flow / that with the arrow ↓",
    "sooner": "push 1.6 times as hard: half of the motion sooner ↑",
    "iou_mean": "mask IoU per object, mean over frames ↑",
    "depth_absrel": "depth AbsRel, all pixels ↓",
    "depth_absrel_objects": "depth AbsRel, objects ↓",
    "centroid_ade": "centroid ADE, px ↓",
    "centroid_fde": "centroid FDE, px ↓",
    "hit_video": "will it be hit, video by colour, balanced accuracy ↑",
    "fallen_video": "dominoes: which have fallen, video by colour, balanced accuracy ↑",
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
    value, low, high = (f"{part:.{digits}f}" for part in (figure["value"], *figure["interval"]))
    return f"{value} [{low}, {high}]".replace(f"-{0:.{digits}f}", f"{0:.{digits}f}")  # no minus before nothing


def change(figure: dict | None) -> str:
    """A difference with its interval, and whether it is for the better, where its interval says so."""
    word = {True: " better", False: " worse"}.get(figure["better"], "") if figure else ""
    return cell(figure) + word


COLUMNS = {
    "model": "model",
    "still": "nothing moves",
    "codec": "truth through the VAE",
    "twin": "twin",
    "truth": "truth",
    "half": "half of the truth and the other",
}


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(figures: dict[str, dict], cell: Callable[[dict | None], str] = cell) -> str:
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


BY_SCENARIO = ("epe_relative", "iou_last", "hit", "psnr")


def scenario_tables(scenarios: dict[str, dict[str, dict]]) -> list[str]:
    """Figures by scenario, source and name -> a table for each of BY_SCENARIO that is there: a scenario a
    line, a source a column."""
    tables, measured = [], {name for found in scenarios.values() for figures in found.values() for name in figures}
    for name in (name for name in BY_SCENARIO if name in measured):
        sources = list(next(iter(scenarios.values())))
        lines = [line([LABELS[name], *(COLUMNS.get(source, source) for source in sources)])]
        lines.append("|---" * (len(sources) + 1) + "|")
        lines += [
            line([scenario, *(cell(found[s].get(name)) for s in sources)]) for scenario, found in scenarios.items()
        ]
        tables.append("\n".join(lines))
    return tables


def left_out(lacking: dict[str, int]) -> str:
    """How many clips lack which truth -> a line for people; "" where none does."""
    told = ", ".join(f"{name} ({count} clip{'s' * (count > 1)})" for name, count in sorted(lacking.items()))
    return f"Left out where a clip lacks the truth: {told}." if told else ""
