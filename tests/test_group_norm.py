"""kernels/group_norm.py against torch's group_norm and SiLU in double precision, and svd.py through both.

On a GPU where there is one; elsewhere in Triton's interpreter, if Triton is installed.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint
from triton_here import why_not

import svd
from kernels import group_norm as module
from kernels import probe
from kernels.group_norm import group_norm, split, usable
from splat import choose_backend

pytestmark = pytest.mark.gpu
needs_triton = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
SINGLE, BF16, FP16 = (torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)  # ... and the last digit


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch):
    """Blocks of few values, so that small features need several of every kind, with some rows and channels left."""
    for name, value in {"ROWS": 4, "CHANNELS": 8, "BLOCKS": 6, "PARTS": 16}.items():
        monkeypatch.setattr(module, name, value)


def case(N, S, C, dtype=torch.float32, weights=None, offset=0.0):
    """Random x, weight, bias, and the gradient of the result."""
    x, weight, bias, g = torch.randn(N, S, C) + offset, torch.randn(C) + 0.5, torch.randn(C), torch.randn(N, S, C)
    weights = weights or dtype
    return [t.to(DEVICE, kind) for t, kind in ((x, dtype), (weight, weights), (bias, weights), (g, dtype))]


def expected(x, groups, weight, bias, g, silu):
    """Result and gradients in double precision, by torch."""
    x, weight, bias = (t.detach().cpu().double().requires_grad_() for t in (x, weight, bias))
    y = nnf.group_norm(x.mT, groups, weight, bias, EPS).mT
    y = nnf.silu(y) if silu else y
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), g.cpu().double())


def given(x, groups, weight, bias, g, silu):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = group_norm(x, groups, weight, bias, EPS, silu)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), g.to(y.dtype))


def check(x, groups, weight, bias, g, silu, tolerance, dtype=None):
    """A result is off by `tolerance` of the largest value there is."""
    values = given(x, groups, weight, bias, g, silu)
    for value, true, like in zip(values, expected(x, groups, weight, bias, g, silu), (g, x, weight, bias), strict=True):
        assert value.shape == true.shape and value.dtype == (dtype if like is g and dtype else like.dtype)
        assert (value.cpu().double() - true).abs().max() <= tolerance * max(1, true.abs().max())
    return values


@needs_triton
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("N", "S", "C", "groups"),
    [(3, 37, 12, 4), (2, 45, 40, 4), (1, 41, 60, 2), (2, 1, 16, 2), (5, 8, 8, 8), (1, 4, 7, 1), (2, 66, 24, 3)],
)
def test_equals_torch(small, N, S, C, groups, silu):
    x, weight, bias, g = case(N, S, C)
    check(x, groups, weight, bias, g, silu, SINGLE[1])


@needs_triton
def test_blocks_of_the_real_size():
    x, weight, bias, g = case(2, 301, 80)
    check(x, 2, weight, bias, g, True, SINGLE[1])


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, for rows past the last
@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_a_large_mean_costs_no_digits(small, offset):
    """Squares of 1000 in float32 are good to 0.06, and the variance is 1."""
    x, weight, bias, g = case(2, 67, 24, offset=offset)
    check(x, 2, weight, bias, g, True, 5e-4)  # 1000 itself is good to 0.00006


@needs_triton
def test_channels_of_a_group_far_apart(small):
    x, weight, bias, g = case(2, 50, 24)
    x += 300 * torch.arange(24, device=DEVICE)
    check(x, 2, weight, bias, g, False, 1e-5)


@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [BF16, FP16])
@pytest.mark.parametrize("weights", [None, torch.float32])
def test_half_precision(small, dtype, tolerance, weights):
    x, weight, bias, g = case(2, 29, 30, dtype, weights)
    check(x, 3, weight, bias, g, True, tolerance)


@needs_triton
def test_float32_features_with_weights_in_half(small):
    x, weight, bias, g = case(2, 29, 30, torch.float32, torch.bfloat16)
    check(x, 3, weight, bias, g, True, BF16[1])


@needs_triton
def test_autocast_sets_the_dtype_of_the_result(small, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    x, weight, bias, g = case(2, 29, 30)
    check(x, 3, weight, bias, g, True, FP16[1], torch.float16)


@needs_triton
def test_gradients_of_some_inputs_only(small):
    x, weight, bias, g = case(2, 5, 12)
    full = given(x, 3, weight, bias, g, True)[1:]
    for wanted in range(1, 8):
        inputs = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, weight, bias))]
        group_norm(inputs[0], 3, inputs[1], inputs[2], EPS, True).backward(g)
        for i, (t, grad) in enumerate(zip(inputs, full, strict=True)):
            assert torch.equal(t.grad, grad) if wanted >> i & 1 else t.grad is None
    assert not group_norm(x, 3, weight, bias, EPS).requires_grad


@needs_triton
def test_strides(small):
    """Features and gradients that lie in another order in memory."""
    x, weight, bias, g = case(2, 21, 12)
    straight = given(x, 3, weight, bias, g, True)
    turned = given(x.mT.contiguous().mT, 3, weight, bias, g.mT.contiguous().mT, True)
    assert all(map(torch.equal, straight, turned))


@needs_triton
def test_gradient_checkpointing(small):
    x, weight, bias, g = case(2, 21, 12)
    straight = given(x, 3, weight, bias, g, True)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = checkpoint(group_norm, x, 3, weight, bias, EPS, True, use_reentrant=False)
    y.backward(g)
    assert all(map(torch.equal, (y, x.grad, weight.grad, bias.grad), straight))


@pytest.mark.parametrize(
    "shape",
    [(14, 2880, 320), (1, 40320, 320), (1, 129024, 320), (1024, 128, 112), (64, 2048, 112), (14, 45, 1280)]
    + [(1, 1, 1), (2, 33, 8), (3, 100000, 64)],
)
def test_blocks_take_all_rows_and_fill_a_gpu(shape):
    (N, S, C), (rows, (columns, blocks, samples)) = shape, split(*shape)
    assert rows % module.ROWS == 0 and rows * (blocks - 1) < S <= rows * blocks
    assert columns * module.CHANNELS >= C and samples == N
    tiles = columns * -(-S // module.ROWS) * N
    assert columns * blocks * samples >= min(tiles, module.BLOCKS // 2)


# ------------------------------------------------------------------------------------------------------------- svd.py


@pytest.fixture
def both(small, monkeypatch):
    """Calls a function through torch's layers and through the kernels, and says whether the latter ran."""
    calls, real = [], svd.group_norm_gpu

    def counted(*args):
        calls.append(args[0].shape)
        return real(*args)

    monkeypatch.setattr(svd, "group_norm_gpu", counted)

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(svd, "usable", lambda x: False)
            plain = function()
            assert not calls
            patch.setattr(svd, "usable", lambda x: True)
            return plain, function(), calls

    return call


