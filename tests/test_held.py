"""Clips that are held on the GPU are the loader's, bit for bit and in its order."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tiny import moving_squares, tiny_stage, tiny_tower, tiny_vae

import train
from clips import ClipDataset
from motion_dreamer import STAGE1, SmallStageConfig
from training import held
from training.cache import CachedClips
from training.processes import Machine


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    for seed in range(5):
        moving_squares(seed).save(folder / f"{seed}.safetensors")
    vae, tower = tiny_vae(), tiny_tower()
    stage = tiny_stage(SmallStageConfig(**vars(STAGE1) | {"vae_factor": 2, "frames": 4}))
    cached = CachedClips(ClipDataset(folder), stage.config, vae, tower)
    cached.encode(stage, vae, tower, Machine(0, 1, "cpu", torch.autocast("cpu", enabled=False)))
    return cached


def size(clips):
    return sum(held.lossless(name, value).nbytes for name, value in clips[(0, 0)].items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_the_loaders(clips, monkeypatch, accumulate):
    """The loader's first batches, then the held ones: as if the loader had gone on; two ranks, one resumed."""
    told = SimpleNamespace(batch=2, accumulate=accumulate, seed=3, workers=0)
    rooms = []
    monkeypatch.setattr(train, "hold", lambda *told: rooms.append(held.hold(*told)) or rooms[-1])
    for rank, step in ((0, 0), (1, 3)):
        machine = SimpleNamespace(device="cpu", rank=rank, world_size=2, on_gpu=False)
        loaded = list(islice(train.batches_from(told, machine, clips, step), 7))
        machine.on_gpu = True
        monkeypatch.setattr(train, "free_memory", lambda device: 2 * 5 * size(clips))
        batches = list(islice(train.batches_from(told, machine, clips, step), 7))
        assert len(rooms.pop()["index"]) == 5 and not rooms
        for a, b in zip(loaded, batches, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name].dtype == b[name].dtype, name
                assert torch.equal(a[name], b[name]), name


def test_clips_that_do_not_fit_stay_where_they_are(clips):
    assert held.hold(clips, "cpu", 5 * size(clips)) is not None
    assert held.hold(clips, "cpu", 5 * size(clips) - 1) is None


def test_held_clips_take_what_they_take_on_disk(clips):
    kinds = {name: value.dtype for name, value in held.hold(clips, "cpu", 1 << 40).items()}
    assert kinds["segmentation"] == torch.uint8
    assert {kinds[name] for name in ("flow", "depth", "token", "latents.flow", "latents.segmentation.marked")} == {
        torch.float16
    }
    assert {kinds[name] for name in ("rgb", "camera", "fps")} == {torch.float32}


def test_room_is_what_the_fullest_moment_left(monkeypatch):
    """100 bytes: 50 of another program, 10 ours, which were 30."""
    memory = {"mem_get_info": (40, 100), "memory_reserved": 10, "max_memory_reserved": 30}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert held.free_memory("cuda:0") == 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    assert held.free_memory("cuda:0") == 0
