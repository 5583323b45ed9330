"""Frechet distances between sets of videos, and the features that they compare.

    FVD    Unterthiner et al. 2019: logits of a network trained on Kinetics, whose weights the user brings (`I3D`)
    FVMD   Liu et al. 2024 (arXiv 2407.16124): histograms of speed and acceleration of 400 tracked points
    rfvd   stand-ins that need no weights: random 3-D convolutions of pictures (rfvd_app) or of frame differences
           (rfvd_mot). They are not FVD and compare with nothing but themselves.

A distance means something only beside others with the same features, tracker, frames, size and number of clips; FVMD
is told apart by its tracker (metrics/trackers.py). Videos are [T, 3, H, W] in [-1, 1]; tracks [M, 16, N, 2] (x, y),
M windows, in pixels of a picture whose short side is 256.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from metrics.motion import interval_of

SET_RESAMPLES = 300  # of that of a Frechet distance
FEWEST = 8  # clips: the covariance of fewer is that of single clips
WINDOW = 16  # frames that FVMD looks at
GRID = 20  # points along each side
SHORT_SIDE = 256  # pixels in which tracks are measured, whatever the size of the video


# --------------------------------------------------------------------------------------------------- Frechet distance


def frechet_distance(x: Tensor, y: Tensor, eps: float = 0.0, ddof: int = 1) -> float:
    """|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr sqrt(S_x S_y) of features [N, D] and [M, D].

    No D x D matrix square root: with S_x = a^T a and S_y = b^T b (a, b centred, over sqrt(N - ddof)), the last trace is
    the sum of the singular values of a b^T, exact for any N, and 0 between a set and itself. ddof 1 is numpy's
    covariance (FVMD), 0 that of the reference FVD. eps > 0 adds eps I to both covariances in the product only, as the
    published FVMD does with 1e-5 (so that a set is -2 D eps from itself). Raises ValueError: shapes, not finite, N < 2.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features are {list(x.shape)} and {list(y.shape)}, expected [N, D] and [M, D], N, M > 1")
    x, y = x.double(), y.double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("features hold a value that is not finite")
    a, b = ((z - z.mean(dim=0)) / math.sqrt(len(z) - ddof) for z in (x, y))
    trace = root_trace(a, b) if eps == 0 else regular_root_trace(a, b, eps)
    return ((x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace).item()


def root_trace(a: Tensor, b: Tensor) -> Tensor:
    """tr sqrt(a^T a b^T b), the nuclear norm of a b^T; rows beyond D are first folded into D by QR."""
    a, b = (torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z for z in (a, b))
    return torch.linalg.svdvals(a @ b.T).sum()


def regular_root_trace(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """tr sqrt((a^T a + eps I)(b^T b + eps I)) by symmetric matrices, in the span of the rows of a and b only: in every
    direction outside of it, the root is eps."""
    rows = torch.cat([a, b])
    rest = max(a.shape[1] - len(rows), 0)
    if rest:
        Q = torch.linalg.qr(rows.T).Q
        a, b = a @ Q, b @ Q
    one = eps * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    values, vectors = torch.linalg.eigh(a.T @ a + one)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(half @ (b.T @ b + one) @ half).clamp(min=0).sqrt()
    return roots.sum() + eps * rest


# ------------------------------------------------------------------------------------------------- features for FVMD


def motion_histogram(tracks: Tensor) -> Tensor:
    """Tracks [M, 16, 400, 2] (points of a 20 x 20 grid, row by row) -> FVMD's features [M, 1024] in float64.

    Velocity V and acceleration A (first differences of position and of V, zero where they do not exist) are each cut
    into 4 x 4 x 4 blocks of 4 frames and 5 x 5 points; a block's histogram has 8 directions, into which each vector
    puts ceil(log2(|u| + 1)) / 8, at most 1. As in the published package, directions are atan2(x, y) in single
    precision: multiples of 45 degrees lie on a bin's edge, and rounding decides.
    """
    if tracks.shape[1:] != (WINDOW, GRID * GRID, 2):
        raise ValueError(f"tracks have shape {list(tracks.shape)}, expected [M, {WINDOW}, {GRID * GRID}, 2]")
    tracks = tracks.float()
    velocity, acceleration = torch.zeros_like(tracks), torch.zeros_like(tracks)
    velocity[:, 1:] = tracks[:, 1:] - tracks[:, :-1]
    acceleration[:, 2:] = velocity[:, 2:] - velocity[:, 1:-1]
    return torch.cat([_histogram(velocity), _histogram(acceleration)], dim=1)


def _histogram(vectors: Tensor) -> Tensor:
    """[M, 16, 400, 2] -> [M, 512], index ((frames * 4 + y) * 4 + x) * 8 + direction."""
    pi, eighth = vectors.new_tensor(math.pi), vectors.new_tensor(2 * math.pi / 8)  # single precision, as the angle
    turned = torch.atan2(vectors[..., 0], vectors[..., 1]) + pi
    direction = turned.div(eighth, rounding_mode="floor").clamp(0, 7).long()  # not floor(a / b): that rounds up first
    length = vectors.norm(dim=-1).clamp(max=255)
    weight = (length + 1).log2().clamp(0, 8).ceil() / 8
    t, y, x = torch.meshgrid(torch.arange(WINDOW) // 4, torch.arange(GRID) // 5, torch.arange(GRID) // 5, indexing="ij")
    block = ((t * 4 + y) * 4 + x).reshape(WINDOW, -1).to(vectors.device)
    index = (block * 8 + direction).flatten(1)
    zeros = torch.zeros(len(vectors), 512, dtype=torch.float64, device=vectors.device)
    return zeros.scatter_add_(1, index, weight.double().flatten(1))


def tracked_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with a short side of 256: the pixels in which tracks are measured."""
    scale = SHORT_SIDE / min(height, width)
    return round(height * scale), round(width * scale)


def query_points(height: int, width: int) -> Tensor:
    """FVMD's grid [400, 2] (x, y), 8 pixels from the edges of a picture."""
    y, x = (8 + torch.arange(GRID) / (GRID - 1) * (n - 16) for n in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def rescale(points: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Points [..., 2] (x, y; pixel centres are whole numbers) of a picture of size (H, W), when it is resized."""
    factor = points.new_tensor([new[1] / old[1], new[0] / old[0]])
    return (points + 0.5) * factor - 0.5


def tracked_features(track: Callable[[Tensor, Tensor], Tensor], video: Tensor, enlarge: bool = False) -> Tensor:
    """FVMD's features [T - 15, 1024] of a video, or of flow for `chain_flow` [T, C, H, W]: all windows of 16 frames.

    `track` (video [16, C, H, W], points [400, 2] -> [16, 400, 2]) works in the video's own pixels, or with `enlarge`
    on the video resized to a short side of 256, where tracks are measured in any case. Raises ValueError for a clip
    of less than 16 frames."""
    if len(video) < WINDOW:
        raise ValueError(f"a clip has {len(video)} frames, FVMD needs {WINDOW} at least")
    size = tracked_size(*video.shape[-2:])
    if enlarge:
        video = nnf.interpolate(video, size, mode="bilinear", antialias=True)
    own = video.shape[-2:]
    points = rescale(query_points(*size), size, own).to(video.device)
    tracks = [track(video[s : s + WINDOW], points) for s in range(len(video) - WINDOW + 1)]
    return motion_histogram(rescale(torch.stack(tracks), own, size)).cpu()


# ---------------------------------------------------------------------------------------------------- features for FVD


def file_digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def as_bytes(video: Tensor) -> Tensor:
    """[T, 3, H, W] in [-1, 1] -> 0 to 255, whole numbers in float: every metric sees what a file would hold."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round()


class I3D:
    """FVD's network: `i3d_torchscript.pt` (Kinetics-400 logits), from a file, or from a hub id such as
    flateon/FVD-I3D-torchscript. Raises ValueError or FileNotFoundError that name it."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        path = Path(source)
        if not path.is_file():
            if source.count("/") != 1 or path.exists():
                raise FileNotFoundError(f"{source}: no such file; expected i3d_torchscript.pt or a hub id")
            path = _download(source, "i3d_torchscript.pt")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: is no torchscript file ({str(error).splitlines()[0]})") from None
        self.sha256 = file_digest(path)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """[T, 3, H, W] -> 400 logits [1, 400]; the network resizes to 224 x 224, bilinearly, aspect ignored."""
        if len(video) < 10:
            raise ValueError(f"a clip has {len(video)} frames, FVD needs 10 at least")
        clip = rearrange(as_bytes(video).byte(), "t c h w -> 1 c t h w")
        return self.network(clip, rescale=True, resize=True, return_features=True).float().cpu()


def _download(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def random_features(video: Tensor, seed: int, motion: bool) -> Tensor:
    """Channel means [1, 224] of three random 3-D convolutions (32, 64, 128 channels; kernels of zero mean and unit
    norm, from `seed`, on the CPU) of a video [T, 3, H, W], or with `motion` of the differences between its frames.

    On pictures they see appearance and hardly any motion; on differences they see motion, and noise more than all."""
    generator, means = torch.Generator().manual_seed(seed), []
    video = as_bytes(video) / 127.5 - 1
    x = rearrange(video[1:] - video[:-1] if motion else video, "t c h w -> 1 c t h w")
    for channels in (32, 64, 128):
        kernel = torch.randn(channels, x.shape[1], 3, 3, 3, generator=generator)
        kernel -= kernel.mean(dim=(1, 2, 3, 4), keepdim=True)
        kernel /= kernel.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
        x = nnf.conv3d(x, kernel.to(x), stride=(1, 2, 2), padding=1).relu()
        means.append(x.mean(dim=(2, 3, 4)))
    return torch.cat(means, dim=1).cpu()


def distance_draws(
    pairs: list[tuple[list[Tensor], list[Tensor]]],
    halves: bool = False,
    ddof: int = 1,
    scaled: bool = False,
) -> tuple[float, np.ndarray, int]:
    """Frechet distance of sets of clips (features [M, D] of each), in the mean over pairs of sets; what it is of
    SET_RESAMPLES draws of the clips, the same for all sets of as many; and the number of clips.

    halves: of one half of the clips against the other (a floor). scaled: in units of the second set's spread, for
    features of arbitrary scale. The bootstrap over clips is too high, because clips repeat in a sample: the draws are
    moved so that their mean is the value."""
    random, count = np.random.default_rng(0), len(pairs[0][0])
    mixed = random.permutation(count)
    left, right = (mixed[::2], mixed[1::2]) if halves else (mixed, mixed)
    if min(len(left), len(right)) < 2:
        return math.nan, np.full(1, math.nan), len(right)

    units = [torch.cat(y).std(dim=0) if scaled else torch.ones(()) for _, y in pairs]
    units = [unit.clamp(min=0.01 * unit.mean().item() + 1e-12) for unit in units]

    def mean(left: np.ndarray, right: np.ndarray) -> float:
        sets = [(torch.cat([x[i] for i in left]), torch.cat([y[i] for i in right])) for x, y in pairs]
        return float(
            np.mean([frechet_distance(x / unit, y / unit, ddof=ddof) for (x, y), unit in zip(sets, units, strict=True)])
        )

    value, drawn = mean(left, right), []
    for _ in range(SET_RESAMPLES):
        draw, other = (random.integers(len(side), size=len(side)) for side in (left, right))
        drawn.append(mean(left[draw], right[other] if halves else right[draw]))
    return value, np.array(drawn) - np.mean(drawn) + value, len(right)


def set_distance(
    pairs: list[tuple[list[Tensor], list[Tensor]]], halves: bool = False, ddof: int = 1, scaled: bool = False
) -> dict:
    """As `distance_draws`: the value, its 95 % interval, and the number of clips."""
    value, drawn, clips = distance_draws(pairs, halves, ddof, scaled)
    return {"value": value, "interval": interval_of(drawn), "clips": clips}
