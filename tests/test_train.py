"""train.py: what a killed run loses (nothing), what two processes share (everything), and what it refuses."""

import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_rows
from tiny import TINY, UNET_CONFIG, VAE_CONFIG, clips_in, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

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
from training import checkpoint, learner, samples, task
from training.batch import Chances, training_batch
from training.cache import CachedClips, TrainingClips, encode_clips
from training.vae import vae_loss

ROOT = Path(__file__).parent.parent
SHIPPED = train.PRESETS["tiny"]


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clips_in(tmp_path_factory.mktemp("clips"), 5)


@pytest.fixture
def out(tmp_path):
    """A model folder with VAE and image tower, ready for the stages."""
    tiny_vae().save_pretrained(tmp_path / "out" / "vae")
    tiny_tower().save_pretrained(tmp_path / "out" / "image_encoder")
    return tmp_path / "out"


def command(clips, out, *extra, stage="1", steps=4):
    told = {"--stage": stage, "--data": clips, "--out": out, "--batch": 2}
    told |= {} if {"--start", "--init"} & set(extra) else {"--preset": "tiny"}
    told |= {} if "--minutes" in extra else {"--steps": steps}
    return [str(word) for pair in told.items() for word in pair] + ["--quiet", *map(str, extra)]


def run(monkeypatch, *arguments, **told):
    monkeypatch.setattr(sys, "argv", ["train.py", *command(*arguments, **told)])
    train.main()


def logged(out, name="stage1"):
    return [json.loads(line) for line in (out / "training" / name / "log.jsonl").read_text().splitlines()]


def saved(out, step, name="stage1"):
    """What a checkpoint holds: tensors by name, whole, and what else was told."""
    folder = out / "training" / name / f"step_{step:08d}"
    return checkpoint_tensors(folder), json.loads((folder / "state.json").read_text())


def checkpoint_tensors(folder):
    rows = {}
    for file in sorted(folder.glob("rows_*.safetensors")):  # processes by their number, so rows in their order
        for name, value in load_rows(file).items():
            rows.setdefault(name, []).append(value)
    return {name: torch.cat(parts) if parts[0].ndim else parts[0] for name, parts in rows.items()}


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

    update, steps = learner.MovingAverage.update, []

    def crash(*arguments):
        steps.append(1)
        if len(steps) == 5:  # after the save at step 3
            raise RuntimeError("killed")
        update(*arguments)

    monkeypatch.setattr(learner.MovingAverage, "update", crash)
    with pytest.raises(RuntimeError, match="killed"):
        run(monkeypatch, clips, killed, *told, stage=stage, steps=7)
    monkeypatch.setattr(learner.MovingAverage, "update", update)
    assert len(logged(killed, name)) == 4  # one step more than was saved
    run(monkeypatch, clips, killed, *told, stage=stage, steps=7)

    assert losses(killed, name) == losses(whole, name)
    for file in sorted(path.relative_to(whole) for path in (whole / name).iterdir()):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    (one, told), (other, told_too) = saved(whole, 7, name), saved(killed, 7, name)
    assert one.keys() == other.keys() and told == told_too
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_more_steps_go_on_and_other_settings_do_not(monkeypatch, clips, out, capsys):
    run(monkeypatch, clips, out, steps=2)
    run(monkeypatch, clips, out, steps=3)
    assert [line["step"] for line in logged(out)] == [1, 2, 3]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out, "--seed", 7, steps=4)
    assert stop.value.code == 2
    assert "was trained with seed = 0, now seed = 7" in capsys.readouterr().err


