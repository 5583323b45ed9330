"""Several processes train as one would: shared batches (DistributedDataParallel), shared weights (--shard), another
number of them after a start, and how all of them end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from forks import ROOT, Forks
from safetensors.numpy import load_file, save_file
from tiny import UNET_CONFIG, clips_in, randomize, tiny_tower, tiny_vae

from clips import ClipDataset, ResumableSampler
from motion_dreamer import STAGE1, MotionDreamer
from svd import VAE, ImageEncoder
from training.batch import Chances, training_batch
from training.cache import CachedClips
from training.checkpoint import seed_of
from training.learner import freeze

SEED = 5
SETTINGS = {"lr": 1e-2, "warmup": 2, "cooldown": 0.5, "weight-decay": 0.3, "clip-grad": 0.5, "ema": 0.2, "seed": SEED}
STEPS = 4


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clips_in(tmp_path_factory.mktemp("clips"), 5)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder to start from, in which no weight is 0, so that each has a gradient."""
    folder = tmp_path_factory.mktemp("start")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_tower().save_pretrained(folder / "image_encoder")
    config = replace(STAGE1, vae_factor=4, latent_channels=16, frames=4, width=24, height=16)
    unet = replace(UNET_CONFIG, block_out_channels=(8,), attention=(False,), num_attention_heads=(2,))
    randomize(MotionDreamer(config, unet), scale=0.1).save_pretrained(folder / "stage1")
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


def encoders(folder):
    return VAE.from_pretrained(folder, "vae"), ImageEncoder.from_pretrained(folder, "image_encoder")


def by_hand(clips, folder, processes, accumulate):
    """What `processes` would make of Stage I, each with `accumulate` batches of 2 clips a step, in a single loop ->
    (weights, moving average, loss of each process, norm of the gradient) after every step."""
    vae, tower = encoders(folder)
    stage = MotionDreamer.from_pretrained(folder, "stage1").requires_grad_(True)
    average = {name: value.clone() for name, value in stage.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.parameters(), betas=(0.9, 0.99), weight_decay=0.3)
    data = CachedClips(ClipDataset(clips), stage.config, vae, tower)
    order = list(islice(ResumableSampler(len(data), seed=SEED), 2 * processes * accumulate * STEPS))
    results = []
    for step in range(STEPS):
        losses, gradients = [], []
        for rank in range(processes):
            stage.zero_grad()
            losses.append(0)
            for micro in range(accumulate):
                batch = [((step * accumulate + micro) * 2 + k) * processes + rank for k in (0, 1)]
                batch = torch.utils.data.default_collate([data[order[place]] for place in batch])
                generator = torch.Generator().manual_seed(seed_of(SEED, rank, step, micro))
                told = training_batch(stage, batch, vae, generator, Chances(0.1, 0.25))
                loss = stage.loss(told, generator)["loss"].mean() / accumulate
                loss.backward()
                losses[-1] += loss.item()
            gradients.append([value.grad for value in stage.parameters()])
        for value, *each in zip(stage.parameters(), *gradients, strict=True):
            value.grad = None if each[0] is None else sum(each) / processes
        norm = sum(value.grad.double().square().sum() for value in stage.parameters() if value.grad is not None) ** 0.5
        for value in (value for value in stage.parameters() if value.grad is not None):
            value.grad *= min(1, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 2, (STEPS - step) / (0.5 * STEPS))
        optimizer.step()
        decay = min(0.2, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in stage.state_dict().items()}
        weights = {name: value.clone() for name, value in stage.state_dict().items()}
        results.append((weights, average, losses, norm.item()))
    return results


