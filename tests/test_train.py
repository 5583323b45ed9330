"""train.py: what a killed run loses (nothing), what two processes share (everything), and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import TINY, UNET_CONFIG, VAE_CONFIG, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

import train
from clips import ClipDataset, ResumableSampler, render
from motion_dreamer import (
    ONE_STAGE,
    STAGE1,
    STAGE2,
    MotionDreamer,
    SmallMotionDreamer,
    SmallStageConfig,
    StageConfig,
)
from svd import VAE, ImageEncoder, UNet, without_effect
from training import checkpoint, samples, task
from training.batch import Chances, training_batch
from training.cache import CachedClips, TrainingClips, encode_clips
from training.vae import vae_loss

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(5):
        moving_squares(seed).save(folder / f"{seed}.safetensors")
    return folder


@pytest.fixture
def out(tmp_path):
    """A model folder with VAE and image tower, ready for the stages."""
    tiny_vae().save_pretrained(tmp_path / "out" / "vae")
    tiny_tower().save_pretrained(tmp_path / "out" / "image_encoder")
    return tmp_path / "out"


def command(clips, out, *extra, stage="1", steps=4):
    told = {"--stage": stage, "--preset": "tiny", "--data": clips, "--out": out, "--steps": steps, "--batch": 2}
    return [str(word) for pair in told.items() for word in pair] + ["--quiet", *map(str, extra)]


def run(monkeypatch, *arguments, **told):
    monkeypatch.setattr(sys, "argv", ["train.py", *command(*arguments, **told)])
    train.main()


def logged(out, name="stage1"):
    return [json.loads(line) for line in (out / "training" / name / "log.jsonl").read_text().splitlines()]


def losses(out, name="stage1"):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logged(out, name)]


@pytest.mark.parametrize("stage", ["vae", "1", "2", "one"])
def test_the_loss_falls(monkeypatch, clips, out, stage):
    told = ("--lr", "3e-3", "--warmup", 5, "--seed", 1)
    run(monkeypatch, clips, out, *told, stage=stage, steps=40)
    values = [line["loss"] for line in logged(out, {"vae": "vae", "1": "stage1"}.get(stage, "stage2"))]
    assert len(values) == 40 and np.isfinite(values).all()
    assert np.mean(values[-8:]) < 0.8 * np.mean(values[:8])


@pytest.mark.parametrize("stage", ["vae", "1"])
def test_a_killed_run_goes_on_bit_for_bit(monkeypatch, clips, out, tmp_path, stage):
    told = ("--accumulate", 2, "--save-every", 3, "--warmup", 1)
    name = {"vae": "vae", "1": "stage1"}[stage]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        tiny_vae().save_pretrained(folder / "vae")
        tiny_tower().save_pretrained(folder / "image_encoder")
    run(monkeypatch, clips, whole, *told, stage=stage, steps=7)

    update, steps = train.update_ema, []

    def crash(*arguments):
        steps.append(1)
        if len(steps) == 5:  # after the save at step 3
            raise RuntimeError("killed")
        update(*arguments)

    monkeypatch.setattr(train, "update_ema", crash)
    with pytest.raises(RuntimeError, match="killed"):
        run(monkeypatch, clips, killed, *told, stage=stage, steps=7)
    monkeypatch.setattr(train, "update_ema", update)
    assert len(logged(killed, name)) == 4  # one step more than was saved
    run(monkeypatch, clips, killed, *told, stage=stage, steps=7)

    assert losses(killed, name) == losses(whole, name)
    for file in sorted(path.relative_to(whole) for path in (whole / name).iterdir()):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    states = [torch.load(folder / "training" / name / "step_00000007.pt") for folder in (whole, killed)]
    for part in ("model", "ema"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key


def test_more_steps_go_on_and_other_settings_do_not(monkeypatch, clips, out, capsys):
    run(monkeypatch, clips, out, steps=2)
    run(monkeypatch, clips, out, steps=3)
    assert [line["step"] for line in logged(out)] == [1, 2, 3]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out, "--seed", 7, steps=4)
    assert stop.value.code == 2
    assert "was trained with seed = 0, now seed = 7" in capsys.readouterr().err


def test_checkpoints_are_whole_and_only_the_newest_stay(monkeypatch, clips, out, capsys):
    run(monkeypatch, clips, out, "--save-every", 1, "--keep", 2, steps=4)
    folder = out / "training" / "stage1"
    assert sorted(path.name for path in folder.glob("*.pt*")) == ["step_00000003.pt", "step_00000004.pt"]
    saved = (folder / "step_00000004.pt").read_bytes()

    def crash(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint.os, "replace", crash)  # between writing and naming
    with pytest.raises(RuntimeError):
        checkpoint.save_checkpoint(folder, 4, {"step": 4}, 2)
    monkeypatch.undo()
    assert (folder / "step_00000004.pt").read_bytes() == saved
    (folder / "step_00000004.pt").write_bytes(saved[: len(saved) // 2])
    assert checkpoint.load_checkpoint(folder, {})[0]["step"] == 3
    (folder / "step_00000003.pt").unlink()
    with pytest.raises(ValueError, match=r"step_00000004.pt: cannot be read .*; delete it"):
        checkpoint.load_checkpoint(folder, {})


def flip(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


DAMAGES = {
    "nothing left": lambda raw: b"",
    "a byte left": lambda raw: raw[:1],
    "half": lambda raw: raw[: len(raw) // 2],
    "the last byte": lambda raw: raw[:-1],
    "a changed number": lambda raw: flip(raw, len(raw) // 2),
    "not ours": lambda raw: b"PK" + raw[::-1],
}


def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one(monkeypatch, clips, out, tmp_path, capsys):
    """It says so in one line, and ends with the bytes of a run that was never stopped."""
    run(monkeypatch, clips, out, "--save-every", 3, "--keep", 3, steps=7)
    for number, (name, damage) in enumerate(DAMAGES.items()):
        killed = shutil.copytree(out, tmp_path / str(number))
        folder = killed / "training" / "stage1"
        (folder / "step_00000007.pt").unlink()
        newest = folder / "step_00000006.pt"
        newest.write_bytes(damage(newest.read_bytes()))
        capsys.readouterr()
        run(monkeypatch, clips, killed, "--save-every", 5, "--keep", 1, steps=7)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith(f"train.py: {newest}: cannot be read ("), name
        assert said[0].endswith("; going on from the one before")
        assert [path.name for path in folder.glob("*.pt*")] == ["step_00000007.pt"]
        assert losses(killed) == losses(out)
        states = [torch.load(run / "training" / "stage1" / "step_00000007.pt") for run in (killed, out)]
        for part in ("model", "ema"):
            assert all(torch.equal(value, states[1][part][key]) for key, value in states[0][part].items()), name
        for key, moments in states[0]["optimizer"]["state"].items():
            assert all(torch.equal(value, states[1]["optimizer"]["state"][key][n]) for n, value in moments.items())


def test_a_damaged_checkpoint_is_gone_with_the_next_one(tmp_path):
    for step in (1, 2, 9):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step}, 2)
    (tmp_path / "step_00000009.pt").write_bytes(b"")
    checkpoint.save_checkpoint(tmp_path, 3, {"step": 3}, 2)  # the 9 does not count among the two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]
    assert checkpoint.load_checkpoint(tmp_path, {}) == ({"step": 3}, [])


def mapped(name):
    """Addresses at which this process sees a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if name in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_run_that_goes_on_holds_no_second_copy(monkeypatch, clips, out):
    """What is read stays in its file, on no device, and what the networks have copied is gone before the first step."""
    run(monkeypatch, clips, out, steps=2)
    load, step, read, copies = checkpoint.load_checkpoint, train.take_step, [], []

    def watch(*arguments):
        state, damaged = load(*arguments)
        for part in ("model", "ema"):
            for value in state[part].values():
                assert value.device.type == "cpu" and any(a <= value.data_ptr() < b for a, b in mapped("step_00000002"))
                read.append(weakref.ref(value))
        return state, damaged

    def look(*arguments):
        copies.append([value for value in read if value() is not None])
        return step(*arguments)

    monkeypatch.setattr(train, "load_checkpoint", watch)
    monkeypatch.setattr(train, "take_step", look)
    run(monkeypatch, clips, out, steps=3)
    assert len(read) > 100 and copies == [[]]


