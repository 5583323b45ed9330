"""Trains the VAE (tiny models only), Stage I or Stage II (Algorithm 1) in one flat script.

    python train.py --stage vae --preset tiny --data data --out runs/tiny        # a small VAE from nothing
    python train.py --stage 1 --preset tiny --data data --out runs/tiny          # Stage I beside it
    python train.py --stage 2 --preset tiny --data data --out runs/tiny          # Stage II
    torchrun --nproc_per_node 8 train.py --stage 1 --data data --init REPO_OR_DIR --out runs/svd    # from SVD's weights

`--out` is a model folder: it receives vae/, image_encoder/, stage1/ and stage2/ (weights: moving average), which is
all that sample.py needs, and training/ with checkpoints and logs. To resume, run the same command again: every
random number and the order of the data are functions of (seed, rank, step), so a killed run loses nothing but the
steps since the last save.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import metrics
from clips.clip import ClipDataset, ResumableSampler
from instance_flow import instance_flow, sparse_flow
from motion_dreamer import (
    ABLATIONS,
    ONE_STAGE,
    Motion,
    MotionDreamer,
    StageConfig,
    dream,
    encode_clips,
    moves_at_once,
    render,
    round_trip,
    training_batch,
)
from svd import VAE, ImageEncoder, ImageEncoderConfig, UNetConfig, VAEConfig
from training.cache import EncodedClips
from training.checkpoint import load_checkpoint, save_checkpoint, seed_of, trim_log
from training.vae import VAETraining, measure_scale


def small_unet(widths: tuple[int, ...], heads: int, context: int, ids: int) -> UNetConfig:
    """Three levels, of which the finest has no attention: there it would double the time of a step."""
    return UNetConfig(
        block_out_channels=widths, layers_per_block=1, attention=(False, True, True), num_attention_heads=(heads,) * 3,
        cross_attention_dim=context, addition_time_embed_dim=ids, channels_per_group=16,
    )  # fmt: skip


# Sizes of models that start from nothing. SVD itself comes with --init.
PRESETS = {
    "tiny": {  # for tests: seconds a stage
        "vae": VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, channels_per_group=8),
        "image_encoder": ImageEncoderConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16, projection_dim=64,
        ),
        "stage1": small_unet((32, 64, 64), 2, 64, 32),
        "stage2": small_unet((32, 64, 64), 2, 64, 32),
        "patch": 2,
    },
    "demo": {  # the model in demo/: hours on two CPU cores
        "vae": VAEConfig(
            block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, channels_per_group=16
        ),
        "image_encoder": ImageEncoderConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=16, projection_dim=128,
        ),
        "stage1": small_unet((112, 96, 144), 4, 128, 64),  # the first level takes 192 channels a cell, gives 96
        "stage2": small_unet((96, 64, 48), 4, 128, 64),  # painting is local: wide where the cells are fine
        "patch": 2,
    },
    "table": {  # the rows of evaluate.py's tables, which share the demo model's VAE: minutes a stage
        "stage1": small_unet((64, 48, 48), 2, 128, 64),
        "stage2": small_unet((64, 48, 48), 2, 128, 64),
        "patch": 2,
    },
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_argument_group("what is trained")
    what.add_argument("--stage", choices=("vae", "1", "2", "one"), required=True, help="one = One-stage* of Table 1")
    what.add_argument("--ablation", choices=list(ABLATIONS), default="motion_dreamer", help="row of Table 3")
    what.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of StageConfig")
    what.add_argument("--init", metavar="REPO_OR_DIR", help="SVD's weights; without it, start from nothing")
    what.add_argument("--start", metavar="DIR", help="begin with the weights that this model folder has for the stage")
    what.add_argument("--preset", choices=list(PRESETS), default="demo", help="size of a model from nothing")
    where = parser.add_argument_group("data and output")
    where.add_argument("--data", required=True, metavar="DIR")
    where.add_argument("--val", metavar="DIR", help="clips for validation losses and figures in log.jsonl")
    where.add_argument("--out", required=True, metavar="DIR", help="model folder")
    where.add_argument("--frames", type=int, help="default: all frames of the first clip")
    where.add_argument("--no-cache", action="store_true", help="encode clips in every step instead of once")
    what.add_argument("--decoder-only", action="store_true", help="of the VAE: its latents stay as they are")
    how = parser.add_argument_group("optimisation")
    how.add_argument("--steps", type=int, default=10000)
    how.add_argument("--batch", type=int, default=8, help="clips a step and process, before accumulation")
    how.add_argument("--accumulate", type=int, default=1)
    how.add_argument("--lr", type=float, default=5e-4)
    how.add_argument("--warmup", type=int, default=100, help="steps")
    how.add_argument("--cooldown", type=float, default=0.2, help="last fraction of the steps in which lr falls to 0")
    how.add_argument("--weight-decay", type=float, default=0.01)
    how.add_argument("--clip-grad", type=float, default=1.0)
    how.add_argument("--ema", type=float, default=0.999)
    how.add_argument("--drop", type=float, default=0.1, help="probability of dropping the image, S_0, D_0")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    how.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    how.add_argument("--compile", action="store_true")
    how.add_argument("--workers", type=int, default=0)
    log = parser.add_argument_group("log and checkpoints")
    log.add_argument("--save-every", type=int, default=500)
    log.add_argument("--keep", type=int, default=1, help="newest checkpoints that stay")
    log.add_argument("--val-every", type=int, default=500)
    log.add_argument("--val-samples", type=int, default=4, help="validation clips that are sampled and measured")
    log.add_argument("--sample-every", type=int, default=2000, help="pictures of one clip; 0 = never")
    log.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------ models and data


def stage_config(arguments: argparse.Namespace, dataset: ClipDataset, vae: VAE) -> StageConfig:
    """The StageConfig of the command line, with sizes from data and VAE. Raises ValueError for an unknown --set."""
    stage1, stage2 = ABLATIONS[arguments.ablation]
    config = {"1": stage1, "2": stage2, "one": ONE_STAGE}[arguments.stage]
    types, changes = {field.name: type(getattr(config, field.name)) for field in fields(config)}, {}
    for item in arguments.set:
        name, _, text = item.partition("=")
        if types.get(name) not in (str, int, float, bool):
            raise ValueError(f"--set {item}: StageConfig has no such field to set")
        try:
            changes[name] = {"true": True, "false": False}[text] if types[name] is bool else types[name](text)
        except (KeyError, ValueError):
            raise ValueError(f"--set {item}: {text!r} is not a {types[name].__name__}") from None
    if not arguments.init:
        # Trained from nothing, a network has not seen SVD's 700; what small models need for their speed is theirs.
        changes = {"sigma_max": 80.0, "patch": PRESETS[arguments.preset]["patch"]} | changes
    sizes = {"frames": dataset.frames, "width": dataset.width, "height": dataset.height}
    return replace(config, latent_channels=vae.config.latent_channels, vae_factor=vae.factor, **sizes, **changes)


def frozen_encoders(arguments: argparse.Namespace, out: Path, device: str) -> tuple[VAE, ImageEncoder]:
    """VAE and image tower, frozen: SVD's with --init, else those that `--stage vae` left in the model folder."""
    source = arguments.init or out
    full = {"dtype": torch.float32, "device": device}  # downloads are often half precision
    vae = VAE.from_pretrained(source, "vae", **full).requires_grad_(False).eval()
    image_encoder = ImageEncoder.from_pretrained(source, "image_encoder", **full).requires_grad_(False).eval()
    return vae, image_encoder


