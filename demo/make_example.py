"""Writes the examples beside the weights: first frames of held-out scenes, their ids and depth, and arrows.

python demo/make_example.py        # example.png, ids.png, depth.png, arrows*.json; examples/WORLD/ likewise

Depth is in millimetres; where the sky is seen, twice as coarse, or 16 bits would not do (its unit does not matter).
examples/WORLD/arrows.json tells the push, arrows_opposite.json the opposite one; of driving, the first step of every
car and the motion of the ego car, which passes first, or second.
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

SIZE = (128, 64)
SEED = 1000001  # training ends below 1000000
WORLDS = {
    "dominoes": 1000010, "collide": 1000010, "drop": 1000002, "roll": 1000004, "support": 1000003, "contain": 1000002,
    "link": 1000004, "driving": 1000026, "branch": 1000003, "tower": 1000003,
}  # fmt: skip
REACH = 5  # frame steps that an arrow spans at the speed of the push


def arrow(clip: Clip, thing: int) -> dict:
    """From the middle of a thing, by its mean flow in the first step: how the demo model is told of a push."""
    tensors = clip.tensors()
    flow = instance_flow(tensors["flow"], tensors["segmentation"], reduce="start")
    y, x = np.nonzero(clip.segmentation[0] == thing)
    nearest = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    start = [int(x[nearest]), int(y[nearest])]
    step = flow[:, start[1], start[0]] * REACH
    return {"start": start, "end": [round(start[0] + step[0].item(), 1), round(start[1] + step[1].item(), 1)]}


def told(clip: Clip) -> dict:
    """What a user tells of a clip: the push, or the cars and the ego car's motion."""
    if clip.meta["pushed"]:
        return {"arrows": [arrow(clip, clip.meta["pushed"])]}
    seen = [int(i) for i in np.unique(clip.segmentation[0]) if i > 0]
    forward, yaw = clip.camera.mean(axis=0).round(3).tolist()
    return {"arrows": [arrow(clip, i) for i in seen], "camera": [forward, yaw]}


def write(folder: Path, clip: Clip, files: dict[str, dict]) -> None:
    """A clip's first frame with its ids and depth, and arrows files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(clip.rgb[0]).save(folder / "example.png")
    Image.fromarray(clip.segmentation[0]).save(folder / "ids.png")
    steps = 1000 if clip.depth[0].max() < 65 else 500  # a metre
    Image.fromarray((clip.depth[0] * steps).astype(np.uint16)).save(folder / "depth.png")
    for name, content in files.items():
        text = json.dumps(content | {"segmentation": "ids.png", "depth": "depth.png", "delta": 1 / REACH})
        (folder / f"{name}.json").write_text(text + "\n")


def of_world(scenario: str, seed: int, folder: Path) -> None:
    """A scene of this world, with its push and the opposite one, or with two ego motions."""
    side = simulate(scenario, seed, 1, (16, 8)).meta["side"]
    pushes = [{"order": order} for order in ("first", "second")] if scenario == "driving" else [None, {"side": -side}]
    clips = [simulate(scenario, seed, 16, SIZE, push) for push in pushes]
    write(folder, clips[0], dict(zip(("arrows", "arrows_opposite"), map(told, clips), strict=True)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    side = simulate("dominoes", SEED, 1, (16, 8)).meta["side"]
    clip, opposite = (simulate("dominoes", SEED, 16, SIZE, {"side": s, "strength": 1.2}) for s in (side, -side))
    files = {"arrows": told(clip), "arrows_opposite": told(opposite)}
    files |= {"arrows_still": {"arrows": [], "rest": "still"}, "arrows_none": {"arrows": []}}
    write(HERE, clip, files)
    for scenario, seed in WORLDS.items():
        of_world(scenario, seed, HERE / "examples" / scenario)


if __name__ == "__main__":
    main()
