"""splat.py against a plain Python loop over pixels, finite differences, and the properties that its docstring promises.

The GPU kernels run on a GPU where there is one; elsewhere in Triton's interpreter, if Triton is installed.
"""

import errno
import importlib.util
import math
import os
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from torch.autograd import forward_ad
from triton_here import why_not

import splat
from splat import softsplat

pytestmark = pytest.mark.gpu  # Triton asks for itself whether there is one
MODES = ["sum", "average", "linear", "softmax"]
CPU = ["torch", "numba"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def loop(x, flow, metric, mode):
    """Eq. 7, one pixel at a time, in double precision."""
    B, C, H, W = x.shape
    out = torch.zeros(len(flow), C, H, W, dtype=torch.float64)
    for i in range(len(flow)):
        b = i // (len(flow) // B)
        landed = {}  # target -> [(share, importance, features)]
        for r in range(H):
            for c in range(W):
                tx, ty = c + float(flow[i, 0, r, c]), r + float(flow[i, 1, r, c])
                if not (abs(tx) < 1e6 and abs(ty) < 1e6):
                    continue
                for ty_, tx_ in {(math.floor(ty) + j, math.floor(tx) + k) for j in (0, 1) for k in (0, 1)}:
                    share = max(0.0, 1 - abs(tx - tx_)) * max(0.0, 1 - abs(ty - ty_))
                    if share > 1e-7 and 0 <= tx_ < W and 0 <= ty_ < H:
                        m = 0.0 if metric is None else float(metric[b, 0, r, c])
                        landed.setdefault((ty_, tx_), []).append((share, m, x[b, :, r, c].double()))
        for (ty_, tx_), sources in landed.items():
            top = max(m for _, m, _ in sources)
            z = {"linear": lambda m: m, "softmax": lambda m, top=top: math.exp(m - top)}.get(mode, lambda m: 1.0)
            total = sum(s * z(m) for s, m, _ in sources)
            value = sum(s * z(m) * v for s, m, v in sources)
            out[i, :, ty_, tx_] = value if mode == "sum" else value / total
    return out


def case(B, n, C, H, W, scale, mode, dtype=torch.float32, device="cpu"):
    """Random x, flow, metric; the metric is what the mode takes."""
    x, flow = torch.randn(B, C, H, W, dtype=dtype), torch.randn(n * B, 2, H, W, dtype=dtype) * scale
    metric = {"linear": torch.rand(B, 1, H, W, dtype=dtype) + 0.2, "softmax": torch.randn(B, 1, H, W, dtype=dtype) * 3}
    metric = metric.get(mode)
    return x.to(device), flow.to(device), metric if metric is None else metric.to(device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", CPU)
def test_equals_the_loop(backend, mode):
    sizes = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 6), (1, 2, 9, 3, 11), (2, 1, 8, 1, 5)]  # B n C H W
    for size in sizes:
        for scale in (0.0, 0.8, 5.0, 1000.0):  # standing still, near, partly outside, all outside
            x, flow, metric = case(*size, scale, mode)
            got = softsplat(x, flow, metric, mode, backend)
            assert got.shape == (size[0] * size[1], *size[2:]) and got.dtype == torch.float32
            torch.testing.assert_close(got.double(), loop(x, flow, metric, mode), atol=2e-5, rtol=1e-5)
    x, flow, metric = case(2, 3, 5, 7, 6, 2.0, mode)
    got = softsplat(x, flow.round(), metric, mode, backend)
    torch.testing.assert_close(got.double(), loop(x, flow.round(), metric, mode), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", CPU)
def test_where_a_pixel_goes(backend):
    x, flow = torch.zeros(1, 1, 4, 5), torch.zeros(2, 2, 4, 5)
    x[0, 0, 1, 1] = 1
    flow[0, 0] = 2  # dx: to the right
    flow[1, 1] = 1.25  # dy: down
    out = softsplat(x, flow, mode="sum", backend=backend)
    assert out[0].nonzero().tolist() == [[0, 1, 3]]
    assert out[1, 0, :, 1].tolist() == [0, 0, 0.75, 0.25]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend, mode):
    x, flow, metric = case(2, 2, 5, 2, 3, 1.2, mode, torch.float64)
    flow = flow.floor() + 0.1 + 0.8 * torch.rand_like(flow)  # away from the kinks
    inputs = [t.requires_grad_() for t in (x, flow, metric) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, flow, metric=None: softsplat(x, flow, metric, mode, backend), inputs, atol=1e-7
    )


