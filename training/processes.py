"""The processes of a training run: who is who on which device, and how all of them end together."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# How long a process waits for another one. The longest wait is for the latents of clips, before the first step: one has
# its share, another must encode it. (That a process has ended is not found out by waiting: torchrun sees it.)
PATIENCE = timedelta(hours=2)


@dataclass
class Machine:
    """Where this process runs, and as which of how many."""

    rank: int
    world_size: int
    device: str
    autocast: torch.autocast
    generator: torch.Generator = field(default_factory=torch.Generator)  # of a step's draws, on the device

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def start_process(seed: int, precision: str | None) -> Machine:
    """Joins the processes that torchrun started; one without it is rank 0 of 1. precision "fp32" or "bf16"; None: bf16
    on a GPU that has it. `seed` is that of the initial weights. Raises ValueError: more processes than GPUs."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place, gpu = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = f"cuda:{place}" if gpu else "cpu"
    if gpu:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
        if here > torch.cuda.device_count():
            raise ValueError(f"{here} processes, but {torch.cuda.device_count()} GPU(s): each needs one of its own")
        torch.cuda.set_device(device)
    if world_size > 1:
        # What is exchanged lies on GPUs, but for a few words about checkpoints and figures, which need none.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = (precision or ("bf16" if native else "fp32")) == "bf16"
    torch.manual_seed(seed)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)
    return Machine(rank, world_size, device, autocast, torch.Generator(device))


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


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this one is."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_rows(value: Tensor) -> tuple[int, Tensor]:
    """The rows [n, ...] of a tensor [N, ...] that this process keeps where each keeps a part, as a view, and the number
    of the first. Parts are those of `torch.chunk`, as FSDP2 has them; the last ones may be empty."""
    (rank, count), value = rank_and_count(), value.detach()
    if value.ndim == 0:
        return 0, value
    length = math.ceil(len(value) / count)
    start = min(rank * length, len(value))
    return start, value.to_local() if isinstance(value, DTensor) else value[start : start + length]


def from_all(value: Any) -> list[Any]:  # noqa: ANN401
    """What each process gives, by rank. All must call it."""
    values = [value] * rank_and_count()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def end(code: int) -> NoReturn:
    """Ends this process. One of several ends at once: a thread of torch's that outlives the interpreter, or still waits
    for the others, could abort it."""
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()  # after an error, others may still wait in it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def lost_another(error: RuntimeError) -> bool:
    """Whether this is what an exchange raises when another process has ended or cannot be reached."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextmanager
def together() -> Iterator[None]:
    """If this fails in one process, all end: the first in which it does raises its OSError or ValueError, so that there
    is one line, and the others end without a word. All must come here."""
    error = None
    try:
        yield
    except (OSError, ValueError) as failed:
        error = failed
    failed = [rank for rank, it_did in enumerate(from_all(error is not None)) if it_did]
    if failed and failed[0] == rank_and_count()[0]:
        raise error
    if failed:
        raise SystemExit(2)


def check_shared(out: Path, flag: str, seconds: float = 10) -> None:
    """Raises ValueError, beginning with the flag, where a process does not find in `out` what process 0 has just put
    there: without a shared file system each machine would begin anew. A slow one may take some seconds to show it."""
    rank, count = rank_and_count()
    if count == 1:
        return
    token, end = out / f".seen-by-all-{from_all(uuid.uuid4().hex)[0]}", time.monotonic() + seconds
    with together():
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            token.touch()
    while not (found := token.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, it_found in enumerate(from_all(found)) if not it_found]
    with together():
        if rank == 0:
            token.unlink()
        if blind:
            raise ValueError(f"{flag} {out}: process {blind[0]} of {count} does not see there what process 0 writes")


def claim(folder: Path) -> TextIO | None:
    """A file that process 0 holds open as long as it trains in `folder`, where no other run may. Raises ValueError: one
    does. (Two would write over one another's log and weights.) None in other processes, and where files have no locks.
    """
    with together():
        if rank_and_count()[0] > 0:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "in-use", "w")  # noqa: SIM115 (open to the end)
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is at work here") from None
        except (ImportError, OSError):  # Windows; some network file systems
            return None
        return file


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
