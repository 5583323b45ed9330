"""splat.py against a plain Python loop over pixels, finite differences, and the properties that its docstring promises.

The GPU kernels run on a GPU where there is one; elsewhere in Triton's interpreter, if Triton is installed.
"""

import importlib.util
import math
import os

import pytest
import torch

import splat
from splat import softsplat

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: its kernels then run on NumPy

MODES = ["sum", "average", "linear", "softmax"]
CPU = ["torch", "numba"]
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_kernels(dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU they are interpreted
    for size in [(2, 3, 5, 7, 9), (1, 2, 11, 12, 13), (1, 1, 1, 1, 1)]:
        x, flow, metric = case(*size, 3.0, "softmax", dtype, device)
        flow[0, 0, 0, 0] = NAN
        index, weight = splat.corners(flow, metric.repeat_interleave(size[1], 0), "softmax")
        x, weight = x.flatten(2).requires_grad_(), weight.detach().requires_grad_()
        expect = splat.splat_torch(x, index, weight)
        got = splat.Splat.apply(x, index.int(), weight, splat.triton_kernels())
        torch.testing.assert_close(got, expect)
        g = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight), g) for y in (got, expect)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


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
