"""Measures a model folder on held-out clips and prints the figures, and the paper's Tables 1 and 3 (section 4).

    python evaluate.py --model demo --data data/val                                   # the figures of the demo model
    python evaluate.py --model demo --data data/val --metrics physics,fvd,fvmd,demo --clips 50
    python evaluate.py --table 1 --data data/train --val data/val --steps 10000       # trains what is missing

A figure never stands alone. Beside the model's stand those of "still" (nothing moves: ids, depth and picture of the
first frame repeated, flow 0), of "codec" (the truth through the VAE and back: no model with this VAE can do better)
and of "truth" (what the measure itself says of perfect motion). Brackets are 95 % bootstrap intervals over clips.

The model is told what a user would tell it: first frame, its ids and depth, and one arrow: the instance flow of the
object that was pushed. The clips' own truth comes from clips.simulate, which also says what another push would have
done.

The measures themselves are in metrics/. `Maps` are flow [T, 2, H, W], segmentation [T, H, W], depth [T, H, W] and rgb
[T, 3, H, W] of one clip, by the names of `Clip.tensors`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import metrics
from clips import Clip, ClipDataset, Motion
from instance_flow import instance_flow
from metrics.motion import Maps, Sums
from metrics.physics import Scene
from metrics.trackers import Pips, chain_flow, lucas_kanade
from motion_dreamer import ABLATIONS, STAGE2, MotionDreamer, StageConfig, dream
from svd import VAE, ImageEncoder
from training.cache import fingerprint
from training.checkpoint import seed_of
from training.vae import round_trip
from weights import save_safetensors

STRONGER = 1.6  # how much harder the harder push is


# ---------------------------------------------------------------------------------------------- names of the figures

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


# -------------------------------------------------------------------------------------------------- scenes and samples


def truth_of(path: Path, frames: int, device: str) -> Scene:
    """A clip as it is. Without a simulator's meta, the object that moves most counts as the one that was pushed."""
    clip = Clip.load(path, 0, frames)
    maps = {name: value.to(device) for name, value in clip.tensors().items()}
    meta = dict(clip.meta)
    if "pushed" not in meta:
        F = instance_flow(maps["flow"], maps["segmentation"]).norm(dim=0)
        meta["pushed"] = maps["segmentation"][0].flatten()[F.argmax()].item() if F.max() > 0 else 0
    return Scene(path, {"arrow": maps}, {"arrow": meta})


def frozen(maps: Maps) -> Maps:
    """Nothing moves: the first frame again and again, flow 0."""
    repeated = {name: maps[name][:1].expand_as(maps[name]) for name in ("rgb", "segmentation", "depth")}
    return maps | repeated | {"flow": torch.zeros_like(maps["flow"])}


def add_other_pushes(scene: Scene, cache: Path, device: str) -> None:
    """Simulates the scene again with the opposite and with a harder push; without one, nothing moves.

    Raises ValueError when the clip has no simulator's truth, or more frames than are looked at."""
    meta, maps = scene.meta["arrow"], scene.truth["arrow"]
    frames, _, height, width = maps["flow"].shape
    if missing := {"scenario", "seed", "pushed", "side", "strength", "fallen", "poses"} - meta.keys():
        raise ValueError(f"{scene.path}: its meta has no {', '.join(sorted(missing))}: it is not from clips.simulate")
    if len(meta["poses"]) != frames + 1:
        raise ValueError(f"{scene.path}: has {len(meta['poses']) - 1} frames, the model makes {frames}")
    scene.truth["none"], scene.meta["none"] = frozen(maps), meta | {"fallen": []}
    for kind, push in (("opposite", {"side": -meta["side"]}), ("stronger", {"strength": STRONGER * meta["strength"]})):
        if not scene.pushed:
            scene.truth[kind], scene.meta[kind] = maps, meta
            continue
        path = cache / f"{kind}-{width}x{height}x{frames}" / scene.path.name
        if not path.exists():
            from clips.simulate import simulate  # needs mujoco, which nothing else here does

            simulate(meta["scenario"], meta["seed"], frames, (width, height), push).save(path)
        other = truth_of(path, frames, device)
        scene.truth[kind], scene.meta[kind] = other.truth["arrow"], other.meta["arrow"]


