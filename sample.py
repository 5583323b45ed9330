"""Image + arrows -> motion -> video, from the command line; the method itself is in motion_dreamer.py.

    python sample.py [--example driving]                 # the demo model on its example, or on that of a world
    python sample.py photo.jpg arrows.json --model DIR --out out [--segmentation ids.png] [--depth depth.png]
    python sample.py photo.jpg arrows.json --stage 1     # motion only; edit out/motion.safetensors, then
    python sample.py photo.jpg arrows.json --stage 2     # paint it
    python sample.py photo.jpg a.json b.json --samples 3 # out/a/sample_0 .. out/b/sample_2
    python sample.py photo.jpg --svd WEIGHTS             # plain Stable Video Diffusion

The photo may have any size: it is resized into the model's, its edge repeated where the aspect differs, and that margin
is cut off everything that is written. Arrows and maps are in pixels of the photo (inputs/photo.py).

Writes video.mp4, flow.mp4, segmentation.mp4, depth.mp4, input.png (the image, its arrows, what is marked), grid.gif
(all side by side), motion.safetensors (flow in pixels, ids, depth) and run.json (settings, seconds, memory). A user's
mistake is one line on stderr and exit code 2; the output folder and the video writer are tried before anything is
computed.
"""

from __future__ import annotations

import kernels.threads  # noqa: F401 (before torch)

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from clips import Motion, render
from inputs import Canvas, Inputs, arrows_to_flow, doubt_of, find_example, fit, read_inputs, told_to_stay
from motion_dreamer import MOTION_BUCKET, MotionDreamer, dream
from show import check_output, draw_arrows, flow_to_rgb, to_uint8, write_grid, write_videos, written_whole
from sources import check_parts, expand_home
from svd import VAE, ImageEncoder, TakeTurns, UNet, image_to_video
from training.compiled import compile_forward
from training.log import peak_memory

