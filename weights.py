"""Weights of networks: find them, load them strictly, save them whole or not at all.

A source is a folder in the published layout (config.json and safetensors; sources/find.py says which), a hub id such as
"stabilityai/...", or a single-file checkpoint such as svd.safetensors, whose names are translated.

    UNet.from_pretrained("stabilityai/stable-video-diffusion-img2vid", "unet", dtype=torch.float32)
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sources import (
    OTHER_PARTS,
    Source,
    as_ours,
    open_safetensors,
    read_config,
    resolve_source,
    single_file_table,
    weights_in,
)

Device = str | torch.device | None

NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IGNORED = {"vision_model.embeddings.position_ids"}  # old CLIP files list 0, 1, 2, ... as a weight
# What torch puts into the names of a part that is wrapped: by torch.compile, DDP, FSDP, checkpointing.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")


def load_strict(
    model: nn.Module,
    paths: Source | Sequence[Path],
    dtype: torch.dtype | None = None,
    device: Device = None,
    table: dict[str, str] | None = None,
) -> None:
    """Fills `model` (built on the meta device) from a safetensors file, or from the shards of one, whose names and
    shapes must match exactly.

    `table`: name in the model -> name in a single-file checkpoint (`single_file_table`), of which the other parts are
    left alone. Tensors stay memory-mapped unless dtype or device ask for another copy. Raises FileNotFoundError, or a
    one-line ValueError that names the file and what is missing, unexpected, misshapen or damaged.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    names = table or {name: name for name in wanted}
    with ExitStack() as stack:
        files = [stack.enter_context(open_safetensors(path)) for path in paths]
        places = [(unwrapped(key), key, file) for file in files for key in file.keys()]  # noqa: SIM118 (no dict)
        present = {name: (key, file) for name, key, file in places if name not in IGNORED}
        others, known = present.keys() - set(names.values()), OTHER_PARTS.get(type(model).__name__)
        tensors = {}
        for name, theirs in names.items():
            if theirs in present:
                key, file = present[theirs]
                tensors[name] = as_ours(theirs, name, file.get_tensor(key))
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        kinds = {names[name]: value.dtype for name, value in tensors.items()}
        problems = {
            "missing": [key for key in dict.fromkeys(names.values()) if key not in present],
            "unexpected": [key for key in others if table is None or not known.match(key)],
            "misshapen": [f"{names[n]} {s}, not {wanted[n]}" for n, s in shapes.items() if s != wanted[n]],
            "not of real numbers": [f"{key} {kind}" for key, kind in kinds.items() if kind not in NUMBERS],
            "there twice": [name for name, count in Counter(name for name, *_ in places).items() if count > 1],
        }
        found = [f"{len(keys)} {kind} ({_listing(keys)})" for kind, keys in problems.items() if keys]
        if found:
            raise ValueError(f"{paths[0]}: does not fit the model: {'; '.join(found)}")
        for name, tensor in tensors.items():  # memory-mapped so far
            tensors[name] = tensor.to(device or "cpu", dtype)
    model.load_state_dict(tensors, assign=True)


@contextmanager
def whole_file(path: Source) -> Iterator[Path]:
    """A name to write to, whose file gets the right name when it is complete; if not, nothing is left. The folder must
    exist. Raises OSError that names the path: a full disk, say."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def save_safetensors(state_dict: dict[str, Tensor], path: Source) -> None:
    """Writes the whole file or none of it. Folders are not made."""
    values = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with whole_file(path) as partial:
        save_file(values, partial, {"format": "pt"})


def open_folder(
    source: Source,
    subfolder: str | None,
    stem: str,
    build: Callable[[dict[str, Any]], nn.Module],
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Any:  # noqa: ANN401
    """A network from a folder or a hub id (see `resolve_source`): config.json says to `build` what it is, `weights_in`
    which files hold its weights. dtype None keeps the file's.

    Raises FileNotFoundError or a one-line ValueError, both with the path.
    """
    folder = resolve_source(source, subfolder)
    with torch.device("meta"):
        model = read_config(folder / "config.json", build)
    load_strict(model, weights_in(folder, stem), dtype, device)
    return model


def save_folder(folder: Source, stem: str, state_dict: dict[str, Tensor], config: dict[str, Any]) -> None:
    """config.json and weights; each is written whole or not at all. Raises ValueError for settings that are not finite
    numbers, before anything is written."""
    folder, text = Path(folder), json.dumps(config, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors({unwrapped(name): value for name, value in state_dict.items()}, folder / f"{stem}.safetensors")
    with whole_file(folder / "config.json") as partial:
        partial.write_text(text)


def from_pretrained(
    cls: type,
    source: Source,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
    config: Any = None,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Opens a folder or a hub id (see `open_folder`), or a single-file checkpoint such as svd.safetensors, which has no
    config.json: `config` is for these, by default SVD's."""
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        return open_folder(source, subfolder, cls.STEM, lambda said: cls(cls.CONFIG.from_dict(said)), dtype, device)
    with torch.device("meta"):
        model = cls(config or cls.CONFIG())
    load_strict(model, path, dtype, device, single_file_table(model))
    return model


def save_pretrained(self: nn.Module, folder: Source) -> None:
    """config.json and weights under their published names; each is written whole or not at all."""
    save_folder(folder, self.STEM, self.state_dict(), self.config.to_dict())
