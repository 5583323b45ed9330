"""What a training step of a stage takes of memory, without a GPU, weights or clips: `train.py --dry-run`.

The step runs on the meta device, whose tensors have sizes but no numbers: `Autocast` computes in the precisions of a
GPU, `Alive` adds up the bytes of all tensors that live at the same time. It cannot know the workspaces of convolutions,
the gaps between tensors or what CUDA itself takes: an estimate. Group normalisation and SiLU count as torch does them,
in fp32 and one after the other; where kernels/group_norm.py does both at once, a step takes less.

    plan = plan_step(stage, batch_of_sizes(stage, 1), bf16=True)    # stage: a MotionDreamer on the meta device
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clips import ClipDataset
from motion_dreamer import Batch, Condition, MotionDreamer, StageConfig, build
from sources import read_config
from svd import BLOCKS, VAE, ImageEncoder, ImageEncoderConfig, UNetConfig, VAEConfig
from training.presets import PRESETS

ATTENTION = nnf.scaled_dot_product_attention
HALF = (nnf.conv2d, nnf.linear, torch.bmm, ATTENTION)  # of what the networks call, what a GPU computes in bf16 ...
FULL = (nnf.group_norm, nnf.layer_norm, Tensor.softmax)  # ... and what in fp32


class Autocast(TorchFunctionMode):
    """What torch.autocast does on a GPU, for the meta device, which has none. Attention is the fused one: it keeps no
    scores."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16, self.weights = bf16, {}  # weights that were cast stay until the forward pass has ended

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        if self.bf16 and func in HALF:
            args = tuple(self.half(value) if isinstance(value, Tensor) else value for value in args)
        elif self.bf16 and func in FULL:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        if func is ATTENTION:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))

    def half(self, value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            return value.bfloat16()
        if value not in self.weights:
            self.weights[value] = value.bfloat16()
        return self.weights[value]


class Alive(TorchDispatchMode):
    """Bytes of the tensors on a device that operations have made and that still live: `now`, and at most so far.

    What is there before (`known`) does not count."""

    def __init__(self, device: str, known: list[Tensor]) -> None:
        super().__init__()
        self.device, self.now, self.most = device, 0, 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        """A storage, once however many tensors share it, until the last of them is gone."""
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.now -= size


@dataclass(frozen=True)
class Plan:
    """Bytes; all but activations in fp32."""

    weights: int
    gradients: int  # like AdamW's moments and the moving average: of what is trained
    optimizer: int  # AdamW's two moments
    ema: int
    forward: int  # activations at the end of the forward pass
    step: int  # activations and gradients together, at the fullest moment: the former go while the latter come

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.ema + self.step


def plan_step(stage: MotionDreamer, batch: Batch, bf16: bool, accumulate: int = 1) -> Plan:
    """The forward and the backward pass of the last batch of a step of a stage on the meta device."""
    weights, inputs = list(stage.parameters()), [batch.x0, batch.M, *vars(batch.condition).values()]
    with Alive("meta", weights + inputs) as alive, Autocast(bf16) as autocast:
        for value in weights if accumulate > 1 else ():  # the gradients of the batches before are there all the time
            value.grad = torch.empty_like(value) if value.requires_grad else None
        held = alive.now
        loss = stage.loss(batch)["loss"].mean()
        forward = alive.now - held
        autocast.weights.clear()
        # torch.autograd.backward would leave `Autocast`, but what is recomputed needs it: so its engine, directly.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        del loss
    stage.zero_grad()
    count, trained = (sum(w.numel() for w in weights if w.requires_grad or every) for every in (True, False))
    return Plan(4 * count, 4 * trained, 8 * trained, 4 * trained, forward, alive.most)


def largest_blocks(stage: MotionDreamer) -> tuple[int, int]:
    """Bytes of the largest block that --shard gathers at once, and of what lies in none, in fp32."""
    blocks = [module for module in stage.modules() if isinstance(module, BLOCKS)]
    sizes = [4 * sum(value.numel() for value in block.parameters()) for block in blocks]
    return max(sizes), 4 * sum(value.numel() for value in stage.parameters()) - sum(sizes)


def each_of(count: int, plan: Plan, held: Plan, blocks: tuple[int, int], accumulate: int) -> tuple[int, int]:
    """What each of `count` processes takes at most, without the encoders: as it is, and with --shard. held: the same
    plan with gradients that are there all the time; blocks: `largest_blocks`.

    DistributedDataParallel's buckets, in which gradients lie, are always there; those of `accumulate` batches gather
    beside them. --shard holds two blocks whole, gradients of one, and the same once more to exchange them; what lies in
    no block stays whole to the end of the backward pass, and so do its gradients.
    """
    block, rest = blocks
    whole = plan.weights + plan.optimizer + plan.ema // count + held.step + (accumulate > 1) * plan.gradients
    shared = (plan.weights + plan.optimizer + plan.ema + plan.gradients) // count
    return whole, shared + held.step - plan.gradients + 4 * block + 2 * rest


def batch_of_sizes(stage: MotionDreamer, count: int) -> Batch:
    """A batch of `count` clips without numbers, in the sizes of the stage's config."""
    config, token = stage.config, stage.unet.config.cross_attention_dim
    h, w = config.height // config.vae_factor, config.width // config.vae_factor
    first = config.latent_channels * len(config.first_frame)
    first_frames = config.frames if "draft" in config.latents else 1

    def sized(*shape: int) -> Tensor:
        return torch.empty(count, *shape, device="meta")

    condition = Condition(
        first_pictures=sized(config.picture_channels, config.height, config.width),
        first_latents=sized(first_frames, first, h, w),
        known=sized(config.out_channels, h, w),
        given=sized(config.frames, config.in_channels - config.out_channels - first, h, w),
        token=sized(1, token),
        added_ids=sized(3),
        F=sized(2, config.height, config.width),
        camera=sized(2),
    )
    return Batch(sized(config.frames, config.out_channels, h, w), condition, sized(1, config.height, config.width))


def parts_without_weights(arguments: argparse.Namespace) -> tuple:
    """For the command line of train.py: what has the clips' sizes, VAE, image tower, the StageConfig of --start or
    None, UNetConfig. Sizes are those of files that are there, else SVD's (--init) or the preset's."""
    folders = [arguments.init] if arguments.init else [arguments.out, *[arguments.start] * bool(arguments.start)]
    default = {} if arguments.init else PRESETS["demo"] | PRESETS[arguments.preset]
    name = "stage1" if arguments.stage == "1" else "stage2"

    def sizes(part: str, kind: type, otherwise: str) -> Any:  # noqa: ANN401
        for path in (Path(folder) / part / "config.json" for folder in folders):
            if path.exists():
                return read_config(path, kind.from_dict)
        return default.get(otherwise, kind())

    with torch.device("meta"):
        vae = VAE(sizes("vae", VAEConfig, "vae"))
        tower = ImageEncoder(sizes("image_encoder", ImageEncoderConfig, "image_encoder"))
        if arguments.start:
            source = read_config(Path(arguments.start) / name / "config.json", build)
            started, unet = source.config, source.unet.config
        else:
            started, unet = None, sizes("unet", UNetConfig, name) if arguments.init else default[name]
    if any(Path(arguments.data).glob("*.safetensors")):
        return ClipDataset(arguments.data, arguments.frames), vae, tower, started, unet
    clips = started or StageConfig()
    return replace(clips, frames=arguments.frames or clips.frames), vae, tower, started, unet


def table(stage: MotionDreamer, encoders: Sequence[nn.Module], arguments: argparse.Namespace) -> str:
    """What a step takes, line by line in GB, as it is and with --checkpointing."""
    config, bf16, plans, several = stage.config, arguments.precision != "fp32", [], []
    for stage.unet.gradient_checkpointing in (False, True):
        batch = batch_of_sizes(stage, arguments.batch)
        plans.append(plan_step(stage, batch, bf16, arguments.accumulate))
        if arguments.dry_run == 1:
            continue
        held = plans[-1] if arguments.accumulate > 1 else plan_step(stage, batch, bf16, accumulate=2)
        several.append(each_of(arguments.dry_run, plans[-1], held, largest_blocks(stage), arguments.accumulate))
    frozen = 4 * sum(value.numel() for encoder in encoders for value in encoder.parameters())
    rows = {
        "weights": [plan.weights for plan in plans],
        "AdamW": [plan.optimizer for plan in plans],
        "moving average": [plan.ema for plan in plans],
        "VAE, image tower": [frozen, frozen],
        "activations, after the forward pass": [plan.forward for plan in plans],
        "gradients, after the backward pass": [plan.gradients for plan in plans],
        "activations and gradients, at most": [plan.step for plan in plans],
        "peak": [plan.peak + frozen for plan in plans],
    }
    if several:
        rows[f"peak of each of {arguments.dry_run} processes"] = [whole + frozen for whole, _ in several]
        rows["the same with --shard"] = [shared + frozen for _, shared in several]
    sizes = f"{config.frames} frames of {config.width}x{config.height}, batch {arguments.batch}"
    counts = f"{plans[0].weights // 4:,} parameters, {plans[0].gradients // 4:,} of them trained"
    lines = [f"{sizes}, {'bf16' if bf16 else 'fp32'}: {counts}", f"{'GB, an estimate':36}     as is  --checkpointing"]
    return "\n".join(lines + [f"{name:36}{a / 1e9:10.3f}{b / 1e9:17.3f}" for name, (a, b) in rows.items()])
