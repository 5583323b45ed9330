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

import kernels.threads  # noqa: F401 (before torch)

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import metrics
from clips import ClipDataset, ResumableSampler
from motion_dreamer import ABLATIONS, stage_class
from sources import expand_home
from training.cache import CachedClips, TrainingClips
from training.checkpoint import seed_of
from training.held import free_memory, held_batches, hold
from training.learner import Learner, freeze, make_learner, resume, save, wrap
from training.log import Log, peak_memory
from training.plan import parts_without_weights, table
from training.presets import PRESETS
from training.processes import (
    Machine,
    StopSignal,
    check_shared,
    claim,
    end,
    from_all,
    leave_process_group,
    lost_another,
    mean_over_processes,
    start_process,
    together,
)
from training.recorded import Recorded
from training.samples import reproduce, sample_figures, write_samples
from training.task import Task, stage_config, stage_task, vae_task

# What training takes that the command line does not say: (of a small model, of SVD's weights, that is with --init).
# Weights that were learned once move slowly. The warm-up is five memories of AdamW's second moment (beta 0.99: 100
# steps): what is new and starts at zero finds its size before SVD's weights move at full rate.
RECIPE = {"lr": (5e-4, 1e-5), "warmup": (100, 500), "ema": (0.999, 0.9999)}
STAGES_ONLY = ("ablation", "set", "init", "train", "drop", "unmark", "no_cache", "checkpointing", "shard")
LEAST = {"frames": 1, "dry_run": 1, "steps": 1, "batch": 1, "accumulate": 1, "lr": 0, "warmup": 0, "weight_decay": 0}
LEAST |= {"seed": 0, "workers": 0, "save_every": 1, "keep": 1, "val_every": 1, "val_samples": 0, "sample_every": 0}
SHARES, ABOVE_0 = ("cooldown", "ema", "drop", "unmark"), ("minutes", "clip_grad")
IGNORED = {"vae": ("1, 2 and one, not of the VAE", STAGES_ONLY), "one": ("1 and 2, not of one", ("ablation",))}


