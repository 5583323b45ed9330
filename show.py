"""What people look at: flow colours, arrows on a picture, GIF and MP4 files, each written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inputs import Arrows

# ----------------------------------------------------------------------------------------------- pictures of flow


def _wheel() -> np.ndarray:
    """Colours of 55 directions, float [55, 3] of 0 to 255 (Baker et al., A Database and Evaluation Methodology for
    Optical Flow, 2011): red, yellow, green, cyan, blue, magenta, with more steps where the eye sees more."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]]) * 255.0
    counts = (15, 6, 4, 11, 13, 6)
    parts = [a + (b - a) * (np.arange(n) / n)[:, None] for (a, b), n in zip(pairwise(corners), counts, strict=True)]
    return np.concatenate(parts).astype(np.float32)


WHEEL = _wheel()


def flow_to_rgb(flow: Tensor, max_magnitude: float | None = None) -> np.ndarray:
    """The usual colours of flow: hue = direction, saturation = length. [..., 2, H, W] -> uint8 [..., H, W, 3].

    Zero is white; right is red, down yellow, left cyan, up violet. `max_magnitude` has full saturation, longer vectors
    are darker; default: the longest vector of all, so that a video has one scale. Raises ValueError for NaN, infinity.
    """
    u, v = flow.detach().float().cpu().movedim(-3, 0).numpy()
    length = np.hypot(u, v)
    if not np.isfinite(length).all():
        raise ValueError(f"flow holds {np.count_nonzero(~np.isfinite(length))} vectors that are not finite")
    if max_magnitude is None:
        max_magnitude = length.max(initial=0.0) or 1.0
    if not max_magnitude > 0:
        raise ValueError(f"max_magnitude is {max_magnitude}, expected a number above 0")
    saturation = (length / max_magnitude)[..., None]
    place = np.arctan2(v, u) / (2 * np.pi) % 1 * len(WHEEL)
    low, part = np.floor(place).astype(int) % len(WHEEL), (place % 1)[..., None]
    color = WHEEL[low] * (1 - part) + WHEEL[(low + 1) % len(WHEEL)] * part
    color = np.where(saturation <= 1, 255 - saturation * (255 - color), 0.75 * color)
    return color.round().astype(np.uint8)


