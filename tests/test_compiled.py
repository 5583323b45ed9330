"""Compiled denoisers: the same numbers and gradients, a graph for each shape of block, without a break."""

import functools

import pytest
import torch
from tiny import UNET_CONFIG, randomize

from svd import Encoder, UNet, VAEConfig
from training import compiled


def inputs(unet, B, T, h, w, generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = [(-(-h // 2**i), -(-w // 2**i)) for i in range(2)]
    told = {
        "residuals": [normal(B, T, c, *size) for c, size in zip(unet.residual_channels, sizes, strict=True)],
        "temporal_query": [normal(B, c) for c in unet.temporal_query_channels],
    }
    ids = torch.tensor([[6.0, 127.0, 0.02]]).expand(B, -1)
    return (normal(B, T, 8, h, w), normal(B), normal(B, 1, 16), ids), told


@pytest.fixture
def traced(monkeypatch):
    """torch.compile as it is but for machine code, which takes minutes: a break of the graph is an error. -> graphs."""
    graphs = []

    def eager(graph, _):
        graphs.append(graph)
        return graph.forward

    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eager, fullgraph=True))
    with config.patch(limit, 8):  # torch's own, whatever a test before has left
        yield graphs


def test_a_compiled_denoiser_gives_the_same_numbers_and_gradients(traced, capsys):
    """With checkpointing, which breaks graphs most easily."""
    torch.manual_seed(0)
    plain, fast = (randomize(UNet(UNET_CONFIG), 1) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    plain.gradient_checkpointing = fast.gradient_checkpointing = True
    compiled.compile_forward(fast)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second call is not the one that compiles
        positional, told = inputs(plain, 2, 3, 5, 7, generator)
        for model in (plain, fast):
            model.zero_grad()
            model.made = model(*positional, **told)
            model.made.square().mean().backward()
        torch.testing.assert_close(fast.made, plain.made, rtol=1e-4, atol=1e-4)
        for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert capsys.readouterr().out.count("compiling UNet took") == 1
    assert list(fast.state_dict()) == list(plain.state_dict())


@torch.no_grad()
def test_blocks_of_one_shape_share_a_graph_however_many_shapes_there_are(traced, monkeypatch):
    """More shapes than torch compiles of one kind without being told; SVD's UNet has as many."""

    class Block(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    monkeypatch.setattr(compiled, "BLOCKS", (Block,))
    network = torch.nn.Sequential(*[Block(a, a + 1) for a in range(2, 12)], Block(12, 12), Block(12, 12), Block(12, 2))
    x = torch.randn(3, 2)
    plain = network(x)
    compiled.compile_forward(network)
    for _ in range(2):
        torch.testing.assert_close(network(x), plain)
    assert len(network) == 13 and len(traced) == 12


def test_a_network_without_such_blocks_is_compiled_whole(traced, capsys):
    encoder = Encoder(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, channels_per_group=4))
    x = torch.randn(1, 2, 8, 12, 3)
    plain = encoder(x)
    compiled.compile_forward(encoder)
    torch.testing.assert_close(encoder(x), plain)
    assert len(traced) == 1 and "compiling Encoder took" in capsys.readouterr().out
