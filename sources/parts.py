"""Whether the parts of a model folder belong together."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def check_parts(
    source: str | Path, vae: nn.Module, tower: nn.Module, stages: dict[str, nn.Module], unet: nn.Module | None = None
) -> None:
    """Raises ValueError for parts of different models, or for one in the place of another: stages by their folders'
    names, or plain SVD's UNet. Each of them alone may be as it should be."""
    latents, token = vae.config.latent_channels, tower.config.projection_dim
    for name, stage in stages.items():
        stack, rest = divmod(stage.config.vae_factor, vae.factor)
        if rest or stage.config.latent_channels != latents * stack**2:
            raise ValueError(f"{source}: {name} was trained with another VAE than that in vae/")
        if (name == "stage2") != (stage.config.predict == ("rgb",)):
            raise ValueError(f"{source}: {name} predicts {', '.join(stage.config.predict)}: it is the other stage")
    if unet and (unet.config.in_channels, unet.config.out_channels) != (2 * latents, latents):
        raise ValueError(f"{source}: unet/ is not plain SVD's, or was trained with another VAE than that in vae/")
    for network in ([unet] if unet else []) + [stage.unet for stage in stages.values()]:
        if (width := network.config.cross_attention_dim) != token:
            raise ValueError(f"{source}: image_encoder/ makes a token of {token} numbers, the UNet takes {width}")
    if len(stages) == 2 and set(stages["stage2"].config.given) - set(stages["stage1"].config.predict):
        given, made = (", ".join(part) for part in (stages["stage2"].config.given, stages["stage1"].config.predict))
        raise ValueError(f"{source}: stage2 paints from {given}, stage1 predicts {made}")
