"""Writes tests/fixtures/: what the reference implementations make of small models, for users who do not have them.

    pip install diffusers transformers && python tests/make_fixtures.py

Each file holds inputs (`input.NAME`) and outputs (`output.NAME`) of one model of `MODELS`. Weights are not stored:
`fill` computes them from their names alone, so a file also proves that names mean the same. The references are
diffusers' UNetSpatioTemporalConditionModel and AutoencoderKLTemporalDecoder and transformers'
CLIPVisionModelWithProjection.
"""

import argparse
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from svd import ImageEncoderConfig, UNetConfig, VAEConfig
from weights import save_safetensors

FOLDER = Path(__file__).parent / "fixtures"
MODELS = {
    "unet": UNetConfig(
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        attention=(True, False, True),
        num_attention_heads=(2, 4, 3),
        cross_attention_dim=12,
        addition_time_embed_dim=6,
    ),
    "vae": VAEConfig(block_out_channels=(32, 64, 64), scaling_factor=0.5),
    "image_encoder": ImageEncoderConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=8,
        image_size=32,
        projection_dim=12,
    ),
}


def uniform(count: int, seed: int) -> Tensor:
    """Numbers in (-1, 1) from integer arithmetic alone: the same on every machine and in every version."""
    x = torch.arange(count) + seed
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x.double() / 2**31 - 1


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Sets every parameter, norms, biases and mix factors too, to numbers that depend on its name and shape only."""
    for name, value in model.named_parameters():
        numbers = uniform(value.numel(), zlib.crc32(name.encode()) + seed).view(value.shape).to(value)
        if value.ndim > 1:
            value.copy_(numbers * (3 / value[0].numel()) ** 0.5)  # keeps the size of what it is multiplied with
        else:
            value.copy_(numbers * 0.5 + ("norm" in name and name.endswith("weight")))
    return model.eval()


def reference(name: str, config: UNetConfig | VAEConfig | ImageEncoderConfig) -> nn.Module:
    """The same network, built by diffusers or transformers from our config.json."""
    settings = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    if name == "image_encoder":
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
    import diffusers

    cls = diffusers.UNetSpatioTemporalConditionModel if name == "unet" else diffusers.AutoencoderKLTemporalDecoder
    return cls(**settings)


def inputs(
    name: str, config: UNetConfig | VAEConfig | ImageEncoderConfig, height: int, width: int
) -> dict[str, Tensor]:
    """A random batch of 2; height and width are those of the images, or of the UNet's sample. Video has 3 frames."""
    generator = torch.Generator().manual_seed(height * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "unet":
        return {
            "sample": normal(2, 3, config.in_channels, height, width),
            "c_noise": normal(2),
            "context": normal(2, 1, config.cross_attention_dim),
            "added_ids": torch.tensor([[6.0, 127.0, 0.02], [9.0, 30.0, 0.1]]),
        }
    images = normal(2, 3, height, width).clamp(-1, 1)
    if name == "image_encoder":
        return {"images": images}
    return {"images": images, "latents": normal(2, 3, config.latent_channels, height // 4, width // 4)}


@torch.no_grad()
def outputs(name: str, model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the reference makes of `inputs`."""
    if name == "unet":
        return {"sample": model(*given.values()).sample}
    if name == "image_encoder":
        return {"token": clip_token(model, given["images"])}
    posterior, latents = model.encode(given["images"]).latent_dist, given["latents"]
    images = model.decode(latents.flatten(0, 1), num_frames=latents.shape[1]).sample
    return {"mean": posterior.mean, "log_variance": posterior.logvar, "images": images.unflatten(0, latents.shape[:2])}


def clip_token(model: nn.Module, images: Tensor) -> Tensor:
    """Images in [-1, 1] as StableVideoDiffusionPipeline hands them to CLIP -> [B, 1, D]."""
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
    from transformers import CLIPImageProcessor

    size = model.config.image_size
    resized = (_resize_with_antialiasing(images, (size, size)) + 1) / 2
    settings = {"do_center_crop": False, "do_resize": False, "do_rescale": False, "do_normalize": True}
    pixels = CLIPImageProcessor()(images=resized, return_tensors="pt", **settings).pixel_values
    return model(pixels).image_embeds[:, None]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, config in MODELS.items():
        given = inputs(name, config, *{"unet": (7, 10), "vae": (20, 28), "image_encoder": (71, 40)}[name])
        made = outputs(name, fill(reference(name, config)), given)
        tensors = {f"input.{k}": v for k, v in given.items()} | {f"output.{k}": v for k, v in made.items()}
        save_safetensors(tensors, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
