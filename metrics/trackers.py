"""Point trackers for FVMD (frechet.py): where do the points of the first frame go?

    chain_flow     along given optical flow: the tracker of Stage I's own motion
    lucas_kanade   on pictures, without weights
    Pips           PIPs++ (Zheng et al. 2023), the tracker of the published FVMD; weights from a file of the user's

Each maps a video (or flow) [T, C, H, W] and points [N, 2] (x, y), where whole numbers are pixel centres, to tracks
[T, N, 2].
"""

from __future__ import annotations

import os
import pickle

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn


def chain_flow(flow: Tensor, points: Tensor) -> Tensor:
    """Points [N, 2] (x, y) of the first frame carried along flow [T, 2, H, W], sampled bilinearly -> [T, N, 2]."""
    tracks = [points.to(flow)]
    for step in flow[:-1]:  # the last one leads out of the clip
        tracks.append(tracks[-1] + sample_at(step[None], tracks[-1][None], "border")[0].T)
    return torch.stack(tracks)


def sample_at(maps: Tensor, points: Tensor, outside: str = "zeros") -> Tensor:
    """Bilinear values of maps [B, C, H, W] at points [B, N, 2] (x, y) -> [B, C, N]."""
    scale = points.new_tensor([maps.shape[-1] - 1, maps.shape[-2] - 1]).clamp(min=1) / 2
    return nnf.grid_sample(maps, (points / scale - 1)[:, None], padding_mode=outside, align_corners=True)[:, :, 0]


def lucas_kanade(video: Tensor, points: Tensor, radius: int = 7, levels: int = 4, iterations: int = 5) -> Tensor:
    """Points [N, 2] (x, y) of the first frame, tracked from frame to frame of a video [T, 3, H, W] -> [T, N, 2].

    Lucas and Kanade 1981, on a pyramid, coarse to fine (Bouguet 2000): the motion of a window between two frames by
    Gauss-Newton steps on its squared difference, summed over colours. Windows move affinely (Shi and Tomasi 1994), and
    their pixels count as far as they have the point's colour: what is behind a thing would hold it back. At every level
    the search starts from rest, from the last step's motion and from the coarser level's result, and the best match is
    kept.

    A motion is [2, 3]: what is at offset (dx, dy) from the point moves by motion @ (1, dx, dy).
    """
    pyramid, tracks = [binomial(video, (1, 2, 1), stride=1)], [points.to(video)]  # rendered edges are hard
    for _ in range(levels - 1):
        pyramid.append(binomial(pyramid[-1], (1, 3, 3, 1), stride=2))
    side = torch.arange(-radius, radius + 1, device=video.device, dtype=video.dtype)
    window, last = torch.cartesian_prod(side, side), video.new_zeros(len(points), 2, 3)
    for t in range(len(video) - 1):
        starts = [torch.zeros_like(last), last]
        for level in reversed(range(levels)):
            scale = video.new_tensor([2**level, 1, 1])  # a shift is in pixels, gradients have no unit
            place = (tracks[-1] + 0.5) / 2**level - 0.5
            here, there = pyramid[level][t : t + 1], pyramid[level][t + 1 : t + 2]
            motion = best_motion(here, there, place, torch.stack(starts) / scale, window, iterations)
            starts = [*starts[:2], motion * scale]
        last = starts[-1]
        tracks.append(tracks[-1] + last[:, :, 0])
    return torch.stack(tracks)


def binomial(video: Tensor, weights: tuple[int, ...], stride: int) -> Tensor:
    """[T, C, H, W] smoothed along both axes; every `stride`-th pixel of that."""
    kernel = video.new_tensor(weights) / sum(weights)
    kernel = (kernel[:, None] * kernel).expand(video.shape[1], 1, -1, -1)
    return nnf.conv2d(nnf.pad(video, (1, 1, 1, 1), "replicate"), kernel, stride=stride, groups=video.shape[1])


ALIKE = 0.15  # standard deviation, over channels in [-1, 1], of colours that count as one