@dataclass
class Model:
    """What a model folder holds; stage1 is None for the one-stage model of Table 1."""

    stage1: MotionDreamer | None
    stage2: MotionDreamer
    vae: VAE
    tower: ImageEncoder

    @classmethod
    def load(cls, folder: Path, device: str) -> Model:
        kept = {"dtype": torch.float32, "device": device}
        stage2 = MotionDreamer.from_pretrained(folder, "stage2", **kept).eval()
        stage1 = MotionDreamer.from_pretrained(folder, "stage1", **kept).eval() if stage2.config.given else None
        vae = VAE.from_pretrained(folder, "vae", **kept).eval()
        return cls(stage1, stage2, vae, ImageEncoder.from_pretrained(folder, "image_encoder", **kept).eval())

    def weights(self, *parts: str) -> str:
        """Fingerprint of these parts; of all, if none is named."""
        named = [getattr(self, name) for name in parts or vars(self)]
        return fingerprint(*(part for part in named if part is not None))


def one_arrow(scene: Scene, push: str, config: StageConfig) -> tuple[Tensor, Tensor]:
    """The one arrow that is given, the instance flow of the pushed object: F [2, H, W] and where it tells something
    [1, H, W]. "none" tells all objects to stay."""
    flow, ids = scene.truth[push]["flow"], scene.truth[push]["segmentation"]
    if push == "none":
        return torch.zeros_like(flow[0]), (ids[:1] > 0).float()
    told = (ids[:1] == scene.pushed) & (scene.pushed > 0)
    return instance_flow(flow, ids, config.reduce) * told, told.float()


def stacked(scenes: list[Scene], kind: str, name: str) -> Tensor:
    return torch.stack([scene.truth[kind][name] for scene in scenes])


@dataclass
class Sampler:
    """Makes samples of scenes, a batch at a time, and keeps them: a run that was killed goes on where it was."""

    model: Model
    cache: Path
    settings: dict  # steps, guidance, seed

    @cached_property
    def weights(self) -> dict[str, str]:
        """By kind of sample, fingerprints of what makes it: another Stage II leaves Stage I's motion as it was."""
        encoders, model = ("vae", "tower"), self.model
        painted = model.weights("stage2", *encoders)
        motion = dict.fromkeys(PUSHES, model.weights("stage1", *encoders))
        return motion | {"rgb": painted, "rgb_own": model.weights(), "codec": model.weights("vae")}

    def make(self, scenes: list[Scene], kind: str, seed: int = 0) -> list[Maps]:
        """Maps of every scene. kind: a push ("arrow", "opposite", "stronger", "none": Stage I), "rgb" and "rgb_own"
        (Stage II, given true motion or Stage I's), "codec/" and a push (the truth through the VAE and back)."""
        files = [(scene.path.name, scene.path.stat().st_size, scene.path.stat().st_mtime_ns) for scene in scenes]
        codec = kind.startswith("codec/")  # it makes no samples: settings and seed do not matter
        told = [self.weights["codec"], files] if codec else [self.weights[kind], self.settings, seed, files]
        folder = self.cache / hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        path = folder / f"{kind.replace('/', '_')}.safetensors"
        if not path.exists():
            maps = self.codec(scenes, kind[6:]) if codec else self.sample(scenes, kind, seed)
            folder.mkdir(parents=True, exist_ok=True)
            save_safetensors({name: compact(value) for name, value in maps.items()}, path)
        device = next(self.model.vae.parameters()).device
        maps = {name: expand(value.to(device)) for name, value in load_file(path).items()}
        return [{name: value[i] for name, value in maps.items()} for i in range(len(scenes))]

    def sample(self, scenes: list[Scene], kind: str, seed: int) -> Maps:
        model, push = self.model, "arrow" if kind.startswith("rgb") else kind
        stage = model.stage2 if kind.startswith("rgb") else model.stage1
        arrows = [one_arrow(scene, push, stage.config) for scene in scenes]
        F, mask = (torch.stack(maps) for maps in zip(*arrows, strict=True))
        rgb, ids, depth = (stacked(scenes, "arrow", name) for name in ("rgb", "segmentation", "depth"))
        noise = (self.settings["seed"], seed, zlib.crc32(scenes[0].path.name.encode()), stage is model.stage2)
        told = {
            "frames": rgb.shape[1], "steps": self.settings["sampling_steps"],
            "guidance": tuple(self.settings["guidance"]),
            **{name: stacked(scenes, "arrow", name) for name in ("fps", "camera", "motion_bucket")}, "mask": mask,
            # Every batch has noise of its own, the same for every kind of push: pairs differ by the arrow alone.
            "generator": torch.Generator().manual_seed(seed_of(*noise)),
        }  # fmt: skip
        firsts = (model.vae, model.tower, rgb[:, 0], ids[:, 0], depth[:, 0], F)
        if stage is model.stage1:
            motion, _ = dream(stage, None, *firsts, **told)
            return {name: value for name, value in vars(motion).items() if value is not None}
        _, video = dream(None, stage, *firsts, **told, motion=self.motion(scenes, kind, seed))
        return {kind: video}

    def motion(self, scenes: list[Scene], kind: str, seed: int) -> Motion:
        """What Stage II is told: the truth, or what Stage I made of the arrow."""
        given = self.model.stage2.config.given
        if kind == "rgb" or not given:
            return Motion(*(stacked(scenes, "arrow", n) if n in given else None for n in Motion.__annotations__))
        made = self.make(scenes, "arrow", seed)
        return Motion(*(torch.stack([m[n] for m in made]) if n in given else None for n in Motion.__annotations__))

    @torch.no_grad()
    def codec(self, scenes: list[Scene], push: str) -> Maps:
        vae, maps = self.model.vae, {}
        for name in ("rgb", "flow", "segmentation", "depth") if push == "arrow" else ("flow",):
            value = stacked(scenes, push, name)
            first = value[:, 0] if name in ("segmentation", "depth") else None
            maps[name] = round_trip(vae, name, value, first)
        return maps


