"""What a model makes of a clip while it trains: figures for the log, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import metrics
from clips import Motion, render
from instance_flow import instance_flow
from motion_dreamer import MotionDreamer, dream
from svd import VAE, ImageEncoder
from training.batch import moves_at_once
from training.vae import round_trip
from weights import whole_file


@torch.no_grad()
def reproduce(
    trained: VAE | MotionDreamer, vae: VAE, image_encoder: ImageEncoder | None, clip: dict[str, Tensor]
) -> metrics.Maps:
    """What a model makes of a clip [T, ...], by modality, in 10 sampling steps.

    Stage I is told the arrows of what moves at once, Stage II the true motion; a VAE encodes and decodes.
    """
    clip = {name: value[None].to(next(vae.parameters()).device) for name, value in clip.items()}
    first = {"rgb": None, "flow": None, "segmentation": clip["segmentation"][:, 0], "depth": clip["depth"][:, 0]}
    if isinstance(trained, VAE):
        made = {name: round_trip(vae, name, clip[name], first[name]) for name in first}
    else:
        maps, config = (clip["flow"], clip["segmentation"]), trained.config
        pushed = moves_at_once(instance_flow(*maps, reduce="start"))
        F, mask = instance_flow(*maps, config.reduce) * pushed, (pushed & (first["segmentation"] > 0)[:, None]).float()
        stages = (None, trained) if trained.config.predict == ("rgb",) else (trained, None)
        motion, video = dream(
            *stages, vae, image_encoder, clip["rgb"][:, 0], first["segmentation"], first["depth"], F, clip["camera"],
            frames=clip["rgb"].shape[1], steps=10, generator=torch.Generator().manual_seed(0), mask=mask,
            fps=clip["fps"], motion_bucket=clip["motion_bucket"],
            motion=None if stages[0] else Motion(clip["flow"], clip["segmentation"], clip["depth"]),
        )  # fmt: skip
        made = {"rgb": video} if video is not None else vars(motion)
    return {name: value[0] for name, value in made.items() if value is not None}


def sample_figures(made: metrics.Maps, clip: metrics.Maps) -> dict[str, metrics.Sums]:
    """The measures of evaluate.py that need no more than a clip: flow error, mask IoU, depth error, PSNR."""
    figures, ids = {}, clip["segmentation"]
    if "flow" in made:
        figures |= metrics.flow_error(made["flow"], clip["flow"])
    if "segmentation" in made:
        overlap = metrics.id_overlap(made["segmentation"], ids)
        figures |= {name: overlap[name] for name in ("ids_miou", "iou_last", "silhouette_last")}
    if "depth" in made:
        figures |= metrics.depth_error(made["depth"], clip["depth"], ids)
    if "rgb" in made:
        figures["psnr"] = metrics.mean_of(metrics.psnr(made["rgb"], clip["rgb"]))
    return figures


def write_samples(path: Path, made: metrics.Maps, clip: metrics.Maps) -> None:
    """A picture with two rows for every modality that was made, truth above sample, six frames of one clip."""
    rows, shown = [], np.linspace(0, len(clip["rgb"]) - 1, 6).round().astype(int)
    for name, value in made.items():
        first = clip[name][:1] if name in ("segmentation", "depth") else None
        for maps in (clip[name].to(value.device), value):
            picture = render(name, maps[None], first)[0]
            rows.append(rearrange(picture[shown], "t c h w -> c h (t w)"))
    pixels = ((torch.cat(rows, dim=1).permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial, "PNG")
