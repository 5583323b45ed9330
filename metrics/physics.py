"""What happened to objects, against the simulator's truth: who fell, who was hit, who was pushed where.

Symbols, `Maps` and `Sums` as in motion.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from metrics.motion import (
    MOVING,
    Maps,
    Sums,
    centroid_error,
    centroids,
    depth_error,
    flow_error,
    id_overlap,
    mean_iou,
    mean_of,
    permanence,
    psnr,
    two_classes,
)
from metrics.trackers import chain_flow, sample_at

TILT = 30.0  # degrees from the vertical: what leans more has fallen (as `simulate.has_fallen`)
HEIGHT = 0.85  # of the height in the first frame: what is lower has fallen
RIGHT_WAY = 0.25  # of the true displacement along its direction: what moves as far goes the right way
HIT = 2.0  # pixels: what is hit moves by more
SHOWN = 8  # pixels of a car, at least, that say where it is
APART = 0.5  # metres: two drives that end nearer to one another do not differ

# What clips.simulate writes into `meta`, and other clips lack: who is hit, and how the scene is simulated again.
HIT_TRUTH = {"touching", "fixed", "poses", "contacts", "camera", "focal", "pushed"}
PUSH_TRUTH = {"scenario", "seed", "pushed", "side", "strength", "fallen", "poses"}


# ------------------------------------------------------------------------------------------- what happened to an object


def points_of(first: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [H, W] -> points [K, 2] (x, y), four in each pixel of an object, and their ids [K]."""
    y, x = first.nonzero(as_tuple=True)
    quarter = torch.tensor([[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]], device=first.device)
    return (torch.stack([x, y], dim=-1)[:, None] + quarter).flatten(0, 1), first[y, x].repeat_interleave(4)


def carry(flow: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Carries what is seen in the first frame along chained flow: flow [T, 2, H, W], ids [H, W] -> points [T, K, 2]
    (x, y), four in each pixel of an object, and their ids [K]."""
    points, owner = points_of(first)
    return chain_flow(flow, points), owner


def carry_seen(flow: Tensor, ids: Tensor | None, first: Tensor) -> tuple[Tensor, Tensor]:
    """As `carry` (without ids: the same), but a point follows the flow only where ids [T, H, W] show its own object;
    elsewhere something hides it, whose flow is not its own, and it moves with the mean of its object's seen points (if
    none is seen, it stays)."""
    if ids is None:
        return carry(flow, first)
    points, owner = points_of(first)
    own = nnf.one_hot(owner, int(first.max()) + 1).to(flow)  # the number, since a frame may show no object
    (height, width), tracks = first.shape, [points.to(flow)]
    for step, shown in zip(flow[:-1], ids[:-1], strict=True):
        x, y = tracks[-1].round().long().T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        seen = inside & (shown[y.clamp(0, height - 1), x.clamp(0, width - 1)] == owner)
        way = sample_at(step[None], tracks[-1][None], "border")[0].T
        mean = (own * seen[:, None]).T @ way / (own * seen[:, None]).sum(dim=0).clamp(min=1)[:, None]
        tracks.append(tracks[-1] + torch.where(seen[:, None], way, mean[owner]))
    return torch.stack(tracks), owner


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


def ids_by_color(video: Tensor, first_ids: Tensor) -> Tensor:
    """Video [T, 3, H, W] -> ids [T, H, W]: each pixel goes to the object, or background, that has the nearest colour
    in the first frame, where ids [H, W] are known; then twice to the majority of its 3 x 3 neighbours, in which it has
    three votes itself, so that corners stay.

    Colours are those of 60 pixels of every object, 180 of the background: sides and shadows have colours of their own.
    """
    first_ids = first_ids.to(video.device)
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


def ends_by_color(video: Tensor, first: Tensor) -> Tensor:
    """`ids_by_color` of the first and the last frame; of all, which takes longer, where the last one lacks an object:
    then it counts where that was seen last."""
    ends = ids_by_color(video[[0, -1]], first)
    return ends if torch.isin(first.unique(), ends[-1]).all() else ids_by_color(video, first)


def of_the_visible(
    says: Callable[[Tensor], set[int]], seen: Tensor, known: Tensor, truly: set[int], among: set[int]
) -> Sums:
    """Balanced accuracy of what `says` finds in the ids by colour of a video (seen), `tellable` from the true video's
    (known)."""
    return two_classes(says(seen), truly, tellable(says(known), truly, among))


def tellable(told: set[int], truly: set[int], among: Iterable[int]) -> set[int]:
    """Of some objects, those of which a measure says what is true when it is shown the truth (told). It is asked of no
    other: what it cannot see is no model's fault, and so the truth has full marks."""
    return {i for i in among if (i in told) == (i in truly)}