def parse_arguments() -> argparse.Namespace:
    """Raises ValueError for a flag that would be ignored."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--stage", choices=("vae", "1", "2", "one"), required=True, help="one = One-stage* of Table 1")
    what.add_argument("--ablation", choices=list(ABLATIONS), default="motion_dreamer", help="row of Table 3")
    what.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of (Small)StageConfig")
    begin = what.add_mutually_exclusive_group()
    begin.add_argument("--init", metavar="REPO_OR_DIR", help="SVD's weights; without it, start from nothing")
    begin.add_argument("--start", metavar="DIR", help="begin with the stage that this model folder holds")
    parts = "temporal: what looks at several frames, and what is added to SVD; added: that alone"
    what.add_argument("--train", choices=("all", "temporal", "added"), default="all", help=f"{parts}; the rest stays")
    what.add_argument("--preset", choices=list(PRESETS), default="demo", help="size of a model from nothing")
    what.add_argument("--decoder-only", action="store_true", help="of the VAE: its latents stay as they are")
    where = parser.add_argument_group("data and output")
    where.add_argument("--data", required=True, metavar="DIR", help="clips to train on")
    where.add_argument("--val", metavar="DIR", help="clips for validation losses and figures in log.jsonl")
    where.add_argument("--out", required=True, metavar="DIR", help="model folder")
    where.add_argument("--frames", type=int, help="None: all frames of the first clip")
    dry = "print what a step takes of memory, alone and as one of N processes (8): no GPU, no weights"
    where.add_argument("--dry-run", type=int, nargs="?", const=8, metavar="N", help=dry)
    where.add_argument("--no-cache", action="store_true", help="encode clips in every step instead of once")
    how = parser.add_argument_group("optimisation")
    how.add_argument("--steps", type=int, default=10000, help="of the optimiser")
    how.add_argument("--minutes", type=float, help="of training, instead of --steps: learning falls with the clock")
    how.add_argument("--batch", type=int, default=8, help="clips a step and process, before accumulation")
    how.add_argument("--accumulate", type=int, default=1, help="batches whose gradients are averaged in a step")
    both = {name: f"None: {small:g}, with --init {svd:g}" for name, (small, svd) in RECIPE.items()}
    how.add_argument("--lr", type=float, help=f"learning rate; {both['lr']}")
    how.add_argument("--warmup", type=int, help=f"steps in which it rises from 0; {both['warmup']}")
    how.add_argument("--cooldown", type=float, default=0.2, help="last fraction of the steps in which it falls to 0")
    how.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    how.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradient")
    how.add_argument("--ema", type=float, help=f"decay of the moving average of the weights; {both['ema']}")
    how.add_argument("--drop", type=float, default=0.1, help="probability of leaving out the image, S_0, D_0, c, each")
    how.add_argument("--unmark", type=float, default=0.25, help="probability of showing only some objects marked")
    how.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    how.add_argument("--precision", choices=("fp32", "bf16"), help="None: bf16 on a GPU, fp32 on a CPU")
    how.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    how.add_argument(
        "--shard", action="store_true", help="of several processes, each keeps a part of weights and state"
    )
    how.add_argument("--compile", action="store_true", help="compile the denoiser: a minute or more, then faster steps")
    how.add_argument("--cuda-graph", action="store_true", help="record the step of a small model: launched at once")
    how.add_argument("--workers", type=int, default=0, help="processes that read clips")
    log = parser.add_argument_group("log and checkpoints")
    log.add_argument("--save-every", type=int, default=500, help="steps")
    log.add_argument("--keep", type=int, default=2, help="newest checkpoints that stay: 16 bytes a parameter")
    log.add_argument("--val-every", type=int, default=500, help="steps")
    log.add_argument("--val-samples", type=int, default=4, help="validation clips that are sampled and measured")
    log.add_argument("--sample-every", type=int, default=2000, help="steps; pictures of one clip; 0 = never")
    log.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = expand_home(parser.parse_args())
    check_numbers(arguments)
    others, names = IGNORED.get(arguments.stage, ("", ()))
    ignored = dict.fromkeys(names, f"of --stage {others}, where it would be ignored")
    if not arguments.val:
        ignored |= dict.fromkeys(("val_every", "val_samples"), "of --val, without which it would be ignored")
    if arguments.minutes is not None:
        ignored["steps"] = "with --minutes it would be ignored"
    if arguments.init or arguments.start:
        ignored["preset"] = "of a model from nothing; with --init or --start it would be ignored"
    for name, why in ignored.items():
        if getattr(arguments, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: {why}")
    return with_recipe(arguments)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number that has no meaning; None is whatever another flag says."""
    expected = {name: (least, math.inf, f"{least} at least") for name, least in LEAST.items()}
    expected |= {name: (0, math.nextafter(1, 2), "a share from 0 to 1") for name in SHARES}
    expected |= {name: (math.ulp(0), math.inf, "a number above 0") for name in ABOVE_0}
    expected["seed"] = (0, 2**63, "a whole number of 63 bits, 0 at least")
    for name, (least, limit, words) in expected.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < limit:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: expected {words}")


def with_recipe(arguments: argparse.Namespace) -> argparse.Namespace:
    """What the command line leaves open of `RECIPE`."""
    for name, (small, svd) in RECIPE.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, svd if arguments.init else small)
    return arguments


# ------------------------------------------------------------------------------------------------------------ one step


