"""What a model folder makes of clips: samples of both stages, made a batch at a time and kept in files.

sampler = Sampler(Model.load(folder, "cpu"), cache, settings)
maps = sampler.make(scenes, "arrow")      # Stage I's flow, ids and depth of every scene, told one arrow
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from clips import CODEC_VERSION, Motion
from instance_flow import instance_flow
from metrics import Maps, Scene
from motion_dreamer import MotionDreamer, StageConfig, dream
from svd import VAE, ImageEncoder
from training.cache import fingerprint
from training.checkpoint import seed_of
from training.vae import round_trip
from weights import save_safetensors

PUSHES = ("arrow", "opposite", "stronger", "none")


@dataclass
class Model:
    """What a model folder holds; stage1 is None for the one-stage model of Table 1."""

    stage1: MotionDreamer | None
    stage2: MotionDreamer
    vae: VAE
    tower: ImageEncoder

    @classmethod
    def load(cls, folder: Path, device: str, half: bool = False) -> Model:
        """half: as sample.py on a GPU, in bfloat16, but for the VAE's encoder in float32 and its decoder in float16."""
        full, kept = ({"dtype": dtype, "device": device} for dtype in (torch.float32, torch.bfloat16))
        kept = kept if half else full
        stage2 = MotionDreamer.from_pretrained(folder, "stage2", **kept).eval()
        stage1 = MotionDreamer.from_pretrained(folder, "stage1", **kept).eval() if stage2.config.given else None
        vae = VAE.from_pretrained(folder, "vae", **full).eval()
        if half:
            vae.decoder.half()
        return cls(stage1, stage2, vae, ImageEncoder.from_pretrained(folder, "image_encoder", **kept).eval())

    def identity(self, *parts: str) -> list[str]:
        """Fingerprint of the weights of these parts, and their configurations; of all, if none is named."""
        named = [part for name in parts or vars(self) if (part := getattr(self, name)) is not None]
        return [fingerprint(*named), *(str(part.config) for part in named)]


def one_arrow(scene: Scene, push: str, config: StageConfig) -> tuple[Tensor, Tensor]:
    """The one arrow that is given, the instance flow of the pushed object: F [2, H, W] and where it tells something
    [1, H, W]. Where nothing is pushed, as in "none", all objects are told to stay; of cars, which drive by themselves,
    the first step is told."""
    flow, ids = scene.truth[push]["flow"], scene.truth[push]["segmentation"]
    if push != "none" and not scene.pushed and scene.meta[push].get("scenario") == "driving":
        return instance_flow(flow, ids, "start"), (ids[:1] > 0).float()
    if push == "none" or not scene.pushed:
        return torch.zeros_like(flow[0]), (ids[:1] > 0).float()
    told = (ids[:1] == scene.pushed).float()
    return instance_flow(flow, ids, config.reduce) * told, told


def stacked(scenes: list[Scene], kind: str, name: str) -> Tensor:
    return torch.stack([scene.truth[kind][name] for scene in scenes])


