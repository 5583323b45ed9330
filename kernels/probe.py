"""Whether Triton's kernels run on this GPU. Where they do not, everything is done by torch's own operations."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache

import torch

from sources import first_line

tl = None  # triton.language, imported by the probe: Triton is not required
OLDEST = (8, 0)  # compute capability that Triton is made for


def _one(x: tl.tensor) -> None:
    tl.store(x, 1.0)


def triton_runs() -> bool:
    """Whether Triton is there and `build` succeeds. While torch.compile traces, nothing can be built."""
    return importlib.util.find_spec("triton") is not None if torch.compiler.is_compiling() else build()


@cache
def build() -> bool:
    """Builds and runs a kernel, once. That needs a card that Triton knows, and a C compiler for what launches it; what
    is missing is a line on stderr, but for Triton itself."""
    global tl
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        if torch.version.hip is None and (found := torch.cuda.get_device_capability()) < OLDEST:
            raise RuntimeError(f"compute capability {found[0]}.{found[1]}, {OLDEST[0]}.{OLDEST[1]} is needed")
        import triton
        from triton import language as tl

        x = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
        triton.jit(_one)[(1,)](x)
        return x.item() == 1
    except Exception as error:  # of many kinds: Triton's own, of the compiler that it calls, of the driver
        print(f"Triton does not run here, torch does its work: {first_line(error)}", file=sys.stderr)
        return False
