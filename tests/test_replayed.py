"""What is recorded and replayed is what the function computes. A CPU has no CUDA graphs: here one notes every operation
of torch with the tensors that it read and wrote, and a replay does them again, in the same places."""

from contextlib import contextmanager
from weakref import WeakSet

import pytest
import torch
from tiny import tiny_stage, tiny_tower, tiny_vae
from torch.utils._python_dispatch import TorchDispatchMode

import motion_dreamer as md
import svd
from kernels import replayed

# What a GPU refuses while it records: to wait for a number, to fetch one from the CPU.
REFUSED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)


class Graph(TorchDispatchMode):
    replays, living = 0, WeakSet()

    def __init__(self):
        super().__init__()
        self.operations = []
        Graph.living.add(self)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in REFUSED:
            raise RuntimeError(f"{operation} is not permitted\nwhile a stream is capturing")
        made = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, made))
        return made

    def replay(self):
        Graph.replays += 1
        for operation, args, kwargs, made in self.operations:
            again = operation(*args, **kwargs)
            for place, value in zip(tensors(made), tensors(again), strict=True):
                if place.numel() and place.data_ptr() != value.data_ptr():  # neither a view nor in place
                    place.copy_(value)


def tensors(made):
    return made if isinstance(made, (tuple, list)) else [made]


@contextmanager
def capture(graph, **_):
    with graph:
        yield
    for *_, made in graph.operations:  # recording computes nothing
        for value in tensors(made):
            if value.is_floating_point() and not value._is_view():
                value.fill_(torch.nan)


@pytest.fixture
def fake_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(replayed, "can_be_recorded", lambda x: True)
    monkeypatch.setattr(Graph, "replays", 0)


def counted(function):
    def watched(*given):
        watched.calls += 1
        return function(*given)

    watched.calls = 0
    return watched


@torch.no_grad()
def test_a_replay_computes_what_the_function_does(fake_graphs):
    weight = torch.randn(5, 5)
    function = counted(lambda x, sigma: torch.softmax(x @ weight / sigma, -1).cumsum(0))
    recorded, inputs = replayed.Replayed(function), [(torch.randn(3, 5), torch.rand(())) for _ in range(6)]
    for given in inputs:
        made = recorded(*given)
        assert torch.equal(made, torch.softmax(given[0] @ weight / given[1], -1).cumsum(0))
        made.zero_()  # a caller may change what it gets
    assert function.calls == 2 and Graph.replays == 5


@torch.no_grad()
def test_a_cpu_records_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", None)
    function = counted(torch.sin)
    recorded = replayed.Replayed(function)
    for x in torch.randn(4, 3):
        assert torch.equal(recorded(x), x.sin())
    assert function.calls == 4


@torch.no_grad()
def test_what_cannot_be_recorded_goes_on_as_it_is(fake_graphs, capsys):
    recorded = replayed.Replayed(lambda x: x * 2 if x.sum() > 0 else x * 3)
    for x in (torch.ones(3), -torch.ones(3), torch.ones(3)):
        assert torch.equal(recorded(x), x * 2 if x.sum() > 0 else x * 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not recorded as a CUDA graph, slower: ") and "is not permitted" in line
    assert Graph.replays == 0


def sampled_twice(monkeypatch, run):
    """As it is, and recorded."""
    recorded = run()
    monkeypatch.setattr(replayed, "can_be_recorded", lambda x: False)
    return run(), recorded


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("config", [md.STAGE1, md.STAGE2], ids=["x0", "v"])
def test_a_stage_samples_the_same_when_it_is_recorded(fake_graphs, monkeypatch, capsys, config, guidance):
    stage = tiny_stage(config)
    c, f, B, T, h, w = config.latent_channels, config.vae_factor, 2, 3, 3, 2
    torch.manual_seed(0)
    known = torch.randn(B, config.out_channels, h, w)
    known[:, 1] = torch.nan
    cond = md.Condition(
        first_pictures=torch.randn(B, 9, h * f, w * f),
        first_latents=torch.randn(B, 1, c * len(config.first_frame), h, w),
        known=known,
        given=torch.randn(B, T, c * len(config.given), h, w),
        token=torch.randn(B, 1, stage.unet.config.cross_attention_dim),
        added_ids=torch.rand(B, 3),
        F=torch.randn(B, 2, h * f, w * f),
        camera=torch.randn(B, 2),
    )

    def run():
        generator = torch.Generator().manual_seed(1)
        return md.sample(stage, cond, frames=T, steps=4, guidance=guidance, generator=generator)

    plain, recorded = sampled_twice(monkeypatch, run)
    assert Graph.replays == 3 and not Graph.living and not capsys.readouterr().err
    assert plain.isfinite().all() and torch.equal(plain, recorded)


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (1.0, 3.0)])
def test_plain_svd_samples_the_same_when_it_is_recorded(fake_graphs, monkeypatch, capsys, guidance):
    torch.manual_seed(0)
    vae, tower = tiny_vae(), tiny_tower()
    unet = svd.UNet(
        svd.UNetConfig(
            block_out_channels=(16, 32), layers_per_block=1, attention=(True, False), num_attention_heads=(2, 2),
            cross_attention_dim=tower.config.projection_dim, addition_time_embed_dim=8, channels_per_group=8,
        )
    )  # fmt: skip
    image, decode_video = torch.rand(2, 3, 8, 12) * 2 - 1, svd.decode_video

    def decoded(*told):
        assert not Graph.living  # the decoder needs its memory
        return decode_video(*told)

    monkeypatch.setattr(svd, "decode_video", decoded)

    def run():
        settings = {"frames": 3, "steps": 4, "guidance": guidance, "generator": torch.Generator().manual_seed(1)}
        return svd.image_to_video(unet, vae, tower, image, **settings)

    plain, recorded = sampled_twice(monkeypatch, run)
    assert Graph.replays == 3 and not capsys.readouterr().err
    assert torch.equal(plain, recorded)
