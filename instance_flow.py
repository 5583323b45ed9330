"""Instance flow: one motion vector per object, painted over the object (section 3.2), and everything around it.

In training it is computed from dense flow and ids (Eq. 1-3) and partly hidden (Eq. 9); at inference it is painted from
a user's arrows (Eq. 4). Where the masked flow moves, the motion enhancement loss looks twice (Eq. 11).

    arrows, ids, told = apply_shapes(Arrows.load("arrows.json"), rgb, ids)     # boxes, polygons, masks -> ids
    F = arrows_to_flow(arrows, torch.from_numpy(ids).long(), frames=14)        # [2, H, W]

Symbols: O flow [T, 2, H, W] (dx right, dy down, pixels per frame step, frame t -> t+1), S ids (0 = background, 1..255
objects), M^(i) mask of object i in the first frame, F instance flow [2, H, W], p masking ratio, tau threshold in pixels
per frame step, delta frame steps per arrow: v delta is the flow of an arrow v.

Places in an image: x to the right, y down, from the top left corner of the top left pixel. Pixel (i, j) is the square
from (i, j) to (i + 1, j + 1); it is in a shape when its centre is.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

IDS = 256  # 0 is the background
LARGEST_NUMBER = 1e6  # of a coordinate: whatever is beyond is a mistake
Finder = Callable[[np.ndarray, tuple[float, float]], np.ndarray]  # image [H, W, 3], (x, y) -> the object there [H, W]


# --------------------------------------------------------------------------------------- from dense flow: Eq. 1 - 3


def _batched(flow: Tensor, segmentation: Tensor) -> tuple[Tensor, Tensor]:
    """Checks shapes -> flow [B, T, 2, H, W], ids int64 [B, T or 1, H, W] on the flow's device. B: 1 if absent."""
    if flow.ndim not in (4, 5) or flow.shape[-3] != 2 or flow.shape[-4] == 0:
        raise ValueError(f"flow has shape {list(flow.shape)}, expected [T, 2, H, W] or [B, T, 2, H, W]")
    one_frame = flow.shape[:-4] + flow.shape[-2:]
    all_frames = flow.shape[:-3] + flow.shape[-2:]
    if segmentation.shape not in (one_frame, all_frames):
        raise ValueError(
            f"segmentation has shape {list(segmentation.shape)}, expected {list(one_frame)} or {list(all_frames)}"
        )
    if flow.ndim == 4:
        flow, segmentation = flow[None], segmentation[None]
    return flow, _checked_ids(segmentation.view(len(flow), -1, *flow.shape[-2:]), flow.device)


def _checked_ids(segmentation: Tensor, device: torch.device) -> Tensor:
    """Ids as int64 on `device`. Raises ValueError when one is not a whole number of 0 to 255."""
    if segmentation.is_floating_point() or segmentation.dtype == torch.bool:
        raise ValueError(f"segmentation is {segmentation.dtype}, expected whole numbers")
    ids = segmentation.to(device, torch.int64)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < IDS:
        raise ValueError(f"segmentation holds ids from {ids.min()} to {ids.max()}, expected 0 to {IDS - 1}")
    return ids