def test_a_checkpoint_that_may_not_be_read_ends_the_run(tmp_path, monkeypatch):
    """It is not damaged: an older one would lose steps, and with the next save the newest."""
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step}, 2)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="step_00000002.pt"):
        checkpoint.load_checkpoint(tmp_path, {})


def test_the_model_folder_holds_the_moving_average(monkeypatch, clips, out):
    run(monkeypatch, clips, out, "--ema", "0.5", steps=3)
    state = torch.load(out / "training" / "stage1" / "step_00000003.pt")
    model = MotionDreamer.from_pretrained(out, "stage1")
    assert (model.config.frames, model.config.width, model.config.height) == (4, 24, 16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][key])
    assert any(not torch.equal(value, state["model"][key]) for key, value in state["ema"].items())


def test_cached_latents_give_the_losses_of_fresh_ones(monkeypatch, clips, out, tmp_path):
    run(monkeypatch, clips, out, "--warmup", 1, steps=3)
    cached = [line["loss"] for line in logged(out)]
    caches = {path.name for path in (clips / ".cache").iterdir()}
    (out / "training" / "stage1" / "step_00000003.pt").unlink()
    run(monkeypatch, clips, out, "--no-cache", "--warmup", 1, steps=3)
    np.testing.assert_allclose(
        [line["loss"] for line in logged(out)], cached, rtol=5e-3
    )  # the cache is in half precision
    other = tiny_vae()
    other.encoder.conv_in.bias.data += 0.1
    other.save_pretrained(out / "vae")
    (out / "training" / "stage1" / "step_00000003.pt").unlink()
    run(monkeypatch, clips, out, steps=1)
    assert len({path.name for path in (clips / ".cache").iterdir()} - caches) == 1


