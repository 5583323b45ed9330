"""demo/make.py: from nothing to a model folder, and what happens when a part fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from motion_dreamer import MotionDreamer
from svd import VAE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import make  # noqa: E402


def make_model(out, *words):
    told = ["--out", out, "--minutes", 0.04, "--preset", "tiny", "--size", "32x16", "--frames", 3, "--first", 4]
    told += ["--scenario", "dominoes,collide", "--workers", 1, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    told = [sys.executable, ROOT / "demo" / "make.py", *told]
    return subprocess.run(list(map(str, told)), env=environment, capture_output=True, text=True)


def test_from_nothing_to_a_model_in_half_precision(tmp_path):
    done = make_model(tmp_path / "out", "--export", tmp_path / "shipped")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "make.json").read_text())
    clips = list((tmp_path / "out" / "clips").glob("*.safetensors"))
    assert {path.name.split("_")[0] for path in clips} == {"dominoes", "collide"}
    assert record["clips"] == len(clips) >= 4 and all(record[name]["steps"] for name in ("vae", "stage1", "stage2"))
    stages = [MotionDreamer.from_pretrained(tmp_path / "shipped", f"stage{i}") for i in (1, 2)]
    vae = VAE.from_pretrained(tmp_path / "shipped", "vae")
    assert {value.dtype for part in (*stages, vae) for value in part.parameters()} == {torch.float16}
    assert stages[0].config.told and stages[1].config.draft and stages[0].config.frames == 3


def process(words):
    return subprocess.Popen([sys.executable, "-c", words])


def test_where_one_training_fails_the_others_are_told_to_end():
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        make.finish([process("import time; time.sleep(60)"), process("raise SystemExit(2)")])
    assert stop.value.code and time.monotonic() - started < 30


def test_a_round_ends_with_a_save_and_without_an_error():
    """SIGTERM is what train.py saves for."""
    words = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntime.sleep(60)"
    started = time.monotonic()
    make.finish([process(words), process(words)], seconds=3)
    assert 3 <= time.monotonic() - started < 30


def test_a_simulator_that_ends_is_said(tmp_path):
    arguments = SimpleNamespace(out=str(tmp_path), first=1)
    (tmp_path / "clips").mkdir()
    ended = process("pass")
    ended.wait()
    with pytest.raises(SystemExit, match="simulate.txt: the simulator ended"):
        make.wait_for_clips(arguments, ended)
