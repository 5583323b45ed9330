"""A denoiser compiled by torch.compile: fewer and larger kernels, after a minute or more of compiling."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


def compile_forward(network: nn.Module) -> None:
    """Compiles a network's forward pass, in place, once for all sizes that it meets; the first call says how long that
    took. (In training, the first backward pass compiles its own part.)

    Only `forward` is replaced: hooks, names of parameters and whatever wraps the network stay.
    """
    compiled = torch.compile(network.forward, dynamic=False)

    def first_call(*inputs: object, **named: object) -> Tensor:
        network.forward, started = compiled, time.perf_counter()
        made = compiled(*inputs, **named)
        print(f"compiling {type(network).__name__} took {time.perf_counter() - started:.0f} s")
        return made

    network.forward = first_call
