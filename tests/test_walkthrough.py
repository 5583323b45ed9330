"""docs/walkthrough.md: its code runs, the shapes that it names are those, and every equation is there, in order."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import walkthrough  # noqa: E402

PAGE = (ROOT / "docs" / "walkthrough.md").read_text()


def test_its_code_runs_and_draws_the_pictures_that_it_shows(tmp_path, monkeypatch):
    """With one step of sampling in the place of ten, for time."""
    whole = walkthrough.blocks
    monkeypatch.setattr(walkthrough, "blocks", lambda text: whole(text.replace('": 10,', '": 1,')))
    monkeypatch.setattr(sys, "argv", ["walkthrough.py"])
    monkeypatch.chdir(ROOT)
    walkthrough.main(tmp_path)
    shown = re.findall(r"\]\(pictures/(\w+\.png)\)", PAGE)
    assert sorted(shown) == sorted(path.name for path in tmp_path.iterdir()) and len(shown) == 12
    for name in shown:
        made, committed = (Image.open(folder / name) for folder in (tmp_path, ROOT / "docs" / "pictures"))
        assert made.size == committed.size, name
        if name not in ("10.png", "no_arrow.png", "no_splat.png"):  # samples
            made, committed = (np.asarray(picture.convert("RGB")).astype(float) for picture in (made, committed))
            assert np.abs(made - committed).mean() < 1, f"{name}: no longer what the page shows"


def test_a_shape_that_is_another_is_said():
    with pytest.raises(ValueError, match=r"x has shape \[2\], the page says \[3\]"):
        walkthrough.run("import torch\nx = torch.zeros(2)  # [3]\n", {})
    with pytest.raises(ValueError, match="y has shape"):
        walkthrough.run("import torch\nx, y = torch.zeros(2), torch.zeros(3)  # [2], [2]\n", {})
    walkthrough.run("import torch\nx, y = torch.zeros(2), torch.zeros(3)  # [2], [3]\nx  # of two numbers\n", {})


def test_the_equations_stand_in_order():
    named = re.findall(r"^## .*\(Eq\. (\d+)(?:(-|, )(\d+))?\)", PAGE, flags=re.MULTILINE)
    numbers = [n for first, _, last in named for n in range(int(first), int(last or first) + 1)]
    assert numbers == list(range(1, 14))


def test_a_step_is_a_few_lines():
    assert all(len(block.strip().splitlines()) <= 14 for block in walkthrough.blocks(PAGE))
