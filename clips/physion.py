"""Clips from Physion's trials (section 4 of the paper), the HDF5 files that ThreeDWorld (TDW) wrote.

    python -m clips.physion TRIAL.hdf5... --out DIR    # ids, depth and poses of the trial itself: flow is exact

Reads both namings, Physion's (`_img`) and Physion 1.5's (`_img_cam0`, of several cameras `_img_cam1` ...). A frame
lasts 1/30 s in the first and 1/100 s in the second. A trial without poses, or whose depth is missing or wrong, needs an
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
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from clips.annotate import (
    Annotator,
    Folder,
    Pictures,
    Size,
    add_models,
    by_stem,
    check_numbers,
    crop_box,
    depth_annotator,
    fit,
    fit_nearest,
    flow_annotator,
    need,
    other_setting,
    output_folder,
    parse_size,
    with_bucket,
    with_last,
)
from clips.clip import CAMERA_YAW_UNIT, Clip, clip_header
from sources import expand_home, first_line

if TYPE_CHECKING:
    import h5py


TDW_NEAR, TDW_FAR = 0.1, 100.0  # metres, the clipping planes of ThreeDWorld's camera
FPS, CAM_FPS = 30.0, 100.0  # of files whose names end in nothing, and in _cam0, _cam1 ...
SAME_PICTURE = 16.0  # mean difference of two pictures, in grey levels: of what is only compressed anew, it is smaller
SAME_PLACE = 3.0  # times as far: the surface that is seen of an object and its origin are never that far apart


@dataclass
class Cut:
    """Which frames of a trial are kept, seen by which camera; fps None: what the file's naming stands for."""

    start: int = 0
    step: int = 1
    frames: int | None = None  # None: to the end
    view: int = 0
    fps: float | None = None


@dataclass
class View:
    """One frame's geometry: world to camera and projection [4, 4] (OpenGL: the camera looks along -z), N poses."""

    camera: np.ndarray
    projection: np.ndarray
    positions: np.ndarray  # [N, 3]
    turns: np.ndarray  # [N, 3, 3], object to world


def part(group: h5py.Group, name: str, ending: str = "") -> h5py.Dataset | h5py.Group | None:
    """A member, called `name` and a camera's ending, or just `name`; None where a trial has no such thing."""
    for candidate in (name + ending, name):
        if candidate in group:
            return group[candidate]
    return None


def ending_of(frame: h5py.Group, view: int) -> str:
    """What follows the names of a camera's members: "_cam0" and so on in Physion 1.5, nothing in Physion.

    Raises ValueError that says which cameras there are."""
    names = sorted(frame["images"])
    for ending in (f"_cam{view}", *[""] * (view == 0)):
        if f"_img{ending}" in names:
            return ending
    there = [name for name in names if name.startswith("_img")]
    raise ValueError(f"has no _img pass of --view {view}" + (f", but {', '.join(there)}" if there else ""))


def picture(frame: h5py.Group, name: str, ending: str) -> np.ndarray | None:
    """An image pass, stored as the bytes of a PNG (_img: or JPG) file or as the array itself: uint8 [H, W, 3], or of
    _depth also metres, float [H, W]."""
    if (stored := part(frame["images"], name, ending)) is None:
        return None
    if stored.ndim == 1:
        return decoded(stored[()].tobytes(), name)
    if stored.ndim == 3 and stored.dtype == np.uint8 and stored.shape[2] >= 3:
        return stored[..., :3]
    if stored.ndim == 2 and stored.dtype.kind == "f" and name == "_depth":
        return stored[()]
    raise ValueError(f"its {name} pass is {stored.dtype} {list(stored.shape)}, expected a picture's bytes")


def decoded(content: bytes, name: str) -> np.ndarray:
    """The bytes of a picture file -> uint8 [H, W, 3]. Raises ValueError for a pass that means something else: a JPG's
    colours are no exact ids and no depth, and gray is not three bytes of depth."""
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError(f"its {name} pass is no picture") from None
    if name != "_img" and (image.format == "JPEG" or image.mode not in ("RGB", "RGBA", "P")):
        raise ValueError(f"its {name} pass is {image.format} ({image.mode}), expected a PNG of three colours")
    return np.array(image.convert("RGB"))


