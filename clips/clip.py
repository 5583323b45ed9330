"""Clips on disk, and the order in which training reads them.

A clip is one `.safetensors` file: RGB frames and the intermediate motion representation R_t = (O_t, S_t, D_t) of
section 3.1 (optical flow, instance segmentation, depth).

Symbols: T frames, H W pixels, O flow [T, 2, H, W] (dx right, dy down, pixels per frame step, frame t -> t+1), S ids
[T, H, W] (0 = background), D depth [T, H, W] along the viewing axis, c camera [T, 2] (forward, yaw).

Camera units: `forward` is metres per frame step, `yaw` is radians per frame step / 0.1, positive to the right. Both
are 0 for a camera that stands still. Row t is the motion of the ego camera from frame t to t+1; where what follows the
last frame is unknown, the last row repeats the one before. A network is told the mean over the frames that it sees.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from weights import whole_file

CAMERA_YAW_UNIT = 0.1  # radians per frame step
FPS = 7.0  # of a clip that does not say


# ----------------------------------------------------------------------------------------------------------- clip files


def _halved(values: np.ndarray, name: str) -> np.ndarray:
    """The values as float16. Raises ValueError when one becomes infinite."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not (finite := np.isfinite(half)).all():
        raise ValueError(f"{name} holds {values[~finite][0]:g}, which half precision cannot hold (65504 at most)")
    return half


def _is_finite(value: object) -> bool:
    """Whether it is a number that float32, which tensors have, can hold."""
    return isinstance(value, Real) and bool(abs(value) < 1e38)


