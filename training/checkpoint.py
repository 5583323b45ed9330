"""Checkpoints that are written whole or not at all, and seeds that are functions of (seed, rank, step)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

# What torch and zipfile raise for bytes that are missing or changed.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, RuntimeError, ValueError, IndexError, EOFError, OSError
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> None:
    """step_N.pt, written whole or not at all; only the newest `keep` stay. What is newer than N could not be read when
    the run went on: it goes, too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    partial = path.with_name(f"{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
    saved = sorted(folder.glob("step_*.pt"))
    kept = [old for old in saved if old <= path][-keep:]
    for old in saved:
        if old not in kept:
            old.unlink()


def load_checkpoint(folder: Path, settings: dict) -> tuple[dict | None, list[str]]:
    """The newest checkpoint of a folder that is whole, if there is one, and a line about each newer one that is not.

    Raises ValueError: all are damaged, or it was made with other settings.
    """
    damaged = []
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            state = read_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for name, value in settings.items():
            was = state.get("settings", {}).get(name, value)
            if was != value:
                raise ValueError(f"{path}: was trained with {name} = {was}, now {name} = {value}: take another --out")
        return state, damaged
    if damaged:
        raise ValueError(f"{damaged[0]}; delete it to start anew")
    return None, []


def read_checkpoint(path: Path) -> dict:
    """Its tensors stay in the file until they are read: on no device, and no second time in memory. (An optimiser on
    the CPU takes them as they are; what it writes goes to memory.) Raises ValueError: damaged."""
    with open(path, "rb") as file:  # one that may not be read is not damaged: its OSError ends the run
        try:
            with zipfile.ZipFile(file) as archive:  # torch would see that the end is missing, but no changed byte
                if changed := archive.testzip():
                    raise zipfile.BadZipFile(f"{changed} has changed")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except DAMAGE as error:
            raise ValueError(f"{path}: cannot be read ({(str(error) or repr(error)).splitlines()[0]})") from None


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def trim_log(path: Path, step: int) -> None:
    """Removes the lines after the checkpoint: those steps will be done again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(lines))
        shutil.move(partial, path)