def compact(value: Tensor) -> Tensor:
    """Ids as bytes, everything else in half precision."""
    return value.cpu().to(torch.float16 if value.is_floating_point() else torch.uint8).contiguous()


def expand(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.long()


# ------------------------------------------------------------------------------------------------- Frechet distances

Extractor = tuple[str, Callable[[Tensor], Tensor]]  # the map that it looks at, and the features [M, D] of one clip


def extractors_of(arguments: argparse.Namespace, device: str) -> dict[str, list[Extractor]]:
    """By the name that is printed; of several extractors (random networks), the distances are averaged."""
    found: dict[str, list[Extractor]] = {}
    if "fvd" in arguments.metrics:
        if arguments.i3d:
            network = metrics.I3D(arguments.i3d, device)
            found[f"FVD (I3D {network.sha256[:8]}, 224x224) ↓"] = [("rgb_own", network)]
        for name, motion in (("rfvd_app (not FVD) ↓", False), ("rfvd_mot (not FVD) ↓", True)):
            found[name] = [("rgb_own", partial(metrics.random_features, seed=seed, motion=motion)) for seed in range(3)]
    if "fvmd" in arguments.metrics:
        if "lk" in arguments.trackers:
            found["FVMD (Lucas-Kanade) ↓"] = [("rgb_own", partial(metrics.tracked_features, lucas_kanade))]
        if "pips" in arguments.trackers:
            track = partial(metrics.tracked_features, Pips.load(arguments.pips, device), enlarge=True)
            found["FVMD (PIPs++) ↓"] = [("rgb_own", track)]
        if "flow" in arguments.trackers:
            found["FVMD (chained flow) ↓"] = [("flow", partial(metrics.tracked_features, chain_flow))]
    return found


def exact_features(scene: Scene) -> Tensor:
    """FVMD's features [1, 1024] of the simulator's own tracks in the first window: a perfect tracker of the truth."""
    from clips.simulate import tracks  # needs mujoco, which nothing else here does

    clip = Clip.load(scene.path, 0, metrics.WINDOW)
    return metrics.tracked_features(
        lambda video, points: torch.from_numpy(tracks(clip, points.double().numpy())), scene.truth["arrow"]["rgb"].cpu()
    )[:1]


class Features:
    """Features of clips by name and source, and the Frechet distances between their sets."""

    def __init__(self, extractors: dict[str, list[Extractor]], exact: bool) -> None:
        self.extractors, self.exact, self.found = extractors, exact, {}

    def add(self, source: str, maps: Maps, scene: Scene) -> None:
        for name, several in self.extractors.items():
            for k, (modality, extract) in enumerate(several):
                if modality in maps:
                    self.found.setdefault((name, k), {}).setdefault(source, []).append(extract(maps[modality]))
        if self.exact and source == "truth":
            self.found.setdefault("exact", {}).setdefault("truth", []).append(exact_features(scene))

    def distances(self, source: str) -> dict[str, dict]:
        """Distance of a source's set from the truth's; for "truth" the floor, one half of it against the other."""
        figures = {}
        for name, several in self.extractors.items():
            parts = [self.found.get((name, k), {}) for k in range(len(several))]
            if all(source in part for part in parts):
                pairs = [(part[source], part["truth"]) for part in parts]
                ddof, scaled = 0 if name.startswith("FVD") else 1, name.startswith("rfvd")  # FVD's covariance is over N
                figures[name] = metrics.set_distance(pairs, source == "truth", ddof, scaled)
        for name in self.extractors if source == "truth" and self.exact else ():
            if name.startswith("FVMD"):
                pair = (self.found[(name, 0)]["truth"], self.found["exact"]["truth"])
                figures[f"{name[:-2]}: its tracks of the truth against exact tracks ↓"] = metrics.set_distance([pair])
        return figures


# -------------------------------------------------------------------------------------------------------- measuring

PUSHES = ("arrow", "opposite", "stronger", "none")
BESIDE = ("still", "codec", "truth")  # what stands beside the model's figures
Views = dict[str, Maps]  # what one source shows of a scene, by push
Rows = dict[str, list[dict[str, Sums]]]  # by source, figures of every clip


def views_of(scenes: list[Scene], sampler: Sampler, pushes: tuple[str, ...], alone: bool) -> dict[str, list[Views]]:
    """What the model, and unless it is measured alone "still", "codec" and "truth" show of each scene."""
    truth = [{push: scene.truth[push] for push in pushes} for scene in scenes]
    sources = {"model": generated(scenes, sampler, pushes, 0)}
    if not alone:
        sources["truth"] = truth
        sources["still"] = [{push: frozen(maps) for push, maps in views.items()} for views in truth]
        codec = {push: sampler.make(scenes, f"codec/{push}") for push in pushes}
        sources["codec"] = [{push: codec[push][i] for push in pushes} for i in range(len(scenes))]
    for name, seen in sources.items():
        for views, model, true in zip(seen, sources["model"], truth, strict=True):
            told = (true if name in ("codec", "truth") else model)["arrow"].get("segmentation")
            own = {} if name == "model" else {"rgb_own": views["arrow"]["rgb"]}
            views["arrow"] |= own | ({} if told is None else {"told": told})
    return sources


def generated(scenes: list[Scene], sampler: Sampler, pushes: tuple[str, ...], seed: int) -> list[Views]:
    motions = {push: sampler.make(scenes, push, seed) for push in pushes if sampler.model.stage1}
    kinds = ("rgb", "rgb_own") if pushes == PUSHES else ("rgb_own",)  # only the demo's figures ask for both
    videos = [sampler.make(scenes, kind, seed) for kind in kinds]
    views = [{push: made[i] for push, made in motions.items()} for i in range(len(scenes))]
    for i, view in enumerate(views):
        view["arrow"] = view.get("arrow", {}) | {name: maps for video in videos for name, maps in video[i].items()}
    return views


def measure(
    scenes: list[Scene], sampler: Sampler, arguments: argparse.Namespace, features: Features, alone: bool
) -> Rows:
    """Figures of a batch of scenes, by source; the features of its videos go into `features`."""
    pushes = PUSHES if "demo" in arguments.metrics else ("arrow",)
    sources, rows = views_of(scenes, sampler, pushes, alone), {}
    for name, seen in sources.items():
        rows[name] = [figures_of(views, scene, arguments.metrics) for views, scene in zip(seen, scenes, strict=True)]
        for views, scene in zip(seen, scenes, strict=True):
            features.add(name, views["arrow"], scene)
    if arguments.samples > 1:
        tries = [rows["model"]]
        for seed in range(1, arguments.samples):
            seen = generated(scenes, sampler, pushes, seed)
            tries.append(
                [figures_of(views, scene, arguments.metrics) for views, scene in zip(seen, scenes, strict=True)]
            )
        by_clip = list(zip(*tries, strict=True))
        rows["model"] = [added(figures) for figures in by_clip]
        rows[f"best of {arguments.samples}"] = [min(figures, key=moving_error) for figures in by_clip]
    return rows


def figures_of(views: Views, scene: Scene, groups: list[str]) -> dict[str, Sums]:
    figures = metrics.physics_figures(views, scene) if "physics" in groups else {}
    return figures | (metrics.demo_figures(views, scene) if "demo" in groups else {})


def added(figures: Sequence[dict[str, Sums]]) -> dict[str, Sums]:
    """Several samples of one clip count together."""
    return {name: tuple(np.sum([f[name] for f in figures if name in f], axis=0)) for f in figures for name in f}


def moving_error(figures: dict[str, Sums]) -> float:
    """By which the best of several samples is chosen."""
    return figures["epe_moving"][0] if "epe_moving" in figures else 0.0


# ------------------------------------------------------------------------------------------------------- one model


def evaluate(arguments: argparse.Namespace, folder: Path, shared: dict | None = None) -> dict:
    """All figures of one model folder: {"figures": {source: {name: {value, interval, clips}}}, "settings": ...}.

    `shared` is filled with what does not depend on the model (figures and features of "still", "codec" and "truth"),
    or if it is filled already, for the same clips and VAE, spares measuring that again."""
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    model = Model.load(folder, device)
    config = model.stage2.config
    clips = ClipDataset(arguments.val, config.frames)
    if clips.height % config.vae_factor or clips.width % config.vae_factor:
        size = f"{clips.width}x{clips.height}"
        raise ValueError(f"{arguments.val}: clips are {size}, not a multiple of {config.vae_factor}")
    paths = clips.paths[: arguments.clips]
    cache = Path(arguments.cache or Path(arguments.val) / ".cache") / "evaluate"
    told = {name: getattr(arguments, name) for name in ("sampling_steps", "guidance", "seed", "batch")}
    sampler, shared = Sampler(model, cache, told), {} if shared is None else shared
    features, alone = Features(extractors_of(arguments, device), "exact" in arguments.trackers), bool(shared)
    rows = dict(shared.get("rows", {}))
    features.found = {key: dict(found) for key, found in shared.get("features", {}).items()}
    for i in tqdm(range(0, len(paths), arguments.batch), folder.name, unit="batch", disable=arguments.quiet):
        scenes = [truth_of(path, config.frames, device) for path in paths[i : i + arguments.batch]]
        for scene in scenes if "demo" in arguments.metrics else []:
            add_other_pushes(scene, cache, device)
        for source, found in measure(scenes, sampler, arguments, features, alone).items():
            rows.setdefault(source, []).extend(found)
    if not alone:
        shared["rows"] = {source: found for source, found in rows.items() if source in BESIDE}
        shared["features"] = {key: {s: f[s] for s in BESIDE if s in f} for key, f in features.found.items()}
    order = ["model", *sorted(rows.keys() - {"model", *BESIDE}), *BESIDE]
    figures = {source: metrics.summarise(rows[source]) | features.distances(source) for source in order}
    rules = ("MOVING", "TILT", "HEIGHT", "RIGHT_WAY", "CONTACT", "CONTACT_PIXELS", "RESAMPLES", "SET_RESAMPLES")
    settings = vars(arguments) | {
        "model": str(folder), "weights": model.weights(), "frames": config.frames, "size": [clips.width, clips.height],
        "clips": len(paths), "first_clip": paths[0].name, "last_clip": paths[-1].name, "device": device,
        "torch": torch.__version__, "seconds": round(time.perf_counter() - started, 1),
        "rules": {name: getattr(metrics, name) for name in rules} | {"STRONGER": STRONGER},
    }  # fmt: skip
    return {"figures": figures, "settings": settings}


def cell(figure: dict | None) -> str:
    """A figure with its interval: three digits after the point, or none where it is large."""
    if figure is None or math.isnan(figure["value"]):
        return "-"
    digits = 3 if abs(figure["value"]) < 10 else 1
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


COLUMNS = {"model": "model", "still": "nothing moves", "codec": "truth through the VAE", "truth": "truth"}


def markdown(result: dict) -> str:
    """A table: a figure a line, a source a column; ↑ more is better, ↓ less is better."""
    figures, names = result["figures"], {}
    for found in figures.values():
        names |= dict.fromkeys(found)
    shown = [name for name in LABELS if name in names] + [n for n in names if n not in LABELS and " " in n]
    lines = [" | ".join(["| figure", *(COLUMNS.get(source, source) for source in figures), "clips |"])]
    lines.append("|---" * (len(figures) + 2) + "|")
    for name in shown:
        cells = [cell(figures[source].get(name)) for source in figures]
        counted = max(found[name]["clips"] for found in figures.values() if name in found)
        lines.append("| " + " | ".join([LABELS.get(name, name), *cells, str(counted)]) + " |")
    return "\n".join([*lines, "", footnote(result["settings"])])


def footnote(settings: dict) -> str:
    size = "x".join(map(str, settings["size"]))
    return (
        f"{settings['clips']} clips of {settings['val']}, {settings['frames']} frames of {size}, stride 1; "
        f"{settings['sampling_steps']} sampling steps, guidance {settings['guidance']}, seed {settings['seed']}; "
        f"weights {settings['weights']}. Covariances: FVD over N, others over N - 1; nothing is added."
    )


# ---------------------------------------------------------------------------------------------- the paper's tables

SHOWN = ("contacts_video", "fallen_video", "contacts", "epe_relative", "iou_last")  # beside Frechet distances

# FVD and FVMD of Tables 1 and 3, on Physion with SVD's weights; by the name of our row: label, what trains it.
TABLES = {
    1: {
        "one_stage": ("One-stage*", 173.0, 224.3),
        "sparse_flow": ("MOFA-Video (ours: its sparse flow in our model)", 170.1, 226.2),
        "motion_dreamer": ("Ours", 157.8, 205.1),
    },
    3: {
        "motion_dreamer": ("Motion Dreamer", 157.8, 205.2),
        "without_segmentation": ("w/o segmentation map", 243.7, 259.0),
        "without_depth": ("w/o depth map", 167.0, 228.8),
        "without_flow": ("w/o optical flow", 173.0, 224.3),
        "without_motion_loss": ("w/o motion enhancement loss", 165.1, 210.1),
        "sparse_flow": ("sparse optical flow", 169.1, 217.5),
    },
}


# Hundreds of steps, not thousands: warm up soon, cool down for long, average over little.
RECIPE = ["--lr", "8e-4", "--warmup", "30", "--cooldown", "0.6", "--ema", "0.99", "--sample-every", "0"]


def train_row(row: str, arguments: argparse.Namespace) -> Path:
    """Trains a row's model under --runs unless it is there: the same data, VAE, steps and seed for every row.

    A Stage II that is configured as that of the full model is that one: it would train to the same weights."""
    root = Path(arguments.runs)
    name = f"{arguments.preset}-{arguments.steps}-{arguments.seed}"
    base, folder = root / f"{name}-vae", root / f"{name}-{row}"
    told = ["--preset", arguments.preset, "--data", arguments.data, "--seed", str(arguments.seed)]
    told += ["--steps", str(arguments.steps), "--batch", str(arguments.train_batch), *RECIPE]
    if not arguments.codec:
        train(base, "vae", [*told, "--frames", "4"], arguments.quiet)
    for part in ("vae", "image_encoder"):
        shutil.copytree(Path(arguments.codec or base) / part, folder / part, dirs_exist_ok=True)
    told += ["--precision", arguments.precision] if arguments.precision else []
    told += ["--val", arguments.val, "--val-every", str(arguments.steps)]
    told += ["--set", *arguments.set] if arguments.set else []
    if row == "one_stage":
        train(folder, "one", told, arguments.quiet)
        return folder
    train(folder, "1", [*told, "--ablation", row], arguments.quiet)
    if row != "motion_dreamer" and ABLATIONS[row][1] == STAGE2:
        shutil.copytree(train_row("motion_dreamer", arguments) / "stage2", folder / "stage2", dirs_exist_ok=True)
    else:
        train(folder, "2", [*told, "--ablation", row], arguments.quiet)
    return folder


def train(folder: Path, stage: str, told: list[str], quiet: bool) -> None:
    """Runs train.py; a finished stage is left as it is, a killed one goes on. Raises ValueError when it fails, or when
    it was finished with other settings."""
    finished = folder / f"finished_{stage}.json"
    if finished.exists():
        if json.loads(finished.read_text()) != told:
            raise ValueError(f"{finished}: was trained with other settings: take another --runs")
        return
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, str(script), "--stage", stage, "--out", str(folder), *told]
    done = subprocess.run(command + ["--quiet"] * quiet, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"{folder}: train.py --stage {stage} ended with exit code {done.returncode}")
    finished.write_text(json.dumps(told))


