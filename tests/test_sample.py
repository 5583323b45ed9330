"""sample.py through its command line, with a tiny model of random weights: what it writes, and what it refuses."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import UNET_CONFIG, moving_squares, randomize, save_tiny_model, tiny_stage

import sample
import show
from inputs.find import at_hand
from inputs.photo import fit, read_inputs
from motion_dreamer import ONE_STAGE, Motion, MotionDreamer, SmallMotionDreamer, SmallStageConfig
from svd import BLOCKS, UNet
from training.log import peak_memory

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, FRAMES = 24, 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, WIDTH, HEIGHT, FRAMES, torch.float16)
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
        return ["--model", str(self.model), "--out", str(self.folder / out), "--steps", str(steps), *told, *extra]

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
        assert frames.shape == (FRAMES, 10 * HEIGHT, 10 * WIDTH, 3), name  # 24 pixels are few
        told = iio.immeta(out / f"{name}.mp4", plugin="FFMPEG")
        assert told["fps"] == pytest.approx(5) and "yuv420p" in told["pix_fmt"]
    with Image.open(out / "grid.gif") as grid:
        assert grid.n_frames == FRAMES and grid.size == (5 * 10 * WIDTH, 10 * HEIGHT + 16)  # a line of captions
    assert Image.open(out / "input.png").size == (512 // WIDTH * WIDTH, 512 // WIDTH * HEIGHT)
    motion = Motion.load(out / "motion.safetensors")
    assert motion.flow.shape == (1, FRAMES, 2, HEIGHT, WIDTH) and motion.depth.shape == (1, FRAMES, HEIGHT, WIDTH)
    assert (motion.segmentation[0, 0].numpy() == given.clip.segmentation[0]).all()  # frame 0 is known
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 3 and record["steps"] == 2 and record["frames"] == FRAMES and record["fps"] == 5
    assert record["arrows_used"]["arrows"] == given.arrows["arrows"]
    assert record["device"] == "cpu" and record["precision"] == "fp32"
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 1e7 and record["torch"] == torch.__version__


@pytest.fixture
def told(monkeypatch):
    """Of every sample: which stage, Told, and the Condition that reaches the network."""
    calls, tell, control = [], MotionDreamer.tell, MotionDreamer.control

    def tell_and_record(self, told, *rest):
        calls.append(["stage2" if self.config.given else "stage1", told])
        return tell(self, told, *rest)

    def control_and_record(self, condition, frames):
        calls[-1].append(condition)
        return control(self, condition, frames)

    monkeypatch.setattr(MotionDreamer, "tell", tell_and_record)
    monkeypatch.setattr(MotionDreamer, "control", control_and_record)
    return calls


def test_the_motion_bucket_reaches_stage_two_and_the_record(given, monkeypatch, told):
    for extra, bucket in (([], 127), (["--motion-bucket", "30"], 30)):
        out = given.run(monkeypatch, *extra, steps=1)
        assert json.loads((out / "run.json").read_text())["motion_bucket"] == bucket
        (first, _, condition), (second, _, painting) = told[-2:]
        assert (first, second) == ("stage1", "stage2")
        assert condition.added_ids[0, 1] == 127  # it would say how much will move
        assert painting.added_ids[0, 1] == bucket


@pytest.mark.parametrize(("extra", "fps"), [([], 10), (["--fps", "12"], 12)])
def test_video_plays_as_fast_as_the_clips_that_the_model_learned_from(given, monkeypatch, told, extra, fps):
    set_config(given, fps=10.0)
    out = given.run(monkeypatch, *extra, steps=1)
    for name in ("video", "flow"):
        assert iio.immeta(out / f"{name}.mp4", plugin="FFMPEG")["fps"] == pytest.approx(fps)
    with Image.open(out / "grid.gif") as grid:
        assert grid.info["duration"] == pytest.approx(1000 / fps, abs=10)  # in hundredths of a second
    assert json.loads((out / "run.json").read_text())["fps"] == fps
    assert [condition.added_ids[0, 0] for *_, condition in told] == [fps - 1, fps - 1]


def test_a_sparse_stage_gets_eight_points(given, monkeypatch, told):
    object_ = torch.from_numpy(given.clip.segmentation[0] == 2)
    y, x = object_.nonzero()[0].tolist()
    given.change(arrows=[{"start": [x, y], "end": [x + 4, y + 2]}])
    given.run(monkeypatch, steps=1)
    set_config(given, control="sparse_flow")
    given.run(monkeypatch, steps=1)
    assert object_.sum() > 8 and len(told) == 4
    for i, (*_, condition) in enumerate(told):
        points = (condition.F[0] != 0).any(dim=0)
        assert points.sum() == (8 if i > 1 else object_.sum()) and object_[points].all()
        assert condition.F[0, :, points].unique(dim=1).shape[1] == 1  # the arrow


def test_a_stage_that_sees_what_is_told_can_be_told_to_stay(given, monkeypatch, told):
    """By "rest" all objects, by an arrow of no length its object; with neither, nothing is told."""
    folder = own_model(given) / "stage1"
    config = SmallStageConfig(**vars(MotionDreamer.from_pretrained(folder).config), told=True)
    torch.manual_seed(0)
    randomize(SmallMotionDreamer(config, UNET_CONFIG), scale=0.1).save_pretrained(folder)
    entry, ids = given.arrows["arrows"][0], given.clip.segmentation[0]
    masks = {
        "nothing": ({"arrows": []}, ids < 0),
        "rest": ({"arrows": [], "rest": "still"}, ids > 0),
        "no length": ({"arrows": [entry | {"end": entry["start"]}]}, ids == 1),
    }
    for name, (change, mask) in masks.items():
        given.change(**change)
        given.run(monkeypatch, "--stage", "1", steps=1, out=name)
        _, what, condition = told[-1]
        assert (what.F == 0).all() and np.array_equal(what.mask[0, 0], mask)
        assert torch.equal(condition.first_pictures[:, 9:], what.mask)
    flows = {name: Motion.load(given.folder / name / "motion.safetensors").flow for name in masks}
    assert all((flows["nothing"] != flows[name]).any() for name in ("rest", "no length"))
    given.run(monkeypatch, "--stage", "2", steps=1, out="no length")  # Stage II paints what it is given


def set_config(given, **fields):
    """Another configuration of the same weights."""
    for stage in ("stage1", "stage2"):
        path = (given.folder / "model" if given.model.parent == given.folder else own_model(given)) / stage
        config = json.loads((path / "config.json").read_text())
        config["stage"] |= fields
        (path / "config.json").write_text(json.dumps(config))


def test_help_shows_defaults(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        sample.main()
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "None" not in text and str(ROOT) not in text
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    for name, value in vars(sample.parse_arguments()).items():
        if isinstance(value, int | float | str) and name != "model":
            after = text.split("options:")[1].split(f" --{name.replace('_', '-')} ")[1].split(" --")[0]
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            assert f"default {shown})" in after.replace("Depth- A", "Depth-A"), name


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


def test_a_motion_file_goes_where_the_image_is(given, monkeypatch):
    save_motion(given)
    there = Motion.load(given.folder / "out" / "motion.safetensors").to("meta")
    assert {value.device.type for value in vars(there).values()} == {"meta"}
    assert Motion(there.flow, None, None).to("meta").depth is None
    asked, to, shown, show = [], Motion.to, [], sample.pictures_of
    monkeypatch.setattr(Motion, "to", lambda self, device: asked.append((device, to(self, device))) or asked[-1][1])
    monkeypatch.setattr(sample, "pictures_of", lambda motion, inputs: shown.append(motion) or show(motion, inputs))
    given.run(monkeypatch, "--stage", "2", steps=1)
    (there, _), (back, motion) = asked  # to the device of the networks, and back to the user's maps to be drawn
    assert there == back == "cpu" and shown == [motion]


@pytest.mark.parametrize("svd", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near_to_single(given, monkeypatch, precision, svd):
    """The denoisers hold their weights in it; the VAE encodes in fp32 and decodes in fp16, as SVD's is published."""
    extra, loaded, load = ["--svd", str(given.model), "--frames", "3"] if svd else [], [], sample.load_models
    full = given.run(monkeypatch, *extra, "--precision", "fp32", out="full")
    monkeypatch.setattr(sample, "load_models", lambda arguments: loaded.append(load(arguments)) or loaded[-1])
    half = given.run(monkeypatch, *extra, "--precision", precision)
    (models,) = loaded
    denoisers = [models.unet] if svd else [*models.stages.values()]
    for network in (*denoisers, models.tower):
        assert {value.dtype for value in network.parameters()} == {sample.DTYPES[precision]}
    kinds = [{value.dtype for value in part.parameters()} for part in (models.vae.encoder, models.vae.decoder)]
    assert kinds == [{torch.float32}, {torch.float16}]
    assert json.loads((half / "run.json").read_text())["precision"] == precision
    if not svd:
        motions = [Motion.load(out / "motion.safetensors") for out in (full, half)]
        assert (motions[0].flow - motions[1].flow).abs().max() < 0.05 * motions[0].flow.abs().max()
        assert all(value.dtype in (torch.float32, torch.int64) for value in vars(motions[1]).values())
    assert 0 < np.abs(video_of(half) - video_of(full)).mean() < 2


