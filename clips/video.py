"""Frames of a video at a constant rate, upright and with square pixels; and its shots.

FFmpeg does the first: the times of a phone's frames, the turn and the shape of their pixels stand in the file, and
whoever only counts frames misses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from sources import first_line

CUT = 0.5  # of the pixels change their colour class at a scene cut
SLOWER = 0.99  # of a rate that is asked for: 29.97 counts as 30

logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of every turned video


def frames_a_second(path: Path) -> float:
    """The mean over the file."""
    stream = imageio_ffmpeg.read_frames(path, output_params=["-frames:v", "1"])
    told = next(stream)["fps"]
    stream.close()
    if told:
        return told
    count, seconds = imageio_ffmpeg.count_frames_and_secs(path)  # a browser's recording does not say
    return count / max(seconds, 0.01)


def rate_filter(source_fps: float, fps: float) -> str:
    """FFmpeg's filters that choose frames by their times, whose steps may differ.

    Frame k of the result is the one shown half a mean source frame after k / fps: the nearest, where steps are equal.
    The first one has the time 0, also in a file whose sound begins before.
    """
    early = f"settb=1/1000000,setpts=PTS-STARTPTS-{500_000 / source_fps:.0f}"
    return f"{early},fps={fps:.6g}:round=up"


def read_video(path: Path, fps: float | None) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3] of a video file, `fps` a second; None: every frame, whatever their times are.

    Raises ValueError that begins with the path: no video, or less than SLOWER times `fps` frames a second: to repeat a
    frame would be a standstill that nobody filmed.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        filters = "scale='max(1,round(iw*sar))':ih,setsar=1"
        if fps is not None:
            source_fps = frames_a_second(path)
            if source_fps < SLOWER * fps:
                raise ValueError(f"{path}: has {source_fps:g} frames a second, --fps {fps:g} asks for more")
            filters = f"{rate_filter(source_fps, min(fps, source_fps))},{filters}"
        # Where a recording changes its size, the first one holds; otherwise FFmpeg would begin to count anew.
        words = {"input_params": ["-reinit_filter", "0"]}
        words |= {"output_params": ["-vf", filters, "-fps_mode", "passthrough" if fps is None else "auto"]}
        stream = imageio_ffmpeg.read_frames(path, **words)
        width, height = next(stream)["size"]
        for frame in stream:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, IndexError, AttributeError) as error:  # the last two: from FFmpeg's words
        raise ValueError(f"{path}: not a video ({first_line(error)})") from None


def color_classes(rgb: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [64]: share of the pixels in each of 4x4x4 classes of colour; motion hardly changes it."""
    packed = (rgb >> 6) @ np.array([16, 4, 1], np.uint8)
    return np.bincount(packed.ravel(), minlength=64) / packed.size


def pieces(frames: Iterable[np.ndarray], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Frames -> (number of the first frame, [n, H, W, 3]), n = length, or less for the end of a shot.

    A scene cut is where more than CUT of the pixels change their colour class, counted over the whole picture: half
    the sum of absolute differences of `color_classes`.
    """
    held, before, start = [], None, 0
    for number, frame in enumerate(frames):
        classes = color_classes(frame)
        cut = before is not None and np.abs(classes - before).sum() / 2 > CUT
        if held and (cut or len(held) == length):
            yield start, np.stack(held)
            held, start = [], number
        held.append(frame)
        before = classes
    if held:
        yield start, np.stack(held)