@pytest.mark.parametrize("file", [1 << 29, 10_000])
def test_a_full_disk_ends_the_run_with_one_line_and_the_former_checkpoint_stays(monkeypatch, clips, out, capsys, file):
    """There is no room for the checkpoint, or (as smaller files) for it, but not for the model folder."""
    run(monkeypatch, clips, out, steps=1)
    before = saved(out, 1)[0]
    capsys.readouterr()
    monkeypatch.setattr(checkpoint, "FILE", file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, clips, out, steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith(f"train.py: {out}"), said
    assert (out / "training" / "stage1" / "step_00000002").exists() == (file == 10_000)
    after = saved(out, 1)[0]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not list(out.rglob("*.partial"))
    run(monkeypatch, clips, out, steps=2)
    assert [line["step"] for line in logged(out)] == [1, 2]
    average = saved(out, 2)[0]["average.unet.conv_in.weight"]
    assert torch.equal(weights(out, "stage1").unet.conv_in.weight, average)


class Clock:
    """Ten seconds pass whenever somebody looks at it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 10
        return self.now


def test_with_minutes_the_clock_ends_the_run_and_the_learning(monkeypatch, clips, out, capsys):
    """Four looks a step: 30 s. A run that was stopped has the time that is left."""
    monkeypatch.setattr(train, "time", Clock())
    told = ["--minutes", 5, "--warmup", 2, "--cooldown", 0.5, "--lr", 1.0]
    take, count = train.take_step, [0]

    def stopped(*words):
        count[0] += 1
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*words)

    monkeypatch.setattr(train, "take_step", stopped)
    run(monkeypatch, clips, out, *told)
    assert len(logged(out)) == 4 and "4 steps in 2.0 minutes; run the same command to go on" in capsys.readouterr().out
    run(monkeypatch, clips, out, *told)
    rates = [line["lr"] for line in logged(out)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert "10 steps in 5.0 minutes\n" in capsys.readouterr().out


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_ends_as_if_never_stopped(
    monkeypatch, clips, out, tmp_path, capsys
):
    run(monkeypatch, clips, out, "--save-every", 3, "--keep", 3, steps=7)
    killed = shutil.copytree(out, tmp_path / "killed")
    folder = killed / "training" / "stage1"
    shutil.rmtree(folder / "step_00000007")
    rows = folder / "step_00000006" / "rows_0000_0000.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1])
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 8, "lo')  # the line in which it was killed
    capsys.readouterr()
    run(monkeypatch, clips, killed, "--save-every", 5, "--keep", 1, steps=7)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"train.py: {rows.parent}: cannot be read ({rows.name} has changed); going on from the one before"
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events."))  # TensorBoard's
    assert files == ["in-use", "log.jsonl", "step_00000007"]
    assert losses(killed) == losses(out)
    one, other = saved(killed, 7)[0], saved(out, 7)[0]
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def held():
    """Bytes of all tensors that anybody holds."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({thing.data_ptr(): thing.untyped_storage().nbytes() for thing in found}.values())


def test_a_run_that_goes_on_holds_no_more_than_one_that_starts(monkeypatch, clips, out):
    """No second copy of what was read: neither of weights, nor of averages, nor of AdamW's state."""
    step, found = train.take_step, []
    monkeypatch.setattr(train, "take_step", lambda *told: found.append(held()) or step(*told))
    for steps in (1, 2):
        before = held()
        run(monkeypatch, clips, out, steps=steps)
        found[-1] -= before
    copy = sum(value.nbytes for value in saved(out, 2)[0].values()) / 4
    assert found[1] < found[0] + copy / 10 and found[0] > 4 * copy


def test_the_model_folder_holds_the_moving_average(monkeypatch, clips, out):
    run(monkeypatch, clips, out, "--ema", "0.5", steps=3)
    state, _ = saved(out, 3)
    model = MotionDreamer.from_pretrained(out, "stage1")
    trained = {name.removeprefix("average.") for name in state if name.startswith("average.")}
    assert (model.config.frames, model.config.width, model.config.height) == (4, 24, 16)
    idle = {id(value) for value in without_effect(model)}
    assert trained == {key for key, value in model.named_parameters() if id(value) not in idle}
    assert all(torch.equal(model.state_dict()[key], state[f"average.{key}"]) for key in trained)
    assert any(not torch.equal(state[f"model.{key}"], state[f"average.{key}"]) for key in trained)


def test_cached_latents_give_the_losses_of_fresh_ones(monkeypatch, clips, out, tmp_path):
    run(monkeypatch, clips, out, "--warmup", 1, steps=3)
    cached = [line["loss"] for line in logged(out)]
    caches = {path.name for path in (clips / ".cache").iterdir()}
    shutil.rmtree(out / "training" / "stage1" / "step_00000003")
    run(monkeypatch, clips, out, "--no-cache", "--warmup", 1, steps=3)
    np.testing.assert_allclose(
        [line["loss"] for line in logged(out)], cached, rtol=5e-3
    )  # the cache is in half precision
    other = tiny_vae()
    other.encoder.conv_in.bias.data += 0.1
    other.save_pretrained(out / "vae")
    shutil.rmtree(out / "training" / "stage1" / "step_00000003")
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


def test_parts_of_any_length_are_decoded_by_themselves(monkeypatch):
    """By a VAE that changes nothing: frames stay in order, whatever their parts."""
    seen = set()

    class Same(torch.nn.Module):
        def moments(self, images):
            return images, torch.full_like(images, -100.0)

        def decode(self, latents):
            seen.add(tuple(latents.shape[:2]))
            return latents

    monkeypatch.setattr("training.vae.gaussian", lambda shape, *_: torch.zeros(shape))
    for frames, parts in ((4, {(8, 4), (16, 2), (32, 1)}), (3, {(8, 3), (24, 1)})):
        clips = torch.utils.data.default_collate([moving_squares(seed, frames).tensors() for seed in (0, 1)])
        for seed in range(20):
            losses = vae_loss(Same(), clips, torch.Generator().manual_seed(seed))
            assert all((losses[name] == 0).all() for name in ("rgb", "flow", "segmentation", "depth"))
        assert seen == parts
        seen.clear()


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


PARTS = {  # of a stage's parameters: one that --train trains, with that word or more, and one that it leaves
    "added": ("flow_control.stem.0.weight", "unet.mid_block.resnets.0.temporal_res_block.conv1.weight"),
    "temporal": (
        "unet.mid_block.attentions.0.time_mixer.mix_factor",
        "unet.mid_block.resnets.0.spatial_res_block.norm1.bias",
    ),
}
NEW = {"unet.conv_in.weight", "unet.conv_out.bias", "camera.queries.0.weight", "flow_control.metrics.0.bias"}


@pytest.mark.parametrize("train_", PARTS)
def test_what_is_not_trained_stays_and_is_kept_nowhere(monkeypatch, clips, out, tmp_path, train_):
    """Nor does it change the bits with which a run goes on."""
    tiny_stage(replace(STAGE1, vae_factor=4, latent_channels=16, frames=4, width=24, height=16)).save_pretrained(
        tmp_path / "start" / "stage1"
    )
    told = ("--train", train_, "--start", tmp_path / "start", "--lr", "1e-2", "--warmup", 1)
    whole = shutil.copytree(out, tmp_path / "whole")
    for folder, steps in ((out, 1), (out, 3), (whole, 3)):
        run(monkeypatch, clips, folder, *told, steps=steps)
    (tensors, _), before = saved(out, 3), dict(weights(tmp_path / "start", "stage1").named_parameters())
    trained = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    kept = {f"{kind}.{name}" for kind in ("model", "average") for name in trained}
    kept |= {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == kept
    assert {PARTS[train_][0], PARTS["added"][0], *NEW} <= trained and PARTS[train_][1] in before.keys() - trained
    changed = {
        name for name, value in weights(out, "stage1").named_parameters() if not torch.equal(value, before[name])
    }
    assert changed <= trained and len(changed) > len(trained) / 2
    file = "stage1/diffusion_pytorch_model.safetensors"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, clips, out, *told, "--train", "all", steps=4)


def test_steps_without_finite_gradients_are_skipped_and_counted(monkeypatch, clips, out, capsys):
    loss, calls = MotionDreamer.loss, []

    def broken(self, batch, generator=None):
        calls.append(1)
        result = loss(self, batch, generator)
        return result | {"loss": result["loss"] * (float("nan") if len(calls) >= 2 else 1)}

    monkeypatch.setattr(MotionDreamer, "forward", broken)
    run(monkeypatch, clips, out, "--save-every", 1, "--keep", 3, steps=3)
    assert [line["skipped"] for line in logged(out)] == [0, 1, 2]
    (before, _), (tensors, told) = saved(out, 1), saved(out, 3)
    assert told["skipped"] == 2 and all(value.isfinite().all() for value in tensors.values())
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())  # AdamW's, too
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
    clip["segmentation"][-1] = 0  # all objects have left, and that is what is shown
    found = samples.sample_figures(clip, clip)
    assert found["ids_miou"] == found["iou_last"] == found["silhouette_last"] == (1, 1)


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


