"""Writes push.gif, the first picture of the README: a row of panels for every arrows file of the example.

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

ROWS = ("arrows", "arrows_opposite", "arrows_still", "arrows_none")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as out:
        files = [str(HERE / f"{name}.json") for name in ROWS]
        told = [str(HERE / "example.png"), *files, "--out", out]
        subprocess.run([sys.executable, str(HERE.parent / "sample.py"), *told], check=True)
        rows = []
        for name in ROWS:
            with Image.open(Path(out) / name / "grid.gif") as grid:
                fps = 1000 / grid.info["duration"]
                rows.append([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(grid)])
    write_gif(HERE / "push.gif", np.concatenate([np.stack(row) for row in rows], axis=1), fps)


if __name__ == "__main__":
    main()
