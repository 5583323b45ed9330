"""Compiled denoisers: the same numbers and gradients, a graph for each shape of block, without a break."""

import functools

import pytest
import torch
from tiny import UNET_CONFIG, randomize

from svd import BLOCKS, Encoder, UNet, UNetConfig, VAEConfig
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

    torch._dynamo.reset()
    for name in ("recompile_limit", "fail_on_recompile_limit_hit"):
        if hasattr(torch._dynamo.config, name):
            monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eager, fullgraph=True))
    return graphs


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
def test_blocks_of_one_shape_share_a_graph_however_many_shapes_there_are(traced):
    """As in SVD's UNet, more shapes of one kind than torch compiles without being told."""
    config = UNetConfig(
        block_out_channels=(8, 16, 24, 32), layers_per_block=1, attention=(False, False, False, True),
        num_attention_heads=(1, 1, 1, 1), cross_attention_dim=16, addition_time_embed_dim=8, channels_per_group=4,
    )  # fmt: skip
    unet = UNet(config)
    shapes, blocks = {kind: set() for kind in BLOCKS}, 0

    def note(block, given):
        shapes[type(block)].add((given[0].shape[2:], tuple(value.shape for value in block.parameters())))

    for block in unet.modules():
        if isinstance(block, BLOCKS):
            blocks += 1
            block.register_forward_pre_hook(note)
    x, ids = torch.randn(1, 2, 8, 8, 16), torch.tensor([[6.0, 127.0, 0.02]])
    plain = unet(x, torch.zeros(1), torch.randn(1, 1, 16), ids)
    assert len(shapes[BLOCKS[0]]) > 8
    compiled.compile_forward(unet)
    for _ in range(2):
        assert unet(x, torch.zeros(1), torch.zeros(1, 1, 16), ids).shape == plain.shape
    assert len(traced) == sum(map(len, shapes.values())) < blocks


def test_a_network_without_such_blocks_is_compiled_whole(traced, capsys):
    encoder = Encoder(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, channels_per_group=4))
    x = torch.randn(1, 2, 8, 12, 3)
    plain = encoder(x)
    compiled.compile_forward(encoder)
    torch.testing.assert_close(encoder(x), plain)
    assert len(traced) == 1 and "compiling Encoder took" in capsys.readouterr().out