def copy_weights(model: nn.Module, source: nn.Module, folder: str) -> None:
    """Weights of one model into another of the same shape. Raises ValueError that names the folder they came from."""
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"--start {folder}: {str(error).splitlines()[1].strip()}") from None


# ---------------------------------------------------------------------------------------------- samples while it trains


@torch.no_grad()
def reproduce(
    trained: VAE | MotionDreamer, vae: VAE, image_encoder: ImageEncoder | None, clip: dict[str, Tensor]
) -> metrics.Maps:
    """What a model makes of a clip [T, ...], by modality, in 10 sampling steps.

    Stage I is told the arrows of what moves at once, Stage II the true motion; a VAE encodes and decodes.
    """
    clip = {name: value[None].to(next(vae.parameters()).device) for name, value in clip.items()}
    first = {"rgb": None, "flow": None, "segmentation": clip["segmentation"][:, 0], "depth": clip["depth"][:, 0]}
    if isinstance(trained, VAE):
        made = {name: round_trip(vae, name, clip[name], first[name]) for name in first}
    else:
        maps, config = (clip["flow"], clip["segmentation"]), trained.config
        if config.control == "sparse_flow":
            F = sparse_flow(*maps, points=8, generator=torch.Generator().manual_seed(0))
        else:
            F = instance_flow(*maps, config.reduce)
        F = F * moves_at_once(instance_flow(*maps, reduce="start"))
        stages = (None, trained) if trained.config.predict == ("rgb",) else (trained, None)
        motion, video = dream(
            *stages, vae, image_encoder, clip["rgb"][:, 0], first["segmentation"], first["depth"], F, clip["camera"],
            frames=clip["rgb"].shape[1], steps=10, generator=torch.Generator().manual_seed(0),
            motion=None if stages[0] else Motion(clip["flow"], clip["segmentation"], clip["depth"]),
        )  # fmt: skip
        made = {"rgb": video} if video is not None else vars(motion)
    return {name: value[0] for name, value in made.items() if value is not None}


