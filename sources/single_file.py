"""Names in a single-file checkpoint, such as svd.safetensors: ours -> those of Stability's `generative-models`."""

from __future__ import annotations

import re

from torch import Tensor, nn

# svd.safetensors and svd_xt.safetensors hold all three parts under the names of Stability's `generative-models`. What
# encodes the first frame is an autoencoder of its own there, among the conditioners (with quant_conv, as the published
# folder's VAE); the encoder next to the temporal decoder has none and is not needed.
IN_UNET, IN_DECODER = "model.diffusion_model.", "first_stage_model.decoder."
IN_ENCODER, IN_CLIP = "conditioner.embedders.3.encoder.", "conditioner.embedders.0.open_clip.model."
NEVER = ["first_stage_model.encoder.", f"{IN_ENCODER}decoder.", f"{IN_ENCODER}post_quant_conv."]
NEVER += [f"{IN_CLIP}{name}" for name in ("positional_embedding", "text_projection", "logit_scale", "attn_mask")]
NEVER += [f"{IN_CLIP}{name}." for name in ("token_embedding", "ln_final", "transformer")]  # of the text tower
NEVER += ["model_ema.", "denoiser.", "loss_fn.", "first_stage_model.loss."]  # of a training
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def _starts_with(*prefixes: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, prefixes)))


OTHER_PARTS = {  # what a part finds in the file and leaves alone
    "UNet": _starts_with(*NEVER, IN_CLIP, IN_ENCODER, IN_DECODER),
    "VAE": _starts_with(*NEVER, IN_CLIP, IN_UNET),
    "ImageEncoder": _starts_with(*NEVER, IN_UNET, IN_ENCODER, IN_DECODER),
}


def _rename(name: str, table: dict[str, str]) -> str:
    """Replaces every run of whole words that is in the table."""
    words = "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![^.])({words})(?![^.])", lambda match: table[match[1]], name)


def _unet_table(layers_per_block: int, attention: tuple[bool, ...]) -> dict[str, str]:
    """Beginnings of names: blocks are counted through there, and what a block holds is numbered."""
    per_level, last = layers_per_block + 1, len(attention) - 1
    table = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    table |= {"mid_block.attentions.0": "middle_block.1", "conv_in": "input_blocks.0.0"}
    table |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        table |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}
    for i in range(last + 1):
        down, up = 1 + i * per_level, i * per_level  # block 0 of the way down is conv_in
        for part, slot in (("resnets", 0), ("attentions", 1)):
            table |= {f"down_blocks.{i}.{part}.{j}": f"input_blocks.{down + j}.{slot}" for j in range(per_level - 1)}
            table |= {f"up_blocks.{i}.{part}.{j}": f"output_blocks.{up + j}.{slot}" for j in range(per_level)}
        slot = 1 + attention[last - i]
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{down + per_level - 1}.0.op"
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{up + per_level - 1}.{slot}.conv"
    return table


def _unet_name(name: str, table: dict[str, str]) -> str:
    inner = {"time_pos_embed.linear_1": "time_pos_embed.0", "time_pos_embed.linear_2": "time_pos_embed.2"}
    inner |= {"temporal_transformer_blocks": "time_stack", "temporal_res_block": "time_stack"}
    if ".resnets." in name:
        inner |= RESNET
    return IN_UNET + _rename(_rename(name.replace("spatial_res_block.", ""), table), inner)


def _vae_name(name: str, levels: int) -> str:
    table = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "time_conv_out": "conv_out.time_mix_conv"}
    table |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    table |= {"time_mixer.mix_factor": "mix_factor", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    table["to_out.0"] = "proj_out"
    table |= {"mid_block.attentions.0": "mid.attn_1", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    for i in range(levels):
        table |= {f"down_blocks.{i}": f"down.{i}", f"up_blocks.{i}": f"up.{levels - 1 - i}"}
    table |= {f"temporal_res_block.{ours}": f"time_stack.{theirs}" for ours, theirs in RESNET.items()}
    name = re.sub(r"(_blocks\.\d+)\.resnets\.", r"\1.block.", name.replace("spatial_res_block.", ""))
    part, rest = name.split(".", 1)
    beginnings = {"decoder": IN_DECODER, "encoder": f"{IN_ENCODER}encoder.", "quant_conv": f"{IN_ENCODER}quant_conv."}
    return beginnings[part] + _rename(rest, table)


def _clip_name(name: str) -> str:
    table = {"embeddings.patch_embedding": "conv1", "embeddings.position_embedding.weight": "positional_embedding"}
    table |= {"embeddings.class_embedding": "class_embedding", "visual_projection.weight": "proj"}
    table |= {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "encoder.layers": "transformer.resblocks"}
    table |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    table |= {f"self_attn.{i}_proj.{kind}": f"attn.in_proj_{kind}" for i in "qkv" for kind in ("weight", "bias")}
    return f"{IN_CLIP}visual." + _rename(name.removeprefix("vision_model."), table | {"self_attn": "attn"})


def single_file_table(model: nn.Module) -> dict[str, str]:
    """Every parameter's name -> its name in a single-file checkpoint; q, k and v of IN_CLIP share one there."""
    part = type(model).__name__
    if part == "UNet":
        table = _unet_table(model.config.layers_per_block, model.config.attention)
        return {name: _unet_name(name, table) for name in model.state_dict()}
    if part == "VAE":
        return {name: _vae_name(name, len(model.config.block_out_channels)) for name in model.state_dict()}
    return {name: _clip_name(name) for name in model.state_dict()}


def as_ours(key: str, name: str, value: Tensor) -> Tensor:
    """What a single-file checkpoint holds under `key`, in the shape of our `name`: a view, but for one matrix."""
    if ".attn.in_proj_" in key:
        return value.tensor_split(3)["qkv".index(re.search(r"\.([qkv])_proj\.", name)[1])]
    if key == f"{IN_CLIP}visual.proj":
        return value.movedim(0, -1).contiguous()
    if re.search(r"\.mid\.attn_1\.\w+\.weight$", key) and value.ndim == 4:
        return value.flatten(1)  # of a 1x1 convolution
    return value
