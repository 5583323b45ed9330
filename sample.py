"""Image + arrows -> motion -> video, from the command line; the method itself is in motion_dreamer.py.

    python sample.py                                     # the demo model on its example
    python sample.py image.png arrows.json --model DIR --out out [--segmentation ids.png] [--depth depth.png]
    python sample.py image.png arrows.json --stage 1     # motion only; edit out/motion.safetensors, then
    python sample.py image.png arrows.json --stage 2     # paint it
    python sample.py image.png --svd REPO_OR_DIR         # plain Stable Video Diffusion

Writes video.mp4, flow.mp4, segmentation.mp4, depth.mp4, input.png (the image with its arrows), grid.gif (all side by
side), motion.safetensors (flow in pixels, ids, depth) and run.json (settings, seconds, memory). A user's mistake is one
line on stderr and exit code 2; the output folder and the video writer are tried before anything is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import read_depth, read_rgb, read_segmentation
from instance_flow import Arrows, apply_shapes, arrows_to_flow, draw_arrows, flow_to_rgb
from motion_dreamer import Motion, MotionDreamer, dream, render
from svd import VAE, ImageEncoder, UNet, image_to_video

DEMO = Path(__file__).parent / "demo"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", nargs="?", help="default: the demo's example")
    parser.add_argument("arrows", nargs="?", help="arrows.json; without it, nothing is told about motion")
    parser.add_argument("--model", default=str(DEMO), metavar="DIR", help="model folder (default: demo/)")
    parser.add_argument("--svd", metavar="REPO_OR_DIR", help="plain Stable Video Diffusion instead")
    parser.add_argument("--out", default="out", metavar="DIR")
    parser.add_argument("--segmentation", metavar="PNG", help="ids of the image's objects")
    parser.add_argument("--depth", metavar="PNG", help="depth, 8 or 16 bit or .npy, any unit, larger = farther")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--frames", type=int, help="default: what the model was trained on")
    parser.add_argument("--fps", type=float, help="default: what the model was trained on")
    parser.add_argument(
        "--guidance", type=float, nargs=2, metavar=("FIRST", "LAST"), help="first and last frame's scale"
    )
    arguments = parser.parse_args()
    for name, least in (("steps", 1), ("frames", 2), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected {least} or more")
    if arguments.fps is not None and not 0 < arguments.fps <= 1000:
        raise ValueError(f"--fps {arguments.fps}: expected a number above 0, 1000 at most")
    return arguments


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """What the user gave; maps that are absent are None."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    given: Arrows  # as in the file
    arrows: Arrows  # every arrow names its object
    ids: Tensor  # [H, W], shapes of arrows.json included
    depth: Tensor | None  # [H, W]

    def told(self, frames: int, device: str) -> list[Tensor | None]:
        """image, segmentation, depth, F and camera as `dream` wants them: a batch of one."""
        image = torch.from_numpy(self.rgb).permute(2, 0, 1).float() / 127.5 - 1
        segmentation = self.ids if self.ids.any() else None
        F = arrows_to_flow(self.arrows, self.ids, frames)
        parts = image, segmentation, self.depth, F, torch.tensor(self.arrows.camera, dtype=torch.float32)
        return [None if part is None else part[None].to(device) for part in parts]


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """The files of the command line. Raises ValueError or FileNotFoundError that name the file."""
    rgb = read_rgb(arguments.image)
    given = Arrows.load(arguments.arrows) if arguments.arrows else Arrows.from_dict({"arrows": []})
    paths = {name: getattr(arguments, name) or getattr(given, name) for name in ("segmentation", "depth")}
    depth = read_depth(paths["depth"]) if paths["depth"] else None
    ids = read_segmentation(paths["segmentation"]) if paths["segmentation"] else None
    for name, value in (("depth", depth), ("segmentation", ids)):
        if value is not None and value.shape != rgb.shape[:2]:
            size = f"{rgb.shape[1]}x{rgb.shape[0]}"
            raise ValueError(
                f"{paths[name]}: is {value.shape[1]}x{value.shape[0]}, the image {arguments.image} is {size}"
            )
    arrows, ids, told = apply_shapes(given, rgb, ids)
    for line in told:
        print(line)
    depth = None if depth is None else torch.from_numpy(depth)
    return Inputs(rgb, given, arrows, torch.from_numpy(ids).long(), depth)


