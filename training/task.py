"""What is trained, and what it learns from: the VAE or a stage, as the command line of train.py says."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clips import ClipDataset
from motion_dreamer import ABLATIONS, ONE_STAGE, MotionDreamer, SmallStageConfig, StageConfig, stage_class
from sources import read_stage
from svd import VAE, ImageEncoder
from training.batch import Chances, training_batch
from training.cache import CachedClips, TrainingClips, encode_clips
from training.presets import PRESETS
from training.processes import Machine
from training.vae import VAETraining


@dataclass
class VAETask:
    """A small VAE learns to encode and decode all modalities."""

    core: VAE
    name = "vae"
    image_encoder = None

    def readable(self, clips: ClipDataset, arguments: argparse.Namespace, machine: Machine) -> torch.utils.data.Dataset:
        clips.check_size(self.core.factor)
        return clips

    def losses(self, network: nn.Module, clips: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return network(clips, generator)

    def network(self, core: VAE) -> nn.Module:
        """A module whose forward is the loss."""
        return VAETraining(core)


@dataclass
class StageTask:
    """A stage learns to denoise; VAE and image tower are frozen."""

    name: str
    core: MotionDreamer
    vae: VAE
    image_encoder: ImageEncoder
    chances: Chances

    def readable(self, clips: ClipDataset, arguments: argparse.Namespace, machine: Machine) -> torch.utils.data.Dataset:
        """Clips with cached latents; without, where the window of a longer clip changes with every draw."""
        clips.check_size(self.core.config.vae_factor)
        if arguments.no_cache or not clips.whole:
            return TrainingClips(clips)
        cached = CachedClips(clips, self.core.config, self.vae, self.image_encoder)
        cached.encode(self.core, self.vae, self.image_encoder, machine, arguments.workers)
        return cached

    def losses(self, network: nn.Module, clips: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        if "token" not in clips:
            clips = clips | encode_clips(clips, self.core, self.vae, self.image_encoder)
        return network(training_batch(self.core, clips, self.vae, generator, self.chances), generator)

    def network(self, core: MotionDreamer) -> nn.Module:
        return core


Task = VAETask | StageTask


def vae_task(arguments: argparse.Namespace, machine: Machine) -> VAETask:
    """A VAE of the preset's size, or that of --start; beside it in --out, once, a random image tower, or that of
    --start."""
    preset, full = PRESETS[arguments.preset], {"dtype": torch.float32, "device": machine.device}
    if arguments.start:
        source = VAE.from_pretrained(Path(arguments.start), "vae", **full)
        core = VAE(source.config).to(machine.device)
        core.load_state_dict(source.state_dict())
    elif "vae" in preset:
        core = VAE(preset["vae"]).to(machine.device)
    else:
        raise ValueError(f"--preset {arguments.preset} has no VAE of its own: train that of another preset")
    folder = Path(arguments.out) / "image_encoder"
    if machine.rank == 0 and not (folder / "config.json").exists():
        if arguments.start:
            tower = ImageEncoder.from_pretrained(Path(arguments.start), "image_encoder", **full)
        else:
            tower = ImageEncoder(preset["image_encoder"])
        tower.save_pretrained(folder)
    return VAETask(core)


def stage_task(arguments: argparse.Namespace, machine: Machine, dataset: ClipDataset) -> StageTask:
    """A stage from SVD's weights (--init), from a model folder (--start) or from nothing, and its frozen encoders."""
    name, source = "stage1" if arguments.stage == "1" else "stage2", None
    place = "cpu" if arguments.shard else machine.device  # a GPU need not hold what is to be shared
    vae, image_encoder = frozen_encoders(arguments, machine)
    if arguments.start:
        full = torch.float32  # on disk, weights are often half precision
        source = MotionDreamer.from_pretrained(Path(arguments.start), name, full, place)
    config = stage_config(arguments, dataset, vae, source.config if source else None)
    dataset.check_size(config.vae_factor)
    if arguments.init:
        core = stage_class(config).from_svd(arguments.init, config, place)
    else:
        unet = source.unet.config if source else PRESETS[arguments.preset][name]
        core = stage_class(config)(config, unet).to(place)
    if source:
        copy_weights(core, source, arguments.start)
    token, context = image_encoder.config.projection_dim, core.unet.config.cross_attention_dim
    if token != context:
        raise ValueError(f"{arguments.out}: its image tower gives {token} numbers, the UNet takes {context}")
    core.unet.gradient_checkpointing = arguments.checkpointing
    return StageTask(name, core, vae, image_encoder, Chances(arguments.drop, arguments.unmark))


