"""Clips on disk, pictures of every modality, and the order in which training reads them.

A clip is one `.safetensors` file: RGB frames and the intermediate motion representation R_t = (O_t, S_t, D_t) of
section 3.1 (optical flow, instance segmentation, depth). Stage I and II see each modality as a 3-channel picture in
[-1, 1], because all of them pass through the same frozen VAE; the codecs below make those pictures, and each is
invertible.

    python data.py check DIR                          # what is wrong with which clip; exit code 2 when something is
    python data.py annotate VIDEO... --out DIR        # clips from real videos, see annotate.py
    python data.py physion TRIAL.hdf5... --out DIR    # clips from Physion's trials, see physion.py

Symbols: T frames, H W pixels, O flow [T, 2, H, W] (dx right, dy down, pixels per frame step, frame t -> t+1), S ids
[T, H, W] (0 = background), D depth [T, H, W] along the viewing axis, c camera (forward, yaw).

Camera units: `forward` is metres per frame step, `yaw` is radians per frame step / 0.1, positive to the right. Both
are 0 for a camera that stands still.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

FLOW_RANGE = 32.0  # pixels per frame step that reach the ends of [-1, 1]; larger flow goes beyond, it is not cut off
CAMERA_YAW_UNIT = 0.1  # radians per frame step
DEPTH_MARGIN = 0.25  # room, in first-frame ranges of 1/depth, for what comes nearer or goes farther later


# ----------------------------------------------------------------------------------------------------------- clip files


@dataclass
class Clip:
    """One video with its motion representation. Raises ValueError when shapes disagree or a value is not finite."""

    rgb: np.ndarray  # uint8 [T, H, W, 3]
    flow: np.ndarray  # float32 [T, 2, H, W], pixels per frame step, forward, for every frame
    segmentation: np.ndarray  # uint8 [T, H, W], 0 = background, the same id in every frame
    depth: np.ndarray  # float32 [T, H, W], metres (or any positive unit) along the viewing axis
    camera: np.ndarray = field(default_factory=lambda: np.zeros(2, np.float32))  # (forward, yaw), units above
    fps: float = 7.0
    meta: dict = field(default_factory=dict)  # JSON: scenario, seed, truth of the simulator; "motion_bucket" if known

    def __post_init__(self) -> None:
        frames, height, width = self.rgb.shape[:3]
        shapes = {
            "rgb": (frames, height, width, 3),
            "flow": (frames, 2, height, width),
            "segmentation": (frames, height, width),
            "depth": (frames, height, width),
            "camera": (2,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        for name in ("rgb", "segmentation"):
            if getattr(self, name).dtype != np.uint8:
                raise ValueError(f"{name} is {getattr(self, name).dtype}, expected uint8")
        for name in ("flow", "depth", "camera"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds a value that is not finite")
        if not (self.depth > 0).all():
            raise ValueError(f"depth holds {self.depth.min():g}, expected positive distances")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is {self.fps}, expected a positive number")

    def save(self, path: str | os.PathLike) -> None:
        """Writes one file, complete or not at all; flow and depth are kept in half precision."""
        path = Path(path)
        tensors = {
            "rgb": self.rgb,
            "flow": self.flow.astype(np.float16),
            "segmentation": self.segmentation,
            "depth": self.depth.astype(np.float16),
            "camera": self.camera.astype(np.float32),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        metadata = {"clip": json.dumps({"fps": float(self.fps), "meta": self.meta}, sort_keys=True)}  # one: no order
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike, start: int = 0, frames: int | None = None) -> Clip:
        """Reads frames [start, start + frames) of a clip file; only these are read from disk.

        Raises ValueError that begins with the path: missing or damaged file, too few frames, wrong shapes, NaN.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                stop = None if frames is None else start + frames
                missing = {"rgb", "flow", "segmentation", "depth", "camera"} - set(file.keys())
                if missing:
                    raise ValueError(f"has no {', '.join(sorted(missing))}")
                total = file.get_slice("rgb").get_shape()[0]
                if total < (stop or 1):
                    raise ValueError(f"has {total} frames, {stop or 1} are needed")
                part = {name: file.get_slice(name)[start:stop] for name in ("rgb", "flow", "segmentation", "depth")}
                part |= {"flow": part["flow"].astype(np.float32), "depth": part["depth"].astype(np.float32)}
                told = json.loads((file.metadata() or {}).get("clip", "{}"))
                return cls(**part, camera=file.get_tensor("camera"), **told)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def mirrored(self) -> Clip:
        """As seen in a mirror: left is right. What `meta` tells of the simulator's truth no longer holds and is left
        out."""
        told = {name: self.meta[name] for name in ("scenario", "seed", "motion_bucket") if name in self.meta}
        return Clip(
            rgb=self.rgb[:, :, ::-1].copy(),
            flow=self.flow[..., ::-1] * np.array([-1, 1], np.float32).reshape(2, 1, 1),
            segmentation=self.segmentation[..., ::-1].copy(),
            depth=self.depth[..., ::-1].copy(),
            camera=self.camera * np.array([1, -1], np.float32),
            fps=self.fps,
            meta=told | {"mirrored": True},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Torch tensors: rgb [T, 3, H, W] in [-1, 1], flow, segmentation (int64), depth, camera, fps, motion_bucket."""
        return {
            "rgb": torch.from_numpy(self.rgb).permute(0, 3, 1, 2).float() / 127.5 - 1,
            "flow": torch.from_numpy(self.flow).float(),
            "segmentation": torch.from_numpy(self.segmentation).long(),
            "depth": torch.from_numpy(self.depth).float(),
            "camera": torch.from_numpy(self.camera).float(),
            "fps": torch.tensor(float(self.fps)),
            "motion_bucket": torch.tensor(float(self.meta.get("motion_bucket", 127))),
        }


def clip_shape(path: str | os.PathLike) -> tuple[int, ...]:
    """(T, H, W, 3) from the header of a clip file. Raises ValueError that begins with the path."""
    try:
        with safe_open(path, framework="numpy") as file:
            return tuple(file.get_slice("rgb").get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def find_clips(folder: str | os.PathLike) -> list[Path]:
    """All clip files of a folder, by name. Raises FileNotFoundError when there is none."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no clips (*.safetensors) here")
    return paths