CANCELS = re.compile(r"flow_control\.metrics\.\d+\.bias")  # in the softmax of Eq. 7: its gradient is all rounding


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
    """Weights and average of every process, after every second step: equal to a loop that is written here, and so to
    one another. The loss in the log is the mean over the clips of all processes."""
    out, clipped = trained[name], []
    for step, (weights, average, losses, norm) in enumerate(by_hand(clips, start, processes, accumulate=2), 1):
        clipped.append(norm > 0.5)
        assert logged(out)[step - 1]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert logged(out)[step - 1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert processes == 1 or losses[0] != pytest.approx(losses[1], rel=1e-2)  # so the mean is neither's
        for rank in range(processes) if step % 2 == 0 else ():
            state = watched(out, step, rank)
            assert state["loss"] == logged(out)[step - 1]["loss"]
            assert max(apart(state["weights"], weights), apart(state["average"], average)) < 1e-5
            for key in (key for key in weights if not CANCELS.fullmatch(key)):
                torch.testing.assert_close(state["weights"][key], weights[key], rtol=1e-3, atol=2e-5, msg=key)
                torch.testing.assert_close(state["average"][key], average[key], rtol=1e-3, atol=2e-5, msg=key)
    assert set(clipped) == {True, False}


def test_shared_weights_train_as_whole_ones_and_take_half_the_memory(trained):
    for step in (2, 4):
        for rank in range(2):
            whole, shared = (watched(trained[name], step, rank) for name in ("two", "sharded"))
            assert apart(shared["weights"], whole["weights"]) < 1e-5
            assert apart(shared["average"], whole["average"]) < 1e-5
            assert shared["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert shared["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    whole, two, shared = (watched(trained[name], 0)["held"] for name in ("one", "two", "sharded"))
    assert two / whole == pytest.approx(3.5 / 4, rel=0.03)  # half an average
    assert shared / whole == pytest.approx(1 / 2, rel=0.05)


def test_blocks_of_which_nothing_is_trained_can_be_shared(forks, clips, start, tmp_path):
    states = []
    for extra in ((), ("--shard",)):
        out = tmp_path / f"out{len(extra)}"
        go_on(forks, 2, out, command(clips, start, out, "--train", "added", *extra, steps=2))
        states.append(watched(out, 2, rank=1))
    assert max(apart(states[0][part], states[1][part]) for part in ("weights", "average")) < 1e-5
    files = [[load_file(path) for path in tmp_path.glob(f"out{k}/training/*/step_*/rows_*")] for k in (0, 1)]
    sizes = [sum(value.nbytes for rows in found for value in rows.values()) for found in files]
    stage = MotionDreamer.from_pretrained(start, "stage1")
    freeze(stage, "added")
    trained = sum(value.numel() for value in stage.parameters() if value.requires_grad)
    assert trained < 0.6 * sum(value.numel() for value in stage.parameters())
    assert 16 * trained <= sizes[0] == sizes[1] < 16 * trained + 1000  # of all else, a few numbers


# ------------------------------------------------------------------------------------------ another number of processes


def copied(trained, name, tmp_path, step):
    """The model folder of a run, as it was after this step."""
    out = shutil.copytree(trained[name], tmp_path / name, ignore=shutil.ignore_patterns("rank_*"))
    for folder in (out / "training" / "stage1").glob("step_*"):
        if folder.name > f"step_{step:08d}":
            shutil.rmtree(folder)
    return out


def go_on(forks, count, out, told):
    codes = forks.run([told] * count, out, WATCH=out)
    assert codes == [0] * count, [forks.errors(rank) for rank in range(count)]
    return out


def test_whole_and_shared_weights_go_on_from_the_checkpoints_of_one_another(forks, trained, clips, start, tmp_path):
    """All processes from the last whole one, of which one says so."""
    for wrote, extra in (("two", ["--shard"]), ("sharded", [])):
        out = copied(trained, wrote, tmp_path, 4)
        rows = out / "training" / "stage1" / "step_00000004" / "rows_0001_0000.safetensors"
        rows.write_bytes(rows.read_bytes()[:-1])
        go_on(forks, 2, out, command(clips, start, out, "--accumulate", 2, *extra))
        said = f"train.py: {rows.parent}: cannot be read ({rows.name} has changed); going on from the one before\n"
        assert (forks.errors(0), forks.errors(1)) == (said, "")
        assert [line["step"] for line in logged(out)] == [*range(1, STEPS + 1)]
        for rank, part in ((rank, part) for rank in range(2) for part in ("weights", "average")):
            before, then = watched(out, 2, rank)[part], watched(trained[wrote], 2, rank)[part]
            assert all(torch.equal(value, before[name]) for name, value in then.items())
            assert apart(watched(out, STEPS, rank)[part], watched(trained["two"], STEPS, rank)[part]) < 1e-5
        assert rows.read_bytes() and len(list(rows.parent.glob("rows_*"))) == 2


def test_one_process_goes_on_where_two_have_stopped(forks, trained, clips, start, tmp_path):
    """With their weights and averages, bit for bit, and with the clips that come next; also with another --batch."""
    out = copied(trained, "two", tmp_path, 2)
    go_on(forks, 1, out, command(clips, start, out, "--batch", 6, steps=3))
    before, then = watched(out, 2), watched(trained["two"], 2)
    for part in ("weights", "average"):
        assert all(torch.equal(value, before[part][name]) for name, value in then[part].items())
    stage, vae, tower = MotionDreamer.from_pretrained(out, "stage1"), *encoders(out)
    stage.load_state_dict(then["weights"])
    order, data = (
        list(islice(ResumableSampler(5, seed=SEED), 22)),
        CachedClips(ClipDataset(clips), stage.config, vae, tower),
    )
    batch = torch.utils.data.default_collate([data[place] for place in order[16:]])  # 2 steps of 8 clips have been
    generator = torch.Generator().manual_seed(seed_of(SEED, 0, 2, 0))
    loss = stage.loss(training_batch(stage, batch, vae, generator, Chances(0.1, 0.25)), generator)["loss"].mean()
    assert logged(out)[2]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    told = json.loads((out / "training" / "stage1" / "step_00000003" / "state.json").read_text())
    assert told["clips"] == 22


# --------------------------------------------------------------------------------------------------------- how they end


def test_five_kills_at_any_moment_change_nothing(forks, clips, start, tmp_path):
    """Three while it trains, two while it saves. What is left of a save is gone in the end."""
    killed, whole, random = tmp_path / "killed", tmp_path / "whole", np.random.default_rng(0)
    folder, extra = killed / "training" / "stage1", ("--save-every", 1, "--cooldown", 0)
    steps = lambda: [path.name for path in folder.glob("step_*") if path.suffix != ".partial"]  # noqa: E731
    for kill in range(5):
        before = max(steps(), default="")
        (pid,) = forks.start([command(clips, start, killed, *extra, steps=10**6)], killed)
        while max(steps(), default="") <= before or (kill > 2 and not list(folder.glob("*.partial"))):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3) if kill <= 2 else 0)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait() == [-signal.SIGKILL]
    last = int(max(steps()).removeprefix("step_")) + 2
    for out in (killed, whole):
        assert forks.run([command(clips, start, out, *extra, steps=last)], out) == [0], forks.errors()
    assert sorted(steps()) == [f"step_{step:08d}" for step in (last - 1, last)] and not list(folder.glob("*.partial"))
    for name in (
        "stage1/diffusion_pytorch_model.safetensors",
        f"training/stage1/step_{last:08d}/rows_0000_0000.safetensors",
    ):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [line["loss"] for line in logged(killed)] == [line["loss"] for line in logged(whole)]


