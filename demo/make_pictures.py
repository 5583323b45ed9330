"""Writes push.gif, the first picture of the README: of each world two rows of panels, the same scene told two things.

python demo/make_pictures.py
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import kernels.threads  # noqa: E402, F401 (before torch)

from show import write_gif  # noqa: E402

WORLDS = {"": "", "examples/roll": "worlds", "examples/collide": "worlds", "examples/driving": "worlds"}  # and models


def panels(example: Path, model: Path) -> tuple[list[np.ndarray], float]:
    """What sample.py makes of both arrows files of an example: two grids [T, h, w, 3], frames a second."""
    with tempfile.TemporaryDirectory() as out:
        files = [str(example / name) for name in ("example.png", "arrows.json", "arrows_opposite.json")]
        told = [*files, "--model", str(model), "--out", out]
        subprocess.run([sys.executable, str(HERE.parent / "sample.py"), *told], check=True)
        rows = []
        for name in ("arrows", "arrows_opposite"):
            with Image.open(Path(out) / name / "grid.gif") as grid:
                fps = 1000 / grid.info["duration"]
                rows.append(np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(grid)]))
    return rows, fps


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rows = []
    for example, model in WORLDS.items():
        pair, fps = panels(HERE / example, HERE / model)
        rows += pair
    write_gif(HERE / "push.gif", np.concatenate(rows, axis=1), fps)


if __name__ == "__main__":
    main()
