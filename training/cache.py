"""The latent cache: what the frozen encoders make of every clip, computed once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from clips.clip import ClipDataset
from motion_dreamer import encode_clips
from svd import VAE, ImageEncoder
from weights import save_safetensors


def fingerprint(*modules: nn.Module) -> str:
    """Twelve hex digits that change with any weight: latents of another VAE are never reused."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:12]


class EncodedClips(torch.utils.data.Dataset):
    """The latent cache: `encode_clips` of every clip, computed once, in half precision, in DATA/.cache/FINGERPRINT."""

    def __init__(self, clips: ClipDataset, vae: VAE, image_encoder: ImageEncoder, rank: int, world_size: int) -> None:
        encoders = fingerprint(vae.encoder, vae.quant_conv, image_encoder)
        folder = Path(clips.paths[0]).parent / ".cache" / f"{encoders}-{clips.frames}"
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / path.name for path in clips.paths]
        missing = [i for i in range(rank, len(self.paths), world_size) if not self.paths[i].exists()]
        device = next(vae.parameters()).device
        for i in tqdm(missing, "encoding clips", disable=not missing or rank > 0):
            clip = {name: value[None].to(device) for name, value in clips[(i, 0)].items()}
            encoded = encode_clips(clip, vae, image_encoder, seed=i)
            halves = {k: v[0].half() if v.is_floating_point() else v[0] for k, v in encoded.items()}
            save_safetensors(halves, self.paths[i])
        if world_size > 1:
            dist.barrier()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        path = self.paths[key[0]]
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {error}; delete it, it will be made again") from None
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
