"""Clips from Physion's trials (section 4 of the paper), the HDF5 files that ThreeDWorld (TDW) wrote.

    python -m clips.physion TRIAL.hdf5... --out DIR    # ids, depth and poses of the trial itself: flow is exact

Reads both namings, Physion's (`_img`) and Physion 1.5's (`_img_cam0`). A trial without depth or poses needs an
estimator of clips.annotate, or a folder with a file for each kept frame, FOLDER/TRIAL/000000.npy ...: `--flow raft`.
Needs h5py. To resume, run the same command again: clips that exist are skipped. Letters are those of clip.py.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from clips.annotate import (
    Annotator,
    Pictures,
    Size,
    add_models,
    by_stem,
    check_numbers,
    crop_box,
    depth_annotator,
    first_line,
    fit,
    fit_nearest,
    flow_annotator,
    need,
    output_folder,
    parse_size,
    with_bucket,
    with_last,
)
from clips.clip import CAMERA_YAW_UNIT, Clip

if TYPE_CHECKING:
    import h5py


TDW_NEAR, TDW_FAR = 0.1, 100.0  # metres, the clipping planes of ThreeDWorld's camera
TDW_FPS = 30.0


@dataclass
class View:
    """One frame's geometry: world to camera and projection [4, 4] (OpenGL: the camera looks along -z), N poses."""

    camera: np.ndarray
    projection: np.ndarray
    positions: np.ndarray  # [N, 3]
    turns: np.ndarray  # [N, 3, 3], object to world


def part(group: h5py.Group, name: str) -> h5py.Dataset | h5py.Group | None:
    """A member, called `name` (Physion) or `name_cam0` (Physion 1.5); None where a trial has no such thing."""
    for candidate in (name, f"{name}_cam0"):
        if candidate in group:
            return group[candidate]
    return None


def picture(frame: h5py.Group, name: str) -> np.ndarray | None:
    """An image pass as uint8 [H, W, 3], stored as the bytes of a PNG or JPG file, or (depth) as the array itself."""
    stored = part(frame["images"], name)
    if stored is None or stored.ndim == 3:
        return None if stored is None else stored[..., :3]
    return np.array(Image.open(io.BytesIO(stored[()].tobytes())).convert("RGB"))


def ids_from_colors(colors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`_id` pass uint8 [H, W, 3], colours of N objects [N, 3] -> ids [H, W]: 1 + row; 0 for black and for no row."""
    pixels, rows = (values.astype(np.int64) @ (1 << 16, 1 << 8, 1) for values in (colors, table))
    ids = np.zeros(pixels.shape, np.uint8)
    for i, row in enumerate(rows, start=1):
        ids[(pixels == row) & (row != 0)] = i
    return ids


def depth_from_bytes(values: np.ndarray) -> np.ndarray:
    """`_depth` pass uint8 [H, W, 3] -> metres [H, W]: (R + G / 256 + B / 65536) (far - near) / 256, near at least."""
    shares = values.astype(np.float64) @ np.array([1, 1 / 256, 1 / 65536]) / 256
    return np.maximum(shares * (TDW_FAR - TDW_NEAR), TDW_NEAR).astype(np.float32)


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] (x, y, z, w) -> [N, 3, 3] = 1 + 2 w K + 2 K K, K the matrix of the cross product with (x, y, z)."""
    q = quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)
    cross = np.cross(np.eye(3), q[:, None, :3])
    return np.eye(3) + 2 * q[:, 3, None, None] * cross + 2 * cross @ cross


def read_view(frame: h5py.Group) -> View | None:
    """None where a trial lacks poses or camera matrices."""
    wanted = {"camera_matrices": ("camera_matrix", "projection_matrix"), "objects": ("positions", "rotations")}
    groups = [(part(frame, group), names) for group, names in wanted.items()]
    stored = [part(group, name) for group, names in groups if group is not None for name in names]
    if len(stored) < 4 or any(values is None for values in stored):
        return None
    camera, projection, positions, quaternions = (np.asarray(values, np.float64) for values in stored)
    return View(camera.reshape(4, 4), projection.reshape(4, 4), positions, rotations(quaternions))


def move_points(points: np.ndarray, ids: np.ndarray, here: View, there: View) -> np.ndarray:
    """World points [H, W, 3] of the objects `ids` [H, W] -> where they are in the other view: R' R^-1 (X - p) + p'."""
    index = np.maximum(ids.astype(int) - 1, 0)
    turn = there.turns @ here.turns.transpose(0, 2, 1)
    moved = np.einsum("hwij,hwj->hwi", turn[index], points - here.positions[index]) + there.positions[index]
    return np.where(ids[..., None] > 0, moved, points)


