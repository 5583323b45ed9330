"""Stable Video Diffusion (SVD), with every option removed that its published weights do not use.

Motion Dreamer (arXiv 2412.00547 v1) builds both of its stages on this network. Three parts, loaded from the published
folder, with the parameter names of the published files:

    UNet           unet/            noisy latents -> denoised latents; attention over space, then over time
    VAE            vae/             images <-> latents; the decoder sees neighbouring frames
    ImageEncoder   image_encoder/   CLIP's ViT-H/14: first frame -> the one context token

    unet = UNet.from_pretrained("stabilityai/stable-video-diffusion-img2vid", "unet", dtype=torch.float32)

Plain SVD is `image_to_video`, on the command line `python sample.py image.png --svd REPO_OR_DIR`.

Inside, features are [B, T, h, w, C] in memory: a convolution calls that channels-last, attention calls it tokens, a
convolution over time calls it rows. So going from space to time and back copies nothing. And the context is a single
token: the softmax of cross-attention is 1, query and key do nothing (they exist because the checkpoint has them), and
all of cross-attention is one vector per clip, to_out(to_v(context)).

    B T C h w   batch, frames, channels, height and width in latent cells (H W in pixels);  S = h w;  E, D: width of
    the time embedding and of the context token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clips.tensors import check_image, check_numbers, check_sampler, check_step, check_svd
from kernels.group_norm import group_norm as group_norm_gpu
from kernels.group_norm import usable
from kernels.replayed import Replayed
from sources import read_fields
from weights import Device, from_pretrained, save_pretrained

# ------------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class UNetConfig:
    """The settings of unet/config.json that may vary; the defaults are SVD's."""

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # per level; the middle always has it
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    channels_per_group: int | None = None  # None: 32 groups. Tiny models: about this many channels a group

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("attention", "num_attention_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} is {list(getattr(self, name))}, expected {levels} values, one per level")
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            if heads < 1 or channels % heads:
                raise ValueError(f"num_attention_heads: {channels} channels do not split into {heads} heads")

    def to_dict(self) -> dict[str, Any]:
        """In the keys of the published config.json, which diffusers reads too."""
        down = ["CrossAttnDownBlockSpatioTemporal" if a else "DownBlockSpatioTemporal" for a in self.attention]
        return _to_dict(self, "UNetSpatioTemporalConditionModel") | {
            "down_block_types": down,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "projection_class_embeddings_input_dim": 3 * self.addition_time_embed_dim,
            "transformer_layers_per_block": 1,
            "num_frames": 14,  # diffusers' default number of frames to sample: not a property of the network
            "sample_size": None,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`. Raises ValueError that names a key which is missing or not supported."""
        down = config.get("down_block_types", [])
        attention = [name == "CrossAttnDownBlockSpatioTemporal" for name in down]
        return _from_dict(cls, config, {"attention": attention}, ignored=("num_frames", "sample_size"))


@dataclass(frozen=True)
class VAEConfig:
    """The settings of vae/config.json that may vary; the defaults are SVD's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents; whoever encodes or decodes applies it
    channels_per_group: int | None = None  # as in UNetConfig

    def to_dict(self) -> dict[str, Any]:
        """In the keys of the published config.json, which diffusers reads too."""
        return _to_dict(self, "AutoencoderKLTemporalDecoder") | {
            "down_block_types": ["DownEncoderBlock2D"] * len(self.block_out_channels),
            "in_channels": 3,
            "out_channels": 3,
            "sample_size": 768,  # said by the published file; no layer depends on it
            "force_upcast": True,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VAEConfig:
        """The inverse of `to_dict`. Raises ValueError that names a key which is missing or not supported."""
        return _from_dict(cls, config, {}, ignored=("sample_size", "force_upcast"))


@dataclass(frozen=True)
class ImageEncoderConfig:
    """The settings of image_encoder/config.json that may vary; the defaults are SVD's (CLIP ViT-H/14)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    projection_dim: int = 1024

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            heads = f"{self.hidden_size} channels do not split into {self.num_attention_heads} heads"
            raise ValueError(f"num_attention_heads: {heads}")

    def to_dict(self) -> dict[str, Any]:
        """In the keys of the published config.json, which transformers reads too."""
        return asdict(self) | {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "num_channels": 3,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ImageEncoderConfig:
        """The inverse of `to_dict`. Raises ValueError that names a key which is missing or not supported."""
        structural = cls().to_dict()  # transformers writes much more: version, dtype, initialisation ...
        ignored = [key for key in config if key not in structural] + ["architectures"]
        return _from_dict(cls, config, {}, ignored)


def _to_dict(config: UNetConfig | VAEConfig, class_name: str) -> dict[str, Any]:
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items() if key != "attention"}
    if config.channels_per_group is None:
        del values["channels_per_group"]
    return {"_class_name": class_name, "_diffusers_version": "0.24.0"} | values


def _from_dict(cls: type, config: dict[str, Any], extra: dict[str, Any], ignored: Sequence[str]) -> Any:  # noqa: ANN401
    """A config from the keys it owns; then every other key must say what `to_dict` would say."""
    widths, config = config.get("block_out_channels"), config | extra
    levels = len(widths) if isinstance(widths, list) else 1
    if cls is UNetConfig and isinstance(config.get("num_attention_heads"), int):
        config["num_attention_heads"] = [config["num_attention_heads"]] * levels  # both spellings are in use
    values = read_fields(cls, config)
    parsed = cls(**values)
    supported = parsed.to_dict()
    for key, value in config.items():
        if key.startswith("_") or key in ignored or key in values:
            continue
        if key not in supported:
            raise ValueError(f"{key} is {value!r}; there is no such setting here")
        if value not in (supported[key], [supported[key]] * levels):
            raise ValueError(f"{key} is {value!r}, only {supported[key]!r} is supported here")
    return parsed


# ------------------------------------------------------------------------------------------- layers on [B, T, h, w, C]


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of every frame: [B, T, h, w, C] -> [B, T, h', w', C']."""
    y = layer(x.flatten(0, 1).movedim(-1, 1))
    return y.movedim(1, -1).contiguous().unflatten(0, x.shape[:2])


def convolve_time(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A (3, 1, 1) convolution over time, [B, T, h, w, C] -> [B, T, h, w, C'], as a (3, 1) one over [T, h w]."""
    y = nnf.conv2d(x.flatten(2, 3).movedim(-1, 1), layer.weight[..., 0], layer.bias, padding=(1, 0))
    return y.movedim(1, -1).contiguous().view(*x.shape[:-1], -1)


def normalize(norm: nn.GroupNorm, x: Tensor, over_time: bool = False, silu: bool = False) -> Tensor:
    """Group normalisation of [B, T, h, w, C]: of every frame by itself, or over all frames of a clip. Then SiLU."""
    joined = x.flatten(1, 2) if over_time else x.flatten(0, 1)  # [B, T h, w, C] or [B T, h, w, C]
    if usable(x):
        y = group_norm_gpu(joined.flatten(1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps, silu)
        return y.view(x.shape)
    y = norm(joined.movedim(-1, 1)).movedim(1, -1).contiguous().view(x.shape)
    return nnf.silu(y) if silu else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias. On a CPU as a 1x1 convolution: oneDNN's is twice as fast as MKL's product (AMD, float32)."""
    if x.device.type != "cpu" or x.ndim < 4:
        return nnf.linear(x, weight, bias)
    y = nnf.conv2d(x.flatten(0, -3).movedim(-1, 1)[:, :, None], weight[..., None, None], bias)  # [B T h, C', 1, w]
    return y.squeeze(2).movedim(1, -1).contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def group_norm(channels: int, per_group: int | None, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32 if per_group is None else max(1, channels // per_group), channels, eps)


def sinusoid(x: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, of frequencies from 1 down to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x.float()[..., None] * frequencies
    return nnf.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nnf.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + embedding))), each frame by itself."""

    def __init__(
        self, channels: int, out_channels: int, embed_dim: int | None, eps: float, per_group: int | None
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, per_group, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if embed_dim is not None:
            self.time_emb_proj = nn.Linear(embed_dim, out_channels)
        self.norm2 = group_norm(out_channels, per_group, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = convolve(self.conv1, normalize(self.norm1, x, silu=True))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, None]
        h = convolve(self.conv2, normalize(self.norm2, h, silu=True))
        if hasattr(self, "conv_shortcut"):
            x = linear(x, self.conv_shortcut.weight[..., 0, 0], self.conv_shortcut.bias)
        return x + h


class TemporalResBlock(nn.Module):
    """The same over time, without "x +", which `SpatioTemporalResBlock` does."""

    def __init__(self, channels: int, embed_dim: int | None, eps: float, per_group: int | None) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, per_group, eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        if embed_dim is not None:
            self.time_emb_proj = nn.Linear(embed_dim, channels)
        self.norm2 = group_norm(channels, per_group, eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = convolve_time(self.conv1, normalize(self.norm1, x, over_time=True, silu=True))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, None]
        return convolve_time(self.conv2, normalize(self.norm2, h, over_time=True, silu=True))


class Mixer(nn.Module):
    """Holds the learned blend of the spatial and the temporal branch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([value]))


class SpatioTemporalResBlock(nn.Module):
    """alpha s + (1 - alpha) (s + r) = s + (1 - alpha) r: s after the spatial block, r the temporal block's residual.

    alpha = sigmoid(mix_factor) in the UNet; in the VAE, which has no embedding, 1 - alpha = sigmoid(mix_factor).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embed_dim: int | None,
        eps: float,
        time_eps: float,
        per_group: int | None,
    ) -> None:
        super().__init__()
        self.spatial_res_block = ResBlock(channels, out_channels, embed_dim, eps, per_group)
        self.temporal_res_block = TemporalResBlock(out_channels, embed_dim, time_eps, per_group)
        self.time_mixer = Mixer(0.0 if embed_dim is None else 0.5)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x [B, T, h, w, C], emb [B, E] (already through silu) or None -> [B, T, h, w, C']."""
        x = self.spatial_res_block(x, emb)
        mix = self.time_mixer.mix_factor
        weight = (mix if emb is None else -mix).sigmoid().to(x.dtype)  # 1 - alpha
        return torch.addcmul(x, self.temporal_res_block(x, emb), weight)


class Resample(nn.Module):
    """Half or double the resolution, with a 3x3 convolution."""

    def __init__(self, channels: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def down(self, x: Tensor) -> Tensor:
        """[B, T, h, w, C] -> [B, T, h/2, w/2, C], rounded up; in the VAE down: it pads right and below only."""
        return convolve(self.conv, x if self.conv.padding[0] else nnf.pad(x, (0, 0, 0, 1, 0, 1)))

    def up(self, x: Tensor, h: int, w: int) -> Tensor:
        """[B, T, ., ., C] -> [B, T, h, w, C], by nearest neighbour."""
        y = nnf.interpolate(x.flatten(0, 1).movedim(-1, 1), size=(h, w), mode="nearest")
        return convolve(self.conv, y.movedim(1, -1).unflatten(0, x.shape[:2]))


# --------------------------------------------------------------------------------------------------------- transformers


class Attention(nn.Module):
    """Multi-head self-attention; or cross-attention to one token, of which only the values matter."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context_dim or channels, channels, bias=bias)
        self.to_v = Linear(context_dim or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def over_space(self, x: Tensor) -> Tensor:
        """Each token attends to its frame: [B, T, h, w, C] -> the same shape."""
        q, k, v = (
            rearrange(y, "b t h w (n c) -> (b t) n (h w) c", n=self.heads)
            for y in (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        y = nnf.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(y, "(b t) n (h w) c -> b t h w (n c)", b=x.shape[0], h=x.shape[2]))

    def over_time(self, x: Tensor, query: Tensor | None) -> Tensor:
        """Each token attends to its cell in all frames: [B, T, h, w, C] -> the same; query [B, C] joins all queries.

        Written out: for many short sequences, the backward pass of the fused attention is slow on a CPU.
        """
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if query is not None:
            q = q + query.to(q.dtype)[:, None, None, None]
        q, k, v = (rearrange(y, "b t h w (n c) -> (b h w n) t c", n=self.heads) for y in (q, k, v))
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
        y = torch.bmm(scores.softmax(-1).to(v.dtype), v)
        b, _, h, w, _ = x.shape
        return self.to_out[0](rearrange(y, "(b h w n) t c -> b t h w (n c)", b=b, h=h, w=w))

    def to_token(self, context: Tensor) -> Tensor:
        """All of cross-attention to a single token: [B, 1, D] -> [B, 1, 1, 1, C], to be added to every token."""
        return self.to_out[0](self.to_v(context))[:, None, None]


class FeedForward(nn.Module):
    """Linear(value * gelu(gate)), four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        gated = nn.ModuleDict({"proj": Linear(channels, 8 * channels)})
        self.net = nn.ModuleList([gated, nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h, w, C] -> the same shape."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.transform(x)
        rows = x.flatten(0, 2).split(max(16, 2048 // x.shape[-2]))  # so that the wide part stays in the cache
        return torch.cat([self.transform(part[:, None]) for part in rows]).view(x.shape)

    def transform(self, x: Tensor) -> Tensor:
        proj = self.net[0]["proj"]  # as two products: halves of one would be copied in the backward pass
        value, gate = (linear(x, w, b) for w, b in zip(proj.weight.chunk(2), proj.bias.chunk(2), strict=True))
        return self.net[2](value * nnf.gelu(gate))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)  # once: autocast's float32 is cast by every layer that reads it


class TransformerBlock(nn.Module):
    """Self-attention over space or over time, the context token, feed-forward; over time, a feed-forward first."""

    def __init__(self, channels: int, heads: int, context_dim: int, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        if over_time:
            self.norm_in = LayerNorm(channels)
            self.ff_in = FeedForward(channels)
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = LayerNorm(channels)  # of the queries of attn2: without effect, as they are
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, query: Tensor | None = None) -> Tensor:
        """[B, T, h, w, C], [B, 1, D], [B, C] -> [B, T, h, w, C]."""
        if self.over_time:
            x = x + self.ff_in(self.norm_in(x))
            x = x + self.attn1.over_time(self.norm1(x), query)
        else:
            x = x + self.attn1.over_space(self.norm1(x))
        x = x + self.attn2.to_token(context)
        return x + self.ff(self.norm3(x))


class SpatioTemporalTransformer(nn.Module):
    """Attention over space, then over time with frame numbers added; the two are blended."""

    def __init__(self, channels: int, heads: int, context_dim: int, per_group: int | None) -> None:
        super().__init__()
        self.norm = group_norm(channels, per_group, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim, over_time=False)])
        self.temporal_transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_dim, over_time=True)]
        )
        self.time_pos_embed = TimeEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Mixer(0.5)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, number: Tensor, query: Tensor | None) -> Tensor:
        """x [B, T, h, w, C], context [B, 1, D], number [T, C]: `sinusoid` of t, query [B, C] or None -> x's shape."""
        spatial = self.transformer_blocks[0](self.proj_in(normalize(self.norm, x)), context)
        number = self.time_pos_embed(number)[:, None, None]  # [T, 1, 1, C]
        temporal = self.temporal_transformer_blocks[0](spatial + number, context, query)
        alpha = self.time_mixer.mix_factor.sigmoid().to(spatial.dtype)
        mixed = torch.lerp(temporal.to(spatial.dtype), spatial, alpha)  # alpha spatial + (1 - alpha) temporal
        return x + self.proj_out(mixed)


BLOCKS = (SpatioTemporalResBlock, SpatioTemporalTransformer)  # of which the UNet consists, but for a few convolutions


# ----------------------------------------------------------------------------------------------------------------- UNet


class Level(nn.Module):
    """The layers of one resolution. `UNet.forward` and `VAE` run them; this only holds them under their names."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)


class UNet(nn.Module):
    """SVD's UNet (diffusers' UNetSpatioTemporalConditionModel); computes in the dtype of its weights.

    `gradient_checkpointing = True` recomputes every block in the backward pass: less memory, the same gradients.
    """

    CONFIG, STEM = UNetConfig, "diffusion_pytorch_model"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        widths, per_group = config.block_out_channels, config.channels_per_group
        embed_dim, layers, last = 4 * widths[0], config.layers_per_block, len(widths) - 1

        def resnet(in_channels: int, out_channels: int, eps: float) -> nn.Module:
            return SpatioTemporalResBlock(in_channels, out_channels, embed_dim, eps, eps, per_group)

        def attentions(i: int, count: int) -> list[nn.Module]:
            heads, context_dim = config.num_attention_heads[i], config.cross_attention_dim
            return [SpatioTemporalTransformer(widths[i], heads, context_dim, per_group) for _ in range(count)]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], embed_dim, embed_dim)
        self.add_embedding = TimeEmbedding(3 * config.addition_time_embed_dim, embed_dim, embed_dim)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, (width, attend) in enumerate(zip(widths, config.attention, strict=True)):
            sources = [widths[max(i - 1, 0)]] + [width] * (layers - 1)
            resnets = [resnet(source, width, 1e-6 if attend else 1e-5) for source in sources]
            self.down_blocks.append(Level(resnets, attentions(i, layers * attend)))
            if i < last:
                self.down_blocks[i].downsamplers = nn.ModuleList([Resample(width, stride=2)])
        self.mid_block = Level([resnet(widths[-1], widths[-1], 1e-5) for _ in range(2)], attentions(last, 1))
        for i in reversed(range(len(widths))):
            sources = [widths[min(i + 1, last)]] + [widths[i]] * layers
            skips = [widths[i]] * layers + [widths[max(i - 1, 0)]]
            resnets = [resnet(source + skip, widths[i], 1e-6) for source, skip in zip(sources, skips, strict=True)]
            level = Level(resnets, attentions(i, (layers + 1) * config.attention[i]))
            if i > 0:
                level.upsamplers = nn.ModuleList([Resample(widths[i])])
            self.up_blocks.append(level)
        self.conv_norm_out = group_norm(widths[0], per_group, eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def residual_channels(self) -> list[int]:
        """Channels of `residuals`, one number per level."""
        widths = self.config.block_out_channels
        return [widths[max(i - 1, 0)] for i in range(len(widths))]

    @property
    def temporal_query_channels(self) -> list[int]:
        """Channels of `temporal_query`, one number per temporal self-attention, in the order of `forward`."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [attention.proj_in.in_features for level in levels for attention in level.attentions]

    def embed(self, c_noise: Tensor, added_ids: Tensor) -> Tensor:
        """Noise level [B] and (fps - 1, motion bucket, noise augmentation) [B, 3] -> [B, E], already through silu."""
        noise = self.time_embedding(sinusoid(c_noise, self.config.block_out_channels[0]))
        added = self.add_embedding(sinusoid(added_ids, self.config.addition_time_embed_dim).flatten(1))
        return nnf.silu(noise + added)

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(
        self,
        sample: Tensor,
        c_noise: Tensor,
        context: Tensor,
        added_ids: Tensor,
        residuals: Sequence[Tensor] | None = None,
        temporal_query: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """sample [B, T, C, h, w], c_noise [B], context [B, 1, D], added_ids [B, 3] -> [B, T, C_out, h, w]; any h and w.

        residuals: one [B, T, C_i, h_i, w_i] per level, added to what enters level i (0: conv_in's output) before it is
        kept as a skip connection (Eq. 8 of Motion Dreamer).
        temporal_query: one [B, C_k] per temporal self-attention, added to all its queries.
        """
        if context.shape[1:] != (1, self.config.cross_attention_dim):
            expected = f"[B, 1, {self.config.cross_attention_dim}]"
            raise ValueError(f"context is {list(context.shape)}, expected {expected}: a single token")
        dtype = self.conv_in.weight.dtype
        emb, context = self.embed(c_noise, added_ids), context.to(dtype)  # [B, E], [B, 1, D]
        queries = iter(temporal_query or [None] * len(self.temporal_query_channels))
        frames = torch.arange(sample.shape[1], device=sample.device)
        numbers = {width: sinusoid(frames, width) for width in set(self.temporal_query_channels)}

        def attend(level: Level, i: int, x: Tensor) -> Tensor:
            if not level.attentions:
                return x
            return self.run(level.attentions[i], x, context, numbers[x.shape[-1]], next(queries))

        x = convolve(self.conv_in, sample.to(dtype).movedim(2, -1).contiguous())  # [B, T, h, w, C]
        skips = []
        for i, level in enumerate(self.down_blocks):
            if residuals is not None:
                x = x + residuals[i].to(x.dtype).movedim(2, -1)
            skips.append(x)
            for j, resnet in enumerate(level.resnets):
                x = attend(level, j, self.run(resnet, x, emb))
                skips.append(x)
            if i < len(self.down_blocks) - 1:
                x = level.downsamplers[0].down(x)  # [B, T, ceil(h/2), ceil(w/2), C]

        x = self.run(self.mid_block.resnets[0], x, emb)
        x = attend(self.mid_block, 0, x)
        x = self.run(self.mid_block.resnets[1], x, emb)

        for level in self.up_blocks:
            for j, resnet in enumerate(level.resnets):
                x = torch.cat([x, skips.pop()], dim=-1)
                x = attend(level, j, self.run(resnet, x, emb))
            if skips:
                x = level.upsamplers[0].up(x, *skips[-1].shape[2:4])

        x = normalize(self.conv_norm_out, x, silu=True)
        return convolve(self.conv_out, x).movedim(-1, 2).contiguous()

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained


# ------------------------------------------------------------------------------------------------------------------ VAE


class ImageAttention(Attention):
    """Single-head self-attention in the middle of encoder and decoder, with its own normalisation and residual."""

    def __init__(self, channels: int, per_group: int | None) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = group_norm(channels, per_group, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h, w, C] -> the same shape."""
        return x + self.over_space(normalize(self.group_norm, x))


class Encoder(nn.Module):
    """Images -> mean and log variance of the latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, per_group = config.block_out_channels, config.channels_per_group
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            sources = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(Level([ResBlock(s, width, None, 1e-6, per_group) for s in sources], []))
            if i < len(widths) - 1:
                self.down_blocks[i].downsamplers = nn.ModuleList([Resample(width, stride=2, padding=0)])
        resnets = [ResBlock(widths[-1], widths[-1], None, 1e-6, per_group) for _ in range(2)]
        self.mid_block = Level(resnets, [ImageAttention(widths[-1], per_group)])
        self.conv_norm_out = group_norm(widths[-1], per_group, eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, 3] -> [B, T, h, w, 2 C]."""
        x = convolve(self.conv_in, x)
        for level in self.down_blocks:
            for resnet in level.resnets:
                x = resnet(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0].down(x)
        x = self.mid_block.resnets[0](x)
        x = self.mid_block.attentions[0](x)
        x = self.mid_block.resnets[1](x)
        x = normalize(self.conv_norm_out, x, silu=True)
        return convolve(self.conv_out, x)


class TemporalDecoder(nn.Module):
    """Latents -> images; every block, and the last layer, also look at the frames before and after."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, per_group = config.block_out_channels, config.channels_per_group

        def resnet(in_channels: int, out_channels: int) -> nn.Module:
            return SpatioTemporalResBlock(in_channels, out_channels, None, 1e-6, 1e-5, per_group)

        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        resnets = [resnet(widths[-1], widths[-1]) for _ in range(config.layers_per_block)]
        self.mid_block = Level(resnets, [ImageAttention(widths[-1], per_group)])
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            sources = [widths[min(i + 1, len(widths) - 1)]] + [widths[i]] * config.layers_per_block
            level = Level([resnet(source, widths[i]) for source in sources], [])
            if i > 0:
                level.upsamplers = nn.ModuleList([Resample(widths[i])])
            self.up_blocks.append(level)
        self.conv_norm_out = group_norm(widths[0], per_group, eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.time_conv_out = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, z: Tensor) -> Tensor:
        """[B, T, h, w, C] -> [B, T, H, W, 3]."""
        x = self.mid_block.resnets[0](convolve(self.conv_in, z))
        for resnet in self.mid_block.resnets[1:2]:  # attention sits between two blocks: unused if there is one,
            x = resnet(self.mid_block.attentions[0](x))  # and a third is unused, as in the original
        for level in self.up_blocks:
            for resnet in level.resnets:
                x = resnet(x)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0].up(x, 2 * x.shape[2], 2 * x.shape[3])
        x = normalize(self.conv_norm_out, x, silu=True)
        return convolve_time(self.time_conv_out, convolve(self.conv_out, x))


class VAE(nn.Module):
    """SVD's image encoder and temporal decoder (diffusers' AutoencoderKLTemporalDecoder). Latents here are unscaled."""

    CONFIG, STEM = VAEConfig, "diffusion_pytorch_model"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.decoder = TemporalDecoder(config)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """What unscaled latents are multiplied with to be of unit size; `save_pretrained` keeps it."""
        return self.config.scaling_factor

    @scaling_factor.setter
    def scaling_factor(self, value: float) -> None:
        self.config = replace(self.config, scaling_factor=value)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W] in [-1, 1] -> mean and log variance of the posterior, each [N, C, h, w]."""
        pixels = images.to(self.quant_conv.weight.dtype).movedim(1, -1)[:, None]  # one frame each
        moments = convolve(self.quant_conv, self.encoder(pixels))[:, 0].movedim(-1, 1)
        mean, log_variance = moments.contiguous().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [-1, 1] -> mode of the posterior [N, C, h, w], unscaled."""
        return self.moments(images)[0]

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Unscaled latents [B, T, C, h, w] -> images [B, T, 3, H, W], `chunk` frames at a time (None: all).

        Frames of different chunks do not see each other: smaller chunks need less memory and flicker more.
        """
        z = latents.to(self.decoder.conv_in.weight.dtype).movedim(2, -1)
        images = [self.decoder(part) for part in z.split(chunk or z.shape[1], dim=1)]
        return torch.cat(images, dim=1).movedim(-1, 2).contiguous()

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained


def frames_that_fit(vae: VAE, part: nn.Module, frames: int, pixels: int, device: torch.device) -> int:
    """How many of `frames` frames of so many pixels the encoder or decoder should take at once: on CUDA equal parts
    that free memory has room for, or one frame; elsewhere all.

    At full size a layer has as many channels as the second level. Decoding takes 2.9 such layers a frame (a count from
    14 frames of 576x1024 on an H200, at commit 05d9df5); 4 leaves room.
    """
    if device.type != "cuda":
        return frames
    unused = torch.cuda.memory_reserved(device)  # torch keeps it for later,
    if part.conv_in.weight.is_cuda:  # and sample.py --offload sends away what is there, before this part comes
        unused -= torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    layer = vae.config.block_out_channels[:2][-1] * pixels * part.conv_in.weight.element_size()  # bytes of one frame
    return math.ceil(frames / math.ceil(frames / max(1, free // (4 * layer))))


def without_effect(network: nn.Module) -> list[nn.Parameter]:
    """Parameters of UNet or VAE that are there because SVD's files have them. They need no gradient.

    Of cross-attention to one token, query and key: the softmax is 1, whatever they are (`norm2` serves that query
    alone). In the middle of the decoder, attention if there is one block, and blocks after the second.
    """
    blocks = [module for module in network.modules() if isinstance(module, TransformerBlock)]
    idle = [part for block in blocks for part in (block.norm2, block.attn2.to_q, block.attn2.to_k)]
    for middle in (module.mid_block for module in network.modules() if isinstance(module, TemporalDecoder)):
        idle += middle.attentions if len(middle.resnets) == 1 else middle.resnets[2:]
    return [value for part in idle for value in part.parameters()]


def encode_video(vae: VAE, pictures: Tensor, factor: int, chunk: int = 64) -> Tensor:
    """[B, T, 3, H, W] -> latents of unit size [B, T, C, H / factor, W / factor] (scaled here and in `decode_video`,
    nowhere else), `chunk` pictures at a time, or fewer if memory is short.

    factor: a multiple of the VAE's. Where it is more, neighbouring latents become channels of one cell: a UNet on
    half the height and width does a quarter of the arithmetic, which small models from nothing need.
    """
    flat = rearrange(pictures, "b t c h w -> (b t) c h w")
    fit = frames_that_fit(vae, vae.encoder, len(flat), flat[0, 0].numel(), flat.device)
    latents = torch.cat([vae.encode(part) for part in flat.split(min(chunk, fit))])
    latents = nnf.pixel_unshuffle(latents, factor // vae.factor) * vae.scaling_factor
    return rearrange(latents, "(b t) c h w -> b t c h w", b=len(pictures))


def decode_video(vae: VAE, latents: Tensor, factor: int, chunk: int | None = None) -> Tensor:
    """The inverse of `encode_video`: -> pictures [B, T, 3, H, W], in float32 whatever the decoder computes in. `chunk`
    as in `VAE.decode`; None: what fits into memory. A value that is not finite is a FloatingPointError."""
    z = nnf.pixel_shuffle(latents, factor // vae.factor) / vae.scaling_factor
    if chunk is None:
        pixels = len(z) * z[0, 0, 0].numel() * vae.factor**2  # of a frame of every clip
        chunk = frames_that_fit(vae, vae.decoder, z.shape[1], pixels, z.device)
    pictures = vae.decode(z, chunk).float()
    if not torch.isfinite(pictures).all():
        raise FloatingPointError("the VAE's decoder makes a value that is not finite; half precision? then try fp32")
    return pictures


def gaussian(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard normal numbers for a device, drawn where the generator lives; on the CPU if there is none. (A CPU takes
    as long to draw those of a small model's step as a GPU to do the step.)"""
    home = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=home).to(device)


# --------------------------------------------------------------------------------------------------- CLIP image encoder


def resize_antialiased(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, C, size, size]: Gaussian blur, sigma = (H / size - 1) / 2, then bicubic, corners aligned."""
    for axis in (-1, -2):
        sigma = max((images.shape[axis] / size - 1) / 2, 0.001)
        radius = int(max(4 * sigma, 3)) // 2
        offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, 1, 1, -1) if axis == -1 else (1, 1, -1, 1))
        pad = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
        channels = images.shape[1]
        images = nnf.conv2d(nnf.pad(images, pad, mode="reflect"), kernel.expand(channels, -1, -1, -1), groups=channels)
    return nnf.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)


class ImageEmbeddings(nn.Module):
    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, image_size, image_size] -> [B, 1 + patches, C]."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class ImageLayer(nn.Module):
    """One pre-norm transformer layer: self-attention, then a two-layer perceptron."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        y = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{i}_proj"](y), "b s (n c) -> b n s c", n=self.heads) for i in "qkv")
        y = nnf.scaled_dot_product_attention(q, k, v)
        x = x + self.self_attn["out_proj"](rearrange(y, "b n s c -> b s (n c)"))
        return x + self.mlp["fc2"](nnf.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class ImageEncoder(nn.Module):
    """CLIP's image tower with its projection (transformers' CLIPVisionModelWithProjection)."""

    CONFIG, STEM = ImageEncoderConfig, "model"

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # RGB in [0, 1], of CLIP

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList(ImageLayer(config) for _ in range(config.num_hidden_layers))
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": ImageEmbeddings(config),
                "pre_layrnorm": nn.LayerNorm(config.hidden_size),  # the checkpoint's spelling
                "encoder": nn.ModuleDict({"layers": layers}),
                "post_layernorm": nn.LayerNorm(config.hidden_size),
            }
        )
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 3, image_size, image_size]: resized as in SVD, normalised as in CLIP."""
        resized = resize_antialiased(images.float(), self.config.image_size)
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return ((resized + 1) / 2 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> the context token [B, 1, D]."""
        tower = self.vision_model
        x = tower["pre_layrnorm"](tower["embeddings"](self.preprocess(images).to(self.visual_projection.weight.dtype)))
        for layer in tower["encoder"]["layers"]:
            x = layer(x)
        return self.visual_projection(tower["post_layernorm"](x[:, :1]))

    from_pretrained = classmethod(from_pretrained)
    save_pretrained = save_pretrained


# -------------------------------------------------------------------------------------- less memory than all parts need


class TakeTurns:
    """From now on one of these networks lies on the device, the one that computes; the others wait on the CPU.

    A network comes in when it or a part of it is called (a VAE and a stage are called by their parts).
    """

    def __init__(self, networks: Sequence[nn.Module], device: Device) -> None:
        self.device, self.inside = device, None
        for network in networks:
            for door in (network, *network.children()):
                door.register_forward_pre_hook(partial(self.enter, network))

    def enter(self, network: nn.Module, *_: object) -> None:
        if network is self.inside:
            return
        if self.inside is not None:
            self.inside.to("cpu")
        self.inside = network.to(self.device)


# ------------------------------------------------------------------------------------------------- plain image-to-video


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """Noise levels [steps + 1] from sigma_max down to sigma_min, then 0 (Karras et al. 2022, Equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)]).float()


@torch.no_grad()
def image_to_video(
    unet: UNet, vae: VAE, image_encoder: ImageEncoder, image: Tensor, *, frames: int, steps: int = 25, fps: float = 7,
    motion_bucket_id: float = 127, noise_aug: float = 0.02, guidance: tuple[float, float] = (1.0, 3.0),
    latents: Tensor | None = None, generator: torch.Generator | None = None, decode_chunk: int | None = None
) -> Tensor:  # fmt: skip
    """Plain SVD: image [B, 3, H, W] in [-1, 1] (multiples of the VAE's factor) -> video [B, T, 3, H, W] in [-1, 1].

    Guidance rises linearly from the first to the last frame. `latents`: unit noise [B, T, C, h, w] to start from. The
    VAE's encoder should be in float32: it overflows in half precision. Its decoder need not. decode_chunk: frames that
    are decoded at once; None: what fits into memory. Raises the ValueErrors of clips/tensors.py.
    """
    check_image(image, vae.factor)
    check_sampler(frames, steps, guidance, generator)
    check_svd({"fps": fps, "motion_bucket_id": motion_bucket_id, "noise_aug": noise_aug}, decode_chunk)
    batch, device = len(image), image.device
    context = image_encoder(image)
    noisy = image + noise_aug * gaussian(image.shape, generator, device).to(image)
    first = vae.encode(noisy)[:, None].expand(-1, frames, -1, -1, -1).float()  # [B, T, C, h, w], not scaled
    latents = gaussian(first.shape, generator, device) if latents is None else latents
    check_numbers("latents", latents, first.shape)
    added_ids = torch.tensor([[fps - 1, motion_bucket_id, noise_aug]], device=device).expand(batch, -1)
    sigmas = karras_sigmas(steps).to(device)
    scale = torch.linspace(*guidance, frames, device=device).view(1, -1, 1, 1, 1)
    x = latents.to(device).float() * (sigmas[0] ** 2 + 1).sqrt()

    @Replayed
    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        scaled, c_noise = x / (sigma**2 + 1).sqrt(), (sigma.log() / 4).expand(batch)
        v = unet(torch.cat([scaled, first], dim=2), c_noise, context, added_ids).float()
        if tuple(guidance) != (1, 1):
            no_image = torch.cat([scaled, torch.zeros_like(first)], dim=2)
            v_free = unet(no_image, c_noise, torch.zeros_like(context), added_ids).float()
            v = v_free + scale * (v - v_free)
        return x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt()

    for i, sigma in enumerate(sigmas[:-1]):
        x0 = predict(x, sigma)
        check_step(x0, "plain SVD", i, steps)
        x = x + (x - x0) / sigma * (sigmas[i + 1] - sigma)
    del predict  # and what its recording keeps of a GPU's memory
    return decode_video(vae, x, vae.factor, decode_chunk).clamp(-1, 1)
