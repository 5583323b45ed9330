"""sample.py through its command line, with a tiny model of random weights: what it writes, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import UNET_CONFIG, moving_squares, tiny_stage, tiny_tower, tiny_vae

import sample
from motion_dreamer import STAGE1, STAGE2, Motion
from svd import UNet

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, FRAMES = 24, 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vae_factor": 2, "frames": FRAMES, "width": WIDTH, "height": HEIGHT, "sigma_max": 80.0, "fps": 5.0}
    tiny_vae().save_pretrained(folder / "vae")
    tiny_tower().save_pretrained(folder / "image_encoder")
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        tiny_stage(replace(config, **sizes), scale=0.02).half().save_pretrained(folder / name)
    torch.manual_seed(0)
    svd = UNet(replace(UNET_CONFIG, in_channels=8, out_channels=4))
    svd.save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def given(tmp_path, model):
    """A picture with its maps and arrows in `tmp_path`; `run` calls sample.py's main in there."""
    clip = moving_squares(1, FRAMES, HEIGHT, WIDTH)
    Image.fromarray(clip.rgb[0]).save(tmp_path / "image.png")
    Image.fromarray(clip.segmentation[0]).save(tmp_path / "ids.png")
    Image.fromarray((clip.depth[0] * 1000).astype(np.uint16)).save(tmp_path / "depth.png")
    y, x = (int(v.mean()) for v in np.nonzero(clip.segmentation[0] == 1))
    arrows = {"arrows": [{"start": [x, y], "end": [x + 6, y - 3]}], "segmentation": "ids.png", "depth": "depth.png"}
    (tmp_path / "arrows.json").write_text(json.dumps(arrows))
    return Given(tmp_path, model, clip, arrows)


class Given:
    def __init__(self, folder, model, clip, arrows):
        self.folder, self.model, self.clip, self.arrows = folder, model, clip, arrows

    def command(self, *extra, arrows="arrows.json", out="out", steps=2):
        told = ["image.png", arrows] if arrows else ["image.png"]
        told = [str(self.folder / name) for name in told]
        return [*told, "--model", str(self.model), "--out", str(self.folder / out), "--steps", str(steps), *extra]

    def run(self, monkeypatch, *extra, **told):
        monkeypatch.setattr(sys, "argv", ["sample.py", *self.command(*extra, **told)])
        sample.main()
        return self.folder / told.get("out", "out")

    def change(self, **entries):
        (self.folder / "arrows.json").write_text(json.dumps(self.arrows | entries))


