"""What is written is written whole or not at all, also by a full disk. (Loading: test_svd.py.)"""

import numpy as np
import pytest
import torch
from tiny import moving_squares, tiny_stage, tiny_vae

from clips import Motion
from motion_dreamer import STAGE1
from weights import save_safetensors, whole_file


def motion(path):
    Motion(torch.randn(1, 4, 2, 64, 64), None, None).save(path)


def stage(path):
    tiny_stage(STAGE1).save_pretrained(path.parent)


def clip(path):
    told = moving_squares(0, 8, 64, 64)
    told.rgb = np.random.default_rng(0).integers(256, size=told.rgb.shape, dtype=np.uint8)
    told.save(path)


WRITERS = {
    "motion.safetensors": motion,
    "clip.safetensors": clip,
    "diffusion_pytorch_model.safetensors": stage,
    "weights.safetensors": lambda path: save_safetensors(tiny_vae().state_dict(), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path, name):
    resource = pytest.importorskip("resource")  # not on Windows
    path, limits = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("former")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=f"{path}: "):
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "former" and [file.name for file in tmp_path.iterdir()] == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 10_000


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
