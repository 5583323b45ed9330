"""Clips from real videos (section 4 of the paper trains on driving videos), with annotators that other people trained.

    python -m clips.annotate VIDEO... --out DIR        # flow by RAFT, ids by SAM 2, depth by Depth Anything V2
    python -m clips.annotate VIDEO... --export FRAMES  # only write what annotators see: FRAMES/VIDEO/000000.png ...
    torchrun --nproc_per_node 8 -m clips.annotate FOLDER --list FILE --out DIR    # eight GPUs share the videos

VIDEO is a file, or a folder of videos.

Each annotator may be replaced by a folder with one file a frame, FOLDER/VIDEO/000000.npy and so on, where VIDEO is the
file's name without its ending and frames are counted as `--export` counts them. Its number of files must be that of
the video's frames:
    --flow FOLDER           .npy [2, H, W] or .flo, pixels, from this frame to the next one
    --segmentation FOLDER   .png (gray or palette, value = id) or .npy [H, W], 0 = background, one id an object
    --depth FOLDER          .npy [H, W] or .png (8 or 16 bit, larger = farther), positive

The models are optional packages (torchvision, transformers) and are imported only where an option asks for them.
To resume, run the same command again: clips that exist are skipped, and a video that is done is not even read
(DIR/.videos says which ones are). A video that fails is one line; the others are still done. Letters are those of
clip.py.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from clips.clip import CAMERA_YAW_UNIT, Clip, clip_header
from clips.maps import read_depth, read_flow, read_ids
from clips.video import pieces, read_video
from sources import check_model, expand_home, first_line
from weights import whole_file

VIDEO_ENDINGS = {".3gp", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}  # in a folder
BUCKET_SPEED = 0.1  # picture heights a second that are motion bucket 127, SVD's default
RAFT_SIDE = 128  # pixels; RAFT's coarsest correlation needs that many
RELATIVE_FAR = 50.0  # depth of the farthest point of a clip when the nearest is 1
MASK_AREA = (0.001, 0.5)  # of the picture: smaller masks are specks, larger ones are background
CAMERA_SAMPLES = 20_000  # pixels a frame that the camera's motion is measured on
Size = tuple[int, int]  # width, height


@dataclass
class Pictures:
    """Frames that annotators see: `rgb` uint8 [T, H, W, 3], consecutive frames of the video `name` from `start` on."""

    name: str
    start: int
    rgb: np.ndarray


Annotator = Callable[[Pictures], np.ndarray]  # -> flow [T - 1, 2, H, W], ids uint8 [T, H, W] or depth [T, H, W]


def need(module: str, option: str, package: str, *names: str) -> ModuleType:
    """An optional package's module, which has `names`. Raises ValueError that says what to install."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{option} needs {package}: pip install {package}") from None
    except RuntimeError as error:  # compiled for another torch
        raise ValueError(f"{option} needs {package}, but the installed one fails: {first_line(error)}") from None
    try:
        for name in names:
            getattr(found, name)  # transformers imports what belongs to a name only now
    except (AttributeError, ImportError) as error:
        told = f"{option} needs a {package} that has {name} (pip install -U {package}): {first_line(error)}"
        raise ValueError(told) from None
    return found


def processes() -> tuple[int, int]:
    """Which of how many processes this is: they need not know of each other to share the videos."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device() -> str:
    """The CPU, or this process' GPU; where there are fewer GPUs than processes, they share them."""
    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % gpus}" if gpus else "cpu"


# ------------------------------------------------------------------------------------------------- sizes of pictures


def crop_box(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest central part of a picture that has the aspect ratio of `size`."""
    scale = min(width / size[0], height / size[1])
    left, top = (width - scale * size[0]) / 2, (height - scale * size[1]) / 2
    return left, top, width - left, height - top


def fit(rgb: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3] -> the central part at another size."""
    box = crop_box(rgb.shape[1], rgb.shape[0], size)
    return np.array(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS, box=box))


def fit_nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """[..., H, W] -> the nearest values of the central part at another size: ids, depth and flow are never mixed."""
    left, top, right, bottom = crop_box(values.shape[-1], values.shape[-2], size)
    x = (left + (np.arange(size[0]) + 0.5) * (right - left) / size[0]).astype(int)
    y = (top + (np.arange(size[1]) + 0.5) * (bottom - top) / size[1]).astype(int)
    return values[..., y[:, None], x]


