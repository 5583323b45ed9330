"""Group normalisation and SiLU of features in rows, x [N, S, C], in Triton: forward and backward on a GPU.

torch.nn.functional.group_norm wants channels before space. On channels-last features it copies to that order and back,
and a block of its kernel reads a whole group of a sample: 32 blocks where a norm over time has one sample. Here a block
reads some rows of some channels, so any shape fills a GPU, and SiLU is no pass of its own.

Forward, with mean and rstd = 1 / sqrt(var + eps) of a sample's group, over m = S C / G values, in float32:

    xhat = (x - mean) rstd        z = xhat w + b        y = silu(z) or z

Backward, from dy, with z computed anew:

    dz = dy silu'(z)              A_c = sum_s dz        B_c = sum_s dz xhat        per sample and channel
    db = sum_n A                  dw = sum_n B
    dx = rstd (w dz - (sum_{c in g} w A + xhat sum_{c in g} w B) / m)

Both read x twice, in three launches: sums over blocks of rows, their sums over a group, the result. Every sum has one
order, so a result does not change from run to run.

Symbols: N samples (clips or frames), S rows, C channels, G groups, n s c g their indices; a name_ is a block size
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx as Context
from torch.autograd.function import once_differentiable

from kernels.probe import triton_runs

tl = None  # triton.language, imported by the first call that needs it: Triton is not required

ROWS, CHANNELS, WARPS = 32, 64, 4  # what a block reads at a time: 64 channels are one or two whole cache lines
BLOCKS = 8 * 132  # a block takes more rows until there are about so many: 8 for each processor of an H200
PARTS = 1024  # what a block of the second launch, which sums over a group, reads at a time


def _moments_gpu(x: tl.tensor, parts: tl.tensor, S: int, C: int, rows: int, R_: tl.constexpr, C_: tl.constexpr) -> None:
    """Mean and sum of squared deviations of `rows` rows, per channel: x [N,S,C] -> parts [2,N,C,blocks].

    Sums run over x - (first row): that is off the mean by no more than a deviation, so squares lose no digits.
    """
    c, block, n = tl.program_id(0) * C_ + tl.arange(0, C_), tl.program_id(1), tl.program_id(2).to(tl.int64)
    count = tl.minimum(rows, S - block * rows)
    x += (n * S + block * rows) * C
    first = tl.load(x + c, c < C, 0.0).to(tl.float32)
    total, squares = tl.zeros((R_, C_), tl.float32), tl.zeros((R_, C_), tl.float32)
    for r in range(0, count, R_):
        s = r + tl.arange(0, R_)[:, None]  # [R_, 1]
        value = tl.load(x + s * C + c[None], (s < count) & (c < C)[None], 0.0).to(tl.float32)
        off = tl.where(s < count, value - first[None], 0.0)
        total += off
        squares += off * off
    off = tl.sum(total, 0) / count
    parts += (n * C + c) * tl.num_programs(1) + block
    tl.store(parts, first + off, c < C)
    parts += tl.num_programs(2).to(tl.int64) * C * tl.num_programs(1)
    tl.store(parts, tl.sum(squares, 0) - off * off * count, c < C)


def _join_gpu(
    parts: tl.tensor, moments: tl.tensor, S: int, rows: int, blocks: int, K: int, m: float, eps: float,
    J_: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and rstd of a group from its K = C/G blocks parts (Chan's formula): [2,N,C,blocks] -> [2,N,G]."""
    i = tl.program_id(0).to(tl.int64)  # n G + g
    squares, parts = parts + (tl.num_programs(0) + i) * K, parts + i * K
    total = tl.zeros((J_,), tl.float32)
    for start in range(0, K, J_):
        k = start + tl.arange(0, J_)
        total += tl.load(parts + k, k < K, 0.0) * tl.minimum(rows, S - k % blocks * rows)
    mean = tl.sum(total) / m
    total = tl.zeros((J_,), tl.float32)
    for start in range(0, K, J_):
        k = start + tl.arange(0, J_)
        off = tl.load(parts + k, k < K, mean) - mean
        total += tl.load(squares + k, k < K, 0.0) + off * off * tl.minimum(rows, S - k % blocks * rows)
    tl.store(moments + i, mean)
    tl.store(moments + tl.num_programs(0) + i, tl.rsqrt(tl.sum(total) / m + eps))


