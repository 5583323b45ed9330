"""Softmax splatting, Eq. 7 of Motion Dreamer (arXiv 2412.00547 v1): push every pixel along its flow vector.

    W^(s) = Softsplat(C^(s), F^(s))                  from splat import softsplat; W = softsplat(C, F, metric)

Source pixel q lands at q + F(q), between four target pixels p. With b_pq its bilinear share and z_q its importance,

    W(p) = sum_q u_pq C(q) / S_p,      u_pq = b_pq z_q,      S_p = sum_q u_pq

mode "sum": z = 1 and no division by S;  "average": z = 1;  "linear": z = metric;  "softmax": z = exp(metric).

The work has two steps. `corners` computes where each pixel goes and its normalised weight w_pq = u_pq / S_p, in plain
torch: a few single-channel images, differentiated by autograd. The second step, nearly all of the cost, is a sparse
matrix times every feature plane, linear in both. "torch" (scatter_add, any device) is the reference; "numba" (CPU) has
the second step, "cuda" (Triton) both. These first list the sources of every target, then *gather*: each output is
written once, summed in one order. 320 planes of 72 x 128 for 14 frames take 1.1 times a copy of the result (CPU).

Symbols: B batch, n flow fields per feature map, N = n B, C channels, P = H W pixels, F flow (dx, dy), k corner
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from math import ceil

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MODES = ("sum", "average", "linear", "softmax")
BACKENDS = ("auto", "torch", "numba", "cuda")
EPS = 1e-7  # a target whose weights sum to no more than this is a hole

numba = tl = None  # imported by the first call that needs them: `import splat` is quick, and neither is required
forked: list[bool] = []  # not empty in a forked child, which cannot use the threads that Numba started in its parent
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: forked.append(True))


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
    return weight / S.where(S > EPS, torch.inf).gather(1, index.flatten(1)).view_as(index)


# --- Step 2: the sparse product out[c,p] = sum_q weight_pq x[c,q] -------------------------------------------


def splat_torch(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """x [B,C,P], index and weight [N,4,P] -> [N,C,P]. The reference: autograd differentiates it."""
    (N, _, P), C = index.shape, x.shape[1]
    x, out = x.repeat_interleave(N // x.shape[0], 0), x.new_zeros(N, C, P + 1)  # [N,C,P], [N,C,P + 1]
    for k in range(4):
        out = out.scatter_add(2, index[:, k, None].expand(N, C, P), x * weight[:, k, None])
    return out[..., :P]


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
def numba_kernels() -> tuple[Callable[..., None], ...]:
    """The four functions above for tensors, compiled (seconds the first time only: the machine code stays on disk)."""
    global numba
    import numba

    one_caller = threading.Lock()  # one of Numba's thread pools cannot serve two callers at once

    def compiled(function: Callable) -> Callable[..., None]:
        kernel = numba.njit(parallel=True, fastmath={"contract"})(function)
        with suppress(RuntimeError):  # nowhere to write, as in a read-only install: each process compiles anew
            kernel.enable_caching()

        def call(*tensors: Tensor) -> None:
            arrays, threads = [t.detach().numpy() for t in tensors], torch.get_num_threads()
            arrays = [a.view(np.uint32) if a.dtype == np.int32 else a for a in arrays]  # spares a test for index < 0
            with one_caller:
                numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
                try:
                    kernel(*arrays)
                except OSError:  # it is compiled, but the disk that should keep it is full
                    kernel(*arrays)
            if torch.get_num_threads() != threads:  # Numba sets OpenMP's number, which torch reads
                torch.set_num_threads(threads)

        return call

    return tuple(map(compiled, (_list_sources, _gather, _gather_corners, _dot_corners)))


class SplatNumba(torch.autograd.Function):
    """splat_torch on a CPU. It is linear in x and in weight: its derivatives are two more products."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        index, weight = index.int(), weight.contiguous()
        ctx.save_for_backward(x, index, weight)
        (N, _, P), (list_sources, gather, _, _) = index.shape, numba_kernels()
        start, source = index.new_zeros(N, P + 1), index.new_empty(N, 7 * P)  # 4 P corners, lists rounded up by 3
        value, out = x.new_empty(N, 7 * P), empty(x, N, x.shape[1], P)
        list_sources(index, weight, start, source, value)
        gather(x, start, source, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weight = ctx.saved_tensors
        _, _, gather_corners, dot_corners = numba_kernels()
        inside, g, grad_x, grad_weight = index < index.shape[2], g.contiguous(), None, None
        index = index.where(inside, 0)  # outside: any target, no weight
        if ctx.needs_input_grad[0]:
            grad_x = empty(g, *x.shape)
            gather_corners(g, index, weight.where(inside, 0), grad_x)
        if ctx.needs_input_grad[2]:
            grad_weight = g.new_zeros(index.shape)
            dot_corners(g, x, index, grad_weight)
            grad_weight = grad_weight.where(inside, 0)
        return grad_x, None, grad_weight


# --- Triton: corners are numbered j = 4 q + k; tensors of corners are [N,P,4] -------------------------------

CORNERS = 128  # block size: corners or pixels, where there are no channels. Below: channels, pixels, warps;
ROWS, GATHER, BACK = (32, 64, 4), (64, 8, 2), (64, 8, 2)  # few pixels, since a block waits for its longest list


def _count_gpu(
    flow: tl.tensor, metric: tl.tensor, index: tl.tensor, share: tl.tensor, start: tl.tensor, place: tl.tensor, H: int,
    W: int, n: int, J_: tl.constexpr,
) -> None:  # fmt: skip
    """corners(): target and share b of each. start counts those that land on a target; place numbers them, -1: none."""
    i, P = tl.program_id(1).to(tl.int64), H * W
    j = tl.program_id(0) * J_ + tl.arange(0, J_)  # [J_]
    q, right, below = j // 4, j % 2, j // 2 % 2
    dx, dy = tl.load(flow + i * 2 * P + q, q < P, 0.0), tl.load(flow + i * 2 * P + P + q, q < P, 0.0)
    alive = (q < P) & (tl.abs(dx) <= W + 1) & (tl.abs(dy) <= H + 1)  # not NaN; what goes farther is outside
    if metric is not None:
        alive &= tl.abs(tl.load(metric + i // n * P + q, q < P, 0.0)) < float("inf")
    dx, dy = tl.where(alive, dx, 0), tl.where(alive, dy, 0)
    x0, y0 = tl.floor(dx), tl.floor(dy)
    b = tl.where(right == 1, dx - x0, 1 - (dx - x0)) * tl.where(below == 1, dy - y0, 1 - (dy - y0))
    column, row = q % W + x0.to(tl.int32) + right, q // W + y0.to(tl.int32) + below
    inside = alive & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    p = tl.where(inside, row * W + column, P)
    tl.store(index + i * 4 * P + j, p, q < P)
    tl.store(share + i * 4 * P + j, b, q < P)
    before = tl.atomic_add(start + i * P + p + 1, 1, inside & (b > 0), sem="relaxed")
    tl.store(place + i * 4 * P + j, tl.where(inside & (b > 0), before, -1), q < P)


def _fill_gpu(
    index: tl.tensor, start: tl.tensor, place: tl.tensor, source: tl.tensor, P: int, J_: tl.constexpr
) -> None:
    """source[start[p] : start[p + 1]] are the corners that land on p, in the order in which they were counted."""
    i, j = tl.program_id(1).to(tl.int64), tl.program_id(0) * J_ + tl.arange(0, J_)
    place = tl.load(place + i * 4 * P + j, j < 4 * P, -1)
    p = tl.load(index + i * 4 * P + j, place >= 0, 0)
    tl.store(source + tl.load(start + i * P + p, place >= 0, 0) + place, j, place >= 0)


def _order_gpu(
    index: tl.tensor, start: tl.tensor, place: tl.tensor, filled: tl.tensor, source: tl.tensor, P: int, J_: tl.constexpr
) -> None:
    """Sort each list, so that sums do not change from run to run: a corner's place is the number of those below it."""
    i, j = tl.program_id(1).to(tl.int64), tl.program_id(0) * J_ + tl.arange(0, J_)
    listed = tl.load(place + i * 4 * P + j, j < 4 * P, -1) >= 0
    p = tl.load(index + i * 4 * P + j, listed, 0)
    begin, end = tl.load(start + i * P + p, listed, 0), tl.load(start + i * P + p + 1, listed, 0)
    below = tl.zeros((J_,), tl.int32)
    for e in range(tl.max(end - begin)):
        below += (tl.load(filled + begin + e, begin + e < end, j) < j).to(tl.int32)
    tl.store(source + begin + below, j, listed)


def _weigh_gpu(
    metric: tl.tensor, start: tl.tensor, source: tl.tensor, share: tl.tensor, weight: tl.tensor, top: tl.tensor,
    S: tl.tensor, P: int, n: int, mode: tl.constexpr, EPS: tl.constexpr, P_: tl.constexpr,
) -> None:  # fmt: skip
    """importance() and normalise(), a target at a time: w = u / S of every listed corner; top and S of every target."""
    i, p = tl.program_id(1).to(tl.int64), tl.program_id(0) * P_ + tl.arange(0, P_)
    begin, end = tl.load(start + i * P + p, p < P, 0), tl.load(start + i * P + p + 1, p < P, 0)
    best = tl.full((P_,), float("-inf"), share.dtype.element_ty)
    if mode == "softmax":
        for e in range(tl.max(end - begin)):
            j = tl.load(source + begin + e, begin + e < end, 0)
            b = tl.load(share + i * 4 * P + j, begin + e < end, 0.0)
            m = tl.load(metric + i // n * P + j // 4, begin + e < end, 0.0)
            best = tl.where(b > EPS, tl.maximum(best, m), best)
    total = tl.zeros((P_,), share.dtype.element_ty)
    for step in tl.static_range(2):  # first the sum, then what is divided by it
        for e in range(tl.max(end - begin)):
            j = tl.load(source + begin + e, begin + e < end, 0)
            u = tl.load(share + i * 4 * P + j, begin + e < end, 0.0)
            if metric is not None:
                m = tl.load(metric + i // n * P + j // 4, begin + e < end, 0.0)
                u *= tl.exp(tl.minimum(m - best, 0.0)) if mode == "softmax" else m
            if step == 0:
                total += u
            else:
                tl.store(weight + i * 4 * P + j, u / total, begin + e < end)
        if step == 0:
            total = tl.where(total > EPS, total, float("inf")) if mode != "sum" else total * 0 + 1
    tl.store(top + i * P + p, best, p < P)
    tl.store(S + i * P + p, total, p < P)


def _rows_gpu(x: tl.tensor, rows: tl.tensor, C: int, P: int, C_: tl.constexpr, P_: tl.constexpr) -> None:
    """x [i,C,P] -> rows [i,P,C]. Grid: pixels, channels, i."""
    i = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * P_ + tl.arange(0, P_))[:, None]  # [P_, 1]
    c = tl.program_id(1) * C_ + tl.arange(0, C_)[None]  # [1, C_]
    inside = (p < P) & (c < C)
    tl.store(rows + (i * P + p) * C + c, tl.load(x + (i * C + c) * P + p, inside), inside)


def _gather_gpu(
    rows: tl.tensor, start: tl.tensor, source: tl.tensor, weight: tl.tensor, out: tl.tensor, C: int, P: int, n: int,
    C_: tl.constexpr, P_: tl.constexpr,
) -> None:  # fmt: skip
    """out[i,c,p] = sum over the list of p of weight * x[c,q], of x as rows [B,P,C]. Grid: pixels p, channels, N."""
    i = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * P_ + tl.arange(0, P_))[:, None]  # [P_, 1]
    c = tl.program_id(1) * C_ + tl.arange(0, C_)[None]  # [1, C_]
    begin, end = tl.load(start + i * P + p, p < P, 0), tl.load(start + i * P + p + 1, p < P, 0)
    rows, weight = rows + i // n * P * C, weight + i * 4 * P  # of this field
    total = tl.zeros((P_, C_), weight.dtype.element_ty)
    for e in range(tl.max(end - begin)):
        more = begin + e < end
        j = tl.load(source + begin + e, more, 0)
        w = tl.load(weight + j, more, 0.0)
        total += w * tl.load(rows + j // 4 * C + c, more & (c < C), 0.0).to(w.dtype)
    tl.store(out + (i * C + c) * P + p, total, (p < P) & (c < C))


def _back_gpu(
    g_rows: tl.tensor, rows: tl.tensor, index: tl.tensor, weight: tl.tensor, grad_x: tl.tensor, h: tl.tensor, C: int,
    P: int, n: int, C_: tl.constexpr, P_: tl.constexpr,
) -> None:  # fmt: skip
    """dL/dx [B,C,P], and each channel block's part of h = <g_p, x_q> [blocks,N,P,4]. Grid: pixels q, channels, B."""
    b = tl.program_id(2).to(tl.int64)
    q = (tl.program_id(0) * P_ + tl.arange(0, P_))[:, None]  # [P_, 1]
    c = tl.program_id(1) * C_ + tl.arange(0, C_)[None]  # [1, C_]
    h += tl.program_id(1).to(tl.int64) * tl.num_programs(2) * n * P * 4
    x_q = tl.load(rows + (b * P + q) * C + c, (q < P) & (c < C), 0.0).to(weight.dtype.element_ty)
    total = tl.zeros((P_, C_), weight.dtype.element_ty)
    for corner in range(n * 4):
        i = b * n + corner // 4
        j = (i * P + q) * 4 + corner % 4
        p, w = tl.load(index + j, q < P, P), tl.load(weight + j, q < P, 0.0)
        g_p = tl.load(g_rows + i * P * C + p * C + c, (p < P) & (c < C), 0.0).to(w.dtype)
        total += w * g_p
        tl.store(h + j, tl.sum(g_p * x_q, 1, keep_dims=True), q < P)
    tl.store(grad_x + (b * C + c) * P + q, total, (q < P) & (c < C))


def _mean_gpu(
    start: tl.tensor, source: tl.tensor, weight: tl.tensor, h: tl.tensor, mean: tl.tensor, P: int, P_: tl.constexpr
) -> None:
    """mean[p] = sum over the list of p of weight * h."""
    i, p = tl.program_id(1).to(tl.int64), tl.program_id(0) * P_ + tl.arange(0, P_)
    begin, end = tl.load(start + i * P + p, p < P, 0), tl.load(start + i * P + p + 1, p < P, 0)
    total = tl.zeros((P_,), h.dtype.element_ty)
    for e in range(tl.max(end - begin)):
        j = i * 4 * P + tl.load(source + begin + e, begin + e < end, 0)
        total += tl.load(weight + j, begin + e < end, 0.0) * tl.load(h + j, begin + e < end, 0.0)
    tl.store(mean + i * P + p, total, p < P)


def _back_corners_gpu(
    flow: tl.tensor, metric: tl.tensor, index: tl.tensor, h: tl.tensor, mean: tl.tensor, top: tl.tensor, S: tl.tensor,
    grad_flow: tl.tensor, grad_metric: tl.tensor, P: int, n: int, mode: tl.constexpr, P_: tl.constexpr,
) -> None:  # fmt: skip
    """dL/dF [N,2,P], and of dL/dmetric the part of each field [N,P]."""
    i, q = tl.program_id(1).to(tl.int64), tl.program_id(0) * P_ + tl.arange(0, P_)
    dx, dy = tl.load(flow + i * 2 * P + q, q < P, 0.0), tl.load(flow + i * 2 * P + P + q, q < P, 0.0)
    dx, dy = tl.where(tl.abs(dx) < float("inf"), dx, 0), tl.where(tl.abs(dy) < float("inf"), dy, 0)
    ax, ay = dx - tl.floor(dx), dy - tl.floor(dy)
    grad_dx, grad_dy, grad_m = tl.zeros_like(ax), tl.zeros_like(ax), tl.zeros_like(ax)
    for k in tl.static_range(4):
        j = (i * P + q) * 4 + k
        p = tl.load(index + j, q < P, P)
        slope = tl.load(h + j, p < P, 0.0)  # dL/du
        if mode != "sum":
            slope = (slope - tl.load(mean + i * P + p, p < P, 0.0)) / tl.load(S + i * P + p, p < P, 1.0)
        bx, by = (ax if k % 2 else 1 - ax), (ay if k // 2 else 1 - ay)
        if metric is not None:
            m = tl.load(metric + i // n * P + q, p < P, 0.0)
            if mode == "softmax":
                best = tl.load(top + i * P + p, p < P, 0.0)
                slope *= tl.exp(tl.minimum(m - best, 0.0))
                grad_m += tl.where(m <= best, slope * bx * by, 0)
            else:
                grad_m += slope * bx * by
                slope *= m
        grad_dx += slope * by * (2 * (k % 2) - 1)
        grad_dy += slope * bx * (2 * (k // 2) - 1)
    tl.store(grad_flow + i * 2 * P + q, grad_dx, q < P)
    tl.store(grad_flow + i * 2 * P + P + q, grad_dy, q < P)
    tl.store(grad_metric + i * P + q, grad_m, q < P)


@cache
def gpu(kernel: Callable) -> Callable:
    """Triton's kernel of a function above, compiled at its first launch."""
    global tl
    import triton
    from triton import language as tl

    return triton.jit(kernel)


def list_gpu(flow: Tensor, metric: Tensor | None, mode: str) -> tuple[Tensor, ...]:
    """What to gather: index and weight [N,P,4]; start [N P + 1] and source [4 N P], the lists; top and S [N,P]."""
    (N, _, H, W), P, n = flow.shape, flow[0, 0].numel(), 1 if metric is None else len(flow) // len(metric)
    corners, targets = (ceil(4 * P / CORNERS), N), (ceil(P / CORNERS), N)
    start = torch.zeros(N * P + 1, dtype=torch.int32, device=flow.device)
    (index, source), (place, filled) = start.new_empty(2, N, P, 4), start.new_empty(2, N, P, 4)
    share, weight, (top, S) = flow.new_empty(N, P, 4), flow.new_zeros(N, P, 4), flow.new_empty(2, N, P)
    gpu(_count_gpu)[corners](flow, metric, index, share, start, place, H, W, n, CORNERS)
    start = start.cumsum(0, dtype=torch.int32)
    gpu(_fill_gpu)[corners](index, start, place, filled, P, CORNERS)
    gpu(_order_gpu)[corners](index, start, place, filled, source, P, CORNERS)
    gpu(_weigh_gpu)[targets](metric, start, source, share, weight, top, S, P, n, mode, EPS, CORNERS)
    return index, weight, start, source, top, S


def rows_of(x: Tensor) -> Tensor:
    """[N,C,H,W] -> [N,P,C]: the channels of a pixel side by side, so that gathering reads memory in long pieces."""
    (N, C, H, W), (C_, P_, warps) = x.shape, ROWS
    rows = x.new_empty(N, H * W, C)
    gpu(_rows_gpu)[ceil(H * W / P_), ceil(C / C_), N](x.contiguous(), rows, C, H * W, C_, P_, num_warps=warps)
    return rows


class SplatGPU(torch.autograd.Function):
    """The whole formula on a GPU. With L the loss, g_p = dL/dW(p) and h_pq = <g_p, C(q)> = dL/dw_pq,

    dL/dC(q) = sum_p w_pq g_p                  dL/du_pq = (h_pq - sum_r w_pr h_pr) / S_p     (mode "sum": h_pq)
    dL/dF(q) = sum_p dL/du_pq z_q db_pq/dF(q)       dL/dmetric(q) = sum_p dL/du_pq b_pq dz_q/dmetric(q)

    where dz/dmetric is z (softmax: what it subtracts cancels) or 1 (linear). What is outside or in a hole adds nothing.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, flow: Tensor, metric: Tensor | None, mode: str) -> Tensor:
        (B, C, H, W), N, P, (C_, P_, warps) = x.shape, len(flow), x[0, 0].numel(), GATHER
        mode = "average" if metric is None and mode == "softmax" else mode
        flow, metric = flow.contiguous(), None if metric is None else metric.contiguous()
        with torch.cuda.device_of(x):
            rows, out = rows_of(x), x.new_empty(N, C, H, W)
            index, weight, start, source, top, S = list_gpu(flow, metric, mode)
            grid = (ceil(P / P_), ceil(C / C_), N)
            gpu(_gather_gpu)[grid](rows, start, source, weight, out, C, P, N // B, C_, P_, num_warps=warps)
        ctx.save_for_backward(rows, flow, metric, index, weight, start, source, top, S)
        ctx.mode = mode
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, flow, metric, index, weight, start, source, top, S = ctx.saved_tensors
        (N, C, H, W), (B, P, _), (C_, P_, warps) = g.shape, rows.shape, BACK
        (_, need_flow, need_metric, _), n, targets = ctx.needs_input_grad, N // B, (ceil(P / CORNERS), N)
        grad_x, h = g.new_empty(B, C, H, W), weight.new_empty(ceil(C / C_), N, P, 4)
        mean, grads = torch.empty_like(S), (torch.empty_like(flow), flow.new_empty(B, n, H, W))
        with torch.cuda.device_of(g):
            grid = (ceil(P / P_), ceil(C / C_), B)
            gpu(_back_gpu)[grid](rows_of(g), rows, index, weight, grad_x, h, C, P, n, C_, P_, num_warps=warps)
            if need_flow or need_metric:
                h = h.sum(0)
                gpu(_mean_gpu)[targets](start, source, weight, h, mean, P, CORNERS)
                gpu(_back_corners_gpu)[targets](flow, metric, index, h, mean, top, S, *grads, P, n, ctx.mode, CORNERS)
        return grad_x, grads[0], grads[1].sum(1, keepdim=True) if need_metric else None, None


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
             packages run; else, in a forked process and inside torch.func's transforms (grad, vmap), torch.

    A pixel with a non-finite flow vector or metric is dropped, alone, and its flow and metric get no gradient. At an
    integer vector the flow's gradient is one-sided, towards larger flow. Computes in float32 (float64 if x is), returns
    x's dtype. Raises ValueError with the argument's name and shape; ImportError if a named backend is not installed.
    """
    check(x, flow, metric, mode, backend)
    (B, C, H, W), n, dtype = x.shape, len(flow) // len(x), torch.promote_types(x.dtype, torch.float32)
    backend = choose_backend(x.device.type, dtype) if backend == "auto" else backend
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        flow, metric = flow.to(dtype), None if metric is None else metric.to(dtype)
        product = {"torch": splat_torch, "numba": SplatNumba.apply, "cuda": SplatGPU.apply}[backend]
        if backend != "torch" and torch.compiler.is_compiling():  # asked first: disable() takes a second to import
            product = torch.compiler.disable(product)
        if backend == "cuda":
            return product(x, flow, metric, mode)
        metric = None if metric is None else metric.repeat_interleave(n, 0)  # [N,1,H,W]
        out = product(x.to(dtype).flatten(2).contiguous(), *corners(flow, metric, mode))  # [B,C,P], [N,4,P] -> [N,C,P]
        return out.view(n * B, C, H, W).to(x.dtype)


def choose_backend(device: str, dtype: torch.dtype) -> str:
    """What "auto" means for a device type. torch's own operations go into any process and any transform."""
    if forked or torch._C._are_functorch_transforms_active():
        return "torch"
    if device == "cpu" and dtype == torch.float32 and importlib.util.find_spec("numba"):
        return "numba"
    if device != "cuda" or not importlib.util.find_spec("triton"):
        return "torch"
    with suppress(ImportError):  # where this file was copied out alone
        from kernels.probe import triton_runs

        return "cuda" if triton_runs() else "torch"
    return "cuda"


def check(x: Tensor, flow: Tensor, metric: Tensor | None, mode: str, backend: str) -> None:
    """Raise the ValueErrors of softsplat."""
    for name, value, known in (("mode", mode, MODES), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    for name, t in {"x": x, "flow": flow, "metric": x if metric is None else metric}.items():
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            raise ValueError(f"{name}: expected floating point, got {getattr(t, 'dtype', type(t).__name__)}")
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
    if backend in ("numba", "cuda") and (forked or torch._C._are_functorch_transforms_active()):
        raise ValueError(f"backend: {backend!r} cannot run in a forked process or in a transform of torch.func")
