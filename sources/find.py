"""Files of a network: in a folder of the published layout, on this machine or on the hub.

folder = resolve_source("stabilityai/stable-video-diffusion-img2vid", "unet")
files = weights_in(folder, "diffusion_pytorch_model")
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from sources.read import Source, first_line, read_config

FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json")  # no repository is called so


def is_hub_id(source: Source) -> bool:
    """Whether the hub may be asked for it. A path and owner/name can look the same. It is a path where it is there,
    where its first folder is (`runs/more`, as soon as there is runs/), where it ends like a file, and whenever it comes
    as a `Path`: nobody's repository of that name is fetched in the place of a folder that is not there. `./a/b` is a
    path in any case."""
    if isinstance(source, os.PathLike) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source, re.ASCII):
        return False
    return not (source.endswith(FILES) or os.path.exists(source) or os.path.exists(source.split("/")[0]))


def check_model(flag: str, source: str) -> None:
    """Raises ValueError for a model of another library that is neither a folder nor a hub id: that library would ask
    the hub for the path."""
    if not os.path.isdir(source) and not is_hub_id(source):
        raise ValueError(f"{flag} {source}: no such folder")


def expand_home(arguments: argparse.Namespace) -> argparse.Namespace:
    """Arguments of the command line, with ~ at the beginning of a path replaced: no shell does that in `--out=~/x`."""
    for name, value in vars(arguments).items():
        if isinstance(value, str | Path):
            setattr(arguments, name, type(value)(os.path.expanduser(value)))
        elif isinstance(value, list):
            setattr(arguments, name, [os.path.expanduser(item) if isinstance(item, str) else item for item in value])
    return arguments


def resolve_source(source: Source, subfolder: str | None = None) -> Path:
    """The local folder of a model: `source` itself, or what a hub id such as "stabilityai/..." downloads to.

    Of the hub only config.json and the weights of one variant of the subfolder are fetched, in half precision where
    there is one (3 GB of the UNet instead of a 33 GB repository). Raises FileNotFoundError (no such folder), ValueError
    (hub; says what to do).
    """
    model = Path(os.path.expanduser(source))
    if (model / (subfolder or "")).is_dir():
        return model / (subfolder or "")
    if not is_hub_id(source):
        kind = "file" if model.suffix in FILES else "folder"
        raise FileNotFoundError(f"{model / (subfolder or '') if model.is_dir() else source}: no such {kind}")
    from huggingface_hub import snapshot_download  # here, for it takes 0.2 s
    from huggingface_hub.errors import LocalEntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    named = [f"{prefix}{stem}.safetensors" for stem in ("diffusion_pytorch_model", "model")]
    failed: Exception | None = None
    for names in ([f"{prefix}*.fp16*.safetensors"], named, [f"{prefix}*.safetensors"]):
        wanted = [f"{prefix}config.json", f"{prefix}*.index*.json", *names]
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=wanted)) / prefix
        except LocalEntryNotFoundError as error:  # offline: another variant may have been fetched before
            failed = failed or error
            continue
        except Exception as error:  # of the hub, of its HTTP library, of the disk
            failed = error
            break
        failed = None
        if list(folder.glob("*.safetensors")):
            break
    if failed:
        raise ValueError(_hub_advice(str(source), failed)) from None
    if not folder.is_dir():
        raise ValueError(f"{source}: the hub's repository has no folder {subfolder}")
    return folder


def _hub_advice(source: str, error: Exception) -> str:
    page = f"https://huggingface.co/{source}"
    advice = {
        "GatedRepoError": f"accept the licence at {page}, then log in with `hf auth login`",
        "RepositoryNotFoundError": f"no such folder, and no such public model at {page} (private? `hf auth login`)",
        "LocalEntryNotFoundError": "no such folder, not downloaded yet, and the hub cannot be reached",
    }
    known = (advice[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in advice)
    return f"{source}: {next(known, first_line(error))}"


SHARD = re.compile(r"-\d+-of-\d+(\.\w+)?\.safetensors$")


def weights_in(folder: Path, stem: str) -> list[Path]:
    """The files of a network: STEM.safetensors; or the shards that STEM.safetensors.index.json names; or the same with
    fp16 in the name; or, whatever its name is, the only one that there is. Raises FileNotFoundError, ValueError."""
    found = {index.name: _shards(index) for index in sorted(folder.glob("*.safetensors.index*.json"))}
    parts = {path for shards in found.values() for path in shards}
    files = sorted(path for path in folder.glob("*.safetensors") if path not in parts)
    found |= {path.name: [path] for path in files if not SHARD.search(path.name)}
    # An index without any of its shards is no weights: of the hub, one variant is fetched, and every index.
    found = {name: paths for name, paths in found.items() if any(path.exists() for path in paths)} or found
    index = f"{stem}.safetensors.index.json"
    for name in (f"{stem}.safetensors", index, f"{stem}.fp16.safetensors", index.replace(".json", ".fp16.json")):
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(f"{folder}: has {', '.join(found)}: which is meant? Call it {stem}.safetensors")
    if files:
        raise FileNotFoundError(f"{folder / index}: no such file, which {files[0].name} is a part of")
    for path in (path for ending in FILES[1:5] for path in sorted(folder.glob(f"*{ending}"))):
        raise ValueError(f"{path}: a pickle, which may run any code and is never opened: save it as {stem}.safetensors")
    raise FileNotFoundError(f"{folder / stem}.safetensors: no such file")


def _shards(index: Path) -> list[Path]:
    """The files beside an index of names that it spreads a network over."""
    names = set(read_config(index, lambda said: said["weight_map"].values()))
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{index}: weight_map names no files of this folder")
    return [index.with_name(name) for name in sorted(names)]