def instance_flow(flow: Tensor, segmentation: Tensor, reduce: str = "instance") -> Tensor:
    """Mean motion of every object, painted over its first-frame mask (Eq. 1-3); the background gets none.

    flow [T, 2, H, W] or [B, T, 2, H, W]; segmentation: ids of the first frame [H, W] or [B, H, W], which is Eq. 1 to
    the letter, or of all frames [T, H, W] or [B, T, H, W], which follows an object that leaves its first place.
    Returns [2, H, W] or [B, 2, H, W] in the flow's dtype, pixels per frame step.

    reduce="instance" (text of section 3.2: "the average optical flow vectors for each object"): the mean over the mask
    in each frame, then over the frames that show the object. All frames weigh the same, as in Eq. 2, so that the
    result is displacement per step, which is what an arrow says, also of an object that shrinks or is half hidden.
    reduce="pixel" (Eq. 2 read literally): each pixel of the first-frame mask keeps its own mean over time.
    reduce="start" (not in the paper): as "instance", of the first step alone. It says how an object was pushed, not
    what came of it: a domino that has fallen has gone the same way whether slowly or fast.
    """
    if reduce not in ("instance", "pixel", "start"):
        raise ValueError(f"reduce is {reduce!r}, expected 'instance', 'pixel' or 'start'")
    batched, ids = _batched(flow, segmentation)
    if reduce == "start":
        batched, ids = batched[:, :1], ids[:, :1]
    first = ids[:, 0].unsqueeze(1)  # [B, 1, H, W]
    if reduce == "pixel":
        F = batched.mean(dim=1, dtype=torch.float64)
    else:
        table = _mean_of_ids(batched, ids)  # [B, 2, IDS]
        F = table.gather(2, first.flatten(1)[:, None].expand(-1, 2, -1)).view(len(batched), 2, *flow.shape[-2:])
    F = torch.where(first > 0, F, 0.0).to(flow.dtype)
    return F[0] if flow.ndim == 4 else F


def _mean_of_ids(flow: Tensor, ids: Tensor) -> Tensor:
    """[B, T, 2, H, W], [B, T or 1, H, W] -> mean vector of each id over its pixels, then its frames [B, 2, IDS]."""
    ids = ids.expand(-1, flow.shape[1], -1, -1).flatten(2)  # [B, T, HW]
    values = flow.flatten(3).double()  # sums over 10^5 pixels
    sums = values.new_zeros(*values.shape[:3], IDS).scatter_add_(3, ids[:, :, None].expand(-1, -1, 2, -1), values)
    count = values.new_zeros(*ids.shape[:2], IDS).scatter_add_(2, ids, torch.ones_like(values[:, :, 0]))[:, :, None]
    frames = (count > 0).sum(dim=1)  # [B, 1, IDS]
    return (sums / count.clamp(min=1)).sum(dim=1) / frames.clamp(min=1)


def sparse_flow(flow: Tensor, segmentation: Tensor, points: int, generator: torch.Generator | None = None) -> Tensor:
    """The control of MOFA-Video (baseline of Table 3): vectors at `points` sampled pixels, zero elsewhere.

    Shapes as in `instance_flow`. The pixels are drawn without replacement, each with the same chance, from those
    that belong to an object in the first frame and move; all of them when there are fewer than `points`. A vector is
    the mean over time of the flow at that pixel. `generator` is a CPU generator, on any device.
    """
    if points < 0:
        raise ValueError(f"points is {points}, expected 0 or more")
    F = instance_flow(flow, segmentation, reduce="pixel")
    flat = F.reshape(-1, 2, F.shape[-2] * F.shape[-1])
    lots = torch.rand(len(flat), flat.shape[-1], generator=generator).to(F.device)
    lots = torch.where((flat != 0).any(dim=1), lots, -1.0)
    chosen = lots.topk(min(points, flat.shape[-1]), dim=1).indices[:, None].expand(-1, 2, -1)  # [B, 2, points]
    return torch.zeros_like(flat).scatter_(2, chosen, flat.gather(2, chosen)).view_as(F)  # a lot of -1 has flow 0


# --------------------------------------------------------------------------- random masking, motion mask: Eq. 9, 11


