"""Algorithm 1, lines 2-4: from clips to what a training step learns from and what it is told, with fresh draws.

    clips -> unmarked objects -> instance flow (Eq. 1-3) -> random masking (Eq. 9) -> motion mask (Eq. 11) -> Batch

Clips are dicts of tensors [B, ...]: those of `Clip.tensors`, "marked" bool [B, 256] (`marked_objects`), "token"
[B, 1, D], and the latents that the stage needs, "latents.NAME" [B, T, C, h, w], as training/cache.py makes them. Of rgb
and depth, frame 0 is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instance_flow import instance_flow, motion_mask, random_mask, sparse_points, uniform
from motion_dreamer import MOTION_BUCKET, POINTS, Batch, MotionDreamer, SmallStageConfig, StageConfig, Told
from svd import VAE, gaussian

Clips = dict[str, Tensor]


@dataclass(frozen=True)
class Chances:
    """Probabilities, each drawn for each clip by itself."""

    drop: float = 0.1  # of leaving out I_0 (for guidance), S_0, D_0, the motion bucket, the camera motion c
    unmark: float = 0.25  # of unmarking some objects: a user marks what he pushes and little else


def chance(p: float, clips: Clips, generator: torch.Generator | None) -> Tensor:
    """bool [B], each True with probability p."""
    return uniform((len(clips["token"]),), generator, clips["token"].device) < p


@torch.no_grad()
def training_batch(
    stage: MotionDreamer, clips: Clips, vae: VAE, generator: torch.Generator | None, chances: Chances
) -> Batch:
    """What a stage learns from B clips, and what it is told about them."""
    config, device = stage.config, clips["token"].device

    # Some clips show only some of their objects: the others are gone from S_0, S_t and F alike.
    clips = show_marked(clips, chance(chances.unmark, clips, generator))
    flow, S, image = clips["flow"], clips["segmentation"].byte(), clips["rgb"][:, 0]

    # Instance flow, a part of it hidden, and where it moves.
    F = instance_flow(flow, S, config.reduce)  # Eq. 1-3
    F, M_mask = random_mask(F, config.mask_ratio, config.mask_unit, S[:, 0], generator)  # Eq. 9
    mask = M_mask.amax(dim=1, keepdim=True) * (S[:, :1] > 0)  # where F tells something, of objects
    F, mask = push_alone(config, F, mask, flow, S, generator)  # an extra: see below
    M = motion_mask(F, config.motion_threshold)  # Eq. 11
    if config.control == "sparse_flow":
        F = sparse_points(F, POINTS, generator)  # as a user's arrows become: `sampling_condition`

    # A motion bucket says how much will move: only a stage that is given the motion may know.
    lots = uniform((len(image),), generator, device)
    bucket_told = (lots >= chances.drop) & bool(config.given)
    told = Told(
        image=image,
        segmentation=S[:, 0],
        depth=clips["depth"][:, 0],
        present={name: ~chance(chances.drop, clips, generator) for name in ("rgb", "segmentation", "depth")},
        F=F,
        mask=mask,
        camera=sometimes_told(clips["camera"], lots, chances.drop),
        fps=clips["fps"],
        motion_bucket=torch.where(bucket_told, clips["motion_bucket"], MOTION_BUCKET),
        noise_aug=(gaussian((len(image),), generator, device) * 0.5 - 3).exp(),  # around SVD's 0.02 .. 0.1
    )
    latents = {name: clips[f"latents.{name}"] for name in config.latents}
    condition = stage.tell(told, latents, clips["token"], vae, gaussian(image.shape, generator, device))
    return Batch(torch.cat([latents[name] for name in config.predict], dim=2), condition, M)


def sometimes_told(camera: Tensor, lots: Tensor, p: float) -> Tensor:
    """c [B, 2], set to 0 with probability p: what sampling tells where nobody says a camera motion (supplement,
    section 9). The chance comes from the bits of `lots` [B] after the tenth; the higher ones have decided about the
    motion bucket. So no further random number is drawn, and clips whose camera rests train bit for bit as before."""
    return torch.where((lots * 1024 % 1 < p)[:, None], 0, camera)


def show_marked(clips: Clips, only_marked: Tensor) -> Clips:
    """Where `only_marked` (bool [B]) is true, objects that "marked" does not name are gone from S_t and, by the second
    variant "latents.NAME.marked", from what is made of it."""
    S, where = clips["segmentation"], only_marked.view(-1, 1, 1, 1)
    kept = clips["marked"].gather(1, S.flatten(1)).view_as(S) | ~where
    second = {name.removesuffix(".marked"): value for name, value in clips.items() if name.endswith(".marked")}
    latents = {name: torch.where(where[:, None], value, clips[name]) for name, value in second.items()}
    return clips | latents | {"segmentation": S * kept}


# --------------------------------------------------------------------- extras of small models, none of them the paper's


def push_alone(
    config: StageConfig, F: Tensor, mask: Tensor, flow: Tensor, S: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """SmallStageConfig.mask_start: of what Eq. 9 has left, a share of the clips shows only what moves at once."""
    if not isinstance(config, SmallStageConfig) or config.mask_start == 0:
        return F, mask
    start = instance_flow(flow, S, "start")
    alone = uniform((len(F), 1, 1, 1), generator, F.device) < config.mask_start
    shown = (moves_at_once(start) | ~alone).to(F)
    return F * shown, mask * shown


def moves_at_once(start: Tensor) -> Tensor:
    """[B, 2, H, W], each object's flow in the first step -> bool [B, 1, H, W]: objects at least half as fast as the
    fastest. They were pushed; what they hit moves later. If nothing moves, that is everything."""
    speed = start.norm(dim=1, keepdim=True)
    return 2 * speed >= speed.amax(dim=(1, 2, 3), keepdim=True)