def progress(path: Path, size: Size, fps: float) -> Iterator[np.ndarray]:
    """A video's frames uint8 [H, W, 3] at another size and rate, with a bar; of several processes, the first one shows
    its own."""
    frames = (fit(frame, size) for frame in read_video(path, fps))
    return tqdm(frames, path.name, unit="frame", disable=processes()[0] > 0)


# ------------------------------------------------------------------------------------------------------ a user's folder


READERS = {  # what a folder holds: endings in order of preference, and who reads them
    "--flow": ((".npy", ".flo"), read_flow),
    "--segmentation": ((".png", ".npy"), read_ids),
    "--depth": ((".npy", ".png"), read_depth),
}


@dataclass(frozen=True)
class Folder:
    """A user's annotator: `option` of the command line, and the folder with a folder for each video."""

    option: str
    root: Path

    def __call__(self, pictures: Pictures) -> np.ndarray:
        """What it says about these frames (the last one has no flow)."""
        count, height, width = pictures.rgb.shape[:3]
        numbers = range(pictures.start, pictures.start + count - (self.option == "--flow"))
        return np.stack([self.read(pictures.name, number, (width, height)) for number in numbers])

    def read(self, name: str, number: int, size: Size) -> np.ndarray:
        """The array of one frame. Raises ValueError that names the file: missing, unreadable, of another size."""
        (endings, read), folder = READERS[self.option], self.root / name
        paths = [path for ending in endings if (path := folder / f"{number:06d}{ending}").exists()]
        if not paths:
            raise ValueError(f"{self.option} {folder}: has no {number:06d}{' or '.join(endings)}")
        values = read(paths[0])
        if values.shape[-2:] != (size[1], size[0]):
            height, width = values.shape[-2:]
            raise ValueError(f"{paths[0]}: is {width}x{height}, the frames are {size[0]}x{size[1]}")
        return values

    def check(self, name: str, frames: int, fps: float) -> None:
        """Raises ValueError unless there is a file for each of a video's frames, and for no others: they would be of
        other frames than those they are taken for. The last frame's flow may be missing."""
        endings, folder = READERS[self.option][0], self.root / name
        found = {file.stem for file in folder.glob("[0-9]" * 6 + ".*") if file.suffix in endings}
        needed = [f"{number:06d}" for number in range(frames - (self.option == "--flow"))]
        if len(found) not in (len(needed), frames):
            told = f"has {len(found)} files (000000{' or '.join(endings)} ...)"
            raise ValueError(f"{self.option} {folder}: {told}, the video {frames} frames at --fps {fps:g}")
        if missing := [number for number in needed if number not in found]:
            raise ValueError(f"{self.option} {folder}: has no {missing[0]}{' or '.join(endings)}")


def folder_annotator(option: str, choice: str, others: str) -> Annotator:
    if not Path(choice).is_dir():
        raise ValueError(f"{option} {choice}: expected {others} or a folder")
    return Folder(option, Path(choice))


# ----------------------------------------------------------------------------------------------------------------- flow


@torch.inference_mode()
def raft_flow(pictures: Pictures, model: nn.Module) -> np.ndarray:
    """[T - 1, 2, H, W]. RAFT takes multiples of 8, RAFT_SIDE at least: borders are repeated, and cut off again."""
    height, width = pictures.rgb.shape[1:3]
    bottom, right = (max(-side % 8, RAFT_SIDE - side) for side in (height, width))
    frames = torch.from_numpy(pictures.rgb).movedim(-1, 1).float() / 127.5 - 1
    frames = nn.functional.pad(frames, (0, right, 0, bottom), mode="replicate").to(device())
    pairs = zip(frames[:-1, None], frames[1:, None], strict=True)  # one at a time: memory does not grow with T
    flow = torch.cat([model(a, b)[-1][..., :height, :width] for a, b in pairs])  # the last of RAFT's refinements
    return flow.float().cpu().numpy()