def random_mask(
    F: Tensor,
    p: float,
    unit: str = "instance",
    segmentation: Tensor | None = None,
    generator: torch.Generator | None = None,
    keep_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Hides parts of the instance flow: F~ = F M_mask, M_mask 0 with probability p, the masking ratio (Eq. 9).

    F [2, H, W] or [B, 2, H, W]. A part is, by `unit`, one "element" of 2xHxW (Eq. 9 to the letter), one "pixel", or one
    "instance", which is what a user with one arrow for five dominoes looks like and needs the first frame's ids,
    `segmentation` [H, W] or [B, H, W]. keep_one, for instances only and without effect on other units: when all objects
    that move would be hidden, one of them, each with the same chance, is kept.

    Returns F~ and the mask (1 = kept), both of F's dtype; the mask has 2 channels for elements, otherwise 1.
    `generator` is a CPU generator, on any device; a sample's draws depend on F's shape and its place in the batch only.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}, expected a probability")
    if F.ndim not in (3, 4) or F.shape[-3] != 2:
        raise ValueError(f"F has shape {list(F.shape)}, expected [2, H, W] or [B, 2, H, W]")
    shapes = {"element": F.shape, "pixel": F.shape[:-3] + (1,) + F.shape[-2:], "instance": F.shape[:-3] + (IDS,)}
    if unit not in shapes:
        raise ValueError(f"unit is {unit!r}, expected one of {', '.join(shapes)}")
    lots = torch.rand(shapes[unit], generator=generator).to(F.device)
    kept = lots >= p  # lots are below 1
    if unit == "instance":
        if segmentation is None or segmentation.shape != F.shape[:-3] + F.shape[-2:]:
            given = None if segmentation is None else list(segmentation.shape)
            raise ValueError(f"unit 'instance' needs segmentation {list(F.shape[:-3] + F.shape[-2:])}, got {given}")
        ids = _checked_ids(segmentation, F.device).flatten(-2)  # [B, HW]
        if keep_one:
            kept |= _first_mover(F, ids, lots)
        kept = kept.gather(-1, ids).view(shapes["pixel"])
    mask = kept.to(F.dtype)
    return F * mask, mask


def _first_mover(F: Tensor, ids: Tensor, lots: Tensor) -> Tensor:
    """[B, IDS] booleans: the moving object with the highest lot, which is kept already if any of them is."""
    moving = (F != 0).any(dim=-3).flatten(-2)  # [B, HW]
    movers = torch.zeros_like(lots).scatter_add_(-1, ids, moving.to(lots)) > 0
    movers[..., 0] = False  # the background is no object
    highest = torch.where(movers, lots, -1.0).argmax(dim=-1, keepdim=True)
    return torch.zeros_like(movers).scatter_(-1, highest, movers.gather(-1, highest))


def motion_mask(F: Tensor, tau: float) -> Tensor:
    """M' of Eq. 11: 1 where the (masked) flow F [B, 2, H, W] is longer than tau, else 0; [B, 1, H, W], F's dtype."""
    return (F.norm(dim=-3, keepdim=True) > tau).to(F.dtype)


# --------------------------------------------------------------------------------------------------- arrows.json


@dataclass(frozen=True)
class Arrow:
    """What should move where. The object is the one under `start` unless one of the other four says otherwise."""

    start: tuple[float, float]  # x, y in pixels
    end: tuple[float, float]  # may lie outside the image
    instance: int | None = None  # an id of the segmentation
    box: tuple[float, ...] | None = None  # x0, y0, x1, y1
    polygon: tuple[tuple[float, ...], ...] | None = None  # corners; inside by the even-odd rule
    mask: str | None = None  # picture file, bright = object

    @classmethod
    def from_dict(cls, entry: dict, folder: str | os.PathLike = "") -> Arrow:
        """One entry of arrows.json. Raises ValueError that names the key and its value."""
        _check_keys(entry, ("start", "end"), ("instance", *SHAPES))
        entry = {key: value for key, value in entry.items() if value is not None}
        for key in ("start", "end"):
            if key not in entry:
                raise ValueError(f"has no {key}")
        given = [key for key in ("instance", *SHAPES) if key in entry]
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(given)}, expected one of them at most")
        readers = {"instance": _instance, "box": _box, "polygon": _polygon, "mask": lambda v: _path(v, "mask", folder)}
        ends = {key: _numbers(entry[key], 2, key) for key in ("start", "end")}
        return cls(**ends, **{key: readers[key](entry[key]) for key in given})

    @property
    def shape(self) -> str | None:
        """Which of box, polygon, mask the arrow has."""
        return next((name for name in SHAPES if getattr(self, name) is not None), None)

    def area(self, height: int, width: int) -> np.ndarray:
        """Pixels of the arrow's box, polygon or mask, bool [H, W]. Raises ValueError when there are none."""
        rasterise = {"box": _fill_box, "polygon": _fill_polygon, "mask": _read_mask}[self.shape]
        area = rasterise(getattr(self, self.shape), height, width)
        if not area.any():
            raise ValueError(f"{self.shape} {reprlib.repr(getattr(self, self.shape))} covers no pixel of the image")
        return area