def ids_from_colors(colors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`_id` pass uint8 [H, W, 3], colours of N objects [N, 3] -> ids [H, W]: 1 + row; 0 for black and for no row."""
    pixels, rows = (values.astype(np.int64) @ (1 << 16, 1 << 8, 1) for values in (colors, table))
    ids = np.zeros(pixels.shape, np.uint8)
    for i, row in enumerate(rows, start=1):
        ids[(pixels == row) & (row != 0)] = i
    return ids


def trial_ids(colors: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    """`_id` passes, colours of N objects [N, 3] -> ids [T, H, W]. Raises ValueError where no colour is an object's."""
    if len(table) > 255:
        raise ValueError(f"has {len(table)} objects, 255 at most fit a clip")
    ids = np.stack([ids_from_colors(values, table) for values in colors])
    if not ids.any() and np.any(colors):
        raise ValueError("its _id pass shows no colour of static/object_segmentation_colors")
    return ids


def depth_from_bytes(values: np.ndarray) -> np.ndarray:
    """`_depth` pass uint8 [H, W, 3] -> metres [H, W]: (R + G / 256 + B / 65536) (far - near) / 256, near at least."""
    shares = values.astype(np.float64) @ np.array([1, 1 / 256, 1 / 65536]) / 256
    return np.maximum(shares * (TDW_FAR - TDW_NEAR), TDW_NEAR).astype(np.float32)


def trial_depth(passes: list[np.ndarray | None], rgb: np.ndarray) -> tuple[np.ndarray | None, str]:
    """`_depth` passes and pictures [T, H, W, 3] -> metres [T, H, W] and "", or None and why the passes do not tell.

    In some released files the pass holds the picture, which reads as depth without an error."""
    if any(values is None for values in passes):
        return None, "has no depth"
    metres = []
    for values, seen in zip(passes, rgb, strict=True):
        if values.shape[:2] != seen.shape[:2]:
            raise ValueError(f"its _depth pass is {list(values.shape)}, its _img pass {list(seen.shape)}")
        if values.ndim == 2 and (values < 0).any():
            raise ValueError(f"its _depth pass holds {values.min():g}, expected metres")
        alike = values.ndim == 3 and min(np.abs(values - side.astype(float)).mean() for side in (seen, seen[::-1]))
        if values.ndim == 3 and alike < SAME_PICTURE:
            return None, "its _depth pass holds the picture"
        metres.append(np.maximum(values, TDW_NEAR) if values.ndim == 2 else depth_from_bytes(values))
    return np.stack(metres).astype(np.float32), ""


def misplaced(depth: np.ndarray, ids: np.ndarray, view: View) -> str:
    """Depth and ids [H, W] of a frame -> in words, where depth and poses put an object; "" where they agree."""
    far = -(view.positions @ view.camera[:3, :3].T + view.camera[:3, 3])[:, 2]
    seen = [(i, float(np.median(depth[ids == i])), far[i - 1]) for i in np.unique(ids[ids > 0]).tolist()]
    times = [max(told / place, place / told) if place > 0 else math.inf for _, told, place in seen]
    if not times or np.median(times) < SAME_PLACE:
        return ""
    i, told, place = seen[int(np.argmax(times))]
    return f"its _depth pass has object {i} at {told:.1f} m, its pose at {place:.1f} m"


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """[N, 4] (x, y, z, w) -> [N, 3, 3] = 1 + 2 w K + 2 K K, K the matrix of the cross product with (x, y, z)."""
    q = quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)
    cross = np.cross(np.eye(3), q[:, None, :3])
    return np.eye(3) + 2 * q[:, 3, None, None] * cross + 2 * cross @ cross


