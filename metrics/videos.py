"""Videos that any model made of known clips: which video belongs to which clip, how it is brought to the clip's frames
and size, and the figures that a video alone allows.

    paths = videos_of(Path("out"), ["0001", "0002"])                       # out/0001.mp4, out/0002/ (pictures)
    video = read_fitted(paths[0], frames=16, fps=10.0, size=(64, 128))     # [T, 3, H, W] in [-1, 1]
    figures = video_figures(video, scene)

The rules; what they do not cover is refused in one line that names the file:

    name     that of the clip: NAME.mp4 (or another video), NAME.gif, or a folder NAME of pictures, in their order
    begin    the first frame is the clip's first frame, the picture that the model was given
    frames   as many as the clip has: frame by frame, whatever rate the file says. Another number: those at the clip's
             times; a slower video is refused, and one that ends before the clip. Of a folder: the first ones
    size     of the clip's shape (2 % off are forgiven): resized, by area where it shrinks. One row or column too many,
             as codecs need it: cut off. Another shape: refused, or with `stretch` resized all the same

What a file costs: true videos that went through an mp4, as show.py writes it, have a PSNR of 26 dB at least, 0.85 of
mIoU of ids by colour and 0.95 of balanced accuracy in moved, hit and fallen; and less than a tenth of the FVMD of the
worst of them frozen, shuffled, delayed or blurred. tests/test_videos.py holds it for clips of 64x32. Larger ones lose
less: 24 of 128x64 have 34 dB, 0.94, and 0.96 to 1 (of few clips, a single thing at rest that seems to move weighs more:
docs/results.md).
"""

from __future__ import annotations

import math
import re
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageSequence
from torch import Tensor

from clips import SLOWER, frames_a_second, open_picture, read_video
from metrics.motion import MOVING, Sums, mean_iou, mean_of, psnr
from metrics.physics import HIT_TRUTH, Scene, asked, fallen_in_video, far, ids_by_color, of_the_visible
from sources import first_line

VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAME_SHAPE = 0.02  # by how much width / height may differ: sizes are rounded to what a codec or a network takes

RULES = (
    "Videos belong to clips by name and begin with the clip's first frame; with as many frames as the clip they are "
    "compared frame by frame, else at the clip's times; they are resized to the clip's size. hit, fallen and moved are "
    "asked of objects of which the true video, by colour, says what is true."
)


# ------------------------------------------------------------------------------------------------------------- pairing


def named_folders(told: list[str]) -> dict[str, Path]:
    """["a=DIR", "DIR2"] -> folders by the name of their row; without one, it is that of the folder. Raises ValueError
    for a name that comes twice, or that is another row's."""
    found: dict[str, Path] = {}
    for text in told:
        name, _, folder = text.rpartition("=")
        path = Path(folder)
        name = name or path.resolve().name
        if name in found or name in ("still", "truth", "half"):
            raise ValueError(f"--videos {text}: the name {name} is taken: say another one, NAME={folder}")
        if not path.is_dir():
            raise ValueError(f"--videos {text}: there is no folder {folder}")
        found[name] = path
    return found


