"""demo/make.py: from nothing to a model folder, and what happens when a part fails."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, moving_squares

import train
from motion_dreamer import MotionDreamer
from svd import VAE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import make  # noqa: E402


@contextmanager
def two_squares(arguments):
    """In the place of workers that simulate: a few clips at once."""
    for seed in range(arguments.first):
        moving_squares(seed, arguments.frames, 16, 32).save(Path(arguments.out) / "clips" / f"{seed}.safetensors")
    yield None


def test_from_nothing_to_a_model_in_half_precision_and_on_from_it(tmp_path, monkeypatch, capsys):
    """Its own commands for train.py, run one after the other in this process."""
    run = []

    def popen(words, **_):
        run.append(words)
        monkeypatch.setattr(sys, "argv", words[1:])
        train.main()
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setattr(make, "simulating", two_squares)
    monkeypatch.setattr(make.subprocess, "Popen", popen)
    told = ["--minutes", 0.01, "--preset", "tiny", "--frames", 3, "--first", 4, "--workers", 1]

    def made(*words):
        monkeypatch.setattr(sys, "argv", list(map(str, ["make.py", *told, *words])))
        make.main()

    made("--out", tmp_path / "out", "--export", tmp_path / "shipped")
    assert [words[words.index("--stage") + 1] for words in run] == ["vae", "1", "2"]
    record = json.loads((tmp_path / "out" / "make.json").read_text())
    assert record["clips"] == 4 and all(record[name]["steps"] for name in ("vae", "stage1", "stage2"))
    stages = [MotionDreamer.from_pretrained(tmp_path / "shipped", f"stage{i}") for i in (1, 2)]
    vae = VAE.from_pretrained(tmp_path / "shipped", "vae")
    assert {value.dtype for part in (*stages, vae) for value in part.parameters()} == {torch.float16}
    assert stages[0].config.told and stages[1].config.draft and stages[0].config.frames == 3
    run.clear()
    made("--out", tmp_path / "more", "--start", tmp_path / "shipped")
    assert [words[words.index("--start") + 1] for words in run] == [str(tmp_path / "shipped")] * 3


def test_workers_simulate_until_the_block_ends(tmp_path):
    words = {"scenario": "dominoes,collide", "size": "16x8", "frames": 1, "seed": 0, "workers": 1}
    arguments = SimpleNamespace(out=str(tmp_path), first=2, **words)
    with make.simulating(arguments) as simulator:
        make.wait_for_clips(arguments, simulator)
    assert simulator.poll() is not None
    assert {path.name.split("_")[0] for path in make.clips_of(arguments)} <= {"dominoes", "collide"}
    assert len(make.clips_of(arguments)) >= 2


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
