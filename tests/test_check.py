"""clips/check.py through its command line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_annotate import gray_levels, write_video
from test_clip import random_clip

from clips import ClipDataset, annotate, check


@pytest.fixture
def run_check(monkeypatch, capsys):
    def run(folder: Path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["clips.check", str(folder)])
        code = 0
        try:
            check.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


def test_clips_of_several_lengths_are_no_fault(tmp_path, run_check):
    """As trials of Physion are, each to its own end."""
    for seed, frames in enumerate((6, 4)):
        random_clip(seed, frames).save(tmp_path / f"{seed}.safetensors")
    result = run_check(tmp_path)
    told = "2 clips, all readable and of one size, 4 to 6 frames: train with --frames 4 at most\n"
    assert result.returncode == 0 and result.stdout.endswith(told)
    assert len(ClipDataset(tmp_path, 4)) == 2
    with pytest.raises(ValueError, match="has 4 frames, 5 are needed"):
        ClipDataset(tmp_path, 5)


def test_check_names_every_bad_clip(tmp_path, run_check):
    random_clip(0).save(tmp_path / "a.safetensors")
    assert run_check(tmp_path).stdout.endswith("1 clips, all readable and of one size, 5 frames\n")
    random_clip(1, width=8).save(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"")
    result = run_check(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert "b.safetensors: " in result.stderr and "c.safetensors: " in result.stderr
    empty = run_check(tmp_path / "nothing")
    assert empty.returncode == 2 and "no clips" in empty.stderr and len(empty.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flow", "depth", "message"),
    [
        (70000.0, 2.0, "flow holds 70000, which half precision cannot hold (65504 at most)"),
        (1.0, 65535.0, "depth holds 65535, which half precision cannot hold (65504 at most)"),
        (1.0, 2.9e-8, "depth holds 2.9e-08, which half precision makes 0"),
        (1.0, 65504.0, ""),
    ],
)
def test_what_annotate_writes_check_can_read(tmp_path, monkeypatch, capsys, run_check, flow, depth, message):
    video = write_video(tmp_path / "v.mp4", gray_levels([20, 25, 30, 35, 40, 45, 50, 55], 16, 24), 8)
    for name, value in (("flow", np.full((2, 16, 24), flow)), ("depth", np.full((16, 24), depth))):
        (tmp_path / name / "v").mkdir(parents=True)
        for t in range(8):
            np.save(tmp_path / name / "v" / f"{t:06d}.npy", value)
    words = f"--size 24x16 --fps 8 --frames 2 --segmentation none --camera none --flow {tmp_path / 'flow'}"
    words = [*words.split(), "--depth", tmp_path / "depth", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["clips.annotate", str(video), *map(str, words)])
    if not message:
        annotate.main()
        assert "4 clips written" in capsys.readouterr().out
        assert run_check(tmp_path / "out").stdout.endswith("4 clips, all readable and of one size, 2 frames\n")
        return
    with pytest.raises(SystemExit) as stop:
        annotate.main()
    printed, path = capsys.readouterr(), tmp_path / "out" / "v_000000.safetensors"
    lines = [line for line in printed.err.splitlines() if line.startswith("clips.annotate: ")]
    assert stop.value.code == 2 and lines == [f"clips.annotate: {path}: {message}"]
    assert "written" not in printed.out and not list((tmp_path / "out").glob("*"))[1:]  # the record alone