def rigid_flow(depth: np.ndarray, ids: np.ndarray, here: View, there: View) -> np.ndarray:
    """Depth and ids [H, W] of one frame and two views -> flow [2, H, W] in pixels, exact for rigid things.

    A pixel is lifted by its depth, moved with its object (the background stays), and projected again. Zero for what
    ends behind the camera. The projection is symmetric, as ThreeDWorld's is.
    """
    size, flip = np.array(depth.shape[::-1]), np.array([1, -1])  # rows go down, OpenGL's y goes up
    screen = (2 * np.stack(np.indices(depth.shape)[::-1], axis=-1) + 1) / size * flip - flip  # [H, W, 2] in -1..1
    scale, scale_there = (view.projection.diagonal()[:2] for view in (here, there))  # 1 / tan of half the field of view
    seen = np.concatenate([screen / scale, -np.ones_like(screen[..., :1])], axis=-1) * depth[..., None]
    to_world = np.linalg.inv(here.camera)
    moved = move_points(seen @ to_world[:3, :3].T + to_world[:3, 3], ids, here, there)
    moved = moved @ there.camera[:3, :3].T + there.camera[:3, 3]
    distance = -moved[..., 2:]
    flow = (moved[..., :2] / np.maximum(distance, TDW_NEAR) * scale_there - screen) * flip * size / 2
    flow = np.where((distance <= TDW_NEAR) | (np.abs(flow) < 1e-6), 0, flow)  # what rests has exactly no flow
    return flow.transpose(2, 0, 1).astype(np.float32)


def view_motion(here: View, there: View) -> tuple[float, float]:
    """(forward in metres, yaw in clip.py's unit) of the camera between two views."""
    step = there.camera @ np.linalg.inv(here.camera)
    return step[2, 3], math.atan2(step[0, 2], step[0, 0]) / CAMERA_YAW_UNIT


def trial_meta(file: h5py.File, frames: list[h5py.Group], kept: range) -> dict:
    """Truth in our ids (i + 1 for row i of static/object_ids), with frame steps of the clip.

    contacts: [id, id, first frame step in which they touch], as in clips.simulate; labels: every yes-or-no label, true
    when it is true in some frame of the trial; target, zone, probe: ids, 0 where unknown.
    """
    ids = {number: i for i, number in enumerate(file["static/object_ids"][()].ravel().tolist(), start=1)}
    first, labels = {}, {}
    for number, frame in enumerate(frames):
        for label, stored in (part(frame, "labels") or {}).items():
            if stored.ndim == 0:
                labels[label] = labels.get(label, False) or bool(stored[()])
        if kept.start <= number <= kept.stop:
            step = max(math.ceil((number - kept.start) / kept.step) - 1, 0)  # what is seen after step t happened in it
            for pair in touching(frame, ids):
                first.setdefault(pair, step)
    refers = {name: part(file["static"], f"{name}_id") for name in ("target", "zone", "probe")}
    return {
        "contacts": sorted([*pair, step] for pair, step in first.items()),
        "labels": labels,
        "scenario": "physion",
        "source": Path(file.filename).name,
        **{
            name: ids.get((np.ravel(value[()]).tolist() or [None])[0], 0)
            for name, value in refers.items()
            if value is not None
        },
    }


def touching(frame: h5py.Group, ids: dict[int, int]) -> list[tuple[int, int]]:
    """Pairs (smaller id, larger id) of objects that a frame's collisions name, but for those that part."""
    group = part(frame, "collisions")
    if group is None or part(group, "object_ids") is None:
        return []
    pairs = part(group, "object_ids")[()].reshape(-1, 2).tolist()
    states = part(group, "states")
    states = [b"stay"] * len(pairs) if states is None else states[()].tolist()
    known = [pair for pair, state in zip(pairs, states, strict=True) if state != b"exit" and set(pair) <= set(ids)]
    return [tuple(sorted((ids[a], ids[b]))) for a, b in known]


def kept_frames(total: int, start: int, step: int, frames: int | None) -> range:
    """Every step-th frame from `start` on; `stop` is the one after the last. ValueError where there are too few."""
    frames = frames or max(math.ceil((total - start) / step), 2)
    if start + (frames - 1) * step >= total:
        needed = start + (frames - 1) * step + 1
        raise ValueError(f"has {total} frames, --start {start} --step {step} --frames {frames} needs {needed}")
    return range(start, start + frames * step, step)


def is_cloth(file: h5py.File, name: str) -> bool:
    """Whether the name of a trial or of its stimulus says drape: cloth bends, poses do not tell its flow."""
    stimulus = part(file["static"], "stimulus_name")
    return "drape" in f"{name} {'' if stimulus is None else stimulus[()]}".lower()


