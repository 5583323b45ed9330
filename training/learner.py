"""What is being learned: a network, its moving average and its optimiser, on one process or shared by several.

Of several processes, each holds the whole network and all of AdamW's state (DistributedDataParallel), or, with --shard,
its rows of every tensor (FSDP2). No step needs the moving average: each process holds its rows of it either way, as a
DTensor, which knows the whole that they belong to.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from clips import ClipDataset
from svd import BLOCKS, VAE, without_effect
from training.checkpoint import load_checkpoint, save_checkpoint
from training.compiled import compile_forward
from training.processes import Machine, own_rows, together
from training.task import Task
from training.vae import scale_of

# What --train names, by the names of a stage's parameters: what SVD does not have, and what looks at several frames.
ADDED = ("flow_control.", "camera.", "unet.conv_in.", "unet.conv_out.")
OVER_TIME = {"temporal_res_block", "temporal_transformer_blocks", "time_mixer", "time_pos_embed"}


class MovingAverage:
    """The moving average of a network's trained parameters; what is not trained stays as it is and has no copy."""

    def __init__(self, core: nn.Module, skeleton: nn.Module, mesh: DeviceMesh | None) -> None:
        """skeleton: `core` without numbers, from before it was sharded; mesh: of several processes."""
        self.core, self.skeleton, self.mesh = core, skeleton, mesh
        trained = {name: value for name, value in core.named_parameters() if value.requires_grad}
        self.parts = {name: self.copied(value) for name, value in trained.items()}
        self.pairs: tuple[list[Tensor], list[Tensor]] | None = None  # averages and values of this process

    def copied(self, value: nn.Parameter) -> Tensor:
        rows = own_rows(value)[1].clone()
        if self.mesh is None:
            return rows
        whole = {"shape": value.shape, "stride": value.stride()}
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, **whole)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        if self.pairs is None:  # places that stay; to look them up takes as long as a step of a small model
            trained = {name: value for name, value in self.core.named_parameters() if value.requires_grad}
            self.pairs = tuple([own_rows(part[name])[1] for name in trained] for part in (self.parts, trained))
        torch._foreach_lerp_(*self.pairs, 1 - decay)

    @torch.no_grad()
    def model(self, wanted: bool = True) -> nn.Module | None:
        """The whole network with the averages; all processes must call it, those that do not want it get None. Nothing
        is copied that this process has whole: what is not trained is the network's own, and must not be changed."""
        values = {}
        for name, value in self.core.named_parameters():
            value = self.parts.get(name, value.detach())
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if wanted:
                values[name] = whole
        if not wanted:
            return None
        network = copy.deepcopy(self.skeleton)
        network.load_state_dict(values, assign=True)
        return network


@dataclass
class Learner:
    """The network in training, its moving average and its optimiser."""

    core: nn.Module  # what is saved
    model: nn.Module  # `core` with the loss as its forward, compiled and for several processes where that was asked for
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    step: int = 0
    clips: int = 0  # that it has seen, of all processes
    seconds: float = 0.0  # of its steps, also before it was resumed
    skipped: int = 0  # steps without a finite gradient
    failures: int = 0  # of these, the last ones in a row
    saved: int = 0  # step of the newest checkpoint

    def exchange_gradients(self, now: bool) -> None:
        """Whether the next backward pass ends with the mean of all processes' gradients. With --shard every one does:
        until then, each process would hold the gradients of all parameters."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = now

    def clip_gradients(self, largest: float) -> Tensor:
        """Scales the gradient down to this norm -> its norm before, that of all processes; a GPU may still compute."""
        norm = nn.utils.clip_grad_norm_(self.core.parameters(), largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; written to and read in place."""
        values, found = dict(self.core.named_parameters()), {}
        for name, average in self.average.parts.items():
            found |= {f"model.{name}": values[name].detach(), f"average.{name}": average}
            found |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[values[name]].items()}
        return found


# ------------------------------------------------------------------------------------------------------- from the start