def test_each_process_validates_its_share(monkeypatch, clips, out):
    shares, validate = [], train.validate
    monkeypatch.setattr(train, "from_all", lambda found: shares.append(sorted(found)) or [found])
    second_of_two = {"rank": 1, "world_size": 2}
    monkeypatch.setattr(train, "validate", lambda a, machine, *b: validate(a, replace(machine, **second_of_two), *b))
    run(monkeypatch, clips, out, "--val", clips, "--val-samples", 3, steps=1)
    assert shares == [[1, 3], [1]]


def test_a_finished_run_is_not_saved_again_but_its_model_folder_is(monkeypatch, clips, out):
    """It may have been killed between the two."""
    run(monkeypatch, clips, out, steps=2)
    file, state = (
        out / "stage1" / "diffusion_pytorch_model.safetensors",
        out / "training/stage1/step_00000002/state.json",
    )
    content, made = file.read_bytes(), state.stat().st_mtime_ns
    shutil.rmtree(out / "stage1")
    run(monkeypatch, clips, out, steps=2)
    assert file.read_bytes() == content and state.stat().st_mtime_ns == made


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
    told = () if stage == "vae" else ("--set", *extras, "reduce=start")
    run(monkeypatch, clips, out, *told, stage=stage, steps=2)
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


def test_a_vae_without_a_further_step_keeps_the_scale_that_stages_have_learned(monkeypatch, clips, out, tmp_path):
    """Whatever clips have come: the command that goes on is the same for all three parts."""
    data = tmp_path / "more"
    shutil.copytree(clips, data)
    run(monkeypatch, data, out, stage="vae", steps=2)
    before = (out / "vae" / "config.json").read_text()
    for path in data.glob("*.safetensors"):
        path.unlink()
    for seed in range(30, 34):
        moving_squares(seed).save(data / f"0{seed}.safetensors")
    run(monkeypatch, data, out, stage="vae", steps=2)
    assert (out / "vae" / "config.json").read_text() == before
    run(monkeypatch, data, out, stage="vae", steps=3)
    assert (out / "vae" / "config.json").read_text() != before


