"""A motion edited between the stages, before Stage II paints it: an object moved, or the flow turned round.

    edit = read_edit(b'{"moves": [{"object": 2, "frame": 5, "dx": 12, "dy": -4}], "flip": false}')
    arrays = edit.apply(arrays)        # those of motion.safetensors
    print(edit.told())                 # object 2 moved by 12, -4 from frame 6 on

A motion is here the arrays of motion.safetensors by their names, of one video: flow [1, T, 2, H, W], pixels per frame
step, right and down; segmentation [1, T, H, W], ids, 0 = background; depth [1, T, H, W]. Flow or depth may be missing.
Frames are counted from 0, but from 1 where people read of them. No function changes what it is given.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

Arrays = dict[str, np.ndarray]
MOST_MOVES = 32
RIM = 2  # pixels beside an object where a generated depth is between its own and the background's
RANGES = {"object": (1, 255), "frame": (1, 9999), "dx": (-9999, 9999), "dy": (-9999, 9999)}


@dataclass(frozen=True)
class Move:
    """An object (its id), the frame from which on it is elsewhere, and how far: pixels to the right and down."""

    object: int
    frame: int
    dx: int
    dy: int


@dataclass(frozen=True)
class Edit:
    """Moves, one after the other, and whether the flow is turned round."""

    moves: list[Move]
    flip: bool

    def apply(self, motion: Arrays) -> Arrays:
        """The edited motion. Raises ValueError that names the move."""
        for number, move in enumerate(self.moves, 1):
            try:
                motion = move_object(motion, **asdict(move))
            except ValueError as error:
                raise ValueError(f"edit: move {number}: {error}") from None
        return flip_flow(motion) if self.flip else motion

    def told(self) -> str:
        """For people."""
        lines = [f"object {m.object} moved by {m.dx}, {m.dy} from frame {m.frame + 1} on" for m in self.moves]
        return "; ".join(lines + ["flow flipped"] * self.flip)

    def to_json(self) -> str:
        """What `read_edit` reads."""
        return json.dumps(asdict(self))


def read_edit(text: bytes) -> Edit:
    """The edit that a request's JSON says. Raises ValueError of one line for anything but that."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("edit: not JSON") from None
    if not isinstance(told, dict) or told.keys() != {"moves", "flip"}:
        raise ValueError('edit: expected {"moves": [...], "flip": true or false}')
    moves, flip = told["moves"], told["flip"]
    if not isinstance(flip, bool):
        raise ValueError("edit: flip: expected true or false")
    if not isinstance(moves, list) or len(moves) > MOST_MOVES:
        raise ValueError(f"edit: moves: expected a list of {MOST_MOVES} at most")
    if not moves and not flip:
        raise ValueError("edit: nothing is changed: move an object or flip the flow")
    return Edit([read_move(number, move) for number, move in enumerate(moves, 1)], flip)


def read_move(number: int, told: object) -> Move:
    """Raises ValueError of one line that says which move."""
    if not isinstance(told, dict) or told.keys() != RANGES.keys():
        raise ValueError(f"edit: move {number}: expected {', '.join(RANGES)}")
    for name, (least, most) in RANGES.items():
        if type(told[name]) is not int or not least <= told[name] <= most:  # true is an int, too
            raise ValueError(f"edit: move {number}: {name}: expected a whole number from {least} to {most}")
    return Move(**told)


def move_object(motion: Arrays, object: int, frame: int, dx: int, dy: int) -> Arrays:
    """The motion with an object `dx` pixels to the right and `dy` down, from `frame` on to the end.

    Its pixels of ids, depth and flow go together. They hide what they come over; what leaves the picture is gone. Where
    the object was is background, whose depth and flow go on there and in the RIM of background around it (`fill`). The
    jump is in its flow of the frame before, so that flow and ids stay one motion. Raises ValueError for frame 0, which
    is the user's picture, a frame that is not there, a motion without ids, and an object that no frame from there on
    shows.
    """
    if "segmentation" not in motion:
        raise ValueError("the motion has no ids")
    ids = motion["segmentation"][0]
    frames, height, width = ids.shape
    if not 0 < frame < frames:
        raise ValueError(f"frame {frame}: expected 1 to {frames - 1}")
    was, background = ids[frame:] == object, ids[frame:] == 0  # [t, H, W]
    if not was.any():
        raise ValueError(f"object {object} is in no frame from {frame} on")
    rim = widened(was, RIM) & background

    (top, bottom), (left, right) = overlap(height, dy), overlap(width, dx)
    source, target = np.s_[:, top, left], np.s_[:, bottom, right]
    edited = {name: value.copy() for name, value in motion.items()}
    if "flow" in edited:
        edited["flow"][0, frame - 1][:, ids[frame - 1] == object] += np.array([[dx], [dy]])
    for name, value in edited.items():
        # [t, H, W], of flow once to the right and once down: each is written in place
        for layer in value[0, frame:].reshape(frames - frame, -1, height, width).swapaxes(0, 1):
            before = layer.copy()
            if name == "segmentation":
                layer[was] = 0
            else:
                fill(layer, was | rim, background & ~rim)
            layer[target][was[source]] = before[source][was[source]]
    return edited


def overlap(size: int, shift: int) -> tuple[slice, slice]:
    """Which of `size` places stay inside when all are shifted, and where they come to."""
    return (
        slice(max(0, -shift), max(0, size - max(0, shift))),
        slice(max(0, shift), max(0, size + min(0, shift))),
    )


def widened(mask: np.ndarray, steps: int) -> np.ndarray:
    """A mask [t, H, W] and what is `steps` pixels from it, each step to the left, right, up or down."""
    for _ in range(steps):
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[:, :, 1:] |= mask[:, :, :-1]
        grown[:, :, :-1] |= mask[:, :, 1:]
        mask = grown
    return mask


def fill(layer: np.ndarray, holes: np.ndarray, background: np.ndarray) -> None:
    """Writes what the background [t, H, W] of each frame leads one to expect into the holes [t, H, W] of a layer.

    That is linear between the nearest background pixels of the row, left and right, or as the only one: the depth of
    a floor is the same along a row. A row without background is filled as the nearest that has some, the upper of two;
    a frame without background keeps what it has.
    """
    for values, empty, known in zip(layer, holes, background, strict=True):
        rows = np.flatnonzero(known.any(axis=1))
        for y in np.flatnonzero(empty.any(axis=1)) if len(rows) else []:
            row = rows[np.abs(rows - y).argmin()]
            line = np.interp(np.arange(values.shape[1]), np.flatnonzero(known[row]), values[row, known[row]])
            values[y, empty[y]] = line[empty[y]]


def flip_flow(motion: Arrays) -> Arrays:
    """The motion with every vector of its flow turned round: u, v -> -u, -v. Ids and depth stay, so that what changes
    in the video is what Stage II takes from the flow. Raises ValueError where there is none."""
    if "flow" not in motion:
        raise ValueError("edit: flip: the motion has no flow")
    return motion | {"flow": -motion["flow"]}