# -------------------------------------------------------------------------------------- modality <-> picture in [-1, 1]


def flow_to_picture(flow: Tensor) -> Tensor:
    """[..., 2, H, W] pixels -> [..., 3, H, W]: (u, v, 2 |f| - 1), each through asinh: small motion keeps precision."""
    squash = math.asinh(FLOW_RANGE)
    magnitude = flow.norm(dim=-3, keepdim=True)
    return torch.cat([flow.asinh() / squash, 2 * magnitude.asinh() / squash - 1], dim=-3)


def picture_to_flow(picture: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., 2, H, W]: direction from (u, v), length the geometric mean of theirs and of the third
    channel's, which is small where either is: noise in a picture of no motion stays below it.
    """
    squash = math.asinh(FLOW_RANGE)
    flow = (picture[..., :2, :, :] * squash).sinh()
    length = flow.norm(dim=-3, keepdim=True)
    magnitude = ((picture[..., 2:, :, :] + 1) / 2 * squash).sinh().clamp(min=0)
    return flow * (magnitude / length.clamp(min=1e-6)).sqrt()


def _palette() -> Tensor:
    """[256, 3]: black for the background, the other corners of the RGB cube, neighbours far apart, then what is left of
    a 7x7x7 grid, always the colour farthest from all before it."""
    axis = torch.linspace(-1, 1, 7)
    grid = torch.cartesian_prod(axis, axis, axis)
    corners = ["000", "100", "011", "010", "101", "001", "110", "111"]  # RGB
    palette = torch.tensor([[2.0 * int(bit) - 1 for bit in corner] for corner in corners])
    distance = (grid[:, None] - palette).square().sum(-1).amin(1)
    while len(palette) < 256:
        palette = torch.cat([palette, grid[distance.argmax(), None]])
        distance = torch.minimum(distance, (grid - palette[-1]).square().sum(-1))
    return palette


PALETTE = _palette()


def color_order(first: Tensor | None) -> Tensor:
    """First-frame ids [H, W] -> [256]: palette index of every id; the ids themselves where no first frame is known.

    Colours go from left to right by centroid (then top to bottom), an order that anybody can read off the first frame;
    ids that only appear later come last.
    """
    if first is None:
        return torch.arange(256)
    height, width = first.shape
    count = torch.bincount(first.flatten(), minlength=256).double()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    center_x, center_y = (
        torch.bincount(first.flatten(), axis.flatten().double().to(first.device), minlength=256) / count
        for axis in (x, y)
    )
    keys = zip(
        (count == 0).tolist(), center_x.nan_to_num().tolist(), center_y.nan_to_num().tolist(), range(256), strict=True
    )
    ids = [key[-1] for key in sorted(list(keys)[1:])]
    order = torch.zeros(256, dtype=torch.long)
    order[torch.tensor(ids)] = torch.arange(1, 256)
    return order.to(first.device)


def segmentation_to_picture(segmentation: Tensor, first: Tensor | None) -> Tensor:
    """Ids [T, H, W], first-frame ids [H, W] -> [T, 3, H, W] in the palette's colours, in the order of `color_order`."""
    colors = PALETTE.to(segmentation.device)[color_order(first)]
    return colors[segmentation].movedim(-1, -3)


