"""arrows.json: what a user says about motion, and which object each arrow means (Eq. 4).

    arrows, ids, told = apply_shapes(Arrows.load("arrows.json"), rgb, ids)     # boxes, polygons, masks -> ids
    F = arrows_to_flow(arrows, torch.from_numpy(ids).long(), frames=14)        # [2, H, W]

Places in an image: x to the right, y down, from the top left corner of the top left pixel. Pixel (i, j) is the square
from (i, j) to (i + 1, j + 1); it is in a shape when its centre is. delta: 1 / (frame steps that an arrow spans):
v delta is the flow of an arrow v, in pixels per frame step.

"Not told" is not "told to stay". An object without an arrow is not told: it may move or not, and with an empty list
nothing is told about motion at all. An arrow of no length tells its object to stay, and "rest": "still" tells all
objects without an arrow. F is 0 for both, so only a model that sees `told_mask` beside F can tell them apart; whoever
has another model asks `told_to_stay` and refuses.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clips import open_picture
from inputs.find import Finder, grow_region
from instance_flow import IDS, checked_ids, paint_arrows

LARGEST_NUMBER = 1e6  # of a coordinate: whatever is beyond is a mistake
SHOWN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes of known colours
LEAST_SHARE = 0.005  # of the image: of 12 smaller regions, grown on photos, 11 were a part of the object


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
            shown = self.mask or reprlib.repr(getattr(self, self.shape))  # of a file the whole name
            raise ValueError(f"{self.shape} {shown} covers no pixel of the image")
        return area


SHAPES = ("box", "polygon", "mask")


@dataclass(frozen=True)
class Arrows:
    """arrows.json: arrows and what goes with them. An empty list, without `rest`: nothing is told about motion."""

    arrows: tuple[Arrow, ...] = ()
    camera: tuple[float, float] = (0.0, 0.0)  # c: forward motion and yaw, units in clips/clip.py
    segmentation: str | None = None  # picture files
    depth: str | None = None
    delta: float | None = None  # default: 1 / (T - 1)
    rest: str | None = None  # "still": all objects without an arrow are told to stay
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
            _check_keys(d, ("arrows",), ("camera", "segmentation", "depth", "delta", "rest"))
            entries = d.get("arrows")
            if not isinstance(entries, list | tuple):
                raise ValueError(f"arrows is {reprlib.repr(entries)}, expected a list")
            d = {key: value for key, value in d.items() if value is not None}
            settings = {key: _path(d[key], key, folder) for key in ("segmentation", "depth") if key in d}
            if "camera" in d:
                settings["camera"] = _numbers(d["camera"], 2, "camera")
            if "delta" in d:
                settings["delta"] = _positive(d["delta"], "delta")
            if d.get("rest", "still") != "still":
                raise ValueError(f'rest is {reprlib.repr(d["rest"])}, expected "still"')
            settings["rest"] = d.get("rest")
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
        picture = open_picture(path, exact=True)
        if picture.size != (width, height):
            size = "x".join(map(str, picture.size))
            raise ValueError(f"{path}: is {size}, the image is {width}x{height}")
        if picture.mode[0] in "IF":
            gray = np.asarray(picture)
        elif picture.mode not in SHOWN:
            raise ValueError(f"{path}: is a {picture.mode} picture: save it as gray or RGB")
        else:
            gray, alpha = np.moveaxis(np.asarray(picture.convert("RGBA").convert("LA")), -1, 0)
            gray = gray * (alpha > 127)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"mask {error}") from None
    if not np.isfinite(gray).all():
        raise ValueError(f"mask {path}: holds numbers that are not finite")
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
    ids = checked_ids(torch.from_numpy(given), torch.device("cpu")).numpy().astype(np.uint8)
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
                f"around ({arrow.start[0]:g}, {arrow.start[1]:g}): {region.mean():.1%} of the image{_doubt(region)}"
            )
    found = _object_ids(replace(arrows, arrows=tuple(resolved)), ids)
    resolved = [replace(arrow, instance=instance) for arrow, instance in zip(resolved, found, strict=True)]
    return replace(arrows, arrows=tuple(resolved)), ids, told


def _doubt(region: np.ndarray) -> str:
    """What speaks against a guess, for people; photos say where it is right to ask."""
    at_edge = any(side.any() for side in (region[0], region[-1], region[:, 0], region[:, -1]))
    if not at_edge and region.mean() > LEAST_SHARE:
        return ""
    what = "reaches the edge: is background in it" if at_edge else "is small: is it a part only"
    return f", and {what}? If input.png shows that, mark the object in page/draw.html"


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
    ids, objects = _told_objects(arrows, segmentation)
    vectors = torch.tensor([(a.end[0] - a.start[0], a.end[1] - a.start[1]) for a in arrows.arrows]).view(-1, 2)
    return paint_arrows(vectors, torch.tensor(objects, dtype=torch.long), ids, delta)


def told_mask(arrows: Arrows, segmentation: Tensor) -> Tensor:
    """Where something is told: 1 over every object with an arrow, one of no length too, and with rest="still" over all
    objects; 0 elsewhere. It is the mask of Eq. 9, as a user draws it.

    segmentation: ids of the image [H, W]. Returns [1, H, W], float32. Raises ValueError that names file and arrow.
    """
    ids, objects = _told_objects(arrows, segmentation)
    told = ids > 0 if arrows.rest else torch.isin(ids, torch.tensor(objects, dtype=ids.dtype, device=ids.device))
    return told[None].float()


def told_to_stay(arrows: Arrows) -> str | None:
    """What tells an object to stay, for an error message: the first arrow of no length, or `rest`; None: nothing."""
    for number, arrow in enumerate(arrows.arrows, 1):
        if arrow.start == arrow.end:
            return f"arrow {number} has no length"
    return f'"rest" is "{arrows.rest}"' if arrows.rest else None


def _told_objects(arrows: Arrows, segmentation: Tensor) -> tuple[Tensor, list[int]]:
    """Ids [H, W] as whole numbers, and the object of every arrow."""
    if segmentation.ndim != 2:
        raise ValueError(f"segmentation has shape {list(segmentation.shape)}, expected [H, W]")
    ids = checked_ids(segmentation, segmentation.device)
    return ids, _object_ids(arrows, ids.cpu().numpy())
