"""Whether Triton's kernels run here: on a GPU, or else in Triton's interpreter, which runs them on NumPy.

Import it before anything imports Triton, which reads its environment once.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


def _loop(out, count):
    for i in range(tl.load(count)):
        tl.store(out + i, 1)


def why_not() -> str | None:
    """A reason to skip. The interpreter of Triton 3.6 does not know NumPy 2.5: a loop's bound is an array of one number
    there."""
    if triton is None:
        return "needs Triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out, count = torch.zeros(2, dtype=torch.int32, device=device), torch.tensor([2], dtype=torch.int32, device=device)
    try:
        triton.jit(_loop)[(1,)](out, count)
    except Exception as error:  # of many kinds
        return f"Triton does not run a loop here: {error}"
    return None if out.tolist() == [1, 1] else "Triton does not run a loop here"