def read_view(frame: h5py.Group, ending: str) -> View | None:
    """None where a trial lacks poses or camera matrices."""
    wanted = {"camera_matrices": ("camera_matrix", "projection_matrix"), "objects": ("positions", "rotations")}
    groups = [(part(frame, group), names) for group, names in wanted.items()]
    stored = [part(group, name, ending) for group, names in groups if group is not None for name in names]
    if len(stored) < 4 or any(values is None for values in stored):
        return None
    camera, projection, positions, quaternions = (np.asarray(values, np.float64) for values in stored)
    if positions.shape != (len(positions), 3) or quaternions.shape != (len(positions), 4):
        told = f"{list(positions.shape)} and {list(quaternions.shape)}"
        raise ValueError(f"its positions and rotations are {told}, expected [N, 3] and [N, 4]")
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
            if getattr(stored, "shape", None) == ():  # a yes or no, neither numbers nor a group
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


def kept_frames(total: int, cut: Cut) -> range:
    """Every step-th frame from the first on; `stop` is the one after the last. ValueError where there are too few."""
    start, step = cut.start, cut.step
    frames = cut.frames or max(math.ceil((total - start) / step), 2)
    if start + (frames - 1) * step >= total:
        needed = start + (frames - 1) * step + 1
        raise ValueError(f"has {total} frames, --start {start} --step {step} --frames {frames} needs {needed}")
    return range(start, start + frames * step, step)


def is_cloth(file: h5py.File, name: str) -> bool:
    """Whether the name of a trial or of its stimulus says drape: cloth bends, poses do not tell its flow."""
    stimulus = part(file["static"], "stimulus_name")
    return "drape" in f"{name} {'' if stimulus is None else stimulus[()]}".lower()


def trial_clip(file: h5py.File, cut: Cut, flow: Annotator | None, depth: Annotator, name: str) -> Clip:
    """The kept frames as they were rendered. flow None: exact flow. depth: for trials whose own is missing or wrong."""
    groups = [frame for _, frame in sorted(file["frames"].items())]
    kept = kept_frames(len(groups), cut)
    ending = ending_of(groups[kept.start], cut.view)
    rgb, colors, passes = ([picture(groups[n], p, ending) for n in kept] for p in ("_img", "_id", "_depth"))
    if missing := [p for p, values in (("_img", rgb), ("_id", colors)) if any(v is None for v in values)]:
        raise ValueError(f"has no {missing[0]} pass")
    pictures = Pictures(name, 0, np.stack(rgb))
    for folder in (annotator for annotator in (flow, depth) if isinstance(annotator, Folder)):
        folder.check(name, len(rgb), (cut.fps or (CAM_FPS if ending else FPS)) / kept.step)
    ids = trial_ids(colors, file["static/object_segmentation_colors"][()])
    distance, fault = trial_depth(passes, pictures.rgb)
    views = [read_view(frame, ending) for frame in groups[kept.start : kept.stop + 1 : kept.step]]
    pairs = [] if any(view is None for view in views) else list(zip(views[:-1], views[1:], strict=True))
    fault = fault or (misplaced(distance[0], ids[0], views[0]) if pairs else "has no poses or camera")
    if flow is None and (fault or is_cloth(file, name)):
        fault = fault or "shows cloth (drape), whose flow poses do not tell"
        raise ValueError(f"{fault}, so no exact flow; give --flow raft or a folder")
    if distance is None or (fault and pairs):
        distance = depth(pictures)
    steps = flow(pictures) if flow else np.stack([rigid_flow(distance[t], ids[t], *p) for t, p in enumerate(pairs)])
    moves = np.array([view_motion(*pair) for pair in pairs] or np.zeros((len(ids), 2)), np.float32)
    vectors, camera = (each if len(each) == len(ids) else with_last(each) for each in (steps, moves))
    fps = cut.fps or (CAM_FPS if ending else FPS)
    meta = trial_meta(file, groups, kept)
    return with_bucket(Clip(pictures.rgb, vectors, ids, distance, camera, fps / kept.step, meta))


