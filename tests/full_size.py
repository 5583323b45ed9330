"""Both stages at SVD's size (1.5 billion parameters each) once through on a CPU. No test: it takes minutes, about 20 GB
of memory and 20 GB of disk.

    python tests/full_size.py             # prints a log for docs/results.md
    python tests/full_size.py --tiny      # the same with small networks: whether the script works

From a random SVD folder in the published layout and half precision: train.py takes one step of what SVD does not have
(`--train added`) in bf16 with checkpointing; what it saved is loaded strictly; sample.py makes a video of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kernels.threads  # noqa: E402, F401 (before torch)

import measure  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import moving_squares  # noqa: E402

from motion_dreamer import MotionDreamer  # noqa: E402

MEMORY, DISK = 24, 22  # GB: at most of a process; of disk: SVD 4.5, its encoders in full 2.9, two stages in full 12.2
FRAMES, HEIGHT, WIDTH = 2, 64, 64


def run(what: str, *words: object) -> None:
    """Runs a script of ours and prints its seconds and the most memory that it held. Ends where it fails or takes more
    than MEMORY."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=errors, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["it said nothing"]
    if process.returncode:
        sys.exit(f"full_size.py: {what}: exit code {process.returncode}: {said[-1]}")
    held = used.ru_maxrss * 1024 / 1e9
    print(f"{what}: {time.perf_counter() - started:.0f} s, {held:.1f} GB at most", flush=True)
    if held > MEMORY:
        sys.exit(f"full_size.py: {what}: expected {MEMORY} GB at most")


def train_and_reload(stage: str, svd: Path, clips: Path, out: Path) -> None:
    name = f"stage{stage}"
    told = ["--stage", stage, "--init", svd, "--data", clips, "--out", out, "--train", "added", "--checkpointing"]
    told += ["--precision", "bf16", "--steps", 1, "--warmup", 1, "--batch", 1, "--sample-every", 0, "--quiet"]
    run(f"Stage {stage}: one step", "train.py", *told)
    print((out / "training" / name / "log.jsonl").read_text().strip(), flush=True)
    saved = sum(file.stat().st_size for file in (out / "training" / name).rglob("*") if file.is_file()) / 1e9
    started, model = time.perf_counter(), MotionDreamer.from_pretrained(out, name)
    count, seconds = sum(value.numel() for value in model.parameters()), time.perf_counter() - started
    moved = [layer.weight.abs().max().item() for layer in model.flow_control.features]
    print(f"{out.name}/{name}: {count:,} parameters, loaded in {seconds:.1f} s; checkpoint {saved:.2f} GB")
    print(f"what began at zero, layer by layer of C^(s): {', '.join(f'{value:.1e}' for value in moved)}", flush=True)
    if not all(moved):
        sys.exit(f"full_size.py: {out / name}: some of it did not learn")
    shutil.rmtree(out / "training" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small networks: whether this script works")
    tiny = parser.parse_args().tiny
    size = measure.TINY if tiny else measure.Sizes(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        free = shutil.disk_usage(work).free / 1e9
        if free < DISK and not tiny:
            sys.exit(f"full_size.py: {work.parent} has {free:.0f} GB free, not {DISK}: TMPDIR names another folder")
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, {FRAMES} frames of {WIDTH}x{HEIGHT}", flush=True)
        measure.make_svd(measure.Bench(size, work, threads=1, rounds=1, limit=0))
        svd, clips, out = work / "svd", work / "clips", work / "model"
        clip = moving_squares(0, FRAMES, HEIGHT, WIDTH)
        clip.save(clips / "0.safetensors")
        Image.fromarray(clip.rgb[0]).save(work / "image.png")
        for stage in "12":
            train_and_reload(stage, svd, clips, out)
        told = ["--model", out, "--out", work / "out", "--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES, "--steps", 2]
        run("sampling, 2 steps of each stage", "sample.py", work / "image.png", *told, "--precision", "bf16")
        print("files:", ", ".join(sorted(path.name for path in (work / "out").iterdir())))


if __name__ == "__main__":
    main()