SHAPES = ("box", "polygon", "mask")


@dataclass(frozen=True)
class Arrows:
    """arrows.json: arrows and what goes with them. An empty list = nothing is told about motion."""

    arrows: tuple[Arrow, ...] = ()
    camera: tuple[float, float] = (0.0, 0.0)  # c: forward motion and yaw, units in data.py
    segmentation: str | None = None  # picture files
    depth: str | None = None
    delta: float | None = None  # default: 1 / (T - 1)
    name: str = field(default="arrows", compare=False)  # what errors call it: the file

    @classmethod
    def load(cls, path: str | os.PathLike) -> Arrows:
        """Reads a JSON file; paths in it are relative to its folder. Raises ValueError of one line that names the file,
        the arrow (counted from 1) and the value, or FileNotFoundError."""
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
            d = json.loads(text, object_pairs_hook=_no_duplicates)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{path}: {reason}") from None
        return cls.from_dict(d, Path(path).parent, str(path))

    @classmethod
    def from_dict(cls, d: dict, folder: str | os.PathLike = "", name: str = "arrows") -> Arrows:
        """The content of an arrows.json; `folder` is what its paths are relative to, `name` is for error messages."""
        try:
            _check_keys(d, ("arrows",), ("camera", "segmentation", "depth", "delta"))
            entries = d.get("arrows")
            if not isinstance(entries, list | tuple):
                raise ValueError(f"arrows is {reprlib.repr(entries)}, expected a list")
            d = {key: value for key, value in d.items() if value is not None}
            settings = {key: _path(d[key], key, folder) for key in ("segmentation", "depth") if key in d}
            if "camera" in d:
                settings["camera"] = _numbers(d["camera"], 2, "camera")
            if "delta" in d:
                settings["delta"] = _positive(d["delta"], "delta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        arrows = []
        for number, entry in enumerate(entries, 1):
            with _naming(name, number):
                arrows.append(Arrow.from_dict(entry, folder))
        return cls(tuple(arrows), **settings, name=name)

    def scaled(self, x: float, y: float) -> Arrows:
        """The same arrows in the picture made x times as wide and y times as high. Shapes must be ids by now."""

        def moved(arrow: Arrow) -> Arrow:
            start, end = ((place[0] * x, place[1] * y) for place in (arrow.start, arrow.end))
            return replace(arrow, start=start, end=end)

        return replace(self, arrows=tuple(map(moved, self.arrows)))

    def to_dict(self) -> dict:
        """What JSON can hold and `from_dict` reads back; paths as they are, relative to the working folder."""
        settings = {key: value for key, value in _without_none(self).items() if key not in ("arrows", "name")}
        return {"arrows": [_without_none(arrow) for arrow in self.arrows], **settings}


def _without_none(item: Arrow | Arrows) -> dict:
    return {key: value for key, value in vars(item).items() if value is not None}


@contextmanager
def _naming(name: str, number: int) -> Iterator[None]:
    """Puts file and arrow in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: arrow {number}: {error}") from None


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    d = dict(pairs)
    if len(d) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return d


def _check_keys(d: object, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(d, dict):
        raise ValueError(f"is {reprlib.repr(d)}, expected an object with {', '.join(required)}")
    for key in d:
        if key not in required + optional:
            raise ValueError(f"has the unknown key {reprlib.repr(key)}, expected {', '.join(required + optional)}")


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what} is {reprlib.repr(value)}, expected a number")
    if not abs(value) <= LARGEST_NUMBER:  # also catches NaN
        raise ValueError(f"{what} is {reprlib.repr(value)}, expected a number of at most {LARGEST_NUMBER:g}")
    return float(value)


def _numbers(value: object, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{what} is {reprlib.repr(value)}, expected {count} numbers")
    return tuple(_number(v, f"{what}[{i}]") for i, v in enumerate(value))


def _positive(value: object, what: str) -> float:
    number = _number(value, what)
    if number <= 0:
        raise ValueError(f"{what} is {number:g}, expected a number above 0")
    return number


def _path(value: object, what: str, folder: str | os.PathLike) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{what} is {reprlib.repr(value)}, expected the name of a picture file")
    return str(Path(folder) / value)


def _instance(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"instance is {reprlib.repr(value)}, expected a whole number")
    if not 1 <= value < IDS:
        raise ValueError(f"instance is {reprlib.repr(value)}, expected 1 to {IDS - 1}")
    return int(value)


def _box(value: object) -> tuple[float, ...]:
    x0, y0, x1, y1 = box = _numbers(value, 4, "box")
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"box is {reprlib.repr(value)}, which is empty; expected x0 < x1 and y0 < y1")
    return box


def _polygon(value: object) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list | tuple) or len(value) < 3:
        raise ValueError(f"polygon is {reprlib.repr(value)}, expected 3 points or more")
    return tuple(_numbers(point, 2, f"polygon[{i}]") for i, point in enumerate(value))


# ------------------------------------------------------------------------------------------ the object of an arrow


def _centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5  # x [1, W], y [H, 1]


def _fill_box(box: tuple[float, ...], height: int, width: int) -> np.ndarray:
    (x0, y0, x1, y1), (x, y) = box, _centres(height, width)
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def _fill_polygon(polygon: tuple[tuple[float, ...], ...], height: int, width: int) -> np.ndarray:
    """Even-odd rule: inside when a ray to the left crosses the outline an odd number of times."""
    x, y = _centres(height, width)
    inside = np.zeros((height, width), bool)
    for (xa, ya), (xb, yb) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        rows = (ya <= y[:, 0]) != (yb <= y[:, 0])
        crossing = xa + (y[rows] - ya) * ((xb - xa) / (yb - ya)) if rows.any() else y[rows]  # [rows, 1]
        inside[rows] ^= crossing <= x
    return inside


def _read_mask(path: str, height: int, width: int) -> np.ndarray:
    """bool [H, W]: what is more than half as bright as the picture's brightest pixel, and not transparent."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.size != (width, height):
            size = "x".join(map(str, picture.size))
            raise ValueError(f"is {size}, the image is {width}x{height}")
        opaque = np.asarray(picture.convert("RGBA"))[..., 3] > 127
        gray = np.asarray(picture if picture.mode[0] in "IF" else picture.convert("L")) * opaque
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reasons = {FileNotFoundError: "no such file", Image.UnidentifiedImageError: "is not an image"}
        raise ValueError(f"mask {path}: {reasons.get(type(error), error)}") from None
    return gray > gray.max() / 2


def _tail(arrow: Arrow, height: int, width: int) -> tuple[int, int]:
    """Row and column of the pixel under `start`."""
    x, y = arrow.start
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"start ({x:g}, {y:g}) is outside the {width}x{height} image")
    return int(y), int(x)