def trial_clip(file: h5py.File, kept: range, flow: Annotator | None, depth: Annotator, name: str) -> Clip:
    """The kept frames as they were rendered. flow None: exact flow. depth: for trials without a depth pass."""
    groups = [frame for _, frame in sorted(file["frames"].items())]
    rgb, colors, metres = ([picture(groups[n], p) for n in kept] for p in ("_img", "_id", "_depth"))
    if missing := [p for p, values in (("_img", rgb), ("_id", colors)) if any(v is None for v in values)]:
        raise ValueError(f"has no {missing[0]} pass")
    pictures, table = Pictures(name, 0, np.stack(rgb)), file["static/object_segmentation_colors"][()]
    if len(table) > 255:
        raise ValueError(f"has {len(table)} objects, 255 at most fit a clip")
    ids = np.stack([ids_from_colors(values, table) for values in colors])
    known = all(values is not None for values in metres)
    distance = np.stack([depth_from_bytes(v) for v in metres]) if known else depth(pictures)
    views = [read_view(frame) for frame in groups[kept.start : kept.stop + 1 : kept.step]]
    pairs = [] if any(view is None for view in views) else list(zip(views[:-1], views[1:], strict=True))
    if flow is None and not (known and pairs):
        raise ValueError("has no depth, poses or camera, so no exact flow; give --flow raft or a folder")
    if flow is None and is_cloth(file, name):
        raise ValueError("shows cloth (drape), whose flow poses do not tell; give --flow raft or a folder")
    steps = flow(pictures) if flow else np.stack([rigid_flow(distance[t], ids[t], *p) for t, p in enumerate(pairs)])
    moves = np.array([view_motion(*pair) for pair in pairs] or np.zeros((len(ids), 2)), np.float32)
    vectors, camera = (each if len(each) == len(ids) else with_last(each) for each in (steps, moves))
    meta = trial_meta(file, groups, kept)
    return with_bucket(Clip(pictures.rgb, vectors, ids, distance, camera, TDW_FPS / kept.step, meta))


def resize_clip(clip: Clip, size: Size) -> Clip:
    """The pictures are resampled, everything else takes the nearest pixel; flow vectors grow with the picture."""
    left, _, right, _ = crop_box(clip.rgb.shape[2], clip.rgb.shape[1], size)
    flow = fit_nearest(clip.flow, size) * np.float32(size[0] / (right - left))
    ids, depth = fit_nearest(clip.segmentation, size), fit_nearest(clip.depth, size)
    return replace(clip, rgb=np.stack([fit(rgb, size) for rgb in clip.rgb]), flow=flow, segmentation=ids, depth=depth)


def read_trial(
    path: Path, start: int, step: int, frames: int | None, flow: Annotator | None, depth: Annotator
) -> Clip:  # fmt: skip
    """Raises ValueError that begins with the path: no HDF5 file, too few frames, a part that is missing or damaged."""
    library = need("h5py", "physion", "h5py")
    try:
        with library.File(path, "r") as file:
            kept = kept_frames(len(file["frames"]), start, step, frames)
            return trial_clip(file, kept, flow, depth, path.stem)
    except KeyError as error:
        raise ValueError(f"{path}: is no trial: {error.args[0]}") from None
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None


# --------------------------------------------------------------------------------------------------------- command line


def run_physion(arguments: argparse.Namespace) -> None:
    """Raises ValueError, one line."""
    size, paths = arguments.size and parse_size(arguments.size), by_stem(arguments.trials)
    check_numbers(arguments, {"frames": 2, "step": 1, "start": 0})
    out = output_folder(arguments.out)
    flow = None if arguments.flow == "exact" else flow_annotator(arguments.flow, arguments.flow_weights)
    depth = depth_annotator(arguments.depth, arguments.depth_model)
    for path in tqdm(paths, unit="trial"):
        file = out / f"{path.stem}.safetensors"
        if not file.exists():
            clip = read_trial(path, arguments.start, arguments.step, arguments.frames, flow, depth)
            (resize_clip(clip, size) if size else clip).save(file)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clips.physion", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("trials", nargs="+", metavar="TRIAL.hdf5", help="files of Physion or Physion 1.5")
    add("--out", metavar="DIR", required=True, help="where the clips go")
    add("--start", type=int, default=0, help="first frame (default %(default)s)")
    add("--step", type=int, default=1, help="keep every step-th frame, 30 / step a second (default %(default)s)")
    add("--frames", type=int, help="of a clip (default: to the end of the trial)")
    add("--size", help="WIDTHxHEIGHT (default: as rendered)")
    add_models(parser, "exact", "none")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    try:
        run_physion(arguments)
    except (ValueError, OSError) as error:
        print(f"clips.physion: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
