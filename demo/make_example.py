"""Writes the example beside the weights: a held-out scene's first frame, its ids and depth, and arrows.

python demo/make_example.py        # example.png, ids.png, depth.png (millimetres), arrows*.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

from clips import Clip  # noqa: E402
from clips.simulate import simulate  # noqa: E402
from instance_flow import instance_flow  # noqa: E402

SEED = 1000001  # training ends below 1000000
REACH = 5  # frame steps that an arrow spans at the speed of the push


def arrow(clip: Clip) -> dict:
    """From the middle of the pushed thing, by its mean flow in the first step: how the demo model is told of a push."""
    tensors, pushed = clip.tensors(), clip.meta["pushed"]
    flow = instance_flow(tensors["flow"], tensors["segmentation"], reduce="start")
    y, x = np.nonzero(clip.segmentation[0] == pushed)
    nearest = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    start = [int(x[nearest]), int(y[nearest])]
    step = flow[:, start[1], start[0]] * REACH
    return {"start": start, "end": [round(start[0] + step[0].item(), 1), round(start[1] + step[1].item(), 1)]}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    size, side = (128, 64), simulate("dominoes", SEED, 1, (16, 8)).meta["side"]
    clip, opposite = (simulate("dominoes", SEED, 16, size, {"side": s, "strength": 1.2}) for s in (side, -side))
    Image.fromarray(clip.rgb[0]).save(HERE / "example.png")
    Image.fromarray(clip.segmentation[0]).save(HERE / "ids.png")
    Image.fromarray((clip.depth[0] * 1000).astype(np.uint16)).save(HERE / "depth.png")
    files = {"arrows": {"arrows": [arrow(clip)]}, "arrows_opposite": {"arrows": [arrow(opposite)]}}
    files |= {"arrows_still": {"arrows": [], "rest": "still"}, "arrows_none": {"arrows": []}}
    for name, told in files.items():
        text = json.dumps(told | {"segmentation": "ids.png", "depth": "depth.png", "delta": 1 / REACH})
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