def _object_ids(arrows: Arrows, ids: np.ndarray) -> list[int]:
    """The object of every arrow. Raises ValueError for background, unknown ids and two arrows on one object."""
    found, present = [], set(np.unique(ids).tolist())
    for number, arrow in enumerate(arrows.arrows, 1):
        with _naming(arrows.name, number):
            tail = _tail(arrow, *ids.shape)
            if arrow.shape is not None:
                raise ValueError(f"has a {arrow.shape} that is not in the segmentation yet; see apply_shapes")
            instance = int(ids[tail]) if arrow.instance is None else arrow.instance
            if instance == 0:
                raise ValueError(f"start ({arrow.start[0]:g}, {arrow.start[1]:g}) is on the background")
            if instance not in present:
                known = ", ".join(map(str, sorted(present - {0}))) or "no object"
                raise ValueError(f"instance {instance} is not in the segmentation, which has {known}")
            if instance in found:
                raise ValueError(f"is on the same object as arrow {found.index(instance) + 1} (instance {instance})")
            found.append(instance)
    return found


def apply_shapes(
    arrows: Arrows,
    image: np.ndarray,
    segmentation: np.ndarray | None = None,
    find: Finder | None = None,
    how: str = "the region of similar colour",
) -> tuple[Arrows, np.ndarray, list[str]]:
    """Gives every arrow an object: boxes, polygons and masks become new ids, painted over what is there.

    image uint8 [H, W, 3], segmentation uint8 [H, W] or None. Without segmentation, an arrow that names nothing gets
    what `find` finds at its tail (default: `grow_region`), which is `how` for people. Returns the arrows, all of them
    with `instance` and without shapes, ids uint8 [H, W], and one line per guess for the user. Raises ValueError that
    names file and arrow.
    """
    size = image.shape[:2]
    if segmentation is not None and segmentation.shape != size:
        raise ValueError(f"segmentation has shape {list(segmentation.shape)}, the image has {list(size)}")
    given = np.zeros(size, np.uint8) if segmentation is None else segmentation
    ids = _checked_ids(torch.from_numpy(given), torch.device("cpu")).numpy().astype(np.uint8)
    resolved, told = _paint_shapes(arrows, ids), []
    for index, arrow in enumerate(resolved):
        if segmentation is None and arrow.instance is None:
            with _naming(arrows.name, index + 1):
                tail = _tail(arrow, *size)
                if ids[tail]:
                    continue  # on the object of another arrow, which _object_ids reports
                region = (find or grow_region)(image, arrow.start) & (ids == 0)
                resolved[index] = replace(arrow, instance=_paint(ids, region))
            told.append(
                f"{arrows.name}: arrow {index + 1}: no segmentation given, its object is {how} "
                f"around ({arrow.start[0]:g}, {arrow.start[1]:g}): {region.mean():.1%} of the image"
            )
    found = _object_ids(replace(arrows, arrows=tuple(resolved)), ids)
    resolved = [replace(arrow, instance=instance) for arrow, instance in zip(resolved, found, strict=True)]
    return replace(arrows, arrows=tuple(resolved)), ids, told


