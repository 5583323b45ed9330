"""Widens the first level of a trained stage's UNet; what the stage computes stays the same, and training goes on.

python demo/widen.py runs/a/stage1 runs/b/stage1 112

Old outputs get nothing from new channels (weight 0), new channels start at random. Group normalisation does not mix
old and new ones, since a group has a fixed number of channels. Only the noise level's sinusoids change with the width:
their weights are shared out between the two nearest new frequencies, exactly so when the width doubles.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from motion_dreamer import MotionDreamer  # noqa: E402


def widen(stage: MotionDreamer, width: int) -> MotionDreamer:
    """A stage of the same config whose first level, which must have no attention, has `width` channels."""
    config = stage.unet.config
    narrow, *rest = config.block_out_channels
    if width <= narrow or width % config.channels_per_group or (width == rest[0]) != (narrow == rest[0]):
        raise ValueError(f"width is {width}, expected more than {narrow}, not {rest[0]}, and whole groups of channels")
    if config.attention[0]:
        raise ValueError("the first level has attention, whose normalisation would mix old and new channels")
    wide = MotionDreamer(stage.config, replace(config, block_out_channels=(width, *rest)))
    weights = wide.state_dict()
    for name, old in stage.state_dict().items():
        new = weights[name]
        if old.shape == new.shape:
            new.copy_(old)
            continue
        if name == "unet.time_embedding.linear_1.weight":
            old = respaced(old, width)
        where = [torch.arange(n) for n in old.shape]
        joined = 1 if old.ndim > 1 else 0  # the last resnet's input is two tensors of the first level, side by side
        if old.shape[joined] == 2 * narrow and new.shape[joined] == 2 * width:
            where[joined] = torch.cat([torch.arange(narrow), width + torch.arange(narrow)])
        if old.ndim > 1:
            new[: len(old)] = 0
        new[torch.meshgrid(*where, indexing="ij")] = old
    wide.load_state_dict(weights)
    return wide


def respaced(weight: Tensor, width: int) -> Tensor:
    """Weights [out, narrow] of cosines, then sines, of `sinusoid`'s frequencies -> [out, width]."""
    half, wide_half = weight.shape[1] // 2, width // 2
    place = torch.arange(half) * (wide_half / half)
    low, part = place.floor().long(), place.frac()
    share = torch.zeros(half, wide_half).index_put_((torch.arange(half), low), 1 - part)
    share.index_put_((torch.arange(half), (low + 1).clamp(max=wide_half - 1)), part, accumulate=True)
    return torch.cat([columns @ share for columns in weight.split(half, dim=1)], dim=1)


if __name__ == "__main__":
    torch.manual_seed(1)
    source, target, width = sys.argv[1:]
    widen(MotionDreamer.from_pretrained(source, dtype=torch.float32), int(width)).save_pretrained(target)