def best_motion(here: Tensor, there: Tensor, place: Tensor, starts: Tensor, window: Tensor, iterations: int) -> Tensor:
    """Gauss-Newton steps at one level, from several starts [S, N, 2, 3] of the motion: pictures [1, C, H, W], places
    [N, 2], window [K, 2] -> [N, 2, 3]. Damping keeps a point without texture where it starts; of equal matches, the
    shorter shift is kept."""

    def patches(picture: Tensor, at: Tensor) -> Tensor:  # [..., N, 2, K] -> [C, ..., N, K]
        values = sample_at(picture, at.mT.reshape(1, -1, 2), "border")[0]
        return values.view(picture.shape[1], *at.shape[:-2], at.shape[-1])

    def error(motion: Tensor) -> Tensor:  # [S, N, 2, 3] -> [C, S, N, K]
        return template[:, None] - patches(there, at + motion @ basis)

    basis = torch.cat([torch.ones_like(window[:, :1]), window], dim=1).T  # [3, K]: (1, dx, dy)
    at, halves = place[..., None] + window.T, place.new_tensor([[[0.5], [0.0]], [[0.0], [0.5]]])
    template = patches(here, at)
    other = (template - template[..., len(window) // 2, None]).square().mean(dim=0)
    weight = (-other / (2 * ALIKE**2)).exp()  # [N, K]
    slope = torch.stack([patches(here, at + h) - patches(here, at - h) for h in halves])  # [2, C, N, K]
    weighted = weight * slope
    products = (weighted[:, None] * slope).sum(dim=2) @ (basis[:, None] * basis).flatten(0, 1).T  # [2, 2, N, 9]
    hessian = rearrange(products, "i j n (a b) -> n (i a) (j b)", a=3)
    damping = place.new_tensor([[0.3, 60.0, 60.0]] * 2).flatten().diag()
    inverse, motion = torch.linalg.inv(hessian + damping), starts
    for _ in range(iterations):
        gradient = (weighted[:, :, None] * error(motion)).sum(dim=1) @ basis.T  # [2, S, N, 3]
        step = inverse @ rearrange(gradient, "i s n a -> s n (i a) 1")
        motion = motion + step.view(motion.shape).clamp(-2, 2)
    tried = torch.cat([starts, motion])
    cost = (weight * error(tried).square().mean(dim=0)).sum(-1) / weight.sum(-1)
    cost = cost + 1e-5 * tried[..., 0].square().sum(-1)
    return tried[cost.argmin(dim=0), torch.arange(len(place), device=place.device)]


# ------------------------------------------------------------------------------------------------------------- PIPs++
# Parameter names are those of the published file `pips2_weights.pth`: loading it strictly is the test.


class ResidualBlock2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = nnf.instance_norm(self.conv1(x)).relu()
        y = nnf.instance_norm(self.conv2(y)).relu()
        return (y + (x if self.downsample is None else nnf.instance_norm(self.downsample(x)))).relu()


class Encoder(nn.Module):
    """Pictures [T, 3, H, W] in [-1, 1] -> features [T, 128, H/8, W/8]: four scales, brought to one size and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        widths = (64, 64, 96, 128, 128)
        for i, stride in enumerate((1, 2, 2, 2)):
            blocks = ResidualBlock2d(widths[i], widths[i + 1], stride), ResidualBlock2d(widths[i + 1], widths[i + 1], 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.conv2 = nn.Conv2d(sum(widths[1:]), 256, 3, 1, 1)
        self.conv3 = nn.Conv2d(256, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2] // STRIDE, x.shape[-1] // STRIDE
        x, scales = nnf.instance_norm(self.conv1(x)).relu(), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            scales.append(nnf.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.conv3(nnf.instance_norm(self.conv2(torch.cat(scales, dim=1))).relu())


class Conv(nn.Module):
    """A convolution over time; the published parameters lie one level deeper than they would have to."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResidualBlock1d(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.first, self.grow = first, (outputs - inputs) // 2
        self.conv1, self.conv2 = Conv(inputs, outputs), Conv(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else nnf.instance_norm(x).relu())
        y = self.conv2(nnf.instance_norm(y).relu())
        return y + nnf.pad(x, (0, 0, self.grow, self.grow))  # new channels on both sides


class DeltaBlock(nn.Module):
    """What is seen around each point at each time [N, 718, T] -> how it should move [N, T, 2]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (128, 128, 128, 256, 256, 512, 512, 1024, 1024)
        self.first_block_conv = Conv(3 * LEVELS * (2 * RADIUS + 1) ** 2 + CHANNELS + 2, widths[0])
        self.basicblock_list = nn.ModuleList(ResidualBlock1d(widths[i], widths[i + 1], i == 0) for i in range(8))
        self.dense = nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_block_conv(x).relu()
        for block in self.basicblock_list:
            x = block(x)
        return self.dense(x.relu().mT)


STRIDE, CHANNELS, LEVELS, RADIUS, ITERATIONS = 8, 128, 4, 3, 16


class Pips(nn.Module):
    """PIPs++: starts from points that rest, and refines all of their tracks sixteen times, by how features at the
    tracks correlate with those of the first frame, two frames before and four frames before."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet, self.delta_block = Encoder(), DeltaBlock()
        self.norm = nn.GroupNorm(1, CHANNELS)  # in the published file, and without use there too

    @classmethod
    def load(cls, path: str | os.PathLike, device: str = "cpu") -> Pips:
        """Opens `pips2_weights.pth`. Raises FileNotFoundError, or ValueError that names the file."""
        model = cls()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state.get("model_state_dict", state))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected PIPs++'s weights, pips2_weights.pth") from None
        except (RuntimeError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: does not hold PIPs++'s weights: {reason}") from None
        return model.to(device).eval()

    @torch.no_grad()
    def forward(self, video: Tensor, points: Tensor) -> Tensor:
        """Video [T, 3, H, W] in [-1, 1], points [N, 2] in pixels -> tracks [T, N, 2]."""
        frames, maps = len(video), self.fnet(video)
        if frames < 2:
            raise ValueError(f"a video has {frames} frames, expected 2 at least")
        pyramid = [maps]
        for _ in range(LEVELS - 1):
            pyramid.append(nnf.avg_pool2d(pyramid[-1], 2))
        tracks = (points / STRIDE).expand(frames, -1, -1).clone()  # [T, N, 2] in cells
        start, time = tracks[0].clone(), torch.arange(frames, device=video.device)
        templates = [sample_at(maps[:1], start[None], "border").expand(frames, -1, -1)] * 3  # [T, C, N]
        for iteration in range(ITERATIONS):
            if iteration > 0:
                for k, ago in ((1, 2), (2, 4)):
                    then = (time - ago).clamp(min=0)
                    templates[k] = sample_at(maps[then], tracks[then], "border")
            seen = [correlations(pyramid, template, tracks) for template in templates]
            delta = self.delta_block(torch.cat([*seen, motion_code(tracks)], dim=-1).permute(1, 2, 0))
            late = iteration > 3 * ITERATIONS // 4  # the published FVMD takes smaller steps in the end
            tracks = tracks + delta.transpose(0, 1) * (0.5 if late else 1.0)
            tracks[0] = start
        return tracks * STRIDE


def correlations(pyramid: list[Tensor], template: Tensor, tracks: Tensor) -> Tensor:
    """Products of a point's template [T, C, N] with the features around it, 7 x 7 cells at each level [T, N, 196]."""
    side = torch.arange(-RADIUS, RADIUS + 1, device=tracks.device, dtype=tracks.dtype)
    window, found = torch.cartesian_prod(side, side), []  # x is the slow one
    for level, maps in enumerate(pyramid):
        volume = torch.einsum("tcn,tchw->tnhw", template, maps) / CHANNELS**0.5
        places = tracks[:, :, None] / 2**level + window  # [T, N, 49, 2]
        values = sample_at(volume.flatten(0, 1)[:, None], places.flatten(0, 1))
        found.append(rearrange(values, "(t n) 1 k -> t n k", t=len(tracks)))
    return torch.cat(found, dim=-1)


def motion_code(tracks: Tensor) -> Tensor:
    """Displacement to the next frame (the last one repeats the one before), [T, N, 2] -> [T, N, 130]: its sines and
    cosines at 32 frequencies, and itself."""
    step = tracks[1:] - tracks[:-1]
    step = torch.cat([step, step[-1:]])
    omega = 10000 ** -torch.linspace(0, 1, CHANNELS // 4, device=tracks.device)
    x, y = step[..., :1] * omega, step[..., 1:] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos(), step], dim=-1)