def test_gradients_of_the_backends_agree():
    x, flow, metric = case(2, 3, 11, 33, 37, 4.0, "softmax")
    g = torch.randn(6, 11, 33, 37)
    results = []
    for backend in CPU:
        inputs = [t.clone().requires_grad_() for t in (x, flow, metric)]
        results.append(torch.autograd.grad(softsplat(*inputs, backend=backend), inputs, g))
        for k in range(3):  # any one alone
            alone = [t.clone().requires_grad_(j == k) for j, t in enumerate((x, flow, metric))]
            one = torch.autograd.grad(softsplat(*alone, backend=backend), alone[k], g)[0]
            torch.testing.assert_close(one, results[-1][k])
    exact = [t.double().requires_grad_() for t in (x, flow, metric)]
    exact = torch.autograd.grad(softsplat(*exact, backend="torch"), exact, g.double())
    for result in results:
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(result, exact, strict=True))


@pytest.mark.parametrize("backend", CPU)
def test_gradient_at_integer_flow_is_the_one_sided_one(backend):
    x, flow, _ = case(1, 1, 3, 4, 5, 0.0, "sum", torch.float64)
    g = torch.randn_like(x)
    flow.requires_grad_()
    (got,) = torch.autograd.grad(softsplat(x, flow, mode="sum", backend=backend), flow, g)
    for axis, r, c in [(0, 1, 2), (1, 2, 2), (0, 3, 4)]:
        step = torch.zeros_like(flow)
        step[0, axis, r, c] = 1e-6
        moved, still = (softsplat(x, f.detach(), mode="sum", backend=backend) for f in (flow + step, flow))
        assert abs(((moved - still) * g).sum() / 1e-6 - got[0, axis, r, c]) < 1e-6


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(backend, dtype):
    x, flow, metric = case(2, 2, 3, 6, 5, 1.0, "softmax")
    x = x.to(dtype).requires_grad_()
    got = softsplat(x, flow, metric, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, softsplat(x.float(), flow, metric, backend=backend).to(dtype))  # float32 inside
    got.float().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = softsplat(x.detach().float(), flow, metric, backend=backend)
    assert torch.equal(full, softsplat(x.detach().float(), flow, metric, backend=backend))


@pytest.mark.parametrize("backend", CPU)
def test_softmax_is_shift_invariant_and_has_no_underflow(backend):
    x, flow, _ = case(2, 2, 3, 9, 8, 1.5, "softmax")
    metric = torch.randint(-16, 16, (2, 1, 9, 8)) / 8.0  # exact beside 1e4 in float32
    torch.testing.assert_close(
        softsplat(x, flow, metric + 1e4, backend=backend), softsplat(x, flow, metric, backend=backend)
    )
    assert torch.equal(softsplat(x, flow, backend=backend), softsplat(x, flow, None, "average", backend))
    steep = torch.arange(72.0).flip(0).view(1, 1, 9, 8).expand(2, -1, -1, -1) * 200
    still = softsplat(x, torch.zeros_like(flow), steep, backend=backend)  # the neighbour wins, but does not get here
    assert torch.equal(still, x.repeat_interleave(2, 0))
    covered = softsplat(torch.ones_like(x), flow, mode="sum", backend=backend) > 1e-6
    for wild in (torch.rand(2, 1, 9, 8) * 400 - 200, torch.randn(2, 1, 9, 8) * 1e30):
        wild.requires_grad_()
        out = softsplat(torch.ones_like(x), flow.requires_grad_(), wild, backend=backend)
        assert torch.allclose(out[covered], torch.ones(())) and out.isfinite().all()
        out.square().sum().backward()
        assert wild.grad.isfinite().all() and flow.grad.isfinite().all()