def test_windows_of_longer_clips_are_encoded_in_every_step(monkeypatch, out, tmp_path):
    for seed in range(2):
        moving_squares(seed, frames=5 + seed).save(tmp_path / "clips" / f"{seed}.safetensors")
    run(monkeypatch, tmp_path / "clips", out, "--frames", 3, "--val", tmp_path / "clips", steps=2)
    assert not (tmp_path / "clips" / ".cache").exists()
    assert weights(out, "stage1").config.frames == 3 and logged(out)[1]["val_loss"] > 0


class Blank(torch.nn.Module):
    """A VAE that decodes everything to grey; mean 2 and variance e^-1 of the posterior give a known KL."""

    def moments(self, images):
        return torch.full((len(images), 1, 2, 2), 2.0), torch.full((len(images), 1, 2, 2), -1.0)

    def decode(self, latents):
        return torch.zeros(*latents.shape[:2], 3, 16, 24)


def test_vae_loss_against_a_loop_over_pixels():
    clips = torch.utils.data.default_collate([moving_squares(seed).tensors() for seed in (0, 1)])
    losses = vae_loss(Blank(), clips, torch.Generator().manual_seed(0))
    ids, total = clips["segmentation"], torch.zeros(2)
    for name in ("rgb", "flow", "segmentation", "depth"):
        for b in range(2):
            first = clips[name][b : b + 1, 0] if name in ("segmentation", "depth") else None
            picture, error, weights = render(name, clips[name][b : b + 1], first)[0], 0.0, 0.0
            for t in range(ids.shape[1]):
                for y in range(16):
                    for x in range(24):
                        near = (ids[b, t, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] > 0).any()
                        moves = clips["flow"][b, t, :, y, x].norm() > 0.1
                        weight = {"rgb": 1 + near, "flow": 1 + 12 * moves, "depth": 1 + 2 * near}.get(
                            name, 1 + 4 * near
                        )
                        value = picture[t, :, y, x].abs()
                        error, weights = error + weight * (value + value**2).mean(), weights + weight
            assert losses[name][b].item() == pytest.approx((error / weights).item(), rel=1e-4)
            total[b] += (3 if name == "flow" else 1) * error / weights
    kl = (4 + math.exp(-1) - 1 + 1) / 2
    torch.testing.assert_close(losses["loss"], total + 2e-5 * kl, rtol=1e-4, atol=1e-5)


def test_only_the_decoder_changes_with_decoder_only(monkeypatch, clips, out):
    run(monkeypatch, clips, out, stage="vae", steps=2)
    before = VAE.from_pretrained(out, "vae")
    run(monkeypatch, clips, out, "--decoder-only", stage="vae", steps=4)
    after = VAE.from_pretrained(out, "vae")
    assert after.scaling_factor == before.scaling_factor
    changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert changed and all(key.startswith("decoder.") for key in changed)