def make_learner(arguments: argparse.Namespace, machine: Machine, task: Task) -> Learner:
    """AdamW's state is made at once, so that a checkpoint can be read into it. Raises ValueError for flags that do not
    fit together."""
    freeze(task.core, arguments.train)
    skeleton = without_numbers(task.core)
    several = machine.world_size > 1
    mesh = init_device_mesh(machine.device.split(":")[0], (machine.world_size,)) if several else None
    if arguments.shard:
        shard(task.core, mesh)
    trained = [value for value in task.core.parameters() if value.requires_grad]
    adamw = {"betas": (0.9, 0.99), "weight_decay": arguments.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained, arguments.lr, **adamw)
    for value in trained:
        moments = {name: torch.zeros_like(value.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[value] = {"step": torch.zeros((), device=value.device)} | moments
    average = MovingAverage(task.core, skeleton, mesh)
    return Learner(task.core, task.network(task.core), average, optimizer)


def freeze(core: nn.Module, train: str) -> None:
    """What has no effect gets no gradient; nor does what --train leaves out: "all", "temporal" (what is added to SVD,
    and all over time), "added"."""
    for value in without_effect(core):
        value.requires_grad_(False)
    for name, value in core.named_parameters() if train != "all" else ():
        over_time = train == "temporal" and not OVER_TIME.isdisjoint(name.split("."))
        value.requires_grad_(value.requires_grad and (name.startswith(ADDED) or over_time))


def without_numbers(core: nn.Module) -> nn.Module:
    """The network with parameters on the meta device, which take no memory."""
    empty = {id(value): nn.Parameter(torch.empty_like(value, device="meta"), False) for value in core.parameters()}
    return copy.deepcopy(core, empty)


def shard(core: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: each process keeps its part of every parameter, and of a block gets the others' just before it computes.

    A network on the CPU comes to the GPU block by block. Weights are sent in full precision, and autocast casts them as
    it does without FSDP2: the losses are the same.
    """
    # The losses are views, which nobody changes in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w*MotionDreamer\) returned a view")
    for module in core.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh)
    fully_shard(core, mesh=mesh)


# ---------------------------------------------------------------------------------------------------- keep it, go on


def resume(arguments: argparse.Namespace, machine: Machine, learner: Learner, folder: Path) -> dict:
    """Goes on from the newest whole checkpoint, if there is one -> the settings that make a run what it is; all others
    may change on the way."""
    names = ("stage", "ablation", "set", "init", "start", "preset", "frames", "train", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    told, damaged = load_checkpoint(folder, learner.tensors(), settings)
    if told:
        learner.step, learner.clips, learner.skipped = told["step"], told["clips"], told["skipped"]
        learner.seconds = told.get("seconds", 0.0)
        learner.saved = learner.step
    if arguments.decoder_only:
        keep_latents(arguments, learner, bool(told))
    if machine.rank == 0:
        for line in damaged:
            print(f"train.py: {line}; going on from the one before", file=sys.stderr)
        print(f"{folder}: " + (f"going on at step {learner.step}" if told else "starting"))
    return settings


def keep_latents(arguments: argparse.Namespace, learner: Learner, going_on: bool) -> None:
    """--decoder-only: what encodes from now on is the moving average, with its scale."""
    if not (going_on or arguments.start):
        folder = Path(arguments.out) / "training" / "vae"
        raise ValueError(f"{folder}: --decoder-only, but no VAE to go on with; --start names another folder")
    if going_on:
        learner.average.skeleton.scaling_factor = VAE.from_pretrained(Path(arguments.out), "vae").scaling_factor
    average = learner.average.model()
    for part in ("encoder", "quant_conv"):
        getattr(learner.core, part).load_state_dict(getattr(average, part).state_dict())
        getattr(learner.core, part).requires_grad_(False)


def wrap(arguments: argparse.Namespace, machine: Machine, learner: Learner) -> None:
    """Compiles the model and shares its gradients between processes, where that was asked for."""
    if arguments.compile:
        parts = (learner.core.encoder, learner.core.decoder) if arguments.stage == "vae" else (learner.core.unet,)
        for part in parts:
            compile_forward(part)
    if machine.world_size > 1 and not arguments.shard:
        devices = [machine.device] if machine.on_gpu else None
        # Gradients lie in the buckets in which they are exchanged, not beside them. (That of a 1x1 convolution comes in
        # another order of its numbers, and is copied.)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")
        learner.model = DistributedDataParallel(learner.model, device_ids=devices, gradient_as_bucket_view=True)


def save(
    arguments: argparse.Namespace, machine: Machine, task: Task, learner: Learner, settings: dict, dataset: ClipDataset
) -> None:
    """A checkpoint to go on from, if there is none of this step, and the moving average in the model folder. All
    processes must call it."""
    out = Path(arguments.out)
    if learner.step > learner.saved:
        told = {"step": learner.step, "clips": learner.clips, "skipped": learner.skipped, "settings": settings}
        if arguments.minutes:
            told["seconds"] = learner.seconds
        save_checkpoint(out / "training" / task.name, learner.tensors(), told, arguments.keep)
        learner.saved = learner.step
    network = learner.average.model(wanted=machine.rank == 0)
    with together():
        if network:
            if task.name == "vae" and not arguments.decoder_only:
                network.scaling_factor = scale_of(network, dataset, out / task.name)
            network.save_pretrained(out / task.name)