def _paint_shapes(arrows: Arrows, ids: np.ndarray) -> list[Arrow]:
    """Paints boxes, polygons and masks as new ids, in place -> the arrows with these in the place of shapes."""
    resolved = list(arrows.arrows)
    for index, arrow in enumerate(arrows.arrows):
        if arrow.shape is not None:
            with _naming(arrows.name, index + 1):
                instance = _paint(ids, arrow.area(*ids.shape))
            resolved[index] = replace(arrow, instance=instance, box=None, polygon=None, mask=None)
    for index, arrow in enumerate(arrows.arrows):
        if arrow.shape is not None and resolved[index].instance not in ids:
            raise ValueError(f"{arrows.name}: arrow {index + 1}: its {arrow.shape} is all under those of later arrows")
    return resolved


def _paint(ids: np.ndarray, area: np.ndarray) -> int:
    """Gives `area` the smallest id that is not in use, in place."""
    free = sorted(set(range(1, IDS)) - set(np.unique(ids).tolist()))
    if not free:
        raise ValueError(f"needs one more object, the segmentation has {IDS - 1} already")
    ids[area] = free[0]
    return free[0]


def arrows_to_flow(arrows: Arrows, segmentation: Tensor, frames: int, delta: float | None = None) -> Tensor:
    """F_user = sum_i M^(i) v^(i) delta (Eq. 4): every arrow painted over its object.

    segmentation: ids of the image [H, W]. Returns [2, H, W], float32, pixels per frame step, zero where no arrow is.
    delta: by default that of the file, or else 1 / (frames - 1): an arrow goes from where the object is to where it
    should be in the last of `frames` frames. Raises ValueError that names file and arrow.
    """
    delta = arrows.delta if delta is None else _positive(delta, "delta")
    if delta is None:
        if frames < 2:
            raise ValueError(f"frames is {frames}, expected 2 or more")
        delta = 1 / (frames - 1)
    if segmentation.ndim != 2:
        raise ValueError(f"segmentation has shape {list(segmentation.shape)}, expected [H, W]")
    ids = _checked_ids(segmentation, segmentation.device)
    F = torch.zeros(2, *ids.shape, device=ids.device)
    for arrow, instance in zip(arrows.arrows, _object_ids(arrows, ids.cpu().numpy()), strict=True):
        v = torch.tensor(arrow.end, device=F.device) - torch.tensor(arrow.start, device=F.device)
        F[:, ids == instance] = (v * delta)[:, None]
    return F


