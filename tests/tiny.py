"""Small models and clips that several test files share. Weights are random also where training starts at zero."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clips import Clip
from motion_dreamer import STAGE1, STAGE2, MotionDreamer, StageConfig, stage_class
from svd import VAE, ImageEncoder, ImageEncoderConfig, UNetConfig, VAEConfig

VAE_CONFIG = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, channels_per_group=4)
TOWER_CONFIG = ImageEncoderConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    patch_size=8,
    image_size=16,
    projection_dim=16,
)
UNET_CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention=(True, False),
    num_attention_heads=(2, 2),
    cross_attention_dim=16,
    addition_time_embed_dim=8,
    channels_per_group=4,
)
# One preset of train.py's, smaller than its smallest.
TINY = {
    "vae": VAE_CONFIG,
    "image_encoder": TOWER_CONFIG,
    "stage1": UNET_CONFIG,
    "stage2": UNET_CONFIG,
    "stack": 2,
}


def randomize(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Every parameter, norms, biases and zero-initialised layers included, away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data += scale * torch.randn(value.shape, generator=generator).to(value.dtype)
    return module.eval()


def tiny_vae() -> VAE:
    torch.manual_seed(0)
    return randomize(VAE(VAE_CONFIG), scale=0.05).requires_grad_(False)


def tiny_tower() -> ImageEncoder:
    torch.manual_seed(0)
    return randomize(ImageEncoder(TOWER_CONFIG), scale=0.05).requires_grad_(False)


def tiny_stage(config: StageConfig, seed: int = 0, scale: float = 0.1) -> MotionDreamer:
    torch.manual_seed(seed)
    return randomize(stage_class(config)(config, UNET_CONFIG), seed, scale)


def moving_squares(seed: int = 0, frames: int = 4, height: int = 16, width: int = 24) -> Clip:
    """Two squares of random colour; each moves by its own whole-pixel step a frame over a gray ramp."""
    random = np.random.default_rng(seed)
    rgb = np.broadcast_to(np.linspace(60, 120, width).astype(np.uint8)[None, None, :, None], (frames, height, width, 3))
    rgb, depth = rgb.copy(), np.full((frames, height, width), 8, np.float32)
    segmentation, flow = np.zeros((frames, height, width), np.uint8), np.zeros((frames, 2, height, width), np.float32)
    for instance in (1, 2):
        color, step = random.integers(256, size=3), random.integers(-2, 3, size=2)
        x, y = random.integers(6, width - 10), random.integers(3, height - 7)
        for t in range(frames):
            top, left = y + step[1] * t, x + step[0] * t
            area = (t, slice(max(top, 0), max(top + 5, 0)), slice(max(left, 0), max(left + 5, 0)))
            rgb[area], segmentation[area], depth[area] = color, instance, 4 + instance
            flow[area[0], :, area[1], area[2]] = step[:, None, None]
    return Clip(rgb, flow, segmentation, depth, fps=7.0, meta={"seed": seed})


def clips_in(folder: Path, count: int) -> Path:
    """Writes so many of them: 0.safetensors, 1.safetensors ..."""
    for seed in range(count):
        moving_squares(seed).save(folder / f"{seed}.safetensors")
    return folder


def save_tiny_model(folder: Path, width: int, height: int, frames: int, dtype: torch.dtype = torch.float32) -> None:
    """A model folder of the paper's two stages, `dtype` their precision."""
    sizes = {"vae_factor": 2, "frames": frames, "width": width, "height": height, "sigma_max": 80.0, "fps": 5.0}
    tiny_vae().save_pretrained(folder / "vae")
    tiny_tower().save_pretrained(folder / "image_encoder")
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        tiny_stage(replace(config, **sizes), scale=0.02).to(dtype).save_pretrained(folder / name)