def gradients(module, *inputs):
    """The result of a module, and the gradients of its inputs and parameters."""
    inputs, parameters = [t.detach().requires_grad_() for t in inputs], list(module.parameters())
    y = module(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [*inputs, *parameters])]


@needs_triton
@pytest.mark.parametrize("over_time", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_normalize_on_both_paths(both, over_time, silu):
    norm, x = svd.group_norm(24, 8, 0.1).to(DEVICE), torch.randn(2, 3, 4, 5, 24, device=DEVICE) + 2
    plain, kernel, calls = both(lambda: svd.normalize(norm, x, over_time, silu))
    assert calls == [(2, 60, 24) if over_time else (6, 20, 24)]
    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)


@needs_triton
def test_residual_blocks_on_both_paths(both):
    x, emb = torch.randn(2, 3, 2, 3, 24, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    space = svd.ResBlock(24, 16, 6, 1e-5, 8).to(DEVICE)
    time = svd.TemporalResBlock(24, 6, 1e-5, 8).to(DEVICE)
    plain, kernel, calls = both(lambda: gradients(space, x, emb) + gradients(time, x, emb))
    assert calls == [(6, 6, 24), (6, 6, 16), (2, 18, 24), (2, 18, 24)]
    for value, true in zip(kernel, plain, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-3, atol=1e-3 if DEVICE == "cuda" else 1e-4)  # cuda: TF32


def test_on_a_cpu_all_is_as_torch_does_it():
    norm, x = svd.group_norm(24, 8, 0.1), torch.randn(2, 3, 4, 5, 24)
    y = norm(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).reshape(x.shape)
    assert torch.equal(svd.normalize(norm, x), y) and torch.equal(svd.normalize(norm, x, silu=True), nnf.silu(y))
    assert not usable(x) and not usable(x.to("meta"))


class OnGPU:
    def __init__(self, dtype):
        self.dtype, self.is_cuda = dtype, True


def test_kernels_take_what_is_on_a_gpu_but_not_all_of_it(monkeypatch):
    monkeypatch.setattr(module, "triton_runs", lambda: True)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert [usable(OnGPU(kind)) for kind in kinds] == [True, True, True, False]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not usable(OnGPU(torch.float32))
    monkeypatch.setattr(module, "triton_runs", lambda: False)
    assert not usable(OnGPU(torch.float32))


OLD = (7, 5), "compute capability 7.5, 8.0 is needed"


@pytest.mark.parametrize(("capability", "reason"), [OLD, ((9, 0), "")])
def test_where_triton_does_not_run_that_is_one_line_and_torch_works(monkeypatch, capsys, capability, reason):
    """An old card; and a new one of which the kernel cannot be built (here: on a device that is not there)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: True)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(language=None, jit=None))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    probe.build.cache_clear()
    try:
        assert not probe.triton_runs() and not probe.triton_runs() and choose_backend("cuda", torch.float32) == "torch"
    finally:
        probe.build.cache_clear()
    told = capsys.readouterr().err.splitlines()
    assert told == [f"Triton does not run here, torch does its work: {reason or 'no compiler'}"]
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    assert not probe.triton_runs() and capsys.readouterr().err == ""
    probe.build.cache_clear()


@pytest.mark.filterwarnings("error:Dynamo detected a call")  # of a cached function
def test_the_compiler_sees_through_the_question():
    """It makes kernels of its own, and of a whole network: no break at a normalisation, and no warning."""
    ask = torch.compile(lambda x: x + usable(OnGPU(torch.float32)), backend="eager", fullgraph=True)
    assert ask(torch.zeros(1)) == 0