@pytest.mark.parametrize("backend", CPU)
def test_a_nearer_pixel_wins(backend):
    x, flow = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.zeros(1, 2, 1, 3)
    flow[0, 0, 0, 0] = 2  # pixel 0 onto pixel 2
    out = softsplat(x, flow, torch.tensor([[[[50.0, 0.0, 0.0]]]]), backend=backend)
    assert out.flatten().tolist() == [0, 2, 1]  # a hole, itself, the one in front


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("mode", ["average", "linear", "softmax"])
def test_a_normalised_value_is_a_mean_of_its_inputs(backend, mode):
    _, flow, metric = case(1, 3, 2, 12, 10, 3.0, mode)
    x = torch.full((1, 2, 12, 10), 3.25)
    out = softsplat(x, flow, metric, mode, backend)
    hole = loop(x, flow, metric, mode) == 0
    assert hole.any() and not hole.all()
    assert (out[hole] == 0).all()
    torch.testing.assert_close(out[~hole], torch.full_like(out[~hole], 3.25))
    noise = torch.rand_like(x)
    mean = softsplat(noise, flow, metric, mode, backend)[~hole]
    assert mean.min() >= noise.min() - 1e-6 and mean.max() <= noise.max() + 1e-6


@pytest.mark.parametrize("backend", CPU)
def test_sum_conserves_mass_inside_the_frame(backend):
    x, flow = torch.rand(2, 3, 9, 9), torch.rand(4, 2, 9, 9) * 2 - 1
    x[:, :, [0, -1]] = 0
    x[..., [0, -1]] = 0  # so that a step of less than one pixel stays inside
    out = softsplat(x, flow, mode="sum", backend=backend)
    torch.testing.assert_close(out.sum((2, 3)), x.sum((2, 3)).repeat_interleave(2, 0))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("mode", MODES)
def test_a_non_finite_vector_drops_that_pixel_only(backend, mode):
    x, flow, metric = case(1, 2, 3, 6, 7, 1.0, mode)
    away = flow.clone()
    for (i, axis, r, c), bad in zip([(0, 0, 2, 3), (0, 1, 4, 4), (1, 0, 0, 0)], [NAN, INF, -INF], strict=True):
        flow[i, axis, r, c] = bad
        away[i, :, r, c] = 1e30  # the same as leaving the frame
    expect = softsplat(x, away, metric, mode, backend)
    inputs = [t.requires_grad_() for t in (x, flow, metric) if t is not None]
    out = softsplat(x, flow, metric, mode, backend)
    assert torch.equal(out, expect) and out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][~flow.isfinite()] == 0).all() and (grads[1] != 0).any()
    if metric is not None:
        broken = metric.detach().clone()
        broken[0, 0, 1, 1] = -INF if mode == "softmax" else NAN
        dropped = away.clone()
        dropped[:, :, 1, 1] = 1e30
        got = softsplat(x, away, broken, mode, backend)
        assert torch.equal(got, softsplat(x, dropped, metric, mode, backend))


@pytest.mark.parametrize("backend", CPU)
def test_linear_with_a_weight_of_zero_or_less(backend):
    x, flow = torch.ones(1, 1, 1, 3), torch.zeros(1, 2, 1, 3)
    out = softsplat(x, flow, torch.tensor([[[[0.0, -1.0, 2.0]]]]), "linear", backend)
    assert out.flatten().tolist() == [0, 0, 1]  # holes, as documented


