"""The shipped examples: each is there, its arrows lie on objects and say what the simulator's scene does."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_stage, tiny_tower, tiny_vae

import sample
from inputs import Arrows, arrows_to_flow, find_example, read_depth, read_rgb, read_segmentation
from motion_dreamer import STAGE1, STAGE2, SmallStageConfig

simulate = pytest.importorskip("clips.simulate")
from instance_flow import instance_flow  # noqa: E402 (after the simulator, without which nothing here runs)

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))
import make_example  # noqa: E402

SIZES = {"vae_factor": 2, "frames": 3, "width": 32, "height": 16, "sigma_max": 80.0}


@pytest.mark.parametrize("world", simulate.SCENARIOS)
def test_every_world_has_an_example_whose_arrows_start_on_objects(world):
    """On the pushed thing, or one on every car; and the second file tells another motion from the same picture."""
    image, files = find_example(world)
    ids = read_segmentation(Path(image).with_name("ids.png"))
    depth = read_depth(Path(image).with_name("depth.png"))
    assert read_rgb(image).shape == (64, 128, 3) and ids.shape == depth.shape == (64, 128)
    flows, cameras = [], []
    for file in files:
        arrows = Arrows.load(file)
        tails = [int(ids[int(arrow.start[1]), int(arrow.start[0])]) for arrow in arrows.arrows]
        assert 0 not in tails and len(set(tails)) == len(tails)
        assert world != "driving" or set(tails) == set(np.unique(ids)) - {0}
        assert Path(arrows.segmentation).samefile(Path(image).with_name("ids.png")) and arrows.depth
        flow = arrows_to_flow(arrows, torch.from_numpy(ids).long(), frames=16)
        lengths = [flow[:, torch.from_numpy(ids == i)].norm(dim=0) for i in tails]
        assert max(length.max() for length in lengths) > 0.3  # pixels a frame
        flows.append(flow)
        cameras.append(arrows.camera)
    assert (flows[0] - flows[1]).norm(dim=0).max() > 0.3
    assert (cameras[0][0] > cameras[1][0] + 0.2) if world == "driving" else cameras == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("world", ["driving", "tower"])
def test_an_example_is_what_its_script_makes(tmp_path, world):
    """The same maps, and arrows of the simulator's flow."""
    make_example.of_world(world, make_example.WORLDS[world], tmp_path)
    image, files = find_example(world)
    for file in (Path(image).with_name("ids.png"), Path(image).with_name("depth.png"), *map(Path, files)):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file
    off = np.abs(np.asarray(Image.open(image)).astype(int) - np.asarray(Image.open(tmp_path / "example.png")))
    assert off.mean() < 0.1  # shading may round otherwise elsewhere
    push = (
        {"order": "second"}
        if world == "driving"
        else {"side": -simulate.simulate(world, make_example.WORLDS[world], 1, (8, 8)).meta["side"]}
    )
    clip = simulate.simulate(world, make_example.WORLDS[world], 16, (128, 64), push)
    tensors = clip.tensors()
    true = instance_flow(tensors["flow"], tensors["segmentation"], "start")
    told = arrows_to_flow(Arrows.load(files[1]), tensors["segmentation"][0], frames=16)
    where = told.norm(dim=0) > 0
    assert where.any() and (told - true)[:, where].abs().max() < 0.02  # arrows are rounded
    assert Arrows.load(files[1]).camera == pytest.approx(clip.camera.mean(axis=0), abs=1e-3)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="--example moon: expected one of branch, collide, contain, .*tower"):
        find_example("moon")
    with pytest.raises(ValueError, match="--example tower: the image photo.png is given, too"):
        find_example("tower", "photo.png")
    for world in ("", "..", "../examples/tower"):
        with pytest.raises(ValueError, match="expected one of"):
            find_example(world)
    assert find_example(None, "photo.png", ["a.json"]) == ("photo.png", ["a.json"])
    assert find_example(None, "photo.png") == ("photo.png", [])
    assert find_example(None) == (str(DEMO / "example.png"), [str(DEMO / "arrows.json")])


def test_an_example_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Both its arrows files, from a word."""
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    tiny_tower().save_pretrained(tmp_path / "model" / "image_encoder")
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        small = SmallStageConfig(**vars(replace(config, **SIZES)))
        tiny_stage(small, scale=0.02).save_pretrained(tmp_path / "model" / name)
    told = ["sample.py", "--example", "driving", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*told, "--steps", 1])))
    sample.main()
    for name in ("arrows", "arrows_opposite"):
        record = json.loads((tmp_path / "out" / name / "run.json").read_text())
        assert record["example"] == "driving" and record["camera"][0] > 0 and len(record["arrows_used"]["arrows"]) == 3
        assert (tmp_path / "out" / name / "video.mp4").exists()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["sample.py", "photo.png", "--example", "driving"])
    with pytest.raises(SystemExit) as stop:
        sample.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "sample.py: --example driving: the image photo.png is given, too; expected one of the two\n"
    )