def picture_to_segmentation(picture: Tensor, first: Tensor | None) -> Tensor:
    """[T, 3, H, W] -> ids [T, H, W]: the nearest colour among the background and the ids that the first frame shows.

    Without a first frame, the first eight colours (background and seven corners of the RGB cube) are the candidates.
    """
    ids = torch.arange(8) if first is None else torch.cat([first.new_zeros(1), first.flatten()]).unique()
    ids = ids.to(picture.device)
    colors = PALETTE.to(picture.device)[color_order(first).to(picture.device)[ids]]
    return ids[torch.cdist(picture.movedim(-3, -1).float(), colors).argmin(-1)]


def depth_range(first: Tensor | None) -> tuple[float, float]:
    """Ends of the inverse depth scale, from the first frame [H, W] with a margin; (0, 1) where no depth is known."""
    if first is None:
        return 0.0, 1.0
    low, high = (1 / first.max()).item(), (1 / first.min()).item()
    margin = DEPTH_MARGIN * max(high - low, 0.1 * high)
    return max(low - margin, 0.0), high + margin


def depth_to_picture(depth: Tensor, first: Tensor | None) -> Tensor:
    """Depth [T, H, W] -> [T, 3, H, W]: inverse depth (near is bright), normalised by the first frame's range."""
    low, high = depth_range(first)
    gray = (1 / depth - low) / (high - low) * 2 - 1
    return gray.unsqueeze(-3).expand(*gray.shape[:-2], 3, *gray.shape[-2:])


def picture_to_depth(picture: Tensor, first: Tensor | None) -> Tensor:
    """[T, 3, H, W] -> depth [T, H, W]; what decodes to "beyond infinity" becomes 100 times the nearest distance."""
    low, high = depth_range(first)
    inverse = (picture.mean(dim=-3) + 1) / 2 * (high - low) + low
    return 1 / inverse.clamp(min=high / 100)


# -------------------------------------------------------------------------------------- pictures that a user brings


