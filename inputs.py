"""What a user brings, made ready for the model: a picture of any size, its arrows, ids and depth, read or estimated.

    inputs = read_inputs(arguments, "arrows.json", device)     # in pixels of the user's picture
    inputs, canvas = fit(inputs, width=512, height=320)        # in pixels of the model's

Objects: what arrows.json says, else `--segment`: SAM 2 at an arrow's tail, or the region of its colour. Depth: a file,
else `--depth`: Depth-Anything-V2. Both networks come with the optional package transformers; "auto" takes them only
where package and weights are on this machine already, and never downloads.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor

from data import read_depth, read_rgb, read_segmentation
from instance_flow import Arrows, Finder, apply_shapes, arrows_to_flow, grow_region

SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1], of ImageNet
NEAREST_TO_FARTHEST = 10.0  # of an estimated depth, which knows an order and no distances


@dataclass
class Inputs:
    """What the user gave; maps that are absent are None."""

    rgb: np.ndarray  # uint8 [H, W, 3]
    given: Arrows  # as in the file
    arrows: Arrows  # every arrow names its object
    ids: Tensor  # [H, W], shapes of arrows.json included
    depth: Tensor | None  # [H, W]
    origin: str  # where ids and depth come from, for people

    def told(self, frames: int, canvas: Canvas, device: str) -> list[Tensor | None]:
        """image, segmentation, depth, F and camera as `dream` wants them: a batch of one, of the model's size."""
        image = torch.from_numpy(self.rgb).permute(2, 0, 1).float() / 127.5 - 1
        segmentation = self.ids if self.ids.any() else None
        maps = [image, segmentation, self.depth, arrows_to_flow(self.arrows, self.ids, frames)]
        maps = [None if value is None else canvas.pad(value)[None].to(device) for value in maps]
        return [*maps, torch.tensor([self.arrows.camera], dtype=torch.float32, device=device)]


@dataclass(frozen=True)
class Canvas:
    """The model's picture, height x width, with the user's in its middle, whose edge is repeated around it."""

    height: int
    width: int
    inner: tuple[int, int]  # height, width of the user's picture after resizing

    @property
    def corner(self) -> tuple[int, int]:
        return (self.height - self.inner[0]) // 2, (self.width - self.inner[1]) // 2

    def pad(self, x: Tensor) -> Tensor:
        """[..., h, w] -> [..., height, width]."""
        (top, left), (h, w) = self.corner, self.inner
        rows = (torch.arange(self.height) - top).clamp(0, h - 1)
        columns = (torch.arange(self.width) - left).clamp(0, w - 1)
        return x[..., rows[:, None], columns]

    def crop(self, x: Tensor) -> Tensor:
        """[..., height, width] -> [..., h, w]."""
        (top, left), (h, w) = self.corner, self.inner
        return x[..., top : top + h, left : left + w]


def fit(inputs: Inputs, width: int, height: int) -> tuple[Inputs, Canvas]:
    """Resizes picture, maps and arrows into width x height, the aspect kept. Raises ValueError that names an arrow
    whose object is too small to be left."""
    old_height, old_width = inputs.rgb.shape[:2]
    scale = min(width / old_width, height / old_height)
    h, w = max(1, round(old_height * scale)), max(1, round(old_width * scale))
    canvas = Canvas(height, width, (h, w))
    if (h, w) == (old_height, old_width):
        return inputs, canvas
    rgb = np.array(Image.fromarray(inputs.rgb).resize((w, h), Image.Resampling.LANCZOS))
    ids, depth = _nearest(inputs.ids.byte(), h, w), None if inputs.depth is None else _nearest(inputs.depth, h, w)
    arrows = inputs.arrows.scaled(w / old_width, h / old_height)
    for number, arrow in enumerate(arrows.arrows, 1):
        if not (ids == arrow.instance).any():
            raise ValueError(
                f"{arrows.name}: arrow {number}: its object is too small: nothing is left of it at {w}x{h}"
            )
    return replace(inputs, rgb=rgb, ids=ids.long(), depth=depth, arrows=arrows), canvas


