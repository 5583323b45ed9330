"""The processes of a training run: who is who on which device, and how all of them end together."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Machine:
    """Where this process runs, and as which of how many."""

    rank: int
    world_size: int
    device: str
    autocast: torch.autocast

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def start_process(seed: int, precision: str | None) -> Machine:
    """Joins the processes that torchrun started; one without it is rank 0 of 1. precision "fp32" or "bf16"; None: bf16
    on a GPU. `seed` is that of the initial weights. Raises ValueError: more processes than GPUs."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place, gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = f"cuda:{place}" if gpu else "cpu"
    if gpu:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
        if here > torch.cuda.device_count():
            raise ValueError(f"{here} processes, but {torch.cuda.device_count()} GPU(s): each needs one of its own")
        torch.cuda.set_device(device)
    if world_size > 1:
        patience = timedelta(hours=2)  # the others wait while process 0 measures and saves
        dist.init_process_group("nccl" if gpu else "gloo", timeout=patience)
    bf16 = (precision or ("bf16" if gpu else "fp32")) == "bf16"
    torch.manual_seed(seed)
    return Machine(rank, world_size, device, torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16))


class StopSignal:
    """Ctrl-C and SIGTERM end the run after the step in which they come, with a save, in all processes together."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.told = machine, False

    def __enter__(self) -> StopSignal:
        self.handlers = {number: signal.signal(number, self.tell) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def tell(self, *_: object) -> None:
        self.told = True

    def came(self) -> bool:
        """Whether any process was told to stop: they stop at the same step."""
        told = torch.tensor(float(self.told), device=self.machine.device)
        if self.machine.world_size > 1:
            dist.all_reduce(told)
        return told.item() > 0


def mean_over_processes(machine: Machine, values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of this process, by the same names in all -> their means over all processes, in one exchange."""
    means = torch.stack([value.float() for value in values.values()]) / machine.world_size
    if machine.world_size > 1:
        dist.all_reduce(means)
    return dict(zip(values, means.tolist(), strict=True))


def leave_process_group(worker: int) -> None:
    """For the loader's workers: what Ctrl-C sends to all processes of a terminal must not end them before the step that
    the main process still does. (Were they to ignore it, they would also ignore their end.)"""
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def peak_memory(on_gpu: bool) -> int:
    """Bytes: of the GPU, or of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where only GPUs are supported

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