@dataclass
class Sampler:
    """Makes samples of scenes, a batch at a time, and keeps them: a run that was killed goes on where it was."""

    model: Model
    cache: Path
    settings: dict  # sampling_steps, guidance, seed, batch, marked; told="nothing": neither arrow nor camera
    videos: tuple[str, ...] = ("rgb", "rgb_own")  # of these kinds; the first is only asked by the demo's figures
    quiet: bool = True  # no bars of sampling steps

    @cached_property
    def makers(self) -> dict[str, list[str]]:
        """By kind of sample, what makes it: another Stage II leaves Stage I's motion as it was."""
        made_by, encoders = self.model.identity, ("vae", "tower")
        motion = dict.fromkeys(PUSHES, made_by("stage1", *encoders))
        return motion | {"rgb": made_by("stage2", *encoders), "rgb_own": made_by(), "codec": made_by("vae")}

    def can_tell(self, push: str) -> bool:
        """Only a stage that sees what is told knows "stay" from "nothing is told"; "none" makes no sense to others."""
        stage = self.model.stage1
        return stage is not None and (push != "none" or getattr(stage.config, "told", False))

    def make(self, scenes: list[Scene], kind: str, seed: int = 0) -> list[Maps]:
        """Maps of every scene. kind: a push ("arrow", "opposite", "stronger", "none": Stage I), "rgb" and "rgb_own"
        (Stage II, given true motion or Stage I's), "codec/" and a push (the truth through the VAE and back)."""
        files = [(scene.path.name, scene.path.stat().st_size, scene.path.stat().st_mtime_ns) for scene in scenes]
        codec = kind.startswith("codec/")  # it makes no samples: settings and seed do not matter
        told = [self.makers["codec"], self.settings["marked"]] if codec else [self.makers[kind], self.settings, seed]
        told.append(len(scenes[0].truth["arrow"]["flow"]))
        folder = self.cache / hashlib.sha256(json.dumps([*told, CODEC_VERSION, files]).encode()).hexdigest()[:16]
        path = folder / f"{kind.replace('/', '_')}.safetensors"
        if not path.exists():
            maps = self.codec(scenes, kind[6:]) if codec else self.sample(scenes, kind, seed)
            folder.mkdir(parents=True, exist_ok=True)
            save_safetensors({name: compact(value) for name, value in maps.items()}, path)
        device = next(self.model.vae.parameters()).device
        maps = {name: expand(value.to(device)) for name, value in load_file(path).items()}
        return [{name: value[i] for name, value in maps.items()} for i in range(len(scenes))]

    def sample(self, scenes: list[Scene], kind: str, seed: int) -> Maps:
        """Of a batch; where it does not fit into the GPU, of each half of it, with noise of its own."""
        motion = self.motion(scenes, kind, seed) if kind.startswith("rgb") else None
        return in_halves(lambda some, given: self.sample_together(some, kind, seed, given), scenes, motion)

    def sample_together(self, scenes: list[Scene], kind: str, seed: int, given: Motion | None) -> Maps:
        model, push = self.model, "arrow" if kind.startswith("rgb") else kind
        stage = model.stage2 if kind.startswith("rgb") else model.stage1
        arrows = [one_arrow(scene, push, stage.config) for scene in scenes]
        F, mask = (torch.stack(maps) for maps in zip(*arrows, strict=True))
        rgb, ids, depth = (stacked(scenes, "arrow", name) for name in ("rgb", "segmentation", "depth"))
        noise = (self.settings["seed"], seed, zlib.crc32(scenes[0].path.name.encode()), stage is model.stage2)
        told = {
            "frames": rgb.shape[1], "steps": self.settings["sampling_steps"],
            "guidance": tuple(self.settings["guidance"]),
            "fps": stacked(scenes, "arrow", "fps"), "camera": stacked(scenes, push, "camera"), "mask": mask,
            "progress": partial(tqdm, desc=kind, leave=False, disable=self.quiet),
            # Every batch has noise of its own, the same for every kind of push: pairs differ by the arrow alone.
            "generator": torch.Generator().manual_seed(seed_of(*noise)),
        }  # fmt: skip
        if self.settings.get("told") == "nothing":  # supplement, section 9
            F, told["mask"], told["camera"] = 0 * F, 0 * mask, 0 * told["camera"]
        if kind == "rgb":  # how much moves is known of true motion alone
            told["motion_bucket"] = stacked(scenes, "arrow", "motion_bucket")
        firsts = (model.vae, model.tower, rgb[:, 0], ids[:, 0], depth[:, 0], F)
        if stage is model.stage1:
            motion, _ = dream(stage, None, *firsts, **told)
            return {name: value for name, value in vars(motion).items() if value is not None}
        _, video = dream(None, stage, *firsts, **told, motion=given)
        return {kind: video}

    def motion(self, scenes: list[Scene], kind: str, seed: int) -> Motion:
        """What Stage II is told: the truth, or what Stage I made of the arrow."""
        given, parts = self.model.stage2.config.given, dict.fromkeys(("flow", "segmentation", "depth"))
        own = given and kind != "rgb"
        maps = self.make(scenes, "arrow", seed) if own else [scene.truth["arrow"] for scene in scenes]
        return Motion(**parts | {name: torch.stack([some[name] for some in maps]) for name in given})

    @torch.no_grad()
    def codec(self, scenes: list[Scene], push: str) -> Maps:
        vae, maps = self.model.vae, {}
        parts = {"arrow": ("rgb", "flow", "segmentation", "depth"), "opposite": ("flow", "segmentation", "depth")}
        for name in parts.get(push, ("flow",)):
            value = stacked(scenes, push, name)
            first = value[:, 0] if name in ("segmentation", "depth") else None
            maps[name] = round_trip(vae, name, value, first)
        return maps


def in_halves(sample: Callable[[list[Scene], Motion | None], Maps], scenes: list[Scene], motion: Motion | None) -> Maps:
    """`sample` of scenes and their motion, or where memory does not suffice, of each half of them. Raises ValueError
    when a single one is too much."""
    try:
        return sample(scenes, motion)
    except torch.OutOfMemoryError:
        if len(scenes) == 1:
            raise ValueError(f"{scenes[0].path}: sampling this clip alone takes more memory than the GPU has") from None
    torch.cuda.empty_cache()  # here, where the failed try no longer holds its tensors
    half = len(scenes) // 2
    parts = [
        in_halves(sample, scenes[part], motion and motion.map(lambda value, part=part: value[part]))
        for part in (slice(half), slice(half, None))
    ]
    return {name: torch.cat([maps[name] for maps in parts]) for name in parts[0]}


def compact(value: Tensor) -> Tensor:
    """Ids as bytes, everything else in half precision."""
    return value.cpu().to(torch.float16 if value.is_floating_point() else torch.uint8).contiguous()


def expand(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.long()