def videos_of(folder: Path, names: list[str]) -> list[Path]:
    """The video of each clip, by the clips' names. Raises ValueError that names the folder and the first clip that has
    no video here, or two."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found.setdefault(path.name, []).append(path)
        elif path.suffix.lower() in VIDEOS:
            found.setdefault(path.stem, []).append(path)
    if missing := [name for name in names if name not in found]:
        first = f"the first is {missing[0]}: expected {missing[0]}.mp4, .gif or a folder {missing[0]} of pictures"
        raise ValueError(f"{folder}: has no video of {len(missing)} of {len(names)} clips; {first}")
    for name in names:
        if len(found[name]) > 1:
            both = " and ".join(path.name for path in found[name])
            raise ValueError(f"{folder}: holds {both}, expected one video of {name}")
    return [found[name][0] for name in names]


# ------------------------------------------------------------------------------------------------------------- reading


def read_fitted(path: Path, frames: int, fps: float, size: tuple[int, int], stretch: bool = False) -> Tensor:
    """A video file, or a folder of pictures, as frames [T, 3, H, W] in [-1, 1] of a clip of `frames` frames, `fps` a
    second, of size (H, W), by the rules above. Raises ValueError that begins with the path."""
    if path.is_dir():
        pictures = read_folder(path, frames)
    elif path.suffix.lower() == ".gif":
        pictures = read_gif(path, frames, fps)
    else:
        pictures = read_file(path, frames, fps)
    return resized(pictures, size, stretch, path)


def read_folder(path: Path, frames: int) -> np.ndarray:
    """The first pictures of a folder, uint8 [T, h, w, 3], in the order of the numbers in their names."""
    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
    files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
    if len(files) < frames:
        raise ValueError(f"{path}: holds {len(files)} pictures, the clip has {frames} frames")
    files = files[:frames]
    pictures = [np.asarray(open_picture(file).convert("RGB")) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (picture.shape, pictures[0].shape)]
            raise ValueError(f"{file}: is {sizes[0]}, the first picture of its folder {sizes[1]}")
    return np.stack(pictures)


def read_gif(path: Path, frames: int, fps: float) -> np.ndarray:
    """Frames uint8 [T, h, w, 3] of a GIF. Its writers join equal frames into one that lasts longer: each counts as
    often as the shortest one fits into it; a single one stands for all."""
    try:
        with Image.open(path) as gif:
            told = [(np.asarray(f.convert("RGB")), f.info.get("duration") or 100) for f in ImageSequence.Iterator(gif)]
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise ValueError(f"{path}: not a GIF ({first_line(error)})") from None
    if len(told) == 1:
        return np.stack([told[0][0]] * frames)
    step = min(duration for _, duration in told)
    pictures = [picture for picture, duration in told for _ in range(round(duration / step))]
    if len(pictures) == frames:
        return np.stack(pictures)
    rate = 1000 / step
    check_rate(path, rate, len(pictures), frames, fps)
    chosen = [math.floor(t * rate / fps + 0.5) for t in range(frames)]
    return np.stack([pictures[k] for k in chosen if k < len(pictures)])


def read_file(path: Path, frames: int, fps: float) -> np.ndarray:
    """Frames uint8 [T, h, w, 3] of a video file."""
    try:
        rate, (count, _) = frames_a_second(path), imageio_ffmpeg.count_frames_and_secs(path)
    except (OSError, RuntimeError, IndexError, AttributeError) as error:  # the last two: from FFmpeg's words
        raise ValueError(f"{path}: not a video ({first_line(error)})") from None
    if count != frames:
        check_rate(path, rate, count, frames, fps)
    pictures = list(islice(read_video(path, None if count == frames else fps), frames))
    if len(pictures) < frames:
        raise ValueError(f"{path}: shows {len(pictures)} frames at the clip's times, expected {frames}")
    return np.stack(pictures)


def check_rate(path: Path, rate: float, count: int, frames: int, fps: float) -> None:
    """Raises ValueError when a video of `count` frames, `rate` a second, shows less than a clip of `frames` frames,
    `fps` a second: it is slower, or ends before."""
    if rate < SLOWER * fps or (count - 0.5) / rate < (frames - 1) / fps:
        told = f"has {count} frames, {rate:.4g} a second, the clip {frames}, {fps:.4g} a second"
        raise ValueError(f"{path}: {told}: expected {frames} frames, or a longer video that is no slower")


def resized(pictures: np.ndarray, size: tuple[int, int], stretch: bool, path: Path) -> Tensor:
    """Frames uint8 [T, h, w, 3] -> [T, 3, H, W] in [-1, 1] of another size (H, W), by the rules above."""
    (height, width), (h, w) = size, pictures.shape[1:3]
    if height <= h <= height + 1 and width <= w <= width + 1:
        pictures = pictures[:, :height, :width]
    elif not stretch and abs(w * height / (h * width) - 1) > SAME_SHAPE:
        told = f"is {w}x{h}, the clip {width}x{height}, of another shape"
        raise ValueError(f"{path}: {told}: --stretch resizes it all the same")
    video = torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, 1).float() / 127.5 - 1
    if video.shape[-2:] == size:
        return video
    return nnf.interpolate(video, size, mode="bilinear", antialias=True, align_corners=False)


# ------------------------------------------------------------------------------------------------------------- figures


def video_figures(video: Tensor, scene: Scene) -> dict[str, Sums]:
    """What a video [T, 3, H, W] alone tells, against the truth of its clip.

    psnr_video: of clips that move. ids_video: mIoU of its ids by colour with those of the true video by colour.
    moved_video, hit_video, fallen_video: which objects move by more than HIT pixels, are hit, have fallen, balanced
    accuracy `of_the_visible`. So the true video has full marks."""
    true, meta, objects = scene.truth["arrow"], scene.meta["arrow"], scene.objects
    first, figures = true["segmentation"][0], {}
    if (true["flow"].norm(dim=1) > MOVING).any():  # else a still picture is perfect: its decibels drown the others
        figures["psnr_video"] = mean_of(psnr(video, true["rgb"]))
    if not objects:
        return figures
    there = seen, known = ids_by_color(video, first), scene.by_color
    figures["ids_video"] = mean_of(mean_iou(seen, known, background=True))
    truly = far(true["segmentation"], objects)
    figures["moved_video"] = of_the_visible(lambda ids: far(ids, objects), *there, truly, set(objects))
    if meta.keys() >= HIT_TRUTH:
        among, hit = asked(meta, len(video))
        among &= set(objects)
        figures["hit_video"] = of_the_visible(lambda ids: far(ids, objects), *there, hit, among)
    if scene.rows:
        figures["fallen_video"] = fallen_in_video(*there, scene)
    return figures
