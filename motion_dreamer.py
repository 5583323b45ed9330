"""Motion Dreamer (arXiv 2412.00547 v1): two video diffusion stages on Stable Video Diffusion. Read this file first.

Stage I reasons about motion. It is told the first frame I_0, its segmentation S_0 and depth D_0, and a few arrows, and
generates the motion representation R_t = (O_t, S_t, D_t) of every frame: optical flow, instance segmentation, depth.
Stage II paints R_t into RGB video. Between the two, R_t can be looked at and edited.

    first frame, S_0, D_0 --- VAE ---> first-frame latents ----------------+
    I_0 ------------- CLIP image tower ---> token (+ camera) -----------+  |
    arrows -> F (instance_flow.py) -> W^(s) = Softsplat(C^(s), F^(s)) -+ | |
                                                                       v v v
    noise x_t -------------------------------------------------------> UNet -> R_t --- Stage II ---> I_t

Symbols, as in the paper where it has them:
    B T C H W     batch, frames, channels, height and width in pixels; h = H/f, w = W/f latent cells
    I_t O_t S_t D_t   RGB frame, optical flow (t -> t+1), instance ids, depth of frame t
    R_t           (O_t, S_t, D_t); each is rendered as a picture (clips/pictures.py) and encoded by the VAE
    x_0, x_t      clean and noisy latents of what a stage predicts: x_t = x_0 + sigma * noise
    F             (masked) instance flow [B, 2, H, W] in pixels per frame step (Eq. 3, 4, 9)
    C^(s), W^(s)  first-frame features at scale s, and the same warped by F (Eq. 6-8)
    M'            motion mask (Eq. 11);  lambda weight of the motion enhancement loss (Eq. 12, Algorithm 1)
    c, e_cam      camera motion [B, 2] and its encoding [B, 1, D] (supplement, section 7)

Try it: `python sample.py`. Train it: `python train.py --stage 1 ...`. Where the paper is silent: docs/choices.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

import clips
from clips import Motion, render, unrender
from clips.tensors import check_batch, check_condition, check_dream, check_step
from instance_flow import MASK_UNITS, REDUCTIONS, check_floats, sparse_points
from kernels.replayed import Replayed
from sources import read_stage
from splat import softsplat
from svd import VAE, ImageEncoder, UNet, UNetConfig, decode_video, encode_video, gaussian, karras_sigmas
from weights import Source, open_folder, save_folder

Maps = dict[str, Tensor]  # by modality: "rgb", "flow", "segmentation", "depth"
WEIGHTS = "diffusion_pytorch_model"
MOTION_BUCKET = 127.0  # what a stage is told that must not know how much will move
POINTS = 8  # of the sparse control of Table 3

# ------------------------------------------------------------------------------------------------------ what a stage is


@dataclass(frozen=True)
class StageConfig:
    """What a stage predicts and what it is told. Every model of the paper's tables is one of these."""

    predict: tuple[str, ...] = ("flow", "segmentation", "depth")  # noisy latents, in this order of channels
    given: tuple[str, ...] = ()  # latents of every frame that are known
    first_frame: tuple[str, ...] = ("rgb", "segmentation", "depth")  # latents of frame 0 that are known
    parameterization: str = "x0"  # "x0" (Eq. 5, Stage I) or "v" (Stage II)
    control: str = "instance_flow"  # "instance_flow", "sparse_flow" (Table 3, as in MOFA-Video) or "none"
    reduce: str = "instance"  # how Eq. 1-3 are read, see `instance_flow`
    mask_unit: str = "instance"  # Eq. 9 per "instance", "pixel" or (literally) "element"
    mask_ratio: float = 0.5  # p of Eq. 9
    splat_time: str = "linear"  # frame t is warped by t F ("linear") or by F ("constant", Eq. 7 literally)
    motion_weight: float = 1.0  # lambda of Algorithm 1
    motion_threshold: float = 0.1  # tau of Eq. 11, pixels per frame step
    sigma_mean: float = 0.7  # ln sigma ~ N(sigma_mean, sigma_std^2) in training
    sigma_std: float = 1.6
    sigma_max: float = 700.0  # where sampling starts
    latent_channels: int = 4
    vae_factor: int = 8  # f: the scales s of Eq. 6 are f, 2 f, 4 f, 8 f
    frames: int = 14  # what the stage was trained on; sample.py's defaults
    width: int = 512
    height: int = 320
    fps: float = 7.0

    def __post_init__(self) -> None:
        choices = {"parameterization": ("x0", "v"), "control": ("instance_flow", "sparse_flow", "none")}
        choices |= {"reduce": REDUCTIONS, "mask_unit": MASK_UNITS, "splat_time": ("linear", "constant")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

    @property
    def in_channels(self) -> int:
        return self.latent_channels * (len(self.predict) + len(self.first_frame) + len(self.given))

    @property
    def out_channels(self) -> int:
        return self.latent_channels * len(self.predict)

    @property
    def picture_channels(self) -> int:
        """What C^(s) sees: I_0, S_0 and D_0, three channels each."""
        return 9

    @property
    def latents(self) -> dict[str, bool]:
        """Latents that are made in advance. True: of all frames; False: of frame 0. (`tell` makes a noisy I_0's.)"""
        first = {name: False for name in self.first_frame if name != "rgb"}
        return first | dict.fromkeys((*self.predict, *self.given), True)


STAGE1 = StageConfig()
STAGE2 = StageConfig(
    predict=("rgb",), given=STAGE1.predict, first_frame=("rgb",), parameterization="v", motion_weight=0.0
)
# One-stage* of Table 1: the same inputs, no motion representation between.
ONE_STAGE = StageConfig(predict=("rgb",), parameterization="v")

# The rows of Table 3, each a pair of stages.
ABLATIONS = {
    "motion_dreamer": (STAGE1, STAGE2),
    "without_motion_loss": (replace(STAGE1, motion_weight=0.0), STAGE2),
    "sparse_flow": (replace(STAGE1, control="sparse_flow"), replace(STAGE2, control="sparse_flow")),
}
for _modality in STAGE1.predict:
    _kept = tuple(name for name in STAGE1.predict if name != _modality)
    ABLATIONS[f"without_{_modality}"] = (replace(STAGE1, predict=_kept), replace(STAGE2, given=_kept))

# ---------------------------------------------------------------------------------------------- what a stage is told


@dataclass
class Told:
    """What a stage is told about a batch before a network sees it: by clips in training, by a user in sampling."""

    image: Tensor  # [B, 3, H, W]  I_0 in [-1, 1]
    segmentation: Tensor  # [B, H, W]  S_0, ids
    depth: Tensor  # [B, H, W]     D_0
    present: dict[str, Tensor]  # bool [B] for "rgb", "segmentation", "depth": what is not is left out
    F: Tensor  # [B, 2, H, W]      instance flow, masked or from arrows
    mask: Tensor  # [B, 1, H, W]   1 where F tells something (M_mask of Eq. 9, on objects)
    camera: Tensor  # [B, 2]       c
    fps: Tensor  # [B]
    motion_bucket: Tensor  # [B]
    noise_aug: Tensor  # [B]       size of the noise on I_0 before it is encoded


@dataclass
class Condition:
    """The same, as the network takes it. What is absent (dropped in training, or not given by the user) is zero."""

    first_pictures: Tensor  # [B, 9, H, W]        I_0, S_0, D_0 as pictures, for C^(s)
    first_latents: Tensor  # [B, 1, C n, h, w]    the VAE's posterior modes of `first_frame`, not scaled (as in SVD)
    known: Tensor  # [B, C p, h, w]               scaled latents of frame 0 of what is predicted; NaN where not known
    given: Tensor  # [B, T, C g, h, w]            scaled latents of every frame (Stage II: R_t)
    token: Tensor  # [B, 1, D]                    CLIP image token
    added_ids: Tensor  # [B, 3]                   fps - 1, motion bucket, noise augmentation
    F: Tensor  # [B, 2, H, W]
    camera: Tensor  # [B, 2]

    def without_image(self) -> Condition:
        """The null branch of classifier-free guidance sees nothing of I_0: no token, no latents, no RGB in C^(s)."""
        pictures = self.first_pictures.clone()
        pictures[:, :3] = 0
        zeros = {name: torch.zeros_like(getattr(self, name)) for name in ("token", "first_latents")}
        return replace(self, first_pictures=pictures, **zeros, known=torch.full_like(self.known, math.nan))


# --------------------------------------------------------------------------- instance flow into the network (Eq. 6 - 8)


class FlowControl(nn.Module):
    """W^(s) = Softsplat(C^(s), F^(s)) at every scale of the UNet (Eq. 6, 7).

    C^(s) comes from a small convolutional pyramid over I_0, S_0 and D_0, whose last convolutions start at zero: a new
    stage starts as plain SVD. The importance metric of softmax splatting, left open in the paper, is one more learned
    channel: it says which of two features that meet is in front.
    """

    def __init__(self, channels: list[int], config: StageConfig) -> None:
        super().__init__()
        self.factor, self.splat_time = config.vae_factor, config.splat_time
        widths = [max(16, c // 4) for c in channels]
        stem = [nn.Conv2d(config.picture_channels, widths[0], 3, padding=1)]
        for _ in range(int(math.log2(self.factor))):
            stem += [nn.SiLU(), nn.Conv2d(widths[0], widths[0], 3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)
        down = (nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.down = nn.ModuleList(nn.Sequential(nn.SiLU(), conv) for conv in down)
        self.features = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, channels, strict=True))
        self.metrics = nn.ModuleList(nn.Conv2d(a, 1, 1) for a in widths)
        for value in self.features.parameters():
            nn.init.zeros_(value)

    def forward(self, first_pictures: Tensor, F: Tensor, frames: int) -> list[Tensor]:
        """[B, 9, H, W], [B, 2, H, W] -> one W^(s) [B, T, C_s, h_s, w_s] per scale."""
        time = torch.arange(frames, device=F.device) if self.splat_time == "linear" else F.new_ones(frames)
        x, warped = self.stem(first_pictures.to(self.stem[0].weight.dtype)), []
        for level, (features, metric) in enumerate(zip(self.features, self.metrics, strict=True)):
            if level > 0:
                x = self.down[level - 1](x)
            F_s = resize_flow(F, self.factor * 2**level, x.shape[-2:])
            F_t = rearrange(time.view(-1, 1, 1, 1) * F_s[:, None], "b t c h w -> (b t) c h w")
            C_s = nnf.silu(x)
            W_s = softsplat(features(C_s), F_t, metric(C_s))
            warped.append(rearrange(W_s, "(b t) c h w -> b t c h w", t=frames))
        return warped


def resize_flow(F: Tensor, s: int, size: tuple[int, int]) -> Tensor:
    """F^(s) = 1/s Resize(F, H/s, W/s) (Eq. 6): [B, 2, H, W] -> [B, 2, *size], in cells per frame step. The mean is over
    pixels that F covers (is not zero at): with the zeros around it, a thin object would lose most of its speed."""
    check_floats("F", F, ("B", 2, "H", "W"))
    covered = nnf.adaptive_avg_pool2d((F != 0).any(dim=1, keepdim=True).float(), size)
    return nnf.adaptive_avg_pool2d(F.float(), size) / covered.clamp(min=1e-6) / s


class CameraEncoder(nn.Module):
    """e_cam (supplement, section 7), added to the image token and to the queries of every temporal self-attention.

    The context is one token, so the softmax of cross-attention is 1: e_cam acts there through the values. In temporal
    self-attention, a constant on every key cancels in the softmax: e_cam goes to the queries. All starts at zero.
    """

    def __init__(self, context_dim: int, query_channels: list[int]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 256), nn.SiLU(), nn.Linear(256, context_dim))
        self.queries = nn.ModuleList(nn.Linear(context_dim, c, bias=False) for c in query_channels)
        for value in (*self.mlp[-1].parameters(), *self.queries.parameters()):
            nn.init.zeros_(value)

    def forward(self, camera: Tensor) -> tuple[Tensor, list[Tensor]]:
        """c [B, 2] -> e_cam [B, 1, D], and one query offset [B, C_i] per temporal attention."""
        e_cam = self.mlp(camera.to(self.mlp[0].weight.dtype))
        return e_cam[:, None], [query(e_cam) for query in self.queries]


# -------------------------------------------------------------------------------------------- diffusion: Eq. 5, 10 - 12


def precondition(sigma: Tensor, parameterization: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise and the loss weight of a noise level; used by the loss and by the sampler.

    x_0 = c_skip x_t + c_out UNet(c_in x_t, c_noise). "v" is SVD's; "x0" is Eq. 5: the network returns x_0 itself.
    """
    check_floats("sigma", sigma)
    c_in, c_noise = (sigma**2 + 1).rsqrt(), sigma.log() / 4
    if parameterization == "v":
        return 1 / (sigma**2 + 1), -sigma * c_in, c_in, c_noise, (sigma**2 + 1) / sigma**2
    if parameterization == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise, torch.ones_like(sigma)
    raise ValueError(f"parameterization is {parameterization!r}, expected 'x0' or 'v'")


@dataclass
class Batch:
    """One training step: x_0, what the stage is told about it, and where the motion enhancement loss looks."""

    x0: Tensor  # [B, T, C p, h, w]
    condition: Condition
    M: Tensor  # [B, 1, H, W]  M' of Eq. 11


class MotionDreamer(nn.Module):
    """One stage: SVD's UNet with more input channels, plus instance flow and camera motion. Which stage: `config`."""

    def __init__(self, config: StageConfig, unet_config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(replace(unet_config, in_channels=config.in_channels, out_channels=config.out_channels))
        if config.control != "none":
            self.flow_control = FlowControl(self.unet.residual_channels, config)
        self.camera = CameraEncoder(unet_config.cross_attention_dim, self.unet.temporal_query_channels)

    def encode(self, name: str, maps: Maps, firsts: dict[str, Tensor | None], vae: VAE) -> Tensor:
        """Scaled latents [B, T, C, h, w] of a modality of maps [B, T, ...], or of its frame 0 where `config.latents`
        wants no more; firsts: S_0 and D_0 [B, H, W] or None, which set colours and scale."""
        shown = maps[name] if self.config.latents[name] else maps[name][:, :1]
        return encode_video(vae, render(name, shown, firsts.get(name)), self.config.vae_factor)

    def tell(self, told: Told, latents: Maps, token: Tensor, vae: VAE, noise: Tensor) -> Condition:
        """The one condition builder; training and sampling differ in where `told` and `latents` come from.

        latents: scaled [B, T, C, h, w] (frame 0 may do), by the names of `config.latents`; token [B, 1, D]; noise
        [B, 3, H, W], normal, of which `told.noise_aug` is added to I_0 before the VAE.
        """
        config, B = self.config, len(token)
        present = {name: there.view(B, 1, 1, 1).to(token.dtype) for name, there in told.present.items()}
        seen = {name: there * present["rgb"] for name, there in present.items()}  # a null branch sees no latents
        maps = {"segmentation": told.segmentation, "depth": told.depth}
        pictures = {"rgb": told.image} | {n: render(n, value[:, None], value)[:, 0] for n, value in maps.items()}
        noisy = told.image + told.noise_aug.view(B, 1, 1, 1) * noise
        first = {"rgb": encode_video(vae, noisy[:, None], config.vae_factor)}
        first |= {n: latents[n][:, :1] for n in config.first_frame if n != "rgb"}
        first = {n: latent[:, 0] / vae.scaling_factor for n, latent in first.items()}
        known = {"flow": torch.full_like(first["rgb"], math.nan)}
        known |= {n: latents[n][:, 0].where(seen[n] > 0, math.nan) for n in config.predict if n != "flow"}
        return Condition(
            first_pictures=torch.cat([pictures[n] * present[n] for n in pictures], dim=1),
            first_latents=torch.cat([first[n] * seen[n] for n in config.first_frame], dim=1)[:, None],
            known=torch.cat([known[n] for n in config.predict], dim=1),
            given=torch.cat([latents[n] for n in config.given], dim=2) if config.given else first["rgb"][:, None, :0],
            token=token * present["rgb"][:, 0],
            added_ids=torch.stack([told.fps - 1, told.motion_bucket, told.noise_aug], dim=1),
            F=told.F,
            camera=told.camera,
        )

    def control(self, cond: Condition, frames: int) -> tuple[list[Tensor] | None, Tensor, list[Tensor]]:
        """What does not depend on the noise, computed once per clip: W^(s), context, camera offsets of the queries."""
        warped = None if self.config.control == "none" else self.flow_control(cond.first_pictures, cond.F, frames)
        e_cam, queries = self.camera(cond.camera)
        return warped, cond.token + e_cam, queries  # H' = H + e_cam

    def denoise(self, x: Tensor, sigma: Tensor, cond: Condition, control: tuple | None = None) -> Tensor:
        """x_t [B, T, C p, h, w], sigma [B] -> the network's x_0, same shape (Eq. 5)."""
        check_condition(self, x, sigma, vars(cond))
        warped, context, queries = control or self.control(cond, x.shape[1])
        c_skip, c_out, c_in, c_noise, _ = precondition(sigma.float(), self.config.parameterization)
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1, 1) for c in (c_skip, c_out, c_in))
        first, given = (latents.expand(-1, x.shape[1], -1, -1, -1) for latents in (cond.first_latents, cond.given))
        stacked = torch.cat([c_in * x, first, given], dim=2)  # [B, T, in_channels, h, w]
        F_x = self.unet(stacked, c_noise, context, cond.added_ids, residuals=warped, temporal_query=queries)  # Eq. 8
        return c_skip * x + c_out * F_x.float()

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """L = L_recon + lambda L_motion (Algorithm 1, line 6), both per sample, plus the error of each modality.

        L_recon is Eq. 5/10; L_motion (Eq. 12) the same error where M' is 1 (Eq. 11), brought to the latent grid by
        max-pooling. Both are means over all elements, weighted by noise level.
        """
        check_batch(self, batch.x0, batch.M)
        x0, config = batch.x0, self.config
        sigma = (config.sigma_mean + config.sigma_std * gaussian((len(x0),), generator, x0.device)).exp()
        noise = gaussian(x0.shape, generator, x0.device)
        prediction = self.denoise(x0 + sigma.view(-1, 1, 1, 1, 1) * noise, sigma, batch.condition)
        *_, weight = precondition(sigma, config.parameterization)
        error = weight.view(-1, 1, 1, 1, 1) * (x0 - prediction) ** 2  # [B, T, C p, h, w]
        M = nnf.adaptive_max_pool2d(batch.M, x0.shape[-2:])[:, None]
        recon, motion = error.mean(dim=(1, 2, 3, 4)), (error * M).mean(dim=(1, 2, 3, 4))
        parts = error.mean(dim=(1, 3, 4)).view(len(x0), len(config.predict), -1).mean(-1)
        losses = {"loss": recon + config.motion_weight * motion, "recon": recon, "motion": motion}
        return losses | {name: parts[:, i] for i, name in enumerate(config.predict)}

    forward = loss  # DistributedDataParallel wants it under this name

    @classmethod
    def from_svd(cls, source: Source, stage_config: StageConfig, device: str = "cpu") -> MotionDreamer:
        """A new stage from SVD's UNet (`source`: folder or hub id). What SVD does not have starts at zero.

        conv_in: SVD's noisy slice goes to each of n modalities, over sqrt(n), so that their noise adds up to the size
        that SVD knows; the other to I_0. conv_out: a copy for every modality, negated where x_0 is predicted, for v is
        about -x_0 at most noise levels: Eq. 5's loss of a perfect SVD is 0.50, not 3.51 (zeros: 1.00).
        """
        svd = UNet.from_pretrained(source, subfolder="unet", dtype=torch.float32, device=device)
        with torch.device(device):
            model = cls(stage_config, svd.config)
        weights, n, c = svd.state_dict(), len(stage_config.predict), stage_config.latent_channels
        old, new = weights["conv_in.weight"], torch.zeros_like(model.unet.conv_in.weight)
        if old.shape[1] != 2 * c:
            raise ValueError(f"{source}: conv_in takes {old.shape[1]} channels, expected SVD's {2 * c}")
        rgb = c * (n + stage_config.first_frame.index("rgb"))
        new[:, : c * n], new[:, rgb : rgb + c] = old[:, :c].repeat(1, n, 1, 1) / math.sqrt(n), old[:, c:]
        weights["conv_in.weight"] = new
        sign = -1 if stage_config.parameterization == "x0" else 1
        weights |= {name: torch.cat([sign * weights[name]] * n) for name in ("conv_out.weight", "conv_out.bias")}
        model.unet.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls, source: Source, subfolder: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> MotionDreamer:
        """Opens a folder written by `save_pretrained`. Raises ValueError or FileNotFoundError that name the file."""
        return open_folder(source, subfolder, WEIGHTS, build, dtype, device)

    def save_pretrained(self, folder: Source) -> None:
        """config.json (StageConfig and UNetConfig) and the weights, each written whole or not at all."""
        config = {"stage": asdict(self.config), "unet": self.unet.config.to_dict()}
        save_folder(folder, WEIGHTS, self.state_dict(), config)


# ------------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    stage: MotionDreamer, cond: Condition, *, frames: int, steps: int = 25, guidance: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator | None = None, progress: Callable = iter
) -> Tensor:  # fmt: skip
    """Euler's method on Karras' noise levels -> x_0 [B, T, C p, h, w]. What is known of frame 0 is put back.

    Guidance rises linearly over the frames, as in SVD; (1, 1) is none. FloatingPointError: a step is not finite.
    """
    (batch, channels, h, w), device = cond.known.shape, cond.known.device
    sigmas = karras_sigmas(steps, sigma_max=stage.config.sigma_max).to(device)
    x = gaussian((batch, frames, channels, h, w), generator, device) * (sigmas[0] ** 2 + 1).sqrt()
    scale = torch.linspace(*guidance, frames, device=device).view(1, -1, 1, 1, 1)
    control, free = stage.control(cond, frames), cond.without_image()
    free_control = stage.control(free, frames) if tuple(guidance) != (1, 1) else None

    @Replayed
    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = stage.denoise(x, sigma, cond, control)
        x0_free = stage.denoise(x, sigma, free, free_control) if free_control else x0
        return x0_free + scale * (x0 - x0_free)

    for i in progress(range(steps)):
        x0 = predict(x, sigmas[i].expand(batch))
        x0[:, 0] = torch.where(cond.known.isnan(), x0[:, 0], cond.known)
        check_step(x0, f"predicting {', '.join(stage.config.predict)}", i, steps)
        x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def decode_motion(config: StageConfig, vae: VAE, latents: Tensor, firsts: dict[str, Tensor | None]) -> Motion:
    """Stage I's x_0 [B, T, C p, h, w] -> flow, ids and depth; firsts: S_0 and D_0 [B, H, W], for colours and scale."""
    parts = dict.fromkeys(("flow", "segmentation", "depth"))
    for name, latent in zip(config.predict, latents.split(config.latent_channels, dim=2), strict=True):
        parts[name] = unrender(name, decode_video(vae, latent, config.vae_factor), firsts.get(name))
        if firsts.get(name) is not None:
            parts[name][:, 0] = firsts[name]
    return Motion(**parts)


@torch.no_grad()
def sampling_condition(
    stage: MotionDreamer, told: Told, motion: Motion | None, vae: VAE, image_encoder: ImageEncoder,
    generator: torch.Generator | None
) -> Condition:  # fmt: skip
    """What a user tells -> Condition. As in training: no bucket for who is not given motion; sparse F at POINTS."""
    firsts = {"segmentation": told.segmentation, "depth": told.depth}
    maps = {"rgb": told.image[:, None]} | {name: value[:, None] for name, value in firsts.items()}
    maps |= {name: getattr(motion, name) for name in stage.config.given}
    firsts = {name: value if told.present[name].all() else None for name, value in firsts.items()}
    names = [name for name in stage.config.latents if name in maps or name not in stage.config.predict]
    latents = {name: stage.encode(name, maps, firsts, vae) for name in names}
    if not stage.config.given:
        told = replace(told, motion_bucket=torch.full_like(told.motion_bucket, MOTION_BUCKET))
    if stage.config.control == "sparse_flow":
        told = replace(told, F=sparse_points(told.F, POINTS, generator))
    noise = gaussian(told.image.shape, generator, told.image.device).to(told.image)
    return stage.tell(told, latents, image_encoder(told.image), vae, noise)


@torch.no_grad()
def dream(
    stage1: MotionDreamer | None, stage2: MotionDreamer | None, vae: VAE, image_encoder: ImageEncoder, image: Tensor,
    segmentation: Tensor | None, depth: Tensor | None, F: Tensor, camera: Tensor | None = None, *, frames: int,
    steps: int = 25, guidance: tuple[float, float] = (1.0, 1.0), generator: torch.Generator | None = None,
    mask: Tensor | None = None, motion: Motion | None = None, fps: float | Tensor | None = None,
    motion_bucket: float | Tensor = MOTION_BUCKET, progress: Callable = iter
) -> tuple[Motion, Tensor | None]:  # fmt: skip
    """Image + arrows -> motion -> video: the whole method (section 3.1, Eq. 13).

    image [B, 3, H, W] in [-1, 1], segmentation [B, H, W] ids, depth [B, H, W], F [B, 2, H, W] from `arrows_to_flow`,
    camera [B, 2]; mask [B, 1, H, W]: where F tells something, by default where it is not zero; fps and motion_bucket: a
    number or [B], by default the stage's and 127. Returns Motion and video [B, T, 3, H, W]. A Motion that is given is
    painted as it is, and stage1 may be None; without stage2 there is no video. ValueErrors: clips/tensors.py.
    """
    shown = {"rgb": image, "segmentation": segmentation, "depth": depth}
    settings = {"frames": frames, "steps": steps, "guidance": guidance, "generator": generator, "progress": progress}
    maps = {"image": image, "segmentation": segmentation, "depth": depth, "F": F, "mask": mask, "camera": camera}
    check_dream((stage1, stage2), maps, motion, fps, motion_bucket, settings)
    B, H, W, device = len(image), *image.shape[-2:], image.device
    fps = (stage1 or stage2).config.fps if fps is None else fps
    told = Told(
        image=image,
        segmentation=torch.zeros(B, H, W, dtype=torch.long, device=device) if segmentation is None else segmentation,
        depth=torch.ones(B, H, W, device=device) if depth is None else depth,
        present={name: torch.full((B,), value is not None, device=device) for name, value in shown.items()},
        F=F,
        mask=(F != 0).any(dim=1, keepdim=True).to(F) if mask is None else mask,
        camera=torch.zeros(B, 2, device=device) if camera is None else camera,
        fps=torch.as_tensor(fps, dtype=torch.float32, device=device).expand(B),
        motion_bucket=torch.as_tensor(motion_bucket, dtype=torch.float32, device=device).expand(B),
        noise_aug=torch.full((B,), 0.02, device=device),
    )
    if motion is None:
        cond = sampling_condition(stage1, told, None, vae, image_encoder, generator)
        motion = decode_motion(stage1.config, vae, sample(stage1, cond, **settings), shown)
    if stage2 is None:
        return motion, None
    cond = sampling_condition(stage2, told, motion, vae, image_encoder, generator)
    video = decode_video(vae, sample(stage2, cond, **settings), stage2.config.vae_factor).clamp(-1, 1)
    video[:, 0] = image
    return motion, video


# --------------------------------------------------------------------- extras of small models, none of them the paper's


@dataclass(frozen=True)
class SmallStageConfig(StageConfig):
    """A stage with what a small model from nothing needs and the paper does not have; everything is off by default."""

    show_flow: bool = False  # C^(s) sees F too
    told: bool = False  # C^(s) sees where F tells something: "told to stay" is not "not told"
    draft: bool = False  # Stage II sees and corrects a draft of every frame (`draft_video`) for I_0's latents
    mask_start: float = 0.0  # share of clips that show no arrows but of what moves at once (the push); Eq. 9 stays

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft and not (self.predict == self.first_frame == ("rgb",) and "segmentation" in self.given):
            raise ValueError("draft is True, but only a Stage II that is given the segmentation can have one")

    @property
    def picture_channels(self) -> int:
        return 9 + 2 * self.show_flow + self.told

    @property
    def latents(self) -> dict[str, bool]:
        return super().latents | ({"draft": True} if self.draft else {})


class SmallMotionDreamer(MotionDreamer):
    """A stage with a SmallStageConfig: each method adds extras to the paper's. Those of training: training/batch.py."""

    def encode(self, name: str, maps: Maps, firsts: dict[str, Tensor | None], vae: VAE) -> Tensor:
        if name == "draft":
            return encode_video(vae, clips.draft_video(maps["rgb"][:, 0], maps["segmentation"]), self.config.vae_factor)
        return super().encode(name, maps, firsts, vae)

    def tell(self, told: Told, latents: Maps, token: Tensor, vae: VAE, noise: Tensor) -> Condition:
        cond = super().tell(told, latents, token, vae, noise)
        seen = [told.F.asinh()] * self.config.show_flow + [told.mask] * self.config.told
        cond = replace(cond, first_pictures=torch.cat([cond.first_pictures, *seen], dim=1))
        if self.config.draft:
            cond = replace(cond, first_latents=latents["draft"] * told.present["rgb"].view(-1, 1, 1, 1, 1))
        return cond

    def denoise(self, x: Tensor, sigma: Tensor, cond: Condition, control: tuple | None = None) -> Tensor:
        start = cond.first_latents if self.config.draft else 0  # what is denoised is the change since the draft
        return start + super().denoise(x - start, sigma, cond, control)


def stage_class(config: StageConfig) -> type[MotionDreamer]:
    return SmallMotionDreamer if isinstance(config, SmallStageConfig) else MotionDreamer


def build(config: dict) -> MotionDreamer:
    """A stage of the shape that a config.json says."""
    stage = read_stage(config["stage"], StageConfig, SmallStageConfig)
    return stage_class(stage)(stage, UNetConfig.from_dict(config["unet"]))
