"""Clips and their latents held on the GPU, for models whose step takes less time than reading the next batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips import ResumableSampler

HALF, BYTE = ("flow", "depth", "token", "latents."), ("segmentation",)  # precision on disk, by the beginning of names


def lossless(name: str, value: Tensor) -> Tensor:
    """A clip's tensor in the precision that it has on disk."""
    return value.half() if name.startswith(HALF) else value.byte() if name in BYTE else value


def free_memory(device: str) -> int:
    """Bytes that nothing takes, other programs neither, at this process's fullest moment so far."""
    growth = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return max(0, torch.cuda.mem_get_info(device)[0] - growth)


def hold(clips: Dataset, device: str, room: int, workers: int = 0) -> dict[str, Tensor] | None:
    """All clips [N, ...] by name, on the device, as `lossless` makes them; None if they take more than `room` bytes."""
    first = {name: lossless(name, value) for name, value in clips[(0, 0)].items()}
    if len(clips) * sum(value.nbytes for value in first.values()) > room:
        return None
    held = {name: value.new_empty(len(clips), *value.shape, device=device) for name, value in first.items()}
    for batch in DataLoader(clips, 16, sampler=[(i, 0) for i in range(len(clips))], num_workers=workers):
        for name, value in batch.items():
            held[name][batch["index"].to(device)] = lossless(name, value).to(device)
    return held


def held_batches(
    held: dict[str, Tensor], like: dict[str, Tensor], order: ResumableSampler, size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches without an end, in the sampler's order and in the precisions of `like`, a batch of the loader's."""
    places = iter(order)
    while True:
        index = torch.tensor([next(places)[0] for _ in range(size)]).to(like["index"].device, non_blocking=True)
        yield {name: value[index].to(like[name].dtype) for name, value in held.items()}
