"""The rows of the paper's Tables 1 to 3: the training of a model for each, where all else is the same in all rows, and
how they are printed beside the paper's.

folder = train_row("without_depth", arguments)     # the arguments of evaluate.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from metrics import COLUMNS, LABELS, WINDOW, cell, change, line
from motion_dreamer import ABLATIONS, STAGE2

UNTOLD = " untold"  # ends the name of a row whose model is told nothing of motion (supplement, section 9)

# By the name of our row: what the paper calls it, and its FVD and FVMD there, with SVD's weights, on Physion or (Table
# 2) drives of its own.
TABLES = {
    1: {
        "one_stage": ("One-stage*", 173.0, 224.3),
        "sparse_flow": ("MOFA-Video (ours: its sparse flow in our model)", 170.1, 226.2),
        "motion_dreamer": ("Ours", 157.8, 205.1),
    },
    2: {
        "one_stage": ("One-stage*", "-", "-"),
        "sparse_flow": ("MOFA-Video (ours: its sparse flow in our model)", 309.7, 7176.0),
        "motion_dreamer": ("Ours", 272.2, 2913.0),
        "one_stage untold": ("One-stage*, told nothing", "-", "-"),
        "sparse_flow untold": ("sparse flow, told nothing", "-", "-"),
        "motion_dreamer untold": ("Ours, told nothing (Vista: 285.8, 3557)", "-", "-"),
    },
    3: {
        "motion_dreamer": ("Motion Dreamer", 157.8, 205.2),
        "without_segmentation": ("w/o segmentation map", 243.7, 259.0),
        "without_depth": ("w/o depth map", 167.0, 228.8),
        "without_flow": ("w/o optical flow", 173.0, 224.3),
        "without_motion_loss": ("w/o motion enhancement loss", 165.1, 210.1),
        "sparse_flow": ("sparse optical flow", 169.1, 217.5),
    },
}

# Hundreds of steps, not thousands: warm up soon, cool down for long, average over little.
RECIPE = ["--lr", "8e-4", "--warmup", "30", "--cooldown", "0.6", "--ema", "0.99", "--sample-every", "0"]


def train_row(row: str, arguments: argparse.Namespace) -> Path:
    """Trains a row's model under --runs unless it is there: the same data, VAE, steps and seed for every row.

    A Stage II that is configured as that of the full model is that one: it would train to the same weights."""
    root = Path(arguments.runs)
    long = f"{arguments.minutes:g}min" if arguments.minutes else str(arguments.steps)
    name = f"{arguments.preset}-{long}-{arguments.seed}"
    base, folder = root / f"{name}-vae", root / f"{name}-{row}"
    told = ["--preset", arguments.preset, "--data", arguments.data, "--seed", str(arguments.seed)]
    told += ["--minutes", str(arguments.minutes)] if arguments.minutes else ["--steps", str(arguments.steps)]
    told += ["--batch", str(arguments.train_batch), *RECIPE]
    if not arguments.codec:
        train(base, "vae", [*told, "--frames", "4"], arguments.quiet)
    for part in ("vae", "image_encoder"):
        shutil.copytree(Path(arguments.codec or base) / part, folder / part, dirs_exist_ok=True)
    told += ["--precision", arguments.precision] if arguments.precision else []
    told += ["--val", arguments.val, "--val-every", str(arguments.steps)]
    told += ["--set", *arguments.set] if arguments.set else []
    if row == "one_stage":
        train(folder, "one", told, arguments.quiet)
        return folder
    train(folder, "1", [*told, "--ablation", row], arguments.quiet)
    if row != "motion_dreamer" and ABLATIONS[row][1] == STAGE2:
        shutil.copytree(train_row("motion_dreamer", arguments) / "stage2", folder / "stage2", dirs_exist_ok=True)
    else:
        train(folder, "2", [*told, "--ablation", row], arguments.quiet)
    return folder


def train(folder: Path, stage: str, told: list[str], quiet: bool) -> None:
    """Runs train.py; a finished stage is left as it is, a killed one goes on. Raises ValueError when it fails, or when
    it was finished with other settings."""
    finished = folder / f"finished_{stage}.json"
    if finished.exists():
        if json.loads(finished.read_text()) != told:
            raise ValueError(f"{finished}: was trained with other settings: take another --runs")
        return
    script = Path(__file__).parents[1] / "train.py"
    command = [sys.executable, str(script), "--stage", stage, "--out", str(folder), *told]
    done = subprocess.run(command + ["--quiet"] * quiet, stdout=sys.stderr)
    if done.returncode:
        raise ValueError(f"{folder}: train.py --stage {stage} ended with exit code {done.returncode}")
    finished.write_text(json.dumps(told))


# ------------------------------------------------------------------------------------------------ at the paper's scale

STEP = 0.5  # seconds of a step of one clip, 14 frames of 512x320, on an H200 with --checkpointing (docs/training.md)
CARDS = 8


def commands_of(arguments: argparse.Namespace) -> str:
    """The commands that train and measure a table's rows from SVD's weights (--init), the data that they need, and how
    long that takes. Rows that share a stage share its training. Raises ValueError for too few frames."""
    frames, rows = arguments.frames or 25, dict.fromkeys(row.removesuffix(UNTOLD) for row in TABLES[arguments.table])
    if frames < WINDOW:
        raise ValueError(
            f"--frames {frames}: FVMD needs {WINDOW}; SVD's 14 do not suffice, the 25 of its XT weights do"
        )
    run = f"torchrun --nproc_per_node {CARDS}"
    init = f"--init {arguments.init}"
    told = f"--data {arguments.data} --val {arguments.val} {init} --frames {frames} --seed {arguments.seed}"
    told += f" --batch 1 --checkpointing --steps {arguments.steps}"
    told += f" --set {' '.join(arguments.set)}" if arguments.set else ""
    root = Path(arguments.runs)
    lines = [f"{run} -m clips.encode {arguments.data} {init} --frames {frames}"]
    stages = 0
    for row in sorted(rows, key=lambda row: row != OURS):  # ours first: others take its Stage II
        out, own = root / row, row == OURS or (row != "one_stage" and ABLATIONS[row][1] != STAGE2)
        if row == "one_stage":
            trained = [f"{run} train.py --stage one {told} --out {out}"]
        else:
            parts = ["1", "2"] if own else ["1"]
            trained = [f"{run} train.py --stage {part} --ablation {row} {told} --out {out}" for part in parts]
        stages += len(trained)
        lines += trained if own or row == "one_stage" else [*trained, f"cp -r {root / OURS / 'stage2'} {out}/"]
    for row in TABLES[arguments.table]:
        untold = " --told nothing" if row.endswith(UNTOLD) else ""
        measured = f"--data {arguments.val} --metrics physics,fvd,fvmd --i3d I3D"
        lines.append(f"python evaluate.py --model {root / row.removesuffix(UNTOLD)} {measured}{untold}")
    hours = stages * arguments.steps * STEP * frames / 14 / 3600
    clips = "drives, as of clips.annotate" if arguments.table == 2 else "trials of Physion, as of clips.physion"
    needs = f"{clips}: {frames} frames each, to train on ({arguments.data}) and to measure by ({arguments.val})"
    time = f"{hours:.0f} hours: {stages} trainings of {arguments.steps} steps of {CARDS} clips of 512x320"
    return "\n".join([*lines, "", f"Data: {needs}.", f"Estimated: {time} on {CARDS} H200, a clip a card."])


# ------------------------------------------------------------------------------------------------------ how they look

SHOWN = ("hit_video", "fallen_video", "hit", "epe_relative", "iou_last")  # beside Frechet distances
OURS = "motion_dreamer"  # the row that the others are compared with
Figures = dict[str, dict]  # by name


def table_text(
    number: int, means: dict[str, Figures], ours: dict[str, Figures], beside: dict[str, Figures], told: str
) -> str:
    """Markdown of a table: our rows (`means`) beside the paper's figures, and what stands beside all rows; then the
    difference of every row from ours, with its interval; then what it was measured by (`told`)."""
    names = [n for n in beside["still"] if n in SHOWN or n.startswith(("FV", "rfvd"))]
    head = [LABELS.get(name, name) for name in names]
    lines = [line(["method", "paper: FVD ↓", "paper: FVMD ↓", *head]), "|---" * (len(names) + 3) + "|"]
    for row, (label, fvd, fvmd) in TABLES[number].items():
        lines.append(line([label, str(fvd), str(fvmd), *(cell(means[row].get(n)) for n in names)]))
    for source in (source for source in ("still", "codec", "twin", "truth", "half") if source in beside):
        lines.append(line([COLUMNS[source], "", "", *(cell(beside[source].get(n)) for n in names)]))
    labels = {row: label for row, (label, *_) in TABLES[number].items()}
    lines += ["", line([f"difference from {labels[OURS]}", *head]), "|---" * (len(names) + 1) + "|"]
    lines += [line([labels[row], *(change(found.get(n)) for n in names)]) for row, found in ours.items()]
    data = "drives of its own" if number == 2 else "Physion"
    paper = f"The paper: SVD's size, {data}. Only the order of rows compares."
    if number == 2:
        paper += " Told nothing: F = 0 and c = 0, which a model that was always told c may take for a camera at rest."
    pairs = "Differences: the same clips and seeds, better or worse where the 95 % interval leaves zero out."
    return "\n".join([*lines, "", f"{told} {paper} {pairs}"])