CONFIGS = {
    "stage1": STAGE1, "stage2": STAGE2, "one": ONE_STAGE, "without control": replace(STAGE1, control="none"),
    "sparse": replace(STAGE2, control="sparse_flow"), "extras": SmallStageConfig(told=True, show_flow=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_that_is_trained_gets_a_gradient(clips, name):
    """DistributedDataParallel waits for all of them."""
    config = replace(CONFIGS[name], vae_factor=2, frames=4, width=24, height=16)
    stage, vae, tower = tiny_stage(config).train(), tiny_vae(), tiny_tower()
    idle = {id(value) for value in without_effect(stage)}
    batch = torch.utils.data.default_collate([TrainingClips(ClipDataset(clips))[(i, 0)] for i in range(2)])
    batch |= encode_clips(batch, stage, vae, tower)
    generator = torch.Generator().manual_seed(0)
    stage.loss(training_batch(stage, batch, vae, generator, Chances()), generator)["loss"].mean().backward()
    assert {name for name, value in stage.named_parameters() if (value.grad is None) != (id(value) in idle)} == set()


@pytest.mark.parametrize("decoder_only", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_weight_of_a_vae_that_is_trained_gets_a_gradient(clips, decoder_only, layers):
    vae = randomize(VAE(replace(VAE_CONFIG, layers_per_block=layers)), scale=0.05)
    for value in without_effect(vae):
        value.requires_grad_(False)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not decoder_only)
    batch = torch.utils.data.default_collate([moving_squares(seed).tensors() for seed in (0, 1)])
    vae_loss(vae, batch, torch.Generator().manual_seed(0))["loss"].mean().backward()
    assert all((value.grad is not None) == value.requires_grad for value in vae.parameters())


@pytest.mark.parametrize("stage", ["1", "vae"])
def test_weights_without_effect_are_not_trained_and_have_no_state(monkeypatch, clips, out, stage):
    make, learners = train.make_learner, []
    monkeypatch.setattr(train, "make_learner", lambda *told: learners.append(make(*told)) or learners[-1])
    run(monkeypatch, clips, out, stage=stage, steps=1)
    core, state = learners[0].core, learners[0].optimizer.state
    frozen = {id(value) for value in core.parameters() if not value.requires_grad}
    assert frozen == {id(value) for value in without_effect(core)} != set()
    assert {id(value) for value in state} == {id(value) for value in core.parameters()} - frozen


def test_steps_without_finite_gradients_are_skipped_and_counted(monkeypatch, clips, out, capsys):
    loss, calls = MotionDreamer.loss, []

    def broken(self, batch, generator=None):
        calls.append(1)
        result = loss(self, batch, generator)
        return result | {"loss": result["loss"] * (float("nan") if len(calls) >= 2 else 1)}

    monkeypatch.setattr(MotionDreamer, "forward", broken)
    run(monkeypatch, clips, out, steps=3)
    assert [line["skipped"] for line in logged(out)] == [0, 1, 2]
    state = torch.load(out / "training" / "stage1" / "step_00000003.pt")
    assert state["skipped"] == 2 and all(value.isfinite().all() for value in state["model"].values())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out, steps=60)
    assert stop.value.code == 2 and "50 steps in a row" in capsys.readouterr().err
    assert [line["skipped"] for line in logged(out)] == [0, *range(1, 52)]  # counted on from the checkpoint


def test_data_and_randomness_of_a_step_are_functions_of_seed_rank_and_step(monkeypatch, clips, out):
    seen = []
    make = task.training_batch

    def record(stage, told, *rest):
        seen.append(told["segmentation"].clone())
        return make(stage, told, *rest)

    monkeypatch.setattr(task, "training_batch", record)
    run(monkeypatch, clips, out, "--seed", 3, steps=3)
    order = iter(ResumableSampler(5, seed=3))
    for batch in seen:
        for item in batch:
            truth = moving_squares(next(order)[0]).segmentation
            assert (item.numpy() == truth).all()
    assert len(seen) == 3
    assert len({checkpoint.seed_of(*numbers) for numbers in np.ndindex(3, 2, 5, 2)}) == 60


def test_figures_of_the_truth_are_perfect_and_those_of_a_shifted_clip_are_not():
    clip = moving_squares(0).tensors()
    perfect = {"epe_all": 0, "epe_moving": 0, "epe_relative": 0, "ids_miou": 1, "iou_last": 1, "silhouette_last": 1}
    perfect |= {"depth_absrel": 0, "depth_absrel_objects": 0, "psnr": 99}
    found = {name: a / b for name, (a, b) in samples.sample_figures(clip, clip).items()}
    assert found == perfect
    shifted = {n: v.roll(1, -1) if n in ("rgb", "flow", "segmentation", "depth") else v for n, v in clip.items()}
    for name, (a, b) in samples.sample_figures(shifted, clip).items():
        assert (a / b > perfect[name]) == (perfect[name] == 0), name
    assert samples.sample_figures({"rgb": clip["rgb"]}, clip).keys() == {"psnr"}
    clip["segmentation"][-1] = 0  # all objects have left: there is nothing to overlap with
    found = samples.sample_figures(clip, clip)
    assert found["ids_miou"] == (1, 1) and found["iou_last"][1] == found["silhouette_last"][1] == 0


def test_a_stage_reproduces_a_clip_from_what_moves_at_once(out, monkeypatch):
    """Of two objects of which one starts late, only the other's arrow is shown."""
    clip, told = moving_squares(0).tensors(), {}
    late = clip["segmentation"] == 2
    clip["flow"] = torch.where(late[:, None], torch.tensor([0.5, 3.0]).view(2, 1, 1), torch.tensor(0.0))
    clip["flow"][:, 0][clip["segmentation"] == 1] = 1.0
    clip["flow"][0, :, late[0]] = 0.0
    dreamt = samples.dream
    monkeypatch.setattr(samples, "dream", lambda *a, **k: told.update(F=a[7]) or dreamt(*a, **k))
    stage = tiny_stage(replace(STAGE1, vae_factor=2, frames=4))
    made = samples.reproduce(stage, tiny_vae(), tiny_tower(), clip)
    assert {name: value.shape for name, value in made.items()} == {
        name: clip[name].shape for name in ("flow", "segmentation", "depth")
    }
    ids = clip["segmentation"][0]
    assert (told["F"][0][:, ids == 2] == 0).all() and (told["F"][0][0, ids == 1] == 1).all()
    assert samples.reproduce(tiny_vae(), tiny_vae(), None, clip)["rgb"].shape == clip["rgb"].shape


def test_samples_and_validation(monkeypatch, clips, out):
    run(monkeypatch, clips, out, "--val", clips, "--val-every", 2, "--sample-every", 2, steps=2)
    assert [("val_loss" in line) for line in logged(out)] == [False, True]
    figures = {"val_epe_relative", "val_ids_miou", "val_iou_last", "val_silhouette_last", "val_depth_absrel"}
    assert figures <= logged(out)[1].keys() and logged(out)[1]["val_epe_relative"] > 0
    picture = Image.open(out / "training" / "stage1" / "samples" / "step_00000002.png")
    assert picture.size == (6 * 24, 6 * 16)  # three modalities, truth above sample
    run(monkeypatch, clips, out, "--sample-every", 2, stage="2", steps=2)
    assert Image.open(out / "training" / "stage2" / "samples" / "step_00000002.png").size == (6 * 24, 2 * 16)
    run(monkeypatch, clips, out, "--sample-every", 2, stage="vae", steps=2)
    assert Image.open(out / "training" / "vae" / "samples" / "step_00000002.png").size == (6 * 24, 8 * 16)


def test_validation_is_of_the_moving_average_with_the_same_draws_every_time(monkeypatch, clips, out):
    told = ("--val", clips, "--val-every", 1, "--val-samples", 0, "--warmup", 1, "--ema", 0.9)
    run(monkeypatch, clips, out, *told, "--lr", 0, "--save-every", 9, steps=2)
    first, second = (line["val_loss"] for line in logged(out))
    assert first == pytest.approx(second, rel=1e-5)  # the moving average rounds
    run(monkeypatch, clips, out, *told, "--lr", 0.03, steps=4)
    stage, vae, tower = (weights(out, name) for name in ("stage1", "vae", "image_encoder"))
    data, losses = CachedClips(ClipDataset(clips), stage.config, vae, tower), []
    for i in range(5):
        batch, generator = torch.utils.data.default_collate([data[(i, 0)]]), torch.Generator().manual_seed(i)
        losses.append(stage.loss(training_batch(stage, batch, vae, generator, Chances()), generator)["loss"].item())
    assert logged(out)[-1]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(np.mean(losses) - first) > 1e-3


def parsed(monkeypatch, *extra):
    monkeypatch.setattr(sys, "argv", ["train.py", *command("data", "out", *extra)])
    return train.parse_arguments()


def test_the_recipe_is_that_of_svds_weights_with_init_and_says_so(monkeypatch, capsys):
    def recipe(*extra):
        return [getattr(parsed(monkeypatch, *extra), name) for name in ("lr", "warmup", "ema")]

    assert recipe() == recipe("--start", "demo") == [5e-4, 100, 0.999]
    assert recipe("--init", "svd") == [1e-5, 500, 0.9999]
    assert recipe("--init", "svd", "--lr", 0, "--warmup", 0) == [0, 0, 0.9999]  # what is said counts, 0 too
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help")
    said = " ".join(capsys.readouterr().out.split())
    for both in ("0.0005, with --init 1e-05", "100, with --init 500", "0.999, with --init 0.9999"):
        assert both in said


def test_starts_from_svd(monkeypatch, clips, out, tmp_path):
    svd = UNet(UNET_CONFIG)  # 8 channels in, 4 out, as SVD's
    svd.save_pretrained(tmp_path / "svd" / "unet")
    tiny_vae().save_pretrained(tmp_path / "svd" / "vae")
    tiny_tower().save_pretrained(tmp_path / "svd" / "image_encoder")
    run(monkeypatch, clips, tmp_path / "new", "--init", tmp_path / "svd", stage="2", steps=1)
    stage = MotionDreamer.from_pretrained(tmp_path / "new", "stage2")
    assert stage.config.sigma_max == 700
    weight, new = svd.conv_in.weight, stage.unet.conv_in.weight
    torch.testing.assert_close(new[:, :4], weight[:, :4], rtol=0, atol=1e-2)  # one step of training away
    assert (tmp_path / "new" / "vae" / "config.json").exists()


def weights(folder, name):
    return {"vae": VAE, "image_encoder": ImageEncoder}.get(name, MotionDreamer).from_pretrained(folder, name)


@pytest.mark.parametrize("stage", ["1", "2", "one", "vae"])
def test_goes_on_with_what_another_folder_holds(monkeypatch, clips, out, tmp_path, stage):
    """In a new --out, without a word about its extras, sizes or encoders: `--start demo --out runs/more`."""
    name, new = {"1": "stage1", "vae": "vae"}.get(stage, "stage2"), tmp_path / "new"
    extras = {"1": ("told=true", "show_flow=true"), "2": ("draft=true",), "one": ("sigma_mean=0.5",)}.get(stage, ())
    run(monkeypatch, clips, out, "--set", *extras, "reduce=start", stage=stage, steps=2)
    monkeypatch.setitem(train.PRESETS, "tiny", TINY | {"stack": 1, "stage1": None, "stage2": None, "vae": None})
    run(monkeypatch, clips, new, "--start", out, "--lr", 0, stage=stage, steps=1)
    for part in {name, "vae", "image_encoder"}:
        before, after = weights(out, part), weights(new, part)
        if part != "vae" or stage != "vae":  # a VAE's scale is measured anew
            assert before.config == after.config
        for key, value in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[key], value, rtol=1e-6, atol=1e-7)  # the average rounds
    if stage != "vae":
        assert weights(new, name).config.reduce == "start"
        run(monkeypatch, clips, tmp_path / "more", "--start", out, "--set", "reduce=pixel", stage=stage, steps=1)
        assert weights(tmp_path / "more", name).config == replace(weights(out, name).config, reduce="pixel")


