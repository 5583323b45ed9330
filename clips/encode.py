"""Latents of all clips of a folder, written once: what train.py would otherwise do before its first step.

    python -m clips.encode DIR --init REPO_OR_DIR                               # for train.py --init: SVD's VAE
    python -m clips.encode DIR --model DIR                                      # with a small model's VAE
    torchrun --nproc_per_node 8 -m clips.encode DIR --init REPO_OR_DIR --workers 4    # eight GPUs share the clips

The latents lie in DIR/.cache (training/cache.py). To resume, run the same command again: what is there is not made
again. A script, which stands above training: no module imports it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from clips import ClipDataset
from motion_dreamer import (
    ONE_STAGE,
    STAGE1,
    STAGE2,
    MotionDreamer,
    SmallStageConfig,
    StageConfig,
    build,
    stage_class,
)
from sources import expand_home, read_config, read_stage
from svd import VAE, ImageEncoder
from training.cache import CachedClips
from training.presets import PRESETS
from training.processes import Machine, end, lost_another, start_process, together
from training.task import changed_fields

STAGES = {"1": STAGE1, "2": STAGE2, "one": ONE_STAGE}  # as in train.py


def saved_stages(model: str | None) -> dict[str, MotionDreamer]:
    """The stages of a model folder by the names of --stage, without their weights. Raises ValueError with the path."""
    found = {}
    for path in (Path(model or "", name, "config.json") for name in ("stage1", "stage2") if model):
        if not path.exists():
            continue
        stage = read_config(path, build)
        predict, given = stage.config.predict, stage.config.given
        found["1" if predict != ("rgb",) else "2" if given else "one"] = stage
    return found


def wanted_stages(arguments: argparse.Namespace, vae: VAE) -> list[MotionDreamer]:
    """The stages of --stage without weights, which know what is encoded and how. Those of --model where it has them;
    others have the cells of these, or of --preset; and in all what --set says."""
    with torch.device("meta"):
        saved = saved_stages(arguments.model)
        stack = 1 if arguments.init else PRESETS[arguments.preset]["stack"]
        factor = next((stage.config.vae_factor for stage in saved.values()), vae.factor * stack)
        channels = vae.config.latent_channels * (factor // vae.factor) ** 2
        stages = []
        for name in ("2", "1") if arguments.stage == "all" else (arguments.stage,):
            usual = replace(STAGES[name], vae_factor=factor, latent_channels=channels)
            config = asdict(saved[name].config if name in saved else usual) | changed_fields(arguments.set)
            config = read_stage(config, StageConfig, SmallStageConfig)
            stages.append(stage_class(config)(config, PRESETS["tiny"]["stage1"]))  # no matter how large a UNet
    if len(stages) == 2 and stages[1].config.latents.items() <= stages[0].config.latents.items():
        del stages[1]  # Stage II is given all that Stage I predicts
    return stages


def encode(arguments: argparse.Namespace, machine: Machine) -> str:
    """Writes what the cache lacks -> one line on what was done. Raises ValueError or OSError, one line."""
    source, full = arguments.init or Path(arguments.model), {"dtype": torch.float32, "device": machine.device}
    with together():
        clips = ClipDataset(arguments.folder, arguments.frames)
        if not clips.whole:
            told = f"{arguments.folder}: has clips of {max(clips.lengths)} frames, more than {clips.frames}"
            raise ValueError(f"{told}: training draws windows of them, which cannot be encoded once for all")
        vae = VAE.from_pretrained(source, "vae", **full).requires_grad_(False).eval()
        image_encoder = ImageEncoder.from_pretrained(source, "image_encoder", **full).requires_grad_(False).eval()
        stages = wanted_stages(arguments, vae)
        for stage in stages:
            clips.check_size(stage.config.vae_factor)
    encoded, started = 0, time.perf_counter()
    for stage in stages:
        cached = CachedClips(clips, stage.config, vae, image_encoder)
        encoded = max(encoded, cached.encode(stage, vae, image_encoder, machine, arguments.workers))
    if not encoded:
        return f"{cached.folder}: the latents of all {len(clips)} clips were there, nothing was to do"
    seconds = (time.perf_counter() - started) / encoded
    told = f"{encoded} clips encoded, {len(clips) - encoded} were there"
    return f"{cached.folder}: {told}; {seconds:.2f} seconds a clip with {machine.world_size} process(es)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m clips.encode", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", metavar="DIR", help="clips, as train.py's --data and --val")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--init", metavar="REPO_OR_DIR", help="SVD's weights, as train.py's --init")
    source.add_argument("--model", metavar="DIR", help="model folder: train.py's --out or --start")
    add("--stage", choices=(*STAGES, "all"), default="all", help="that will be trained (default: 1 and 2)")
    add("--preset", choices=list(PRESETS), default="demo", help="as train.py's, if --model has no stage yet")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="as train.py's")
    add("--frames", type=int, help="as train.py's (default: all frames of the first clip)")
    add("--workers", type=int, default=0, help="processes that read clips, for each GPU (default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    return expand_home(parser.parse_args())


def main() -> None:
    arguments = parse_arguments()
    try:
        machine = start_process(0, arguments.precision)
        told = encode(arguments, machine)
        if machine.rank == 0:
            print(told)
        if machine.world_size > 1:
            end(0)
        return
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[-1]  # the loader's workers send a whole traceback
        print(f"clips.encode: {line.removeprefix('ValueError: ')}", file=sys.stderr)
    except SystemExit as stop:  # another process has said it
        if not stop.code:
            raise
    except torch.OutOfMemoryError:
        print("clips.encode: the GPU's memory does not suffice for these clips", file=sys.stderr)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        print("clips.encode: lost another process, which may have said why", file=sys.stderr)
    except KeyboardInterrupt:
        end(130)
    end(2)


if __name__ == "__main__":
    main()