def test_a_full_gpu_is_one_line(monkeypatch, clips, out, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore of it.")

    monkeypatch.setattr(train, "take_step", full)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, clips, out, steps=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and "memory does not suffice" in line


def test_sizes_that_no_latent_has_are_told_before_a_step(monkeypatch, clips, out, tmp_path, capsys):
    """Of the VAE's clips, and of those to validate with."""
    odd = tmp_path / "odd"
    clip = moving_squares(1)
    cut = {name: getattr(clip, name)[..., :-1] for name in ("flow", "segmentation", "depth")}
    replace(clip, rgb=clip.rgb[:, :, :-1], **cut).save(odd / "1.safetensors")
    for stage, data, more in (("vae", odd, []), ("1", clips, ["--val", str(odd)])):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, data, out, *more, stage=stage, steps=1)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and re.search(rf"{odd}: clips are \d+x\d+, not a multiple of", line)
        assert not list(out.glob("training/*/log.jsonl"))


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
    extras = {"told": True, "show_flow": True, "mask_start": 0.5}
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
def test_a_signal_to_all_processes_saves_and_the_same_command_goes_on(monkeypatch, clips, out, workers):
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
    assert (out / "training" / "vae" / f"step_{steps:08d}").is_dir()
    monkeypatch.setitem(train.PRESETS, "tiny", SHIPPED)  # as the other process had it
    run(monkeypatch, clips, out, *extra, stage="vae", steps=steps + 1)
    assert [line["step"] for line in logged(out, "vae")] == list(range(1, steps + 2))


def test_a_second_signal_does_not_disturb_the_save(monkeypatch, clips, out):
    def impatient(*told):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return saved_by(*told)

    saved_by, before = train.save, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "save", impatient)
    run(monkeypatch, clips, out, stage="vae", steps=1)
    assert (out / "training" / "vae" / "step_00000001").is_dir() and signal.getsignal(signal.SIGTERM) is before


def test_two_runs_in_one_folder_are_one_line(monkeypatch, clips, out, capsys):
    """The second one ends, and leaves what the first has written; when that has ended, however, it may."""
    pytest.importorskip("fcntl")
    run(monkeypatch, clips, out, steps=1)
    held = "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
    held += "print('here', flush=True)\ntime.sleep(60)"
    path = out / "training" / "stage1" / "in-use"
    with subprocess.Popen([sys.executable, "-c", held, path], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"here\n"
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, clips, out, steps=2)
        assert stop.value.code == 2 and capsys.readouterr().err == (
            f"train.py: {path.parent}: another run is at work here\n"
        )
        assert len(logged(out)) == 1
        first.kill()
    run(monkeypatch, clips, out, steps=2)
    assert len(logged(out)) == 2


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