DEMO = Path(__file__).parent / "demo"
SVD_PIXELS = 1024 * 576  # what SVD was trained on
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("image", nargs="?", help="a picture of any size (default: the demo's example)")
    option("arrows", nargs="*", help="arrows.json, or several: each gets a folder (default: nothing is told of motion)")
    option("--example", metavar="WORLD", help="a picture of demo/examples and both its arrows files, such as driving")
    option("--model", type=Path, default=DEMO, metavar="DIR", help="model folder (default: demo/)")
    option("--svd", metavar="WEIGHTS", help="plain Stable Video Diffusion: hub id, folder or svd.safetensors")
    option("--out", default="out", metavar="DIR", help="folder that the files go to (default %(default)s)")
    option("--size", metavar="WxH", help="default: what the model was trained on; with --svd about the image's")
    option("--segmentation", metavar="PNG", help="ids of the image's objects (default: what arrows.json says)")
    here = "where transformers and the weights are here already, else"
    finds = "the object of an arrow that names none, without a segmentation: SAM 2 at its tail; auto: SAM 2"
    finds += f" {here} the region of similar colour; none: an error (default %(default)s)"
    option("--segment", choices=("auto", "sam", "none"), default="auto", help=finds)
    sam, depth_model = "facebook/sam2.1-hiera-tiny", "depth-anything/Depth-Anything-V2-Small-hf"
    option("--segment-model", default=sam, metavar="REPO_OR_DIR", help="SAM 2's weights (default %(default)s)")
    far = "a picture of 8 or 16 bit or .npy, any unit, larger = farther; estimate: by Depth-Anything; auto: what"
    far += f" arrows.json names, else an estimate {here} none (default %(default)s)"
    option("--depth", default="auto", metavar="FILE|auto|estimate|none", help=far)
    option("--depth-model", default=depth_model, metavar="REPO_OR_DIR", help="its weights (default %(default)s)")
    option("--stage", choices=("1", "2", "both"), default="both", help="motion, video or both (default %(default)s)")
    option("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    option("--samples", type=int, default=1, metavar="K", help="videos, each with the next seed (default %(default)s)")
    option("--steps", type=int, default=25, help="of sampling, for each stage (default %(default)s)")
    option("--frames", type=int, help="default: what the model was trained on; with --svd 14")
    option("--fps", type=float, help="default: what the model was trained on; with --svd 7")
    moves = "how much moves, for Stage II and SVD (default %(default)g)"
    option("--motion-bucket", type=float, default=MOTION_BUCKET, metavar="0..255", help=moves)
    first_last = "scale in the first and the last frame (default 1 1: none; with --svd 1 3)"
    option("--guidance", type=float, nargs=2, metavar=("FIRST", "LAST"), help=first_last)
    option("--device", choices=("cuda", "mps", "cpu"), help="default: cuda where there is one, else cpu")
    usual = "of the weights (default: on cuda fp16 for --svd, else bf16 if it has that; on other devices fp32)"
    option("--precision", choices=tuple(DTYPES), help=usual)
    option("--offload", action="store_true", help="networks take turns: less memory, more time (default %(default)s)")
    option("--compile", action="store_true", help="compile the denoiser, which takes minutes (default %(default)s)")
    arguments = expand_home(parser.parse_args())
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError that names the flag and its value."""
    for name, least in (("steps", 1), ("frames", 2), ("seed", 0), ("samples", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected {least} or more")
    if arguments.seed + arguments.samples > 2**63:
        raise ValueError(f"--seed {arguments.seed}: expected a number of 63 bits")
    if not 0 <= arguments.motion_bucket <= 255:
        raise ValueError(f"--motion-bucket {arguments.motion_bucket:g}: expected 0 to 255")
    if arguments.fps is not None and not 0 < arguments.fps <= 1000:
        raise ValueError(f"--fps {arguments.fps}: expected a number above 0, 1000 at most")
    if arguments.size is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", arguments.size):
        raise ValueError(f"--size {arguments.size}: expected WIDTHxHEIGHT, such as 512x320")


def choose_device(arguments: argparse.Namespace) -> None:
    """--device and --precision where the user leaves them open: SVD as it is published, a stage as it is trained."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    arguments.device = arguments.device or ("cuda" if found["cuda"] else "cpu")
    if not found[arguments.device]:
        raise ValueError(f"--device {arguments.device}: torch finds none")
    if arguments.precision is None:
        native = found["cuda"] and torch.cuda.is_bf16_supported(including_emulation=False)
        half = "fp16" if arguments.svd else "bf16" if native else "fp32"
        arguments.precision = half if arguments.device == "cuda" else "fp32"


# -------------------------------------------------------------------------------------------------------- what there is


@dataclass
class Models:
    """What is loaded: of plain SVD the UNet, of Motion Dreamer one stage or both."""

    vae: VAE
    tower: ImageEncoder
    unet: UNet | None
    stages: dict[str, MotionDreamer]


@dataclass
class Task:
    """One video to make."""

    inputs: Inputs
    canvas: Canvas
    out: Path
    seed: int
    title: str = ""  # of its progress bars, where there are several tasks


def load_models(arguments: argparse.Namespace) -> Models:
    """In --precision, but for the VAE: its encoder stays in float32, for it overflows in half precision; its decoder
    takes float16, as in diffusers' pipeline (bfloat16 would round pictures by half a level of gray)."""
    source, home = arguments.svd or arguments.model, "cpu" if arguments.offload else arguments.device
    kept = {"dtype": DTYPES[arguments.precision], "device": home}
    names = [] if arguments.svd else {"1": ["stage1"], "2": ["stage2"]}.get(arguments.stage, ["stage1", "stage2"])
    stages = {name: MotionDreamer.from_pretrained(source, name, **kept).eval() for name in names}
    vae = VAE.from_pretrained(source, "vae", torch.float32, home).eval()
    if arguments.precision != "fp32":
        vae.decoder.half()
    tower = ImageEncoder.from_pretrained(source, "image_encoder", **kept).eval()
    unet = UNet.from_pretrained(source, "unet", **kept).eval() if arguments.svd else None
    check_parts(source, vae, tower, stages, unet)
    networks = [unet] if unet else list(stages.values())
    for network in networks * arguments.compile:
        compile_forward(getattr(network, "unet", network))
    if arguments.offload:
        TakeTurns([vae, tower, *networks], arguments.device)
    return Models(vae, tower, unet, stages)


def model_size(arguments: argparse.Namespace, models: Models, rgb: np.ndarray) -> tuple[int, int]:
    """Width and height to compute with: --size, or what a stage was trained on, or for plain SVD the image's, cut to
    what SVD was trained on and to multiples of the VAE's factor (and of a small model's cells)."""
    factor = max([models.vae.factor, *(stage.config.vae_factor for stage in models.stages.values())])
    if arguments.size is not None:
        width, height = map(int, arguments.size.split("x"))
    elif models.stages:
        config = next(iter(models.stages.values())).config
        width, height = config.width, config.height
    else:
        scale = min(1.0, math.sqrt(SVD_PIXELS / (rgb.shape[0] * rgb.shape[1])))
        height, width = (max(1, int(scale * side) // factor) * factor for side in rgb.shape[:2])
    if width % factor or height % factor:
        fits = f"{max(1, width // factor) * factor}x{max(1, height // factor) * factor}"
        raise ValueError(f"--size {width}x{height}: the model needs multiples of {factor}, such as {fits}")
    return width, height


def folders(arguments: argparse.Namespace) -> dict[Path, str | None]:
    """--out -> the arrows file; with several, a folder in there for each, by the file's name."""
    files, out = arguments.arrows, Path(arguments.out)
    if len(files) < 2:
        return {out: files[0] if files else None}
    names = [Path(file).stem for file in files]
    for file, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"{file}: {names.count(name)} arrows files are called {name}, each needs a folder")
    return {out / name: file for file, name in zip(files, names, strict=True)}


def plan(arguments: argparse.Namespace, models: Models, given: dict[Path, Inputs]) -> list[Task]:
    """All videos of the command line: for every arrows file, --samples of them."""
    tasks, stages = [], [stage for stage in models.stages.values() if not stage.config.given]  # Stage II is given it
    can_stay = all(getattr(stage.config, "told", False) for stage in stages)
    for folder, inputs in given.items():
        if not can_stay and (entry := told_to_stay(inputs.given)):
            raise ValueError(
                f"{inputs.given.name}: {entry}: that tells something to stay, which this model does not understand; "
                "leave it out, or take a model that was trained with --set told=true"
            )
        fitted, canvas = fit(inputs, *model_size(arguments, models, inputs.rgb))
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (inputs.rgb.shape, canvas.inner)]
        doubt = "" if arguments.svd else doubt_of(fitted, canvas, models.vae, arguments.device)
        print(f"{arguments.image}: {' resized to '.join(dict.fromkeys(sizes))}; {inputs.origin}{doubt}")
        for i in range(arguments.samples):
            out = folder / f"sample_{i}" if arguments.samples > 1 else folder
            tasks.append(Task(fitted, canvas, out, arguments.seed + i))
    for number, task in enumerate(tasks * (len(tasks) > 1), 1):
        task.title = f"{number}/{len(tasks)} {task.out.relative_to(arguments.out)}, "
    return tasks


def pictures_of(motion: Motion, inputs: Inputs) -> dict[str, np.ndarray]:
    """What there is of flow, segmentation and depth, as uint8 [T, H, W, 3] for people to look at."""
    pictures = {}
    if motion.flow is not None:
        longest = motion.flow[0].norm(dim=1).max().item()
        pictures["flow"] = flow_to_rgb(motion.flow[0], max(1.0, longest))  # less than a pixel a frame stays pale
    if motion.segmentation is not None:
        first = inputs.ids[None] if inputs.ids.any() else motion.segmentation[:, 0]
        pictures["segmentation"] = to_uint8(render("segmentation", motion.segmentation, first)[0])
    if motion.depth is not None:
        pictures["depth"] = to_uint8(render("depth", motion.depth, motion.depth[:, 0])[0])
    return pictures


def write_all(folder: Path, inputs: Inputs, videos: dict[str, np.ndarray], motion: Motion | None, fps: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if motion is not None and any(value is not None for value in vars(motion).values()):
        motion.save(folder / "motion.safetensors")
    write_videos(folder, videos, fps)
    scale, frames = max(1, 512 // inputs.rgb.shape[1]), len(next(iter(videos.values())))
    F = arrows_to_flow(inputs.arrows, inputs.ids, frames)
    picture = draw_arrows(inputs.rgb, inputs.arrows, F, scale, inputs.ids)
    written_whole(folder / "input.png", Image.fromarray(picture).save)
    first = np.asarray(Image.fromarray(picture).resize(inputs.rgb.shape[1::-1], Image.Resampling.LANCZOS))
    write_grid(folder / "grid.gif", {"arrow": np.repeat(first[None], frames, axis=0)} | videos, fps)


# ----------------------------------------------------------------------------------------------------------------- runs


def run_svd(arguments: argparse.Namespace, models: Models, task: Task) -> tuple[dict, None, float]:
    """Plain SVD: what its weights do without us."""
    fps = arguments.fps or 7.0
    video = image_to_video(
        models.unet,
        models.vae,
        models.tower,
        task.inputs.told(2, task.canvas, arguments.device)["image"],
        frames=arguments.frames or 14,
        steps=arguments.steps,
        fps=fps,
        motion_bucket_id=arguments.motion_bucket,
        guidance=tuple(arguments.guidance or (1.0, 3.0)),
        generator=torch.Generator().manual_seed(task.seed),
    )
    return {"video": to_uint8(task.canvas.crop(video)[0])}, None, fps


def run_stages(arguments: argparse.Namespace, models: Models, task: Task) -> tuple[dict, Motion, float]:
    """Motion Dreamer: Stage I, Stage II or both. The margin is cut off the motion between them, too: what is in the
    file is what Stage II sees, whether it runs at once or later."""
    stages, canvas, path = models.stages, task.canvas, task.out / "motion.safetensors"
    motion = Motion(None, None, None)  # all that One-stage* of Table 1, which is a stage2 alone, is given
    config = next(iter(stages.values())).config
    frames, fps = arguments.frames or config.frames, arguments.fps or config.fps
    if arguments.stage == "2" and config.given:
        motion = Motion.load(path, config.given, canvas.inner, arguments.frames).to(arguments.device)
        frames = getattr(motion, config.given[0]).shape[1]
    told, video = task.inputs.told(frames, canvas, arguments.device), None
    settings = {
        "frames": frames,
        "steps": arguments.steps,
        "guidance": tuple(arguments.guidance or (1.0, 1.0)),
        "generator": torch.Generator().manual_seed(task.seed),
        "fps": fps,
        "motion_bucket": arguments.motion_bucket,
    } | told
    codecs = models.vae, models.tower
    if "stage1" in stages:
        settings["progress"] = partial(tqdm, desc=f"{task.title}stage 1: motion")
        motion, _ = dream(stages["stage1"], None, *codecs, **settings)
        motion = motion.map(canvas.crop)
    if "stage2" in stages:
        settings |= {"motion": motion.map(canvas.pad), "progress": partial(tqdm, desc=f"{task.title}stage 2: video")}
        settings["generator"] = torch.Generator().manual_seed(task.seed + 1)  # the same whether it runs alone or not
        _, video = dream(None, stages["stage2"], *codecs, **settings)
    videos = pictures_of(motion.to("cpu"), task.inputs)  # where the user's own maps are
    return videos if video is None else videos | {"video": to_uint8(canvas.crop(video)[0])}, motion, fps


def run_task(arguments: argparse.Namespace, models: Models, task: Task) -> None:
    started = time.perf_counter()
    videos, motion, fps = (run_svd if arguments.svd else run_stages)(arguments, models, task)
    write_all(task.out, task.inputs, videos, motion, fps)
    record = vars(arguments) | {
        "model": str(arguments.model),
        "arrows": task.inputs.given.name if arguments.arrows else None,
        "out": str(task.out),
        "seed": task.seed,
        "size": f"{task.canvas.width}x{task.canvas.height}",
        "inputs": task.inputs.origin,
        "camera": task.inputs.given.camera,
        "arrows_used": task.inputs.given.to_dict(),
        "frames": len(next(iter(videos.values()))),
        "fps": fps,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(arguments.device == "cuda"),
    }
    written_whole(task.out / "run.json", lambda partial: partial.write_text(json.dumps(record, indent=2) + "\n"))
    files = f"look at {task.out / 'grid.gif'} and {task.out / 'input.png'}, all files: {task.out}/"
    print(f"{record['seconds']:.1f} s; {files}")


def run(arguments: argparse.Namespace) -> None:
    choose_device(arguments)
    arguments.image, arguments.arrows = find_example(arguments.example, arguments.image, arguments.arrows)
    given = {folder: read_inputs(arguments, file, arguments.device) for folder, file in folders(arguments).items()}
    models = load_models(arguments)
    tasks = plan(arguments, models, given)
    for task in tasks:
        check_output(task.out, *task.canvas.inner[::-1])
    for task in tasks:
        run_task(arguments, models, task)


def main() -> None:
    try:
        run(parse_arguments())
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not full and not re.search("allocate memory|out of memory", str(error)):  # of a CPU, of other devices
            raise
        line = (str(error).splitlines() or ["out of memory"])[0]
        print(f"sample.py: {line}: try --offload, fewer --frames or a smaller --size", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sample.py: {str(error).splitlines()[0]}", file=sys.stderr)  # what ffmpeg says has more
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
