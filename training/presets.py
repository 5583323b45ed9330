"""Sizes of models that start from nothing. SVD itself comes with --init."""

from __future__ import annotations

from svd import ImageEncoderConfig, UNetConfig, VAEConfig


def small_unet(widths: tuple[int, ...], heads: int, context: int, ids: int) -> UNetConfig:
    """Three levels, of which the finest has no attention: there it would double the time of a step."""
    return UNetConfig(
        block_out_channels=widths, layers_per_block=1, attention=(False, True, True), num_attention_heads=(heads,) * 3,
        cross_attention_dim=context, addition_time_embed_dim=ids, channels_per_group=16,
    )  # fmt: skip


PRESETS = {
    "tiny": {  # for tests: seconds a stage
        "vae": VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, channels_per_group=8),
        "image_encoder": ImageEncoderConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64,
            patch_size=16, projection_dim=64,
        ),
        "stage1": small_unet((32, 64, 64), 2, 64, 32),
        "stage2": small_unet((32, 64, 64), 2, 64, 32),
        "stack": 2,
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
        "stack": 2,
    },
    "table": {  # the rows of evaluate.py's tables, which share the demo model's VAE: minutes a stage
        "stage1": small_unet((64, 48, 48), 2, 128, 64),
        "stage2": small_unet((64, 48, 48), 2, 128, 64),
        "stack": 2,
    },
}  # fmt: skip
