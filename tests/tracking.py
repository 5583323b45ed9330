"""How far Lucas-Kanade is from the simulator's exact tracks, one frame step at a time. Prints a table.

python tests/tracking.py --seeds 101 102 103 104
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from clips import Clip, simulate  # noqa: E402
from metrics.trackers import lucas_kanade  # noqa: E402


def simulated(scenario: str, seed: int, rate: int) -> Clip:
    """Five frames, 128x64, at so many frames a second."""
    simulate.FRAME_TIME, usual = 1 / rate, simulate.FRAME_TIME
    try:
        return simulate.simulate(scenario, seed, 5, (128, 64))
    finally:
        simulate.FRAME_TIME = usual


def object_pixels(clip: Clip) -> Tensor:
    """[N, 2] (x, y) of the first frame."""
    return torch.from_numpy(clip.segmentation[0]).nonzero().flip(1)


def tracking_errors(clip: Clip, points: Tensor) -> Tensor:
    """From the exact place of every point [N, 2] in one frame to the next, where it moves and is inside the picture:
    [2, M], errors and lengths of the true steps in pixels. Points may be hidden."""
    found, (height, width) = [], clip.depth.shape[1:]
    exact, rgb = torch.from_numpy(simulate.tracks(clip, points.double().numpy())).float(), clip.tensors()["rgb"]
    inside = ((exact > 2) & (exact < torch.tensor([width - 3.0, height - 3.0]))).all(-1)
    for t in range(len(exact) - 1):
        step = (exact[t + 1] - exact[t]).norm(dim=-1)
        kept = inside[t] & inside[t + 1] & (step > 0.1)
        tracks = lucas_kanade(rgb[t : t + 2], exact[t, kept])
        found.append(torch.stack([(tracks[1] - exact[t + 1, kept]).norm(dim=-1), step[kept]]))
    return torch.cat(found, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101])
    arguments = parser.parse_args()
    print(" | ".join(["| frames a second", "steps", "all", *simulate.SCENARIOS]) + " |")
    print("|---" * (len(simulate.SCENARIOS) + 3) + "|")
    for rate in (30, 10):
        errors = {}
        for scenario in tqdm(simulate.SCENARIOS):
            clips = [simulated(scenario, seed, rate) for seed in arguments.seeds]
            errors[scenario] = torch.cat([tracking_errors(clip, object_pixels(clip)[::4]) for clip in clips], dim=1)
        whole = torch.cat(list(errors.values()), dim=1)
        cells = ["{:.2f} / {:.2f}".format(*part.median(dim=1).values) for part in (whole, *errors.values())]
        print(" | ".join([f"| {rate}", str(whole.shape[1]), *cells]) + " |")


if __name__ == "__main__":
    main()