def test_writes_every_file_and_each_can_be_opened(given, monkeypatch):
    out = given.run(monkeypatch, "--seed", "3")
    names = {"video.mp4", "flow.mp4", "segmentation.mp4", "depth.mp4", "input.png", "grid.gif"}
    assert {path.name for path in out.iterdir()} == names | {"motion.safetensors", "run.json"}
    for name in ("video", "flow", "segmentation", "depth"):
        frames = iio.imread(out / f"{name}.mp4", plugin="FFMPEG")
        assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3), name
        told = iio.immeta(out / f"{name}.mp4", plugin="FFMPEG")
        assert told["fps"] == pytest.approx(5) and "yuv420p" in told["pix_fmt"]
    with Image.open(out / "grid.gif") as grid:
        assert grid.n_frames == FRAMES and grid.width == grid.height * 5 * WIDTH // HEIGHT
    assert Image.open(out / "input.png").size == (512 // WIDTH * WIDTH, 512 // WIDTH * HEIGHT)
    motion = Motion.load(out / "motion.safetensors")
    assert motion.flow.shape == (1, FRAMES, 2, HEIGHT, WIDTH) and motion.depth.shape == (1, FRAMES, HEIGHT, WIDTH)
    assert (motion.segmentation[0, 0].numpy() == given.clip.segmentation[0]).all()  # frame 0 is known
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 3 and record["steps"] == 2 and record["frames"] == FRAMES and record["fps"] == 5
    assert record["arrows_used"]["arrows"] == given.arrows["arrows"]
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 1e7 and record["torch"] == torch.__version__


def video_of(out):
    return iio.imread(out / "video.mp4", plugin="FFMPEG").astype(float)


def test_the_stages_run_separately_and_the_middle_can_be_edited(given, monkeypatch):
    both = given.run(monkeypatch, out="both")
    given.run(monkeypatch, "--stage", "1", out="parts")
    assert not (given.folder / "parts" / "video.mp4").exists()
    parts = given.run(monkeypatch, "--stage", "2", out="parts")
    assert (parts / "motion.safetensors").read_bytes() == (both / "motion.safetensors").read_bytes()
    assert (video_of(parts) == video_of(both)).all()
    tensors = load_file(parts / "motion.safetensors")
    tensors["flow"] = tensors["flow"] + 5
    save_file(tensors, parts / "motion.safetensors")
    given.run(monkeypatch, "--stage", "2", out="parts")
    assert np.abs(video_of(parts) - video_of(both)).mean() > 0.5


def test_the_seed_decides(given, monkeypatch):
    first, again, other = (
        given.run(monkeypatch, "--seed", seed, out=f"out{i}") for i, seed in enumerate(("1", "1", "2"))
    )
    for name in ("video.mp4", "flow.mp4", "motion.safetensors", "grid.gif"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (first / "motion.safetensors").read_bytes() != (other / "motion.safetensors").read_bytes()


def test_without_arrows_maps_or_segmentation(given, monkeypatch, capsys):
    out = given.run(monkeypatch, arrows=None)
    assert (out / "video.mp4").exists()
    given.arrows.pop("segmentation")
    given.change(arrows=[{"start": [8, 8], "end": [12, 8]}])
    gray = Image.new("L", (WIDTH, HEIGHT), 90)
    gray.paste(230, (6, 6, 12, 12))
    gray.save(given.folder / "image.png")
    given.run(monkeypatch, "--stage", "1", out="grown")
    assert "no segmentation given, its object is the region of similar colour" in capsys.readouterr().out


def test_plain_svd(given, monkeypatch):
    out = given.run(monkeypatch, "--svd", str(given.model), "--frames", "3", arrows=None)
    assert video_of(out).shape == (3, HEIGHT, WIDTH, 3)
    assert not (out / "motion.safetensors").exists()


def test_odd_sizes_gain_a_row_or_a_column(tmp_path):
    pictures = np.random.default_rng(0).integers(256, size=(3, 15, 21, 3), dtype=np.uint8)
    sample.write_video(tmp_path / "odd.mp4", pictures, 7)
    assert iio.imread(tmp_path / "odd.mp4", plugin="FFMPEG").shape == (3, 16, 22, 3)


def one_arrow(given, **entry):
    given.change(arrows=[given.arrows["arrows"][0] | entry])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def own_model(given):
    """A copy of the model that a test may spoil."""
    copy = given.folder / "model"
    for path in given.model.rglob("*.*"):
        target = copy / path.relative_to(given.model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    given.model = copy
    return copy


def truncate(given):
    cut(own_model(given) / "stage1" / "diffusion_pytorch_model.safetensors")


def misname(given):
    path = own_model(given) / "stage1" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_inn"] = tensors.pop("unet.conv_in.weight")
    save_file(tensors, path)


def save_motion(given, frames=FRAMES, width=WIDTH):
    (given.folder / "out").mkdir()
    maps = torch.ones(1, frames, HEIGHT, width)
    Motion(torch.zeros(1, frames, 2, HEIGHT, width), maps.long(), maps).save(
        given.folder / "out" / "motion.safetensors"
    )


def spoil_motion(given):
    save_motion(given)
    cut(given.folder / "out" / "motion.safetensors")


def picture(name, width, height):
    return lambda given: Image.new("L", (width, height), 1).save(given.folder / name)


MISTAKES = {
    "missing image": (lambda g: (g.folder / "image.png").unlink(), [], "image.png: no such file"),
    "not an image": (lambda g: (g.folder / "image.png").write_text("hello"), [], "image.png: not an image"),
    "missing arrows": (lambda g: (g.folder / "arrows.json").unlink(), [], "arrows.json"),
    "no JSON": (lambda g: (g.folder / "arrows.json").write_text("{"), [], "arrows.json"),
    "arrow outside": (lambda g: one_arrow(g, start=[99, 2]), [], "arrow 1: start (99, 2) is outside the 24x16"),
    "arrow on background": (lambda g: one_arrow(g, start=[0, 15]), [], "arrow 1"),
    "unknown key": (lambda g: g.change(arrow=[]), [], "arrow"),
    "two on one": (lambda g: g.change(arrows=g.arrows["arrows"] * 2), [], "arrow 2"),
    "NaN": (lambda g: one_arrow(g, end=[float("nan"), 3]), [], "arrow 1"),
    "ids of another size": (picture("ids.png", 8, 8), [], "ids.png: is 8x8, the image"),
    "depth of another size": (picture("depth.png", 8, 8), [], "depth.png: is 8x8, the image"),
    "missing depth": (lambda g: None, ["--depth", "nowhere.png"], "nowhere.png: no such file"),
    "size": (
        lambda g: [picture(n, 23, 16)(g) for n in ("image.png", "ids.png", "depth.png")] and one_arrow(g, start=[4, 4]),
        [],
        "image.png: is 23x16; the model needs multiples of 2, such as 22x16",
    ),
    "no model": (lambda g: None, ["--model", "nowhere"], "nowhere"),
    "truncated weights": (truncate, [], "stage1/diffusion_pytorch_model.safetensors"),
    "misnamed weights": (misname, [], "conv_inn"),
    "no motion": (lambda g: None, ["--stage", "2"], "motion.safetensors"),
    "corrupt motion": (spoil_motion, ["--stage", "2"], "motion.safetensors"),
    "motion of another size": (lambda g: save_motion(g, width=8), ["--stage", "2"], "flow is 8x16, the image 24x16"),
    "motion of another length": (lambda g: save_motion(g), ["--stage", "2", "--frames", "5"], "has 4 frames, --frames"),
    "out is a file": (lambda g: (g.folder / "out").write_text("mine"), [], "out: cannot write"),
    "steps": (lambda g: None, ["--steps", "0"], "--steps 0"),
    "frames": (lambda g: None, ["--frames", "1"], "--frames 1"),
    "fps": (lambda g: None, ["--fps", "nan"], "--fps nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_change_nothing(given, monkeypatch, capsys, mistake):
    spoil, extra, words = MISTAKES[mistake]
    spoil(given)
    before = {path: path.read_bytes() for path in given.folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch, *extra)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and lines[0].startswith("sample.py: "), lines
    assert {path: path.read_bytes() for path in given.folder.rglob("*") if path.is_file()} == before
    assert (given.folder / "out").exists() == any("out" in path.parts for path in before)


def test_a_value_that_is_not_finite_is_an_error_that_names_the_step(given, monkeypatch, capsys):
    path = own_model(given) / "stage2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["unet.conv_in.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch)
    assert stop.value.code == 2
    assert "sample.py: predicting rgb: step 1 of 2 is not finite" in capsys.readouterr().err
    assert not (given.folder / "out").exists()


def test_an_interruption_leaves_nothing_half_written(given, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write_grid", interrupt)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch)
    assert stop.value.code == 130
    assert not [path for path in given.folder.rglob("*") if "partial" in path.name]


def test_from_the_shell(given):
    told = [sys.executable, "sample.py"]
    good = subprocess.run([*told, *given.command("--stage", "1")], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and "grid.gif" in good.stdout
    bad = subprocess.run([*told, str(given.folder / "none.png")], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == f"sample.py: {given.folder / 'none.png'}: no such file\n"
