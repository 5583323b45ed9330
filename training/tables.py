"""The rows of the paper's Tables 1 to 3, and of a table of ours (--leave-out): the training of a model for each, where
all else is the same in all rows, and how they are printed beside the paper's.

folder = train_row("without_depth", arguments)     # the arguments of evaluate.py
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from clips import find_clips
from metrics import COLUMNS, LABELS, WINDOW, cell, change, line
from motion_dreamer import ABLATIONS, STAGE2
from training.scenes import scenario_of

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

# By --leave-out: a model that learned from clips of all scenarios, and one that never saw that scenario.
UNSEEN = {"with": ("knew it",), "without": ("never saw it",)}
OURS = "motion_dreamer"  # the row that the others are compared with

# Hundreds of steps, not thousands: warm up soon, cool down for long, average over little.
RECIPE = ["--lr", "8e-4", "--warmup", "30", "--cooldown", "0.6", "--ema", "0.99", "--sample-every", "0"]


def rows_of(arguments: argparse.Namespace) -> dict[str, tuple]:
    """By name: what a row is called, and the paper's FVD and FVMD where it has that row."""
    return UNSEEN if arguments.leave_out else TABLES[arguments.table]


def model_of(row: str) -> str:
    """The model that a row measures, by the name of its stages (ABLATIONS)."""
    return OURS if row in UNSEEN else row.removesuffix(UNTOLD)