def far(ids: Tensor, objects: list[int]) -> set[int]:
    """Of some objects, those whose middle is more than HIT pixels away in the last frame of ids [T, H, W], or where it
    was seen last: what leaves the picture has moved."""
    places = centroids(ids, objects)
    return {i for i, way in zip(objects, (places[-1] - places[0]).norm(dim=-1).tolist(), strict=True) if way > HIT}


# -------------------------------------------------------------------------------------------------- who will be hit


def asked(meta: dict, frames: int) -> tuple[set[int], set[int]]:
    """Of the simulator's meta: ids of which it is asked whether they will be hit in so many frames, and those that are.

    Asked are the things that can move, that nothing else that can move touches at frame 0 (or is joined to), and that
    do not move by themselves: pushed, falling or rolling from the first step on without a hit. Hit is what touches
    another thing that can move. A hit that shifts it by no more than HIT pixels (of the projected centre, by the
    simulator) does not show and is not asked: a heavy thing on which a light one falls."""
    poses, fixed = np.array(meta["poses"]), set(meta["fixed"])
    near = {i for pair in meta["touching"] if not fixed & set(pair) for i in pair}
    first: dict[int, int] = {}  # frame step of the first hit
    for *pair, t in (contact for contact in meta["contacts"] if contact[2] < frames - 1):
        first |= {i: min(t, first.get(i, t)) for i in pair if not fixed & set(pair)}
    among = set(range(1, poses.shape[1] + 1)) - fixed - near - {meta["pushed"]}
    by_itself = {i for i in among if first.get(i, 1) > 0 and (poses[1, i - 1] != poses[0, i - 1]).any()}
    way = np.linalg.norm(centres(meta, frames - 1) - centres(meta, 0), axis=1)
    unseen = {i for i in first if way[i - 1] <= HIT}
    return among - by_itself - unseen, set(first)


def centres(meta: dict, t: int) -> np.ndarray:
    """Where the middles of things 1..N are in the picture of frame t, [N, 2] (x, y) from the middle of the picture."""
    camera = np.array(meta["camera"][t])
    right, down, forward = camera[1:] @ (np.array(meta["poses"][t])[:, :3] - camera[0]).T
    return meta["focal"] * np.stack([right, down], axis=1) / forward[:, None]


def hit_figures(made: Maps, scene: Scene) -> dict[str, Sums]:
    """Will it be hit? Balanced accuracy over the things of which it is asked (`asked`), that the first frame shows and
    of which the measure can tell it (`tellable`).

    hit: said is yes where the mean way of a thing's carried mask is longer than HIT pixels. hit_video: where the middle
    of its pixels, by colour, comes to lie further than that; of the video alone, so that a model without flow and ids
    (One-stage*) can be compared (`of_the_visible`)."""
    true, figures = scene.truth["arrow"], {}
    first = true["segmentation"][0]
    among, hit = asked(scene.meta["arrow"], len(true["flow"]))
    among &= set(objects_of(first))
    if {"flow", "segmentation"} <= made.keys():
        said, known = (carried_far(maps, first, among) for maps in (made, true))
        figures["hit"] = two_classes(said, hit, tellable(known, hit, among))
    if among and "rgb_own" in made:
        seen = ends_by_color(made["rgb_own"], first), ends_by_color(true["rgb"], first)
        figures["hit_video"] = of_the_visible(lambda ids: far(ids, sorted(among)), *seen, hit, among)
    return figures


def carried_far(maps: Maps, first: Tensor, among: set[int]) -> set[int]:
    """Of some objects, those whose mask in the first frame [H, W] is carried by more than HIT pixels, in the mean."""
    points, owner = carry_seen(maps["flow"], maps["segmentation"], first)
    return {i for i in among if displacement(points, owner, i).norm() > HIT}


# -------------------------------------------------------------------------------------- what became of the other car