def stage_config(
    arguments: argparse.Namespace, dataset: ClipDataset | StageConfig, vae: VAE, started: StageConfig | None
) -> StageConfig:
    """The StageConfig of the command line, with sizes from data and VAE; with --start, `started` is what --set changes.

    Raises ValueError for an unknown --set, and where `started` is no such stage.
    """
    changes = changed_fields(arguments.set)
    if started:
        kind = "1" if started.predict != ("rgb",) else "2" if started.given else "one"
        if arguments.stage != kind:
            raise ValueError(f"--start {arguments.start}: what it holds is of --stage {kind}, not {arguments.stage}")
        if arguments.ablation != "motion_dreamer":
            raise ValueError(f"--ablation {arguments.ablation}: a stage of --start stays the row that it is")
        config, stack = started, started.vae_factor // vae.factor
    else:
        stage1, stage2 = ABLATIONS[arguments.ablation]
        config, stack = {"1": stage1, "2": stage2, "one": ONE_STAGE}[arguments.stage], 1
        if not arguments.init:
            # A network from nothing has not seen SVD's 700, and a small one needs speed: see `encode_video`.
            changes, stack = {"sigma_max": 80.0} | changes, PRESETS[arguments.preset]["stack"]
    sizes = {"frames": dataset.frames, "width": dataset.width, "height": dataset.height, "fps": dataset.fps}
    sizes |= {"latent_channels": vae.config.latent_channels * stack**2, "vae_factor": vae.factor * stack}
    return read_stage(asdict(config) | sizes | changes, StageConfig, SmallStageConfig)


def changed_fields(items: list[str]) -> dict[str, str | int | float | bool]:
    """NAME=VALUE of --set -> fields of StageConfig or SmallStageConfig. Raises ValueError for what is neither."""
    types, changes = {field.name: type(field.default) for field in fields(SmallStageConfig)}, {}
    for item in items:
        name, _, text = item.partition("=")
        if types.get(name) not in (str, int, float, bool):
            raise ValueError(f"--set {item}: StageConfig has no such field to set")
        try:
            changes[name] = {"true": True, "false": False}[text] if types[name] is bool else types[name](text)
        except (KeyError, ValueError):
            raise ValueError(f"--set {item}: {text!r} is not a {types[name].__name__}") from None
    return changes


def frozen_encoders(arguments: argparse.Namespace, machine: Machine) -> tuple[VAE, ImageEncoder]:
    """VAE and image tower, frozen: SVD's with --init, else those in the model folder, which `--stage vae` left there;
    where there are none, those of --start. Copies them to --out."""
    out, full = Path(arguments.out), {"dtype": torch.float32, "device": machine.device}
    there = (out / "vae" / "config.json").exists()  # the last file that is written of the two models
    source = arguments.init or (Path(arguments.start) if arguments.start and not there else out)
    vae = VAE.from_pretrained(source, "vae", **full).requires_grad_(False).eval()
    image_encoder = ImageEncoder.from_pretrained(source, "image_encoder", **full).requires_grad_(False).eval()
    if machine.world_size > 1:
        dist.barrier()  # all have looked into --out
    if machine.rank == 0 and source != out and not there:
        image_encoder.save_pretrained(out / "image_encoder")
        vae.save_pretrained(out / "vae")
    return vae, image_encoder


def copy_weights(model: nn.Module, source: nn.Module, folder: str) -> None:
    """Weights of one model into another of the same shape. Raises ValueError that names the folder they came from."""
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"--start {folder}: {str(error).splitlines()[1].strip()}") from None
