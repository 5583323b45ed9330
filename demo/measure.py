"""The table by which the shipped model is judged, in one command: test clips of all worlds, the model, the bars.

    python demo/measure.py --data data/test                             # clips of the seeds 4,000,000 and up, once
    python demo/measure.py --data data/look --clips 3 --seed 8000000    # a look, on other clips

Simulates the clips that --data lacks (of dominoes four times as many as of the other worlds), runs evaluate.py on all
clips that are there, and prints every figure with its 95 % interval beside nothing moves, the truth through the VAE, a
twin and the truth. "mean" is that over dominoes, collide, drop, roll, support, contain, link and tower, of those that
have the figure. Carried ids are the first frame's, moved along the generated flow. Killed, the same command goes on:
clips and samples are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

from metrics import COLUMNS, cell, line  # noqa: E402
from sources import first_line  # noqa: E402

WORLDS = ("dominoes", "collide", "drop", "roll", "support", "contain", "link", "tower", "branch", "driving")
PARTS = ("vae", "image_encoder", "stage1", "stage2")
ROWS = (  # what is printed; where the figure stands, its name; what it must be, and should be
    ("flow error of zero flow", "mean", "epe_relative", 0.58, 0.45),
    ("mask IoU per object, last frame", "mean", "iou_last", 0.65, 0.75),
    ("will it be hit, balanced accuracy", "mean", "hit", 0.85, 0.92),
    ("dominoes: all right by carried ids", "dominoes", "all_right_carried", 0.90, 0.95),
    ("dominoes: all right where a wide gap stops them", "dominoes", "gap_carried", 0.90, 0.95),
    ("dominoes: push and opposite push go the right way", "dominoes", "both_ways", 0.95, 0.98),
    ("dominoes: all told to stay, standing", "dominoes", "standing", 0.98, 0.99),
    ("driving: flow error of zero flow", "driving", "epe_relative", 0.25, 0.15),
    ("driving: pairs of ego motions, right for the other", "driving", "ego_pairs", 0.75, 0.85),
    ("driving: the lead car goes where its arrow says", "driving", "lead_way", 0.90, 0.95),
    ("Stage II told the true motion, PSNR in dB", "mean", "psnr", 26, 28),
)
CODEC = (("flow error, of its size", "epe_relative", 0.10), ("ids mIoU", "ids_miou", 0.97), ("PSNR in dB", "psnr", 30))
LESS_IS_BETTER = ("epe_relative",)
MEGABYTES = 50
Scenarios = dict[str, dict[str, dict[str, dict]]]  # figures by world, source and name


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--model", default=str(HERE), metavar="DIR", help="model folder (default: demo/)")
    option("--data", required=True, metavar="DIR", help="where the test clips are, or go")
    option("--clips", type=int, default=50, help="of every world; of dominoes four times as many (default %(default)s)")
    option("--seed", type=int, default=4000000, help="of the first clip (default %(default)s)")
    option("--sampling-steps", type=int, default=10, help="of each stage (default %(default)s)")
    option("--workers", type=int, default=os.cpu_count() or 1, help="that simulate (default %(default)s)")
    option("--json", metavar="FILE", help="where all figures go (default: measured.json in --data)")
    arguments = parser.parse_args()
    arguments.json = arguments.json or Path(arguments.data) / "measured.json"
    return arguments


def call(*words: object) -> None:
    """A script of ours in the repository's folder; ends with it where it fails."""
    told = [sys.executable, *map(str, words)]
    if code := subprocess.run(told, cwd=HERE.parent, stdout=subprocess.DEVNULL).returncode:
        sys.exit(code)


def simulate(arguments: argparse.Namespace, data: Path) -> None:
    """Clips of the model's size and length, for all worlds."""
    config = Path(arguments.model) / "stage2" / "config.json"
    try:
        stage = json.loads(config.read_text())["stage"]
    except (OSError, ValueError, KeyError) as error:
        print(f"measure.py: {config}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    told = ["--size", f"{stage['width']}x{stage['height']}", "--frames", stage["frames"]]
    told += ["--seed", arguments.seed, "--workers", arguments.workers]
    first, *others = WORLDS
    call("-m", "clips.simulate", data, "--scenario", first, "--clips", 4 * arguments.clips, *told)
    call("-m", "clips.simulate", data, "--scenario", ",".join(others), "--clips", len(others) * arguments.clips, *told)


def verdict(value: float | None, name: str, must: float, aim: float | None = None) -> str:
    """What a figure reaches, read at the mean."""
    if value is None:
        return "not asked"
    sign = -1 if name in LESS_IS_BETTER else 1
    bars = {"aim": aim, "must": must}
    return next((bar for bar, at in bars.items() if at is not None and sign * value >= sign * at), "MISSED")


def figure(scenarios: Scenarios, world: str, source: str, name: str) -> dict | None:
    """One figure; None where it is not there, or JSON has null in its place."""
    found = scenarios.get(world, {}).get(source, {}).get(name)
    return None if found is None or found["value"] is None else found


def table(scenarios: Scenarios, megabytes: float) -> str:
    """Markdown: the bars, and beneath them what the VAE does in every world."""
    lines = [line(["figure", "must", "aim", *COLUMNS.values(), "clips", "reached"]), "|---" * (len(COLUMNS) + 5) + "|"]
    for label, world, name, must, aim in ROWS:
        found = {source: figure(scenarios, world, source, name) for source in COLUMNS}
        made = found["model"] or {"value": None, "clips": 0}
        told = [label + (", mean" if world == "mean" else ""), str(must), str(aim), *map(cell, found.values())]
        lines.append(line([*told, str(made["clips"]), verdict(made["value"], name, must, aim)]))
    size = [f"{megabytes:.1f}", *[""] * len(COLUMNS), "must" if megabytes <= MEGABYTES else "MISSED"]
    lines.append(line(["weights, MB", str(MEGABYTES), "", *size]))
    lines += ["", line(["the VAE alone", *(f"{label} ({must})" for label, _, must in CODEC), "reached"])]
    lines.append("|---" * (len(CODEC) + 2) + "|")
    for world in (world for world in WORLDS if world in scenarios):
        found = [figure(scenarios, world, "codec", name) for _, name, _ in CODEC]
        values = [each and each["value"] for each in found]
        reached = {verdict(value, name, must) for value, (_, name, must) in zip(values, CODEC, strict=True)}
        lines.append(line([world, *map(cell, found), "MISSED" if "MISSED" in reached else "must"]))
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    data, model, path = (Path(getattr(arguments, name)).resolve() for name in ("data", "model", "json"))
    simulate(arguments, data)
    told = ["--model", model, "--data", data, "--metrics", "demo", "--clips", 10**6, "--json", path]
    call("evaluate.py", *told, "--sampling-steps", arguments.sampling_steps)
    result = json.loads(path.read_text())
    size = sum(file.stat().st_size for part in PARTS for file in (model / part).glob("*.safetensors"))
    print(table(result["scenarios"], size / 1e6))
    settings = result["settings"]
    print(f"\n{settings['clips']} clips, {settings['sampling_steps']} sampling steps, weights {settings['weights']}")


if __name__ == "__main__":
    main()
