"""Weights of networks: find them, load them strictly, save them whole or not at all.

A source is a folder in the published layout (config.json and safetensors, half precision where there is no other), a
hub id such as "stabilityai/...", or a single-file checkpoint such as svd.safetensors, whose names are translated.

    UNet.from_pretrained("stabilityai/stable-video-diffusion-img2vid", "unet", dtype=torch.float32)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Source = str | os.PathLike
Device = str | torch.device | None


# ------------------------------------------------------------------------------------------------ find, load, save


def resolve_source(source: Source, subfolder: str | None = None) -> Path:
    """The local folder of a model: `source` itself, or what a hub id such as "stabilityai/..." downloads to.

    Of the hub only config.json and one weights file of the subfolder are fetched, in half precision where there is one
    (3 GB of the UNet instead of a 33 GB repository). Raises FileNotFoundError (no such folder), ValueError (hub; says
    what to do).
    """
    local = Path(source) / (subfolder or "")
    if local.is_dir():
        return local
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise FileNotFoundError(f"{local}: no such folder")
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        folder = Path(
            snapshot_download(str(source), allow_patterns=[f"{prefix}config.json", f"{prefix}*.fp16.safetensors"])
        )
        if not list((folder / prefix).glob("*.safetensors")):
            names = [f"{prefix}{stem}.safetensors" for stem in ("diffusion_pytorch_model", "model")]
            folder = Path(snapshot_download(str(source), allow_patterns=[f"{prefix}config.json", *names]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(_hub_advice(str(source), error)) from None
    if not (folder / prefix).is_dir():
        raise ValueError(f"{source}: the hub's repository has no folder {subfolder}")
    return folder / prefix


def _hub_advice(source: str, error: Exception) -> str:
    page = f"https://huggingface.co/{source}"
    advice = {
        "GatedRepoError": f"accept the licence at {page}, then log in with `hf auth login`",
        "RepositoryNotFoundError": f"no such folder, and no such public model at {page} (private? `hf auth login`)",
        "LocalEntryNotFoundError": "no such folder, not downloaded yet, and the hub cannot be reached",
    }
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"{source}: {advice.get(type(error).__name__, reason[0])}"


IGNORED = {"vision_model.embeddings.position_ids"}  # old CLIP files list 0, 1, 2, ... as a weight


def _listing(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def load_strict(
    model: nn.Module,
    path: Source,
    dtype: torch.dtype | None = None,
    device: Device = None,
    table: dict[str, str] | None = None,
) -> None:
    """Fills `model` (built on the meta device) from a safetensors file whose names and shapes must match exactly.

    `table`: name in the model -> name in a single-file checkpoint (`single_file_table`), of which the other parts are
    left alone. Tensors stay memory-mapped unless dtype or device ask for another copy. Raises FileNotFoundError, or a
    one-line ValueError that names the file and what is missing, unexpected, misshapen or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    names = table or {name: name for name in wanted}
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys()) - IGNORED
            others = present - set(names.values())
            tensors = {n: _as_ours(key, n, file.get_tensor(key)) for n, key in names.items() if key in present}
            shapes = {name: list(value.shape) for name, value in tensors.items()}
            known = OTHER_PARTS.get(type(model).__name__)
            problems = {
                "missing": [key for key in dict.fromkeys(names.values()) if key not in present],
                "unexpected": [key for key in others if table is None or not known.match(key)],
                "misshapen": [f"{names[n]} {s}, not {wanted[n]}" for n, s in shapes.items() if s != wanted[n]],
            }
            found = [f"{len(keys)} {kind} ({_listing(keys)})" for kind, keys in problems.items() if keys]
            if found:
                raise ValueError(f"{path}: does not fit the model: {'; '.join(found)}")
            for name, tensor in tensors.items():  # memory-mapped so far
                tensors[name] = tensor.to(device or "cpu", dtype if tensor.is_floating_point() else None)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from None
    model.load_state_dict(tensors, assign=True)