PID = """
import os, sys
sys.path[:0] = {paths}
import tiny, train
open(f"{folder}/{{os.environ['RANK']}}.pid", "w").write(str(os.getpid()))
train.PRESETS["tiny"] = tiny.TINY
train.main()
"""


def test_a_process_that_is_killed_ends_the_others_within_a_minute(clips, start, tmp_path):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(PID.format(paths=[str(ROOT), str(ROOT / "tests")], folder=tmp_path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    told, environment = (
        command(clips, start, out, steps=10**6),
        os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    run = subprocess.Popen([*launch, script, *told], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    log = out / "training" / "stage1" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        assert run.poll() is None
        time.sleep(0.1)
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_error_of_one_process_is_one_line_and_ends_all(forks, clips, start, tmp_path):
    data = shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".cache"))
    tensors = load_file(data / "2.safetensors")
    tensors["flow"][1, 0, 2, 3] = np.inf  # what `Clip.save` refuses to write
    save_file(tensors, data / "2.safetensors")
    began = time.monotonic()
    codes = forks.run([command(data, start, tmp_path / "out", stage="vae")] * 2, tmp_path)
    assert time.monotonic() - began < 60 and 2 in codes and 0 not in codes
    said = {forks.errors(0), forks.errors(1)}
    lost = {f"train.py: process {rank}: lost another process, which may have said why\n" for rank in range(2)}
    assert said - lost == {f"train.py: {data}/2.safetensors: flow holds a value that is not finite\n"}


def test_processes_that_do_not_share_a_file_system_are_refused(forks, clips, start, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    forks.start([command(clips, start, "runs/new")] * 2, tmp_path, places, SHOWN=1)
    assert forks.wait() == [2, 2]
    said = "train.py: --out runs/new: process 1 of 2 does not see there what process 0 writes\n"
    assert (forks.errors(0), forks.errors(1)) == (said, "")
    assert not list(tmp_path.rglob("runs/new/*")) and not list(tmp_path.rglob("runs/new/.*"))
    for place in places:  # --out is one folder, and each machine has clips of its own: latents would be missing
        shutil.copytree(clips, place / "data")
    forks.start([command("data", start, tmp_path / "out")] * 2, tmp_path, places, SHOWN=1)
    assert forks.wait() == [2, 2] and forks.errors(1) == ""
    assert re.fullmatch(r"train.py: --data data/\.cache/\S+: process 1 of 2 does not .*\n", forks.errors(0))


# ----------------------------------------------------------------------------------------------------- what they share


def test_validation_does_not_depend_on_how_many_share_it(forks, clips, start, tmp_path):
    """Not where there are more processes than clips, either."""
    data, found = tmp_path / "val", []
    data.mkdir()
    for seed in (1, 3):
        shutil.copy(clips / f"{seed}.safetensors", data)
    for count in (1, 3):
        out = tmp_path / str(count)
        told = command(clips, start, out, "--val", data, "--val-samples", 2, "--lr", 0, steps=1)
        assert forks.run([told] * count, out) == [0] * count, forks.errors()
        found.append({name: value for name, value in logged(out)[0].items() if name.startswith("val_")})
    assert found[0] == found[1] and len(found[0]) > 8
