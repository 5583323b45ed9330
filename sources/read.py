"""What others wrote is read, or refused in one line that says what it is: safetensors files and config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

Source = str | os.PathLike

BEGINNINGS = {  # of what lies where safetensors or JSON should be
    rb"\s*version https://git-lfs": "a git-lfs pointer, not the file itself: `git lfs pull` fetches that",
    rb"\s*<[!?a-zA-Z]": "a page of HTML or XML, not the file itself: download it again",
    rb"PK\x03\x04|\x80[\x02-\x05]": "a pickle, which may run any code and is never opened: save it as safetensors",
    rb"$": "is empty",
}


def first_line(error: Exception) -> str:
    """What an error says, on one line; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def other_kind(path: Source) -> str | None:
    """What a file is that cannot be read, by its beginning, and what to do; None: damaged."""
    with open(path, "rb") as file:
        beginning = file.read(64).removeprefix(b"\xef\xbb\xbf")
    return next((told for pattern, told in BEGINNINGS.items() if re.match(pattern, beginning)), None)


@contextmanager
def open_safetensors(path: Source) -> Iterator[Any]:
    """A safetensors file as safe_open has it. Raises FileNotFoundError, or a one-line ValueError that says what else
    the file is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {other_kind(path) or f'damaged or truncated: {error}'}") from None


# ------------------------------------------------------------------------------------------------------------- settings


def read_config(path: Path, build: Callable[[dict[str, Any]], Any]) -> Any:  # noqa: ANN401
    """What `build` makes of a config.json. Raises FileNotFoundError or a one-line ValueError, both with the path."""
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {other_kind(path) or f'no JSON: {error}'}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path}: holds {said!r:.60}, expected names and their values")
    try:
        return build(said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: of other JSON
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {missing}") from None


LARGEST, MOST_LAYERS, MOST_LEVELS = 1 << 16, 1 << 8, 16  # of what a network may have; SVD's: 5120, 32 and 4
KINDS = {"float": "a number", "bool": "true or false", "str": "a word"}


def read_fields(cls: type, said: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config class, from what JSON says. Raises ValueError that names one that is missing or has no
    value of its type, or a number that no network has."""
    values = {}
    for field in fields(cls):
        value, several = said.get(field.name), field.type.startswith("tuple")
        kind = field.type.removeprefix("tuple[").removesuffix(", ...]").removesuffix(" | None")
        if value is None and field.default is not None:
            raise ValueError(f"{field.name} is missing")
        items = value if isinstance(value, list | tuple) else [value]
        fits = isinstance(value, list | tuple) == several and len(items) <= MOST_LEVELS
        if value is not None and not (fits and all(_is_a(kind, item, field.name) for item in items)):
            expected = "a list, each " * several + KINDS.get(kind, f"1 to {_most(field.name)}")
            raise ValueError(f"{field.name} is {value!r:.60}, expected {expected}")
        values[field.name] = tuple(items) if several else value
    return values


def _is_a(kind: str, item: Any, name: str) -> bool:  # noqa: ANN401
    if kind in ("str", "bool"):
        return isinstance(item, {"str": str, "bool": bool}[kind])
    if isinstance(item, bool) or not isinstance(item, int | float):
        return False
    if kind == "float":
        return abs(item) < 1e9  # not of NaN
    return isinstance(item, int) and 1 <= item <= _most(name)


def _most(name: str) -> int:
    return MOST_LAYERS if "layers" in name else LARGEST


MOTION = {"flow", "segmentation", "depth"}
GONE = {"still_ratio"}  # of how a stage was trained: scenes at rest come from the simulator
OF_A_STAGE = {"predict": MOTION, "given": MOTION, "first_frame": {"rgb", "segmentation", "depth"}}


def read_stage(said: dict[str, Any], kind: type, small: type) -> Any:  # noqa: ANN401
    """The config of a stage: a `kind` or, with any of its fields, a `small` one. Raises ValueError that names a field.

    Fields of weights made by commit 05d9df5 and before are translated: three are gone, `patch` counts as a part of the
    VAE's factor, and fps is that of their clips. (That part goes with the last of these weights.)"""
    if "mask_keep_one" in said:
        if said["predict_change"] or not said["keep_first_frame"]:
            raise ValueError("predict_change is true or keep_first_frame is false, which is no longer supported")
        patch, gone = said["patch"], ("mask_keep_one", "predict_change", "keep_first_frame", "patch")
        said = {key: value for key, value in said.items() if key not in gone} | {"fps": 10.0}
        said |= {"latent_channels": said["latent_channels"] * patch**2, "vae_factor": said["vae_factor"] * patch}
    names = {field.name for field in fields(kind)}
    extras = {field.name: field.default for field in fields(small) if field.name not in names}
    said = {key: value for key, value in said.items() if key not in GONE - extras.keys()}
    for key in said.keys() - names - extras.keys():
        raise ValueError(f"{key} is {said[key]!r:.60}; there is no such setting here")
    if said.keys() & extras.keys():
        kind, said = small, extras | said
    stage = kind(**read_fields(kind, said))
    for name, known in OF_A_STAGE.items():
        told = getattr(stage, name)
        if len(set(told)) < len(told) or not (set(told) <= known or (name, told) == ("predict", ("rgb",))):
            raise ValueError(f"{name} is {list(told)!r:.60}, expected some of {', '.join(sorted(known))}")
    if not stage.predict or stage.vae_factor & (stage.vae_factor - 1) or not 0 < stage.fps <= 1000:
        raise ValueError("expected something to predict, vae_factor a power of 2, fps above 0, 1000 at most")
    return stage