def _normalize_gpu(
    x: tl.tensor, moments: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, S: int, C: int, G: int,
    rows: int, silu: tl.constexpr, R_: tl.constexpr, C_: tl.constexpr,
) -> None:  # fmt: skip
    """y [N,S,C]."""
    c, block, n = tl.program_id(0) * C_ + tl.arange(0, C_), tl.program_id(1), tl.program_id(2).to(tl.int64)
    count = tl.minimum(rows, S - block * rows)
    x, y = x + (n * S + block * rows) * C, y + (n * S + block * rows) * C
    group = n * G + c // (C // G)
    mean = tl.load(moments + group, c < C, 0.0)
    rstd = tl.load(moments + tl.num_programs(2) * G + group, c < C, 0.0)
    w, b = tl.load(weight + c, c < C, 0.0).to(tl.float32), tl.load(bias + c, c < C, 0.0).to(tl.float32)
    for r in range(0, count, R_):
        s = r + tl.arange(0, R_)[:, None]  # [R_, 1]
        inside = (s < count) & (c < C)[None]
        z = (tl.load(x + s * C + c[None], inside, 0.0).to(tl.float32) - mean[None]) * (rstd * w)[None] + b[None]
        if silu:
            z *= tl.sigmoid(z)
        tl.store(y + s * C + c[None], z.to(y.dtype.element_ty), inside)


