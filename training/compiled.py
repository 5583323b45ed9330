"""A denoiser compiled by torch.compile: fewer and larger kernels, after a minute or more of compiling."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

SMALL = 100_000_000  # parameters; below, launching kernels takes a GPU's host longer than running them


def compile_forward(network: nn.Module, graphs: bool = False) -> None:
    """Compiles a network's forward pass, in place, once for all sizes that it meets; the first call says how long that
    took. (In training, the first backward pass compiles its own part.)

    Only `forward` is replaced: hooks, names of parameters and whatever wraps the network stay. graphs: a small network
    on a GPU is also recorded as a CUDA graph, one launch instead of thousands; its output then lives until the next
    call.
    """
    small = graphs and sum(value.numel() for value in network.parameters()) < SMALL
    compiled = torch.compile(network.forward, dynamic=False, mode="reduce-overhead" if small else None)

    def first_call(*inputs: object, **named: object) -> Tensor:
        network.forward, started = compiled, time.perf_counter()
        made = compiled(*inputs, **named)
        print(f"compiling {type(network).__name__} took {time.perf_counter() - started:.0f} s")
        return made

    network.forward = first_call
