"""Clips as training reads them, and the latent cache: what the frozen encoders make of every clip, computed once.

The cache lies in DATA/.cache/KEY/, one file for each clip and modality; KEY says which encoders, which scale of
latents, which version of the pictures and how many frames. Latents only: everything that a step draws anew
(training/batch.py) is computed from the clip itself.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from clips import CODEC_VERSION, ClipDataset
from instance_flow import marked_objects
from motion_dreamer import MotionDreamer, StageConfig
from svd import VAE, ImageEncoder

OF_OBJECTS = ("segmentation", "draft")  # modalities that show objects: their latents have a second variant, "marked"
ENCODED_TOGETHER = 16  # clips


def fingerprint(*modules: nn.Module) -> str:
    """Twelve hex digits that change with any weight: latents of another VAE are never reused."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def with_marks(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    """A clip's tensors [T, ...] with "marked" [256]: who is marked in its second variant is a function of the clip."""
    ids = clip["segmentation"]
    generator = torch.Generator().manual_seed(zlib.crc32(ids[0].byte().numpy().tobytes()))
    return clip | {"marked": marked_objects(clip["flow"], ids, generator)}


@torch.no_grad()
def encode_clips(
    clips: dict[str, Tensor],
    stage: MotionDreamer,
    vae: VAE,
    image_encoder: ImageEncoder,
    modalities: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """A batch of clips -> "token" and the latents that this stage needs, of all modalities or of some, in both variants
    where objects show.

    "latents.NAME" and, of what shows objects, "latents.NAME.marked": [B, T, C, h, w], scaled; frame 0 alone where the
    stage needs no more.
    """
    firsts = {"segmentation": clips["segmentation"][:, 0], "depth": clips["depth"][:, 0]}
    found = {"token": image_encoder(clips["rgb"][:, 0])}
    needed = [name for name in stage.config.latents if modalities is None or name in modalities]
    for name in needed:
        found[f"latents.{name}"] = stage.encode(name, clips, firsts, vae)
    kept = clips["marked"].gather(1, clips["segmentation"].flatten(1)).view_as(clips["segmentation"])
    some = clips | {"segmentation": clips["segmentation"] * kept}
    for name in (name for name in OF_OBJECTS if name in needed):
        told = firsts | {"segmentation": some["segmentation"][:, 0]}  # colours by place among what is marked
        found[f"latents.{name}.marked"] = stage.encode(name, some, told, vae)
    return found


class TrainingClips(torch.utils.data.Dataset):
    """`ClipDataset` with marks; an item is a dict of tensors [T, ...]."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return with_marks(self.clips[key])


class CachedClips(TrainingClips):
    """Clips with their latents, which are made first where the cache lacks them, each process its share.

    For clips of one window each. A cached file knows the content of its clip: after a change it is made again.
    """

    def __init__(self, clips: ClipDataset, config: StageConfig, vae: VAE, image_encoder: ImageEncoder) -> None:
        super().__init__(clips)
        encoders = fingerprint(vae.encoder, vae.quant_conv, image_encoder)
        key = f"{encoders}-{vae.scaling_factor:g}-{config.vae_factor}-{CODEC_VERSION}-{clips.frames}"
        self.folder = Path(clips.paths[0]).parent / ".cache" / key
        self.names = {"token": "token"}  # in a clip's dict -> in its file's name
        for name, every_frame in config.latents.items():
            for variant in ("", ".marked") if name in OF_OBJECTS else ("",):
                self.names[f"latents.{name}{variant}"] = f"{name}{variant}" + ("" if every_frame else ".first")

    def encode(
        self,
        stage: MotionDreamer,
        vae: VAE,
        image_encoder: ImageEncoder,
        autocast: torch.autocast,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> CachedClips:
        """Makes what is missing, ENCODED_TOGETHER clips at a time, in half precision; waits for the other processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing, content = {}, {}  # by the index of a clip: names of what it lacks; digest of its file
        for i in range(rank, len(self), world_size):
            content[i] = hashlib.blake2b(Path(self.clips.paths[i]).read_bytes(), digest_size=16).hexdigest()
            if lacking := [name for name in self.names if content_of(self.file(i, name)) != content[i]]:
                missing[i] = lacking
        modalities = {name.split(".")[1] for lacking in missing.values() for name in lacking if name != "token"}
        order, device = [(i, 0) for i in missing], next(vae.parameters()).device
        loader = torch.utils.data.DataLoader(
            TrainingClips(self.clips), ENCODED_TOGETHER, sampler=order, num_workers=workers if missing else 0
        )
        for batch in tqdm(loader, "encoding clips", disable=rank > 0 or not missing, leave=False):
            with autocast:
                batch = {name: value.to(device) for name, value in batch.items()}
                found = encode_clips(batch, stage, vae, image_encoder, modalities)
            found = {name: value.half().cpu() for name, value in found.items()}
            for row, i in enumerate(batch["index"].tolist()):
                for name in missing[i]:
                    file = self.file(i, name)
                    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
                    save_file({"latents": found[name][row].contiguous()}, partial, {"content": content[i]})
                    os.replace(partial, file)
        if world_size > 1:
            dist.barrier()
        return self

    def file(self, index: int, name: str) -> Path:
        return self.folder / f"{self.clips.paths[index].stem}.{self.names[name]}.safetensors"

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        clip = super().__getitem__(key)
        for name in ("rgb", "depth"):
            clip[name] = clip[name][:1]  # the rest is in the latents
        for name in self.names:
            file = self.file(key[0], name)
            try:
                clip[name] = load_file(file)["latents"].float()
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(f"{file}: {error}; delete it, it will be made again") from None
        return clip


def content_of(file: Path) -> str | None:
    """The digest of the clip that a cached file was made of; None where there is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("content")
    except (SafetensorError, OSError):
        return None
