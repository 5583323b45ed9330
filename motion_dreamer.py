"""Motion Dreamer (arXiv 2412.00547 v1): two video diffusion stages on Stable Video Diffusion (SVD). Read this file
first.

Stage I reasons about motion. It is told the first frame I_0, its segmentation S_0 and depth D_0, and a few arrows, and
generates the motion representation R_t = (O_t, S_t, D_t) of every frame: optical flow, instance segmentation, depth.
Stage II paints R_t into RGB video. Between the two, R_t can be looked at and edited.

    first frame, S_0, D_0 --- VAE ---> first-frame latents ----------------+
    I_0 ------------- CLIP image tower ---> token (+ camera) -----------+  |
    arrows -> F (instance_flow.py) -> W^(s) = Softsplat(C^(s), F^(s)) -+ | |
                                                                       v v v
    noise x_t -------------------------------------------------------> UNet -> R_t --- Stage II ---> I_t

Symbols, as in the paper where it has them:
    B T C H W     batch, frames, channels, height and width in pixels; h = H/f, w = W/f latent cells of a VAE of
    factor f
    I_t O_t S_t D_t   RGB frame, optical flow (t -> t+1), instance ids, depth of frame t
    R_t           (O_t, S_t, D_t); each is rendered as a picture (clips/pictures.py) and encoded by the VAE
    x_0, x_t      clean and noisy latents of what a stage predicts: x_t = x_0 + sigma * noise
    F             (masked) instance flow [B, 2, H, W] in pixels per frame step (Eq. 3, 4, 9)
    C^(s), W^(s)  first-frame features at scale s, and the same warped by F (Eq. 6-8)
    M'            motion mask (Eq. 11);  lambda weight of the motion enhancement loss (Eq. 12, Algorithm 1)
    c, e_cam      camera motion [B, 2] and its encoding [B, 1, D] (supplement, section 7)

Try it: `python sample.py`. Train it: `python train.py --stage 1 ...`, see train.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as nnf
from einops import rearrange, repeat
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clips.pictures import (
    depth_to_picture,
    flow_to_picture,
    picture_to_depth,
    picture_to_flow,
    picture_to_segmentation,
    segmentation_to_picture,
)
from instance_flow import instance_flow, motion_mask, random_mask, sparse_flow
from splat import softsplat
from svd import VAE, ImageEncoder, UNet, UNetConfig, karras_sigmas
from weights import load_strict, resolve_source, save_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------------------ what a stage is


@dataclass(frozen=True)
class StageConfig:
    """What a stage predicts and what it is told. Every model of the paper's tables is one of these."""

    predict: tuple[str, ...] = ("flow", "segmentation", "depth")  # noisy latents, in this order of channels
    given: tuple[str, ...] = ()  # latents of every frame that are known
    first_frame: tuple[str, ...] = ("rgb", "segmentation", "depth")  # latents of frame 0 that are known
    parameterization: str = "x0"  # "x0" (Eq. 5, Stage I) or "v" (Stage II)
    control: str = "instance_flow"  # "instance_flow", "sparse_flow" (Table 3, as in MOFA-Video) or "none"
    reduce: str = "instance"  # Eq. 2: an object's mean ("instance"), each pixel's ("pixel"), the first step's ("start")
    mask_unit: str = "instance"  # Eq. 9 per "instance", "pixel" or (literally) "element"
    mask_ratio: float = 0.5  # p of Eq. 9
    mask_keep_one: bool = True  # never hide the last moving object: no arrow at all then means that nothing moves
    mask_start: float = 0.0  # share of clips that show the arrows of what moves at once (the push), and no other
    still_ratio: float = 0.0  # share of clips shown as if nobody had pushed: no arrow, nothing moves (scenes at rest)
    splat_time: str = "linear"  # frame t is warped by t F ("linear") or by F ("constant", Eq. 7 literally)
    show_flow: bool = False  # C^(s) sees F too, not only I_0, S_0, D_0
    motion_weight: float = 1.0  # lambda of Algorithm 1
    motion_threshold: float = 0.1  # tau of Eq. 11, pixels per frame step
    predict_change: bool = False  # the network denoises the change since frame 0 (where that is known), not x_0 itself
    draft: bool = False  # Stage II sees and corrects a draft of every frame (`draft_video`) for I_0's latents
    keep_first_frame: bool = True  # I_0, S_0, D_0 are known: the sampler puts them back instead of sampling them
    sigma_mean: float = 0.7  # ln sigma ~ N(sigma_mean, sigma_std^2) in training
    sigma_std: float = 1.6
    sigma_max: float = 700.0  # where sampling starts
    latent_channels: int = 4
    vae_factor: int = 8  # f: the scales of Eq. 6 are f, 2f, 4f, 8f (times patch)
    patch: int = 1  # the UNet takes patch x patch latents as one cell: a quarter of the arithmetic
    frames: int = 14  # what the stage was trained on; sample.py's defaults
    width: int = 512
    height: int = 320
    fps: float = 7.0

    def __post_init__(self) -> None:
        choices = {
            "parameterization": ("x0", "v"),
            "control": ("instance_flow", "sparse_flow", "none"),
            "reduce": ("instance", "pixel", "start"),
            "mask_unit": ("instance", "pixel", "element"),
            "splat_time": ("linear", "constant"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.draft and not (self.predict == self.first_frame == ("rgb",) and "segmentation" in self.given):
            raise ValueError("draft is True, but only a Stage II that is given the segmentation can have one")

    @property
    def cell(self) -> int:
        """Pixels of a side of what the UNet sees as one cell."""
        return self.vae_factor * self.patch

    @property
    def in_channels(self) -> int:
        return self.latent_channels * (len(self.predict) + len(self.first_frame) + len(self.given)) * self.patch**2

    @property
    def out_channels(self) -> int:
        return self.latent_channels * len(self.predict) * self.patch**2


STAGE1 = StageConfig()
STAGE2 = StageConfig(
    predict=("rgb",),
    given=("flow", "segmentation", "depth"),
    first_frame=("rgb",),
    parameterization="v",
    motion_weight=0.0,
)
# One-stage* of Table 1: the same inputs, no motion representation between.
ONE_STAGE = StageConfig(predict=("rgb",), parameterization="v")


def _without(modality: str) -> tuple[StageConfig, StageConfig]:
    kept = tuple(name for name in STAGE1.predict if name != modality)
    return replace(STAGE1, predict=kept), replace(STAGE2, given=kept)


# The rows of Table 3, each a pair of stages.
ABLATIONS: dict[str, tuple[StageConfig, StageConfig]] = {
    "motion_dreamer": (STAGE1, STAGE2),
    "without_segmentation": _without("segmentation"),
    "without_depth": _without("depth"),
    "without_flow": _without("flow"),
    "without_motion_loss": (replace(STAGE1, motion_weight=0.0), STAGE2),
    "sparse_flow": (replace(STAGE1, control="sparse_flow"), replace(STAGE2, control="sparse_flow")),
}


# ----------------------------------------------------------------------- R_t as pictures, pictures as latents, and back


@dataclass
class Motion:
    """R_t of a batch: flow [B, T, 2, H, W] in pixels, segmentation and depth [B, T, H, W]; None = absent."""

    flow: Tensor | None
    segmentation: Tensor | None
    depth: Tensor | None

    def save(self, path: str | os.PathLike) -> None:
        """`motion.safetensors`: the file between the stages, for looking at and editing."""
        parts = {name: value.cpu().contiguous() for name, value in vars(self).items() if value is not None}
        partial = Path(f"{path}.partial")
        save_file(parts, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Motion:
        """Raises ValueError that names the file when it is missing, damaged, misshapen or holds NaN."""
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except Exception as error:
            raise ValueError(f"{path}: {error}") from None
        unknown = set(parts) - {"flow", "segmentation", "depth"}
        if unknown or not parts:
            raise ValueError(
                f"{path}: holds {', '.join(sorted(parts)) or 'nothing'}, expected flow, segmentation, depth"
            )
        for name, value in parts.items():
            if value.ndim != (5 if name == "flow" else 4):
                raise ValueError(f"{path}: {name} has shape {list(value.shape)}")
            if not torch.isfinite(value.float()).all():
                raise ValueError(f"{path}: {name} holds a value that is not finite")
        return cls(**{name: parts.get(name) for name in ("flow", "segmentation", "depth")})


def render(modality: str, value: Tensor, first: Tensor | None = None) -> Tensor:
    """A modality [B, T, ...] as pictures [B, T, 3, H, W]; `first` is S_0 or D_0 [B, H, W]: sets colours and scale."""
    if modality == "rgb":
        return value
    if modality == "flow":
        return flow_to_picture(value)
    codec = {"segmentation": segmentation_to_picture, "depth": depth_to_picture}[modality]
    firsts = [None] * len(value) if first is None else first
    return torch.stack([codec(v, f) for v, f in zip(value, firsts, strict=True)])


def unrender(modality: str, pictures: Tensor, first: Tensor | None = None) -> Tensor:
    """The inverse of `render`."""
    if modality == "rgb":
        return pictures
    if modality == "flow":
        return picture_to_flow(pictures)
    codec = {"segmentation": picture_to_segmentation, "depth": picture_to_depth}[modality]
    firsts = [None] * len(pictures) if first is None else first
    return torch.stack([codec(p, f) for p, f in zip(pictures, firsts, strict=True)])


def draft_video(image: Tensor, segmentation: Tensor) -> Tensor:
    """I_0 [B, 3, H, W] and S_t [B, T, H, W] -> [B, T, 3, H, W]: I_0, on which whatever pixel has come to another object
    has the mean colour that this object has in I_0. Not in the paper; a small Stage II need only correct it.

    An object that I_0 does not show gets the mean colour of the background.
    """
    ids, first = segmentation.flatten(1), segmentation[:, 0].flatten(1)
    count = int(segmentation.max()) + 1
    member = nnf.one_hot(first, count).to(image)  # [B, H W, ids]
    size = member.sum(dim=1)[:, None]
    mean = image.flatten(2) @ member / size.clamp(min=1)  # [B, 3, ids]
    mean = torch.where(size > 0, mean, mean[:, :, :1])
    painted = mean.gather(2, ids[:, None].expand(-1, 3, -1)).view(len(image), 3, *segmentation.shape[1:])
    stays = (segmentation == segmentation[:, :1])[:, None]
    return rearrange(torch.where(stays, image[:, :, None], painted), "b c t h w -> b t c h w")


def encode(vae: VAE, pictures: Tensor) -> Tensor:
    """[B, T, 3, H, W] -> latents [B, T, C, h, w] of unit size: scaled here and in `decode`, nowhere else."""
    latents = vae.encode(rearrange(pictures, "b t c h w -> (b t) c h w"))
    return rearrange(latents, "(b t) c h w -> b t c h w", b=len(pictures)) * vae.scaling_factor


def decode(vae: VAE, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Latents of unit size [B, T, C, h, w] -> pictures [B, T, 3, H, W]."""
    return vae.decode(latents / vae.scaling_factor, chunk)


def round_trip(vae: VAE, modality: str, value: Tensor, first: Tensor | None = None) -> Tensor:
    """A modality [B, T, ...] through the VAE and back: no stage that uses this VAE can do better."""
    return unrender(modality, decode(vae, encode(vae, render(modality, value, first))), first)


# ----------------------------------------------------------------------------------------------- conditions and batches


@dataclass
class Condition:
    """Everything a stage is told. What is absent (dropped in training, or not given by the user) is zero."""

    first_pictures: Tensor  # [B, 9, H, W]        I_0, S_0, D_0 as pictures, for C^(s)
    first_latents: Tensor  # [B, C n, h, w]       the VAE's posterior modes of `first_frame`, not scaled (as in SVD)
    known: Tensor  # [B, C p, h, w]               scaled latents of frame 0 of what is predicted; NaN where not known
    given: Tensor  # [B, T, C g, h, w]            scaled latents of every frame (Stage II: R_t)
    draft: Tensor  # [B, T, C, h, w]              scaled latents of `draft_video`; C is 0 without
    token: Tensor  # [B, 1, D]                    CLIP image token
    added_ids: Tensor  # [B, 3]                   fps - 1, motion bucket, noise augmentation
    F: Tensor  # [B, 2, H, W]                     instance flow, masked or from arrows
    camera: Tensor  # [B, 2]                      c

    def without_image(self) -> Condition:
        """The unconditional half of classifier-free guidance: no image token, no first-frame latents (as SVD)."""
        zeros = {name: torch.zeros_like(getattr(self, name)) for name in ("token", "first_latents", "draft")}
        return replace(self, **zeros, known=torch.full_like(self.known, math.nan))


@dataclass
class Batch:
    """One training step: x_0 and what the stage is told about it."""

    x0: Tensor  # [B, T, C p, h, w]
    condition: Condition


@torch.no_grad()
def encode_clips(clips: dict[str, Tensor], vae: VAE, image_encoder: ImageEncoder, seed: int = 0) -> dict[str, Tensor]:
    """A batch of clips (`Clip.tensors`, stacked) -> all that training needs of them, whatever the stage; can be
    cached.

    Latents of the four modalities and of the draft [B, T, C, h, w], first-frame pictures [B, 9, H, W], image token,
    instance flow in both readings, of the first step alone, and sparse [B, 2, H, W], S_0, camera, fps, motion bucket.
    """
    first = {"rgb": None, "flow": None, "segmentation": clips["segmentation"][:, 0], "depth": clips["depth"][:, 0]}
    pictures = {name: render(name, clips[name], first[name]) for name in first}
    pictures["draft"] = draft_video(clips["rgb"][:, 0], clips["segmentation"])
    sparse = torch.Generator().manual_seed(seed)
    return {f"latents.{name}": encode(vae, picture) for name, picture in pictures.items()} | {
        "first_pictures": torch.cat([pictures[name][:, 0] for name in ("rgb", "segmentation", "depth")], dim=1),
        "token": image_encoder(clips["rgb"][:, 0]),
        "F.instance": instance_flow(clips["flow"], clips["segmentation"]),
        "F.start": instance_flow(clips["flow"], clips["segmentation"], reduce="start"),
        "F.pixel": instance_flow(clips["flow"], clips["segmentation"][:, 0], reduce="pixel"),
        "F.sparse": sparse_flow(clips["flow"], clips["segmentation"][:, 0], points=8, generator=sparse),
        "segmentation": first["segmentation"],
        **{name: clips[name] for name in ("camera", "fps", "motion_bucket")},
    }


def gaussian(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard normal numbers for training. On a GPU they are drawn there (a CPU takes as long as a small step), from a
    seed that the generator draws: they stay a function of its state."""
    if device.type == "cpu" or generator is None:
        return torch.randn(shape, generator=generator).to(device)
    seed = int(torch.randint(1 << 62, (1,), generator=generator))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def moves_at_once(start: Tensor) -> Tensor:
    """[B, 2, H, W], each object's flow in the first step -> [B, 1, H, W] of 0/1: objects at least half as fast as the
    fastest. They are what was pushed; what they hit moves later."""
    speed = start.norm(dim=1, keepdim=True)
    return ((speed > 0) & (2 * speed >= speed.amax(dim=(1, 2, 3), keepdim=True))).float()


def at_rest(modality: str, latents: Tensor, vae: VAE, rgb: Tensor) -> Tensor:
    """Latents [B, T, C, h, w] of a clip -> those of the same scene in which nothing moves: flow 0, all else as in frame
    0 (rgb [B, 3, H, W] has its size)."""
    first = latents[:, :1]
    if modality == "flow":
        first = encode(vae, render("flow", torch.zeros_like(rgb[:1, None, :2])))
    return first.expand_as(latents)


def training_batch(
    config: StageConfig, encoded: dict[str, Tensor], vae: VAE, generator: torch.Generator, drop: float = 0.1
) -> Batch:
    """Algorithm 1, lines 2-4: conditions of encoded clips with random masking (Eq. 9) and random dropping.

    With probability `drop` each, and for each clip by itself: image token and first-frame latents together (for
    guidance); S_0; D_0 (so that a user may leave them out). The first RGB frame is encoded with noise of its own, of
    log-normal size.
    """
    batch, device = len(encoded["token"]), encoded["token"].device

    def keep() -> Tensor:
        return (torch.rand(batch, generator=generator) >= drop).float().to(device)

    rgb, *maps = encoded["first_pictures"].split(3, dim=1)
    noise_aug = (torch.randn(batch, generator=generator) * 0.5 - 3).exp().to(device)  # around SVD's 0.02 .. 0.1
    noise = gaussian(rgb.shape, generator, device)
    first = {"rgb": vae.encode(rgb + noise_aug.view(-1, 1, 1, 1) * noise)}
    pictures, image_kept = [rgb], keep().view(-1, 1, 1, 1)
    known = {"rgb": image_kept, "flow": 0 * image_kept}
    for name, picture in zip(("segmentation", "depth"), maps, strict=True):
        kept = keep().view(-1, 1, 1, 1)
        first[name] = encoded[f"latents.{name}"][:, 0] / vae.scaling_factor * kept
        pictures.append(picture * kept)
        known[name] = kept * image_kept
    F = encoded["F.sparse" if config.control == "sparse_flow" else f"F.{config.reduce}"]
    pushed = F * moves_at_once(encoded["F.start"])
    if config.control == "instance_flow":
        F, _ = random_mask(
            F, config.mask_ratio, config.mask_unit, encoded["segmentation"], generator, keep_one=config.mask_keep_one
        )
    if config.mask_start > 0:
        shown = torch.rand(batch, generator=generator) < config.mask_start
        F = torch.where(shown.view(-1, 1, 1, 1).to(device), pushed, F)
    drafts = ("draft",) if config.draft else ()
    latents = {name: encoded[f"latents.{name}"] for name in (*config.predict, *config.given, *drafts)}
    if config.still_ratio > 0:
        still = (torch.rand(batch, generator=generator) < config.still_ratio).view(-1, 1, 1, 1).to(device)
        F = torch.where(still, 0.0, F)
        latents = {n: torch.where(still[:, None], at_rest(n, v, vae, rgb), v) for n, v in latents.items()}
    x0 = torch.cat([latents[name] for name in config.predict], dim=2)
    condition = Condition(
        first_pictures=torch.cat(pictures, dim=1),
        first_latents=torch.cat([first[name] for name in config.first_frame], dim=1) * image_kept,
        known=torch.cat([latents[n][:, 0].where(known[n] > 0, math.nan) for n in config.predict], dim=1),
        given=torch.cat([x0[:, :, :0], *(latents[name] for name in config.given)], dim=2),
        draft=torch.cat([x0[:, :, :0], *(latents[name] for name in drafts)], dim=2) * image_kept[:, None],
        token=encoded["token"] * image_kept[:, 0],
        added_ids=torch.stack([encoded["fps"] - 1, encoded["motion_bucket"], noise_aug], dim=1),
        F=F,
        camera=encoded["camera"],
    )
    return Batch(x0, condition)


@torch.no_grad()
def sampling_condition(
    config: StageConfig,
    vae: VAE,
    image_encoder: ImageEncoder,
    image: Tensor,
    segmentation: Tensor | None,
    depth: Tensor | None,
    F: Tensor,
    camera: Tensor | None = None,
    motion: Motion | None = None,
    *,
    frames: int,
    fps: float = 7.0,
    motion_bucket: float = 127.0,
    noise_aug: float = 0.02,
    generator: torch.Generator | None = None,
) -> Condition:
    """What a user gives -> Condition. image [B, 3, H, W], segmentation and depth [B, H, W] or None, F [B, 2, H, W]."""
    batch, device = len(image), image.device
    firsts = {"rgb": None, "segmentation": segmentation, "depth": depth}
    values = {"rgb": image, "segmentation": segmentation, "depth": depth}
    pictures = {
        n: torch.zeros_like(image) if v is None else render(n, v[:, None], firsts[n])[:, 0] for n, v in values.items()
    }
    noise = torch.randn(image.shape, generator=generator).to(image)
    noisy = pictures | {"rgb": image + noise_aug * noise}
    latents = {name: vae.encode(noisy[name]) * (values[name] is not None) for name in config.first_frame}
    unknown = torch.full_like(latents["rgb"], math.nan)
    known = [
        encode(vae, pictures[name][:, None])[:, 0]
        if config.keep_first_frame and values.get(name) is not None
        else unknown
        for name in config.predict
    ]
    nothing = unknown[:, None, :0].expand(-1, frames, -1, -1, -1)
    given = [encode(vae, render(name, getattr(motion, name), firsts.get(name))) for name in config.given]
    draft = [encode(vae, draft_video(image, motion.segmentation))] if config.draft else []
    return Condition(
        first_pictures=torch.cat(list(pictures.values()), dim=1),
        first_latents=torch.cat(list(latents.values()), dim=1),
        known=torch.cat(known, dim=1),
        given=torch.cat([nothing, *given], dim=2),
        draft=torch.cat([nothing, *draft], dim=2),
        token=image_encoder(image),
        added_ids=torch.tensor([[fps - 1, motion_bucket, noise_aug]], device=device).repeat(batch, 1),
        F=F,
        camera=torch.zeros(batch, 2, device=device) if camera is None else camera,
    )


# --------------------------------------------------------------------------- instance flow into the network (Eq. 6 - 8)


class FlowControl(nn.Module):
    """W^(s) = Softsplat(C^(s), F^(s)) at every scale of the UNet (Eq. 6, 7).

    C^(s) comes from a small convolutional pyramid over I_0, S_0 and D_0. Its last convolutions start at zero, so
    that a new stage starts as plain SVD. The importance metric of softmax splatting, which the paper leaves open, is
    one more learned channel of the pyramid: it says which of two features that meet is in front.
    """

    def __init__(self, channels: list[int], config: StageConfig) -> None:
        super().__init__()
        self.cell, self.splat_time = config.cell, config.splat_time
        self.sparse, self.show_flow = config.control == "sparse_flow", config.show_flow
        widths = [max(16, c // 4) for c in channels]
        stem = [nn.Conv2d(11 if self.show_flow else 9, widths[0], 3, padding=1)]
        for _ in range(int(math.log2(self.cell))):
            stem += [nn.SiLU(), nn.Conv2d(widths[0], widths[0], 3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)
        self.down = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in pairwise(widths)
        )
        self.features = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, channels, strict=True))
        self.metrics = nn.ModuleList(nn.Conv2d(a, 1, 1) for a in widths)
        for layer in self.features:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, first_pictures: Tensor, F: Tensor, frames: int) -> list[Tensor]:
        """[B, 9, H, W], [B, 2, H, W] -> one W^(s) [B, T, C_s, h_s, w_s] per scale."""
        time = torch.arange(frames, device=F.device) if self.splat_time == "linear" else F.new_ones(frames)
        seen = [first_pictures, torch.asinh(F)] if self.show_flow else [first_pictures]
        x, warped = self.stem(torch.cat(seen, dim=1)), []
        for level, (features, metric) in enumerate(zip(self.features, self.metrics, strict=True)):
            if level > 0:
                x = self.down[level - 1](x)
            F_s = resize_flow(F, self.cell * 2**level, x.shape[-2:], self.sparse)
            F_t = rearrange(time.view(-1, 1, 1, 1) * F_s[:, None], "b t c h w -> (b t) c h w")
            C_s = nnf.silu(x)
            W_s = softsplat(features(C_s), F_t, metric(C_s))
            warped.append(rearrange(W_s, "(b t) c h w -> b t c h w", t=frames))
        return warped


def resize_flow(F: Tensor, s: int, size: tuple[int, int], sparse: bool = False) -> Tensor:
    """F^(s) = 1/s Resize(F, H/s, W/s) (Eq. 6), by area average, so that a thin object is not lost.

    A sparse F is averaged over its non-zero pixels only: a lone vector would all but vanish among zeros.
    """
    mean = nnf.adaptive_avg_pool2d(F.float(), size)
    if sparse:
        mean = mean / nnf.adaptive_avg_pool2d((F != 0).any(1, keepdim=True).float(), size).clamp(min=1e-6)
    return mean / s


class CameraEncoder(nn.Module):
    """e_cam (supplement, section 7), added to the image token and to the queries of every temporal self-attention.

    SVD's context is one token, so the softmax of its cross-attention is 1 whatever query and key are: e_cam acts there
    through the values. In temporal self-attention, a constant added to every key shifts all logits of a query alike and
    cancels in the softmax; therefore e_cam goes to the queries. All of it starts at zero.
    """

    def __init__(self, context_dim: int, query_channels: list[int]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 256), nn.SiLU(), nn.Linear(256, context_dim))
        self.queries = nn.ModuleList(nn.Linear(context_dim, c, bias=False) for c in query_channels)
        for layer in (self.mlp[-1], *self.queries):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, camera: Tensor) -> tuple[Tensor, list[Tensor]]:
        """c [B, 2] -> e_cam [B, 1, D], and one query offset [B, C_i] per temporal attention."""
        e_cam = self.mlp(camera)
        return e_cam[:, None], [query(e_cam) for query in self.queries]


# -------------------------------------------------------------------------------------------- diffusion: Eq. 5, 10 - 12


def precondition(sigma: Tensor, parameterization: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise and the loss weight of a noise level; used by the loss and by the sampler.

    x_0 = c_skip x_t + c_out UNet(c_in x_t, c_noise). "v" is SVD's; "x0" is Eq. 5: the network returns x_0 itself.
    """
    c_in, c_noise = (sigma**2 + 1).rsqrt(), sigma.log() / 4
    if parameterization == "v":
        return 1 / (sigma**2 + 1), -sigma * c_in, c_in, c_noise, (sigma**2 + 1) / sigma**2
    if parameterization == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise, torch.ones_like(sigma)
    raise ValueError(f"parameterization is {parameterization!r}, expected 'x0' or 'v'")


class MotionDreamer(nn.Module):
    """One stage: SVD's UNet with more input channels, plus instance flow and camera motion. Which stage: `config`."""

    def __init__(self, stage_config: StageConfig, unet_config: UNetConfig) -> None:
        super().__init__()
        self.config = stage_config
        self.unet = UNet(
            replace(unet_config, in_channels=stage_config.in_channels, out_channels=stage_config.out_channels)
        )
        if stage_config.control != "none":
            self.flow_control = FlowControl(self.unet.residual_channels, stage_config)
        self.camera = CameraEncoder(unet_config.cross_attention_dim, self.unet.temporal_query_channels)

    def control(self, cond: Condition, frames: int) -> tuple[list[Tensor] | None, Tensor, list[Tensor]]:
        """What does not depend on the noise, computed once per clip: W^(s), context, camera offsets of the queries."""
        warped = None
        if self.config.control != "none":
            warped = self.flow_control(cond.first_pictures, cond.F, frames)
        e_cam, queries = self.camera(cond.camera)
        return warped, cond.token + e_cam, queries  # H' = H + e_cam

    def denoise(self, x: Tensor, sigma: Tensor, cond: Condition, control: tuple | None = None) -> Tensor:
        """x_t [B, T, C p, h, w], sigma [B] -> the network's x_0, same shape (Eq. 5)."""
        frames = x.shape[1]
        warped, context, queries = control or self.control(cond, frames)
        c_skip, c_out, c_in, c_noise, _ = precondition(sigma.float(), self.config.parameterization)
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1, 1) for c in (c_skip, c_out, c_in))
        first = repeat(cond.first_latents, "b c h w -> b t c h w", t=frames)
        start = cond.known.nan_to_num()[:, None] if self.config.predict_change else 0
        if self.config.draft:
            first = start = cond.draft
        x = x - start
        stacked = torch.cat([c_in * x, first, cond.given], dim=2)
        cells = nnf.pixel_unshuffle(stacked, self.config.patch)  # [B, T, in_channels, h / patch, w / patch]
        F_x = self.unet(cells, c_noise, context, cond.added_ids, residuals=warped, temporal_query=queries)
        return start + c_skip * x + c_out * nnf.pixel_shuffle(F_x.float(), self.config.patch)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """L = L_recon + lambda L_motion (Algorithm 1, line 6), both per sample, plus the error of each modality.

        L_recon is Eq. 5/10. L_motion (Eq. 12) is the same error where the masked instance flow moves (Eq. 11),
        brought to the latent grid by max-pooling. Both are means over all elements, weighted by noise level.
        """
        x0, cond, config = batch.x0, batch.condition, self.config
        z = torch.randn(len(x0), generator=generator).to(x0.device)
        noise = gaussian(x0.shape, generator, x0.device)
        sigma = (config.sigma_mean + config.sigma_std * z).exp()
        prediction = self.denoise(x0 + sigma.view(-1, 1, 1, 1, 1) * noise, sigma, cond)
        *_, weight = precondition(sigma, config.parameterization)
        error = weight.view(-1, 1, 1, 1, 1) * (x0 - prediction) ** 2  # [B, T, C p, h, w]
        M = nnf.adaptive_max_pool2d(motion_mask(cond.F, config.motion_threshold), x0.shape[-2:])[:, None]
        recon, motion = error.mean(dim=(1, 2, 3, 4)), (error * M).mean(dim=(1, 2, 3, 4))
        parts = error.mean(dim=(1, 3, 4)).view(len(x0), len(config.predict), -1).mean(-1)
        return {
            "loss": recon + config.motion_weight * motion,
            "recon": recon,
            "motion": motion,
            **{name: parts[:, i] for i, name in enumerate(config.predict)},
        }

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`loss`; DistributedDataParallel wants it under this name."""
        return self.loss(batch, generator)

    @classmethod
    def from_svd(cls, source: str | os.PathLike, stage_config: StageConfig, device: str = "cpu") -> MotionDreamer:
        """A new stage from SVD's UNet (`source`: folder or hub id). What SVD does not have starts at zero."""
        svd = UNet.from_pretrained(source, subfolder="unet", dtype=torch.float32, device=device)
        with torch.device(device):
            model = cls(stage_config, svd.config)
        weights = svd.state_dict()
        weights["conv_in.weight"] = inflate_conv_in(weights["conv_in.weight"], stage_config)
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] = inflate_conv_out(weights[name], stage_config)
        model.unet.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> MotionDreamer:
        """Opens a folder written by `save_pretrained`. Raises ValueError or FileNotFoundError that name the file."""
        folder = resolve_source(source, subfolder)
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
            stage = {k: tuple(v) if isinstance(v, list) else v for k, v in config["stage"].items()}
            stage, unet = StageConfig(**stage), UNetConfig.from_dict(config["unet"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected a stage written by train.py") from None
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        with torch.device("meta"):
            model = cls(stage, unet)
        load_strict(model, folder / WEIGHTS, dtype, device)
        return model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """config.json (StageConfig and UNetConfig) and the weights, each written whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(self.state_dict(), folder / WEIGHTS)
        text = json.dumps({"stage": asdict(self.config), "unet": self.unet.config.to_dict()}, indent=2)
        partial = folder / "config.json.partial"
        partial.write_text(text + "\n")
        os.replace(partial, folder / "config.json")


def inflate_conv_in(weight: Tensor, config: StageConfig) -> Tensor:
    """SVD's conv_in [C_out, 8, 3, 3] (noisy, first frame) -> [C_out, in_channels, 3, 3] (predict, first_frame, given).

    The noisy slice is copied to every predicted modality and divided by their number; the first-frame slice is
    copied to the first RGB frame; everything else is zero. With predict = (rgb,) the layer computes what SVD's did.
    """
    c, new = config.latent_channels, weight.new_zeros(weight.shape[0], config.in_channels, *weight.shape[2:])
    if config.patch != 1:
        raise ValueError(f"patch is {config.patch}: SVD's weights take latents one by one")
    if weight.shape[1] != 2 * c:
        raise ValueError(f"conv_in takes {weight.shape[1]} channels, expected SVD's {2 * c}")
    predicted = len(config.predict)
    new[:, : c * predicted] = weight[:, :c].repeat(1, predicted, 1, 1) / predicted
    start = c * (predicted + config.first_frame.index("rgb"))
    new[:, start : start + c] = weight[:, c:]
    return new


def inflate_conv_out(parameter: Tensor, config: StageConfig) -> Tensor:
    """SVD's conv_out (weight or bias of 4 channels) -> one copy for every predicted modality."""
    return parameter.repeat(len(config.predict), *[1] * (parameter.ndim - 1))


# ------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    stage: MotionDreamer,
    cond: Condition,
    *,
    frames: int,
    steps: int = 25,
    guidance: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
    progress: Callable = iter,
) -> Tensor:
    """Euler's method on Karras' noise levels -> x_0 [B, T, C p, h, w].

    Guidance rises linearly over the frames, as in SVD; (1, 1) needs no second pass. A value that is not finite is a
    FloatingPointError that names the step.
    """
    config, device = stage.config, cond.first_latents.device
    batch, _, h, w = cond.first_latents.shape
    sigmas = karras_sigmas(steps, sigma_max=config.sigma_max).to(device)
    noise = torch.randn((batch, frames, cond.known.shape[1], h, w), generator=generator).to(device)
    x = noise * (sigmas[0] ** 2 + 1).sqrt()
    scale = torch.linspace(*guidance, frames, device=device).view(1, -1, 1, 1, 1)
    control, free = stage.control(cond, frames), cond.without_image()
    free_control = stage.control(free, frames) if guidance != (1.0, 1.0) else None
    for i in progress(range(steps)):
        sigma = sigmas[i].expand(batch)
        x0 = stage.denoise(x, sigma, cond, control)
        if free_control is not None:
            x0_free = stage.denoise(x, sigma, free, free_control)
            x0 = x0_free + scale * (x0 - x0_free)
        x0[:, 0] = torch.where(cond.known.isnan(), x0[:, 0], cond.known)
        if not torch.isfinite(x0).all():
            raise FloatingPointError(f"predicting {', '.join(config.predict)}: step {i + 1} of {steps} is not finite")
        x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def decode_motion(
    config: StageConfig, vae: VAE, latents: Tensor, segmentation: Tensor | None, depth: Tensor | None
) -> Motion:
    """Stage I's x_0 [B, T, C p, h, w] -> flow, segmentation and depth; S_0 and D_0 [B, H, W] give colours and scale."""
    firsts, parts = {"segmentation": segmentation, "depth": depth}, dict.fromkeys(("flow", "segmentation", "depth"))
    for name, latent in zip(config.predict, latents.split(config.latent_channels, dim=2), strict=True):
        parts[name] = unrender(name, decode(vae, latent), firsts.get(name))
        if config.keep_first_frame and firsts.get(name) is not None:
            parts[name][:, 0] = firsts[name]
    return Motion(**parts)


@torch.no_grad()
def dream(
    stage1: MotionDreamer | None,
    stage2: MotionDreamer | None,
    vae: VAE,
    image_encoder: ImageEncoder,
    image: Tensor,
    segmentation: Tensor | None,
    depth: Tensor | None,
    F: Tensor,
    camera: Tensor | None = None,
    *,
    frames: int,
    steps: int = 25,
    guidance: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
    fps: float = 7.0,
    motion: Motion | None = None,
    progress: Callable = iter,
) -> tuple[Motion, Tensor | None]:
    """Image + arrows -> motion -> video: the whole method (section 3.1, Eq. 13).

    image [B, 3, H, W] in [-1, 1], segmentation [B, H, W] ids, depth [B, H, W], F [B, 2, H, W] from `arrows_to_flow`,
    camera [B, 2] -> Motion and video [B, T, 3, H, W]. A Motion that is given (edited, say) is painted as it is, and
    stage1 may be None; without stage2 there is no video.
    """

    def run(stage: MotionDreamer, motion: Motion | None) -> Tensor:
        told = (vae, image_encoder, image, segmentation, depth, F, camera, motion)
        cond = sampling_condition(stage.config, *told, frames=frames, fps=fps, generator=generator)
        return sample(
            stage, cond, frames=frames, steps=steps, guidance=guidance, generator=generator, progress=progress
        )

    if motion is None:
        motion = decode_motion(stage1.config, vae, run(stage1, None), segmentation, depth)
    if stage2 is None:
        return motion, None
    video = decode(vae, run(stage2, motion)).clamp(-1, 1)
    if stage2.config.keep_first_frame:
        video[:, 0] = image
    return motion, video