def test_encoders_of_the_model_folder_come_before_those_of_start(monkeypatch, clips, out, tmp_path):
    run(monkeypatch, clips, out, steps=1)
    new, other = tmp_path / "new", tiny_vae()
    other.encoder.conv_in.bias.data += 0.1
    other.save_pretrained(new / "vae")
    tiny_tower().save_pretrained(new / "image_encoder")
    run(monkeypatch, clips, new, "--start", out, steps=1)
    assert torch.equal(weights(new, "vae").encoder.conv_in.bias, other.encoder.conv_in.bias)


def test_only_a_decoder_goes_on_in_a_new_folder(monkeypatch, clips, out, tmp_path):
    run(monkeypatch, clips, out, stage="vae", steps=1)
    before, new = weights(out, "vae"), tmp_path / "new"
    for steps in (1, 2):
        run(monkeypatch, clips, new, "--start", out, "--decoder-only", stage="vae", steps=steps)
        after = weights(new, "vae")
        assert after.config == before.config and after.scaling_factor != tiny_vae().scaling_factor
        changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
        assert changed and all(key.startswith("decoder.") for key in changed)


def test_what_cannot_be_started_is_said_in_one_line(monkeypatch, clips, out, tmp_path, capsys):
    run(monkeypatch, clips, out, steps=1)
    shutil.copytree(out / "stage1", out / "stage2")
    wrong = {
        f"--start {out}: what it holds is of --stage 1, not 2": ("2", ()),
        f"--start {out}: what it holds is of --stage 1, not one": ("one", ()),
        f"--start {out}: size mismatch": ("1", ("--set", "show_flow=true")),
        "--ablation without_depth": ("1", ("--ablation", "without_depth")),
        "not allowed with argument": ("1", ("--init", out)),
    }
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out, "--decoder-only", stage="vae", steps=1)  # there are weights, but no checkpoint
    assert stop.value.code == 2 and "no VAE to go on with" in capsys.readouterr().err
    capsys.readouterr()
    for words, (stage, more) in wrong.items():
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, clips, tmp_path / "new", "--start", out, *more, stage=stage, steps=1)
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(out / "stage2")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, tmp_path / "new", "--start", out, stage="2", steps=1)
    assert stop.value.code == 2 and f"{out}/stage2" in capsys.readouterr().err
    assert not any((tmp_path / "new" / name).exists() for name in ("stage1", "stage2"))


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_stage_has_the_fps_of_its_clips(monkeypatch, out, tmp_path, stage):
    for seed, fps in enumerate((10.0, 10.0, 7.0)):
        replace(moving_squares(seed), fps=fps).save(tmp_path / "clips" / f"{seed}.safetensors")
    run(monkeypatch, tmp_path / "clips", out, stage=stage, steps=1)
    config = weights(out, f"stage{stage}").config
    assert (config.fps, config.frames, config.height, config.width) == (10, 4, 16, 24)
    assert (config.vae_factor, config.latent_channels) == (4, 16)  # stacked latents


