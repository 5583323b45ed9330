"""Held-out clips as scenes: what is true of a clip, and what else would have happened there, simulated again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from clips import Clip
from instance_flow import instance_flow
from metrics import PUSH_TRUTH, Maps, Scene, frozen

STRONGER = 1.6  # how much harder the harder push is
SAME_PLACE = 0.05  # metres: what is redrawn lets a tower settle otherwise, by millimetres


def first_of(paths: list[Path], count: int) -> list[Path]:
    """The first clips, of every scenario in turn: by name alone, those of a folder of several would be of few."""
    turns: dict[str, int] = {}
    order = []
    for path in paths:
        scenario = scenario_of(path)
        turns[scenario] = turns.get(scenario, -1) + 1
        order.append((turns[scenario], path))
    return sorted(path for _, path in sorted(order)[:count])


def scenario_of(path: Path) -> str:
    return str(Clip.load(path, 0, 1).meta.get("scenario", "unnamed"))


def truth_of(path: Path, frames: int, device: str, marked: str = "all") -> Scene:
    """A clip as it is. Where its meta does not say who was pushed, it is the object that moves most.

    marked="pushed": its ids show the pushed object alone (where there is one), to the model and to the measures."""
    clip = Clip.load(path, 0, frames)
    maps = {name: value.to(device) for name, value in clip.tensors().items()}
    meta = dict(clip.meta)
    if not isinstance(meta.get("pushed"), int):
        F = instance_flow(maps["flow"], maps["segmentation"]).norm(dim=0)
        meta["pushed"] = maps["segmentation"][0].flatten()[F.argmax()].item() if F.max() > 0 else 0
    if marked == "pushed" and meta["pushed"]:
        maps["segmentation"] = maps["segmentation"] * (maps["segmentation"] == meta["pushed"])
    return Scene(path, {"arrow": maps}, {"arrow": meta})


def add_other_pushes(scene: Scene, cache: Path, device: str) -> None:
    """Simulates the scene again with the opposite and with a harder push; without one, nothing moves. Of a drive, the
    opposite is another ego motion, or another one of the lead car (`turned`). A clip that is not from clips.simulate
    stays as it is.

    Raises ValueError when the clip has more frames than are looked at."""
    meta, maps = scene.meta["arrow"], scene.truth["arrow"]
    frames = len(maps["flow"])
    if not meta.keys() >= PUSH_TRUTH:
        return
    if len(meta["poses"]) != frames + 1:
        raise ValueError(f"{scene.path}: has {len(meta['poses']) - 1} frames, the model makes {frames}")
    scene.truth["none"], scene.meta["none"] = frozen(maps), meta | {"fallen": []}
    others = {"opposite": turned(meta), "stronger": None}
    if scene.pushed:
        others = {"opposite": {"side": -meta["side"]}, "stronger": {"strength": STRONGER * meta["strength"]}}
    for kind, push in others.items():
        scene.truth[kind], scene.meta[kind] = maps, meta
        if push:
            other = truth_of(again(scene, kind, push, cache), frames, device)
            scene.truth[kind], scene.meta[kind] = other.truth["arrow"], other.meta["arrow"]


def turned(meta: dict) -> dict | None:
    """What is told of a drive so that it ends differently for the other car: the lead car's wish is turned round, or
    the ego car is slow enough to pass second, or, if it was that, fast enough to pass first. None where nothing of that
    is told, and in other scenarios."""
    if "told" not in meta:
        return None
    told = meta["told"]
    if meta["case"] != "follow":
        return told | {"ego": 1 if meta["order"][:1] == ["other"] else -1}
    lead = {name: -told[name] for name in ("lead_speed", "lead_lane") if told.get(name)}
    return told | lead if lead else None


def add_twin(scene: Scene, cache: Path, device: str, marked: str = "all") -> None:
    """Simulates the scene again with what no picture shows redrawn, as truth "twin"; of a drive with an opposite, that
    too, as "twin_opposite". A clip has none that is not from clips.simulate, or in which nothing is hidden."""
    frames = len(scene.truth["arrow"]["flow"])
    for kind, name in (("arrow", "twin"), ("opposite", "twin_opposite")):
        meta = scene.meta.get(kind, {})
        if (
            meta.keys() >= PUSH_TRUTH
            and meta.get("hidden")
            and (kind == "arrow" or ("told" in meta and meta is not scene.meta["arrow"]))
        ):
            twin = truth_of(again(scene, name, wishes(meta) | {"hidden": 0}, cache), frames, device, marked)
            scene.truth[name], scene.meta[name] = twin.truth["arrow"], twin.meta["arrow"]


def twin_of(scene: Scene) -> dict[str, Maps]:
    """What the twin shows, by push. Its video is its own: nobody tells it the true motion."""
    if "twin" not in scene.truth:
        return {}
    twin = dict(scene.truth["twin"])
    other = {"opposite": scene.truth["twin_opposite"]} if "twin_opposite" in scene.truth else {}
    return {"arrow": twin | {"rgb_own": twin.pop("rgb"), "told": twin["segmentation"]}} | other


def wishes(meta: dict) -> dict:
    """The push of `simulate` that makes a clip what it is."""
    if meta.get("still"):
        return {}
    return meta["told"] if "told" in meta else {"side": meta["side"], "strength": meta["strength"]}


def again(scene: Scene, kind: str, push: dict, cache: Path) -> Path:
    """The clip file of the same scene with another push, simulated where the cache has none. Raises ValueError when
    that scene begins in another way: the clip is of another version of the simulator, whose worlds were others."""
    meta, (_, _, height, width) = scene.meta["arrow"], scene.truth["arrow"]["flow"].shape
    frames = len(meta["poses"]) - 1
    path = cache / f"{kind}-{width}x{height}x{frames}" / scene.path.name
    kept, still = Clip.load(path, 0, 1).meta if path.exists() else None, meta.get("still", False)
    if kept is None or not begin_alike(kept, meta) or not as_asked(kept, push, still):
        from clips.simulate import simulate  # needs mujoco, which nothing else here does

        # A scene at rest has no other push, but it has a twin.
        other = simulate(meta["scenario"], meta["seed"], frames, (width, height), push, still)
        if not begin_alike(other.meta, meta):
            raise ValueError(f"{scene.path}: is of another version of clips.simulate: simulate it anew")
        other.save(path)
    return path


def as_asked(meta: dict, push: dict, still: bool) -> bool:
    """Whether a clip is of this push: things begin where they do whoever pushes them."""
    told = meta | meta.get("told", {})
    return meta.get("still", False) == still and all(told.get(k) == v for k, v in push.items() if k != "hidden")


def begin_alike(a: dict, b: dict) -> bool:
    """Whether two clips, by their meta, begin with the same things in the same places."""
    first = [np.array(meta["poses"]) for meta in (a, b)]
    return first[0].shape == first[1].shape and np.allclose(first[0][0], first[1][0], atol=SAME_PLACE)


def exact_features(scene: Scene) -> Tensor:
    """FVMD's features [1, 1024] of the simulator's own tracks in the first window: a perfect tracker of the truth."""
    from clips.simulate import tracks  # needs mujoco, which nothing else here does

    if not scene.meta["arrow"].keys() >= metrics.HIT_TRUTH:
        raise ValueError(f"{scene.path}: is not from clips.simulate, whose exact tracks --trackers exact needs")
    clip = Clip.load(scene.path, 0, metrics.WINDOW)
    return metrics.tracked_features(
        lambda video, points: torch.from_numpy(tracks(clip, points.double().numpy())), scene.truth["arrow"]["rgb"].cpu()
    )[:1]
