"""training/cache.py: what lies in it, for whom, and what makes it anew."""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import moving_squares, tiny_stage, tiny_tower, tiny_vae

from clips import ClipDataset
from clips.pictures import PALETTE
from motion_dreamer import ONE_STAGE, STAGE1, STAGE2, SmallStageConfig
from svd import encode_video
from training import cache
from training.batch import show_marked
from training.cache import CachedClips, TrainingClips, encode_clips
from training.processes import Machine

SIZES = {"vae_factor": 2, "frames": 4, "height": 16, "width": 24}
ONE, TWO, SINGLE = (replace(config, **SIZES) for config in (STAGE1, STAGE2, ONE_STAGE))
DRAFT = SmallStageConfig(**(asdict(TWO) | {"draft": True}))
FULL = torch.autocast("cpu", enabled=False)
ALONE = Machine(0, 1, "cpu", FULL)


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def tower():
    return tiny_tower()


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        moving_squares(seed).save(tmp_path / f"{seed}.safetensors")
    return tmp_path


def made(folder, config, vae, tower, machine=ALONE, workers=0):
    clips = CachedClips(ClipDataset(folder), config, vae, tower)
    clips.encode(tiny_stage(config), vae, tower, machine, workers)
    return clips


def files(folder, clip="0"):
    """Of one clip, by what they hold."""
    found = {path.name.split(".", 1)[1] for path in (folder / ".cache").glob(f"*/{clip}.*")}
    return {name.removesuffix(".safetensors") for name in found}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / ".cache").rglob("*.safetensors")}


STAGE_I = {"token", "flow", "segmentation", "segmentation.marked", "depth"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ONE, STAGE_I),
        (TWO, STAGE_I | {"rgb"}),
        (SINGLE, {"token", "rgb", "segmentation.first", "segmentation.marked.first", "depth.first"}),
        (DRAFT, STAGE_I | {"rgb", "draft", "draft.marked"}),
        (replace(ONE, predict=("flow", "segmentation")), STAGE_I - {"depth"} | {"depth.first"}),
        (replace(TWO, given=("flow", "depth")), {"token", "rgb", "flow", "depth"}),
    ],
)
def test_a_stage_has_the_latents_that_it_needs_and_no_others(folder, vae, tower, config, expected):
    clips = made(folder, config, vae, tower)
    assert files(folder) == files(folder, "2") == expected
    assert not list(folder.rglob("*.partial"))
    item = clips[(1, 0)]
    for name in expected - {"token"}:
        file = next((folder / ".cache").glob(f"*/1.{name}.safetensors"))
        (tensor,) = load_file(file).values()
        assert tensor.shape == (1 if name.endswith(".first") else 4, 4, 8, 12) and tensor.dtype == torch.float16
        assert torch.equal(item[f"latents.{name.removesuffix('.first')}"], tensor.float())
    assert {name for name in item if "." in name} == {
        f"latents.{n.removesuffix('.first')}" for n in expected - {"token"}
    }
    assert item["rgb"].shape == (1, 3, 16, 24) and item["depth"].shape == (1, 16, 24)  # the rest is in the latents
    for name in ("flow", "segmentation", "rgb", "depth"):  # what a step draws anew is computed from the clip itself
        assert torch.equal(item[name], moving_squares(1).tensors()[name][: len(item[name])])


def test_cached_latents_are_the_fresh_ones(folder, vae, tower):
    clips, stage = made(folder, DRAFT, vae, tower), tiny_stage(DRAFT)
    batch = torch.utils.data.default_collate([TrainingClips(ClipDataset(folder))[(i, 0)] for i in range(3)])
    fresh = encode_clips(batch, stage, vae, tower)
    for i in range(3):
        item = clips[(i, 0)]
        for name, value in fresh.items():
            torch.testing.assert_close(item[name], value[i], rtol=1e-3, atol=2e-3, msg=name)
        assert torch.equal(item["marked"], batch["marked"][i])


