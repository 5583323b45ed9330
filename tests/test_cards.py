"""Several processes train as one would: shared batches (DistributedDataParallel), shared weights (--shard), another
number of them after a start, and how all of them end."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from forks import Forks
from tiny import moving_squares, tiny_stage, tiny_tower, tiny_vae

from clips import ClipDataset, ResumableSampler
from motion_dreamer import STAGE1, MotionDreamer
from svd import VAE, ImageEncoder
from training.batch import Chances, training_batch
from training.cache import CachedClips
from training.checkpoint import seed_of

SETTINGS = {"lr": 1e-2, "warmup": 2, "cooldown": 0.5, "weight-decay": 0.3, "clip-grad": 0.25, "ema": 0.2, "seed": 3}
STEPS = 5


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(5):
        moving_squares(seed).save(folder / f"{seed}.safetensors")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder to start from, in which no weight is 0, so that each has a gradient."""
    folder = tmp_path_factory.mktemp("start")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_tower().save_pretrained(folder / "image_encoder")
    config = replace(STAGE1, vae_factor=4, latent_channels=16, frames=4, width=24, height=16)
    tiny_stage(config).save_pretrained(folder / "stage1")
    return folder


def command(clips, start, out, *extra, steps=STEPS, stage="1"):
    told = {"--stage": stage, "--start": start, "--data": clips, "--out": out, "--steps": steps, "--batch": 2}
    told |= {f"--{name}": value for name, value in SETTINGS.items()}
    return [str(word) for pair in told.items() for word in pair] + ["--quiet", *map(str, extra)]


def watched(folder, step, rank=0):
    return torch.load(folder / f"rank_{rank}_step_{step}.pt")


def logged(out, name="stage1"):
    return [json.loads(line) for line in (out / "training" / name / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(forks, clips, start, tmp_path_factory):
    """Runs of the same five steps, each with what it was before and after every step: one process; two; two that shard
    their weights."""
    found = {}
    for name, count, extra in (("one", 1, ()), ("two", 2, ()), ("sharded", 2, ("--shard", "--checkpointing"))):
        out = tmp_path_factory.mktemp(name)
        told = command(clips, start, out, "--accumulate", 2, "--save-every", 2, "--keep", 9, *extra)
        codes = forks.run([told] * count, out, WATCH=out)
        assert codes == [0] * count, [forks.errors(rank) for rank in range(count)]
        found[name] = out
    return found


def by_hand(clips, folder, processes, accumulate):
    """What `processes` would make of Stage I, each with `accumulate` batches of 2 clips a step, in a single loop ->
    (weights, moving average, loss of each process, norm of the gradient) after every step."""
    vae, tower = VAE.from_pretrained(folder, "vae"), ImageEncoder.from_pretrained(folder, "image_encoder")
    stage = MotionDreamer.from_pretrained(folder, "stage1").requires_grad_(True)
    average = {name: value.clone() for name, value in stage.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.parameters(), betas=(0.9, 0.99), weight_decay=0.3)
    data = CachedClips(ClipDataset(clips), stage.config, vae, tower)
    order = list(islice(ResumableSampler(len(data), seed=3), 2 * processes * accumulate * STEPS))
    results = []
    for step in range(STEPS):
        losses, gradients = [], []
        for rank in range(processes):
            stage.zero_grad()
            losses.append(0)
            for micro in range(accumulate):
                batch = [((step * accumulate + micro) * 2 + k) * processes + rank for k in (0, 1)]
                batch = torch.utils.data.default_collate([data[order[place]] for place in batch])
                generator = torch.Generator().manual_seed(seed_of(3, rank, step, micro))
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
            group["lr"] = 1e-2 * min(1, (step + 1) / 2, (STEPS - step) / (0.5 * STEPS))
        optimizer.step()
        decay = min(0.2, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in stage.state_dict().items()}
        weights = {name: value.clone() for name, value in stage.state_dict().items()}
        results.append((weights, average, losses, norm.item()))
    return results


def apart(found, expected):
    """The norm of the difference between tensors of the same names, of their norm. (AdamW makes much of a gradient that
    is nothing but rounding: single numbers may be further apart.)"""
    assert found.keys() == expected.keys()
    both = [torch.cat([side[name].double().flatten() for name in expected]) for side in (found, expected)]
    return ((both[0] - both[1]).norm() / both[1].norm()).item()


@pytest.mark.parametrize(("name", "processes"), [("one", 1), ("two", 2)])
def test_processes_and_accumulated_batches_train_as_one_loop_over_all_clips_would(
    trained, clips, start, name, processes
):
    """Weights and average of every process, after every step: equal to a loop that is written here, and so to one
    another. The loss in the log is the mean over the clips of all processes."""
    out, clipped = trained[name], []
    for step, (weights, average, losses, norm) in enumerate(by_hand(clips, start, processes, accumulate=2), 1):
        clipped.append(norm > 0.25)
        for rank in range(processes):
            state = watched(out, step, rank)
            assert state["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
            assert state["grad_norm"] == pytest.approx(norm, rel=1e-3)
            assert max(apart(state["weights"], weights), apart(state["average"], average)) < 2e-6
            for key in weights:
                torch.testing.assert_close(state["weights"][key], weights[key], rtol=1e-3, atol=2e-5, msg=key)
                torch.testing.assert_close(state["average"][key], average[key], rtol=1e-3, atol=2e-5, msg=key)
        assert logged(out)[step - 1]["loss"] == state["loss"]
        assert processes == 1 or losses[0] != pytest.approx(losses[1], rel=1e-2)  # so the mean is neither's
    assert set(clipped) == {True, False}


def test_shared_weights_train_as_whole_ones_and_take_half_the_memory(trained):
    for step in range(1, STEPS + 1):
        for rank in range(2):
            whole, shared = (watched(trained[name], step, rank) for name in ("two", "sharded"))
            assert apart(shared["weights"], whole["weights"]) < 2e-6
            assert apart(shared["average"], whole["average"]) < 2e-6
            assert shared["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert shared["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    whole, two, shared = (watched(trained[name], 0)["held"] for name in ("one", "two", "sharded"))
    assert two / whole == pytest.approx(3.5 / 4, rel=0.03)  # half an average
    assert shared / whole == pytest.approx(1 / 2, rel=0.05)
