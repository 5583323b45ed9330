"""The object at an arrow's tail, and depth, where the user brings neither.

    find, how = choose_finder(arguments, device)      # SAM 2, or `grow_region`, which needs no weights
    mask = find(image, (x, y))                        # bool [H, W]

SAM 2 and Depth-Anything-V2 come with the optional package transformers; "auto" takes them only where package and
weights are on this machine already, and never downloads.
"""

from __future__ import annotations

import argparse
import importlib.util
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageDraw, ImageFilter

from sources import check_model, first_line

Finder = Callable[[np.ndarray, tuple[float, float]], np.ndarray]  # image [H, W, 3], (x, y) -> the object there [H, W]
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1], of ImageNet
NEAREST_TO_FARTHEST = 10.0  # of an estimated depth, which knows an order and no distances


def choose_finder(arguments: argparse.Namespace, device: str) -> tuple[Finder, str]:
    """`--segment` -> what finds the object under an arrow's tail, and its name."""
    told, model = arguments.segment, arguments.segment_model
    if told == "sam" or (told == "auto" and at_hand(model)):
        return sam_finder(model, device, local=told == "auto"), f"what {model} sees"
    return {"auto": grow_region, "none": find_nothing}[told], "the region of similar colour"


def find_nothing(image: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    raise ValueError("names no object, and --segment is none: give it an instance, box, polygon or mask")


# ------------------------------------------------------------------------------------------- optional: transformers


def at_hand(model: str) -> bool:
    """Whether transformers and the weights of a hub id or folder are here, so that nothing would be downloaded."""
    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        return Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "model.safetensors"), str)
    except HFValidationError:
        return False


def _load(flag: str, class_name: str, name: str, local: bool) -> Any:  # noqa: ANN401
    """A model or processor of transformers from a hub id or folder. Raises ValueError of one line that names flag and
    model, also where weights are missing, which transformers would fill with random numbers."""
    check_model(f"--{flag}", name)
    local = local or Path(name).is_dir()  # else the hub is asked for what a folder lacks
    settings = {} if class_name == "AutoImageProcessor" else {"output_loading_info": True}
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = getattr(transformers, class_name).from_pretrained(name, local_files_only=local, **settings)
    except AttributeError:
        told = f"transformers {transformers.__version__} has no {class_name}: pip install -U transformers"
        raise ValueError(f"--{flag} {name}: {told}") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"--{flag} {name}: {first_line(error)}") from None
    if not settings:
        return loaded
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"--{flag} {name}: these are not the weights of a {type(model).__name__}")
    return model.eval()


def sam_finder(name: str, device: str, local: bool) -> Finder:
    """SAM 2 as a finder: the mask, of its three for a point, that it is surest of. The picture is looked at once."""
    model, seen = _load("segment-model", "Sam2Model", name, local).to(device), []
    side = model.config.prompt_encoder_config.image_size  # 1024, whatever the picture's aspect

    @torch.no_grad()
    def find(image: np.ndarray, point: tuple[float, float]) -> np.ndarray:
        height, width = image.shape[:2]
        if not seen:
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            x = nnf.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
            mean, std = (torch.tensor(value).view(3, 1, 1) for value in (SAM_MEAN, SAM_STD))
            seen.append(model.get_image_embeddings(((x - mean) / std).to(device)))
        place = [point[0] * side / width - 0.5, point[1] * side / height - 0.5]  # SAM counts pixel centres
        points, labels = torch.tensor([[[place]]], device=device), torch.ones(1, 1, 1, dtype=torch.int, device=device)
        out = model(image_embeddings=list(seen[0]), input_points=points, input_labels=labels)
        best = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()][None, None].float()
        mask = (nnf.interpolate(best, size=(height, width), mode="bilinear") > 0)[0, 0].cpu().numpy()
        if not mask.any():
            raise ValueError(
                f"{name} sees nothing at ({point[0]:g}, {point[1]:g}); mark the object in page/draw.html, or give the "
                "arrow a box, polygon or mask"
            )
        return mask

    return find


@torch.no_grad()
def estimate_depth(rgb: np.ndarray, name: str, device: str, local: bool) -> np.ndarray:
    """Depth-Anything-V2: uint8 [H, W, 3] -> float32 [H, W], 1 (nearest) to 10; raises ValueError for NaN.

    The network tells inverse depth up to scale and shift. Any choice of both that keeps it positive is as good: the
    model sees inverse depth in the first frame's range (clips/pictures.py:depth_to_picture).
    """
    processor = _load("depth-model", "AutoImageProcessor", name, local)
    model = _load("depth-model", "AutoModelForDepthEstimation", name, local).to(device)
    given = processor(images=Image.fromarray(rgb), return_tensors="pt").to(device)
    found = processor.post_process_depth_estimation(model(**given), target_sizes=[rgb.shape[:2]])
    inverse = found[0]["predicted_depth"].float().cpu()
    if not torch.isfinite(inverse).all():
        raise ValueError(f"--depth-model {name}: its depth is not finite")
    low, high = inverse.min(), inverse.max()
    near = (inverse - low) / (high - low) if high > low else torch.ones_like(inverse)  # 0 .. 1
    return (1 / (near + (1 - near) / NEAREST_TO_FARTHEST)).numpy()


# ----------------------------------------------------------------------------- an object without any segmentation