def _back_gpu(
    x: tl.tensor, dy: tl.tensor, moments: tl.tensor, weight: tl.tensor, bias: tl.tensor, parts: tl.tensor,
    means: tl.tensor, dx: tl.tensor, S: int, C: int, G: int, rows: int, silu: tl.constexpr, R_: tl.constexpr,
    C_: tl.constexpr,
) -> None:  # fmt: skip
    """Without dx: A and B of `rows` rows, parts [2,N,C,blocks]. With it: dx [N,S,C] from means [2,N,G] of w A, w B."""
    c, block, n = tl.program_id(0) * C_ + tl.arange(0, C_), tl.program_id(1), tl.program_id(2).to(tl.int64)
    count = tl.minimum(rows, S - block * rows)
    x, dy = x + (n * S + block * rows) * C, dy + (n * S + block * rows) * C
    group = n * G + c // (C // G)
    mean = tl.load(moments + group, c < C, 0.0)[None]
    rstd = tl.load(moments + tl.num_programs(2) * G + group, c < C, 0.0)[None]
    w = tl.load(weight + c, c < C, 0.0).to(tl.float32)[None]
    b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None]
    if dx is None:
        sum_a, sum_b = tl.zeros((R_, C_), tl.float32), tl.zeros((R_, C_), tl.float32)
    else:
        dx += (n * S + block * rows) * C
        mean_a = tl.load(means + group, c < C, 0.0)[None]
        mean_b = tl.load(means + tl.num_programs(2) * G + group, c < C, 0.0)[None]
    for r in range(0, count, R_):
        s = r + tl.arange(0, R_)[:, None]  # [R_, 1]
        inside = (s < count) & (c < C)[None]
        xhat = (tl.load(x + s * C + c[None], inside, 0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(dy + s * C + c[None], inside, 0.0).to(tl.float32)
        if silu:
            z = xhat * w + b
            p = tl.sigmoid(z)
            dz *= p * (1 + z * (1 - p))
        if dx is None:
            sum_a += dz
            sum_b += dz * xhat
        else:
            tl.store(dx + s * C + c[None], (rstd * (w * dz - mean_a - xhat * mean_b)).to(dx.dtype.element_ty), inside)
    if dx is None:
        parts += (n * C + c) * tl.num_programs(1) + block
        tl.store(parts, tl.sum(sum_a, 0), c < C)
        tl.store(parts + tl.num_programs(2).to(tl.int64) * C * tl.num_programs(1), tl.sum(sum_b, 0), c < C)


def _sum_gpu(
    parts: tl.tensor, weight: tl.tensor, sums: tl.tensor, means: tl.tensor, G: int, width: int, blocks: int, m: float,
    W_: tl.constexpr, J_: tl.constexpr,
) -> None:  # fmt: skip
    """A and B of the `width` channels of a group from their parts, sums [2,N,C]; sum_c w A / m and w B / m [2,N,G]."""
    i, c = tl.program_id(0).to(tl.int64), tl.arange(0, W_)  # i = n G + g, after all those of A those of B
    total = tl.zeros((W_, J_), tl.float32)
    for start in range(0, blocks, J_):
        k = start + tl.arange(0, J_)[None]
        total += tl.load(parts + (i * width + c[:, None]) * blocks + k, (c < width)[:, None] & (k < blocks), 0.0)
    total = tl.sum(total, 1)  # [W_]
    w = tl.load(weight + i % G * width + c, c < width, 0.0).to(tl.float32)
    tl.store(sums + i * width + c, total, c < width)
    tl.store(means + i, tl.sum(w * total) / m)


@cache
def gpu(kernel: Callable) -> Callable:
    """Triton's kernel of a function above, compiled at its first launch."""
    global tl
    import triton
    from triton import language as tl

    return triton.jit(kernel)


def split(N: int, S: int, C: int) -> tuple[int, tuple[int, int, int]]:
    """How many rows a block takes, and the grid: blocks of channels, blocks of rows, N."""
    columns, tiles = ceil(C / CHANNELS), ceil(S / ROWS)
    blocks = ceil(tiles / max(1, columns * tiles * N // BLOCKS))
    rows = ceil(tiles / blocks) * ROWS
    return rows, (columns, ceil(S / rows), N)


class GroupNormGPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, dtype: torch.dtype
    ) -> Tensor:
        (N, S, C), (rows, grid) = x.shape, split(*x.shape)
        parts, moments = torch.empty(2, N, C, grid[1], device=x.device), torch.empty(2, N, groups, device=x.device)
        y, K, m = torch.empty_like(x, dtype=dtype), C // groups * grid[1], float(C // groups * S)
        with torch.cuda.device_of(x):
            gpu(_moments_gpu)[grid](x, parts, S, C, rows, ROWS, CHANNELS, num_warps=WARPS)
            gpu(_join_gpu)[N * groups,](parts, moments, S, rows, grid[1], K, m, eps, PARTS)
            numbers = (S, C, groups, rows, silu, ROWS, CHANNELS)
            gpu(_normalize_gpu)[grid](x, moments, weight, bias, y, *numbers, num_warps=WARPS)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        (N, S, C), (rows, grid), G = x.shape, split(*x.shape), moments.shape[2]
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        parts, sums, means = moments.new_empty(2, N, C, grid[1]), moments.new_empty(2, N, C), torch.empty_like(moments)
        dx = torch.empty_like(x) if need_x else None
        W_ = 1 << (C // G - 1).bit_length()
        with torch.cuda.device_of(x):
            given, numbers = (x, dy.contiguous(), moments, weight, bias), (S, C, G, rows, ctx.silu, ROWS, CHANNELS)
            gpu(_back_gpu)[grid](*given, parts, None, None, *numbers, num_warps=WARPS)
            numbers_of_sum = (G, C // G, grid[1], float(C // G * S), W_, max(1, PARTS // W_))
            gpu(_sum_gpu)[2 * N * G,](parts, weight, sums, means, *numbers_of_sum)
            if need_x:
                gpu(_back_gpu)[grid](*given, None, means, dx, *numbers, num_warps=WARPS)
        db, dw = sums.sum(1) if need_weight or need_bias else (None, None)  # autograd casts and drops
        return dx, None, dw, db, None, None, None


def usable(x: Tensor) -> bool:
    """Whether `group_norm` takes x: on a GPU where Triton runs; not where torch.compile makes its own kernels."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return not torch.compiler.is_compiling() and x.is_cuda and known and triton_runs()


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """Group normalisation of x [N, S, C] over rows and the channels of a group, then SiLU if asked for: [N, S, C].

    x, weight and bias [C] in float32, bfloat16 or float16; differentiable in all three, once. The result is in x's
    dtype, or in autocast's, since what comes next is a convolution or a linear layer, which would cast it anyway.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return GroupNormGPU.apply(x.contiguous(), groups, weight, bias, eps, silu, dtype)
