"""Clips as training reads them, and the latent cache: what the frozen encoders make of every clip, computed once.

The cache lies in DATA/.cache/KEY/, one file for each clip and modality; KEY says which encoders, which scale of
latents, which version of the pictures and how many frames. Latents only: everything that a step draws anew
(training/batch.py) is computed from the clip itself.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from training.processes import Machine, check_shared
from weights import whole_file

OF_OBJECTS = ("segmentation", "draft")  # modalities that show objects: their latents have a second variant, "marked"
ENCODED_TOGETHER, PIXELS_TOGETHER = 16, 1 << 23  # clips, or fewer large ones: 32 bytes a pixel, in every worker twice
FILES_AT_ONCE = 4  # threads that read or write files while the encoders compute


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
        self, stage: MotionDreamer, vae: VAE, image_encoder: ImageEncoder, machine: Machine, workers: int = 0
    ) -> int:
        """Makes what is missing, in half precision, each process its share of that; waits for the other processes.

        -> how many clips lacked something. Of `stage`, only `encode` is called: its weights may lie on the meta device.
        """
        check_shared(self.folder, "--data")
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = self.missing(machine)
        share = list(missing)[machine.rank :: machine.world_size]
        modalities = {name.split(".")[1] for i in share for name in missing[i][1] if name != "token"}
        pixels = self.clips.frames * self.clips.height * self.clips.width
        loader = torch.utils.data.DataLoader(
            TrainingClips(self.clips),
            max(1, min(ENCODED_TOGETHER, PIXELS_TOGETHER // pixels)),
            sampler=[(i, 0) for i in share],
            num_workers=workers if share else 0,
            pin_memory=machine.on_gpu,
        )
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            writing = []
            for batch in tqdm(loader, "encoding clips", disable=machine.rank > 0 or not share, leave=False):
                batch = {name: value.to(machine.device, non_blocking=True) for name, value in batch.items()}
                with machine.autocast:
                    found = encode_clips(batch, stage, vae, image_encoder, modalities)
                found = {name: value.half().cpu() for name, value in found.items()}
                wait_for(writing)  # of the batch before: two at most are in memory
                rows = enumerate(batch["index"].tolist())
                writing = [pool.submit(self.write, i, *missing[i], found, row) for row, i in rows]
            wait_for(writing)
        if machine.world_size > 1:
            dist.barrier()
        return len(missing)

    def missing(self, machine: Machine) -> dict[int, tuple[str, list[str]]]:
        """By the index of each clip that lacks something: the digest of its file, the names of what it lacks.

        Each process looks at its share of the clips; all are told of all."""
        share = range(machine.rank, len(self), machine.world_size)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            found = {i: told for i, told in zip(share, pool.map(self.lacking, share), strict=True) if told[1]}
        if machine.world_size > 1:
            shares = [{}] * machine.world_size
            dist.all_gather_object(shares, found)
            found = {i: told for share in shares for i, told in share.items()}
        return dict(sorted(found.items()))

    def lacking(self, index: int) -> tuple[str, list[str]]:
        """The digest of a clip's file, and the names of what the cache lacks of it."""
        content = hashlib.blake2b(Path(self.clips.paths[index]).read_bytes(), digest_size=16).hexdigest()
        return content, [name for name in self.names if content_of(self.file(index, name)) != content]

    def write(self, index: int, content: str, names: list[str], latents: dict[str, Tensor], row: int) -> None:
        """What a clip lacks, from its row of a batch; each file whole or not at all. Raises OSError with its path."""
        for name in names:
            with whole_file(self.file(index, name)) as partial:
                save_file({"latents": latents[name][row].contiguous()}, partial, {"content": content})

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


def wait_for(jobs: Sequence[Future]) -> None:
    """Raises what a job has raised."""
    for job in jobs:
        job.result()


def content_of(file: Path) -> str | None:
    """The digest of the clip that a cached file was made of; None where there is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("content")
    except (SafetensorError, OSError):
        return None
