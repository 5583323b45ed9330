"""The whole method on one clip: train.py from nothing, sample.py's `dream()`; the clip must come back."""

import sys

import pytest
import torch
from tiny import TINY, moving_squares

import train
from clips import Clip
from instance_flow import instance_flow
from motion_dreamer import MotionDreamer, dream
from svd import VAE, ImageEncoder


def run_train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder that has seen one clip, and that clip."""
    folder, monkeypatch = tmp_path_factory.mktemp("overfit"), pytest.MonkeyPatch()
    monkeypatch.setitem(train.PRESETS, "tiny", TINY | {"stack": 1})  # eight channels are few for stacked latents
    moving_squares(0).save(folder / "data" / "clip.safetensors")
    told = ("--preset", "tiny", "--data", folder / "data", "--out", folder / "model", "--quiet")
    told += ("--lr", "1e-2", "--ema", "0.98", "--cooldown", "0.5")
    for stage, batch, steps in (("vae", 1, 270), ("1", 2, 100), ("2", 2, 110)):
        run_train(monkeypatch, "--stage", stage, *told, "--batch", batch, "--steps", steps)
    monkeypatch.undo()
    return folder / "model", Clip.load(folder / "data" / "clip.safetensors").tensors()


def test_the_clip_comes_back(trained):
    folder, clip = trained
    stage1, stage2 = (MotionDreamer.from_pretrained(folder, f"stage{i}").eval() for i in (1, 2))
    vae, tower = VAE.from_pretrained(folder, "vae").eval(), ImageEncoder.from_pretrained(folder, "image_encoder").eval()
    F = instance_flow(clip["flow"], clip["segmentation"])[None]
    firsts = [clip[name][None, 0] for name in ("rgb", "segmentation", "depth")]
    motion, video = dream(
        stage1, stage2, vae, tower, *firsts, F, frames=4, steps=20, generator=torch.Generator().manual_seed(0)
    )
    truth = clip["segmentation"]
    ious = []
    for i in (1, 2):
        a, b = motion.segmentation[0] == i, truth == i
        ious.append(((a & b).sum() / (a | b).sum()).item())
    psnr = -10 * ((video[0] - clip["rgb"]) / 2).square().mean().log10().item()
    moving = clip["flow"].norm(dim=1) > 0.1
    epe = (motion.flow[0] - clip["flow"]).norm(dim=1)[moving].mean() / clip["flow"].norm(dim=1)[moving].mean()
    assert min(ious) > 0.9
    assert psnr > 25
    assert epe < 0.25