def test_only_extras_make_a_stage_a_small_one(monkeypatch, clips, out, tmp_path):
    run(monkeypatch, clips, out, "--set", "reduce=pixel", "mask_ratio=0.25", "motion_weight=2", steps=1)
    config = weights(out, "stage1").config
    assert type(config) is StageConfig and (config.reduce, config.mask_ratio, config.motion_weight) == (
        "pixel",
        0.25,
        2,
    )
    assert config.sigma_max == 80  # from nothing
    extras = {"told": True, "show_flow": True, "mask_start": 0.5, "still_ratio": 0.25}
    text = [f"{name}={str(value).lower()}" for name, value in extras.items()]
    run(monkeypatch, clips, tmp_path / "new", "--start", out, "--set", "told=false", steps=1)
    assert type(weights(tmp_path / "new", "stage1").config) is SmallStageConfig
    shutil.rmtree(tmp_path / "new")
    for part in ("vae", "image_encoder"):
        shutil.copytree(out / part, tmp_path / "new" / part)
    run(monkeypatch, clips, tmp_path / "new", "--set", *text, steps=1)
    stage = weights(tmp_path / "new", "stage1")
    assert type(stage) is SmallMotionDreamer and extras.items() <= vars(stage.config).items()
    run(monkeypatch, clips, tmp_path / "new", "--set", "draft=true", stage="2", steps=1)
    assert weights(tmp_path / "new", "stage2").config.draft


