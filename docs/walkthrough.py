"""Runs the code of walkthrough.md, checks the shapes that it names, and draws its pictures.

python docs/walkthrough.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kernels.threads  # noqa: E402, F401 (before torch)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from clips import Motion, render, unrender  # noqa: E402
from inputs import Arrows  # noqa: E402
from show import draw_arrows, flow_to_rgb, to_uint8  # noqa: E402
from svd import decode_video  # noqa: E402

Names = dict[str, Any]  # what the walkthrough's code has defined so far
SHAPE, WATCHED, SCALE = re.compile(r"\[[\d, ]+\]"), 3, 3  # the frame that is shown; picture pixels for a pixel
SHOWN = [0, 2, 4, 8]


def blocks(text: str) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(block: str, names: Names) -> None:
    """Executes a block, then compares the shapes at the ends of its lines with those of what the lines name.

    A line is `a, b = ...  # [1, 2], [3]` or `a  # [1]`. Raises ValueError for a shape that is another.
    """
    exec(compile(block, "walkthrough.md", "exec"), names)  # our own page
    for line in block.splitlines():
        code, _, comment = line.partition("  # ")
        named = code.split(" = ")[0].split(", ")
        shapes = SHAPE.findall(comment)
        for name, shape in zip(named if shapes else [], shapes, strict=True):
            if (found := list(eval(name, names).shape)) != json.loads(shape):
                raise ValueError(f"walkthrough.md: {name} has shape {found}, the page says {shape}")


# ---------------------------------------------------------------------------------------------------------- pictures


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of one height, with a gap, enlarged."""
    gap = np.full((len(pictures[0]), 2, 3), 255, np.uint8)
    row = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
    return row.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def picture(modality: str, value: Tensor, first: Tensor | None = None) -> list[np.ndarray]:
    """A modality [T, ...] for people, one picture a frame; `first` [H, W] sets colours and scale."""
    if modality == "flow":
        return list(flow_to_rgb(value, max(1.0, value.norm(dim=1).max().item())))
    return list(to_uint8(render(modality, value[None], None if first is None else first[None])[0]))


def of_flow(latents: Tensor, names: Names) -> np.ndarray:
    """What the flow in latents [1, T, C, h, w] of all modalities looks like in the watched frame."""
    part = latents[:, :, : names["stage1"].config.latent_channels].detach()
    return picture("flow", unrender("flow", decode_video(names["vae"], part, 8))[0])[WATCHED]


def large_cells(F: Tensor) -> np.ndarray:
    """F [2, h, w] of few cells, as large as a frame."""
    side = 64 // F.shape[-2]
    return picture("flow", F[None])[0].repeat(side, axis=0).repeat(side, axis=1)


def mask(value: Tensor) -> np.ndarray:
    return np.repeat((value.numpy() * 255).astype(np.uint8)[..., None], 3, axis=-1)


def flow_row(motion: Motion) -> np.ndarray:
    frames = picture("flow", motion.flow[0])
    return side_by_side(*[frames[t] for t in SHOWN])


def maps_of_a_frame(n: Names) -> np.ndarray:
    maps = {"rgb": (n["clip"]["rgb"],), "flow": (n["O"],), "segmentation": (n["S"], n["S"][0])}
    maps["depth"] = (n["D"], n["D"][0])
    return side_by_side(*[picture(name, *value)[WATCHED] for name, value in maps.items()])


def arrow(n: Names) -> np.ndarray:
    rows, columns = (n["S"][0] == n["pushed"]).nonzero().float().mean(dim=0).tolist()
    end = [columns + n["v"][0].item(), rows + n["v"][1].item()]
    told = Arrows.from_dict({"arrows": [{"start": [columns, rows], "end": end}]})
    return side_by_side(draw_arrows(to_uint8(n["I_0"])[0], told), picture("flow", n["F_user"][None])[0])


def dreamed(n: Names) -> np.ndarray:
    rows = [side_by_side(*[to_uint8(video)[t] for t in SHOWN]) for video in (n["clip"]["rgb"], n["video"][0])]
    return np.concatenate([rows[0], np.full((2 * SCALE, *rows[0].shape[1:]), 255, np.uint8), rows[1]])


# What is drawn after each block.
PICTURES = {
    "1": maps_of_a_frame,
    "2": lambda n: side_by_side(*[picture("flow", value)[WATCHED] for value in (n["O"], n["O_back"][0])]),
    "3": lambda n: side_by_side(picture("rgb", n["I_0"])[0], picture("flow", n["F"][None])[0]),
    "4": arrow,
    "5": lambda n: side_by_side(*[of_flow(n[name], n) for name in ("x_t", "x_0")], of_flow(n["batch"].x0, n)),
    "6": lambda n: side_by_side(*[large_cells(n[name][0]) for name in ("F_8", "F_16", "F_32")]),
    "7": lambda n: side_by_side(to_uint8(n["I_0"])[0], to_uint8(n["thrown"])[0]),
    "8": lambda n: side_by_side(mask(n["M_mask"][0] * (n["S"][0] > 0)), picture("flow", n["F_told"][None])[0]),
    "9": lambda n: side_by_side(mask(n["M"][0, 0])),
    "10": dreamed,
    "no_arrow": lambda n: flow_row(n["no_arrow"]),
    "no_splat": lambda n: flow_row(n["no_splat"]),
}


def main(out: Path = HERE / "pictures") -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    os.chdir(HERE.parent)  # the page names the model "demo"
    torch.manual_seed(0)
    names: Names = {}
    out.mkdir(exist_ok=True)
    for block, (name, draw) in zip(blocks((HERE / "walkthrough.md").read_text()), PICTURES.items(), strict=True):
        run(block, names)
        Image.fromarray(draw(names)).save(out / f"{name}.png")


if __name__ == "__main__":
    main()