def place(maps: Maps, meta: dict, instance: int, t: int) -> np.ndarray | None:
    """Where on the ground an object is seen in frame t, [2] in metres: the mean of its pixels at the median of their
    depths, by the true camera. None where fewer than SHOWN pixels are its own."""
    y, x = (maps["segmentation"][t] == instance).nonzero(as_tuple=True)
    if len(y) < SHOWN:
        return None
    (height, width), camera = maps["segmentation"].shape[1:], np.array(meta["camera"][t])
    aside, below = x.double().mean().item() - (width - 1) / 2, y.double().mean().item() - (height - 1) / 2
    ray = np.array([aside / meta["focal"], below / meta["focal"], 1.0])
    return (camera[0] + maps["depth"][t][y, x].median().item() * ray @ camera[1:])[:2]


def as_told(made: dict[str, Maps], scene: Scene, kind: str, rival: str) -> bool | None:
    """Whether the other car of a drive does what it truly does after what was told, and not what it does in the rival
    drive, which begins with the same picture: in the last frame that truly shows it, it is seen nearer to where it
    then is. None where that is not asked: the two places are less than APART from one another, or it is never seen."""
    meta, true = scene.meta[kind], scene.truth[kind]
    other = meta["other"]
    shown = ((true["segmentation"] == other).sum(dim=(1, 2)) >= SHOWN).nonzero().flatten().tolist()
    if not shown or other not in true["segmentation"][0]:
        return None
    t = shown[-1]
    there, said = place(true, meta, other, t), place(made[kind], meta, other, t)
    apart = np.subtract(*(np.array(scene.meta[which]["poses"])[t, other - 1, :2] for which in (rival, kind)))
    if np.linalg.norm(apart) < APART:
        return None
    return said is not None and bool(np.linalg.norm(said - there) < np.linalg.norm(said - there - apart))


