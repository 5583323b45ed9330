"""What a model is told of held-out clips, written for models that are not ours: a first frame, masks, arrows, paths.

    export_prompts("data/val", "prompts")     # prompts/NAME.png, NAME_ids.png, NAME.json for every clip NAME

The video that a model makes of them is called NAME.mp4 (see metrics/videos.py). NAME.json:

    first_frame     NAME.png: the picture that the video begins with
    masks           NAME_ids.png: gray, the value of a pixel is the id of its object, 0 the background
    width, height, frames, fps      of the clip: the video has as many frames; frame 0 is first_frame
    camera          [forward, yaw] in the units of clips/clip.py, the mean over the frames; [0, 0] stands still
    arrows          a list of {"instance": id, "start": [x, y], "end": [x, y]}: all that our models are told of motion.
                    start is on the object, end where it would be in the last frame at the speed of its first step: how
                    it is pushed, and not how far it comes. (Of ours, those with `reduce=start` are told the same)
    rest            "still": nothing is pushed, and all objects are told to stay; null: of those without an arrow
                    nothing is told
    trajectories    by id, for each arrow: the true path of the object's middle, [[x, y], ...], a place a frame, also
                    where something hides it. More than an arrow tells: a model that was given them knows more

Places are in pixels from the top left corner of the picture; the middle of its first pixel is [0.5, 0.5].
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from clips import ClipDataset
from metrics import Scene, carry_seen
from motion_dreamer import STAGE1
from show import to_uint8, written_whole
from training.sampler import one_arrow
from training.scenes import first_of, truth_of


def export_prompts(data: str, folder: str, clips: int, frames: int | None) -> str:
    """Writes the files of the first clips -> a line for people. Raises ValueError or OSError that names the file."""
    found, out = ClipDataset(data, frames), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = first_of(found.paths, clips)
    for path in paths:
        scene, name = truth_of(path, found.frames, "cpu"), path.stem
        maps = scene.truth["arrow"]
        write_picture(out / f"{name}.png", to_uint8(maps["rgb"][:1])[0])
        write_picture(out / f"{name}_ids.png", maps["segmentation"][0].numpy().astype(np.uint8))
        files = {"first_frame": f"{name}.png", "masks": f"{name}_ids.png"}
        told = json.dumps(files | prompt_of(scene), indent=1) + "\n"
        written_whole(out / f"{name}.json", lambda partial, told=told: partial.write_text(told))
    return f"{out}: prompts of {len(paths)} clips, {found.frames} frames of {found.width}x{found.height}"


def write_picture(path: Path, pixels: np.ndarray) -> None:
    written_whole(path, lambda partial: Image.fromarray(pixels).save(partial, "PNG"))


def prompt_of(scene: Scene) -> dict:
    """What the JSON says of a clip, but for the names of its files."""
    maps = scene.truth["arrow"]
    flow, ids = maps["flow"], maps["segmentation"]
    F, told = one_arrow(scene, "arrow", replace(STAGE1, reduce="start"))
    steps, arrows, paths = len(flow) - 1, [], {}
    points, owner = carry_seen(flow, ids, ids[0])
    rest = not F.any()
    for instance in [] if rest else scene.objects:
        place = inner_pixel(ids[0] == instance)
        if told[0][place]:
            start = [place[1] + 0.5, place[0] + 0.5]
            end = [at + steps * by for at, by in zip(start, F[:, place[0], place[1]].tolist(), strict=True)]
            arrows.append({"instance": instance, "start": start, "end": end})
            paths[str(instance)] = (points[:, owner == instance].mean(dim=1) + 0.5).tolist()
    return {
        "width": ids.shape[2], "height": ids.shape[1], "frames": len(flow), "fps": maps["fps"].item(),
        "camera": maps["camera"].tolist(), "arrows": arrows, "rest": "still" if rest else None, "trajectories": paths,
    }  # fmt: skip


def inner_pixel(mask: Tensor) -> tuple[int, int]:
    """Row and column of the pixel of a mask [H, W] that is nearest to its middle."""
    places = mask.nonzero()
    middle = places.double().mean(dim=0)
    row, column = places[(places - middle).norm(dim=1).argmin()].tolist()
    return row, column
