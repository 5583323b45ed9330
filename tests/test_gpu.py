"""The product on a GPU, beside the CPU. Without one, tests that compare the two devices compare the CPU with itself:
their lines run, and what the scripts do is tested elsewhere.

A GPU rounds what its convolutions multiply to 10 bits (TF32), so the two differ by about 1/1000 of a layer's size, and
more after many layers: what is asked here is 1/100 of the result's (root of the mean square). Half precision: 1/20.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny import TINY, UNET_CONFIG, moving_squares, tiny_stage, tiny_tower, tiny_vae

import motion_dreamer
import sample
import svd
import train
import training.batch
from clips import Motion
from kernels.probe import build, triton_runs
from kernels.replayed import Replayed
from metrics import frechet
from motion_dreamer import STAGE1, STAGE2, dream
from svd import UNet, decode_video, encode_video, image_to_video
from tests.make_fixtures import MODELS, fill, inputs
from training.batch import Chances, training_batch
from training.cache import encode_clips, with_marks

pytestmark = pytest.mark.gpu
GPU = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(GPU == "cpu", reason="needs a GPU")
NEAR, HALF = 0.01, 0.05
FRAMES, HEIGHT, WIDTH = 4, 16, 24
DEMO = Path(__file__).parent.parent / "demo"


def difference(value, expected):
    """Root of the mean square, of that of what is expected."""
    assert value.device.type == GPU and value.shape == expected.shape
    error = (value.cpu().float() - expected.float()).square().mean() / expected.float().square().mean()
    return error.sqrt().item()


def on_gpu(values):
    return {name: value.to(GPU) for name, value in values.items()}


def run(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    script.main()


# ------------------------------------------------------------------------------------------------------- the networks


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [("float32", NEAR), ("bfloat16", HALF), ("float16", HALF)])
def test_the_unet(dtype, most):
    model, given = fill(UNet(MODELS["unet"])), inputs("unet", MODELS["unet"], 7, 10)
    expected = model(**given)
    assert difference(model.to(GPU, getattr(torch, dtype))(**on_gpu(given)), expected) < most


@needs_gpu
@torch.no_grad()
def test_the_unet_as_a_sampler_calls_it():
    """The second call is recorded, and replayed for others."""
    model, given = fill(UNet(MODELS["unet"])).to(GPU), on_gpu(inputs("unet", MODELS["unet"], 7, 10))
    step = Replayed(lambda sample, c_noise: model(**given | {"sample": sample, "c_noise": c_noise}))
    for i in range(4):
        changed = {"sample": given["sample"] * (i + 1), "c_noise": given["c_noise"] + i}
        expected = model(**given | changed).cpu()
        assert difference(step(changed["sample"], changed["c_noise"]), expected) < NEAR
    assert step.graph is not None


@torch.no_grad()
def test_the_image_tower():
    tower, images = tiny_tower(), torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    expected = tower(images)
    assert difference(tower.to(GPU)(images.to(GPU)), expected) < NEAR


@torch.no_grad()
def test_the_vae_by_chunks(monkeypatch):
    """Where memory is short it takes a frame at a time: pictures are encoded alike, decoded frames see no others."""
    vae, pictures = tiny_vae(), torch.rand(1, FRAMES, 3, HEIGHT, WIDTH) * 2 - 1
    latents = encode_video(vae, pictures, 2 * vae.factor)
    decoded = {chunk: decode_video(vae, latents, 2 * vae.factor, chunk) for chunk in (None, 1)}
    vae.to(GPU)
    given = pictures.to(GPU), latents.to(GPU)
    assert difference(encode_video(vae, given[0], 2 * vae.factor), latents) < NEAR
    assert difference(decode_video(vae, given[1], 2 * vae.factor), decoded[None]) < NEAR
    if GPU == "cuda":  # full: nothing is free, and nothing kept
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    else:
        monkeypatch.setattr(svd, "frames_that_fit", lambda *_: 1)
    assert difference(encode_video(vae, given[0], 2 * vae.factor), latents) < NEAR
    assert difference(decode_video(vae, given[1], 2 * vae.factor), decoded[1]) < NEAR
    assert difference(decode_video(vae, given[1], 2 * vae.factor), decoded[None]) > 0.1


def two_stages():
    sizes = {"vae_factor": 2, "frames": FRAMES, "width": WIDTH, "height": HEIGHT, "sigma_max": 80.0}
    return [tiny_stage(replace(config, **sizes), scale=0.02) for config in (STAGE1, STAGE2)]


def test_the_loss_and_its_gradient(monkeypatch):
    """Of both stages, with the noise of the CPU on both devices."""
    for module in (motion_dreamer, training.batch):
        draw = lambda shape, generator, device: torch.randn(shape, generator=generator).to(device)  # noqa: E731
        monkeypatch.setattr(module, "gaussian", draw)
    vae, tower = tiny_vae(), tiny_tower()
    clips = torch.utils.data.default_collate([with_marks(moving_squares(seed).tensors()) for seed in range(3)])

    def learn(stage, device):
        vae.to(device), tower.to(device), stage.to(device)
        seen, generator = {name: value.to(device) for name, value in clips.items()}, torch.Generator().manual_seed(1)
        seen |= encode_clips(seen, stage, vae, tower)
        stage.zero_grad()
        losses = stage.loss(training_batch(stage, seen, vae, generator, Chances()), generator)
        losses["loss"].mean().backward()
        gradient = [value.grad.flatten() for value in stage.parameters() if value.grad is not None]
        return losses["loss"].detach(), torch.cat(gradient)

    for stage in two_stages():
        expected = learn(stage, "cpu")
        for value, right in zip(learn(stage, GPU), expected, strict=True):
            assert torch.isfinite(value).all() and right.abs().max() > 0
            assert difference(value, right) < 3 * NEAR


# ------------------------------------------------------------------------------------------------- sampling, training


def test_the_whole_method():
    """Two steps of both stages; ids are whole numbers, and a few pixels may be nearest to another colour."""
    clip = moving_squares(0).tensors()
    F = torch.zeros(1, 2, HEIGHT, WIDTH)
    F[:, :, 4:9, 6:12] = 2.0
    told = [clip["rgb"][:1], clip["segmentation"][:1], clip["depth"][:1], F]
    networks = [*two_stages(), tiny_vae(), tiny_tower()]

    def make(device):
        given = [value.to(device) for value in (*networks, *told)]
        return dream(*given, frames=FRAMES, steps=2, generator=torch.Generator().manual_seed(0))

    (motion, video), (motion_there, video_there) = make("cpu"), make(GPU)
    assert difference(motion_there.flow, motion.flow) < HALF and difference(motion_there.depth, motion.depth) < HALF
    assert (motion_there.segmentation.cpu() == motion.segmentation).float().mean() > 0.95
    assert difference(video_there, video) < HALF


def test_plain_svd():
    torch.manual_seed(0)
    unet = UNet(replace(UNET_CONFIG, in_channels=8, out_channels=4)).eval()
    networks, image = [unet, tiny_vae(), tiny_tower()], torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1

    def make(device):
        given = [value.to(device) for value in (*networks, image)]
        return image_to_video(*given, frames=3, steps=2, generator=torch.Generator().manual_seed(0))

    expected = make("cpu")
    assert difference(make(GPU), expected) < HALF


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sample_py(monkeypatch, tmp_path, precision):
    """The demo in three steps, both stages at once, one after the other, and with networks that take turns."""
    told = ["--steps", 3, "--precision", precision]
    for name, *words in (
        ("cpu", "--device", "cpu", "--precision", "fp32"),
        ("both",),
        ("parts", "--stage", 1),
        ("parts", "--stage", 2),
        ("turns", "--offload"),
    ):
        run(monkeypatch, sample, "--out", tmp_path / name, *told, *words)
    videos = {path.name: iio.imread(path / "video.mp4", plugin="FFMPEG").astype(float) for path in tmp_path.iterdir()}
    record = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in videos}
    assert record["cpu"]["device"] == "cpu" and {record[name]["device"] for name in ("both", "parts", "turns")} == {GPU}
    assert record["both"]["precision"] == precision and record["both"]["peak_memory_bytes"] > 1e7
    for name, video in videos.items():
        assert np.abs(video - videos["cpu"]).mean() < 4, name  # of 255
        assert np.abs(video - videos["both"]).mean() < (4 if name == "cpu" else 1), name
    flows = [Motion.load(tmp_path / name / "motion.safetensors").flow for name in ("cpu", "both")]
    assert (flows[0] - flows[1]).square().mean().sqrt() < 0.1 * flows[0].square().mean().sqrt()


@needs_gpu
def test_sample_py_takes_the_gpu_and_half_precision_by_itself(monkeypatch, tmp_path):
    run(monkeypatch, sample, "--out", tmp_path, "--steps", 1, "--stage", 1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["device"], record["precision"]) == (GPU, "bf16")


@pytest.mark.parametrize("stage", [pytest.param("vae", marks=needs_gpu), pytest.param("1", marks=needs_gpu), "2"])
def test_train_py(monkeypatch, tmp_path, stage):
    """The loss of the same draws falls; a run that ended goes on from its checkpoint; half precision, checkpointing."""
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    for seed in range(4):
        moving_squares(seed).save(tmp_path / "data" / f"{seed}.safetensors")
    tiny_vae().save_pretrained(tmp_path / "out" / "vae")
    tiny_tower().save_pretrained(tmp_path / "out" / "image_encoder")
    told = ["--stage", stage, "--preset", "tiny", "--data", tmp_path / "data", "--out", tmp_path / "out", "--quiet"]
    told += ["--batch", 2, "--lr", 3e-3, "--warmup", 5, "--val", tmp_path / "data", "--val-every", 5]
    told += ["--checkpointing"] * (stage != "vae")
    for steps, samples in ((10, 1), (25, 0)):
        run(monkeypatch, train, *told, "--steps", steps, "--precision", "bf16", "--val-samples", samples)
    name = {"vae": "vae", "1": "stage1", "2": "stage2"}[stage]
    log = [json.loads(line) for line in (tmp_path / "out" / "training" / name / "log.jsonl").read_text().splitlines()]
    values = [line["val_loss"] for line in log if "val_loss" in line]
    assert [line["step"] for line in log] == list(range(1, 26)) and np.isfinite(values).all()
    assert values[-1] < 0.9 * values[0] and log[-1]["memory"] > 1e6


@needs_gpu
@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_recorded_step_trains_as_a_step_does(monkeypatch, tmp_path, stage):
    """With every extra of small models, whose draws are recorded, too."""
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    for seed in range(4):
        moving_squares(seed).save(tmp_path / "data" / f"{seed}.safetensors")
    extras = ["show_flow=true", "told=true", "mask_start=0.5"] + ["draft=true"] * (stage == "2")
    losses = []
    for words in ([], ["--cuda-graph"]):
        out = tmp_path / f"out{len(words)}"
        tiny_vae().save_pretrained(out / "vae")
        tiny_tower().save_pretrained(out / "image_encoder")
        told = ["--stage", stage, "--preset", "tiny", "--data", tmp_path / "data", "--out", out, "--quiet"]
        told += ["--batch", 2, "--steps", 8, "--precision", "fp32", "--set", *extras]
        run(monkeypatch, train, *told, *words)
        log = (out / "training" / f"stage{stage}" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[1] == pytest.approx(losses[0], rel=NEAR) and losses[0][4] != pytest.approx(losses[0][5], rel=NEAR)


@needs_gpu
def test_triton_runs_on_this_gpu(capsys):
    """Else all would be right, and slow, without anybody noticing."""
    build.cache_clear()
    assert triton_runs() and capsys.readouterr().err == ""


@needs_gpu
def test_evaluate_py(monkeypatch, capsys, tmp_path):
    """All measures of one clip that do not need weights, of the demo model."""
    simulate, evaluate = pytest.importorskip("clips.simulate"), pytest.importorskip("evaluate")
    monkeypatch.setattr(frechet, "SET_RESAMPLES", 3)
    monkeypatch.setattr(frechet, "FEWEST", 1)
    simulate.simulate("dominoes", 2000000, 16, (128, 64)).save(tmp_path / "data" / "0.safetensors")
    told = ["--model", DEMO, "--data", tmp_path / "data", "--clips", 1, "--sampling-steps", 2, "--quiet"]
    run(monkeypatch, evaluate, *told, "--metrics", "physics,fvd,fvmd,demo", "--json", tmp_path / "figures.json")
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["settings"]["device"] == GPU
    figures = result["figures"]
    assert 0 < figures["model"]["epe_relative"]["value"] < 1.5 and figures["still"]["epe_relative"]["value"] == 1
    assert figures["codec"]["ids_miou"]["value"] > 0.9 and figures["model"]["psnr"]["value"] > 10
