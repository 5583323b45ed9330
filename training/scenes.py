"""Held-out clips as scenes: what is true of a clip, and what else would have happened there, simulated again."""

from __future__ import annotations

from pathlib import Path

from clips import Clip
from instance_flow import instance_flow
from metrics import PUSH_TRUTH, Scene, frozen

STRONGER = 1.6  # how much harder the harder push is


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
    """Simulates the scene again with the opposite and with a harder push; without one, nothing moves. A clip that is
    not from clips.simulate stays as it is.

    Raises ValueError when the clip has more frames than are looked at."""
    meta, maps = scene.meta["arrow"], scene.truth["arrow"]
    frames = len(maps["flow"])
    if not meta.keys() >= PUSH_TRUTH:
        return
    if len(meta["poses"]) != frames + 1:
        raise ValueError(f"{scene.path}: has {len(meta['poses']) - 1} frames, the model makes {frames}")
    scene.truth["none"], scene.meta["none"] = frozen(maps), meta | {"fallen": []}
    for kind, push in (("opposite", {"side": -meta["side"]}), ("stronger", {"strength": STRONGER * meta["strength"]})):
        if not scene.pushed:
            scene.truth[kind], scene.meta[kind] = maps, meta
            continue
        other = truth_of(again(scene, kind, push, cache), frames, device)
        scene.truth[kind], scene.meta[kind] = other.truth["arrow"], other.meta["arrow"]


def add_twin(scene: Scene, cache: Path, device: str, marked: str = "all") -> None:
    """Simulates the scene again with what no picture shows redrawn, as truth "twin". A clip has none that is not from
    clips.simulate, or in which nothing is hidden."""
    meta, frames = scene.meta["arrow"], len(scene.truth["arrow"]["flow"])
    if meta.get("hidden"):
        twin = truth_of(again(scene, "twin", {"hidden": 0}, cache), frames, device, marked)
        scene.truth["twin"], scene.meta["twin"] = twin.truth["arrow"], twin.meta["arrow"]


def again(scene: Scene, kind: str, push: dict, cache: Path) -> Path:
    """The clip file of the same scene with another push, simulated where the cache has none."""
    meta, (_, _, height, width) = scene.meta["arrow"], scene.truth["arrow"]["flow"].shape
    frames = len(meta["poses"]) - 1
    path = cache / f"{kind}-{width}x{height}x{frames}" / scene.path.name
    if not path.exists():
        from clips.simulate import simulate  # needs mujoco, which nothing else here does

        simulate(meta["scenario"], meta["seed"], frames, (width, height), push).save(path)
    return path
