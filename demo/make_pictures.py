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
                pause = grid.info["duration"]
                rows.append([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(grid)])
    frames = [Image.fromarray(np.concatenate(column)) for column in zip(*rows, strict=True)]
    frames[0].save(HERE / "push.gif", save_all=True, append_images=frames[1:], duration=pause, loop=0)


if __name__ == "__main__":
    main()
