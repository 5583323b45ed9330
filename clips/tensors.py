"""What the method is told from Python: the tensors and numbers of `dream`, `image_to_video` and of a stage's network.

Any precision will do, and ids of any width. What is none, or has another shape, range or device than it should, is a
ValueError that begins with the argument's name. Letters as in motion_dreamer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from clips.motion import Motion
from instance_flow import check_floats, check_real, check_shape, checked_ids

ROUNDING = 1e-3  # by which a picture may leave [-1, 1]


def check_place(name: str, value: Tensor, device: torch.device | None) -> None:
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but image on {device}")


def check_numbers(name: str, value: Tensor, shape: Sequence[int | str], device: torch.device | None = None) -> None:
    """Floating point of a shape, on the image's device (None: on any), finite."""
    check_floats(name, value, shape)
    check_place(name, value, device)
    if not value.isfinite().all():
        raise ValueError(f"{name} holds a value that is not finite")


def check_ids(name: str, value: Tensor, shape: Sequence[int | str], device: torch.device) -> None:
    check_shape(name, value, shape)
    check_place(name, value, device)
    whole = value.is_floating_point() and torch.equal(value, value.round())
    checked_ids(value.long() if whole else value, device, name)


def check_depth(name: str, value: Tensor, shape: Sequence[int | str], device: torch.device) -> None:
    check_numbers(name, value, shape, device)
    if not (value > 0).all():
        raise ValueError(f"{name} holds {value.min():g}, expected positive distances")


def check_image(image: Tensor, factor: int) -> None:
    """[B, 3, H, W] from -1 to 1, H and W multiples of the factor."""
    check_numbers("image", image, ("B", 3, "H", "W"))
    height, width = image.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"image is {width}x{height}, expected multiples of {factor}")
    if image.abs().max() > 1 + ROUNDING:
        raise ValueError(f"image reaches from {image.min():g} to {image.max():g}, expected -1 to 1")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")


def check_sampler(frames: int, steps: int, guidance: tuple[float, float], generator: torch.Generator | None) -> None:
    """What `dream` and `image_to_video` sample by."""
    check_count("frames", frames)
    check_count("steps", steps)
    try:
        first, last = map(float, guidance)
    except (TypeError, ValueError):
        first = last = math.nan
    if not math.isfinite(first + last):
        raise ValueError(f"guidance is {guidance!r}, expected two numbers: of the first and of the last frame")
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator is {generator!r}, expected a torch.Generator")


def check_step(x0: Tensor, predicting: str, i: int, steps: int) -> None:
    """FloatingPointError for a step of a sampler that is not finite."""
    if not x0.isfinite().all():
        raise FloatingPointError(f"{predicting}: step {i + 1} of {steps} is not finite")


def check_per_clip(name: str, value: float | Tensor, count: int) -> None:
    """One finite number for all clips, or one for each."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.tensor(math.nan)
    if numbers.shape not in ((), (1,), (count,)) or not numbers.isfinite().all() or numbers.min() < 0:
        raise ValueError(f"{name} is {value!r}, expected a number of at least 0, or one for each of {count} clips")


def check_svd(numbers: dict[str, float], decode_chunk: int | None) -> None:
    """What `image_to_video` alone is told."""
    for name, value in numbers.items():
        check_real(name, value)
    if decode_chunk is not None:
        check_count("decode_chunk", decode_chunk)


def check_stages(stage1: nn.Module | None, stage2: nn.Module | None, motion: Motion | None) -> None:
    """There is something to do, and Stage I, or the motion that is given, has what Stage II needs."""
    if stage1 is None and (stage2 is None or motion is None):
        raise ValueError("stage1 is None, expected a stage: neither motion nor a stage2 to paint it is given")
    if not isinstance(motion, Motion | None):
        raise ValueError(f"motion is of type {type(motion).__name__}, expected a Motion")
    if stage2 is None:
        return
    if stage2.config.predict != ("rgb",):
        raise ValueError(f"stage2 predicts {', '.join(stage2.config.predict)}, expected rgb")
    told = {name for name, value in vars(motion).items() if value is not None} if motion else stage1.config.predict
    if missing := set(stage2.config.given) - set(told):
        raise ValueError(f"{'motion' if motion else 'stage1'} has no {', '.join(sorted(missing))}, which stage2 needs")


def check_dream(
    stages: Sequence[nn.Module | None], maps: dict[str, Tensor | None], motion: Motion | None,
    fps: float | Tensor | None, motion_bucket: float | Tensor, settings: dict[str, Any],
) -> None:  # fmt: skip
    """All that `dream` is told. maps: as in `check_maps`; settings: of `sample`."""
    check_stages(*stages, motion)
    check_sampler(*(settings[name] for name in ("frames", "steps", "guidance", "generator")))
    check_image(maps["image"], math.lcm(*(stage.config.vae_factor for stage in stages if stage is not None)))
    check_maps(maps, motion, settings["frames"])
    check_per_clip("fps", 1.0 if fps is None else fps, len(maps["image"]))
    check_per_clip("motion_bucket", motion_bucket, len(maps["image"]))


def check_maps(maps: dict[str, Tensor | None], motion: Motion | None, frames: int) -> None:
    """maps: image, segmentation, depth, F, mask, camera, by these names; what is None is absent."""
    (B, _, H, W), device = maps["image"].shape, maps["image"].device
    shapes = {"image": (B, 3, H, W)}
    shapes |= {"segmentation": (B, H, W), "depth": (B, H, W), "F": (B, 2, H, W), "mask": (B, 1, H, W), "camera": (B, 2)}
    shapes |= {"motion.flow": (B, frames, 2, H, W)}
    shapes |= dict.fromkeys(("motion.segmentation", "motion.depth"), (B, frames, H, W))
    maps = maps | {f"motion.{name}": value for name, value in (vars(motion) if motion else {}).items()}
    checks = {"segmentation": check_ids, "depth": check_depth}
    for name, value in maps.items():
        if value is not None or name == "F":
            checks.get(name.removeprefix("motion."), check_numbers)(name, value, shapes[name], device)


def check_batch(stage: nn.Module, x0: Tensor, M: Tensor) -> None:
    """Of a training step: x0 [B, T, C p, h, w], M [B, 1, H, W]. Its condition is that of `check_condition`."""
    check_floats("batch.x0", x0, ("B", "T", stage.config.out_channels, "h", "w"))
    (B, *_, h, w), f = x0.shape, stage.config.vae_factor
    check_floats("batch.M", M, (B, 1, h * f, w * f))


def check_condition(stage: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> None:
    """Shapes alone, for nothing may wait for a GPU here: x [B, T, C p, h, w], sigma [B], the fields of a Condition."""
    config = stage.config
    check_shape("x", x, ("B", "T", config.out_channels, "h", "w"))
    (B, T, _, h, w), c, f = x.shape, config.latent_channels, config.vae_factor
    check_shape("sigma", sigma, (B,))
    shapes = {
        "first_pictures": (B, config.picture_channels, h * f, w * f),
        "first_latents": (B, "T", c * len(config.first_frame), h, w),
        "token": (B, 1, "D"),
        "added_ids": (B, 3),
        "F": (B, 2, h * f, w * f),
        "camera": (B, 2),
    }
    shapes |= {"given": (B, T, c * len(config.given), h, w)} if config.given else {}
    for name, shape in shapes.items():
        check_shape(f"cond.{name}", cond[name], shape)
