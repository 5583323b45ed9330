"""Checkpoints that are written whole or not at all, and seeds that are functions of (seed, rank, step)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> None:
    """step_N.pt, written whole or not at all; only the newest `keep` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"step_{step:08d}.pt.partial"
    torch.save(state, partial)
    os.replace(partial, folder / f"step_{step:08d}.pt")
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(folder: Path, device: str, settings: dict) -> dict | None:
    """The newest checkpoint of a folder, if there is one. Raises ValueError: damaged, or made with other settings."""
    path = max(folder.glob("step_*.pt"), default=None)
    if path is None:
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to start anew") from None
    for name, value in settings.items():
        was = state.get("settings", {}).get(name, value)
        if was != value:
            raise ValueError(f"{path}: was trained with {name} = {was}, now {name} = {value}: take another --out")
    return state


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
