"""Softmax splatting, Eq. 7 of Motion Dreamer (arXiv 2412.00547 v1): push every pixel along its flow vector.

    W^(s) = Softsplat(C^(s), F^(s))                  from splat import softsplat; W = softsplat(C, F, metric)

Source pixel q lands at q + F(q), between four target pixels p. With b_pq its bilinear share and z_q its importance,

    W(p) = sum_q u_pq C(q) / S_p,      u_pq = b_pq z_q,      S_p = sum_q u_pq

mode "sum": z = 1 and no division by S;  "average": z = 1;  "linear": z = metric;  "softmax": z = exp(metric).

The work has two steps. `corners` computes where each pixel goes and its normalised weight u_pq / S_p, in plain torch: a
few single-channel images, differentiated by autograd. The second step, nearly all of the cost, is a sparse matrix times
every feature plane, linear in both. It exists three times: "torch" (scatter_add, any device), "numba" (CPU) and "cuda"
(Triton). The last two first list the sources of every target, then *gather*: each output is written once, by one
thread, without atomics. Splatting 320 planes of 72 x 128 for 14 frames takes 1.1 times a copy of the result (CPU).

Symbols: B batch, n flow fields per feature map, N = n B, C channels, P = H W pixels, F flow (dx, dy), k corner
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.autograd.function import FunctionCtx as Context
from torch.autograd.function import once_differentiable

MODES = ("sum", "average", "linear", "softmax")
BACKENDS = ("auto", "torch", "numba", "cuda")
EPS = 1e-7  # a target whose weights sum to no more than this is a hole

numba: ModuleType | None = None  # both are imported by the first call that needs them,
tl: ModuleType | None = None  # so that `import splat` is quick and neither package is required


# --- Step 1: where pixels go, and with what weight ----------------------------------------------------------


def corners(flow: Tensor, metric: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """The four targets of every pixel and its normalised weight u/S there (Eq. 7); differentiable in flow and metric.

    flow [N,2,H,W] in pixels, metric [N,1,H,W] or None -> index [N,4,P] (int64; P = outside or dropped), weight [N,4,P].
    """
    N, _, H, W = flow.shape
    alive = flow.isfinite().all(1, keepdim=True)  # [N,1,H,W]
    if metric is not None:
        alive = alive & metric.isfinite()
        metric = metric.where(alive, 0).flatten(2)  # [N,1,P]
    dx, dy = flow.where(alive, 0).unbind(1)  # [N,H,W]
    dx, dy = dx.clamp(-W - 1, W + 1), dy.clamp(-H - 1, H + 1)  # still outside, and safe to turn into an integer
    x0, y0 = dx.floor(), dy.floor()
    ax, ay = dx - x0, dy - y0  # of the vector, not of pixel + vector: no digits lost to a large coordinate
    bilinear = torch.stack([(1 - ax) * (1 - ay), ax * (1 - ay), (1 - ax) * ay, ax * ay], 1).flatten(2)  # b: [N,4,P]

    column = x0.long() + torch.arange(W, device=flow.device)  # [N,H,W]
    row = y0.long() + torch.arange(H, device=flow.device)[:, None]
    column = torch.stack([column, column + 1, column, column + 1], 1)  # [N,4,H,W]
    row = torch.stack([row, row, row + 1, row + 1], 1)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H) & alive
    index = (row * W + column).where(inside, H * W).flatten(2)  # [N,4,P]

    weight = bilinear if metric is None else bilinear * importance(metric, bilinear, index, mode)  # u: [N,4,P]
    return index, weight if mode == "sum" else normalise(weight, index)


def importance(metric: Tensor, bilinear: Tensor, index: Tensor, mode: str) -> Tensor:
    """z of Eq. 7 for every corner: metric [N,1,P], bilinear and index [N,4,P] -> [N,1,P] or [N,4,P].

    softmax: exp(metric - the largest that reaches this target). A factor common to a target cancels in u/S, so nothing
    overflows, and low metrics alone at a target do not underflow. A corner of no weight cannot set the largest.
    """
    if mode == "linear":
        return metric
    N, _, P = index.shape
    seen = metric.detach().where(bilinear > EPS, -torch.inf)  # [N,4,P]
    top = metric.new_full((N, P + 1), -torch.inf).scatter_reduce_(1, index.flatten(1), seen.flatten(1), "amax")
    return (metric - top.gather(1, index.flatten(1)).view_as(index)).clamp(max=0).exp()


def normalise(weight: Tensor, index: Tensor) -> Tensor:
    """u / S_p of Eq. 7, and 0 in the holes: weight [N,4,P], index [N,4,P] -> [N,4,P]."""
    N, _, P = index.shape
    S = weight.new_zeros(N, P + 1).scatter_add(1, index.flatten(1), weight.flatten(1))  # column P: all that left
    S = S.where(S > EPS, torch.inf)
    return weight / S.gather(1, index.flatten(1)).view_as(index)


# --- Step 2: the sparse product out[c,p] = sum_q weight_pq x[c,q] -------------------------------------------


def splat_torch(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """x [B,C,P], index and weight [N,4,P] -> [N,C,P]. The reference: autograd differentiates it."""
    (N, _, P), C = index.shape, x.shape[1]
    x = x.repeat_interleave(N // x.shape[0], 0)  # [N,C,P]
    out = x.new_zeros(N, C, P + 1)
    for k in range(4):
        out = out.scatter_add(2, index[:, k, None].expand(N, C, P), x * weight[:, k, None])
    return out[..., :P]


class Kernels(NamedTuple):
    """One backend's product and its two derivatives."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B,C,P], index [N,4,P] int32, weight [N,4,P] -> [N,C,P]
    grad_x: Callable[[Tensor, Tensor, Tensor, int], Tensor]  # g [N,C,P], index, weight, B -> [B,C,P]
    grad_weight: Callable[[Tensor, Tensor, Tensor], Tensor]  # g [N,C,P], x [B,C,P], index -> [N,4,P], 0 outside