def _nearest(values: Tensor, height: int, width: int) -> Tensor:
    """[H, W] -> [height, width]. For ids, and for depth: between two distances there is nothing to be seen."""
    picture = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture))


# -------------------------------------------------------------------------------------------------------------- reading


def _read(read: Callable[[str], np.ndarray], path: str, rgb: np.ndarray | None = None) -> np.ndarray:
    """A picture file by one of data.py's readers; a map must have the size of `rgb`. Raises ValueError or
    FileNotFoundError that name the file, also of one that is damaged behind its header."""
    try:
        value = read(path)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from None
    if rgb is not None and value.shape != rgb.shape[:2]:
        size, wanted = (f"{shape[1]}x{shape[0]}" for shape in (value.shape, rgb.shape))
        raise ValueError(f"{path}: is {size}, the image is {wanted}")
    return value


def read_inputs(arguments: argparse.Namespace, arrows_path: str | None, device: str) -> Inputs:
    """What the command line names. Raises ValueError or FileNotFoundError of one line that name file and value."""
    for flag, word in (("segment", "sam"), ("depth", "estimate")):
        if getattr(arguments, flag) == word and importlib.util.find_spec("transformers") is None:
            raise ValueError(f"--{flag} {word} needs transformers: pip install transformers")
    rgb = _read(read_rgb, arguments.image)
    given = Arrows.load(arrows_path) if arrows_path else Arrows()
    path = arguments.segmentation or given.segmentation
    ids = _read(read_segmentation, path, rgb) if path else None
    depth, depth_origin = read_or_estimate_depth(arguments, given, rgb, device)
    unnamed = ids is None and any(arrow.instance is None and arrow.shape is None for arrow in given.arrows)
    find, how = choose_finder(arguments, device) if unnamed else (grow_region, "")
    arrows, ids, told = apply_shapes(given, rgb, ids, find, how)
    for line in told:
        print(line)
    objects = f"objects from {path}" if path else f"objects: {how}" if unnamed else "objects as the arrows say"
    depth = None if depth is None else torch.from_numpy(depth)
    return Inputs(rgb, given, arrows, torch.from_numpy(ids).long(), depth, f"{objects}; {depth_origin}")


def read_or_estimate_depth(
    arguments: argparse.Namespace, given: Arrows, rgb: np.ndarray, device: str
) -> tuple[np.ndarray | None, str]:
    """`--depth`: a file, or auto (the file of arrows.json, else an estimate where that needs no download), estimate or
    none -> depth [H, W] and where it comes from."""
    told, model = arguments.depth, arguments.depth_model
    path = {"auto": given.depth, "estimate": None, "none": None}.get(told, told)
    if path:
        return _read(read_depth, path, rgb), f"depth from {path}"
    if told == "estimate" or (told == "auto" and not arguments.svd and at_hand(model)):
        return estimate_depth(rgb, model, device, local=told == "auto"), f"depth by {model}"
    return None, "no depth"


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
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local = local or Path(name).is_dir()  # else the hub is asked for what a folder lacks
    settings = {} if class_name == "AutoImageProcessor" else {"output_loading_info": True}
    try:
        loaded = getattr(transformers, class_name).from_pretrained(name, local_files_only=local, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--{flag} {name}: {reason}") from None
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
            raise ValueError(f"{name} sees nothing at ({point[0]:g}, {point[1]:g}); give it a box, polygon or mask")
        return mask

    return find


@torch.no_grad()
def estimate_depth(rgb: np.ndarray, name: str, device: str, local: bool) -> np.ndarray:
    """Depth-Anything-V2: uint8 [H, W, 3] -> float32 [H, W], 1 (nearest) to 10; raises ValueError for NaN.

    The network tells inverse depth up to scale and shift. Any choice of both that keeps it positive is as good: the
    model sees inverse depth in the first frame's range (data.py:depth_to_picture).
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