@contextmanager
def whole_file(path: Source) -> Iterator[Path]:
    """A name to write to, whose file gets the right name when it is complete; if not, nothing is left. The folder must
    exist. Raises OSError that names the path: a full disk, say."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def save_safetensors(state_dict: dict[str, Tensor], path: Source) -> None:
    """Writes the whole file or none of it. Folders are not made."""
    values = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with whole_file(path) as partial:
        save_file(values, partial, {"format": "pt"})


def open_folder(
    source: Source,
    subfolder: str | None,
    stem: str,
    build: Callable[[dict[str, Any]], nn.Module],
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Any:  # noqa: ANN401
    """A network from a folder or a hub id (see `resolve_source`): config.json says to `build` what it is, weights are
    STEM.safetensors, or STEM.fp16.safetensors where there is no other. dtype None keeps the file's.

    Raises FileNotFoundError or a one-line ValueError, both with the path.
    """
    path = resolve_source(source, subfolder) / "config.json"
    try:
        with torch.device("meta"):
            model = build(json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:  # of JSON, too
        raise ValueError(f"{path}: {error}") from None
    full, half = (path.parent / f"{stem}{variant}.safetensors" for variant in ("", ".fp16"))
    load_strict(model, half if half.exists() and not full.exists() else full, dtype, device)
    return model


def save_folder(folder: Source, stem: str, state_dict: dict[str, Tensor], config: dict[str, Any]) -> None:
    """config.json and weights; each is written whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(state_dict, folder / f"{stem}.safetensors")
    with whole_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def from_pretrained(
    cls: type,
    source: Source,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
    config: Any = None,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Opens a folder or a hub id (see `open_folder`), or a single-file checkpoint such as svd.safetensors, which has no
    config.json: `config` is for these, by default SVD's."""
    if not Path(source).is_file():
        return open_folder(source, subfolder, cls.STEM, lambda said: cls(cls.CONFIG.from_dict(said)), dtype, device)
    with torch.device("meta"):
        model = cls(config or cls.CONFIG())
    load_strict(model, source, dtype, device, single_file_table(model))
    return model


def save_pretrained(self: nn.Module, folder: Source) -> None:
    """config.json and weights under their published names; each is written whole or not at all."""
    save_folder(folder, self.STEM, self.state_dict(), self.config.to_dict())


def read_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stage's config.json. Those of weights made by commit 05d9df5 and before are translated: three are
    gone, `patch` counts as a part of the VAE's factor, and fps is that of their clips. (That part goes with the last of
    these weights.)"""
    stage = {key: tuple(value) if isinstance(value, list) else value for key, value in stage.items()}
    if "mask_keep_one" not in stage:
        return stage
    if stage["predict_change"] or not stage["keep_first_frame"]:
        raise ValueError("predict_change is true or keep_first_frame is false, which is no longer supported")
    patch = stage["patch"]
    stage |= {"latent_channels": stage["latent_channels"] * patch**2, "vae_factor": stage["vae_factor"] * patch}
    gone = ("mask_keep_one", "predict_change", "keep_first_frame", "patch")
    return {key: value for key, value in stage.items() if key not in gone} | {"fps": 10.0}


# ---------------------------------------------------------------------------------------------- single-file checkpoints

# svd.safetensors and svd_xt.safetensors hold all three parts under the names of Stability's `generative-models`. What
# encodes the first frame is an autoencoder of its own there, among the conditioners (with quant_conv, as the published
# folder's VAE); the encoder next to the temporal decoder has none and is not needed.
IN_UNET, IN_DECODER = "model.diffusion_model.", "first_stage_model.decoder."
IN_ENCODER, IN_CLIP = "conditioner.embedders.3.encoder.", "conditioner.embedders.0.open_clip.model."
NEVER = ["first_stage_model.encoder.", f"{IN_ENCODER}decoder.", f"{IN_ENCODER}post_quant_conv."]
NEVER += [f"{IN_CLIP}{name}" for name in ("positional_embedding", "text_projection", "logit_scale", "attn_mask")]
NEVER += [f"{IN_CLIP}{name}." for name in ("token_embedding", "ln_final", "transformer")]  # of the text tower
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


def _as_ours(key: str, name: str, value: Tensor) -> Tensor:
    """What a single-file checkpoint holds under `key`, in the shape of our `name`: a view, but for one matrix."""
    if ".attn.in_proj_" in key:
        return value.tensor_split(3)["qkv".index(re.search(r"\.([qkv])_proj\.", name)[1])]
    if key == f"{IN_CLIP}visual.proj":
        return value.movedim(0, -1).contiguous()
    if re.search(r"\.mid\.attn_1\.\w+\.weight$", key) and value.ndim == 4:
        return value.flatten(1)  # of a 1x1 convolution
    return value
