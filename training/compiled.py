"""Networks compiled by torch.compile, block by block: fewer and larger kernels, after a minute or more of compiling."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from svd import BLOCKS

SHAPES = 256  # that one kind of block may have; torch stops at 8, which is less than SVD's UNet has


def compile_forward(network: nn.Module) -> None:
    """Compiles the blocks of a network, in place, once for all sizes that they meet; those of one shape share what is
    compiled. A network without them is compiled whole. The first call says how long it took. (In training, the first
    backward pass compiles its own part.)

    Only `forward` is replaced: hooks, names of parameters and whatever wraps the network stay.
    """
    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", SHAPES)  # or 2.6
    for block in [module for module in network.modules() if isinstance(module, BLOCKS)] or [network]:
        block.forward = torch.compile(block.forward, dynamic=False)
    compiled = network.forward

    def first_call(*inputs: object, **named: object) -> Tensor:
        network.forward, started = compiled, time.perf_counter()
        made = compiled(*inputs, **named)
        print(f"compiling {type(network).__name__} took {time.perf_counter() - started:.0f} s")
        return made

    network.forward = first_call