def check_motion(path: Path, motion: Motion, stage: MotionDreamer, size: tuple[int, int], frames: int | None) -> int:
    """Whether Stage II can paint a motion file -> its number of frames. Raises ValueError that names the file."""
    missing = [name for name in stage.config.given if getattr(motion, name) is None]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}, which this model paints from")
    for name in stage.config.given:
        value = getattr(motion, name)
        if value.shape[-2:] != size:
            raise ValueError(f"{path}: {name} is {value.shape[-1]}x{value.shape[-2]}, the image {size[1]}x{size[0]}")
    counts = {getattr(motion, name).shape[1] for name in stage.config.given}
    if len(counts) > 1 or frames not in (None, *counts):
        told = "" if frames is None else f", --frames says {frames}"
        raise ValueError(f"{path}: has {' and '.join(map(str, sorted(counts)))} frames{told}")
    return counts.pop()


# -------------------------------------------------------------------------------------------------------------- outputs


def written_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file of another name and gives it the right one only when it is complete."""
    partial = path.with_name(f"partial-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_video(path: Path, pictures: np.ndarray, fps: float) -> None:
    """uint8 [T, H, W, 3] -> mp4 (H.264, yuv420p, which every player opens); an odd size gets one more row or column."""
    pictures = np.pad(pictures, ((0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)), mode="edge")
    options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": 9, "macro_block_size": 1}
    written_whole(path, lambda partial: iio.imwrite(partial, pictures, plugin="FFMPEG", fps=fps, **options))


def check_output(folder: Path, width: int, height: int) -> None:
    """Tries folder and video writer with two black frames. Raises ValueError that names the folder."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / "check.mp4", np.zeros((2, height, width, 3), np.uint8), 7)
        (folder / "check.mp4").unlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: cannot write a {width}x{height} video here: {error}") from None
    finally:
        if made and folder.is_dir():
            folder.rmdir()


