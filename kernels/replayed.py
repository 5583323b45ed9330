"""A function of tensors on a GPU, recorded as a CUDA graph and replayed: one launch instead of thousands.

A GPU often takes less time for a step of a sampler than its host takes to launch the kernels of that step one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """function(*tensors) -> tensor: what it computes, for calls whose shapes stay the same. What a call returns lives
    until the next one.

    On a GPU, the first call computes as it is, for libraries choose their algorithms then; the second is recorded, and
    replayed from then on. So the function's other tensors stay where they are, it draws no random numbers, and nothing
    in it waits for a number. Where it cannot be recorded (memory is too full, for example), it goes on as it is.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *given: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and can_be_recorded(given[0]):
            self.record(given)
        if self.graph is None:
            return self.function(*given)
        for place, value in zip(self.given, given, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.made

    def record(self, given: tuple[Tensor, ...]) -> None:
        """Nothing is computed here."""
        self.given, graph = [value.clone() for value in given], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
                self.made = self.function(*self.given)
        except RuntimeError as error:
            print(f"not recorded as a CUDA graph, slower: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            self.graph = graph


def can_be_recorded(x: Tensor) -> bool:
    return x.is_cuda