@dataclass
class Clip:
    """One video with its motion representation. Raises ValueError when shapes disagree or a value is not finite.

    A camera [2], as in former files, is the motion of every frame.
    """

    rgb: np.ndarray  # uint8 [T, H, W, 3]
    flow: np.ndarray  # float32 [T, 2, H, W], pixels per frame step, forward, for every frame
    segmentation: np.ndarray  # uint8 [T, H, W], 0 = background, the same id in every frame
    depth: np.ndarray  # float32 [T, H, W], metres (or any positive unit) along the viewing axis
    camera: np.ndarray = field(default_factory=lambda: np.zeros(2, np.float32))  # float32 [T, 2], units above
    fps: float = FPS
    meta: dict = field(default_factory=dict)  # JSON: scenario, seed, truth of the simulator; "motion_bucket" if known

    def __post_init__(self) -> None:
        if len(np.shape(self.rgb)) != 4 or 0 in np.shape(self.rgb):
            raise ValueError(f"rgb has shape {np.shape(self.rgb)}, expected [T, H, W, 3]")
        frames, height, width = self.rgb.shape[:3]
        camera = np.asarray(self.camera)
        with np.errstate(over="ignore"):  # infinity is refused below, and what is no number
            camera = camera.astype(np.float32) if camera.dtype.kind in "fiu" else camera
        self.camera = np.tile(camera, (frames, 1)) if camera.shape == (2,) else camera
        shapes = {
            "rgb": (frames, height, width, 3),
            "flow": (frames, 2, height, width),
            "segmentation": (frames, height, width),
            "depth": (frames, height, width),
            "camera": (frames, 2),
        }
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name} has shape {np.shape(getattr(self, name))}, expected {shape}")
        for name in ("rgb", "segmentation"):
            if getattr(self, name).dtype != np.uint8:
                raise ValueError(f"{name} is {getattr(self, name).dtype}, expected uint8")
        for name in ("flow", "depth", "camera"):
            if (kind := getattr(self, name).dtype).kind not in "fiu":
                raise ValueError(f"{name} is {kind}, expected floats")
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds a value that is not finite")
        if not (self.depth > 0).all():
            raise ValueError(f"depth holds {self.depth.min():g}, expected positive distances")
        if not (_is_finite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is {self.fps!r:.40}, expected a positive number")
        if not (isinstance(self.meta, dict) and _is_finite(self.meta.get("motion_bucket", 127))):
            raise ValueError(f"meta is {str(self.meta)[:80]}, expected a dict, with a number as motion_bucket")

    def save(self, path: str | os.PathLike) -> None:
        """Writes one file, complete or not at all; flow and depth are kept in half precision.

        Whatever is written can be read again: raises ValueError that begins with the path for what `load` would refuse
        (parts may have been changed since they were checked), and when half precision cannot hold a value: flow or
        depth beyond 65,504, or a depth so small that it would become 0.
        """
        path = Path(path)
        try:
            camera = replace(self).camera  # all parts are checked once more
            flow, depth = _halved(self.flow, "flow"), _halved(self.depth, "depth")
            if not depth.all():
                raise ValueError(f"depth holds {self.depth[depth == 0][0]:g}, which half precision makes 0")
            told = json.dumps({"fps": float(self.fps), "meta": self.meta}, sort_keys=True)
        except TypeError as error:  # of json
            raise ValueError(f"{path}: meta is no JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        parts = {"rgb": self.rgb, "flow": flow, "segmentation": self.segmentation, "depth": depth, "camera": camera}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            tensors = {name: np.ascontiguousarray(part) for name, part in parts.items()}
            save_file(tensors, partial, {"clip": told})  # one text: several would come in any order

    @classmethod
    def load(cls, path: str | os.PathLike, start: int = 0, frames: int | None = None) -> Clip:
        """Reads frames [start, start + frames) of a clip file; only these are read from disk.

        Raises ValueError that begins with the path: missing or damaged file, too few frames, wrong shapes, NaN.
        """
        try:
            with safe_open(path, framework="numpy") as file, np.errstate(over="ignore"):  # infinity is refused below
                stop = None if frames is None else start + frames
                missing = {"rgb", "flow", "segmentation", "depth", "camera"} - set(file.keys())
                if missing:
                    raise ValueError(f"has no {', '.join(sorted(missing))}")
                counts = {name: (file.get_slice(name).get_shape() or [0])[0] for name in file.keys()}  # noqa: SIM118
                total = counts["rgb"]
                for name in ("flow", "segmentation", "depth"):
                    if counts[name] != total:
                        raise ValueError(f"{name} has {counts[name]} frames, rgb {total}")
                if total < (stop or 1):
                    raise ValueError(f"has {total} frames, {stop or 1} are needed")
                part = {name: file.get_slice(name)[start:stop] for name in ("rgb", "flow", "segmentation", "depth")}
                for name in ("flow", "depth"):
                    part[name] = part[name].astype(np.float32, casting="same_kind")
                camera = np.atleast_1d(file.get_tensor("camera"))
                camera = camera if camera.ndim == 1 else camera[start:stop]  # [2] in former files: of every frame
                told = json.loads((file.metadata() or {}).get("clip", "{}"))
                return cls(**part, camera=camera, **told)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:  # AttributeError: bfloat16
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
        """Torch tensors: rgb [T, 3, H, W] in [-1, 1], flow, segmentation (int64), depth, camera [2] (the mean over the
        frames), fps, motion_bucket."""
        return {
            "rgb": torch.from_numpy(self.rgb).permute(0, 3, 1, 2).float() / 127.5 - 1,
            "flow": torch.from_numpy(self.flow).float(),
            "segmentation": torch.from_numpy(self.segmentation).long(),
            "depth": torch.from_numpy(self.depth).float(),
            "camera": torch.from_numpy(self.camera).float().mean(dim=0),
            "fps": torch.tensor(float(self.fps)),
            "motion_bucket": torch.tensor(float(self.meta.get("motion_bucket", 127))),
        }


def clip_header(path: str | os.PathLike) -> tuple[tuple[int, ...], float, dict]:
    """(T, H, W, 3), fps and meta from the header of a clip file. Raises ValueError that begins with the path."""
    try:
        with safe_open(path, framework="numpy") as file:
            told = json.loads((file.metadata() or {}).get("clip", "{}"))
            shape = tuple(file.get_slice("rgb").get_shape())
            if len(shape) != 4:
                raise ValueError(f"rgb has shape {shape}, expected [T, H, W, 3]")
            if not _is_finite(fps := told.get("fps", FPS)):
                raise ValueError(f"fps is {fps!r:.40}, expected a positive number")
            if not isinstance(meta := told.get("meta", {}), dict):
                raise ValueError(f"meta is {str(meta)[:80]}, expected a dict")
            return shape, float(fps), meta
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def find_clips(folder: str | os.PathLike) -> list[Path]:
    """All clip files of a folder, by name. Raises FileNotFoundError when there is none."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no clips (*.safetensors) here")
    return paths


# ------------------------------------------------------------------------------------------------ dataset and its order


class ClipDataset(torch.utils.data.Dataset):
    """Clips of a folder as tensors (`Clip.tensors`). An item is named by (clip index, draw): the draw picks the window.

    All clips must have the size of the first and at least `frames` frames (default: as many as the first has); a
    ValueError names the file that is damaged, too short or of another size. `whole`: every clip has just one window.
    `fps`: that of most clips.
    """

    def __init__(self, folder: str | os.PathLike, frames: int | None = None) -> None:
        if frames is not None and frames < 1:
            raise ValueError(f"frames is {frames}, expected 1 at least")
        self.paths = find_clips(folder)
        shapes, rates = zip(*(clip_header(path)[:2] for path in self.paths), strict=True)
        self.lengths, self.fps = [shape[0] for shape in shapes], statistics.mode(rates)
        self.frames, (self.height, self.width) = frames or self.lengths[0], shapes[0][1:3]
        for path, shape in zip(self.paths, shapes, strict=True):
            if shape[0] < self.frames:
                raise ValueError(f"{path}: has {shape[0]} frames, {self.frames} are needed")
            if shape[1:3] != (self.height, self.width):
                size = f"{shape[2]}x{shape[1]}"
                raise ValueError(f"{path}: is {size}, the first clip of its folder {self.width}x{self.height}")
        self.whole = max(self.lengths) == self.frames

    def check_size(self, factor: int) -> None:
        """Raises ValueError where width or height is no multiple of a network's factor."""
        if self.width % factor or self.height % factor:
            told = f"clips are {self.width}x{self.height}, not a multiple of {factor}"
            raise ValueError(f"{Path(self.paths[0]).parent}: {told}")

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
