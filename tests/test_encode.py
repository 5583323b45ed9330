"""clips/encode.py: train.py finds the latents that it would make itself, whoever made them and however often."""

import os
import re
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from forks import Forks
from safetensors.numpy import load_file, save_file
from test_train import command as train_command
from tiny import TINY, UNET_CONFIG, moving_squares, tiny_stage, tiny_tower, tiny_vae

import train
from clips import encode as script
from motion_dreamer import STAGE1, STAGE2, SmallStageConfig
from svd import UNet
from training import cache

LATENTS = {"token", "flow", "segmentation", "segmentation.marked", "depth", "rgb"}


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture
def data(tmp_path):
    for seed in range(3):
        moving_squares(seed).save(tmp_path / "data" / f"{seed}.safetensors")
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path):
    """A model folder before its stages; with unet/, also one of SVD's."""
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    tiny_tower().save_pretrained(tmp_path / "model" / "image_encoder")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)


def encode(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["clips.encode", *map(str, words)])
    script.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        encode(monkeypatch, capsys, *words)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding clips: ")]
    (line,) = filter(str.strip, lines)  # the progress bar, and what wipes it out
    return line.removeprefix("clips.encode: ")


def times(data):
    return {path: path.stat().st_mtime_ns for path in data.glob(".cache/*/*.safetensors")}


def names(data, clip="0"):
    return {path.name.split(".", 1)[1].removesuffix(".safetensors") for path in times(data) if path.name[0] == clip}


def train_finds_them(monkeypatch, data, out, *words, stage):
    """A training run on these clips makes no latents."""

    def surprise(*told):
        raise AssertionError(f"train.py encodes clips for --stage {stage}")

    with monkeypatch.context() as during:
        during.setattr(cache, "encode_clips", surprise)
        during.setattr(sys, "argv", ["train.py", *train_command(data, out, *words, stage=stage, steps=1)])
        train.main()


def test_both_stages_of_a_small_model_find_their_latents(monkeypatch, capsys, data, model):
    told = encode(monkeypatch, capsys, data, "--model", model, "--preset", "tiny")
    assert re.search(r"/data/\.cache/\S+: 3 clips encoded, 0 were there; \d+\.\d\d seconds a clip with 1 process", told)
    assert names(data) == names(data, "2") == LATENTS
    before = times(data)
    for stage in "12":
        train_finds_them(monkeypatch, data, model, stage=stage)
    told = encode(monkeypatch, capsys, data, "--model", model, "--preset", "tiny", "--workers", 1)
    assert "the latents of all 3 clips were there, nothing was to do" in told and times(data) == before
    moving_squares(7).save(data / "1.safetensors")
    told = encode(monkeypatch, capsys, data, "--model", model, "--preset", "tiny")
    assert "1 clips encoded, 2 were there" in told
    assert {path.name[0] for path, at in times(data).items() if before[path] != at} == {"1"}


def test_the_latents_of_svd_are_those_that_init_asks_for(monkeypatch, capsys, data, model, tmp_path):
    UNet(UNET_CONFIG).save_pretrained(model / "unet")
    encode(monkeypatch, capsys, data, "--init", model)
    for stage in "12":
        train_finds_them(monkeypatch, data, tmp_path / stage, "--init", model, stage=stage)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("1", LATENTS - {"rgb"}),
        ("2", LATENTS),
        ("one", {"token", "rgb", "segmentation.first", "segmentation.marked.first", "depth.first"}),
    ],
)
def test_of_one_stage_there_is_what_it_needs(monkeypatch, capsys, data, model, stage, expected):
    encode(monkeypatch, capsys, data, "--model", model, "--preset", "tiny", "--stage", stage)
    assert names(data) == expected
    train_finds_them(monkeypatch, data, model, stage=stage)


def test_what_is_set_for_a_stage_that_is_there_is_encoded_too(monkeypatch, capsys, data, model):
    train_finds = ("--model", model, "--preset", "tiny", "--stage", "2")
    encode(monkeypatch, capsys, data, *train_finds)
    train_finds_them(monkeypatch, data, model, stage="2")
    encode(monkeypatch, capsys, data, *train_finds, "--set", "draft=true")
    assert names(data) == LATENTS | {"draft", "draft.marked"}


def test_what_is_set_for_a_stage_from_nothing_is_encoded_too(monkeypatch, capsys, data, model):
    told, draft = ("--model", model, "--preset", "tiny"), ("--set", "draft=true", "motion_weight=0.5")
    encode(monkeypatch, capsys, data, *told, "--stage", "2", *draft)
    assert names(data) == LATENTS | {"draft", "draft.marked"}
    train_finds_them(monkeypatch, data, model, *draft, stage="2")
    train_finds_them(monkeypatch, data, model, stage="1")
    assert refused(monkeypatch, capsys, data, *told, *draft).startswith("draft is True, but only a Stage II")
    assert refused(monkeypatch, capsys, data, *told, "--set", "drafts=1").startswith(
        "--set drafts=1: StageConfig has no"
    )