class Splat(torch.autograd.Function):
    """The product with a backend's kernels. It is linear in x and in weight: its derivatives are two more products."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, index: Tensor, weight: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, index, weight)
        ctx.kernels = kernels
        return kernels.forward(x, index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weight = ctx.saved_tensors
        need_x, _, need_weight, _ = ctx.needs_input_grad
        g = g.contiguous()
        grad_x = ctx.kernels.grad_x(g, index, weight, x.shape[0]) if need_x else None
        grad_weight = ctx.kernels.grad_weight(g, x, index) if need_weight else None
        return grad_x, None, grad_weight, None


# --- Numba: eight planes at a time share the reading of the list --------------------------------------------


def _list_sources(index: ndarray, weight: ndarray, start: ndarray, source: ndarray, value: ndarray) -> None:
    """Counting sort by target: source[start[p] : start[p + 1]] are the pixels that land on p, value their weights.

    Lists are filled up to a multiple of four with weight 0. Most hold four: _gather's inner loop is easy to predict.
    """
    N, K, P = index.shape
    for i in numba.prange(N):
        for k in range(K):
            for q in range(P):
                if index[i, k, q] < P and weight[i, k, q] != 0:
                    start[i, index[i, k, q] + 1] += 1
        for p in range(P):
            start[i, p + 1] = start[i, p] + (start[i, p + 1] + 3) // 4 * 4
        free = start[i].copy()
        for k in range(K):
            for q in range(P):
                p = index[i, k, q]
                if p < P and weight[i, k, q] != 0:
                    source[i, free[p]] = q
                    value[i, free[p]] = weight[i, k, q]
                    free[p] += 1
        for p in range(P):
            for e in range(free[p], start[i, p + 1]):
                source[i, e] = source[i, e - 1]
                value[i, e] = 0


def _gather(x: ndarray, start: ndarray, source: ndarray, value: ndarray, out: ndarray) -> None:
    """out[i,c,p] = sum over the list of p of value * x[c,source]. A job is eight planes; past C, the last repeats."""
    N, C, P = out.shape
    n, blocks = N // x.shape[0], (C + 7) // 8
    for job in numba.prange(N * blocks):
        i = job // (n * blocks) * n + job % n  # the n fields of one x run fastest: its planes stay in the cache
        c0 = job // n % blocks * 8
        c1, c2, c3, c4 = min(c0 + 1, C - 1), min(c0 + 2, C - 1), min(c0 + 3, C - 1), min(c0 + 4, C - 1)
        c5, c6, c7 = min(c0 + 5, C - 1), min(c0 + 6, C - 1), min(c0 + 7, C - 1)
        x0, x1, x2, x3 = x[i // n, c0], x[i // n, c1], x[i // n, c2], x[i // n, c3]  # [P]
        x4, x5, x6, x7 = x[i // n, c4], x[i // n, c5], x[i // n, c6], x[i // n, c7]
        o0, o1, o2, o3 = out[i, c0], out[i, c1], out[i, c2], out[i, c3]
        o4, o5, o6, o7 = out[i, c4], out[i, c5], out[i, c6], out[i, c7]
        for p in range(P):
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = value.dtype.type(0)  # named, so that they live in registers
            for e in range(start[i, p], start[i, p + 1], 4):
                qa, qb, qc, qd = source[i, e], source[i, e + 1], source[i, e + 2], source[i, e + 3]
                wa, wb, wc, wd = value[i, e], value[i, e + 1], value[i, e + 2], value[i, e + 3]
                s0 += wa * x0[qa] + wb * x0[qb] + wc * x0[qc] + wd * x0[qd]
                s1 += wa * x1[qa] + wb * x1[qb] + wc * x1[qc] + wd * x1[qd]
                s2 += wa * x2[qa] + wb * x2[qb] + wc * x2[qc] + wd * x2[qd]
                s3 += wa * x3[qa] + wb * x3[qb] + wc * x3[qc] + wd * x3[qd]
                s4 += wa * x4[qa] + wb * x4[qb] + wc * x4[qc] + wd * x4[qd]
                s5 += wa * x5[qa] + wb * x5[qb] + wc * x5[qc] + wd * x5[qd]
                s6 += wa * x6[qa] + wb * x6[qb] + wc * x6[qc] + wd * x6[qd]
                s7 += wa * x7[qa] + wb * x7[qb] + wc * x7[qc] + wd * x7[qd]
            o0[p], o1[p], o2[p], o3[p], o4[p], o5[p], o6[p], o7[p] = s0, s1, s2, s3, s4, s5, s6, s7


def _gather_corners(g: ndarray, index: ndarray, weight: ndarray, out: ndarray) -> None:
    """out[b,c,q] = sum over b's fields i and corners k of weight * g[i,c,index]. A job is four planes, as above."""
    (N, C, P), blocks = g.shape, (g.shape[1] + 3) // 4
    n = N // out.shape[0]
    for job in numba.prange(out.shape[0] * blocks):
        b, c0 = job // blocks, job % blocks * 4
        c1, c2, c3 = min(c0 + 1, C - 1), min(c0 + 2, C - 1), min(c0 + 3, C - 1)
        o0, o1, o2, o3 = out[b, c0], out[b, c1], out[b, c2], out[b, c3]  # [P]
        for i in range(b * n, b * n + n):
            g0, g1, g2, g3 = g[i, c0], g[i, c1], g[i, c2], g[i, c3]
            for q in range(P):
                a0 = a1 = a2 = a3 = g.dtype.type(0)
                if i > b * n:
                    a0, a1, a2, a3 = o0[q], o1[q], o2[q], o3[q]
                for k in range(4):
                    p, w = index[i, k, q], weight[i, k, q]
                    a0, a1, a2, a3 = a0 + w * g0[p], a1 + w * g1[p], a2 + w * g2[p], a3 + w * g3[p]
                o0[q], o1[q], o2[q], o3[q] = a0, a1, a2, a3


