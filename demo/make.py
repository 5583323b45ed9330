"""The shipped model from nothing, in one command: clips of all worlds, the VAE, both stages.

    python demo/make.py --minutes 9                  # a GPU and 16 cores: a quarter of an hour in all
    python demo/make.py --minutes 60                 # two cores
    python demo/make.py --minutes 9 --export demo    # and ship it: the weights in half precision
    python demo/make.py --minutes 9 --start DIR      # not from nothing: its VAE stays, its stages learn on

1. Workers simulate clips of all scenarios into OUT/clips, as long as anything trains (one worker or two: as long as the
   VAE does).
2. The VAE learns all worlds, for three tenths of the minutes, from the clips that there are when it begins.
3. Both stages learn at the same time, for the rest of the minutes, in rounds: each begins with the clips that there are
   by then. Their latents are made once, those of a later round while the former goes on.
4. The model is measured on a few clips of each world that it has not seen (demo/measure.py), and card.md says what went
   into it and what it can.

Minutes are those of training: the learning rate falls with the clock (`train.py --minutes`). Killed, the same command
goes on: clips that are there stay, trainings go on from their last save, what is complete is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402

from clips.scenes import SCENARIOS  # noqa: E402
from motion_dreamer import MotionDreamer  # noqa: E402
from svd import VAE, ImageEncoder  # noqa: E402

VAE_SHARE, ROUNDS = 0.3, 2  # of the minutes; of both stages
BATCH = {"vae": (8, 1), "1": (64, 4), "2": (64, 4)}  # on a GPU, on cores
SHARE = {"vae": (1.0, 1.0), "1": (1.0, 1.0), "2": (0.6, 1.0)}  # of the minutes; then Stage I has the GPU
LOOK_SEED = 6000000  # of the first clip that the model is measured by
WORLDS = (*SCENARIOS, "dominoes", "dominoes", "driving")  # most is asked of these two
STILL = 0.15  # share of the clips in which nobody pushes: "told to stay" is learned from these
# What a stage is told of a push is its first step; half of the clips show only what is pushed, the rest any part of it.
TOLD = ["reduce=start", "mask_ratio=0.15", "mask_start=0.7", "splat_time=constant"]
STAGES = {
    "1": [*TOLD, "told=true", "sigma_mean=2.0"],
    "2": [*TOLD, "parameterization=x0", "draft=true", "sigma_mean=1.2"],
}
PRECISION = ["--precision", "bf16"] if torch.cpu._is_avx512_bf16_supported() else []  # else that of the device
PARTS = {"vae": VAE, "image_encoder": ImageEncoder, "stage1": MotionDreamer, "stage2": MotionDreamer}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cores = os.cpu_count() or 1
    option = parser.add_argument
    option("--minutes", type=float, default=9, help="of training (default %(default)g)")
    option("--out", default="runs/demo", metavar="DIR", help="clips, trainings and the model (default %(default)s)")
    option("--start", metavar="DIR", help="a model folder whose weights learn on (default: from nothing)")
    option("--export", metavar="DIR", help="where the weights go in half precision, such as demo (default: nowhere)")
    option("--scenario", default=",".join(WORLDS), help="worlds, some more than once (default %(default)s)")
    option("--size", default="128x64", help="of the pictures (default %(default)s)")
    option("--frames", type=int, default=16, help="of a clip (default %(default)s)")
    option("--first", type=int, default=256, help="clips before the VAE begins (default %(default)s)")
    option("--clips", type=int, default=20000, help="at most; 3 MB each with their latents (default %(default)s)")
    option("--workers", type=int, default=max(1, cores - 1), help="that simulate (default %(default)s)")
    option("--preset", default="demo", help="of train.py: sizes of what is made from nothing (default %(default)s)")
    option("--seed", type=int, default=0, help="of clips and trainings (default %(default)s)")
    option("--look", type=int, default=2, metavar="N", help="clips of each world to measure by; 0: none (default 2)")
    arguments = parser.parse_args()
    arguments.first = min(arguments.first, arguments.clips)
    for name in ("out", "start", "export"):  # the programs that read them run in the repository's folder
        if told := getattr(arguments, name):
            setattr(arguments, name, str(Path(told).expanduser().resolve()))
    return arguments


# ------------------------------------------------------------------------------------------------------------ processes


@contextmanager
def simulating(arguments: argparse.Namespace) -> Iterator[subprocess.Popen]:
    """Workers that add clips to OUT/clips until the block ends."""
    clips = -(-arguments.clips // 2)  # and as many mirror images
    told = [sys.executable, "-m", "clips.simulate", Path(arguments.out) / "clips", "--clips", clips, "--mirror"]
    told += ["--still", STILL, "--scenario", arguments.scenario]
    told += ["--size", arguments.size, "--frames", arguments.frames]
    told += ["--seed", arguments.seed, "--workers", arguments.workers]
    log = open(Path(arguments.out) / "simulate.txt", "a")  # noqa: SIM115 (open as long as the process)
    how = {"cwd": HERE.parent, "stdout": log, "stderr": log, "start_new_session": True}
    process = subprocess.Popen(list(map(str, told)), env=os.environ | {"TQDM_MININTERVAL": "20"}, **how)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a clip that was being written has another name
        process.wait()
        log.close()


def training(arguments: argparse.Namespace, stage: str, minutes: float) -> subprocess.Popen:
    """train.py of one part, on the GPU if there is one."""
    gpu = torch.cuda.is_available()
    told = [sys.executable, "train.py", "--stage", stage, "--minutes", minutes * SHARE[stage][not gpu]]
    told += ["--start", arguments.start] if arguments.start else ["--preset", arguments.preset]
    told += ["--data", Path(arguments.out) / "clips", "--out", arguments.out, "--seed", arguments.seed, "--quiet"]
    told += ["--sample-every", 0, "--save-every", 1000 if gpu else 300, "--cooldown", 0.7]
    told += ["--batch", BATCH[stage][0], "--workers", 4] if gpu else ["--batch", BATCH[stage][1]]
    told += PRECISION
    if stage == "vae":
        told += ["--frames", min(4, arguments.frames)]  # two would have no inner ones: see `vae_loss`
    else:
        told += ["--lr", 1e-3, "--cuda-graph"] if gpu else []
        told += ["--ema", 0.995, "--set", *STAGES[stage]]
    threads = max(1, (os.cpu_count() or 1) // (1 if stage == "vae" else len(STAGES)))  # trained alone, or side by side
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(list(map(str, told)), cwd=HERE.parent, env=environment)


def encode(arguments: argparse.Namespace) -> None:
    """Latents of the clips that there are: Stage II's, which have all of Stage I's. Ends with it where it fails."""
    told = [sys.executable, "-m", "clips.encode", Path(arguments.out) / "clips", "--model"]
    told += [arguments.start or arguments.out, "--preset", arguments.preset, "--stage", 2, "--set", *STAGES["2"]]
    told += ["--workers", 4] if torch.cuda.is_available() else []
    told += PRECISION
    if code := subprocess.run(list(map(str, told)), cwd=HERE.parent).returncode:
        sys.exit(code)


def finish(
    processes: list[subprocess.Popen], seconds: float | None = None, before: Callable[[], None] = lambda: None
) -> None:
    """Waits for trainings; after `seconds`, and `before`, they are told to save and end. So they are where one of them
    has failed, or this program: then it ends with them."""
    started = time.monotonic()
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            if seconds is not None and time.monotonic() - started > seconds:
                before()
                break
            time.sleep(0.1)
    finally:
        going = [process for process in processes if process.poll() is None]
        for process in going:
            process.terminate()  # train.py saves, as at Ctrl-C, which a job in the background does not hear
        for process in going:
            process.wait()
    if codes := [process.returncode for process in processes if process.returncode]:
        sys.exit(codes[0])


def wait_for_clips(arguments: argparse.Namespace, simulator: subprocess.Popen) -> None:
    """Until there are --first of them. Where the VAE is known, the latents of those that come are made meanwhile."""
    while (count := len(clips_of(arguments))) < arguments.first:
        if simulator.poll() is not None:
            sys.exit(f"make.py: {Path(arguments.out) / 'simulate.txt'}: the simulator ended")
        if count and arguments.start:
            encode(arguments)
        time.sleep(0.2)


def clips_of(arguments: argparse.Namespace) -> list[Path]:
    return list((Path(arguments.out) / "clips").glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------- what comes out


def export(source: Path, folder: Path) -> None:
    """The four parts of a model folder in half precision."""
    for name, part in PARTS.items():
        part.from_pretrained(source, name, dtype=torch.float16).save_pretrained(folder / name)
    size = sum(path.stat().st_size for name in PARTS for path in (folder / name).glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:.1f} MB of weights")


def summary(arguments: argparse.Namespace, seconds: float) -> dict:
    """What went into it: distinct clips, draws of them and last losses, by part."""
    found = {"minutes": arguments.minutes, "seconds": round(seconds), "clips": len(clips_of(arguments))}
    found |= {"torch": torch.__version__, "seed": arguments.seed, "cores": os.cpu_count()}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for name, stage in (("vae", "vae"), ("stage1", "1"), ("stage2", "2")):
        log = Path(arguments.out) / "training" / name / "log.jsonl"
        if not log.exists():  # the VAE of --start
            continue
        lines = log.read_text().splitlines()
        last = [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10) :]]
        draws = len(lines) * BATCH[stage][not torch.cuda.is_available()]
        found[name] = {"steps": len(lines), "draws": draws, "loss": round(sum(last) / len(last), 4)}
    return found


def card(arguments: argparse.Namespace, record: dict, figures: str) -> str:
    """Markdown: the command, what went in, what came out."""
    told, size = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), f"{arguments.frames} frames of {arguments.size}"
    time_ = f"{record['seconds'] / 60:.0f} minutes, {record['minutes']:g} of them training, before it was measured"
    where = f"{record['device']}, {record['cores']} cores, torch {record['torch']}, seed {record['seed']}"
    lines = ["# What this model is", "", f"Made by `python demo/{told}`: {time_}; {where}.", ""]
    lines += [f"{record['clips']:,} distinct clips, {size}: {arguments.scenario}.", ""]
    lines += ["| part | steps | clips drawn | loss, last tenth |", "|---|---|---|---|"]
    for name in ("vae", "stage1", "stage2"):
        part = record.get(name, {"steps": 0, "draws": 0, "loss": "as it was"})
        lines.append(f"| {name} | {part['steps']:,} | {part['draws']:,} | {part['loss']} |")
    return "\n".join([*lines, "", "## Figures", "", figures or "Not measured.", ""])


def measured(arguments: argparse.Namespace, model: Path) -> str:
    """What demo/measure.py prints of clips that nothing was trained on."""
    told = [sys.executable, HERE / "measure.py", "--model", model, "--data", Path(arguments.out) / "look"]
    told += ["--clips", arguments.look, "--seed", LOOK_SEED]
    return subprocess.run(list(map(str, told)), stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    arguments, started = parse_arguments(), time.monotonic()
    out, minutes = Path(arguments.out), arguments.minutes
    (out / "clips").mkdir(parents=True, exist_ok=True)
    with simulating(arguments) as simulator:
        wait_for_clips(arguments, simulator)
        if not arguments.start:
            finish([training(arguments, "vae", VAE_SHARE * minutes)])
    left = minutes if arguments.start else (1 - VAE_SHARE) * minutes
    with simulating(arguments) if arguments.workers > 2 else nullcontext() as simulator:
        encode(arguments)
        more = simulator and len(clips_of(arguments)) < arguments.clips
        for part in range(ROUNDS if more else 1, 0, -1):
            pair = [training(arguments, stage, left) for stage in STAGES]
            finish(pair, None if part == 1 else 60 * left / ROUNDS, partial(encode, arguments))
    record = summary(arguments, time.monotonic() - started)
    (out / "make.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    folder = Path(arguments.export or out)
    if arguments.export:
        export(out, folder)
    figures = measured(arguments, folder) if arguments.look else ""
    (folder / "card.md").write_text(card(arguments, record, figures))
    print(f"{folder / 'card.md'}: what the model is and can")
    if arguments.look and not figures:
        sys.exit(2)  # measure.py has said why


if __name__ == "__main__":
    for killed in (signal.SIGTERM, signal.SIGHUP):  # ends as Ctrl-C does: nothing that was started goes on
        signal.signal(killed, lambda number, _: sys.exit(128 + number))
    main()