# Luma and two colour differences; shading counts less than a change of colour.
OPPONENT = np.array([[0.30, 0.50, 0.25], [0.59, -0.50, 0.25], [0.11, 0.0, -0.50]], np.float32)
PLATEAU = 1.1  # growth that still counts as the same region
LEAST_LEVELS = 4  # over which a region must last, of 255
LARGEST_SIDE = 640  # pixels; the flood is plain Python, half a second at this size
LEAST_EDGE = 1.25  # slope of colour at a region's outline over that inside: a gradient has no edge
TOUCHES = 0.02  # of a side of the picture: what lies along more of it is at that side
LARGE = 0.3  # of the picture: of 24 larger regions at a side, grown on photos, one was an object


def grow_region(image: np.ndarray, point: tuple[float, float], largest: float = 0.5) -> np.ndarray:
    """The object under `point` (x, y), by colour alone: bool [H, W]. No weights; for images without segmentation.

    The difference to the colour at the point is flooded like a landscape: at each level the lake holds what is
    connected to the point without a larger difference. The region is the lake that stays the same (within 10%) over
    most levels, before it leaks into the background (`_leak`); then holes are filled. Texture and shading weaker than
    the outline are thus no obstacle. A picture larger than LARGEST_SIDE is made smaller by a whole number first. Raises
    ValueError when nothing of at least 4 pixels and at most `largest` of the image lasts, or when what lasts has no
    edge: on an even or graded background, say.
    """
    height, width = image.shape[:2]
    step = -(-max(height, width) // LARGEST_SIDE)
    picture = Image.fromarray(image).reduce(step)
    smooth = picture.filter(ImageFilter.MedianFilter(3))  # removes noise, keeps edges
    color = np.asarray(smooth).astype(np.float32) @ OPPONENT
    region = _lasting_lake(color, int(point[0]) // step, int(point[1]) // step, largest)
    if region.mean() > largest or not _has_edge(color, region):
        raise ValueError(
            f"nothing stands out around ({point[0]:g}, {point[1]:g}), or it is more than {largest:.0%} of the image or "
            "its background; mark the object in page/draw.html, or give the arrow a box, polygon or mask"
        )
    return region.repeat(step, axis=0).repeat(step, axis=1)[:height, :width]


def _lasting_lake(color: np.ndarray, x: int, y: int, largest: float) -> np.ndarray:
    """Floods from (x, y) and keeps the lake that lasts longest, holes filled: bool [H, W]."""
    height, width = color.shape[:2]
    order, sizes = _flood(color, x, y, largest * height * width)
    sizes = sizes[: _leak(order, sizes, height, width)]
    region = np.zeros((height + 2, width + 2), np.uint8)
    region.flat[order[: _stable_size(sizes)]] = 1
    outside = Image.fromarray(region).copy()  # a picture of its own, one that can be painted on
    ImageDraw.floodfill(outside, (0, 0), 2)  # from the margin: what it does not reach is region or hole
    return np.asarray(outside)[1:-1, 1:-1] != 2


def _flood(color: np.ndarray, x: int, y: int, limit: float) -> tuple[list[int], list[int]]:
    """Pixels (indices of the image with a margin of 1) in the order a rising level reaches them, and how many of them
    each level 0, 1, .. holds; ends before the first level that holds more than `limit`."""
    height, width = color.shape[:2]
    row = width + 2
    difference = np.linalg.norm(color - color[y, x], axis=-1).astype(int)
    levels = np.pad(difference, 1).ravel().tolist()
    seen = bytearray(np.pad(np.zeros((height, width), np.uint8), 1, constant_values=1).tobytes())
    waiting: list[list[int]] = [[] for _ in range(max(levels) + 1)]
    waiting[0].append((y + 1) * row + x + 1)
    order, sizes = [], []
    for level, stack in enumerate(waiting):
        while stack:
            p = stack.pop()
            if seen[p]:
                continue
            seen[p] = 1
            order.append(p)
            for q in (p - 1, p + 1, p - row, p + row):
                if not seen[q]:
                    waiting[max(level, levels[q])].append(q)
        if len(order) > limit:
            break
        sizes.append(len(order))
    return order, sizes


def _leak(order: list[int], sizes: list[int], height: int, width: int) -> int:
    """The first level whose lake is background, as sky, wall and floor are: it lies along three sides of the picture,
    or along one and holds more than LARGE of it."""
    levels = np.full((height + 2) * (width + 2), len(sizes))
    for level, (start, end) in enumerate(pairwise([0, *sizes])):
        levels[order[start:end]] = level
    inner = levels.reshape(height + 2, width + 2)[1:-1, 1:-1]
    sides = (inner[0], inner[-1], inner[:, 0], inner[:, -1])
    first, _, third, _ = sorted(int(np.sort(side)[int(TOUCHES * len(side))]) for side in sides)
    return min(third, max(first, bisect_right(sizes, LARGE * height * width)))


def _stable_size(sizes: list[int]) -> int:
    """The size, 4 pixels or more, that lasts over most levels; 0 when none lasts over LEAST_LEVELS."""
    best, longest = 0, LEAST_LEVELS - 1
    for level, size in enumerate(sizes):
        length = sum(later <= PLATEAU * size for later in sizes[level:])
        if size >= 4 and length > longest:
            best, longest = size, length
    return best


def _has_edge(color: np.ndarray, region: np.ndarray) -> bool:
    """Whether colour changes faster along the outline of the region than inside of it; an empty one has no outline."""
    slope = sum(np.linalg.norm(part, axis=-1) for part in np.gradient(color, axis=(0, 1)))
    mask = Image.fromarray(region)
    wide, narrow = (
        np.asarray(mask.convert("L").filter(f(3))) > 0 for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
    )
    outline = wide & ~narrow
    if not outline.any():
        return False
    return bool(slope[outline].mean() > LEAST_EDGE * (slope[narrow].mean() if narrow.any() else 0))
