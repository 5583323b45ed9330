"""The shipped model does what it is shown for: the pushed domino falls, and what nobody pushes stays."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from inputs import Arrows, arrows_to_flow, told_mask
from motion_dreamer import MotionDreamer, dream
from svd import VAE, ImageEncoder

DEMO = Path(__file__).parent.parent / "demo"


@pytest.fixture(scope="module")
def flows():
    """Stage I's flow [T, 2, H, W] of the example for every arrows file, three times where nothing is told, and the ids
    [H, W]."""
    picture = torch.from_numpy(np.array(Image.open(DEMO / "example.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    ids = torch.from_numpy(np.array(Image.open(DEMO / "ids.png"))).long()
    depth = torch.from_numpy(np.array(Image.open(DEMO / "depth.png")).astype(np.float32) / 1000)
    stage = MotionDreamer.from_pretrained(DEMO, "stage1", dtype=torch.float32).eval()
    vae = VAE.from_pretrained(DEMO, "vae", dtype=torch.float32).eval()
    tower = ImageEncoder.from_pretrained(DEMO, "image_encoder", dtype=torch.float32).eval()
    names = ("arrows", "arrows_opposite", "arrows_still", "arrows_none", "arrows_none", "arrows_none")
    files = [Arrows.load(DEMO / f"{name}.json") for name in names]
    F = torch.stack([arrows_to_flow(arrows, ids, stage.config.frames) for arrows in files])
    mask = torch.stack([told_mask(arrows, ids) for arrows in files])
    told = [value.expand(len(names), *value.shape) for value in (picture[0], ids, depth)]
    motion, _ = dream(
        stage, None, vae, tower, *told, F, frames=stage.config.frames, steps=5,
        generator=torch.Generator().manual_seed(0), mask=mask,
    )  # fmt: skip
    return dict(zip(names, motion.flow, strict=True)) | {"free": motion.flow[3:]}, ids


def pushed(ids):
    x, y = json.loads((DEMO / "arrows.json").read_text())["arrows"][0]["start"]
    return ids[y, x].item()


def test_the_pushed_domino_falls(flows):
    flow, ids = flows
    assert pushed(ids) in metrics.fallen_points(*metrics.carry(flow["arrows"], ids))


def test_the_pushed_domino_goes_where_the_arrow_points(flows):
    flow, ids = flows
    for name in ("arrows", "arrows_opposite"):
        arrow = json.loads((DEMO / f"{name}.json").read_text())["arrows"][0]
        way = metrics.displacement(*metrics.carry(flow[name], ids), pushed(ids))
        assert (arrow["end"][0] - arrow["start"][0]) * way[0] > 0


def test_what_is_told_to_stay_stands(flows):
    flow, ids = flows
    assert metrics.fallen_points(*metrics.carry(flow["arrows_still"], ids)) == set()
    assert flow["arrows_still"].norm(dim=1).mean() < 0.05 * flow["arrows"].norm(dim=1).mean()


def test_where_nothing_is_told_something_may_happen(flows):
    """Nine of ten clips that it was trained on show a push: in some of three samples, something falls by itself."""
    flow, ids = flows
    assert any(metrics.fallen_points(*metrics.carry(sample, ids)) for sample in flow["free"])


@pytest.mark.parametrize("script", sorted(path.name for path in DEMO.glob("*.py")))
def test_scripts_only_act_when_they_are_asked_to(tmp_path, monkeypatch, capsys, script):
    """A copy without a model: what acted would fail or leave a file."""
    (tmp_path / script).write_bytes((DEMO / script).read_bytes())
    for word, status in (("--help", 0), ("--nothing", 2)):
        monkeypatch.setattr(sys, "argv", [script, word])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "path", [*sys.path])  # a script adds its own
            runpy.run_path(str(tmp_path / script), run_name="__main__")
        assert stop.value.code == status and f"usage: {script}" in "".join(capsys.readouterr())
        assert [path.name for path in tmp_path.iterdir()] == [script]