def test_numba_result_does_not_depend_on_threads():
    x, flow, metric = case(2, 3, 13, 40, 50, 5.0, "softmax")
    g, results = torch.randn(6, 13, 40, 50), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = [t.clone().requires_grad_() for t in (x, flow, metric)]
        out = softsplat(*inputs, backend="numba")
        results.append((out, *torch.autograd.grad(out, inputs, g)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_strides_and_auto():
    x, flow, metric = case(2, 2, 6, 5, 4, 1.0, "softmax")
    sideways = x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = flow[:1].expand(4, -1, -1, -1)
    expect = softsplat(x, wide.contiguous(), metric, backend="numba")
    assert torch.equal(softsplat(sideways, wide, metric), expect)  # auto is numba here
    double = softsplat(x.double(), wide.double(), metric.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, expect.double(), atol=1e-5, rtol=1e-5)
    x.requires_grad_()
    softsplat(x, wide, metric).sum().backward()  # a gradient with stride 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "max"}, "mode.*'max'"),
        ({"backend": "metal"}, "backend.*'metal'"),
        ({"x": torch.zeros(3, 4, 5)}, r"x: .*\[3, 4, 5\]"),
        ({"x": torch.zeros(2, 0, 4, 5)}, r"x: .*\[2, 0, 4, 5\]"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, "x: .*int32"),
        ({"flow": torch.zeros(3, 2, 4, 5)}, r"flow: .*\[n\*2,2,4,5\].*\[3, 2, 4, 5\]"),
        ({"flow": torch.zeros(0, 2, 4, 5)}, r"flow: .*\[0, 2, 4, 5\]"),
        ({"flow": torch.zeros(2, 3, 4, 5)}, r"flow: .*\[2, 3, 4, 5\]"),
        ({"flow": torch.zeros(2, 2, 5, 4)}, r"flow: .*\[2, 2, 5, 4\]"),
        ({"flow": torch.zeros(2, 2, 4, 5, dtype=torch.int64)}, "flow: .*int64"),
        ({"metric": torch.zeros(4, 1, 4, 5)}, r"metric: .*\[2,1,4,5\].*\[4, 1, 4, 5\]"),
        ({"metric": torch.zeros(2, 1, 4, 5, device="meta")}, "metric: on meta"),
        ({"metric": None, "mode": "linear"}, "metric: mode 'linear' needs"),
        ({"mode": "sum"}, "metric: mode 'sum' takes none"),
        ({"mode": "average"}, "metric: mode 'average' takes none"),
        ({"backend": "cuda"}, r"backend: 'cuda' cannot run on cpu.*\[2, 3, 4, 5\]"),
    ],
)
def test_mistakes(change, message):
    good = {"x": torch.zeros(2, 3, 4, 5), "flow": torch.zeros(6, 2, 4, 5), "metric": torch.zeros(2, 1, 4, 5)}
    softsplat(**good)
    with pytest.raises(ValueError, match=message):
        softsplat(**(good | change))


def test_numba_leaves_the_number_of_threads_of_torch():
    """Numba sets OpenMP's number of threads, which is torch's too: it must be what it was."""
    softsplat(torch.rand(1, 2, 5, 6), torch.rand(1, 2, 5, 6), mode="sum", backend="numba")
    assert torch.get_num_threads() == 1  # as one_thread said


# --- Where it runs: transforms of torch.func, a forked child, a machine that keeps no compiled code


@pytest.mark.parametrize("mode", MODES)
def test_transforms_of_torch_func_against_the_loop(mode):
    """Odd sizes, more than one in a batch: derivatives along a direction, and each sample's own gradient."""
    x, flow, metric = case(2, 3, 2, 5, 3, 1.5, mode, torch.float64)
    flow = flow.floor() + 0.1 + 0.8 * torch.rand_like(flow)  # away from the kinks
    told = [t for t in (x, flow, metric) if t is not None]
    every = tuple(range(len(told)))

    def formula(*told, plain=softsplat):
        return plain(*told[:2], None if metric is None else told[2], mode).square().sum()

    along = [torch.randn_like(t) * 1e-4 for t in told]
    ends = [formula(*(t + s * d for t, d in zip(told, along, strict=True)), plain=loop) for s in (1, -1)]
    gradients = torch.func.grad(formula, every)(*told)
    change = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
    for found in (change, torch.func.jvp(formula, tuple(told), tuple(along))[1]):
        torch.testing.assert_close(found, (ends[0] - ends[1]) / 2, rtol=1e-5, atol=0)
    several = [torch.stack([t, t * 0.5]) for t in told]
    values, apart = torch.func.vmap(formula)(*several), torch.func.vmap(torch.func.grad(formula, every))(*several)
    for i in range(2):
        one = [t[i].clone().requires_grad_() for t in several]
        torch.testing.assert_close(values[i], formula(*one, plain=loop))
        for a, b in zip(apart, torch.autograd.grad(formula(*one), one), strict=True):
            torch.testing.assert_close(a[i], b)
    for k in every:  # one of them alone has a dimension more
        of_one = torch.func.vmap(formula, tuple(0 if j == k else None for j in every))
        mixed = [several[j] if j == k else told[j] for j in every]
        torch.testing.assert_close(of_one(*mixed)[0], values[0])