def load_raft(choice: str, weights: str | None) -> nn.Module:
    """torchvision's RAFT with weights of a local file, or else the published ones (downloaded once)."""
    models = need("torchvision.models.optical_flow", f"--flow {choice}", "torchvision")
    build = {"raft": models.raft_large, "raft-small": models.raft_small}[choice]
    try:
        model = build(weights=None if weights else "DEFAULT")
        if weights:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        source = f"--flow-weights {weights}" if weights else f"--flow {choice} (or give --flow-weights FILE)"
        raise ValueError(f"{source}: {first_line(error)}") from None
    return model.eval().to(device())


def flow_annotator(choice: str, weights: str | None) -> Annotator:
    if choice in ("raft", "raft-small"):
        return partial(raft_flow, model=load_raft(choice, weights))
    if weights:
        raise ValueError(f"--flow-weights {weights}: goes with --flow raft or raft-small, not {choice}")
    return folder_annotator("--flow", choice, "raft, raft-small")


# --------------------------------------------------------------------------------------------------------- segmentation


def paint_masks(masks: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """Boolean masks [H, W] -> ids uint8 [H, W]: MASK_AREA only, small ones over large ones, ids 1, 2, ... by area."""
    low, high = (share * height * width for share in MASK_AREA)
    masks = [np.asarray(mask, bool) for mask in masks]
    masks = sorted((mask for mask in masks if low <= mask.sum() <= high), key=np.sum, reverse=True)[:255]
    ids = np.zeros((height, width), np.uint8)
    for number, mask in enumerate(masks, start=1):
        ids[mask] = number
    return ids


def imagenet_pixels(rgb: np.ndarray, side: int) -> Tensor:
    """uint8 [T, H, W, 3] -> [T, 3, side, side], stretched, in ImageNet's mean and deviation: SAM 2's input."""
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    frames = torch.from_numpy(rgb).movedim(-1, 1).float() / 255
    frames = nn.functional.interpolate(frames, (side, side), mode="bilinear", antialias=True)
    return (frames - mean) / deviation


def propagate(rgb: np.ndarray, first: np.ndarray, model: nn.Module) -> np.ndarray:
    """Frames [T, H, W, 3] and ids of the first one [H, W] -> ids of all [T, H, W]: the largest positive logit wins."""
    ids = np.unique(first[first > 0]).tolist()
    if not ids:
        return np.zeros(rgb.shape[:3], np.uint8)
    session_class = need("transformers", "--segmentation sam2", "transformers").Sam2VideoInferenceSession
    pixels, size = imagenet_pixels(rgb, model.config.image_size), rgb.shape[1:3]
    session = session_class(pixels, *size, inference_device=model.device, dtype=model.dtype)
    for i in ids:
        mask = torch.from_numpy(first == i).float()[None, None]
        mask = nn.functional.interpolate(mask, pixels.shape[-2:], mode="bilinear", antialias=True) >= 0.5
        session.add_mask_inputs(session.obj_id_to_idx(i), 0, mask)
    session.obj_with_new_inputs = list(ids)
    tracked = [first]
    for output in list(model.propagate_in_video_iterator(session, start_frame_idx=0))[1:]:
        logits = nn.functional.interpolate(output.pred_masks.float(), size, mode="bilinear")[:, 0]  # [N, H, W]
        best, winner = logits.max(dim=0)
        names = torch.tensor(output.object_ids, dtype=torch.uint8, device=best.device)
        tracked.append((names[winner] * (best > 0)).cpu().numpy())
    return np.stack(tracked)


def sam2_ids(pictures: Pictures, model: nn.Module, propose: Callable[[Image.Image], dict]) -> np.ndarray:
    """[T, H, W]: masks proposed on the first frame, then followed through the clip."""
    masks = propose(Image.fromarray(pictures.rgb[0]))["masks"]
    return propagate(pictures.rgb, paint_masks(masks, *pictures.rgb.shape[1:3]), model)


def segmentation_annotator(choice: str, source: str) -> Annotator:
    if choice == "none":
        return lambda pictures: np.zeros(pictures.rgb.shape[:3], np.uint8)
    if choice != "sam2":
        return folder_annotator("--segmentation", choice, "sam2, none")
    library = need("transformers", "--segmentation sam2", "transformers", "Sam2VideoModel", "pipeline")
    check_model("--segmentation-model", source)
    need("torchvision", "--segmentation sam2", "torchvision")  # the mask proposals' picture processor
    try:
        model = library.Sam2VideoModel.from_pretrained(source).eval().to(device())
        propose = library.pipeline("mask-generation", model=source, device=device())
    except (OSError, ValueError) as error:
        raise ValueError(f"--segmentation-model {source}: {first_line(error)}") from None
    return partial(sam2_ids, model=model, propose=propose)


# ---------------------------------------------------------------------------------------------------------------- depth


def relative_depth(nearness: np.ndarray) -> np.ndarray:
    """Relative inverse depth [T, H, W] (any scale and offset, near = large) -> depth from 1 to RELATIVE_FAR.

    1 / depth is linear in it, 1 at the largest value of the clip and 1 / RELATIVE_FAR at the smallest one: one scale
    for all frames, since a scale for each would flicker.
    """
    low, high = nearness.min(), nearness.max()
    share = (nearness - low) / (high - low or 1)  # a flat clip is far
    return (1 / (1 / RELATIVE_FAR + (1 - 1 / RELATIVE_FAR) * share)).astype(np.float32)


@torch.inference_mode()
def estimated_depth(
    pictures: Pictures, model: nn.Module, processor: Callable  # the transformers classes have no common type
) -> np.ndarray:  # fmt: skip
    """[T, H, W] of a model that returns relative inverse depth, frame by frame."""
    nearness = []
    for frame in pictures.rgb:
        output = model(**processor(images=Image.fromarray(frame), return_tensors="pt").to(device()))
        told = processor.post_process_depth_estimation(output, target_sizes=[frame.shape[:2]])
        nearness.append(told[0]["predicted_depth"].float().cpu().numpy())
    return relative_depth(np.stack(nearness))


def depth_annotator(choice: str, source: str) -> Annotator:
    if choice == "none":
        return lambda pictures: np.ones(pictures.rgb.shape[:3], np.float32)
    if choice != "depth-anything":
        return folder_annotator("--depth", choice, "depth-anything, none")
    library = need("transformers", "--depth depth-anything", "transformers", "AutoModelForDepthEstimation")
    check_model("--depth-model", source)
    try:
        model = library.AutoModelForDepthEstimation.from_pretrained(source).eval().to(device())
        processor = library.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--depth-model {source}: {first_line(error)}") from None
    return partial(estimated_depth, model=model, processor=processor)


# --------------------------------------------------------------------------------------------------------------- camera


def camera_step(flow: np.ndarray, depth: np.ndarray, still: np.ndarray, focal: float) -> tuple[float, float]:
    """Flow [2, H, W], depth and `still` [H, W], focal length in pixels -> (forward, yaw in radians, right = positive).

    A camera that yaws by a and then goes forward by m sees a point (X, Y, Z) at X cos a - Z sin a, Y and
    X sin a + Z cos a - m. For a pixel (x, y) from the centre that goes to (x', y') this says, with f the focal length,
        x' - x                    = x' / Z * m / cos a - (f + x x' / f) * tan a
        y' - y - y (1 / cos a - 1) = y' / Z * m / cos a - x y' / f * tan a
    which is linear in m / cos a and tan a. Solved for the least sum of absolute errors (least squares with weights
    1 / error, ten rounds), so that things that move by themselves have little say.
    """
    y, x = np.nonzero(still)
    y, x = (axis[:: max(1, len(x) // CAMERA_SAMPLES)] for axis in (y, x))
    (dx, dy), z = flow[:, y, x].astype(np.float64), depth[y, x].astype(np.float64)
    x, y = x - (depth.shape[1] - 1) / 2, y - (depth.shape[0] - 1) / 2
    to_x, to_y = x + dx, y + dy
    rows = np.concatenate([np.stack([to_x / z, -focal - x * to_x / focal]), np.stack([to_y / z, -x * to_y / focal])], 1)
    weights, yaw = np.ones(rows.shape[1]), 0.0
    for _ in range(10):
        seen = np.concatenate([dx, dy - y * (1 / math.cos(yaw) - 1)])
        ahead, turn = np.linalg.lstsq((rows * weights).T, seen * weights, rcond=None)[0]
        yaw = math.atan(turn)
        weights = 1 / np.sqrt(np.maximum(np.abs(seen - ahead * rows[0] - turn * rows[1]), 0.01))
    return float(ahead * math.cos(yaw)), yaw


def camera_motion(flow: np.ndarray, depth: np.ndarray, segmentation: np.ndarray, fov: float) -> np.ndarray:
    """Flow [T - 1, 2, H, W], depth and ids [T, H, W] -> (forward, yaw) of every step, [T - 1, 2] in clip.py's units.

    fov: the vertical field of view of the clip's pictures, degrees. `forward` is in the unit of depth: metres only
    where depth is. Raises ValueError where a frame shows no background.
    """
    focal = depth.shape[1] / 2 / math.tan(math.radians(fov) / 2)
    still = segmentation == 0
    if (share := still.mean(axis=(1, 2)).min()) < 0.01:
        raise ValueError(f"{share:.1%} of a frame is background, too little to see the camera move: use --camera none")
    steps = [camera_step(*step, focal) for step in zip(flow, depth[:-1], still[:-1], strict=True)]
    return (np.array(steps) / [1, CAMERA_YAW_UNIT]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ videos -> clips


def with_bucket(clip: Clip) -> Clip:
    """Sets meta["motion_bucket"] = floor(255 v / (v + BUCKET_SPEED)), v the mean flow in picture heights a second.

    A choice of ours: how SVD's own buckets were computed is not published.
    """
    speed = float(np.linalg.norm(clip.flow, axis=1).mean()) * clip.fps / clip.flow.shape[2]
    return replace(clip, meta=clip.meta | {"motion_bucket": math.floor(255 * speed / (speed + BUCKET_SPEED))})


def with_last(steps: np.ndarray) -> np.ndarray:
    """[T - 1, ...] -> [T, ...]: what follows the last frame is unknown, it gets the motion of the one before."""
    return np.concatenate([steps, steps[-1:]])


@dataclass
class Annotators:
    """Who tells flow, ids and depth; `fov` in degrees, or None: the camera is taken to stand still."""

    flow: Annotator
    segmentation: Annotator
    depth: Annotator
    fov: float | None = None

    def all(self) -> tuple[Annotator, Annotator, Annotator]:
        return self.flow, self.segmentation, self.depth

    def clip(self, pictures: Pictures, fps: float, meta: dict) -> Clip:
        """Raises ValueError that begins with the video's name and the number of the frame."""
        try:
            flow, ids, depth = (annotator(pictures) for annotator in self.all())
            still = np.zeros((len(flow), 2), np.float32)
            camera = still if self.fov is None else camera_motion(flow, depth, ids, self.fov)
            meta = meta | {"start": pictures.start}
            return with_bucket(Clip(pictures.rgb, with_last(flow), ids, depth, with_last(camera), fps, meta))
        except ValueError as error:
            raise ValueError(f"{pictures.name}, frames from {pictures.start} on: {error}") from None


def annotate_video(
    path: Path, out: Path, size: Size, fps: float, frames: int, annotators: Annotators, meta: dict
) -> str:  # fmt: skip
    """Writes out/NAME_START.safetensors for each piece of `frames` frames between scene cuts; says what was done.

    out/.videos/NAME.json keeps the names of the clips as soon as all are there. Raises ValueError for what is wrong
    with the video or a folder for it, and where its clips were made with other settings.
    """
    check_settings(path, out, settings_of(meta, size, fps, frames))
    record, counts, names = out / ".videos" / f"{path.stem}.json", {"written": 0, "there": 0, "lost": 0}, []
    if done := clips_done(record):
        return f"{path}: skipped, its {len(done)} clips were there"
    if folders := [one for one in annotators.all() if isinstance(one, Folder)]:
        count = sum(1 for _ in read_video(path, fps))
        for folder in folders:
            folder.check(path.stem, count, fps)
    for start, rgb in pieces(progress(path, size, fps), frames):
        file = out / f"{path.stem}_{start:06d}.safetensors"
        if len(rgb) < frames:
            counts["lost"] += len(rgb)
            continue
        if file.exists():
            counts["there"] += 1
        else:
            annotators.clip(Pictures(path.stem, start, rgb), fps, meta).save(file)
            counts["written"] += 1
        names.append(file.name)
    if not names:
        raise ValueError(f"{path}: no shot of its {counts['lost']} frames (--fps {fps:g}) has {frames}")
    record.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as partial:
        partial.write_text(json.dumps({"clips": names}) + "\n")
    told = "{written} clips written, {there} were there; {lost} frames at ends of shots are in none".format(**counts)
    return f"{path}: {told}"


def settings_of(meta: dict, size: Size, fps: float, frames: int) -> dict:
    """What makes a clip what it is; `meta` is that of a clip, or of all that are to be made."""
    told = {name: meta[name] for name in ("source", "bytes") if name in meta}
    return told | meta.get("annotators", {}) | {"size": f"{size[0]}x{size[1]}", "fps": fps, "frames": frames}


def check_settings(path: Path, out: Path, settings: dict) -> None:
    """Raises ValueError where clips of this name in `out` were made with other settings, or of another video."""
    for file in sorted(out.glob(f"{glob.escape(path.stem)}_{'[0-9]' * 6}.safetensors")):
        (frames, height, width, _), fps, meta = clip_header(file)
        if told := other_setting(settings_of(meta, (width, height), fps, frames), settings):
            raise ValueError(f"{path}: its clips in {out} were {told}: take another --out")


def other_setting(was: dict, now: dict) -> str:
    """Of settings, the first that is another one now, in words; "" where none is. One that a clip of a former version
    did not keep counts as the same."""
    for name, value in now.items():
        if was.get(name, value) != value:
            return f"made with {name} = {was[name]}, now {name} = {value}"
    return ""


def clips_done(record: Path) -> list[str]:
    """Names of a video's clips if all are there; none if some are to be made."""
    if not record.exists():
        return []
    try:
        names = json.loads(record.read_text())["clips"]
        return names if all((record.parent.parent / name).exists() for name in names) else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record}: {first_line(error)}; delete it, it will be made again") from None


def export_frames(path: Path, folder: Path, size: Size, fps: float) -> str:
    """Writes folder/NAME/000000.png and so on."""
    count, folder = 0, folder / path.stem
    for rgb in progress(path, size, fps):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"{count:06d}.png") as partial:
            Image.fromarray(rgb).save(partial, "PNG")
        count += 1
    if (folder / f"{count:06d}.png").exists():
        raise ValueError(f"{folder}: the frames from {count:06d}.png on are of an earlier export: delete the folder")
    return f"{path}: {count} frames written"


# --------------------------------------------------------------------------------------------------------- command line


def parse_size(text: str) -> Size:
    """ "512x320" -> (512, 320)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(int(side) for side in found.groups()) < 8:
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT, 8 pixels at least")
    return int(found[1]), int(found[2])


def videos_of(names: list[str], listing: str | None) -> list[str]:
    """Names and lines of the file `listing`: files as they are, of a folder the videos in it. Raises ValueError where
    there is none."""
    lines = Path(listing).read_text().splitlines() if listing else []
    found = []
    for name in [*names, *filter(str.strip, lines)]:
        inside = sorted(path for path in Path(name).glob("*") if path.suffix.lower() in VIDEO_ENDINGS)
        if Path(name).is_dir() and not inside:
            raise ValueError(f"{name}: no videos ({', '.join(sorted(VIDEO_ENDINGS))}) here")
        found += map(str, inside) if inside else [name]
    if not found:
        raise ValueError(f"--list {listing}: names no video" if listing else "no videos: name some, or --list FILE")
    return found


def by_stem(paths: list[str]) -> list[Path]:
    """Raises ValueError for a file that is not there, and for two files whose clips would have the same name."""
    stems: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if stems.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: clips of {stems[path.stem]} would have the same names")
    return list(stems.values())


def output_folder(name: str) -> Path:
    if Path(name).exists() and not Path(name).is_dir():
        raise ValueError(f"{name}: is not a folder")
    return Path(name)


def check_numbers(arguments: argparse.Namespace, least: dict[str, int]) -> None:
    for name, low in least.items():
        if (value := getattr(arguments, name)) is not None and not low <= value < math.inf:
            raise ValueError(f"--{name} {value}: expected {low} at least")


def run_annotate(arguments: argparse.Namespace) -> int:
    """How many videos failed, each with a line on stderr. Raises ValueError, one line; what can be checked is checked
    before anything is annotated."""
    size, fps = parse_size(arguments.size), arguments.fps
    paths = by_stem(videos_of(arguments.videos, arguments.list))
    check_numbers(arguments, {"frames": 2, "fps": 1, "fov": 1})
    if arguments.fov >= 180:
        raise ValueError(f"--fov {arguments.fov:g}: expected degrees below 180")
    out = output_folder(arguments.out or arguments.export)
    if arguments.export:
        return of_each(paths, lambda path: export_frames(path, out, size, fps))
    annotators = Annotators(
        flow_annotator(arguments.flow, arguments.flow_weights),
        segmentation_annotator(arguments.segmentation, arguments.segmentation_model),
        depth_annotator(arguments.depth, arguments.depth_model),
        arguments.fov if arguments.camera == "flow" else None,
    )
    names = ("flow", "flow_weights", "segmentation", "segmentation_model", "depth", "depth_model", "camera", "fov")
    meta = {"scenario": "video", "annotators": {name: getattr(arguments, name) for name in names}}

    def annotate(path: Path) -> str:
        source = {"source": path.name, "bytes": path.stat().st_size}
        return annotate_video(path, out, size, fps, arguments.frames, annotators, meta | source)

    return of_each(paths, annotate)


def of_each(paths: list[Path], work: Callable[[Path], str]) -> int:
    """Does the work on this process' share of the videos -> how many failed, in all processes of torchrun."""
    rank, world_size = processes()
    share, failed = paths[rank::world_size], 0
    for path in share:
        try:
            print(work(path), flush=True)
        except ValueError as error:
            print(f"clips.annotate: {error}", file=sys.stderr)
            failed += 1
    if len(paths) > 1:
        print(f"{len(share) - failed} of {len(share)} videos done")
    if world_size > 1 and dist.is_torchelastic_launched():
        # torchrun ends all processes as soon as one ends with an error: it must not while others are at work.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        everywhere = torch.tensor(failed)
        dist.all_reduce(everywhere)
        dist.destroy_process_group()
        failed = int(everywhere)
    return failed


def add_models(parser: argparse.ArgumentParser, flow: str, depth: str) -> None:
    flows = ", ".join(dict.fromkeys((flow, "raft", "raft-small")))
    add, model, source = parser.add_argument, "depth-anything/Depth-Anything-V2-Small-hf", "of it (default %(default)s)"
    add("--flow", default=flow, help=f"{flows} or a folder (default %(default)s)")
    add("--flow-weights", metavar="FILE", help="RAFT's weights (default: they are downloaded once)")
    add("--depth", default=depth, help="depth-anything, none (1 everywhere) or a folder (default %(default)s)")
    add("--depth-model", default=model, metavar="HUB_ID_OR_DIR", help=source)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clips.annotate", description=__doc__.split("\n")[0])
    add, source = parser.add_argument, "of it (default %(default)s)"
    add("videos", nargs="*", metavar="VIDEO", help="files that FFmpeg reads, or folders of such")
    add("--list", metavar="FILE", help="more of them, one a line (default: none)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="where the clips go")
    target.add_argument("--export", metavar="DIR", help="only write the frames, for annotators of your own")
    add("--frames", type=int, default=16, help="of a clip (default %(default)s)")
    add("--size", default="512x320", help="WIDTHxHEIGHT; the centre of the picture is kept (default %(default)s)")
    add("--fps", type=float, default=7.0, help="frames a second of the clips (default %(default)s)")
    add_models(parser, "raft", "depth-anything")
    add("--segmentation", default="sam2", help="sam2, none (all background) or a folder (default %(default)s)")
    add("--segmentation-model", default="facebook/sam2.1-hiera-tiny", metavar="HUB_ID_OR_DIR", help=source)
    add("--camera", choices=("flow", "none"), default="flow", help="none: it stands still (default %(default)s)")
    add("--fov", type=float, default=50.0, help="vertical field of view of the clip, degrees (default %(default)s)")
    return expand_home(parser.parse_args(words))


def main() -> None:
    arguments = parse_arguments()
    try:
        failed = run_annotate(arguments)
    except (ValueError, OSError) as error:
        print(f"clips.annotate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("clips.annotate: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