def table(arguments: argparse.Namespace) -> tuple[str, dict]:
    """Our rows beside the paper's: Markdown, and the figures of every row."""
    arguments.metrics, shared = ["fvd", "fvmd", "physics"], {}
    results = {row: evaluate(arguments, train_row(row, arguments), shared) for row in TABLES[arguments.table]}
    figures = {row: result["figures"]["model"] for row, result in results.items()}
    some = next(iter(results.values()))["figures"]
    names = [n for n in some["still"] if n in SHOWN or n.startswith(("FV", "rfvd"))]
    lines = ["| " + " | ".join(["method", "paper: FVD ↓", "paper: FVMD ↓", *(LABELS.get(n, n) for n in names)]) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row, (label, fvd, fvmd) in TABLES[arguments.table].items():
        lines.append(
            "| " + " | ".join([label, str(fvd), str(fvmd), *(cell(figures[row].get(n)) for n in names)]) + " |"
        )
    for source in BESIDE:
        lines.append("| " + " | ".join([COLUMNS[source], "", "", *(cell(some[source].get(n)) for n in names)]) + " |")
    ours = f"Ours: preset {arguments.preset}, {arguments.steps} steps a stage; {footnote(results[row]['settings'])}"
    lines += ["", f"{ours} The paper: SVD's size, Physion. Only the order of rows compares."]
    return "\n".join(lines), results


# ---------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", metavar="DIR", help="model folder")
    what.add_argument("--table", type=int, choices=list(TABLES), help="train and compare the rows of a table instead")
    what.add_argument("--data", required=True, metavar="DIR", help="held-out clips; with --table, clips to train on")
    what.add_argument("--val", metavar="DIR", help="held-out clips for --table")
    what.add_argument("--metrics", default="physics,demo", help="some of physics,fvd,fvmd,demo")
    what.add_argument("--clips", type=int, default=200, help="at most")
    what.add_argument("--samples", type=int, default=1, help="of a clip: their mean, and the best of them")
    what.add_argument("--i3d", metavar="FILE_OR_REPO", help="i3d_torchscript.pt or a hub id that has it: adds FVD")
    what.add_argument(
        "--trackers", default="lk,flow", help="of FVMD: some of lk,flow,pips,exact (exact checks the others)"
    )
    what.add_argument(
        "--pips", metavar="FILE", default="pips2_weights.pth", help="weights of the tracker pips (PIPs++)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--sampling-steps", type=int, default=10)
    how.add_argument("--guidance", type=float, nargs=2, default=[1.0, 1.0], metavar=("FIRST", "LAST"))
    how.add_argument("--batch", type=int, default=8, help="clips that are sampled together")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--cache", metavar="DIR", help="where samples are kept; default: in the data folder")
    how.add_argument("--json", default="evaluation.json", metavar="FILE", help="all figures and every setting")
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    rows = parser.add_argument_group("training of --table")
    rows.add_argument("--steps", type=int, default=3000, help="of training, for each stage")
    rows.add_argument("--train-batch", type=int, default=8, help="clips a step")
    rows.add_argument("--preset", default="tiny")
    rows.add_argument("--precision", choices=("fp32", "bf16"), help="of training; default: that of train.py")
    rows.add_argument("--codec", metavar="DIR", help="VAE and image tower of this model folder; else they are trained")
    rows.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of StageConfig, in all rows")
    rows.add_argument("--runs", default="runs/table", metavar="DIR", help="where its models are kept")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    for name, known in (("metrics", "physics,fvd,fvmd,demo"), ("trackers", "lk,flow,pips,exact")):
        setattr(arguments, name, getattr(arguments, name).split(","))
        if unknown := set(getattr(arguments, name)) - set(known.split(",")):
            raise ValueError(f"--{name} {','.join(sorted(unknown))}: expected some of {known}")
    counts = ("clips", "samples", "sampling_steps", "batch", "train_batch", "steps")
    if min(getattr(arguments, name) for name in counts) < 1:
        raise ValueError(f"--{', --'.join(counts).replace('_', '-')}: expected 1 at least")
    path = Path(arguments.json)
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}")
    if arguments.table:
        if not arguments.val:
            raise ValueError("--table needs --val, clips that were not trained on")
        text, result = table(arguments)
    else:
        if not arguments.model:
            raise ValueError("expected --model DIR or --table 1 or 3")
        arguments.val = arguments.data
        result = evaluate(arguments, Path(arguments.model))
        text = markdown(result)
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has no NaN
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial_file, path)
    print(text)


def main() -> None:
    try:
        run(parse_arguments())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
