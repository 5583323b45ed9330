"""inputs/arrows.py: arrows.json, shapes and Eq. 4, each against a plain statement of it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import Arrow, Arrows, apply_shapes, arrows_to_flow, told_mask, told_to_stay
from instance_flow import instance_flow


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------- arrows.json: reading

FULL = {
    "arrows": [
        {"start": [4, 6.5], "end": [-7, 60]},
        {"start": [9, 5], "end": [9, 5], "instance": 3},
        {"start": [1, 1], "end": [2, 2], "box": [0, 0, 3, 3]},
        {"start": [1, 1], "end": [2, 2], "polygon": [[0, 0], [5, 0], [0, 5]]},
        {"start": [1, 1], "end": [2, 2], "mask": "object.png"},
    ],
    "camera": [0.5, -1],
    "segmentation": "ids.png",
    "depth": "maps/depth.png",
    "delta": 0.0667,
    "rest": "still",
}


def test_arrows_round_trip(tmp_path):
    path = tmp_path / "arrows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FULL).encode())  # with the mark that some editors write
    arrows = Arrows.load(path)
    assert arrows.arrows[0] == Arrow((4.0, 6.5), (-7.0, 60.0))
    assert arrows.segmentation == str(tmp_path / "ids.png") and arrows.arrows[4].mask == str(tmp_path / "object.png")
    assert arrows.depth == str(tmp_path / "maps" / "depth.png")
    assert arrows.camera == (0.5, -1.0) and arrows.delta == 0.0667 and arrows.rest == "still"
    assert Arrows.from_dict(json.loads(json.dumps(arrows.to_dict()))) == arrows
    assert json.loads(json.dumps(Arrows.from_dict(FULL).to_dict())) == FULL
    assert Arrows.from_dict({"arrows": [], "delta": None, "rest": None}).to_dict() == {
        "arrows": [],
        "camera": (0.0, 0.0),
    }


A = {"start": [1, 2], "end": [3, 4]}
HUGE = 10**400
BAD_ARROWS = [
    ({**A, "strat": 1}, "has the unknown key 'strat'"),
    ({"end": [3, 4]}, "has no start"),
    ({"start": [3, 4]}, "has no end"),
    ({**A, "start": None}, "has no start"),
    ([1, 2], "is [1, 2], expected an object"),
    ("right", "is 'right', expected an object"),
    (None, "is None, expected an object"),
    ({**A, "start": [1]}, "start is [1], expected 2 numbers"),
    ({**A, "end": [1, 2, 3]}, "end is [1, 2, 3], expected 2 numbers"),
    ({**A, "end": "1,2"}, "end is '1,2', expected 2 numbers"),
    ({**A, "end": {"x": 1, "y": 2}}, "expected 2 numbers"),
    ({**A, "start": [True, 2]}, "start[0] is True, expected a number"),
    ({**A, "start": [1, "2"]}, "start[1] is '2', expected a number"),
    ({**A, "start": [1, None]}, "start[1] is None, expected a number"),
    ({**A, "start": [math.nan, 2]}, "start[0] is nan"),
    ({**A, "end": [1, -math.inf]}, "end[1] is -inf"),
    ({**A, "end": [1e300, 0]}, "end[0] is 1e+300"),
    ({**A, "end": [HUGE, 0]}, "end[0] is 1000"),
    ({**A, "instance": 1, "box": [0, 0, 1, 1]}, "has instance and box"),
    ({**A, "polygon": [[0, 0], [1, 0], [0, 1]], "mask": "m.png"}, "has polygon and mask"),
    ({**A, "instance": -3}, "instance is -3, expected 1 to 255"),
    ({**A, "instance": 0}, "instance is 0"),
    ({**A, "instance": 256}, "instance is 256"),
    ({**A, "instance": 2.5}, "instance is 2.5, expected a whole number"),
    ({**A, "instance": True}, "instance is True"),
    ({**A, "box": [4, 4, 4, 9]}, "box is [4, 4, 4, 9], which is empty"),
    ({**A, "box": [5, 0, 1, 1]}, "which is empty"),
    ({**A, "box": [0, 0, 1]}, "box is [0, 0, 1], expected 4 numbers"),
    ({**A, "box": [0, 0, 1, math.nan]}, "box[3] is nan"),
    ({**A, "polygon": [[0, 0], [1, 1]]}, "expected 3 points or more"),
    ({**A, "polygon": 7}, "polygon is 7"),
    ({**A, "polygon": [[0, 0], [1, 1], [2]]}, "polygon[2] is [2], expected 2 numbers"),
    ({**A, "polygon": [[0, 0], [1, 1], [2, "x"]]}, "polygon[2][1] is 'x'"),
    ({**A, "mask": 5}, "mask is 5, expected the name of a picture file"),
    ({**A, "mask": ""}, "mask is ''"),
    ({**A, "mask": "a\0b"}, "mask is 'a\\x00b'"),
]


@pytest.mark.parametrize("entry, message", BAD_ARROWS)
def test_malformed_arrows_are_named(entry, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"arrows": [A, entry]}))
    with pytest.raises(ValueError) as caught:
        Arrows.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: arrow 2: ") and message in text
    assert "\n" not in text and len(text) < len(str(path)) + 160


BAD_FILES = [
    (b"", "is not JSON: line 1, column 1"),
    (b'{"arrows": [}', "is not JSON: line 1, column 13"),
    (b'{"arrows": []} x', "is not JSON"),
    (b'{"arrows": "\xff"}', "is not UTF-8 text: byte 12 is 0xff"),
    (b"[" * 100000, "recursion"),
    (b'{"arrows": [' + b"9" * 5000 + b"]}", "digits"),
    (b'{"arrows": [], "arrows": []}', "has the key 'arrows' twice"),
    (b'{"arrows": [{"start": [1, 2], "start": [1, 3]}]}', "has the key 'start' twice"),
    (b"[]", "is [], expected an object with arrows"),
    (b"{}", "arrows is None, expected a list"),
    (b'{"arrows": {}}', "arrows is {}, expected a list"),
    (b'{"arrows": [], "arow": 1}', "has the unknown key 'arow'"),
    (b'{"arrows": [], "camera": [1]}', "camera is [1], expected 2 numbers"),
    (b'{"arrows": [], "camera": [NaN, 0]}', "camera[0] is nan"),
    (b'{"arrows": [], "camera": 3}', "camera is 3"),
    (b'{"arrows": [], "segmentation": 3}', "segmentation is 3"),
    (b'{"arrows": [], "depth": ["d.png"]}', "depth is ['d.png']"),
    (b'{"arrows": [], "delta": 0}', "delta is 0, expected a number above 0"),
    (b'{"arrows": [], "delta": -0.5}', "delta is -0.5"),
    (b'{"arrows": [], "delta": Infinity}', "delta is inf"),
    (b'{"arrows": [], "delta": false}', "delta is False"),
    (b'{"arrows": [], "rest": "Still"}', "rest is 'Still', expected \"still\""),
    (b'{"arrows": [], "rest": ""}', "rest is ''"),
    (b'{"arrows": [], "rest": true}', "rest is True"),
    (b'{"arrows": [], "rest": 0}', "rest is 0"),
    (b'{"arrows": [], "rest": ["still"]}', "rest is ['still']"),
]


@pytest.mark.parametrize("content, message", BAD_FILES)
def test_malformed_files_are_named(content, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Arrows.load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        Arrows.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="directory"):
        Arrows.load(tmp_path)


# ---------------------------------------------------------------------------------------- arrows -> flow: Eq. 4


def make(*entries, **settings):
    return Arrows.from_dict({"arrows": list(entries), **settings}, name="a.json")


SQUARES = np.zeros((8, 12), np.uint8)
SQUARES[1:4, 1:4], SQUARES[2:7, 6:10] = 3, 200


def test_arrows_to_flow_by_hand():
    arrows = make({"start": [2.9, 3.99], "end": [12.9, -1.01]}, {"start": [0, 0], "end": [-3, 6], "instance": 200})
    F = arrows_to_flow(arrows, torch.from_numpy(SQUARES), frames=6)
    expected = np.zeros((2, 8, 12))
    expected[0, 1:4, 1:4], expected[1, 1:4, 1:4] = 2, -1  # a fifth of (10, -5)
    expected[0, 2:7, 6:10], expected[1, 2:7, 6:10] = -0.6, 1.2
    np.testing.assert_allclose(F, expected, rtol=1e-6)
    assert F.dtype == torch.float32
    half = make({"start": [2, 2], "end": [4, 2]}, delta=0.5)
    assert arrows_to_flow(half, torch.from_numpy(SQUARES), frames=6)[0, 2, 2] == 1
    assert arrows_to_flow(half, torch.from_numpy(SQUARES), frames=6, delta=2)[0, 2, 2] == 4
    assert arrows_to_flow(make(), torch.from_numpy(SQUARES).long(), frames=6).eq(0).all()


def test_arrow_of_a_steady_motion_gives_back_its_instance_flow():
    """An object that moves by v per step ends at (T - 1) v: the arrow between says the same as Eq. 1-3."""
    ids = torch.from_numpy(SQUARES).long()
    flow = torch.zeros(5, 2, 8, 12)
    flow[:, :, ids == 3] = torch.tensor([1.5, -0.25])[:, None]
    arrows = make({"start": [2, 2], "end": [2 + 4 * 1.5, 2 - 4 * 0.25]})
    torch.testing.assert_close(arrows_to_flow(arrows, ids, frames=5), instance_flow(flow, ids))


def loop_mask(arrows, ids):
    """Told: every pixel of an object that an arrow names or begins on, or of any object when the rest is still."""
    named = {a.instance or int(ids[int(a.start[1]), int(a.start[0])]) for a in arrows.arrows}
    mask = np.zeros((1, *ids.shape), np.float32)
    for y in range(ids.shape[0]):
        for x in range(ids.shape[1]):
            i = int(ids[y, x])
            mask[0, y, x] = i in named or (arrows.rest == "still" and i > 0)
    return mask


ON_3, STAYS_200 = {"start": [2.5, 3], "end": [9, 0]}, {"start": [0, 0], "end": [0, 0], "instance": 200}


@pytest.mark.parametrize(
    "arrows, pixels",
    [
        (make(), 0),  # nothing is told
        (make(ON_3), 9),
        (make(STAYS_200), 20),  # moves nothing, and yet it is told
        (make(ON_3, STAYS_200), 29),
        (make(rest="still"), 30),
        (make(ON_3, rest="still"), 30),
    ],
)
def test_told_mask(arrows, pixels):
    ids = SQUARES.copy()
    ids[7, 0] = 1  # an object without an arrow
    mask = told_mask(arrows, torch.from_numpy(ids))
    assert mask.shape == (1, 8, 12) and mask.dtype == torch.float32 and mask.sum() == pixels
    np.testing.assert_array_equal(mask, loop_mask(arrows, ids))
    F = arrows_to_flow(arrows, torch.from_numpy(ids), frames=4)
    assert (F[:, mask[0] == 0] == 0).all() and F.any() == (ON_3["end"] in [list(a.end) for a in arrows.arrows])


def test_told_mask_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^a\.json: arrow 1: start \(5, 1\) is on the background"):
        told_mask(make({"start": [5, 1], "end": [0, 0]}, rest="still"), torch.from_numpy(SQUARES))
    with pytest.raises(ValueError, match=r"segmentation has shape \[1, 8, 12\], expected \[H, W\]"):
        told_mask(make(), torch.from_numpy(SQUARES)[None])
    with pytest.raises(ValueError, match="segmentation holds ids from 0 to 300"):
        told_mask(make(), torch.tensor([[0, 300]]))


def test_who_is_told_to_stay():
    assert told_to_stay(make()) is None and told_to_stay(make(ON_3)) is None
    assert told_to_stay(make(ON_3, STAYS_200)) == "arrow 2 has no length"
    assert told_to_stay(make(STAYS_200, ON_3, rest="still")) == "arrow 1 has no length"  # the first one
    assert told_to_stay(make(ON_3, rest="still")) == '"rest" is "still"'
    assert told_to_stay(make({"start": [2, 2], "end": [2, 2.001]})) is None
    for arrows in (make(ON_3, STAYS_200), make(rest="still")):  # also in a picture of another size
        assert told_to_stay(arrows.scaled(0.3, 7)) == told_to_stay(arrows)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"start": [12, 1], "end": [0, 0]}, r"start \(12, 1\) is outside the 12x8 image"),
        ({"start": [1, -0.5], "end": [0, 0]}, r"start \(1, -0\.5\) is outside the 12x8 image"),
        ({"start": [5, 1], "end": [0, 0]}, r"start \(5, 1\) is on the background"),
        ({"start": [2, 2], "end": [0, 0], "instance": 4}, "instance 4 is not in the segmentation, which has 3, 200"),
        ({"start": [7, 3], "end": [0, 0]}, "on the same object as arrow 1"),
        ({"start": [0, 0], "end": [0, 0], "instance": 200}, "on the same object as arrow 1"),
        ({"start": [2, 2], "end": [0, 0], "box": [0, 0, 3, 3]}, "has a box that is not in the segmentation yet"),
    ],
)
def test_arrows_that_do_not_fit_the_image(entry, message):
    arrows = make({"start": [8, 4], "end": [8, 8]}, entry)
    with pytest.raises(ValueError, match=r"^a\.json: arrow 2: .*" + message):
        arrows_to_flow(arrows, torch.from_numpy(SQUARES), frames=4)


def test_arrows_to_flow_names_bad_settings():
    for settings, message in [({"frames": 1}, "frames is 1"), ({"frames": 4, "delta": -1}, "delta is -1")]:
        with pytest.raises(ValueError, match=message):
            arrows_to_flow(make(), torch.from_numpy(SQUARES), **settings)


# ---------------------------------------------------------------------------------------- box, polygon, mask


def loop_inside(polygon, x, y):
    """Winding by summed angles: independent of the even-odd ray; equal for outlines that do not cross themselves."""
    angles = [math.atan2(py - y, px - x) for px, py in polygon]
    turns = [(b - a + math.pi) % (2 * math.pi) - math.pi for a, b in zip(angles, angles[1:] + angles[:1], strict=True)]
    return abs(sum(turns)) > math.pi


def test_box_and_polygon_are_the_loop():
    random = np.random.default_rng(0)
    for _ in range(20):
        center, angles = random.uniform(0, 15, 2), np.sort(random.uniform(0, 2 * math.pi, 7))
        if np.diff(angles, append=angles[0] + 2 * math.pi).max() > 3:
            continue  # the centre would be outside, the outline might cross itself
        radius = random.uniform(2, 12, 7)
        polygon = (center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).tolist()
        area = Arrow((0, 0), (0, 0), polygon=tuple(map(tuple, polygon))).area(13, 17)
        assert area.tolist() == [[loop_inside(polygon, x + 0.5, y + 0.5) for x in range(17)] for y in range(13)]
    box = (-3.0, 1.5, 4.5, 6.0)
    area = Arrow((0, 0), (0, 0), box=box).area(13, 17)
    assert area.tolist() == [[x + 0.5 < 4.5 and 1.5 <= y + 0.5 < 6 for x in range(17)] for y in range(13)]
    corners = ((-3.0, 1.5), (4.5, 1.5), (4.5, 6.0), (-3.0, 6.0))
    assert (Arrow((0, 0), (0, 0), polygon=corners).area(13, 17) == area).all()
    assert (Arrow((0, 0), (0, 0), polygon=corners[::-1]).area(13, 17) == area).all()


def test_apply_shapes_adds_objects(tmp_path):
    image = np.zeros((8, 12, 3), np.uint8)
    blob = np.zeros((8, 12), bool)
    blob[6:, 3:5] = True
    Image.fromarray((blob * 255).astype(np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(blob.astype(np.uint8)).save(tmp_path / "ones.png")
    Image.fromarray(np.where(blob, 60000, 300).astype(np.uint16)).save(tmp_path / "deep.png")
    cut_out = np.full((8, 12, 4), 200, np.uint8)
    cut_out[..., 3] = blob * 255
    Image.fromarray(cut_out).save(tmp_path / "cut.png")
    for mask in ("gray.png", "ones.png", "deep.png", "cut.png"):
        entry = {"start": [4, 7], "end": [4, 0], "mask": mask}
        box = {"start": [0, 0], "end": [1, 1], "box": [0, 0, 3, 2]}
        old = {"start": [7, 3], "end": [9, 9]}
        arrows = Arrows.from_dict({"arrows": [entry, old, box]}, tmp_path)
        resolved, ids, told = apply_shapes(arrows, image, SQUARES)
        expected = SQUARES.copy()
        expected[blob], expected[:2, :3] = 1, 2
        assert (ids == expected).all() and told == [] and ids.dtype == np.uint8
        assert [a.instance for a in resolved.arrows] == [1, 200, 2] and not any(a.shape for a in resolved.arrows)
        assert SQUARES[0, 0] == 0 and arrows.arrows[0].mask  # the arguments are as before
        F = arrows_to_flow(resolved, torch.from_numpy(ids), 2)
        assert F[:, 7, 4].tolist() == [0, -7] and F[:, 0, 0].tolist() == [1, 1] and F[:, 3, 7].tolist() == [2, 6]


def test_apply_shapes_without_segmentation():
    image = np.full((20, 30, 3), 90, np.uint8)
    image[5:12, 8:15] = (200, 40, 40)
    box = {"start": [25, 15], "end": [0, 0], "box": [22, 12, 28, 18]}
    resolved, ids, told = apply_shapes(make({"start": [10, 10], "end": [0, 0]}, box), image)
    assert [a.instance for a in resolved.arrows] == [2, 1]
    assert (ids[13:18, 22:28] == 1).all() and (ids[6:11, 9:14] == 2).all() and (ids[:5] == 0).all()
    assert (
        len(told) == 1 and told[0].startswith("a.json: arrow 1: no segmentation given") and "% of the image" in told[0]
    )
    box = {"start": [25, 15], "end": [0, 0], "box": [12, 4, 28, 18]}  # takes half of what grows
    ids = apply_shapes(make({"start": [9, 10], "end": [0, 0]}, box), image)[1]
    assert (ids[4:18, 12:28] == 1).all() and (ids[6:11, 9:12] == 2).all()
    resolved, ids, told = apply_shapes(make(), image)
    assert not ids.any() and told == [] and resolved.arrows == ()


def bad_shapes(tmp_path):
    small = str(tmp_path / "small.png")
    Image.new("L", (5, 4), 255).save(small)
    black = str(tmp_path / "black.png")
    Image.new("L", (12, 8)).save(black)
    text = tmp_path / "text.png"
    text.write_text("hello")
    here = {"start": [1, 1], "end": [2, 2]}
    return [
        ({**here, "mask": str(tmp_path / "none.png")}, "mask .*none.png: no such file"),
        ({**here, "mask": str(text)}, "mask .*text.png: not an image"),
        ({**here, "mask": small}, "mask .*small.png: is 5x4, the image is 12x8"),
        ({**here, "mask": black}, "mask .*black.png.* covers no pixel"),
        ({**here, "mask": str(tmp_path)}, "mask "),
        ({**here, "box": [20, 0, 30, 9]}, "box .* covers no pixel"),
        ({**here, "polygon": [[1, 1], [5, 1], [9, 1]]}, "polygon .* covers no pixel"),
        ({"start": [40, 1], "end": [2, 2], "box": [0, 0, 3, 3]}, "start .* is outside the 12x8 image"),
        ({"start": [40, 1], "end": [2, 2]}, "start .* is outside the 12x8 image"),
        ({"start": [7, 4], "end": [2, 2]}, "is on the same object as arrow 1"),
        ({"start": [2, 2], "end": [2, 2]}, "nothing stands out around"),
        ({**here, "instance": 9}, "instance 9 is not in the segmentation, which has 1"),
    ]


def test_apply_shapes_names_what_does_not_fit(tmp_path):
    first = {"start": [7, 3], "end": [8, 8], "box": [6, 2, 10, 7]}
    for entry, message in bad_shapes(tmp_path):
        with pytest.raises(ValueError, match=r"^a\.json: arrow 2: .*" + message) as caught:
            apply_shapes(make(first, entry), np.full((8, 12, 3), 50, np.uint8))
        assert "\n" not in str(caught.value)
    cover = {"start": [7, 3], "end": [8, 8], "box": [5, 2, 11, 8]}
    with pytest.raises(ValueError, match=r"^a\.json: arrow 1: its box is all under those of later arrows"):
        apply_shapes(make(first, cover), np.full((8, 12, 3), 50, np.uint8))
    with pytest.raises(ValueError, match=r"segmentation has shape \[3, 3\]"):
        apply_shapes(make(), np.zeros((8, 12, 3), np.uint8), np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="ids from 0 to 300"):
        apply_shapes(make(), np.zeros((1, 2, 3), np.uint8), np.array([[0, 300]]))
    full = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with pytest.raises(ValueError, match="has 255 already"):
        apply_shapes(make(first), np.zeros((16, 16, 3), np.uint8), full)