def former(data, out):
    (out / "training" / "stage1").mkdir(parents=True)
    (out / "training" / "stage1" / "step_00000003.pt").write_bytes(b"")


MISTAKES = {
    "no data": (lambda data, out: [empty(data, out), data.rmdir()], [], "no clips"),
    "empty": (empty, [], "no clips"),
    "corrupt clip": (spoil_clip, [], "2.safetensors"),
    "corrupt VAE": (spoil_vae, [], "vae/diffusion_pytorch_model.safetensors"),
    "size": (odd, [], "clips are 25x16, not a multiple of 4"),
    "frames": (nothing, ["--frames", "9"], "has 4 frames, 9 are needed"),
    "nothing to measure": (nothing, ["--val-samples", "9"], "--val-samples: of --val, without which it would be"),
    "steps and minutes": (nothing, ["--minutes", "9", "--steps", "9"], "--steps: with --minutes it would be ignored"),
    "sizes from nothing": (nothing, ["--start", "m", "--preset", "tiny"], "--preset: of a model from nothing"),
    "sizes, though SVD's": (nothing, ["--init", "m", "--preset", "tiny"], "--preset: of a model from nothing"),
    "nothing to look at": (nothing, ["--val-every", "9"], "--val-every: of --val, without which it would be ignored"),
    "no save": (nothing, ["--save-every", "0"], "--save-every 0: expected 1 at least"),
    "unknown field": (nothing, ["--set", "speed=3"], "--set speed=3"),
    "bad value": (nothing, ["--set", "mask_ratio=high"], "'high' is not a float"),
    "fields of a VAE": (
        nothing,
        ["--stage", "vae", "--set", "foo=1"],
        "--set: of --stage 1, 2 and one, not of the VAE",
    ),
    "seed of 65 bits": (nothing, ["--seed", str(2**64)], "--seed 1.84467e+19: expected a whole number of 63 bits"),
    "row of a VAE": (nothing, ["--stage", "vae", "--ablation", "sparse_flow"], "--ablation: of --stage 1, 2 and one"),
    "drop of a VAE": (nothing, ["--stage", "vae", "--drop", "0.5"], "--drop: of --stage 1, 2 and one, not of the VAE"),
    "SVD's VAE": (nothing, ["--stage", "vae", "--init", "a/b"], "--init: of --stage 1, 2 and one, not of the VAE"),
    "row of one": (
        nothing,
        ["--stage", "one", "--ablation", "sparse_flow"],
        "--ablation: of --stage 1 and 2, not of one",
    ),
    "no frame": (nothing, ["--set", "frames=0"], "frames is 0, expected 1 to 65536"),
    "odd factor": (nothing, ["--set", "vae_factor=3"], "vae_factor a power of 2"),
    "part of a VAE": (nothing, ["--stage", "vae", "--train", "added"], "of --stage 1, 2 and one, not of the VAE"),
    "one shard": (nothing, ["--shard"], "--shard: one process"),
    "decoder of a stage": (nothing, ["--decoder-only"], "--decoder-only: of --stage vae, not of 1"),
    "former checkpoint": (former, [], "step_00000003.pt: of a former version, not read any more"),
    "bad choice": (nothing, ["--set", "control=magic"], "magic"),
}


@pytest.mark.parametrize("name", [*train.LEAST, *train.SHARES, *train.ABOVE_0])
def test_numbers_without_a_meaning_are_one_line(monkeypatch, clips, out, capsys, name):
    """Below what is possible, above it, and not a number at all; what is just possible passes."""
    least = train.LEAST.get(name, 0)
    wrong = ["-1", str(least - 1), "nan", "inf", "1.1" if name in train.SHARES else "-2"]
    wrong += ["0"] if name in train.ABOVE_0 else []
    flag, val = "--" + name.replace("_", "-"), ["--val", clips] if name.startswith("val_") else []
    for text in wrong:
        monkeypatch.setattr(sys, "argv", ["train.py", *command(clips, out, *val, flag, text)])
        with pytest.raises((SystemExit, ValueError)) as stop:
            train.parse_arguments()
        if stop.type is ValueError:
            assert str(stop.value).startswith(f"{flag} {float(text):g}: expected ")
        else:
            assert stop.value.code == 2 and f"argument {flag}: " in capsys.readouterr().err  # no whole number
    value = "0.5" if name in train.ABOVE_0 else str(least)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(clips, out, *val, flag, value)])
    assert getattr(train.parse_arguments(), name) == float(value)


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