def arguments_of(row: str, seed: int, arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, and what is a row's own: what its model is told, or which clips it learns from. The VAE of both
    rows of --leave-out never saw the scenario, unless it is that of --codec."""
    own = {"seed": seed, "told": "nothing"} if row.endswith(UNTOLD) else {"seed": seed}
    if arguments.leave_out:
        places = places_of(arguments.leave_out, arguments.runs)
        parts = {"val": str(places["only"]), "data": str(places["without"]), "runs": str(places["without"].parent)}
        unseen = argparse.Namespace(**vars(arguments) | own | parts)
        own |= parts | {"codec": codec_of(unseen), "data": str(places[row]), "runs": str(places[row].parent)}
    return argparse.Namespace(**vars(arguments) | own)


def train_row(row: str, arguments: argparse.Namespace) -> Path:
    """Trains a row's model under --runs unless it is there: the same data, VAE, steps and seed for every row.

    A Stage II that is configured as that of the full model is that one: it would train to the same weights."""
    codec, folder, told = codec_of(arguments), folder_of(row, arguments), budget(arguments)
    for part in ("vae", "image_encoder"):
        if (folder / part).exists() and not same_files(Path(codec) / part, folder / part):
            raise ValueError(f"{folder / part}: is another one than that of {codec}: take another --runs")
        shutil.copytree(Path(codec) / part, folder / part, dirs_exist_ok=True)
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


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights and configuration."""
    names = sorted(path.name for path in a.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def folder_of(row: str, arguments: argparse.Namespace) -> Path:
    long = f"{arguments.minutes:g}min" if arguments.minutes else str(arguments.steps)
    return Path(arguments.runs) / f"{arguments.preset}-{long}-{arguments.seed}-{row}"


def budget(arguments: argparse.Namespace) -> list[str]:
    """What every training is told: data, seed and how long."""
    long = ["--minutes", str(arguments.minutes)] if arguments.minutes else ["--steps", str(arguments.steps)]
    told = ["--preset", arguments.preset, "--data", arguments.data, "--seed", str(arguments.seed), *long]
    return [*told, "--batch", str(arguments.train_batch), *RECIPE]


def codec_of(arguments: argparse.Namespace) -> str:
    """The model folder that has VAE and image tower: --codec, or one that is trained unless it is there."""
    if arguments.codec:
        return arguments.codec
    folder = folder_of("vae", arguments)
    train(folder, "vae", [*budget(arguments), "--frames", "4"], arguments.quiet)
    return str(folder)


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


# ------------------------------------------------------------------------------------------------------ unseen worlds


def places_of(scenario: str, runs: str) -> dict[str, Path]:
    """By row, and as "only", where the links to clips are; the row's models lie beside them."""
    return {row: Path(runs) / f"{row}_{scenario}" / "clips" for row in (*UNSEEN, "only")}


def leave_out(scenario: str, data: str, val: str) -> dict[str, list[Path]]:
    """The clips to learn from: "without", all of `data` but those of a scenario, and "with", as many, of all scenarios
    in their proportion; and "only", those of `val` by which both are measured. A clip's meta says its scenario.

    Raises ValueError where one of these would hold no clip."""
    found = {folder: {path: scenario_of(path) for path in find_clips(folder)} for folder in (data, val)}
    for folder, clips in found.items():
        if scenario not in clips.values():
            there = ", ".join(f"{name} ({count})" for name, count in sorted(Counter(clips.values()).items()))
            raise ValueError(f"--leave-out {scenario}: no clip of {folder} is of that scenario; there are: {there}")
    without = [path for path, name in found[data].items() if name != scenario]
    if not without:
        raise ValueError(
            f"--leave-out {scenario}: all clips of {data} are of that scenario, none is left to learn from"
        )
    in_turn = sorted(found[data], key=lambda path: (found[data][path] != scenario, found[data][path], path))
    some = [in_turn[k * len(in_turn) // len(without)] for k in range(len(without))]
    return {"with": some, "without": without, "only": [path for path, n in found[val].items() if n == scenario]}


def link_clips(scenario: str, data: str, val: str, runs: str) -> None:
    """Folders of links to the clips that `leave_out` picks, and to what is cached beside them. Raises ValueError when a
    former run has left links to others there."""
    picked = leave_out(scenario, data, val)
    for name, folder in places_of(scenario, runs).items():
        wanted = {path.name: path.resolve() for path in picked[name]}
        cache = Path(val if name == "only" else data).resolve() / ".cache"
        if folder.exists():
            if {path.name: path.resolve() for path in folder.glob("*.safetensors")} != wanted:
                raise ValueError(
                    f"{folder}: was made of other clips than those of {data} and {val}: take another --runs"
                )
            continue
        partial = folder.with_name("clips.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        cache.mkdir(exist_ok=True)
        for link, target in (wanted | {".cache": cache}).items():
            (partial / link).symlink_to(target)
        os.replace(partial, folder)


# ------------------------------------------------------------------------------------------------ at the paper's scale

STEP = 0.5  # seconds of a step of one clip, 14 frames of 512x320, on an H200 with --checkpointing (docs/training.md)
CARDS = 8
RUN = f"torchrun --nproc_per_node {CARDS}"


def commands_of(arguments: argparse.Namespace) -> str:
    """The commands that train and measure a table's rows from SVD's weights (--init), the data that they need, and how
    long that takes. Rows that share a stage share its training. Raises ValueError for too few frames."""
    frames = arguments.frames or 25
    if frames < WINDOW:
        raise ValueError(
            f"--frames {frames}: FVMD needs {WINDOW}; SVD's 14 do not suffice, the 25 of its XT weights do"
        )
    encode = f"{RUN} -m clips.encode {arguments.data} --init {arguments.init} --frames {frames}"
    lines = [encode, *(unseen_commands(arguments, frames) if arguments.leave_out else row_commands(arguments, frames))]
    stages = sum("train.py" in command for command in lines)
    hours = stages * arguments.steps * STEP * frames / 14 / 3600
    clips = "drives, as of clips.annotate" if arguments.table == 2 else "trials of Physion, as of clips.physion"
    clips = "clips whose meta names scenarios, as of clips.simulate" if arguments.leave_out else clips
    needs = f"{clips}: {frames} frames each, to train on ({arguments.data}) and to measure by ({arguments.val})"
    time = f"{hours:.0f} hours: {stages} trainings of {arguments.steps} steps of {CARDS} clips of 512x320"
    return "\n".join([*lines, "", f"Data: {needs}.", f"Estimated: {time} on {CARDS} H200, a clip a card."])


def row_commands(arguments: argparse.Namespace, frames: int) -> list[str]:
    rows, root = dict.fromkeys(row.removesuffix(UNTOLD) for row in TABLES[arguments.table]), Path(arguments.runs)
    lines = []
    for row in sorted(rows, key=lambda row: row != OURS):  # ours first: others take its Stage II
        own = row == OURS or (row != "one_stage" and ABLATIONS[row][1] != STAGE2)
        parts = ["one"] if row == "one_stage" else ["1", "2"] if own else ["1"]
        which = "" if row == "one_stage" else f" --ablation {row}"
        lines += train_commands(arguments, frames, parts, which, root / row)
        lines += [] if own or row == "one_stage" else [f"cp -r {root / OURS / 'stage2'} {root / row}/"]
    for row in TABLES[arguments.table]:
        untold = " --told nothing" if row.endswith(UNTOLD) else ""
        lines.append(measure_command(root / row.removesuffix(UNTOLD), arguments.val) + untold)
    return lines


def unseen_commands(arguments: argparse.Namespace, frames: int) -> list[str]:
    told = (arguments.leave_out, arguments.data, arguments.val, arguments.runs)
    lines, places = [f'python -c "from training.tables import link_clips; link_clips{told}"'], places_of(*told[::3])
    for row in UNSEEN:
        parts = argparse.Namespace(**vars(arguments) | {"data": places[row], "val": places["only"]})
        lines += train_commands(parts, frames, ["1", "2"], "", places[row].with_name(OURS))
    return lines + [measure_command(places[row].with_name(OURS), places["only"]) for row in UNSEEN]


def train_commands(arguments: argparse.Namespace, frames: int, parts: list[str], which: str, out: Path) -> list[str]:
    told = f"--data {arguments.data} --val {arguments.val} --init {arguments.init} --frames {frames}"
    told += f" --seed {arguments.seed} --batch 1 --checkpointing --steps {arguments.steps}"
    told += f" --set {' '.join(arguments.set)}" if arguments.set else ""
    return [f"{RUN} train.py --stage {part}{which} {told} --out {out}" for part in parts]


def measure_command(model: Path, data: str | Path) -> str:
    return f"python evaluate.py --model {model} --data {data} --metrics physics,fvd,fvmd --i3d I3D"


# ------------------------------------------------------------------------------------------------------ how they look

SHOWN = ("hit_video", "fallen_video", "hit", "epe_relative", "iou_last")  # beside Frechet distances
Figures = dict[str, dict]  # by name


def reference(arguments: argparse.Namespace) -> str:
    """The row that the others are compared with."""
    return "with" if arguments.leave_out else OURS


def table_text(
    arguments: argparse.Namespace,
    means: dict[str, Figures],
    found: dict[str, Figures],
    beside: dict[str, Figures],
    told: str,
) -> str:
    """Markdown of a table: our rows (`means`) beside the paper's figures, and what stands beside all rows; then the
    difference (`found`) of every row from that of `reference`, with its interval; then what it was measured by
    (`told`). Figures that no clip can be asked for are left out."""
    rows = rows_of(arguments)
    papers = [] if arguments.leave_out else ["paper: FVD ↓", "paper: FVMD ↓"]
    all_found = [*means.values(), *beside.values()]
    asked = [n for n in SHOWN if any(cell(some.get(n)) != "-" for some in all_found)]
    names = [n for n in beside["still"] if n in asked or n.startswith(("FV", "rfvd"))]
    head = [LABELS.get(name, name) for name in names]
    lines = [line(["method", *papers, *head]), "|---" * (len(papers) + len(names) + 1) + "|"]
    for row, (label, *known) in rows.items():
        lines.append(line([label, *map(str, known), *(cell(means[row].get(n)) for n in names)]))
    for source in (source for source in ("still", "codec", "twin", "truth", "half") if source in beside):
        lines.append(line([COLUMNS[source], *[""] * len(papers), *(cell(beside[source].get(n)) for n in names)]))
    lines += ["", line([f"difference from {rows[reference(arguments)][0]}", *head]), "|---" * (len(names) + 1) + "|"]
    lines += [line([rows[row][0], *(change(some.get(n)) for n in names)]) for row, some in found.items()]
    pairs = "Differences: the same clips and seeds, better or worse where the 95 % interval leaves zero out."
    return "\n".join([*lines, "", f"{told} {meant(arguments)} {pairs}"])


def meant(arguments: argparse.Namespace) -> str:
    """What a reader of the table should know of its rows."""
    if arguments.leave_out:
        codec = f"is that of {arguments.codec}, whatever it saw" if arguments.codec else "never saw it either"
        return (
            f"Left out: {arguments.leave_out}. Both rows learn from as many clips, equally long; their VAE {codec}. "
            "Measured are clips of what was left out alone."
        )
    data = "drives of its own" if arguments.table == 2 else "Physion"
    paper = f"The paper: SVD's size, {data}. Only the order of rows compares."
    if arguments.table == 2:
        paper += (
            " Told nothing: F = 0 and c = 0; a camera at rest is told so too. Training shows it seldom: F = 0 where "
            "Eq. 9 hides every car, c = 0 in --drop of the draws."
        )
    return paper