def resize_clip(clip: Clip, size: Size) -> Clip:
    """The pictures are resampled, everything else takes the nearest pixel; flow vectors grow with the picture."""
    left, _, right, _ = crop_box(clip.rgb.shape[2], clip.rgb.shape[1], size)
    flow = fit_nearest(clip.flow, size) * np.float32(size[0] / (right - left))
    ids, depth = fit_nearest(clip.segmentation, size), fit_nearest(clip.depth, size)
    return replace(clip, rgb=np.stack([fit(rgb, size) for rgb in clip.rgb]), flow=flow, segmentation=ids, depth=depth)


def read_trial(path: Path, cut: Cut, flow: Annotator | None, depth: Annotator) -> Clip:
    """Raises ValueError that begins with the path: no HDF5 file, too few frames, a part that is missing or damaged."""
    library = need("h5py", "physion", "h5py")
    try:
        with library.File(path, "r") as file, np.errstate(all="ignore"):  # what is not finite is refused in the end
            return trial_clip(file, cut, flow, depth, path.stem)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    except (KeyError, IndexError, TypeError, AttributeError) as error:  # groups where numbers should be, and so on
        raise ValueError(f"{path}: is no trial as ThreeDWorld writes them: {error.args[0]}") from None


# --------------------------------------------------------------------------------------------------------- command line


def run_physion(arguments: argparse.Namespace) -> int:
    """A clip of every trial -> how many failed: of several, each has its line, and the others are done. Raises
    ValueError, one line."""
    size, paths = arguments.size and parse_size(arguments.size), by_stem(arguments.trials)
    check_numbers(arguments, {"frames": 2, "step": 1, "start": 0, "view": 0})
    if arguments.fps is not None and not 0 < arguments.fps < math.inf:
        raise ValueError(f"--fps {arguments.fps:g}: expected a number above 0")
    out = output_folder(arguments.out)
    flow = None if arguments.flow == "exact" else flow_annotator(arguments.flow, arguments.flow_weights)
    depth = depth_annotator(arguments.depth, arguments.depth_model)
    cut = Cut(**{name: getattr(arguments, name) for name in vars(Cut())})
    need("h5py", "physion", "h5py")
    settings = ("size", "flow", "flow_weights", "depth", "depth_model")
    settings = vars(cut) | {name: getattr(arguments, name) for name in settings}
    failed = 0
    for path in tqdm(paths, unit="trial"):
        file = out / f"{path.stem}.safetensors"
        try:
            if file.exists():
                if told := other_setting(clip_header(file)[2].get("settings", {}), settings):
                    raise ValueError(f"{file}: was {told}: take another --out")
                continue
            clip = read_trial(path, cut, flow, depth)
            clip.meta["settings"] = settings
            (resize_clip(clip, size) if size else clip).save(file)
        except ValueError as error:
            if len(paths) == 1:
                raise
            tqdm.write(f"clips.physion: {error}", file=sys.stderr)
            failed += 1
    if len(paths) > 1:
        print(f"{len(paths) - failed} of {len(paths)} trials done")
    return failed


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clips.physion", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("trials", nargs="+", metavar="TRIAL.hdf5", help="files of Physion or Physion 1.5")
    add("--out", metavar="DIR", required=True, help="where the clips go")
    add("--start", type=int, default=0, help="first frame (default %(default)s)")
    add("--step", type=int, default=1, help="keep every step-th frame (default %(default)s)")
    add("--frames", type=int, help="of a clip (default: to the end of the trial)")
    add("--view", type=int, default=0, metavar="N", help="of files with _img_camN (default %(default)s)")
    add("--fps", type=float, help="frames a second of the file (default: 100 of files with _img_camN, 30 of others)")
    add("--size", help="WIDTHxHEIGHT (default: as rendered)")
    add_models(parser, "exact", "none")
    return expand_home(parser.parse_args(words))


def main() -> None:
    arguments = parse_arguments()
    try:
        if run_physion(arguments):
            sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"clips.physion: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
