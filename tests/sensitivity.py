"""How much worse each measure gets when true clips are shuffled in time, frozen, delayed or blurred. Prints a table.

python tests/sensitivity.py data/val --clips 24
python tests/sensitivity.py data/val --clips 24 --videos out    # written as mp4 and measured by evaluate.py --videos
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

import evaluate  # noqa: E402
import metrics  # noqa: E402
from metrics import LABELS, Features, cell, extractors_of, frozen  # noqa: E402
from show import to_uint8, write_video  # noqa: E402

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
    late = in_order(maps, (torch.arange(frames) - 3).clamp(min=0))
    late["flow"] = torch.cat([torch.zeros_like(maps["flow"][:3]), maps["flow"][:-3]])  # until then nothing moves
    return {
        "as it is": maps,
        "shuffled": in_order(maps, order),
        "frozen": frozen(maps),
        "delayed by 3": late,
        "blurred": maps | smooth | {"depth": blurred(maps["depth"][:, None])[:, 0]},
    }


def row_of(how: str) -> str:
    return how.replace(" ", "_")


def write_degraded(scene: metrics.Scene, out: Path) -> None:
    """An mp4 of each kind: OUT/KIND/NAME.mp4."""
    for how, maps in degraded(scene.truth["arrow"]).items():
        (out / row_of(how)).mkdir(parents=True, exist_ok=True)
        path = out / row_of(how) / f"{scene.path.stem}.mp4"
        write_video(path, to_uint8(maps["rgb"]), maps["fps"].item())


def measure_videos(paths: list[Path], data: str, out: Path) -> None:
    for path in tqdm(paths):
        scene = evaluate.truth_of(path, 16, "cpu")
        write_degraded(scene, out)
    rows = [str(out / row_of(how)) for how in degraded(scene.truth["arrow"])]
    told = ["--data", data, "--frames", "16", "--clips", str(len(paths)), "--json", str(out / "sensitivity.json")]
    sys.argv = ["evaluate.py", "--videos", *rows, *told]
    evaluate.main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DIR", help="clips of clips.simulate")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--videos", metavar="DIR", help="write videos there, and measure these")
    arguments = parser.parse_args()
    paths = sorted(Path(arguments.data).glob("*.safetensors"))[: arguments.clips]
    if arguments.videos:
        return measure_videos(paths, arguments.data, Path(arguments.videos))
    features, rows = Features(extractors_of(["fvd", "fvmd"], ["lk", "flow"], None, None, "cpu")), {}
    for path in tqdm(paths):
        scene = evaluate.truth_of(path, 16, "cpu")
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