def test_the_device_and_its_usual_precision(monkeypatch):
    def settled(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        arguments = sample.parse_arguments()
        sample.choose_device(arguments)
        return arguments.device, arguments.precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled() == settled("--svd", "x") == ("cpu", "fp32")
    with pytest.raises(ValueError, match="--device cuda: torch finds none"):
        settled("--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)  # an old card
    assert (settled(), settled("--svd", "x")) == (("cuda", "fp32"), ("cuda", "fp16"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert (settled(), settled("--svd", "x")) == (("cuda", "bf16"), ("cuda", "fp16"))
    assert settled("--device", "cpu", "--svd", "x") == ("cpu", "fp32")
    assert settled("--precision", "fp32", "--svd", "x") == ("cuda", "fp32")


@pytest.mark.parametrize("svd", [False, True])
def test_compiled_denoisers_say_how_long_it_took_and_change_nothing(given, monkeypatch, capsys, svd):
    """With --offload, too: what moves a network to the device is outside of what is compiled."""
    extra, compiled = ["--svd", str(given.model), "--frames", "3"] if svd else [], []
    plain = given.run(monkeypatch, *extra, out="plain")
    assert "compiling" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append(forward) or forward)
    out = given.run(monkeypatch, *extra, "--compile", "--offload")
    assert {type(forward.__self__) for forward in compiled} == set(BLOCKS)
    assert capsys.readouterr().out.count("compiling UNet took") == (1 if svd else 2)
    assert json.loads((out / "run.json").read_text())["compile"]
    assert (video_of(out) == video_of(plain)).all()


@pytest.mark.parametrize("svd", [False, True])
def test_offloaded_networks_take_turns_and_change_nothing(given, monkeypatch, svd):
    """On a made-up device: what is not there has no weights to compute with."""
    extra = ["--svd", str(given.model), "--frames", "3"] if svd else []
    expected = given.run(monkeypatch, *extra, out="expected")
    away, there, seen = {}, [], []

    def move(network, where):
        for value in network.parameters():
            if where == "cpu":
                away[value], value.data = value.data, value.data.new_empty(0)
            else:
                value.data = away.pop(value)
        there.remove(network) if where == "cpu" else there.append(network)
        assert len(there) <= 1
        seen.append(type(network).__name__)
        return network

    def take_turns(networks, device, make=sample.TakeTurns):
        assert device == "cpu"
        monkeypatch.setattr(torch.nn.Module, "to", move)
        for network in networks:
            there[:] = [network]
            network.to("cpu")
        seen.clear()
        make(networks, "device")

    monkeypatch.setattr(sample, "TakeTurns", take_turns)
    out = given.run(monkeypatch, *extra, "--offload")
    assert set(seen) == {"VAE", "ImageEncoder", "UNet" if svd else "MotionDreamer"} and len(seen) == (7 if svd else 17)
    for name in ["grid.gif", "video.mp4"] + ["motion.safetensors"] * (not svd):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert json.loads((out / "run.json").read_text())["offload"]


def test_a_full_gpu_is_one_line_that_says_what_to_try(given, monkeypatch, capsys):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(sample, "run_task", fill)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "out of memory" in line and "try --offload" in line


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
    unnamed(given)
    given.run(monkeypatch, "--stage", "1", out="grown")
    printed = capsys.readouterr().out
    assert "no segmentation given, its object is the region of similar colour" in printed
    assert printed.count("Mark every object that can move: --segmentation ids.png\n") == 1


def test_what_is_marked_can_be_seen(given, monkeypatch, capsys):
    """Objects without an arrow have an outline in input.png; where all are marked, no hint is printed."""
    given.change(arrows=[])
    ids = given.clip.segmentation[0]
    y, x = np.argwhere(ids == 2)[0]
    out = given.run(monkeypatch, "--stage", "1", steps=1)
    assert "Mark every object" not in capsys.readouterr().out
    scale = 512 // WIDTH
    picture = np.asarray(Image.open(out / "input.png"))[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
    assert (picture[0] == 255).all() and (picture[1:-1, 1:-1] == given.clip.rgb[0, y, x]).all()


def test_plain_svd(given, monkeypatch):
    out = given.run(monkeypatch, "--svd", str(given.model), "--frames", "3", arrows=None)
    assert video_of(out).shape == (3, 10 * HEIGHT, 10 * WIDTH, 3)
    assert not (out / "motion.safetensors").exists()


def test_odd_sizes_gain_a_row_or_a_column(tmp_path):
    pictures = np.random.default_rng(0).integers(256, size=(3, 15, 21, 3), dtype=np.uint8)
    show.write_video(tmp_path / "odd.mp4", pictures, 7)
    assert iio.imread(tmp_path / "odd.mp4", plugin="FFMPEG").shape == (3, 16, 22, 3)


def one_arrow(given, **entry):
    given.change(arrows=[given.arrows["arrows"][0] | entry])


def unnamed(given):
    """Arrows that leave it to sample.py to find their object; the picture holds one that can be found."""
    given.arrows.pop("segmentation")
    given.change(arrows=[{"start": [8, 8], "end": [12, 8]}])
    gray = Image.new("L", (WIDTH, HEIGHT), 90)
    gray.paste(230, (6, 6, 12, 12))
    gray.save(given.folder / "image.png")


def cut_noise(given, name):
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(noise).save(given.folder / name)
    cut(given.folder / name)


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
    "odd size": (lambda g: None, ["--size", "23x16"], "--size 23x16: the model needs multiples of 2, such as 22x16"),
    "no size": (lambda g: None, ["--size", "23"], "--size 23: expected WIDTHxHEIGHT"),
    "samples": (lambda g: None, ["--samples", "0"], "--samples 0"),
    "seed of 65 bits": (lambda g: None, ["--seed", str(2**64)], f"--seed {2**64}: expected a number of 63 bits"),
    "truncated image": (lambda g: cut_noise(g, "image.png"), [], "image.png: "),
    "truncated depth": (lambda g: cut_noise(g, "depth.png"), [], "depth.png: "),
    "truncated ids": (lambda g: cut_noise(g, "ids.png"), [], "ids.png: "),
    "no length": (
        lambda g: one_arrow(g, end=g.arrows["arrows"][0]["start"]),
        [],
        "arrows.json: arrow 1 has no length: that tells something to stay",
    ),
    "rest": (lambda g: g.change(rest="still"), [], 'arrows.json: "rest" is "still": that tells something to stay'),
    "rest of Stage I": (lambda g: g.change(arrows=[], rest="still"), ["--stage", "1"], '"rest" is "still"'),
    "motion bucket": (lambda g: None, ["--motion-bucket", "256"], "--motion-bucket 256: expected 0 to 255"),
    "object too small": (
        lambda g: one_arrow(g, box=[8, 8, 9, 9]),
        ["--size", "6x4"],
        "arrow 1: its object is too small",
    ),
    "nothing named": (lambda g: unnamed(g), ["--segment", "none"], "arrow 1: names no object, and --segment is none"),
    "no SAM": (lambda g: unnamed(g), ["--segment", "sam", "--segment-model", str(ROOT / "demo")], "--segment"),
    "no depth model": (lambda g: None, ["--depth", "estimate", "--depth-model", str(ROOT / "demo")], "--depth"),
    "no single file": (lambda g: None, ["--svd", "nowhere/svd.safetensors"], "nowhere/svd.safetensors"),
    "not a single file": (lambda g: None, ["--svd", __file__], "damaged or truncated"),
    "two of a name": (lambda g: None, ["elsewhere/arrows.json"], "2 arrows files are called arrows"),
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


def test_a_folder_of_sam_that_is_not_there_is_never_sent_to_the_hub(given, monkeypatch, capsys):
    pytest.importorskip("transformers")
    unnamed(given)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch, "--segment", "sam", "--segment-model", str(ROOT / "none"))
    line = f"sample.py: --segment-model {ROOT / 'none'}: no such folder\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line


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


@pytest.mark.parametrize("name", ["motion.safetensors", "flow.mp4", "input.png", "grid.gif", "run.json"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(given, monkeypatch, capsys, name):
    replaced = os.replace

    def replace(partial, path):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced(partial, path)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch, "--stage", "1", steps=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py")]
    assert stop.value.code == 2 and str(given.folder / "out" / name) in line and "No space left" in line
    assert not any("partial" in path.name or path.name == name for path in (given.folder / "out").iterdir())


def test_a_video_that_a_full_disk_cuts_off_gets_no_name(tmp_path):
    """By a limit that ffmpeg meets, too; it says nothing more than its exit code."""
    resource, path = pytest.importorskip("resource"), tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(256, size=(4, 64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="a.mp4: ffmpeg could not write all of it") as caught:
            show.write_video(path, noise, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    show.write_video(path, noise, 7)
    whole = path.read_bytes()
    for end in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert not show.is_whole_mp4(path)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_bytes(monkeypatch, platform, unit):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert peak_memory(on_gpu=False) == 7 * unit


def test_without_the_module_resource(given, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    out = given.run(monkeypatch, "--stage", "1", steps=1)
    assert json.loads((out / "run.json").read_text())["peak_memory_bytes"] == 0


def test_a_size_beyond_all_memory_is_one_line(given, monkeypatch, capsys):
    def fill(*_):
        torch.empty(1 << 50)

    monkeypatch.setattr(sample, "run_task", fill)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "allocate memory" in line and "a smaller --size" in line


def test_from_the_shell(given):
    told = [sys.executable, "sample.py"]
    good = subprocess.run([*told, *given.command("--stage", "1")], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and "grid.gif" in good.stdout
    bad = subprocess.run([*told, str(given.folder / "none.png")], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == f"sample.py: {given.folder / 'none.png'}: no such file\n"


# ------------------------------------------------------------------------------------------------ pictures of any size


def photo(folder, width=120, height=40):
    """A red box on a gray wall, its ids and its depth, of a size that has nothing to do with the model's."""
    ids = np.zeros((height, width), np.uint8)
    ids[height // 4 : height // 2, width // 6 : width // 3] = 7
    rgb = np.where(ids[..., None] > 0, np.uint8([200, 30, 30]), np.uint8(90))
    Image.fromarray(rgb).save(folder / "photo.png")
    Image.fromarray(ids).save(folder / "photo_ids.png")
    np.save(folder / "photo_depth.npy", np.where(ids > 0, 2.0, 8.0))
    start = [width / 4, height * 3 / 8]
    arrow = {"start": start, "end": [start[0] + width / 8, start[1] - height / 4]}
    told = {"arrows": [arrow], "segmentation": "photo_ids.png", "depth": "photo_depth.npy"}
    (folder / "photo.json").write_text(json.dumps(told))
    return ids, arrow


@pytest.mark.parametrize(("width", "height"), [(120, 40), (40, 120), (9, 7), (24, 16), (1024, 768)])
def test_an_arrow_lands_on_the_same_object_and_scales_with_it(tmp_path, monkeypatch, width, height):
    photo(tmp_path, width, height)
    told = [str(tmp_path / name) for name in ("photo.png", "photo.json")]
    monkeypatch.setattr(sys, "argv", ["sample.py", *told])
    inputs = read_inputs(sample.parse_arguments(), told[1], "cpu")
    fitted, canvas = fit(inputs, WIDTH, HEIGHT)
    (h, w), scale = canvas.inner, min(WIDTH / width, HEIGHT / height)
    assert (h, w) == (round(height * scale), round(width * scale)) and (h == HEIGHT or w == WIDTH)
    names, told = ("image", "segmentation", "depth", "F", "mask"), fitted.told(5, canvas, "cpu")
    assert told.keys() == {*names, "camera"}
    image, ids, depth, F, mask = (told[name][0] for name in names)
    assert image.shape[1:] == ids.shape == depth.shape == F.shape[1:] == mask.shape[1:] == (HEIGHT, WIDTH)
    assert torch.equal(mask[0], (ids == 7).float())
    arrow = inputs.given.arrows[0]
    vector = np.subtract(arrow.end, arrow.start) * (w / width, h / height) / 4
    assert np.allclose(F[:, ids == 7], vector[:, None], rtol=1e-5) and (F[:, ids == 0] == 0).all()
    column, row = (int(v) for v in fitted.arrows.arrows[0].start)
    assert canvas.crop(ids)[row, column] == 7 and canvas.crop(depth)[row, column] == 2
    assert 0.4 < (canvas.crop(ids) == 7).float().mean() / (1 / 24) < 1.8  # of the picture, as before
    red = canvas.crop(image)[:, row, column]
    assert red[0] > 0.2 and red[1] < -0.2
    for value in (image, ids, depth, F, mask):
        assert torch.equal(canvas.crop(canvas.pad(canvas.crop(value))), canvas.crop(value))
        assert torch.equal(canvas.pad(canvas.crop(value)), value)  # the margin repeats the edge


def test_a_photo_of_another_size_is_cropped_to_its_aspect(given, monkeypatch, capsys):
    photo(given.folder)
    told = ["photo.png", "photo.json"]
    given.command = lambda *extra, **_: (
        [str(given.folder / n) for n in told]
        + [*["--model", str(given.model), "--out", str(given.folder / "out"), "--steps", "1", *extra]]
    )
    out = given.run(monkeypatch, "--stage", "1")
    assert "120x40 resized to 24x8; objects from " in capsys.readouterr().out
    assert iio.imread(out / "flow.mp4", plugin="FFMPEG").shape == (FRAMES, 80, 10 * WIDTH, 3)
    motion = Motion.load(out / "motion.safetensors")
    assert motion.flow.shape[-2:] == motion.depth.shape[-2:] == (8, WIDTH) and (motion.depth > 0).all()
    assert np.asarray(Image.open(out / "input.png")).shape[:2] == (21 * 8, 21 * WIDTH)
    given.run(monkeypatch, "--stage", "2")
    assert video_of(out).shape == (FRAMES, 80, 10 * WIDTH, 3)
    separate = video_of(out)
    assert (video_of(given.run(monkeypatch)) == separate).all()
    assert json.loads((out / "run.json").read_text())["size"] == "24x16"
    assert video_of(given.run(monkeypatch, "--size", "12x12")).shape == (FRAMES, 4 * 21, 12 * 21, 3)


def test_rotated_transparent_deep_and_palette_pictures(tmp_path, monkeypatch):
    """All of them show red on the left and white on the right, upright."""
    rgb = np.zeros((20, 30, 3), np.uint8) + np.uint8([200, 0, 0])
    rgb[:, 15:] = 255
    turned = Image.Exif()
    turned[0x112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(np.rot90(rgb).copy()).save(tmp_path / "turned.jpg", exif=turned, quality=95)
    clear = np.dstack([np.where(rgb == 255, 0, rgb).astype(np.uint8), np.where(rgb[..., 1] == 255, 0, 255)])
    Image.fromarray(clear.astype(np.uint8)).save(tmp_path / "clear.png")
    Image.fromarray(rgb).quantize(4).save(tmp_path / "palette.gif")
    for path in tmp_path.iterdir():
        monkeypatch.setattr(sys, "argv", ["sample.py", str(path)])
        fitted, canvas = fit(read_inputs(sample.parse_arguments(), None, "cpu"), WIDTH, HEIGHT)
        assert canvas.inner == (16, 24)
        assert np.abs(fitted.rgb[:, :11].astype(int) - (200, 0, 0)).max() < 30, path
        assert fitted.rgb[:, 13:].min() > 225, path
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "deep.png")])
    assert (read_inputs(sample.parse_arguments(), None, "cpu").rgb == 40000 >> 8).all()


def test_plain_svd_takes_any_size_and_a_single_file(given, monkeypatch):
    photo(given.folder, 31, 17)
    (given.folder / "image.png").write_bytes((given.folder / "photo.png").read_bytes())
    out = given.run(monkeypatch, "--svd", str(given.model), "--frames", "2", arrows=None, steps=1)
    assert video_of(out).shape == (2, 8 * 16, 8 * 29, 3)
    from svd import ImageEncoder, VAE  # noqa: I001

    asked = []
    for cls in (UNet, VAE, ImageEncoder):
        opened = cls.from_pretrained(given.model, {"UNet": "unet", "VAE": "vae"}.get(cls.__name__, "image_encoder"))
        monkeypatch.setattr(
            f"sample.{cls.__name__}.from_pretrained", lambda source, *_, m=opened, **__: asked.append(source) or m
        )
    given.run(monkeypatch, "--svd", "svd.safetensors", "--size", "16x16", "--frames", "2", arrows=None, steps=1)
    assert asked == ["svd.safetensors"] * 3


# ------------------------------------------------------------------------------------------------------ several videos


def test_samples_and_arrows_files_have_folders_of_their_own(given, monkeypatch, capsys):
    other = given.arrows | {"arrows": []}
    (given.folder / "still.json").write_text(json.dumps(other))
    extra = [str(given.folder / "still.json"), "--samples", "2", "--stage", "1", "--seed", "5", "--fps", "4"]
    out = given.run(monkeypatch, *extra, steps=1)
    found = {str(path.parent.relative_to(out)) for path in out.rglob("motion.safetensors")}
    assert found == {"arrows/sample_0", "arrows/sample_1", "still/sample_0", "still/sample_1"}
    titles = re.findall(r"([^\r\n]+), stage 1: motion: 100%", capsys.readouterr().err)  # of the bars
    assert list(dict.fromkeys(titles)) == [
        "1/4 arrows/sample_0",
        "2/4 arrows/sample_1",
        "3/4 still/sample_0",
        "4/4 still/sample_1",
    ]
    records = {name: json.loads((out / name / "run.json").read_text()) for name in found}
    assert records["still/sample_1"]["seed"] == 6 and records["still/sample_1"]["arrows_used"]["arrows"] == []
    assert iio.immeta(out / "still" / "sample_0" / "flow.mp4", plugin="FFMPEG")["fps"] == pytest.approx(4)
    alone = given.run(monkeypatch, "--seed", "6", "--stage", "1", "--fps", "4", steps=1, out="alone")
    same = [(path / "motion.safetensors").read_bytes() for path in (alone, out / "arrows" / "sample_1")]
    assert same[0] == same[1]


@pytest.mark.parametrize("fps", [0.001, 1000])
def test_a_gif_of_any_speed(tmp_path, fps):
    frames = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    show.write_grid(tmp_path / "grid.gif", {"video": frames}, fps)
    with Image.open(tmp_path / "grid.gif") as grid:
        assert grid.n_frames == 2


# ------------------------------------------------------------------------------------------- SAM 2 and Depth-Anything


def tiny_sam(folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[],
        window_positional_embedding_background_size=[2, 2],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    prompt = transformers.Sam2PromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16)
    mask = transformers.Sam2MaskDecoderConfig(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    transformers.Sam2Model(config).save_pretrained(folder)
    return str(folder)


def tiny_depth_anything(folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"size": {"height": 56, "width": 56}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    transformers.DPTImageProcessor(**size).save_pretrained(folder)
    try:
        transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError:  # of some versions
        pytest.skip("this transformers reads pictures by torchvision, which is not here")
    return str(folder)


def test_sam_finds_the_object_and_depth_anything_the_depth(given, monkeypatch, capsys):
    """With random weights the mask is no object; what counts is that the real classes run and what they say is used."""
    sam, depth = tiny_sam(given.folder / "sam"), tiny_depth_anything(given.folder / "depth")
    unnamed(given)
    models = ["--segment-model", sam, "--depth-model", depth]
    out = given.run(monkeypatch, *models, "--segment", "sam", "--depth", "estimate", "--stage", "1", steps=1)
    told = capsys.readouterr().out
    assert f"objects: what {sam} sees; depth by {depth}" in told
    assert f"arrow 1: no segmentation given, its object is what {sam} sees" in told
    motion = Motion.load(out / "motion.safetensors")
    assert motion.depth[:, 0].min() >= 1 - 1e-3 and motion.depth[:, 0].max() <= 10 + 1e-3
    assert 0 < (motion.segmentation[:, 0] == 1).float().mean() < 1
    record = json.loads((out / "run.json").read_text())
    assert record["inputs"].startswith("objects: what") and record["segment_model"] == sam
    given.change(depth=None)
    for extra, ending in (
        ([], f"; depth by {depth}"),
        (["--depth", "none"], "; no depth"),
    ):  # auto: both folders are here
        monkeypatch.setattr(sys, "argv", ["sample.py", *given.command(*models, *extra)])
        inputs = read_inputs(sample.parse_arguments(), str(given.folder / "arrows.json"), "cpu")
        assert inputs.origin == f"objects: what {sam} sees{ending}"
    capsys.readouterr()
    for wrong in (["--segment", "sam", "--segment-model", depth], ["--depth", "estimate", "--depth-model", sam]):
        with pytest.raises(SystemExit):
            given.run(monkeypatch, *wrong)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and wrong[-1] in lines[0]


@pytest.mark.parametrize(("flag", "word"), [("--segment", "sam"), ("--depth", "estimate")])
def test_without_transformers(given, monkeypatch, capsys, flag, word):
    monkeypatch.setattr("inputs.find.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch, flag, word)
    assert stop.value.code == 2
    told = f"sample.py: {flag} {word} needs transformers: pip install transformers\n"
    assert capsys.readouterr().err == told
    unnamed(given)
    given.change(depth=None)
    monkeypatch.setattr(sys, "argv", ["sample.py", *given.command()])
    inputs = read_inputs(sample.parse_arguments(), str(given.folder / "arrows.json"), "cpu")
    assert inputs.origin == "objects: the region of similar colour; no depth"


def test_auto_never_downloads(monkeypatch, capsys):
    monkeypatch.setattr("inputs.find.importlib.util.find_spec", lambda name: True)
    assert not at_hand("facebook/no-such-model") and not at_hand("no folder")


def test_the_one_stage_model_of_table_1_paints_without_motion(given, model, monkeypatch, capsys):
    """`train.py --stage one` leaves a stage2 that is given no motion: no motion file is asked for, and none written."""
    folder = given.folder / "one"
    for part in ("vae", "image_encoder"):
        shutil.copytree(model / part, folder / part)
    config = replace(ONE_STAGE, vae_factor=2, frames=FRAMES, width=WIDTH, height=HEIGHT, sigma_max=80.0)
    tiny_stage(config, scale=0.02).save_pretrained(folder / "stage2")
    out = given.run(monkeypatch, "--model", str(folder), "--stage", "2")
    assert {path.name for path in out.iterdir()} == {"video.mp4", "grid.gif", "input.png", "run.json"}
    given.change(rest="still")  # it makes the motion itself: it would have to know
    with pytest.raises(SystemExit) as stop:
        given.run(monkeypatch, "--model", str(folder), "--stage", "2", out="other")
    assert stop.value.code == 2 and '"rest" is "still"' in capsys.readouterr().err