def _open_picture(path: str | os.PathLike) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: {reason}") from None


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]: upright by its EXIF tag, transparent parts over white, 16 bit cut to 8."""
    picture = _open_picture(path)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def read_segmentation(path: str | os.PathLike) -> np.ndarray:
    """Ids uint8 [H, W] from a gray or palette picture (value = id) or a colour picture (colour = object, black = 0)."""
    picture = _open_picture(path)
    if picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"{path}: holds the id {values.max()}, expected 0 to 255")
        return values.astype(np.uint8)
    packed = np.asarray(picture.convert("RGB")).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    colors, ids = np.unique(np.append(packed, 0), return_inverse=True)  # black is always among them, and first
    if len(colors) > 256:
        raise ValueError(f"{path}: has {len(colors)} colours, expected one for each object, 255 at most")
    return ids[:-1].reshape(packed.shape).astype(np.uint8)


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Depth float32 [H, W] in any unit from a gray picture (8 or 16 bit, larger = farther) or a .npy file.

    Raises ValueError when a value is not a positive number: zero is how depth cameras mark "unknown".
    """
    if Path(path).suffix == ".npy":
        try:
            depth = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        picture = _open_picture(path)
        depth = np.asarray(picture if picture.mode[0] in "IF" else picture.convert("L"))
    if depth.ndim != 2:
        raise ValueError(f"{path}: has shape {depth.shape}, expected [H, W]")
    depth = depth.astype(np.float32)
    if not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError(f"{path}: holds the depth {np.nan_to_num(depth, nan=0.0).min():g}, expected positive numbers")
    return depth


# ------------------------------------------------------------------------------------------------ dataset and its order


class ClipDataset(torch.utils.data.Dataset):
    """Clips of a folder as tensors (`Clip.tensors`). An item is named by (clip index, draw): the draw picks the window.

    All clips must have the size of the first and at least `frames` frames (default: as many as the first has); a
    ValueError names the file that is damaged, too short or of another size. `whole`: every clip has just one window.
    """

    def __init__(self, folder: str | os.PathLike, frames: int | None = None) -> None:
        self.paths = find_clips(folder)
        shapes = [clip_shape(path) for path in self.paths]
        self.lengths = [shape[0] for shape in shapes]
        self.frames, (self.height, self.width) = frames or self.lengths[0], shapes[0][1:3]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape[0] < self.frames:
                raise ValueError(f"{path}: has {shape[0]} frames, {self.frames} are needed")
            if shape[1:3] != (self.height, self.width):
                size = f"{shape[2]}x{shape[1]}"
                raise ValueError(f"{path}: is {size}, the first clip of its folder {self.width}x{self.height}")
        self.whole = max(self.lengths) == self.frames

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = key
        start = draw % (self.lengths[index] - self.frames + 1)
        return Clip.load(self.paths[index], start, self.frames).tensors() | {"index": torch.tensor(index)}


class ResumableSampler(torch.utils.data.Sampler):
    """Endless (clip index, draw) pairs for one rank: epochs shuffled by (seed, epoch) alone, from any start on."""

    def __init__(self, length: int, seed: int = 0, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        self.length, self.seed, self.rank, self.world_size, self.start = length, seed, rank, world_size, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch, order = self.start * self.world_size + self.rank, -1, []
        while True:
            if position // self.length != epoch:
                epoch = position // self.length
                generator = np.random.default_rng((self.seed, epoch))
                order, draws = generator.permutation(self.length), generator.integers(1 << 30, size=self.length)
            yield int(order[position % self.length]), int(draws[position % self.length])
            position += self.world_size


# --------------------------------------------------------------------------------------------------------- command line


def check(folder: str | os.PathLike) -> list[str]:
    """One line for every clip of a folder that cannot be read or differs in size from the first readable one."""
    problems, size = [], None
    for path in find_clips(folder):
        try:
            shape = Clip.load(path).rgb.shape
        except ValueError as error:
            problems.append(str(error))
            continue
        size = size or shape
        if shape != size:
            problems.append(f"{path}: [T, H, W, 3] is {list(shape)}, the first clip has {list(size)}")
    return problems


def run_check(arguments: argparse.Namespace) -> None:
    """`data.py check`: all problems on stderr, a line each, and exit code 2."""
    problems = check(arguments.folder)
    for line in problems:
        print(line, file=sys.stderr)
    if problems:
        sys.exit(2)
    print(f"{arguments.folder}: {len(find_clips(arguments.folder))} clips, all readable and of one size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="read every clip, name the bad ones")
    checking.add_argument("folder", metavar="DIR")
    checking.set_defaults(run=run_check)
    import annotate  # here, since they import this file
    import physion

    annotate.add_commands(commands)
    physion.add_commands(commands)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