def test_colours_are_by_place_among_what_is_marked(folder, vae, tower):
    """As in a picture that is painted here, object by object, from left to right."""
    stage = tiny_stage(ONE)
    item = TrainingClips(ClipDataset(folder))[(0, 0)]
    ids = torch.zeros_like(item["segmentation"])
    for i, (left, top) in {3: (16, 1), 8: (2, 4), 5: (9, 8), 6: (20, 9)}.items():
        for t in range(4):
            ids[t, top : top + 4, left - t // 2 : left - t // 2 + 3] = i
    for marked in ({3, 8, 5, 6}, {3, 5}, {6}, set()):
        flags = torch.tensor([i in marked for i in range(256)])
        clip = {name: value[None] for name, value in (item | {"segmentation": ids, "marked": flags}).items()}
        found = encode_clips(clip, stage, vae, tower)
        for variant, shown in (("", {3, 8, 5, 6}), (".marked", marked)):
            picture = PALETTE[0].expand(4, 16, 24, 3).clone()
            for place, i in enumerate([i for i in (8, 5, 3, 6) if i in shown], start=1):
                picture[ids == i] = PALETTE[place]
            expected = encode_video(vae, picture.movedim(-1, -3)[None], 2)
            torch.testing.assert_close(found[f"latents.segmentation{variant}"], expected, msg=f"{marked} {variant}")
        seen = show_marked(clip | found, torch.tensor([True]))
        assert set(seen["segmentation"].unique().tolist()) == {0} | marked


def test_two_stages_share_files(monkeypatch, folder, vae, tower):
    made(folder, ONE, vae, tower)
    before = times(folder)
    made(folder, ONE, vae, tower)
    assert times(folder) == before
    encoded, encode = [], cache.encode_clips
    monkeypatch.setattr(cache, "encode_clips", lambda *told: encoded.append(told[-1]) or encode(*told))
    made(folder, TWO, vae, tower)
    assert encoded == [{"rgb"}]
    shared = times(folder)
    assert before.items() <= shared.items()
    assert files(folder) == STAGE_I | {"rgb"} and len(list((folder / ".cache").iterdir())) == 1
    made(folder, DRAFT, vae, tower)
    assert {path: time for path, time in times(folder).items() if path in shared} == shared


def changed_vae(part):
    vae = tiny_vae()
    if part == "scale":
        vae.scaling_factor = 0.5
    else:
        getattr(vae, part).requires_grad_(False)
        next(getattr(vae, part).parameters()).data[0] += 0.1
    return vae


def changed_tower():
    tower = tiny_tower()
    tower.visual_projection.weight.data[0] += 0.1
    return tower


@pytest.mark.parametrize("change", ["encoder", "quant_conv", "scale", "tower", "codec", "frames", "factor", "decoder"])
def test_the_key_says_what_latents_depend_on(monkeypatch, folder, vae, tower, change):
    def key(config=ONE, vae=vae, tower=tower, frames=None):
        return CachedClips(ClipDataset(folder, frames), config, vae, tower).folder

    before = key()
    assert before == key() == key(config=TWO) and before.parent == folder / ".cache"
    if change == "codec":
        monkeypatch.setattr(cache, "CODEC_VERSION", cache.CODEC_VERSION + 1)
    told = {
        "tower": lambda: {"tower": changed_tower()},
        "codec": dict,
        "frames": lambda: {"frames": 3},
        "factor": lambda: {"config": replace(ONE, vae_factor=4, latent_channels=16)},
    }.get(change, lambda: {"vae": changed_vae(change)})()
    assert (key(**told) == before) == (change == "decoder")  # latents do not depend on the decoder


def test_a_clip_that_was_overwritten_is_encoded_again_and_no_other(folder, vae, tower):
    """Also when the file has its former size and time, as after `cp -p`."""
    made(folder, ONE, vae, tower)
    before, path = times(folder), folder / "1.safetensors"
    stat = path.stat()
    clip = moving_squares(1)
    replace(clip, flow=-clip.flow, rgb=255 - clip.rgb).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    item = made(folder, ONE, vae, tower)[(1, 0)]
    batch = {name: value[None] for name, value in TrainingClips(ClipDataset(folder))[(1, 0)].items()}
    fresh = encode_clips(batch, tiny_stage(ONE), vae, tower)
    for name in ("token", "latents.flow", "latents.segmentation"):
        torch.testing.assert_close(item[name], fresh[name][0], rtol=1e-3, atol=2e-3)
    anew = {path.name.split(".")[0] for path, time in times(folder).items() if before[path] != time}
    assert anew == {"1"}


def test_what_is_missing_or_damaged_is_made_again(folder, vae, tower):
    made(folder, ONE, vae, tower)
    before = times(folder)
    for path, spoil in zip(sorted(before)[:2], (Path.unlink, lambda path: path.write_bytes(b"half")), strict=True):
        spoil(path)
    clips = made(folder, ONE, vae, tower)
    assert times(folder).keys() == before.keys()
    file = clips.file(2, "latents.depth")
    file.write_bytes(file.read_bytes()[:-9])  # after the start
    with pytest.raises(ValueError, match=re.escape(f"{file}: ") + ".*; delete it, it will be made again"):
        clips[(2, 0)]


@pytest.fixture
def encoded(monkeypatch):
    """Indices of the clips of every batch that is encoded."""
    batches, encode = [], cache.encode_clips
    monkeypatch.setattr(cache, "encode_clips", lambda *told: batches.append(told[0]["index"].tolist()) or encode(*told))
    return batches


def test_processes_share_what_is_missing(monkeypatch, folder, vae, tower, encoded):
    """Not the clips: of six, three are there, and each of two processes makes one or two of the others."""
    for seed in range(3, 6):
        moving_squares(seed).save(folder / f"{seed}.safetensors")
    made(folder, ONE, vae, tower)
    for clip in (0, 2, 4):  # all are of the first process if the clips are shared
        for path in (folder / ".cache").glob(f"*/{clip}.*"):
            path.unlink()
    encoded.clear()
    clips = CachedClips(ClipDataset(folder), ONE, vae, tower)
    pair, waited = [replace(ALONE, rank=rank, world_size=2) for rank in (0, 1)], []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waited.append(len(encoded)))
    shares = [{i: told for i in range(rank, 6, 2) if (told := clips.lacking(i))[1]} for rank in (0, 1)]
    assert [list(share) for share in shares] == [[0, 2, 4], []]

    def gather(found, mine):
        assert mine == shares[len(waited)]  # each looks at its own clips
        found[:] = shares

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert [clips.encode(tiny_stage(ONE), vae, tower, machine) for machine in pair] == [3, 3]
    assert encoded == [[0, 4], [2]] and waited == [1, 2]
    assert clips.encode(tiny_stage(ONE), vae, tower, ALONE) == 0 and len(times(folder)) == 6 * len(STAGE_I)