def color_wheel(size: int) -> np.ndarray:
    """The legend of `flow_to_rgb`: uint8 [size, size, 3], each direction's colour, white outside of the circle."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    flow = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    return flow_to_rgb(torch.where(flow.norm(dim=0) <= 1, flow, 0.0), max_magnitude=1.0)


def draw_arrows(
    image: np.ndarray, arrows: Arrows, F: Tensor | None = None, scale: int = 1, ids: Tensor | None = None
) -> np.ndarray:
    """The image with the arrows on it, all objects of ids [H, W] outlined, those that F [2, H, W] moves broadly in its
    colours: a tint would change the colour of the object itself.

    image uint8 [H, W, 3] -> uint8 [scale H, scale W, 3]; every pixel becomes scale x scale of them. An arrow without
    length is a dot: "stays". What is far from arrows and objects keeps its colour.
    """
    image, F = image.repeat(scale, axis=0).repeat(scale, axis=1), torch.zeros(2, *image.shape[:2]) if F is None else F
    colors = flow_to_rgb(F).repeat(scale, axis=0).repeat(scale, axis=1)
    moving = (F != 0).any(dim=0).cpu().numpy()
    marked = moving if ids is None else ids.cpu().numpy()
    moving, marked = (value.repeat(scale, axis=0).repeat(scale, axis=1) for value in (moving, marked))
    image[_rims(marked)] = 255
    broad = _rims(marked, max(1, max(image.shape) // 128)) & moving
    image[broad] = colors[broad]
    picture = Image.fromarray(image).convert("RGBA")
    overlay = Image.new("RGBA", (picture.width * 3, picture.height * 3))  # three times as large: smooth edges
    width = max(2.0, 0.012 * max(picture.size)) * 3
    for color, extra in (("black", 0.35), ("white", 0.0)):
        for arrow in arrows.arrows:
            start, end = (np.array(place) * scale * 3 for place in (arrow.start, arrow.end))
            _draw_arrow(ImageDraw.Draw(overlay), start, end, width, extra * width, color)
    overlay = overlay.convert("RGBa").resize(picture.size, Image.Resampling.BOX).convert("RGBA")
    return np.asarray(Image.alpha_composite(picture, overlay).convert("RGB"))


def _rims(ids: np.ndarray, width: int = 1) -> np.ndarray:
    """bool [H, W]: pixels of an object that have another id beside, above or below them, at most `width` away."""
    height, length, found = *ids.shape, np.zeros(ids.shape, bool)
    around = np.pad(ids, width, mode="edge")
    for k in range(1, width + 1):
        for y, x in ((width, width - k), (width, width + k), (width - k, width), (width + k, width)):
            found |= ids != around[y : y + height, x : x + length]
    return (ids > 0) & found


def _draw_arrow(
    draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, width: float, extra: float, color: str
) -> None:
    """A dot at the tail, a shaft, a triangle; `extra` pixels thicker on all sides (for the dark rim)."""
    v = end - start
    length = float(np.hypot(*v))
    dot = 0.8 * width + extra
    draw.ellipse([*(start - dot), *(start + dot)], fill=color)
    if length == 0:
        return
    along, head = v / length, min(3.5 * width, length)
    across, neck = np.array([-along[1], along[0]]), end - along * head
    shaft = across * (width / 2 + extra)
    draw.polygon([tuple(p) for p in (start + shaft, neck + shaft, neck - shaft, start - shaft)], fill=color)
    wing = across * (head * 0.45 + 1.6 * extra)
    back, tip = neck - along * extra, end + along * 2.4 * extra
    draw.polygon([tuple(p) for p in (tip, back + wing, back - wing)], fill=color)


LONGEST_PAUSE = 655350  # milliseconds that a frame of a GIF may last
REST = 1000  # milliseconds more for the last frame
SMALL = 256  # pixels: narrower videos are enlarged
CAPTIONS = {"flow": "flow", "segmentation": "ids", "depth": "depth", "video": "video"}  # of the panels, by file name


# -------------------------------------------------------------------------------------------------------------- outputs


def written_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file of another name and gives it the right one only when it is complete. Raises OSError of
    one line that names the path: a full disk, say."""
    partial = path.with_name(f"partial-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_video(path: Path, pictures: np.ndarray, fps: float) -> None:
    """uint8 [T, H, W, 3] -> mp4 (H.264, yuv420p, which every player opens); an odd size gets one more row or column."""
    pictures = np.pad(pictures, ((0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)), mode="edge")
    options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": 9, "macro_block_size": 1}
    options["ffmpeg_log_level"] = "quiet"  # an error is told in one line

    def write(partial: Path) -> None:
        iio.imwrite(partial, pictures, plugin="FFMPEG", fps=fps, **options)
        if not is_whole_mp4(partial):
            raise OSError("ffmpeg could not write all of it: is the disk full?")

    written_whole(path, write)


def is_whole_mp4(path: Path) -> bool:
    """Whether its boxes fill the file, the last one that ffmpeg writes among them: ffmpeg's exit code is not told."""
    content, place, names = path.read_bytes(), 0, []
    while place + 8 <= len(content):
        size, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if size == 1:  # more than 4 GB
            size = int.from_bytes(content[place + 8 : place + 16], "big")
        names.append(name)
        place += max(size, 8)
    return place == len(content) and b"moov" in names


def check_output(folder: Path, width: int, height: int) -> None:
    """Tries folder and video writer with two black frames. Raises ValueError that names the folder."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / "check.mp4", np.zeros((2, height, width, 3), np.uint8), 7)
        (folder / "check.mp4").unlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: cannot write a {width}x{height} video here: {error}") from None
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def to_uint8(pictures: Tensor) -> np.ndarray:
    """[T, 3, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return ((pictures.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def enlarged(pictures: np.ndarray) -> np.ndarray:
    """Small videos uint8 [T, H, W, 3] with every pixel as s x s of them: a player's window is as small as its video."""
    scale = max(1, SMALL // pictures.shape[2])
    return pictures.repeat(scale, axis=1).repeat(scale, axis=2)


def write_videos(folder: Path, videos: dict[str, np.ndarray], fps: float) -> None:
    """NAME.mp4 for each of `videos`, uint8 [T, H, W, 3], small ones enlarged. Those that only an earlier run wrote go:
    a video beside another motion than its own misleads."""
    for name in CAPTIONS.keys() - videos.keys():
        (folder / f"{name}.mp4").unlink(missing_ok=True)
    for name, pictures in videos.items():
        write_video(folder / f"{name}.mp4", enlarged(pictures), fps)


def write_grid(path: Path, panels: dict[str, np.ndarray], fps: float) -> None:
    """Videos uint8 [T, H, W, 3] of one size, by name, side by side under captions as a GIF, small ones enlarged."""
    pictures = np.concatenate([enlarged(panel) for panel in panels.values()], axis=2)
    bar = _captions([CAPTIONS.get(name, name) for name in panels], pictures.shape[2])
    write_gif(path, np.concatenate([np.repeat(bar[None], len(pictures), axis=0), pictures], axis=1), fps)


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """uint8 [T, H, W, 3] -> a GIF that rests at its end. All frames share a palette, without dithering: what stands
    still does not flicker."""
    palette = _palette(frames)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pause = min(1000 / fps, LONGEST_PAUSE)
    pauses = [pause] * (len(images) - 1) + [min(pause + REST, LONGEST_PAUSE)]
    settings = {"format": "GIF", "save_all": True, "append_images": images[1:], "duration": pauses, "loop": 0}
    written_whole(path, lambda partial: images[0].save(partial, **settings))


def _palette(frames: np.ndarray) -> Image.Image:
    """256 colours for all frames uint8 [T, H, W, 3]: black, white, and the means of 254 clusters of what is neither (of
    every tenth pixel, which is enough to tell)."""
    pixels = frames.reshape(-1, 3)
    between = pixels[(pixels.max(axis=1) > 8) & (pixels.min(axis=1) < 247)][::10]
    palette, colors = Image.new("P", (1, 1)), np.zeros((0, 3), np.uint8)
    if len(between):
        palette = Image.fromarray(between[None]).quantize(254, kmeans=1)
        colors = np.array(palette.getpalette()).reshape(-1, 3)[:254]
    palette.putpalette(np.concatenate([colors, [[0] * 3, [255] * 3]]).ravel().tolist())
    return palette


def _captions(words: list[str], width: int) -> np.ndarray:
    """Words in white on black, each at the left of its part of the width, uint8 [16, width, 3]."""
    font = ImageFont.load_default()
    bar = Image.new("RGB", (width, 16))
    draw = ImageDraw.Draw(bar)
    draw.fontmode = "1"  # no gray, which the palette may lack
    for i, word in enumerate(words):
        draw.text((i * width // len(words) + 5, 2), word, "white", font)
    return np.asarray(bar)
