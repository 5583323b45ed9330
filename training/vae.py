"""Training of a small VAE for models from nothing: its loss, and the scale of its latents."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from clips import ClipDataset, render, unrender
from instance_flow import uniform
from svd import VAE, decode_video, encode_video, gaussian
from training.cache import fingerprint

# --------------------------------------------------------------------------------------------------------- the tiny VAE


def vae_loss(vae: VAE, clips: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """|error| + error^2 over pictures of all four modalities (flow 3 times: its numbers count, not its looks), + 2e-5
    KL; a sample each [B].

    What is small but matters weighs more: moving pixels of the flow 13 times, objects (and what is within 2 pixels of
    them) in segmentation 5, in depth 3, in RGB 2 times. With equal weights, a small VAE ignores the objects; were the
    rim left out, it would make them too large. Noise on the latents (up to 0.2) makes the decoder robust.

    The decoder sees neighbouring frames: parts of a random length, a divisor of T, are decoded by themselves, so that
    it knows a frame alone, first, inner and last ones. One that knows two frames at a time cannot decode sixteen.
    """
    first = {"rgb": None, "flow": None, "segmentation": clips["segmentation"][:, 0], "depth": clips["depth"][:, 0]}
    objects = nn.functional.max_pool2d((clips["segmentation"] > 0).float(), 5, stride=1, padding=2)[:, :, None]
    moving = (clips["flow"].norm(dim=2, keepdim=True) > 0.1).float()
    weights = {"rgb": 1 + objects, "flow": 1 + 12 * moving, "segmentation": 1 + 4 * objects, "depth": 1 + 2 * objects}
    pictures = torch.cat([render(name, clips[name], first[name]) for name in weights])  # [4 B, T, 3, H, W]
    weight = torch.cat(list(weights.values()))  # [4 B, T, 1, H, W]
    mean, log_variance = vae.moments(rearrange(pictures, "b t c h w -> (b t) c h w"))
    noise, extra = (gaussian(mean.shape, generator, mean.device).to(mean) for _ in range(2))
    extra = extra * 0.2 * uniform((1,), generator, mean.device).to(mean)
    latents = mean + (log_variance / 2).exp() * noise + extra
    lengths = [t for t in range(1, pictures.shape[1] + 1) if pictures.shape[1] % t == 0]
    length = lengths[int(uniform((1,), generator, mean.device) * len(lengths))]
    decoded = vae.decode(rearrange(latents, "(b t) c h w -> b t c h w", t=length)).view(pictures.shape)
    error = (decoded.float() - pictures).abs()
    error = (weight * (error + error**2)).mean(dim=(1, 2, 3, 4)) / weight.mean(dim=(1, 2, 3, 4))
    kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean().float() / 2
    batch = len(objects)
    parts = {name: part for name, part in zip(weights, error.split(batch), strict=True)}
    return {"loss": sum(parts.values()) + 2 * parts["flow"] + 2e-5 * kl, "kl": kl.expand(batch)} | parts


def round_trip(vae: VAE, modality: str, value: Tensor, first: Tensor | None = None) -> Tensor:
    """A modality [B, T, ...] through the VAE and back: no stage that uses this VAE can do better."""
    latents = encode_video(vae, render(modality, value, first), vae.factor)
    return unrender(modality, decode_video(vae, latents, vae.factor), first)


def scale_of(vae: VAE, clips: ClipDataset, folder: Path) -> float:
    """The scale of these weights' latents: that of `folder` where they lie there already, for stages may have learned
    it; else as it is measured."""
    if (folder / "config.json").exists():
        there = VAE.from_pretrained(folder.parent, folder.name, torch.float32)
        if fingerprint(there) == fingerprint(vae):
            return there.scaling_factor
    return measure_scale(vae, clips)


@torch.no_grad()
def measure_scale(vae: VAE, clips: ClipDataset, count: int = 16) -> float:
    """1 / standard deviation of the latents of the four modalities, of clips from all over the folder: makes them unit
    size, as diffusion expects."""
    latents, count = [], min(count, len(clips))
    for i in (k * len(clips) // count for k in range(count)):
        clip = {name: value.to(next(vae.parameters()).device) for name, value in clips[(i, 0)].items()}
        first = {"rgb": None, "flow": None, "segmentation": clip["segmentation"][:1], "depth": clip["depth"][:1]}
        latents += [vae.encode(render(name, clip[name][None], first[name])[0]) for name in first]
    return 1 / torch.cat(latents).std().item()


class VAETraining(nn.Module):
    """The VAE with its loss as `forward`, so that DistributedDataParallel can wrap it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, clips: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return vae_loss(self.vae, clips, generator)
