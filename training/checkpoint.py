"""Checkpoints that are written whole or not at all, and seeds that are functions of (seed, rank, step).

A checkpoint is a folder step_N. Each process writes its rows of every tensor (`own_rows`) in files of its own
(rows_RANK_NUMBER.safetensors, which also say which rows of what they are); so any number of processes can read what any
other number has written. state.json has what else is known, sums.json size and checksum of all these files. All
processes must call what is here.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.processes import from_all, own_rows, rank_and_count, together

FILE = 1 << 29  # bytes of tensors in a file, about: so much is copied to the CPU at a time
Sums = dict[str, list[int] | None]  # of files by name: size and checksum, None where there is no such file

# ---------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], told: dict, keep: int) -> None:
    """step_N (N: told["step"]), written whole or not at all; only the newest `keep` stay. What is newer than N could
    not be read when the run went on: it goes, too. Raises OSError, and then leaves the former ones as they are."""
    path, first = folder / f"step_{told['step']:08d}", rank_and_count()[0] == 0
    partial = path.with_name(f"{path.name}.partial")
    with together():
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            partial.mkdir()
    try:
        with together():
            sums = write_rows(partial, tensors)
        sums = {name: each for part in from_all(sums) for name, each in part.items()}
        with together():
            if first:
                sums["state.json"] = write(partial / "state.json", json.dumps(told).encode())
                write(partial / "sums.json", json.dumps(sums).encode())
                if path.exists():  # it was damaged
                    remove(path)
                os.replace(partial, path)
                remove_old(folder, path, keep)
    except (OSError, SystemExit):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], settings: dict) -> tuple[dict | None, list[str]]:
    """Reads the newest checkpoint of a folder that is whole into `tensors`, which must be those that were saved -> what
    was told of it (None: there is no checkpoint), and a line about each newer one that is not whole.

    Raises ValueError: all are damaged, it was made with other settings or of other tensors, or a file is of a version
    that is not read any more; OSError: it may not be read.
    """
    damaged, first = [], rank_and_count()[0] == 0
    names = from_all(sorted((path.name for path in folder.glob("step_*")), reverse=True))[0]
    with together():
        if old := [name for name in names if name.endswith(".pt")]:
            raise ValueError(f"{folder / old[0]}: of a former version, not read any more: take another --out")
    for path in (folder / name for name in names if not name.endswith(".partial")):
        if wrong := what_is_wrong(path):
            damaged.append(f"{path}: cannot be read ({wrong})")
            continue
        with together():
            told = json.loads((path / "state.json").read_text())
            check_settings(path, told["settings"], settings)
        with together():
            read_rows(path, tensors)
            if first:
                clear(folder)
        return told, damaged
    with together():
        if damaged:
            raise ValueError(f"{damaged[0]}; delete it to start anew")
    return None, []


def check_settings(path: Path, then: dict, now: dict) -> None:
    for name, value in now.items():
        if (was := then.get(name, value)) != value:
            raise ValueError(f"{path}: was trained with {name} = {was}, now {name} = {value}: take another --out")


def write_rows(folder: Path, tensors: dict[str, Tensor]) -> Sums:
    """This process's rows of all tensors; not all of them are copied to the CPU at once."""
    sums, rows, places, size = {}, {}, {}, 0
    for number, (name, value) in enumerate(tensors.items(), 1):
        start, part = own_rows(value)
        if part.numel() and (value.ndim or rank_and_count()[0] == 0):  # a number belongs to process 0
            rows[name], places[name] = part.cpu().contiguous(), [start, *value.shape]
            size += part.nbytes
        if rows and (size >= FILE or number == len(tensors)):
            file = folder / f"rows_{rank_and_count()[0]:04d}_{len(sums):04d}.safetensors"
            sums[file.name] = write(file, safetensors.torch.save(rows, {"places": json.dumps(places)}))
            rows, places, size = {}, {}, 0
    return sums


def write(file: Path, content: bytes) -> list[int]:
    """-> size and checksum of what the file should hold from now on, on the disk. Raises OSError that names it."""
    try:
        with open(file, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise OSError(f"{file}: {error.strerror}") from None
    return [len(content), zlib.crc32(content)]


def read_rows(path: Path, tensors: dict[str, Tensor]) -> None:
    """What this process holds of all tensors, whoever wrote it, in place: what is read stays in its file until it is
    copied. Raises ValueError where names or sizes are not the same there."""
    held = {name: own_rows(value) if isinstance(value, DTensor) else (0, value) for name, value in tensors.items()}
    missing = {name: part.numel() for name, (_, part) in held.items()}
    for file in sorted(path.glob("rows_*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name, (first, *shape) in json.loads(opened.metadata()["places"]).items():
                if name not in tensors or list(tensors[name].shape) != shape:
                    here = list(tensors[name].shape) if name in tensors else "unknown"
                    raise ValueError(f"{path}: {name} is {shape} there and {here} here")
                missing[name] -= copy_rows(opened.get_slice(name), first, *held[name])
    if lacking := [name for name, count in missing.items() if count]:
        raise ValueError(f"{path}: {lacking[0]} is not there, or not all of it")


def copy_rows(source: Any, first: int, start: int, target: Tensor) -> int:  # noqa: ANN401
    """From rows `first` and on of a tensor to its rows `start` and on, where both have them -> how many numbers."""
    if target.ndim == 0:
        target.copy_(source[...])
        return 1
    begin, end = max(first, start), min(first + source.get_shape()[0], start + len(target))
    if begin >= end:
        return 0
    target[begin - start : end - start].copy_(source[begin - first : end - first])
    return target[begin - start : end - start].numel()


# ------------------------------------------------------------------------------------------------------- whole or not


def sums_of(folder: Path, names: list[str]) -> Sums:
    """Of files, as they are; the processes share the reading. Raises OSError where one may not be read."""
    rank, count = rank_and_count()
    with together():
        sums = {name: sum_of(folder / name) for name in names[rank::count]}
    return {name: told for part in from_all(sums) for name, told in part.items()}


def sum_of(path: Path) -> list[int] | None:
    try:
        file = open(path, "rb")  # noqa: SIM115 (a file that is missing is no error, one that may not be read is)
    except FileNotFoundError:
        return None
    size = checksum = 0
    with file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def what_is_wrong(path: Path) -> str | None:
    """Why a checkpoint is not whole, the same in all processes; None: it is."""
    with together():
        text = (path / "sums.json").read_bytes() if (path / "sums.json").exists() else b""
    try:
        sums = dict(json.loads(from_all(text)[0]))
    except (ValueError, TypeError):
        return "sums.json is missing or damaged"
    found = sums_of(path, sorted({*sums, "state.json"}))
    wrong = [name for name, told in found.items() if told is None or told != sums.get(name)]
    return f"{wrong[0]} {'is missing' if found[wrong[0]] is None else 'has changed'}" if wrong else None


def remove(path: Path) -> None:
    """A folder, which is no checkpoint any more from the first moment on."""
    gone = path.with_name(f"{path.name}.old.partial")
    os.replace(path, gone)
    shutil.rmtree(gone)


def remove_old(folder: Path, newest: Path, keep: int) -> None:
    saved = sorted(path for path in folder.glob("step_*") if path.suffix != ".partial")
    kept = [old for old in saved if old <= newest][-keep:]
    for old in saved:
        if old not in kept:
            remove(old)


def clear(folder: Path) -> None:
    """Removes what killed processes have begun to write or to remove."""
    for path in folder.glob("step_*.partial"):
        if path.is_dir():
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------------- the rest


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