# ------------------------------------------------------------------------------------------------------ other processes


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_all_processes_saves_and_the_same_command_goes_on(clips, out, workers):
    """To all, the loader's workers too: so does Ctrl-C in a terminal."""
    extra = ("--save-every", 10**6, "--workers", workers)
    told = [sys.executable, "train.py", *command(clips, out, *extra, stage="vae", steps=10**6)]
    process = subprocess.Popen(
        told, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = out / "training" / "vae" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "run the same command to go on" in said
    steps = len(logged(out, "vae"))
    assert (out / "training" / "vae" / f"step_{steps:08d}.pt").exists()
    told[told.index(str(10**6))] = str(steps + 1)
    subprocess.run(told, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert [line["step"] for line in logged(out, "vae")] == list(range(1, steps + 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_clip_ends_training_with_one_line(clips, out, tmp_path, workers):
    """Its name and what is wrong, whoever reads it; and no worker stays behind, for which the process would wait."""
    folder = shutil.copytree(clips, tmp_path / "clips")
    moving_squares(7).save(folder / "bad.safetensors")
    tensors = load_file(folder / "bad.safetensors")
    tensors["flow"][1, 0, 2, 3] = math.inf  # what `Clip.save` refuses to write
    save_file(tensors, folder / "bad.safetensors")
    told = [sys.executable, "train.py", *command(folder, out, "--workers", workers, stage="vae", steps=100)]
    done = subprocess.run(told, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    line = f"train.py: {folder}/bad.safetensors: flow holds a value that is not finite\n"
    assert (done.returncode, done.stderr) == (2, line)


WATCHED = """
import sys
sys.path[:0] = {paths}
import torch, train
from tiny import TINY
train.PRESETS["tiny"], take_step = TINY, train.take_step
def watched(arguments, machine, task, learner, batches):
    file = f"{{arguments.out}}/rank_{{machine.rank}}_step_{{learner.step}}.pt"
    before = {{name: value.clone() for name, value in learner.core.state_dict().items()}}
    record = take_step(arguments, machine, task, learner, batches)
    torch.save({{"before": before, "after": learner.core.state_dict(), "ema": learner.ema.state_dict()}} | record, file)
    return record
train.take_step = watched
train.main()
"""
SETTINGS = {"lr": 1e-2, "warmup": 2, "cooldown": 0.5, "weight-decay": 0.3, "clip-grad": 0.25, "ema": 0.2, "seed": 3}


def by_hand(clips, out, processes, accumulate, steps):
    """What `processes` would make of Stage I, each with `accumulate` batches of 2 clips a step, in a single loop ->
    (weights, moving average, loss of each process, norm of the gradient) after every step."""
    vae, tower = VAE.from_pretrained(out, "vae"), ImageEncoder.from_pretrained(out, "image_encoder")
    start = torch.load(out / "rank_0_step_0.pt")["before"]
    stage = MotionDreamer.from_pretrained(out, "stage1").requires_grad_(True)
    stage.load_state_dict(start)
    ema = {name: value.clone() for name, value in start.items()}
    optimizer = torch.optim.AdamW(stage.parameters(), betas=(0.9, 0.99), weight_decay=0.3)
    data = CachedClips(ClipDataset(clips), stage.config, vae, tower)
    order = list(islice(ResumableSampler(len(data), seed=3), 2 * processes * accumulate * steps))
    results = []
    for step in range(steps):
        losses, gradients = [], []
        for rank in range(processes):
            stage.zero_grad()
            losses.append(0)
            for micro in range(accumulate):
                batch = [((step * accumulate + micro) * 2 + k) * processes + rank for k in (0, 1)]
                batch = torch.utils.data.default_collate([data[order[place]] for place in batch])
                generator = torch.Generator().manual_seed(checkpoint.seed_of(3, rank, step, micro))
                told = training_batch(stage, batch, vae, generator, Chances(0.1, 0.25))
                loss = stage.loss(told, generator)["loss"].mean() / accumulate
                loss.backward()
                losses[-1] += loss.item()
            gradients.append([value.grad for value in stage.parameters()])
        for value, *each in zip(stage.parameters(), *gradients, strict=True):
            value.grad = None if each[0] is None else sum(each) / processes
        norm = sum(value.grad.double().square().sum() for value in stage.parameters() if value.grad is not None) ** 0.5
        for value in (value for value in stage.parameters() if value.grad is not None):
            value.grad *= min(1, 0.25 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 2, (steps - step) / (0.5 * steps))
        optimizer.step()
        decay = min(0.2, (1 + step) / (10 + step))
        ema = {name: decay * ema[name] + (1 - decay) * value for name, value in stage.state_dict().items()}
        results.append(({name: value.clone() for name, value in stage.state_dict().items()}, ema, losses, norm.item()))
    return results


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 2), (2, 2)])
def test_processes_and_accumulated_batches_train_as_one_loop_over_all_clips_would(
    clips, out, tmp_path, processes, accumulate
):
    """Weights of all processes, after every step: equal to a loop that is written here, and so to one another. The loss
    in the log is the mean over the clips of all processes."""
    start, out, script, steps = out, tmp_path / "model", tmp_path / "watched.py", 5
    config = replace(STAGE1, vae_factor=4, latent_channels=16, frames=4, width=24, height=16)
    tiny_stage(config).save_pretrained(start / "stage1")  # no weight is 0, so that each has a gradient
    script.write_text(WATCHED.format(paths=[str(ROOT), str(ROOT / "tests")]))
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    for until in (2, steps) if processes == 2 else (steps,):  # a second start checks that both have equal weights
        told = command(
            clips,
            out,
            "--start",
            start,
            "--accumulate",
            accumulate,
            "--cooldown",
            0.5 if until == steps else 0,
            steps=until,
        )
        told += [str(word) for name, value in SETTINGS.items() for word in (f"--{name}", value) if name != "cooldown"]
        done = subprocess.run([*launch, script, *told], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in logged(out)] == list(range(1, steps + 1))
    assert torch.load(out / "training" / "stage1" / f"step_{steps:08d}.pt")["settings"]["processes"] == processes
    clipped = []
    for step, (weights, ema, losses, norm) in enumerate(by_hand(clips, out, processes, accumulate, steps)):
        clipped.append(norm > 0.25)
        for rank in range(processes):
            state = torch.load(out / f"rank_{rank}_step_{step}.pt")
            assert state["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
            assert state["grad_norm"] == pytest.approx(norm, rel=1e-3)
            for name in weights:
                torch.testing.assert_close(state["after"][name], weights[name], rtol=1e-3, atol=2e-5, msg=name)
                torch.testing.assert_close(state["ema"][name], ema[name], rtol=1e-3, atol=2e-5, msg=name)
        assert logged(out)[step]["loss"] == state["loss"]
        assert processes == 1 or losses[0] != pytest.approx(losses[1], rel=1e-2)  # so the mean is neither's
    assert set(clipped) == {True, False}


# ------------------------------------------------------------------------------------------------------------- mistakes


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def spoil_clip(data, out):
    cut(data / "2.safetensors")


def spoil_vae(data, out):
    cut(out / "vae" / "diffusion_pytorch_model.safetensors")


def empty(data, out):
    for path in data.iterdir():
        path.unlink()


def odd(data, out):
    for path in data.iterdir():
        path.unlink()
    moving_squares(0, width=25).save(data / "0.safetensors")


def nothing(data, out):
    pass


MISTAKES = {
    "no data": (lambda data, out: [empty(data, out), data.rmdir()], [], "no clips"),
    "empty": (empty, [], "no clips"),
    "corrupt clip": (spoil_clip, [], "2.safetensors"),
    "corrupt VAE": (spoil_vae, [], "vae/diffusion_pytorch_model.safetensors"),
    "size": (odd, [], "clips are 25x16, not a multiple of 4"),
    "frames": (nothing, ["--frames", "9"], "has 4 frames, 9 are needed"),
    "unknown field": (nothing, ["--set", "speed=3"], "--set speed=3"),
    "bad value": (nothing, ["--set", "mask_ratio=high"], "'high' is not a float"),
    "bad choice": (nothing, ["--set", "control=magic"], "magic"),
}


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus_are_one_line(monkeypatch, clips, out, capsys, rank):
    """In every process, the one that has a GPU too: it would wait for the other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: 2 processes, but 1 GPU(s): each needs one of its own\n"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(monkeypatch, clips, out, tmp_path, capsys, mistake):
    spoil, extra, words = MISTAKES[mistake]
    data = tmp_path / "data"
    data.mkdir()
    for path in clips.glob("*.safetensors"):
        (data / path.name).write_bytes(path.read_bytes())
    spoil(data, out)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, data, out, *extra)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding")]
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and words in lines[0], lines
    assert not (out / "stage1").exists()
    assert not list(tmp_path.rglob("*.partial"))
