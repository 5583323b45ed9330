"""training/plan.py: memory counted without numbers is that of tensors with numbers, and of a GPU within a tenth."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny import TINY, UNET_CONFIG, moving_squares, tiny_stage, tiny_vae
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as nnf

import train
from motion_dreamer import STAGE1, STAGE2, MotionDreamer, SmallStageConfig
from svd import BLOCKS, Linear, UNet, without_effect
from training import plan
from training.learner import freeze


def test_alive_counts_what_lives_and_remembers_the_most():
    given = torch.zeros(1000)
    with plan.Alive("cpu", [given]) as alive:
        given[:10].add_(1)  # not made here
        doubled = given * 2
        part, _ = doubled[5:], torch.zeros(7, device="meta")
        assert alive.now == 4000
        other = doubled.double()
        assert alive.now == alive.most == 12000
        del doubled
        assert alive.now == 12000  # a part of it lives on
        del part, other
        assert (alive.now, alive.most) == (0, 12000)


def test_autocast_computes_in_the_precisions_of_a_gpu():
    with torch.device("meta"):
        linear, norm, x = torch.nn.Linear(64, 64), torch.nn.GroupNorm(4, 64), torch.zeros(2, 1, 8, 64)
        conv = torch.nn.Conv2d(64, 64, 3, padding=1)
    for bf16, half in ((True, torch.bfloat16), (False, torch.float32)):
        with plan.Autocast(bf16):
            y = linear(x)
            assert y.dtype == half and conv(y.movedim(-1, 1)).dtype == half
            assert norm(y.flatten(0, 2)).dtype == y.softmax(-1).dtype == torch.float32
            assert torch.bmm(x[0], x[0].transpose(1, 2)).dtype == half
            assert nnf.scaled_dot_product_attention(x, x, x).dtype == half
            assert (y + x).dtype == torch.float32  # as on a GPU: the wider one


def test_features_stay_in_half_precision_from_block_to_block(monkeypatch):
    """As on a GPU: neither what is added to them (Eq. 8, the camera's queries) nor a norm makes them wider."""
    with torch.device("meta"):
        stage = MotionDreamer(STAGE1, UNET_CONFIG)
    found, bmm = [], torch.bmm

    def note(module, given):
        found.extend((type(module).__name__, x.dtype) for x in given[:1] if x.ndim == 5)

    for module in stage.unet.modules():
        if isinstance(module, (*BLOCKS, Linear)):
            module.register_forward_pre_hook(note)
    monkeypatch.setattr(torch, "bmm", lambda a, b: found.extend(("bmm", x.dtype) for x in (a, b)) or bmm(a, b))
    with plan.Autocast(True):
        stage.loss(plan.batch_of_sizes(stage, 2))
    kinds = {"SpatioTemporalResBlock", "SpatioTemporalTransformer", "bmm", "Linear"}
    assert {name for name, _ in found} == kinds and len(found) > 40
    # A norm over groups computes in float32, and what follows it, proj_in, alone.
    wide = [name for name, dtype in found if dtype != torch.bfloat16]
    assert wide == ["Linear"] * len(stage.unet.temporal_query_channels)


def sized(config, device, checkpointing):
    stage = tiny_stage(config) if device == "cpu" else None
    if stage is None:
        with torch.device("meta"):
            stage = MotionDreamer(config, UNET_CONFIG)
    for value in without_effect(stage):
        value.requires_grad_(False)
    stage.unet.gradient_checkpointing = checkpointing
    return stage.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_a_step_without_numbers_takes_the_bytes_of_one_with_numbers(config, checkpointing):
    config = replace(config, vae_factor=2, frames=4, width=96, height=64)
    planned = sized(config, "meta", checkpointing)
    batch = plan.batch_of_sizes(planned, 2)
    found = plan.plan_step(planned, batch, bf16=False)

    stage = sized(config, "cpu", checkpointing)
    zeros = {name: torch.zeros(value.shape) for name, value in vars(batch.condition).items()}
    batch = plan.Batch(torch.zeros(batch.x0.shape), plan.Condition(**zeros), torch.zeros(batch.M.shape))
    known = [*stage.parameters(), batch.x0, batch.M, *zeros.values()]
    known, saved = {value.untyped_storage().data_ptr() for value in known}, {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with plan.Alive("cpu", [*stage.parameters(), batch.x0, batch.M, *zeros.values()]) as alive:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = stage.loss(batch)["loss"].mean()
        loss.backward()
    held = sum(size for place, size in saved.items() if place not in known)
    assert found.forward == pytest.approx(held, rel=0.05)  # splatting in plain torch keeps a little more
    assert found.step == pytest.approx(alive.most, rel=0.05)
    trained = sum(value.numel() for value in stage.parameters() if value.requires_grad)
    assert found.gradients == 4 * trained == found.optimizer // 2
    assert found.ema == found.gradients and found.weights == 4 * sum(value.numel() for value in stage.parameters())
    assert found.peak == found.weights + found.optimizer + found.ema + found.step


def test_accumulated_gradients_are_there_during_the_next_batch():
    stage = sized(replace(STAGE1, vae_factor=2, frames=4, width=96, height=64), "meta", False)
    batch = plan.batch_of_sizes(stage, 1)
    one, more = (plan.plan_step(stage, batch, False, count) for count in (1, 8))
    assert one.forward == more.forward and more.step == one.step + one.gradients


def test_several_processes_share_the_average_or_all():
    stage = sized(replace(STAGE1, vae_factor=2, frames=4, width=96, height=64), "meta", False)
    one, held = (plan.plan_step(stage, plan.batch_of_sizes(stage, 1), False, count) for count in (1, 2))
    block, rest = plan.largest_blocks(stage)
    names = [name for name, _ in stage.named_parameters()]
    inside = [name for name in names if ".resnets." in name or ".attentions." in name]
    assert rest == 4 * sum(v.numel() for name, v in stage.named_parameters() if name not in inside)
    assert block == max(4 * sum(v.numel() for v in b.parameters()) for b in stage.unet.mid_block.attentions)
    (whole, shared), (_, eight) = (plan.each_of(count, one, held, (block, rest), 1) for count in (4, 8))
    assert whole == one.peak + one.gradients - 3 * one.ema // 4  # buckets, and a quarter of the average
    more, _ = plan.each_of(4, held, held, (block, rest), 2)
    assert more == whole + one.gradients  # of the batches before the last, beside the buckets
    assert shared - eight == (one.weights + one.optimizer + one.ema + one.gradients) // 8


@pytest.mark.parametrize("train", ["all", "temporal", "added"])
def test_what_is_not_trained_has_no_gradient_no_state_and_no_average(train):
    stage = sized(replace(STAGE1, vae_factor=2, frames=4, width=96, height=64), "meta", False)
    freeze(stage, train)
    found = plan.plan_step(stage, plan.batch_of_sizes(stage, 1), bf16=False)
    trained = 4 * sum(value.numel() for value in stage.parameters() if value.requires_grad)
    assert (found.gradients, found.optimizer, found.ema) == (trained, 2 * trained, trained)
    assert (trained < 0.7 * found.weights) == (train != "all")


def dry(monkeypatch, capsys, *told):
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", *map(str, told)])
    train.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    return head, {row[:36].strip(): [float(number) for number in row[36:].split()] for row in rows}


def test_the_command_says_what_it_would_take_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(plan.PRESETS, "tiny", TINY)
    told = ("--preset", "tiny", "--out", tmp_path / "out")
    alone = ("--dry-run", 1, "--stage", 2, *told, "--data", "none")
    small = dry(monkeypatch, capsys, *alone, "--set", "width=48", "height=32")
    assert small[0].startswith("14 frames of 48x32, batch 8, bf16: ")
    large = dry(monkeypatch, capsys, "--stage", 2, *told, "--data", "none", "--precision", "fp32")
    assert large[0].startswith("14 frames of 512x320, batch 8, fp32")
    assert large[1]["peak"][0] > 50 * small[1]["peak"][0] and large[1]["peak"][1] < large[1]["peak"][0]
    parts = ("weights", "AdamW", "moving average", "VAE, image tower", "activations and gradients, at most")
    assert large[1]["the same with --shard"][0] < large[1]["peak of each of 8 processes"][0]
    assert large[1]["peak"][0] == pytest.approx(sum(large[1][name][0] for name in parts), abs=0.003)
    assert not small[1].keys() & {"the same with --shard", "peak of each of 1 processes"}
    draft = ("--frames", 7, "--set", "draft=true", "show_flow=true", "width=48", "height=32")
    assert dry(monkeypatch, capsys, *alone, *draft)[0].startswith("7 frames of 48x32")
    assert not (tmp_path / "out").exists()


def test_the_full_size_is_that_of_a_gpu_within_a_twentieth(monkeypatch, capsys, tmp_path):
    """Measured on an H200, 14 frames of 512x320, batch 1, bf16: 50.6 and 35.9 GB (commit 59b7b3f)."""
    told = ("--stage", 1, "--data", "none", "--out", tmp_path / "out", "--init", "some/repository", "--batch", 1)
    told += ("--dry-run", 1)
    head, rows = dry(monkeypatch, capsys, *told)
    assert head.startswith("14 frames of 512x320, batch 1, bf16: 1,539,115,830 parameters")
    assert rows["weights"] == [pytest.approx(6.156)] * 2
    assert rows["peak"] == pytest.approx([50.6, 35.9], rel=0.05)


def test_sizes_come_from_what_is_there(monkeypatch, capsys, tmp_path):
    def weights_alone(stage, *_, **__):
        return plan.Plan(4 * sum(value.numel() for value in stage.parameters()), 1, 1, 1, 1, 1)

    monkeypatch.setattr(plan, "plan_step", weights_alone)
    moving_squares(0).save(tmp_path / "clips" / "0.safetensors")
    UNet(UNET_CONFIG).save_pretrained(tmp_path / "svd" / "unet")
    tiny_vae().save_pretrained(tmp_path / "svd" / "vae")
    told = ("--stage", 1, "--data", tmp_path / "clips", "--out", tmp_path / "out")
    head, _ = dry(monkeypatch, capsys, *told, "--init", tmp_path / "svd")
    assert head.startswith("4 frames of 24x16, batch 8, bf16: 100,186 parameters")
    config = SmallStageConfig(told=True, vae_factor=2, frames=5, width=24, height=16)
    tiny_stage(config).save_pretrained(tmp_path / "start" / "stage1")
    tiny_vae().save_pretrained(tmp_path / "start" / "vae")
    told = ("--stage", 1, "--data", tmp_path / "none", "--out", tmp_path / "out", "--start", tmp_path / "start")
    assert dry(monkeypatch, capsys, *told)[0].startswith("5 frames of 24x16")


def test_the_vae_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        dry(monkeypatch, capsys, "--stage", "vae", "--data", "none", "--out", tmp_path)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("train.py: --dry-run: of --stage 1, 2 and one")