def to_uint8(pictures: Tensor) -> np.ndarray:
    """[T, 3, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return ((pictures.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def pictures_of(motion: Motion, inputs: Inputs) -> dict[str, np.ndarray]:
    """What there is of flow, segmentation and depth, as uint8 [T, H, W, 3] for people to look at."""
    pictures = {}
    if motion.flow is not None:
        pictures["flow"] = flow_to_rgb(motion.flow[0])
    if motion.segmentation is not None:
        first = inputs.ids[None] if inputs.ids.any() else motion.segmentation[:, 0]
        pictures["segmentation"] = to_uint8(render("segmentation", motion.segmentation, first)[0])
    if motion.depth is not None:
        pictures["depth"] = to_uint8(render("depth", motion.depth, motion.depth[:, 0])[0])
    return pictures


def write_grid(path: Path, panels: list[np.ndarray], fps: float) -> None:
    """Videos uint8 [T, H, W, 3] side by side as a GIF, small ones enlarged by a whole number."""
    frames = np.concatenate(panels, axis=2)
    scale = max(1, 256 // panels[0].shape[2])
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    images = [Image.fromarray(frame) for frame in frames]
    settings = {"format": "GIF", "save_all": True, "append_images": images[1:], "duration": 1000 / fps, "loop": 0}
    written_whole(path, lambda partial: images[0].save(partial, **settings))


def write_all(folder: Path, inputs: Inputs, videos: dict[str, np.ndarray], motion: Motion | None, fps: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if motion is not None:
        motion.save(folder / "motion.safetensors")
    for name, pictures in videos.items():
        write_video(folder / f"{name}.mp4", pictures, fps)
    scale, frames = max(1, 512 // inputs.rgb.shape[1]), len(next(iter(videos.values())))
    picture = draw_arrows(inputs.rgb, inputs.arrows, arrows_to_flow(inputs.arrows, inputs.ids, frames), scale)
    written_whole(folder / "input.png", Image.fromarray(picture).save)
    first = np.asarray(Image.fromarray(picture).resize(inputs.rgb.shape[1::-1], Image.Resampling.LANCZOS))
    write_grid(folder / "grid.gif", [np.repeat(first[None], frames, axis=0), *videos.values()], fps)


# ----------------------------------------------------------------------------------------------------------------- runs


def bar(name: str) -> Callable:
    return lambda steps: tqdm(steps, name, unit="step")


def check_size(path: str, rgb: np.ndarray, factor: int) -> None:
    height, width = rgb.shape[:2]
    if height % factor or width % factor:
        fits = f"{max(1, width // factor) * factor}x{max(1, height // factor) * factor}"
        raise ValueError(f"{path}: is {width}x{height}; the model needs multiples of {factor}, such as {fits}")


def run_svd(arguments: argparse.Namespace, inputs: Inputs, device: str) -> tuple[dict[str, np.ndarray], None, float]:
    """Plain SVD: what its weights do without us."""
    fps, kept = arguments.fps or 7.0, {"dtype": torch.float32, "device": device}
    vae = VAE.from_pretrained(arguments.svd, "vae", **kept).eval()
    check_size(arguments.image, inputs.rgb, vae.factor)
    tower = ImageEncoder.from_pretrained(arguments.svd, "image_encoder", **kept).eval()
    unet = UNet.from_pretrained(arguments.svd, "unet", **kept).eval()
    video = image_to_video(
        unet,
        vae,
        tower,
        inputs.told(2, device)[0],
        frames=arguments.frames or 14,
        steps=arguments.steps,
        fps=fps,
        guidance=tuple(arguments.guidance or (1.0, 3.0)),
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    return {"video": to_uint8(video[0])}, None, fps


def run_stages(
    arguments: argparse.Namespace, inputs: Inputs, device: str
) -> tuple[dict[str, np.ndarray], Motion, float]:
    """Motion Dreamer: Stage I, Stage II or both."""
    names = {"1": ["stage1"], "2": ["stage2"], "both": ["stage1", "stage2"]}[arguments.stage]
    path, kept = Path(arguments.out) / "motion.safetensors", {"dtype": torch.float32, "device": device}
    motion = Motion.load(path) if arguments.stage == "2" else None
    stages = {name: MotionDreamer.from_pretrained(arguments.model, name, **kept).eval() for name in names}
    vae = VAE.from_pretrained(arguments.model, "vae", **kept).eval()
    tower = ImageEncoder.from_pretrained(arguments.model, "image_encoder", **kept).eval()
    check_size(arguments.image, inputs.rgb, vae.factor)
    config = stages[names[0]].config
    frames, fps = arguments.frames or config.frames, arguments.fps or config.fps
    if motion is not None:
        frames = check_motion(path, motion, stages["stage2"], inputs.rgb.shape[:2], arguments.frames)
    told, video = inputs.told(frames, device), None
    settings = {
        "frames": frames,
        "steps": arguments.steps,
        "guidance": tuple(arguments.guidance or (1.0, 1.0)),
        "generator": torch.Generator().manual_seed(arguments.seed),
        "fps": fps,
    }
    if "stage1" in names:
        motion, _ = dream(stages["stage1"], None, vae, tower, *told, **settings, progress=bar("stage 1: motion"))
    if "stage2" in names:
        settings |= {"motion": motion, "progress": bar("stage 2: video")}
        settings["generator"] = torch.Generator().manual_seed(
            arguments.seed + 1
        )  # the same whether it runs alone or not
        _, video = dream(None, stages["stage2"], vae, tower, *told, **settings)
    videos = pictures_of(motion, inputs)
    return videos if video is None else videos | {"video": to_uint8(video[0])}, motion, fps


def peak_memory(device: str) -> int:
    """Bytes: of the GPU, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(arguments: argparse.Namespace) -> None:
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.image is None:
        arguments.image, arguments.arrows = str(DEMO / "example.png"), str(DEMO / "arrows.json")
    inputs, out = read_inputs(arguments), Path(arguments.out)
    check_output(out, *inputs.rgb.shape[1::-1])
    videos, motion, fps = (run_svd if arguments.svd else run_stages)(arguments, inputs, device)
    write_all(out, inputs, videos, motion, fps)
    record = vars(arguments) | {
        "camera": inputs.given.camera,
        "arrows_used": inputs.given.to_dict(),
        "frames": len(next(iter(videos.values()))),
        "fps": fps,
        "device": device,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(device),
    }
    written_whole(out / "run.json", lambda partial: partial.write_text(json.dumps(record, indent=2) + "\n"))
    print(f"{record['seconds']:.1f} s; look at {out / 'grid.gif'} and {out / 'input.png'}, all files: {out}/")


def main() -> None:
    try:
        run(parse_arguments())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
