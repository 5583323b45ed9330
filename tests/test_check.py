"""clips/check.py through its command line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_clip import random_clip

from clips import ClipDataset, check


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