def test_stages_that_the_model_folder_has_say_what_is_encoded_in_which_cells(monkeypatch, capsys, data, model):
    """As --start trains them further. Here Stage I predicts no depth, Stage II has a draft, cells are 2 pixels wide."""
    sizes = {"frames": 4, "width": 24, "height": 16, "vae_factor": 2, "latent_channels": 4}
    tiny_stage(replace(STAGE1, predict=("flow", "segmentation"), **sizes)).save_pretrained(model / "stage1")
    encode(monkeypatch, capsys, data, "--model", model, "--stage", "2")
    assert names(data) == LATENTS and next(iter(times(data))).parent.name.split("-")[2] == "2"
    draft = SmallStageConfig(**(vars(replace(STAGE2, **sizes)) | {"draft": True}))
    tiny_stage(draft).save_pretrained(model / "stage2")
    encode(monkeypatch, capsys, data, "--model", model)
    assert names(data) == LATENTS | {"draft", "draft.marked", "depth.first"}
    for stage in "12":
        train_finds_them(monkeypatch, data, model.parent / "more", "--start", model, stage=stage)


def test_two_processes_share_the_clips_and_one_says_so(forks, data, model, tmp_path):
    for expected in ("3 clips encoded, 0 were there; ", "nothing was to do"):
        codes = forks.run([[data, "--model", model, "--preset", "tiny"]] * 2, tmp_path, SCRIPT="clips.encode")
        assert codes == [0, 0], (forks.errors(0), forks.errors(1))
        said = "".join((tmp_path / f"{rank}.out").read_text() for rank in range(2))
        assert said.count(".cache") == 1 and expected in said
    assert names(data) == names(data, "1") == names(data, "2") == LATENTS


def test_a_killed_run_loses_no_finished_clip(monkeypatch, capsys, forks, data, model, tmp_path):
    for seed in range(3, 300):
        os.link(data / f"{seed % 3}.safetensors", data / f"{seed}.safetensors")
    words = [data, "--model", model, "--preset", "tiny"]
    (pid,) = forks.start([words], tmp_path, SCRIPT="clips.encode")
    deadline = time.monotonic() + 100
    while len(times(data)) < 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait() == [-signal.SIGKILL]
    before = times(data)
    assert 100 <= len(before) < 300 * len(LATENTS)
    whole = [i for i in range(300) if len([path for path in before if path.name.startswith(f"{i}.")]) == len(LATENTS)]
    told = encode(monkeypatch, capsys, *words)
    assert whole and f"{300 - len(whole)} clips encoded, {len(whole)} were there" in told
    assert before.items() <= times(data).items() and len(times(data)) == 300 * len(LATENTS)


def test_what_cannot_be_encoded_once_is_refused_in_one_line(monkeypatch, capsys, data, model, tmp_path):
    told = ("--model", model, "--preset", "tiny")
    line = refused(monkeypatch, capsys, data, *told, "--frames", 3)
    assert line.startswith(f"{data}: has clips of 4 frames, more than 3: training draws windows")
    assert "no clips (*.safetensors) here" in refused(monkeypatch, capsys, tmp_path / "none", *told)
    line = refused(monkeypatch, capsys, data, "--model", tmp_path / "none")
    assert line == f"{tmp_path}/none: no such folder"
    (model / "stage1").mkdir()
    (model / "stage1" / "config.json").write_text("{}")
    assert refused(monkeypatch, capsys, data, *told) == f"{model}/stage1/config.json: 'stage' is missing"
    (model / "stage1" / "config.json").unlink()
    moving_squares(0, width=26).save(tmp_path / "wide" / "0.safetensors")
    line = refused(monkeypatch, capsys, tmp_path / "wide", *told)
    assert line == f"{tmp_path}/wide: clips are 26x16, not a multiple of 4"
    assert not times(data) and not list(tmp_path.glob("*/.cache"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_clip_is_named_and_the_others_stay(monkeypatch, capsys, data, model, workers):
    monkeypatch.setattr(cache, "ENCODED_TOGETHER", 1)
    path = data / "2.safetensors"
    tensors = load_file(path)
    tensors["depth"][-1] = np.nan
    save_file(tensors, path)
    line = refused(monkeypatch, capsys, data, "--model", model, "--preset", "tiny", "--workers", workers)
    assert line == f"{path}: depth holds a value that is not finite"
    assert names(data, "0") == LATENTS