def test_what_cannot_be_transformed_is_refused():
    x, flow, _ = case(1, 1, 2, 3, 5, 1.0, "sum")

    def of_numba(x):
        return softsplat(x, flow, backend="numba").sum()

    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(ValueError, match="backend: 'numba' cannot run .* in a transform of torch.func"):
            transform(of_numba)(x[None] if transform is torch.func.vmap else x)
    with pytest.raises(NotImplementedError, match="jvp"), forward_ad.dual_level():  # torch's, not a missing derivative
        softsplat(forward_ad.make_dual(x, x), flow)


def test_a_forked_child_splats_too():
    """After its parent has: the pool of threads that Numba started there would end the child."""
    x, flow, metric = case(2, 3, 4, 9, 7, 2.0, "softmax")
    expect = softsplat(x, flow, metric, backend="numba")
    child = os.fork()
    if not child:
        code = 1
        try:
            inside = x.clone().requires_grad_()
            if not torch.cuda.is_initialized():  # torch has no backward pass in a child of a process that used a GPU
                softsplat(inside, flow, metric).sum().backward()
                assert inside.grad.isfinite().all()
            torch.testing.assert_close(softsplat(x, flow, metric), expect)
            with pytest.raises(ValueError, match="backend: 'numba' cannot run in a forked process"):
                softsplat(x, flow, metric, backend="numba")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(softsplat(x, flow, metric, backend="auto"), expect)  # here it is numba still


def add_one(numbers):
    numbers += 1


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_numba_compiles_where_nothing_can_be_kept(monkeypatch):
    """A read-only install of a user without a home; and a disk that fills while the machine code is written."""
    nowhere = {"CacheImpl._locator_classes": []}
    no_room = {"IndexDataCacheFile.load": lambda *_: None, "IndexDataCacheFile.save": full}
    for setting in (nowhere, no_room):
        with monkeypatch.context() as patch:
            for name, value in setting.items():
                patch.setattr(f"numba.core.caching.{name}", value)
            assert len(splat.numba_kernels.__wrapped__()) == 4  # raised RuntimeError: no locator available
            patch.setattr(splat, "_gather", add_one)
            _, count, *_ = splat.numba_kernels.__wrapped__()
            numbers = torch.zeros(3)
            count(numbers)
            assert numbers.tolist() == [1, 1, 1]  # once: what failed was to keep the code


# --- The GPU's kernels, against the torch backend


@pytest.fixture
def on_gpu(monkeypatch):
    """Compares the "cuda" backend with "torch", in the result and all gradients; without a GPU it is interpreted."""
    if reason := why_not():
        pytest.skip(reason)
    if DEVICE == "cpu":
        monkeypatch.setattr(splat, "check", lambda *_: None)  # would refuse the CPU
        for name in ("ROWS", "GATHER", "BACK"):
            monkeypatch.setattr(splat, name, (16, 32, 1))  # the interpreter likes few large blocks

    def results(x, flow, metric, mode, tolerance=1e-11):
        found, g = [], torch.randn(len(flow), *x.shape[1:], device=DEVICE).to(x.dtype)
        for backend in ("torch", "cuda"):
            leaves = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in (x, flow, metric)]
            out = softsplat(*leaves, mode, backend)
            found.append([out, *torch.autograd.grad(out, [t for t in leaves if t is not None], g)])
        torch.testing.assert_close(found[1][0], found[0][0], atol=tolerance, rtol=tolerance)
        for expect, got in zip(*found, strict=True):
            assert got.isfinite().all() and got.dtype == expect.dtype and got.shape == expect.shape
            assert (got - expect).norm() <= tolerance * (expect.norm() + 1)
        return found[1]

    return results


