"""clips/check.py through its command line."""

import subprocess
import sys
from pathlib import Path

from test_clip import random_clip

ROOT = Path(__file__).parent.parent


def run_check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clips.check", folder], capture_output=True, text=True, cwd=ROOT)


def test_check_names_every_bad_clip(tmp_path):
    random_clip(0).save(tmp_path / "a.safetensors")
    assert run_check(tmp_path).returncode == 0
    random_clip(1, width=8).save(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"")
    result = run_check(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert "b.safetensors: " in result.stderr and "c.safetensors: " in result.stderr
    empty = run_check(tmp_path / "nothing")
    assert empty.returncode == 2 and "no clips" in empty.stderr and len(empty.stderr.splitlines()) == 1