def sample_figures(made: metrics.Maps, clip: metrics.Maps) -> dict[str, metrics.Sums]:
    """The measures of evaluate.py that need no more than a clip: flow error, mask IoU, depth error, PSNR."""
    figures, ids = {}, clip["segmentation"]
    if "flow" in made:
        figures |= metrics.flow_error(made["flow"], clip["flow"])
    if "segmentation" in made:
        overlap = metrics.id_overlap(made["segmentation"], ids)
        figures |= {name: overlap[name] for name in ("ids_miou", "iou_last", "silhouette_last")}
    if "depth" in made:
        figures |= metrics.depth_error(made["depth"], clip["depth"], ids)
    if "rgb" in made:
        figures["psnr"] = metrics.mean_of(metrics.psnr(made["rgb"], clip["rgb"]))
    return figures


def write_samples(path: Path, made: metrics.Maps, clip: metrics.Maps) -> None:
    """A picture with two rows for every modality that was made, truth above sample, six frames of one clip."""
    rows, shown = [], np.linspace(0, len(clip["rgb"]) - 1, 6).round().astype(int)
    for name, value in made.items():
        first = clip[name][:1] if name in ("segmentation", "depth") else None
        for maps in (clip[name].to(value.device), value):
            picture = render(name, maps[None], first)[0]
            rows.append(rearrange(picture[shown], "t c h w -> c h (t w)"))
    pixels = ((torch.cat(rows, dim=1).permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averages, values = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)


def learning_rate(arguments: argparse.Namespace, step: int) -> float:
    """Linear warm-up, constant, linear to 0 over the last `--cooldown` of the steps."""
    left = (arguments.steps - step) / max(1, arguments.cooldown * arguments.steps)
    return arguments.lr * min(1, (step + 1) / max(1, arguments.warmup), left)


# ----------------------------------------------------------------------------------------------------------------- main


def train(arguments: argparse.Namespace) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(device)
    bf16 = (arguments.precision or ("bf16" if cuda else "fp32")) == "bf16"
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)
    full = {"dtype": torch.float32, "device": device}  # weights on disk are often half precision
    torch.manual_seed(arguments.seed)  # the initial weights

    out, is_vae = Path(arguments.out), arguments.stage == "vae"
    name = {"vae": "vae", "1": "stage1", "2": "stage2", "one": "stage2"}[arguments.stage]
    folder = out / "training" / name
    dataset = ClipDataset(arguments.data, arguments.frames)
    validation = ClipDataset(arguments.val, dataset.frames) if arguments.val else None

    # The model. `core` is what is saved, `model` has the loss as its forward.
    if is_vae:
        if "vae" not in PRESETS[arguments.preset]:
            raise ValueError(f"--preset {arguments.preset} has no VAE of its own: train that of another preset")
        core = VAE(PRESETS[arguments.preset]["vae"]).to(device)
        if arguments.start:
            copy_weights(core, VAE.from_pretrained(arguments.start, "vae", **full), arguments.start)
        model, vae, image_encoder = VAETraining(core), None, None

        def cached(clips: ClipDataset) -> torch.utils.data.Dataset:
            return clips

        if rank == 0 and not (out / "image_encoder").exists():
            tower = ImageEncoder(PRESETS[arguments.preset]["image_encoder"])
            if arguments.start:
                tower = ImageEncoder.from_pretrained(arguments.start, "image_encoder", **full)
            tower.save_pretrained(out / "image_encoder")
    else:
        vae, image_encoder = frozen_encoders(arguments, out, device)
        config = stage_config(arguments, dataset, vae)
        if dataset.width % config.cell or dataset.height % config.cell:
            size = f"{dataset.width}x{dataset.height}"
            raise ValueError(f"{arguments.data}: clips are {size}, not a multiple of {config.cell}")
        if arguments.init:
            model = core = MotionDreamer.from_svd(arguments.init, config, device)
            if rank == 0 and not (out / "vae").exists():
                vae.save_pretrained(out / "vae")
                image_encoder.save_pretrained(out / "image_encoder")
        else:
            model = core = MotionDreamer(config, PRESETS[arguments.preset][name]).to(device)
            if arguments.start:
                copy_weights(core, MotionDreamer.from_pretrained(arguments.start, name, **full), arguments.start)
        token, context = image_encoder.config.projection_dim, core.unet.config.cross_attention_dim
        if token != context:
            raise ValueError(
                f"{out}: its image tower gives {token} numbers, --preset {arguments.preset} takes {context}"
            )
        core.unet.gradient_checkpointing = arguments.checkpointing

        def cached(clips: ClipDataset) -> torch.utils.data.Dataset:
            if arguments.no_cache or not clips.whole:  # the window of a longer clip changes with every draw
                return clips
            return EncodedClips(clips, vae, image_encoder, rank, world_size)

    parameters = list(core.parameters())
    ema = copy.deepcopy(core).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        parameters, arguments.lr, betas=(0.9, 0.99), weight_decay=arguments.weight_decay, fused=True
    )

    # Resume. These settings make the run what it is; the others may change on the way.
    names = ("stage", "ablation", "set", "init", "start", "preset", "frames", "batch", "accumulate", "seed")
    settings = {name: getattr(arguments, name) for name in names} | {"processes": world_size}
    step, skipped = 0, 0
    state = load_checkpoint(folder, device, settings)
    if state:
        core.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, skipped = state["step"], state["skipped"]
    if is_vae and arguments.decoder_only:  # what encodes from now on is the moving average
        ema.scaling_factor = VAE.from_pretrained(out, "vae").scaling_factor
        for part in ("encoder", "quant_conv"):
            getattr(core, part).load_state_dict(getattr(ema, part).state_dict())
            getattr(core, part).requires_grad_(False)
    if rank == 0:
        trim_log(folder / "log.jsonl", step)
        print(f"{folder}: " + (f"going on at step {step}" if state else "starting"))
    if arguments.compile:
        model = torch.compile(model, dynamic=False)  # every batch has the same sizes
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device] if cuda else None, find_unused_parameters=True)

    encoded, encoded_val = cached(dataset), cached(validation) if validation else None
    sampler = ResumableSampler(
        len(dataset), arguments.seed, rank, world_size, start=step * arguments.accumulate * arguments.batch
    )
    loader = iter(
        torch.utils.data.DataLoader(
            encoded,
            arguments.batch,
            sampler=sampler,
            num_workers=arguments.workers,
            worker_init_fn=leave_process_group,
            persistent_workers=arguments.workers > 0,
        )
    )

    def losses_of(network: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with autocast:
            if is_vae:
                return network(batch, generator)
            if "token" not in batch:
                batch = encode_clips(batch, vae, image_encoder)
            return network(training_batch(config, batch, vae, generator, arguments.drop), generator)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        network, sums = (VAETraining(ema) if is_vae else ema), {}
        for i in range(min(64, len(encoded_val))):
            batch = torch.utils.data.default_collate([encoded_val[(i, 0)]])
            for key, value in losses_of(network, batch, torch.Generator().manual_seed(i)).items():
                sums[key] = sums.get(key, 0.0) + value.mean().item()
        found = {f"val_{key}": value / min(64, len(encoded_val)) for key, value in sums.items()}
        clips = [validation[(i, 0)] for i in range(min(arguments.val_samples, len(validation)))]
        rows = [sample_figures(sampled(clip), clip) for clip in clips]
        figures = {f"val_{key}": figure["value"] for key, figure in metrics.summarise(rows).items()} if rows else {}
        return found | {key: value for key, value in figures.items() if math.isfinite(value)}  # JSON has no NaN

    def sampled(clip: metrics.Maps) -> metrics.Maps:
        made = reproduce(ema, ema if is_vae else vae, image_encoder, clip)
        return {name: value.cpu() for name, value in made.items()}

    def save() -> None:
        if rank > 0:
            return
        state = {"model": core.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "skipped": skipped, "settings": settings}
        save_checkpoint(folder, step, state, arguments.keep)
        if is_vae and not arguments.decoder_only:
            ema.scaling_factor = measure_scale(ema, dataset)
        ema.save_pretrained(out / name)

    stop, failures = [], 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda *_: stop.append(True))

    def stopping() -> bool:
        """Whether any process was told to stop: they stop at the same step."""
        told = torch.tensor(float(bool(stop)), device=device)
        if world_size > 1:
            dist.all_reduce(told)
        return told.item() > 0

    # The loop (Algorithm 1).
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.jsonl", "a", buffering=1) if rank == 0 else None  # noqa: SIM115 (open until the end)
    bar = tqdm(total=arguments.steps, initial=step, desc=name, disable=rank > 0 or arguments.quiet)
    while step < arguments.steps and not stopping():
        started, sums = time.perf_counter(), {}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments, step)
        for micro in range(arguments.accumulate):
            generator = torch.Generator().manual_seed(seed_of(arguments.seed, rank, step, micro))
            if world_size > 1:
                model.require_backward_grad_sync = micro == arguments.accumulate - 1
            losses = losses_of(model, next(loader), generator)
            (losses["loss"].mean() / arguments.accumulate).backward()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.detach().mean().item() / arguments.accumulate
        norm = nn.utils.clip_grad_norm_(parameters, arguments.clip_grad).item()
        if math.isfinite(norm):
            optimizer.step()
            update_ema(ema, core, min(arguments.ema, (1 + step) / (10 + step)))
            failures = 0
        else:  # the norm is that of all processes: they skip together
            skipped, failures = skipped + 1, failures + 1
            if failures == 50:
                raise ValueError(f"step {step + 1}: 50 steps in a row without a finite gradient")
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if log:
            lr = optimizer.param_groups[0]["lr"]
            record = {"step": step, **sums, "grad_norm": norm, "lr": lr, "skipped": skipped}
            if encoded_val is not None and (step % arguments.val_every == 0 or step == arguments.steps):
                record |= validate()
            record |= {"seconds": time.perf_counter() - started, "memory": peak_memory(cuda)}
            log.write(json.dumps(record) + "\n")
            bar.set_postfix(loss=f"{sums['loss']:.4f}")
            bar.update()
        if step % arguments.save_every == 0:
            save()
        if arguments.sample_every and step % arguments.sample_every == 0 and rank == 0:
            clip = (validation or dataset)[(0, 0)]
            write_samples(folder / "samples" / f"step_{step:08d}.png", sampled(clip), clip)
    if step % arguments.save_every:
        save()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        print(f"{out / name}: {step} of {arguments.steps} steps" + ("; run the same command to go on" if stop else ""))


def leave_process_group(worker: int) -> None:
    """For the loader's workers: what Ctrl-C sends to all processes of a terminal must not end them before the step that
    the main process still does. (Were they to ignore it, they would also ignore their end.)"""
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def peak_memory(cuda: bool) -> int:
    """Bytes: of the GPU, or of the process."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where only GPUs are supported

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    arguments = parse_arguments()
    try:
        train(arguments)
    except (ValueError, FileNotFoundError) as error:
        line = str(error).strip().splitlines()[-1]  # the loader's workers send a whole traceback
        print(f"train.py: {line.removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