def test_large_clips_are_encoded_one_by_one(monkeypatch, folder, vae, tower, encoded):
    monkeypatch.setattr(cache, "ENCODED_TOGETHER", 2)
    made(folder, ONE, vae, tower)
    assert encoded == [[0, 1], [2]]
    encoded.clear()
    monkeypatch.setattr(cache, "PIXELS_TOGETHER", 4 * 16 * 24 - 1)
    made(folder, TWO, vae, tower, workers=1)
    assert encoded == [[0], [1], [2]]


def test_a_disk_that_is_full_ends_it_with_the_name_of_the_file(monkeypatch, folder, vae, tower):
    def full(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if path.name.startswith("1.depth"):
            path.write_bytes(path.read_bytes()[:9])
            raise SafetensorError("no space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match=r"/1\.depth\.safetensors: no space left on device$"):
        made(folder, ONE, vae, tower)
    assert not list(folder.rglob("*.partial"))
    assert files(folder, "0") == STAGE_I and "depth" not in files(folder, "1")


def test_latents_are_encoded_under_autocast(folder, vae, tower):
    exact = made(folder, ONE, vae, tower)[(0, 0)]
    for path in times(folder):
        path.unlink()
    rough = made(folder, ONE, vae, tower, replace(ALONE, autocast=torch.autocast("cpu", torch.bfloat16)))[(0, 0)]
    difference = (rough["latents.flow"] - exact["latents.flow"]).abs()
    assert 1e-4 < difference.max() < 0.1 * exact["latents.flow"].abs().max()
    assert np.isfinite(difference.numpy()).all()