def _dot_corners(g: ndarray, x: ndarray, index: ndarray, out: ndarray) -> None:
    """out[i,k,q] += sum over c of g[i,c,index] * x[c,q]. A job is 1024 pixels q."""
    (N, C, P), n, blocks = g.shape, g.shape[0] // x.shape[0], (g.shape[2] + 1023) // 1024
    for job in numba.prange(N * blocks):
        i, first = job // blocks, job % blocks * 1024
        last = min(first + 1024, P)
        for c in range(0, C - 3, 4):
            g0, g1, g2, g3 = g[i, c], g[i, c + 1], g[i, c + 2], g[i, c + 3]  # [P]
            x0, x1, x2, x3 = x[i // n, c], x[i // n, c + 1], x[i // n, c + 2], x[i // n, c + 3]
            for q in range(first, last):
                for k in range(4):
                    p = index[i, k, q]
                    out[i, k, q] += g0[p] * x0[q] + g1[p] * x1[q] + g2[p] * x2[q] + g3[p] * x3[q]
        for c in range(C // 4 * 4, C):
            for k in range(4):
                for q in range(first, last):
                    out[i, k, q] += g[i, c, index[i, k, q]] * x[i // n, c, q]


def empty(like: Tensor, *shape: int) -> Tensor:
    """As like.new_empty(shape), but NumPy asks the system for huge pages: touching the memory takes a third as long."""
    return torch.from_numpy(np.empty(shape, like.detach()[:0].numpy().dtype))


@cache
def numba_kernels() -> Kernels:
    """Compile (the machine code is cached on disk: seconds the first time only) and wrap the CPU kernels."""
    global numba
    import numba

    one_caller = threading.Lock()  # one of Numba's thread pools cannot serve two callers at once

    def compiled(function: Callable) -> Callable[..., None]:
        kernel = numba.njit(parallel=True, cache=True, fastmath={"contract"})(function)

        def call(*tensors: Tensor) -> None:
            arrays = [t.detach().numpy() for t in tensors]
            # unsigned: spares the kernel the test for a negative index
            arrays = [a.view(np.uint32) if a.dtype == np.int32 else a for a in arrays]
            threads = torch.get_num_threads()
            with one_caller:
                numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
                kernel(*arrays)
            if torch.get_num_threads() != threads:  # Numba sets OpenMP's number, which torch reads
                torch.set_num_threads(threads)

        return call

    list_sources, gather = compiled(_list_sources), compiled(_gather)
    gather_corners, dot_corners = compiled(_gather_corners), compiled(_dot_corners)

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        N, _, P = index.shape
        start, source = index.new_zeros(N, P + 1), index.new_empty(N, 7 * P)  # 4 P corners, lists rounded up by 3
        value, out = x.new_empty(N, 7 * P), empty(x, N, x.shape[1], P)
        list_sources(index, weight, start, source, value)
        gather(x, start, source, value, out)
        return out

    def grad_x(g: Tensor, index: Tensor, weight: Tensor, B: int) -> Tensor:
        inside = index < index.shape[2]
        out = empty(g, B, *g.shape[1:])
        gather_corners(g, index.where(inside, 0), weight.where(inside, 0), out)  # outside: any target, no weight
        return out

    def grad_weight(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
        inside = index < index.shape[2]
        out = g.new_zeros(index.shape)
        dot_corners(g, x, index.where(inside, 0), out)
        return out.where(inside, 0)

    return Kernels(forward, grad_x, grad_weight)


# --- Triton: a program owns C_ channels x P_ pixels of one output -------------------------------------------


def _gather_gpu(
    x: tl.tensor,
    start: tl.tensor,
    source: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    n: tl.tensor,
    C_: tl.constexpr,
    P_: tl.constexpr,
) -> None:
    """As _gather, of x [B,P,C]. Grid: blocks of pixels p, blocks of channels, N.

    A block waits for its longest list: it has few pixels, and many channels, side by side in memory.
    """
    i = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * P_ + tl.arange(0, P_))[:, None]  # [P_, 1]
    c = tl.program_id(1) * C_ + tl.arange(0, C_)[None]  # [1, C_]
    begin = tl.load(start + i * (P + 1) + p, p < P, 0)
    end = tl.load(start + i * (P + 1) + p + 1, p < P, 0)
    total = tl.zeros((P_, C_), out.dtype.element_ty)
    for j in range(tl.max(end - begin)):
        more = begin + j < end
        q = tl.load(source + begin + j, more, 0)
        w = tl.load(value + begin + j, more, 0.0)
        total += w * tl.load(x + (i // n * P + q) * C + c, more & (c < C), 0.0)
    tl.store(out + (i * C + c) * P + p, total, (p < P) & (c < C))


def _gather_corners_gpu(
    g: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    n: tl.tensor,
    C_: tl.constexpr,
    P_: tl.constexpr,
) -> None:
    """As _gather_corners. Grid: blocks of pixels q, blocks of channels, B."""
    b = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * P_ + tl.arange(0, P_)  # [P_]
    c = (tl.program_id(1) * C_ + tl.arange(0, C_))[:, None]  # [C_, 1]
    total = tl.zeros((C_, P_), out.dtype.element_ty)
    for corner in range(n * 4):  # index and weight are [B, n * 4, P]
        i = b * n + corner // 4
        at = (b * n * 4 + corner) * P + q
        p = tl.load(index + at, q < P, P)
        w = tl.load(weight + at, p < P, 0.0)
        total += w * tl.load(g + (i * C + c) * P + p, (p < P) & (c < C), 0.0)
    tl.store(out + (b * C + c) * P + q, total, (q < P) & (c < C))


def _dot_corners_gpu(
    g: tl.tensor,
    x: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    n: tl.tensor,
    C_: tl.constexpr,
    P_: tl.constexpr,
) -> None:
    """As _dot_corners. Grid: blocks of pixels q, the four corners, N."""
    i = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * P_ + tl.arange(0, P_)  # [P_]
    at = (i * 4 + tl.program_id(1)) * P + q
    p = tl.load(index + at, q < P, P)
    total = tl.zeros((C_, P_), out.dtype.element_ty)
    for first in range(0, C, C_):
        c = (first + tl.arange(0, C_))[:, None]  # [C_, 1]
        inside = (p < P) & (c < C)
        total += tl.load(g + (i * C + c) * P + p, inside, 0.0) * tl.load(x + (i // n * C + c) * P + q, inside, 0.0)
    tl.store(out + at, tl.sum(total, 0), q < P)


@cache
def triton_kernels() -> Kernels:
    """Wrap the GPU kernels; Triton compiles each at its first launch."""
    global tl
    import triton
    from triton import language as tl

    gather, gather_corners, dot_corners = map(triton.jit, (_gather_gpu, _gather_corners_gpu, _dot_corners_gpu))
    # Blocks of C_ channels x P_ pixels, and their warps, are the best of some twenty on an H100 (sizes as above).

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        (N, _, P), C, C_, P_ = index.shape, x.shape[1], 64, 8
        out = x.new_empty(N, C, P)
        first = torch.arange(0, N * (P + 1), P + 1, dtype=torch.int32, device=x.device).view(N, 1, 1)
        target = (index.where(weight != 0, P) + first).flatten()  # of all fields, so that one sort does; P is outside
        target, order = target.sort(stable=True)  # [4 N P]
        bounds = torch.arange(N * (P + 1), dtype=torch.int32, device=x.device)
        start = torch.searchsorted(target, bounds, out_int32=True)  # [N (P + 1)]
        value = weight.flatten()[order]
        source, rows = (order % P).int(), x.transpose(1, 2).contiguous()  # [4 N P], [B, P, C]
        grid = (triton.cdiv(P, P_), triton.cdiv(C, C_), N)
        with torch.cuda.device_of(x):
            gather[grid](rows, start, source, value, out, C, P, N // x.shape[0], C_, P_, num_warps=2)
        return out

    def grad_x(g: Tensor, index: Tensor, weight: Tensor, B: int) -> Tensor:
        (N, C, P), C_, P_ = g.shape, 1, 128
        out = g.new_empty(B, C, P)
        with torch.cuda.device_of(g):
            gather_corners[(triton.cdiv(P, P_), triton.cdiv(C, C_), B)](g, index, weight, out, C, P, N // B, C_, P_)
        return out

    def grad_weight(g: Tensor, x: Tensor, index: Tensor) -> Tensor:
        (N, C, P), C_, P_ = g.shape, 1, 256
        grid, n = (triton.cdiv(P, P_), 4, N), N // x.shape[0]
        out = g.new_empty(index.shape)
        with torch.cuda.device_of(g):
            dot_corners[grid](g, x, index, out, C, P, n, C_, P_, num_warps=2)
        return out

    return Kernels(forward, grad_x, grad_weight)


def splat_fast(x: Tensor, index: Tensor, weight: Tensor, backend: str) -> Tensor:
    """splat_torch by the "numba" or the "cuda" kernels."""
    kernels = numba_kernels() if backend == "numba" else triton_kernels()
    return Splat.apply(x, index.int(), weight.contiguous(), kernels)


# --- The function -------------------------------------------------------------------------------------------


def softsplat(
    x: Tensor, flow: Tensor, metric: Tensor | None = None, mode: str = "softmax", backend: str = "auto"
) -> Tensor:
    """Splat x forward along flow (Eq. 7): x [B,C,H,W], flow [n*B,2,H,W], metric [B,1,H,W] -> [n*B,C,H,W].

    Row b*n + k of the result is x[b] splatted with flow[b*n + k]: features need no copy per frame. flow is (dx, dy) in
    pixels, to the right and down. Differentiable in x, flow and metric on every backend.

    mode     "sum": shares add up; mass is conserved inside the frame. "average", "linear", "softmax": the mean of what
             lands on a target, with importance 1, metric or exp(metric), and 0 where nothing lands (shares of 1e-7 or
             less in total). softmax depends on differences of the metric only, never over- or underflows, and without a
             metric is average. linear expects metric >= 0: a target whose weights sum to 1e-7 or less is a hole.
    backend  "torch", "numba" (CPU) or "cuda" (Triton). "auto": numba on a CPU in float32, cuda on a GPU, where these
             packages are installed, else torch.

    A pixel with a non-finite flow vector or metric is dropped, alone, and its flow and metric get no gradient. At an
    integer vector the flow's gradient is one-sided, towards larger flow. Computes in float32 (float64 if x is), returns
    x's dtype. Raises ValueError with the argument's name and shape; ImportError if a named backend is not installed.
    """
    check(x, flow, metric, mode, backend)
    B, C, H, W = x.shape
    n, dtype = len(flow) // B, torch.promote_types(x.dtype, torch.float32)
    if backend == "auto":
        backend = choose_backend(x.device.type, dtype)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if metric is not None:
            metric = metric.to(dtype).repeat_interleave(n, 0)  # [N,1,H,W]
        index, weight = corners(flow.to(dtype), metric, mode)  # [N,4,P] each
        planes = x.to(dtype).flatten(2).contiguous()  # [B,C,P]
        if backend == "torch":
            out = splat_torch(planes, index, weight)
        elif torch.compiler.is_compiling():  # asked first, because disable() takes a second to import
            out = torch.compiler.disable(splat_fast)(planes, index, weight, backend)
        else:
            out = splat_fast(planes, index, weight, backend)
        return out.view(n * B, C, H, W).to(x.dtype)


def choose_backend(device: str, dtype: torch.dtype) -> str:
    """What "auto" means for a device type."""
    if device == "cpu" and dtype == torch.float32 and importlib.util.find_spec("numba"):
        return "numba"
    if device == "cuda" and importlib.util.find_spec("triton"):
        return "cuda"
    return "torch"


def check(x: Tensor, flow: Tensor, metric: Tensor | None, mode: str, backend: str) -> None:
    """Raise the ValueErrors of softsplat."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    tensors = {"x": x, "flow": flow} | ({} if metric is None else {"metric": metric})
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, but x is on {x.device}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: expected [B,C,H,W] without a zero, got {list(x.shape)}")
    B, _, H, W = x.shape
    if flow.ndim != 4 or flow.shape[1:] != (2, H, W) or len(flow) % B or len(flow) == 0:
        raise ValueError(f"flow: expected [n*{B},2,{H},{W}] to go with x {list(x.shape)}, got {list(flow.shape)}")
    if metric is not None and metric.shape != (B, 1, H, W):
        raise ValueError(f"metric: expected [{B},1,{H},{W}] to go with x {list(x.shape)}, got {list(metric.shape)}")
    if (mode == "linear" and metric is None) or (mode in ("sum", "average") and metric is not None):
        raise ValueError(f"metric: mode {mode!r} {'needs one' if metric is None else 'takes none'}")
    if backend in ("numba", "cuda") and x.device.type != {"numba": "cpu", "cuda": "cuda"}[backend]:
        raise ValueError(f"backend: {backend!r} cannot run on {x.device}, where x {list(x.shape)} is")