@pytest.mark.parametrize("mode", MODES)
def test_gpu_equals_torch(on_gpu, mode):
    for size in [(2, 3, 19, 5, 7), (3, 1, 2, 4, 5), (1, 2, 1, 1, 1), (1, 2, 3, 1, 6)]:  # B n C H W
        on_gpu(*case(*size, 2.0, mode, torch.float64), mode)
    x, flow, metric = case(2, 2, 3, 6, 5, 1.5, mode, torch.float64)
    on_gpu(x, flow.round(), metric, mode)  # one-sided gradients
    on_gpu(x, torch.full_like(flow, 40.0), metric, mode)  # all leave
    on_gpu(x.float(), flow.float(), None if metric is None else metric.float(), mode, 1e-5)
    if mode == "softmax":
        on_gpu(x, flow, None, mode)


@pytest.mark.parametrize("mode", MODES)
def test_gpu_when_all_land_on_one_target(on_gpu, mode):
    x, flow, metric = case(1, 2, 3, 6, 7, 0.0, mode, torch.float64)
    flow[:, 0] = 3.3 - torch.arange(7.0)
    flow[:, 1] = 2.2 - torch.arange(6.0)[:, None]
    out = on_gpu(x, flow, metric, mode)[0]
    assert ((out != 0).sum((2, 3)) == 4).all()


@pytest.mark.parametrize("mode", MODES)
def test_gpu_drops_what_is_not_finite(on_gpu, mode):
    x, flow, metric = case(2, 2, 3, 6, 7, 1.0, mode, torch.float64)
    dropped = torch.zeros(4, 6, 7, dtype=torch.bool)
    for i, axis, r, c, bad in [(0, 0, 2, 3, NAN), (1, 1, 4, 4, INF), (3, 0, 0, 0, -INF), (2, 1, 3, 3, 1e30)]:
        flow[i, axis, r, c] = bad
        dropped[i, r, c] = True
    if metric is not None:
        metric[0, 0, 1, 1], metric[1, 0, 5, 2], metric[1, 0, 0, 3] = NAN, -INF, INF
        dropped[:2, 1, 1] = dropped[2:, 5, 2] = dropped[2:, 0, 3] = True
    _, _, grad_flow, *grad_metric = on_gpu(x, flow, metric, mode)
    assert (grad_flow.cpu()[dropped[:, None].expand(-1, 2, -1, -1)] == 0).all() and (grad_flow != 0).any()
    assert all((g.cpu()[~metric.isfinite()] == 0).all() for g in grad_metric)


def test_gpu_where_weights_are_tiny(on_gpu):
    """Holes, a negative weight, metrics that would overflow, and shares too small to set the largest metric."""
    x, flow, metric = case(1, 2, 3, 6, 7, 1.0, "softmax", torch.float64)
    for size in (1e30, 300.0):
        on_gpu(x, flow, metric * size, "softmax")
    on_gpu(x, flow.round() + 1e-9 * torch.rand_like(flow), metric * 100, "softmax")
    still = 1e-8 * torch.ones_like(flow)
    still[:, :, 2, 3] = 5.0  # leaves a hole, into which the neighbours put shares of 1e-8
    for mode in ("average", "softmax"):
        out = on_gpu(x, still, metric if mode == "softmax" else None, mode)[0]
        assert (out[:, :, 2, 3] == 0).all() and (out[:, :, 2, 2] != 0).all()
    on_gpu(x, flow, torch.randn(1, 1, 6, 7, dtype=torch.float64).clamp(min=-0.1), "linear")
    on_gpu(x, flow, torch.zeros(1, 1, 6, 7, dtype=torch.float64), "linear")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_gpu_half_precision(on_gpu, dtype, tolerance):
    x, flow, metric = case(2, 2, 5, 6, 5, 1.0, "softmax")
    out, grad_x, grad_flow, _ = on_gpu(x.to(dtype), flow, metric, "softmax", tolerance)  # the last digit
    assert out.dtype == grad_x.dtype == dtype and grad_flow.dtype == torch.float32
    on_gpu(x, flow.to(dtype), metric.to(dtype), "softmax", tolerance)