# ----------------------------------------------------------------------------- an object without any segmentation

# Luma and two colour differences; shading counts less than a change of colour.
OPPONENT = np.array([[0.30, 0.50, 0.25], [0.59, -0.50, 0.25], [0.11, 0.0, -0.50]], np.float32)
PLATEAU = 1.1  # growth that still counts as the same region
LEAST_LEVELS = 4  # over which a region must last, of 255
LARGEST_SIDE = 640  # pixels; the flood is plain Python, half a second at this size
LEAST_EDGE = 1.25  # slope of colour at a region's outline over that inside: a gradient has no edge


def grow_region(image: np.ndarray, point: tuple[float, float], largest: float = 0.5) -> np.ndarray:
    """The object under `point` (x, y), by colour alone: bool [H, W]. No weights; for images without segmentation.

    The difference to the colour at the point is flooded like a landscape: at each level the lake holds what is
    connected to the point without a larger difference. The region is the lake that stays the same (within 10%) over
    most levels; then holes are filled. Texture and shading weaker than the outline are thus no obstacle. A picture
    larger than LARGEST_SIDE is made smaller by a whole number first. Raises ValueError when nothing of at least 4
    pixels and at most `largest` of the image lasts, or when what lasts has no edge: on an even or graded background,
    say.
    """
    height, width = image.shape[:2]
    step = -(-max(height, width) // LARGEST_SIDE)
    picture = Image.fromarray(image).reduce(step)
    smooth = picture.filter(ImageFilter.MedianFilter(3))  # removes noise, keeps edges
    color = np.asarray(smooth).astype(np.float32) @ OPPONENT
    region = _lasting_lake(color, int(point[0]) // step, int(point[1]) // step, largest)
    if not _has_edge(color, region):
        raise ValueError(
            f"nothing stands out around ({point[0]:g}, {point[1]:g}), or it is more than {largest:.0%} of the image; "
            "give the arrow a box, polygon or mask, or the image a segmentation"
        )
    return region.repeat(step, axis=0).repeat(step, axis=1)[:height, :width]


def _lasting_lake(color: np.ndarray, x: int, y: int, largest: float) -> np.ndarray:
    """Floods from (x, y) and keeps the lake that lasts longest, holes filled: bool [H, W]."""
    height, width = color.shape[:2]
    order, sizes = _flood(color, x, y, largest * height * width)
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


# ----------------------------------------------------------------------------------------------- pictures of flow


def _wheel() -> np.ndarray:
    """Colours of 55 directions, float [55, 3] of 0 to 255 (Baker et al., A Database and Evaluation Methodology for
    Optical Flow, 2011): red, yellow, green, cyan, blue, magenta, with more steps where the eye sees more."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]]) * 255.0
    counts = (15, 6, 4, 11, 13, 6)
    parts = [a + (b - a) * (np.arange(n) / n)[:, None] for (a, b), n in zip(pairwise(corners), counts, strict=True)]
    return np.concatenate(parts).astype(np.float32)


WHEEL = _wheel()


def flow_to_rgb(flow: Tensor, max_magnitude: float | None = None) -> np.ndarray:
    """The usual colours of flow: hue = direction, saturation = length. [..., 2, H, W] -> uint8 [..., H, W, 3].

    Zero is white; right is red, down yellow, left cyan, up violet. `max_magnitude` has full saturation, longer vectors
    are darker; default: the longest vector of all, so that a video has one scale. Raises ValueError for NaN, infinity.
    """
    u, v = flow.detach().float().cpu().movedim(-3, 0).numpy()
    length = np.hypot(u, v)
    if not np.isfinite(length).all():
        raise ValueError(f"flow holds {np.count_nonzero(~np.isfinite(length))} vectors that are not finite")
    if max_magnitude is None:
        max_magnitude = length.max(initial=0.0) or 1.0
    if not max_magnitude > 0:
        raise ValueError(f"max_magnitude is {max_magnitude}, expected a number above 0")
    saturation = (length / max_magnitude)[..., None]
    place = np.arctan2(v, u) / (2 * np.pi) % 1 * len(WHEEL)
    low, part = np.floor(place).astype(int) % len(WHEEL), (place % 1)[..., None]
    color = WHEEL[low] * (1 - part) + WHEEL[(low + 1) % len(WHEEL)] * part
    color = np.where(saturation <= 1, 255 - saturation * (255 - color), 0.75 * color)
    return color.round().astype(np.uint8)


def color_wheel(size: int) -> np.ndarray:
    """The legend of `flow_to_rgb`: uint8 [size, size, 3], each direction's colour, white outside of the circle."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    flow = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    return flow_to_rgb(torch.where(flow.norm(dim=0) <= 1, flow, 0.0), max_magnitude=1.0)


def draw_arrows(image: np.ndarray, arrows: Arrows, F: Tensor | None = None, scale: int = 1) -> np.ndarray:
    """The image with the arrows on it, and their objects tinted by the colour of F [2, H, W].

    image uint8 [H, W, 3] -> uint8 [scale H, scale W, 3]; every pixel becomes scale x scale of them. An arrow without
    length is a dot: "stays". What is far from arrows and objects keeps its colour.
    """
    image = image.copy()
    if F is not None:
        moving = (F != 0).any(dim=0).cpu().numpy()
        image[moving] = (0.5 * image[moving] + 0.5 * flow_to_rgb(F)[moving]).round()
    picture = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1)).convert("RGBA")
    overlay = Image.new("RGBA", (picture.width * 3, picture.height * 3))  # three times as large: smooth edges
    width = max(2.0, 0.012 * max(picture.size)) * 3
    for color, extra in (("black", 0.35), ("white", 0.0)):
        for arrow in arrows.arrows:
            start, end = (np.array(place) * scale * 3 for place in (arrow.start, arrow.end))
            _draw_arrow(ImageDraw.Draw(overlay), start, end, width, extra * width, color)
    overlay = overlay.convert("RGBa").resize(picture.size, Image.Resampling.BOX).convert("RGBA")
    return np.asarray(Image.alpha_composite(picture, overlay).convert("RGB"))


def _draw_arrow(
    draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, width: float, extra: float, color: str
) -> None:
    """A dot at the tail, a shaft, a triangle; `extra` pixels thicker on all sides (for the dark rim)."""
    v = end - start
    length = float(np.hypot(*v))
    dot = 0.8 * width + extra
    draw.ellipse([*(start - dot), *(start + dot)], fill=color)
    if length == 0:
        return
    along, head = v / length, min(3.5 * width, length)
    across, neck = np.array([-along[1], along[0]]), end - along * head
    shaft = across * (width / 2 + extra)
    draw.polygon([tuple(p) for p in (start + shaft, neck + shaft, neck - shaft, start - shaft)], fill=color)
    wing = across * (head * 0.45 + 1.6 * extra)
    back, tip = neck - along * extra, end + along * 2.4 * extra
    draw.polygon([tuple(p) for p in (tip, back + wing, back - wing)], fill=color)