def drive_figures(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Two drives that begin with the same picture, "arrow" and "opposite", by ids, depth and the true camera.

    ego_pairs: told one ego motion, and the other, the other car does what it truly does after each. lead_way: where
    the lead car is told to go faster or slower, or to the left or right, it does (of each drive by itself)."""
    if "told" not in scene.meta["arrow"] or scene.meta["opposite"] is scene.meta["arrow"]:
        return {}
    if not all({"segmentation", "depth"} <= made[kind].keys() for kind in ("arrow", "opposite")):
        return {}
    right = [as_told(made, scene, *kinds) for kinds in (("arrow", "opposite"), ("opposite", "arrow"))]
    if scene.meta["arrow"]["case"] == "follow":
        return {"lead_way": (sum(map(bool, right)), sum(each is not None for each in right))}
    return {} if None in right else {"ego_pairs": mean_of(all(right))}


# ------------------------------------------------------------------------------------- what the figures are, by clip


@dataclass
class Scene:
    """A held-out clip and what else would have happened there: truth by kind of push, and the simulator's meta."""

    path: Path
    truth: dict[str, Maps]  # "arrow" (the clip itself), "opposite", "stronger", "none"; "twin", "twin_opposite"
    meta: dict[str, dict]

    @property
    def pushed(self) -> int:
        return self.meta["arrow"]["pushed"]

    @property
    def objects(self) -> list[int]:
        """Ids of the first frame: of these it is asked what becomes of them."""
        return objects_of(self.truth["arrow"]["segmentation"][0])

    @property
    def rows(self) -> bool:
        """Whether it is asked who falls: of the simulator's dominoes, since a ball, say, neither stands nor falls."""
        meta = self.meta["arrow"]
        return meta.get("scenario") == "dominoes" and "fallen" in meta and bool(self.objects)

    @property
    def has_ids(self) -> bool:
        """Whether any frame shows an object: of clips without ids, as annotators may leave them, nothing is asked."""
        return bool(self.truth["arrow"]["segmentation"].any())

    @cached_property
    def by_color(self) -> Tensor:
        """Ids by colour [T, H, W] of the true video."""
        return ids_by_color(self.truth["arrow"]["rgb"], self.truth["arrow"]["segmentation"][0])

    @property
    def told_by_color(self) -> Tensor:
        """Where the true video, by colour, shows the true ids: bool [T, H, W]."""
        return self.by_color == self.truth["arrow"]["segmentation"]

    @property
    def has_depth(self) -> bool:
        """Annotators without depth write the same number everywhere."""
        depth = self.truth["arrow"]["depth"]
        return bool((depth != depth[0, 0, 0]).any())

    def lacks(self, groups: Sequence[str]) -> list[str]:
        """Which truth the clip does not have that figures of these groups need ("physics", "demo"): they leave it out,
        and so does the mean over clips."""
        known = self.meta["arrow"].keys()
        has = {"ids": self.has_ids, "who is hit": known >= HIT_TRUTH}
        has |= {"depth": self.has_depth} if "physics" in groups else {}
        has |= {"other pushes": known >= PUSH_TRUTH} if "demo" in groups else {}
        return [name for name, there in has.items() if not there] if {"physics", "demo"} & set(groups) else []


def physics_figures(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Generated maps (of the clip's own push) against the truth, pixel by pixel, object by object.

    fallen_video: from the video alone, by colour, for a model without ids."""
    made, true, meta = made["arrow"], scene.truth["arrow"], scene.meta["arrow"]
    objects, figures = scene.objects, {}
    if "segmentation" in made and scene.has_ids:
        ids, true_ids = made["segmentation"], true["segmentation"]
        figures |= id_overlap(ids, true_ids) | centroid_error(ids, true_ids, objects) | permanence(ids, true_ids)
    if "depth" in made and scene.has_depth:
        figures |= depth_error(made["depth"], true["depth"], true["segmentation"])
    if "flow" in made:
        figures |= flow_error(made["flow"], true["flow"]) | object_motion(made, scene)
    if meta.keys() >= HIT_TRUTH:
        figures |= hit_figures(made, scene)
    if scene.rows:
        figures |= fallen_figures(made, scene)
        if "rgb_own" in made:
            ends = (ids_by_color(rgb[[0, -1]], true["segmentation"][0]) for rgb in (made["rgb_own"], true["rgb"]))
            figures["fallen_video"] = fallen_in_video(*ends, scene)
    return figures


def fallen_in_video(seen: Tensor, known: Tensor, scene: Scene) -> Sums:
    """Who lies in the end, by colour alone; ids by colour [T, H, W] of a video, and of the true one."""
    first, fallen = scene.truth["arrow"]["segmentation"][0], set(scene.meta["arrow"]["fallen"])
    return of_the_visible(lambda ids: fallen_ids(first, ids[-1]), seen, known, fallen, set(scene.objects))


def object_motion(made: Maps, scene: Scene) -> dict[str, Sums]:
    """Which objects move, by carried points; and how the pushed object obeys its arrow:
    angle in degrees between arrow and mean flow, and the ratio of their lengths, where it truly moves."""
    true = scene.truth["arrow"]
    first = true["segmentation"][0]
    points, owner = carry_seen(made["flow"], made.get("segmentation"), first)
    true_points, _ = carry_seen(true["flow"], true["segmentation"], first)
    truly = moved_ids(true_points, owner)
    figures = {"moved": two_classes(moved_ids(points, owner), truly, scene.objects)}
    if scene.pushed in scene.objects:
        (ax, ay), (x, y) = (displacement(p, owner, scene.pushed).double().tolist() for p in (true_points, points))
        if math.hypot(ax, ay) > MOVING:
            # One that does not move has no direction: 90 degrees, as far from the arrow as from its opposite.
            turn = math.atan2(abs(ax * y - ay * x), ax * x + ay * y) if x or y else math.pi / 2
            figures["control_angle"] = mean_of(math.degrees(turn))
            figures["control_length"] = mean_of(math.hypot(x, y) / math.hypot(ax, ay))
    return figures


def fallen_figures(made: Maps, scene: Scene) -> dict[str, Sums]:
    """Which objects lie in the end, against the simulator: single objects (balanced accuracy), whole clips, and whole
    clips in which a wide gap stops the chain; by frame-0 ids carried along the flow, and by the generated ids. Of those
    objects of which the measure can tell it (`tellable`)."""
    true, meta, said = scene.truth["arrow"], scene.meta["arrow"], {}
    first = true["segmentation"][0]
    if "flow" in made:
        said["carried"] = [fallen_points(*carry(maps["flow"], first)) for maps in (made, true)]
    if "segmentation" in made:
        said["ids"] = [fallen_ids(first, maps["segmentation"][-1]) for maps in (made, true)]
    figures, fallen = {}, set(meta["fallen"])
    for name, (ids, known) in said.items():
        among = tellable(known, fallen, scene.objects)
        right = mean_of(ids & among == fallen & among) if among else (0.0, 0.0)
        figures[f"fallen_{name}"] = two_classes(ids, fallen, among)
        figures[f"all_right_{name}"] = right
        if meta.get("wide_gap") and scene.pushed:
            figures[f"gap_{name}"] = right
    return figures


def other_pushes(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Opposite, harder and no push ("none") in the same scene, by carried points; each against its own simulation.

    both_ways: the pushed object goes at least a quarter of its true way along the true direction, for the push and
    for its opposite. both_all_right: for both, exactly those that should have fallen have (of the `tellable`).
    standing: when all are told to stay, objects that do not fall. quiet: mean |O| then over mean |O| with the arrow.
    sooner: with the harder push, half of all motion is done earlier than with the given one, where that is true. All
    but both_ways are of dominoes alone. A model that cannot be told to stay makes no "none" and has neither standing
    nor quiet."""
    first, flows = scene.truth["arrow"]["segmentation"][0], {name: maps["flow"] for name, maps in made.items()}
    carried = {name: carry(flow, first) for name, flow in flows.items()}
    true = {name: carry(scene.truth[name]["flow"], first) for name in ("arrow", "opposite")}
    figures, pushed = {}, scene.pushed in scene.objects
    if scene.rows and "none" in made:
        upright = set(scene.objects) - fallen_points(*carry(scene.truth["none"]["flow"], first))
        figures["standing"] = (len(upright - fallen_points(*carried["none"])), len(upright))
    if pushed:
        ways = [displacement(*points[name], scene.pushed) for name in true for points in (carried, true)]
        figures["both_ways"] = mean_of(right_way(*ways[:2]) and right_way(*ways[2:]))
    if pushed and scene.rows:
        right = [rights(carried[name], true[name], set(scene.meta[name]["fallen"])) for name in true]
        figures["both_all_right"] = mean_of(all(right))
        if "none" in made:
            figures["quiet"] = tuple(flows[name].norm(dim=1).mean().item() for name in ("none", "arrow"))
        if sooner({name: scene.truth[name]["flow"] for name in flows}):
            figures["sooner"] = mean_of(sooner(flows))
    return figures


def rights(carried: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], fallen: set[int]) -> bool:
    """Whether exactly those have fallen that should, by points that were carried; of those of which the true points
    tell it."""
    among = tellable(fallen_points(*true), fallen, true[1].unique().tolist())
    return fallen_points(*carried) & among == fallen & among


def sooner(flows: dict[str, Tensor]) -> bool:
    """Whether half of all motion is done earlier with the harder push. NaN, no motion, is not sooner."""
    return half_time(flows["stronger"]) < half_time(flows["arrow"])


def demo_figures(made: dict[str, Maps], scene: Scene) -> dict[str, Sums]:
    """Everything that the demo model is judged by. made: maps by push; "rgb" of "arrow" is painted from true motion,
    "rgb_own" from the source's own, whose ids are "told" (None: without ids). painted_ids: mIoU of its ids by colour
    with these, over the pixels at which the true video, by colour, shows the true ids: not where a shadow, an edge or
    two things of one colour mislead."""
    arrow, true = made["arrow"], scene.truth["arrow"]
    figures, first = fallen_figures(arrow, scene) if scene.rows else {}, true["segmentation"][0]
    if "segmentation" in arrow and scene.has_ids:
        figures |= id_overlap(arrow["segmentation"], true["segmentation"])
    if scene.meta["arrow"].keys() >= HIT_TRUTH:
        figures |= hit_figures(arrow, scene)
    if "flow" in arrow:
        figures |= flow_error(arrow["flow"], true["flow"])
        figures |= other_pushes(made, scene) if {"opposite", "stronger"} <= made.keys() else {}
    figures |= drive_figures(made, scene) if "opposite" in made else {}
    if (true["flow"].norm(dim=1) > MOVING).any():  # else a still picture is perfect: its decibels drown the others
        figures |= {"psnr": mean_of(psnr(arrow["rgb"], true["rgb"]))} if "rgb" in arrow else {}
        figures["psnr_own"] = mean_of(psnr(arrow["rgb_own"], true["rgb"]))
    if arrow["told"] is not None and scene.objects:
        seen, sure = ids_by_color(arrow["rgb_own"], first), scene.told_by_color
        figures["painted_ids"] = mean_of(mean_iou(seen[sure], arrow["told"][sure], background=True))
    return figures
