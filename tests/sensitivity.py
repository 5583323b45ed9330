"""How much worse each measure gets when true clips are shuffled in time, frozen, delayed or blurred. Prints a table.

python tests/sensitivity.py data/val --clips 24
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402
import torch.nn.functional as nnf  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import metrics  # noqa: E402
from evaluate import truth_of  # noqa: E402
from metrics import LABELS, Features, cell, extractors_of, frozen  # noqa: E402

SHOWN = (
    "epe_relative",
    "iou_mean",
    "centroid_ade",
    "depth_absrel_objects",
    "hit",
    "hit_video",
    "fallen_video",
)


def blurred(maps: Tensor) -> Tensor:
    """[T, C, H, W], the mean of 5 x 5 pixels."""
    return nnf.avg_pool2d(maps, 5, stride=1, padding=2, count_include_pad=False)


def in_order(maps: metrics.Maps, order: Tensor) -> metrics.Maps:
    return {
        name: value[order] if name in ("rgb", "flow", "segmentation", "depth") else value
        for name, value in maps.items()
    }


def degraded(maps: metrics.Maps) -> dict[str, metrics.Maps]:
    """A clip by what was done to it. Ids have no blur; of a blurred clip they stay as they are."""
    frames = len(maps["rgb"])
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(0))
    smooth = {"rgb": blurred(maps["rgb"]), "flow": blurred(maps["flow"])}
    return {
        "as it is": maps,
        "shuffled": in_order(maps, order),
        "frozen": frozen(maps),
        "delayed by 3": in_order(maps, (torch.arange(frames) - 3).clamp(min=0)),
        "blurred": maps | smooth | {"depth": blurred(maps["depth"][:, None])[:, 0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DIR", help="clips of clips.simulate")
    parser.add_argument("--clips", type=int, default=24)
    arguments = parser.parse_args()
    features, rows = Features(extractors_of(["fvd", "fvmd"], ["lk", "flow"], None, None, "cpu")), {}
    for path in tqdm(sorted(Path(arguments.data).glob("*.safetensors"))[: arguments.clips]):
        scene = truth_of(path, 16, "cpu")
        whole = scene.truth["arrow"] | {"rgb_own": scene.truth["arrow"]["rgb"]}
        features.add("truth", whole, scene)
        for how, maps in degraded(scene.truth["arrow"]).items():
            maps = maps | {"rgb_own": maps["rgb"]}
            features.add(how, maps, scene)
            figures = metrics.physics_figures({"arrow": maps}, scene)
            figures["psnr"] = metrics.mean_of(metrics.psnr(maps["rgb"], whole["rgb"]))
            rows.setdefault(how, []).append(figures)
    found = {how: metrics.summarise(some) | features.distances(how) for how, some in rows.items()}
    names = [*features.extractors, *SHOWN, "psnr"]
    print(" | ".join(["| measure", *found]) + " |\n" + "|---" * (len(found) + 1) + "|")
    for name in names:
        label = "PSNR, dB ↑" if name == "psnr" else LABELS.get(name, name)
        print(" | ".join([f"| {label}", *(cell(figures.get(name)) for figures in found.values())]) + " |")


if __name__ == "__main__":
    main()