def test_gpu_strides_and_gradients_of_some_inputs_only(on_gpu):
    x, flow, metric = (t.to(DEVICE) for t in case(2, 2, 6, 5, 4, 1.0, "softmax", torch.float64))
    sideways = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, flow[:1].expand(4, -1, -1, -1), metric)]
    sideways[1] = flow[:1].expand(4, -1, -1, -1)
    full = on_gpu(*sideways, "softmax")
    plain = [t.contiguous() for t in sideways]
    g = torch.randn(4, 6, 5, 4, device=DEVICE, dtype=torch.float64).transpose(2, 3).contiguous().transpose(2, 3)
    leaves = [t.clone().requires_grad_() for t in plain]
    together = torch.autograd.grad(softsplat(*leaves, backend="torch"), leaves, g)
    for k in range(3):
        alone = [t.clone().requires_grad_(j == k) for j, t in enumerate(plain)]
        out = softsplat(*alone, backend="cuda")
        torch.testing.assert_close(out, full[0])
        torch.testing.assert_close(torch.autograd.grad(out, alone[k], g)[0], together[k])
    with torch.no_grad():
        assert torch.equal(softsplat(*plain, backend="cuda"), full[0])


def test_gpu_lists_are_sorted(on_gpu):
    """Atomic counters fill them in any order; sums must not depend on it."""
    _, flow, metric = case(1, 2, 1, 6, 7, 1.0, "softmax", device=DEVICE)
    index, _, start, source, _, _ = splat.list_gpu(flow, metric, "softmax")
    bounds, shuffled, again = start.tolist(), source.flatten().clone(), torch.zeros_like(source)
    lists = list(pairwise(bounds))
    assert max(b - a for a, b in lists) > 5 and bounds[-1] == len(source.flatten()) - (index == 42).sum()
    for a, b in lists:
        assert source.flatten()[a:b].tolist() == sorted(source.flatten()[a:b].tolist())
        shuffled[a:b] = shuffled[a:b].flip(0)
    listed = torch.where(index == 42, -1, 0)
    splat.gpu(splat._order_gpu)[2, 2](index, start, listed, shuffled, again, 42, splat.CORNERS)
    assert torch.equal(again.flatten()[: bounds[-1]], source.flatten()[: bounds[-1]])


def test_the_file_can_be_copied_out_alone(monkeypatch, tmp_path):
    """Without the rest of this repository, "auto" asks for Triton itself."""
    shutil.copy(splat.__file__, tmp_path / "lone.py")
    spec = importlib.util.spec_from_file_location("lone", tmp_path / "lone.py")
    lone = importlib.util.module_from_spec(spec)
    for name in ("kernels", "kernels.probe", "sources"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    spec.loader.exec_module(lone)
    for found, backend in ((True, "cuda"), (None, "torch")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert lone.choose_backend("cuda", torch.float32) == backend
    x, flow, metric = case(1, 2, 3, 4, 5, 1.0, "softmax")
    assert torch.equal(lone.softsplat(x, flow, metric, backend="torch"), softsplat(x, flow, metric, backend="torch"))


def test_gpu_kernels_are_left_alone_by_the_compiler(on_gpu):
    x, flow, metric = (t.to(DEVICE) for t in case(1, 2, 3, 4, 5, 1.0, "softmax"))
    compiled = torch.compile(lambda x: softsplat(x * 2, flow, metric, backend="cuda"), backend="aot_eager")
    torch.testing.assert_close(compiled(x), softsplat(x * 2, flow, metric, backend="torch"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_gpu_equals_cpu(mode):
    """In double precision; in single, what lands in small shares alone has a gradient of differences of rounding."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        x, flow, metric = case(2, 3, 37, 33, 65, 4.0, mode, dtype)
        results = []
        for device in ("cpu", "cuda"):
            inputs = [t.detach().to(device).requires_grad_() for t in (x, flow, metric) if t is not None]
            out = softsplat(*inputs[:2], inputs[2] if metric is not None else None, mode)
            grads = torch.autograd.grad(out.square().sum(), inputs) if dtype == torch.float64 else ()
            results.append([t.cpu() for t in (out, *grads)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