def batches_from(
    arguments: argparse.Namespace, machine: Machine, clips: torch.utils.data.Dataset, seen: int
) -> Iterator[dict[str, Tensor]]:
    """Batches without an end, in an order that is a function of the seed; all processes together have seen `seen`
    clips of it.

    On a GPU, clips with cached latents move there once the first step has shown what a step takes of memory, if half of
    what is left holds them all: reading files would take longer than a step of a small model.
    """
    start = seen // machine.world_size
    order = ResumableSampler(len(clips), arguments.seed, machine.rank, machine.world_size, start)
    loader = torch.utils.data.DataLoader(
        clips,
        arguments.batch,
        sampler=order,
        num_workers=arguments.workers,
        worker_init_fn=leave_process_group,
        persistent_workers=arguments.workers > 0,
    )
    held = None
    for count, batch in enumerate(loader, 1):
        batch = {name: value.to(machine.device, non_blocking=True) for name, value in batch.items()}
        yield batch
        if count == arguments.accumulate and machine.on_gpu and isinstance(clips, CachedClips):
            held = hold(clips, machine.device, free_memory(machine.device) // 2, arguments.workers)
            if held:
                break
    del loader  # and its workers
    order.start += arguments.accumulate * arguments.batch
    yield from held_batches(held, batch, order, arguments.batch)


def add_gradients(
    arguments: argparse.Namespace, machine: Machine, task: Task, learner: Learner, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Algorithm 1, lines 2 to 6, of a batch: conditions, masked instance flow, prediction, loss, and its gradient. ->
    Its share in the losses of the step."""
    with machine.autocast:
        losses = task.losses(learner.model, batch, machine.generator)
    (losses["loss"].mean() / arguments.accumulate).backward()
    return {name: value.detach().mean() / arguments.accumulate for name, value in losses.items()}


def take_step(
    arguments: argparse.Namespace,
    machine: Machine,
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    learner: Learner,
    batches: Iterator[dict[str, Tensor]],
) -> dict[str, float]:
    """Algorithm 1, one iteration; compute: `add_gradients` -> its losses (means over all clips of all processes), the
    gradient's norm and the learning rate."""
    sums: dict[str, Tensor] = {}
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(arguments, learner.step, share_done(arguments, learner))

    # Lines 2 to 6. The gradient is a mean over all batches, and over all processes with the last one.
    for micro in range(arguments.accumulate):
        machine.generator.manual_seed(seed_of(arguments.seed, machine.rank, learner.step, micro))
        learner.exchange_gradients(micro == arguments.accumulate - 1)
        for name, value in compute(next(batches)).items():
            sums[name] = sums.get(name, 0.0) + value

    # Line 7: the update, unless the gradient is not finite. A fused AdamW leaves it out by itself where found_inf is 1:
    # a GPU whose norm was read first would have nothing to do meanwhile. The norm is that of all processes: they skip
    # together.
    norm = learner.clip_gradients(arguments.clip_grad)
    learner.optimizer.found_inf = (~norm.isfinite()).float()
    learner.optimizer.step()
    record, norm = mean_over_processes(machine, sums), norm.item()
    if math.isfinite(norm):
        learner.average.update(min(arguments.ema, (1 + learner.step) / (10 + learner.step)))
        learner.failures = 0
    else:
        learner.skipped, learner.failures = learner.skipped + 1, learner.failures + 1
        if learner.failures == 50:
            with together():  # all processes come here: one says it
                raise ValueError(f"step {learner.step + 1}: 50 steps in a row without a finite gradient")
    learner.optimizer.zero_grad(set_to_none=True)
    learner.step, learner.clips = learner.step + 1, learner.clips + clips_a_step(arguments, machine)
    return record | {"grad_norm": norm, "lr": learner.optimizer.param_groups[0]["lr"], "skipped": learner.skipped}


def clips_a_step(arguments: argparse.Namespace, machine: Machine) -> int:
    return arguments.batch * arguments.accumulate * machine.world_size


def share_done(arguments: argparse.Namespace, learner: Learner) -> float:
    """Of the run: of its steps, or with --minutes of its time, which former parts of a resumed run count to."""
    if arguments.minutes:
        return min(1.0, learner.seconds / (60 * arguments.minutes))
    return learner.step / arguments.steps


def learning_rate(arguments: argparse.Namespace, step: int, done: float) -> float:
    """Linear warm-up, constant, linear to 0 over the last `--cooldown` of the run, of which `done` is done."""
    left = (1 - done) / max(arguments.cooldown, 1e-9 if arguments.minutes else 1 / arguments.steps)
    return arguments.lr * min(1, (step + 1) / max(1, arguments.warmup), left)


# -------------------------------------------------------------------------------------------------------- looking at it


@torch.no_grad()
def validate(
    arguments: argparse.Namespace, machine: Machine, task: Task, average: nn.Module, clips: torch.utils.data.Dataset
) -> dict[str, float]:
    """Of the moving average: losses of up to 64 validation clips with the same draws every time, and figures of what it
    makes of the first --val-samples. The processes share the clips; the result does not depend on how many they are."""
    network, losses, rows = task.network(average), {}, {}
    for i in range(machine.rank, min(64, len(clips)), machine.world_size):
        batch = torch.utils.data.default_collate([clips[(i, 0)]])
        batch = {name: value.to(machine.device) for name, value in batch.items()}
        with machine.autocast:
            found = task.losses(network, batch, torch.Generator().manual_seed(i))
        losses[i] = {f"val_{key}": value.mean().item() for key, value in found.items()}
    whole = clips.clips if isinstance(clips, TrainingClips) else clips
    for i in range(machine.rank, min(arguments.val_samples, len(whole)), machine.world_size):
        clip = whole[(i, 0)]
        rows[i] = sample_figures(sampled(task, average, clip), clip)
    losses, rows = in_order(losses), in_order(rows)
    means = {key: sum(found[key] for found in losses) / len(losses) for key in losses[0]}
    figures = {f"val_{key}": figure["value"] for key, figure in metrics.summarise(rows).items()} if rows else {}
    return means | {key: value for key, value in figures.items() if math.isfinite(value)}  # JSON has no NaN


def in_order(found: dict[int, dict]) -> list[dict]:
    """What each process has found of some clips, by their numbers -> that of all clips."""
    everything = {i: value for part in from_all(found) for i, value in part.items()}
    return [everything[i] for i in sorted(everything)]


def sampled(task: Task, average: nn.Module, clip: metrics.Maps) -> metrics.Maps:
    """What the moving average makes of a clip, on the CPU."""
    made = reproduce(average, average if task.name == "vae" else task.vae, task.image_encoder, clip)
    return {name: value.cpu() for name, value in made.items()}


# ----------------------------------------------------------------------------------------------------------------- main


def dry_run(arguments: argparse.Namespace) -> None:
    """Prints what a step of this command takes of memory. Where --data has no clips, --set has their sizes."""
    if arguments.stage == "vae":
        raise ValueError("--dry-run: of --stage 1, 2 and one, not of the VAE")
    clips, vae, image_encoder, started, unet = parts_without_weights(arguments)
    config = stage_config(arguments, clips, vae, started)
    with torch.device("meta"):
        core = stage_class(config)(config, unet)
    freeze(core, arguments.train)
    print(table(core, (vae, image_encoder), arguments))


def check_flags(arguments: argparse.Namespace, machine: Machine) -> None:
    """Raises ValueError for flags that do not fit together."""
    if arguments.shard and machine.world_size == 1:
        raise ValueError("--shard: one process has nobody to share with; torchrun starts several")
    if arguments.cuda_graph and not (machine.on_gpu and machine.world_size == arguments.accumulate == 1):
        raise ValueError("--cuda-graph: of one process on a GPU, without --accumulate")
    if arguments.cuda_graph and (arguments.checkpointing or arguments.stage == "vae" or arguments.no_cache):
        raise ValueError("--cuda-graph: of a stage with cached latents, without --checkpointing")
    if arguments.minutes is not None and machine.world_size > 1:
        raise ValueError(f"--minutes {arguments.minutes:g}: of one process, not of {machine.world_size}")
    if arguments.decoder_only and arguments.stage != "vae":
        raise ValueError(f"--decoder-only: of --stage vae, not of {arguments.stage}")


def train(arguments: argparse.Namespace) -> None:
    # Set up: this process, the clips, what is trained, and where a former run of the same command ended.
    machine, out = start_process(arguments.seed, arguments.precision), Path(arguments.out)
    check_flags(arguments, machine)
    dataset = ClipDataset(arguments.data, arguments.frames)
    validation = ClipDataset(arguments.val, dataset.frames) if arguments.val else None
    if arguments.cuda_graph and not dataset.whole:  # a window of a longer clip is encoded in every step
        raise ValueError(f"--cuda-graph: of clips with {dataset.frames} frames; {arguments.data} has longer ones")
    check_shared(out, "--out")
    task = vae_task(arguments, machine) if arguments.stage == "vae" else stage_task(arguments, machine, dataset)
    folder = out / "training" / task.name
    claimed = claim(folder)
    learner = make_learner(arguments, machine, task)
    settings = resume(arguments, machine, learner, folder)
    wrap(arguments, machine, learner)

    # What the frozen encoders make of the clips is computed once, before the first step.
    clips = task.readable(dataset, arguments, machine)
    validation_clips = task.readable(validation, arguments, machine) if validation else None
    batches = batches_from(arguments, machine, clips, learner.clips)
    compute = partial(add_gradients, arguments, machine, task, learner)
    if arguments.cuda_graph:
        compute = Recorded(compute, learner.core.parameters(), machine.generator)

    hidden, total = machine.rank > 0 or arguments.quiet, None if arguments.minutes else arguments.steps
    bar = tqdm(total=total, initial=learner.step, desc=task.name, disable=hidden)
    with StopSignal(machine) as stop, Log(folder, learner.step) if machine.rank == 0 else nullcontext() as log:
        # Algorithm 1. The processes measure and save together; process 0 writes the log and the pictures.
        while share_done(arguments, learner) < 1 and not stop.came():
            started = time.perf_counter()
            record = take_step(arguments, machine, compute, learner, batches)
            trained = time.perf_counter()
            learner.seconds += trained - started
            step, last = learner.step, share_done(arguments, learner) == 1
            if validation and (step % arguments.val_every == 0 or last):
                record |= validate(arguments, machine, task, learner.average.model(), validation_clips)
            if log:
                record |= {"seconds": time.perf_counter() - started, "memory": peak_memory(machine.on_gpu)}
                log.write({"step": step} | record)
                bar.set_postfix(loss=f"{record['loss']:.4f}")
                bar.update()
            if step % arguments.save_every == 0 and not last:
                save(arguments, machine, task, learner, settings, dataset)
            if arguments.sample_every and step % arguments.sample_every == 0:
                average = learner.average.model(wanted=machine.rank == 0)
                if average:
                    clip = (validation or dataset)[(0, 0)]
                    write_samples(folder / "samples" / f"step_{step:08d}.png", sampled(task, average, clip), clip)
            learner.seconds += time.perf_counter() - trained

        # What was learned is saved, whether the run is complete or was told to stop.
        save(arguments, machine, task, learner, settings, dataset)
    bar.close()
    if claimed:
        claimed.close()
    if machine.rank == 0:
        more = "; run the same command to go on" if share_done(arguments, learner) < 1 else ""
        of = f"steps in {learner.seconds / 60:.1f} minutes" if arguments.minutes else f"of {arguments.steps} steps"
        print(f"{out / task.name}: {learner.step} {of}{more}")
    if machine.world_size > 1:
        end(0)


def main() -> None:
    try:
        arguments = parse_arguments()
        (train if arguments.dry_run is None else dry_run)(arguments)
        return
    except (ValueError, OSError, FloatingPointError) as error:
        line = str(error).strip().splitlines()[-1]  # the loader's workers send a whole traceback
        print(f"train.py: {line.removeprefix('ValueError: ')}", file=sys.stderr)
    except SystemExit as stop:  # another process has said it, or argparse, or it is no error: --help
        if not stop.code:
            raise
    except torch.OutOfMemoryError:
        told = "the GPU's memory does not suffice: a smaller --batch, --checkpointing or --shard; see --dry-run"
        print(f"train.py: {told}", file=sys.stderr)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        print(f"train.py: process {dist.get_rank()}: lost another process, which may have said why", file=sys.stderr)
    except KeyboardInterrupt:  # before the first step: later ones end with a save
        end(130)
    end(2)


if __name__ == "__main__":
    main()
