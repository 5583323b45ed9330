"""Instance flow, masking, arrows.json, region growing and drawings, each against a plain statement of it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from instance_flow import (
    Arrow,
    Arrows,
    apply_shapes,
    arrows_to_flow,
    color_wheel,
    draw_arrows,
    flow_to_rgb,
    grow_region,
    instance_flow,
    motion_mask,
    random_mask,
    sparse_flow,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_clip(seed=0, batch=2, frames=3, height=7, width=11, ids=(0, 1, 4, 255)):
    """Flow [B, T, 2, H, W] and ids [B, T, H, W] with gaps between the ids."""
    flow = torch.randn(batch, frames, 2, height, width, generator=gen(seed))
    pick = torch.randint(len(ids), (batch, frames, height, width), generator=gen(seed + 1))
    return flow, torch.tensor(ids)[pick]


# --------------------------------------------------------------------------------------------------- Eq. 1 - 3


def loop_instance_flow(flow, segmentation):
    """One sample, [T, 2, H, W] and [T, H, W] -> [2, H, W], pixel by pixel."""
    frames, _, height, width = flow.shape
    F = np.zeros((2, height, width))
    for i in {int(v) for v in segmentation[0].flatten()} - {0}:
        means = []
        for t in range(frames):
            vectors = [
                flow[t, :, y, x].tolist() for y in range(height) for x in range(width) if segmentation[t, y, x] == i
            ]
            if vectors:
                means.append(np.mean(vectors, axis=0))
        for y in range(height):
            for x in range(width):
                if segmentation[0, y, x] == i:
                    F[:, y, x] = np.mean(means, axis=0)
    return torch.from_numpy(F).float()


@pytest.mark.parametrize("all_frames", [False, True])
def test_instance_flow_is_the_loop(all_frames):
    flow, ids = random_clip()
    ids[0, 1:][ids[0, 1:] == 4] = 0  # visible in the first frame only
    ids[1, 0][ids[1, 0] == 1] = 0  # not in the first frame: painted nowhere
    given = ids if all_frames else ids[:, 0]
    expected = torch.stack(
        [loop_instance_flow(f, s if all_frames else s[:1].expand_as(s)) for f, s in zip(flow, ids, strict=True)]
    )
    F = instance_flow(flow, given)
    torch.testing.assert_close(F, expected)
    torch.testing.assert_close(instance_flow(flow[1], given[1]), F[1])  # without batch
    assert F[ids[:, :1].expand(-1, 2, -1, -1) == 0].eq(0).all()


def test_instance_flow_per_pixel_is_eq_2_literally():
    flow, ids = random_clip(3)
    F = instance_flow(flow, ids, reduce="pixel")
    T = flow.shape[1]
    masks = [(ids[:, :1] == i).float() for i in (1, 4, 255)]
    expected = sum(M * sum(M * flow[:, t] for t in range(T)) / T for M in masks)
    torch.testing.assert_close(F, expected)
    torch.testing.assert_close(instance_flow(flow, ids[:, 0], reduce="pixel"), F)


@pytest.mark.parametrize("all_frames", [False, True])
def test_instance_flow_of_the_start_is_the_loop_over_one_frame(all_frames):
    flow, ids = random_clip(4)
    expected = torch.stack([loop_instance_flow(f[:1], s[:1]) for f, s in zip(flow, ids, strict=True)])
    F = instance_flow(flow, ids if all_frames else ids[:, 0], reduce="start")
    torch.testing.assert_close(F, expected)
    assert not torch.allclose(F, instance_flow(flow, ids))


def test_instance_flow_is_displacement_per_step_whatever_is_visible():
    """An object moves 1, then 3 pixels, and only a quarter of it is seen in the second frame: 2 pixels per step."""
    ids = torch.zeros(2, 4, 4, dtype=torch.long)
    ids[0, :2, :2], ids[1, 0, 1] = 7, 7
    flow = torch.zeros(2, 2, 4, 4)
    flow[0, 0, :2, :2], flow[1, 0, 0, 1] = 1, 3
    assert instance_flow(flow, ids)[0, 0, 0] == 2


def test_instance_flow_ignores_what_the_background_holds():
    flow, ids = random_clip(5)
    expected = instance_flow(flow, ids)
    flow[(ids == 0)[:, :, None].expand_as(flow)] = math.nan
    assert torch.equal(instance_flow(flow, ids), expected)


def test_instance_flow_edge_cases():
    flow, ids = random_clip(6)
    assert instance_flow(flow, torch.zeros_like(ids)).eq(0).all()
    assert instance_flow(flow.bfloat16(), ids.to(torch.uint8)).dtype == torch.bfloat16
    every = torch.arange(256).view(16, 16)
    flow = torch.randn(1, 2, 16, 16, generator=gen())
    expected = flow[0].clone()
    expected[:, 0, 0] = 0
    torch.testing.assert_close(instance_flow(flow, every), expected)  # 255 objects of one pixel


@pytest.mark.parametrize(
    "flow, ids, reduce, message",
    [
        ((3, 2, 4, 5), (4, 4), "instance", r"segmentation has shape \[4, 4\]"),
        ((3, 2, 4, 5), (2, 4, 5), "instance", r"expected \[4, 5\] or \[3, 4, 5\]"),
        ((3, 3, 4, 5), (4, 5), "instance", r"flow has shape \[3, 3, 4, 5\]"),
        ((0, 2, 4, 5), (4, 5), "instance", "flow has shape"),
        ((2, 4, 5), (4, 5), "instance", "flow has shape"),
        ((3, 2, 4, 5), (4, 5), "median", "reduce is 'median'"),
    ],
)
def test_instance_flow_names_bad_shapes(flow, ids, reduce, message):
    with pytest.raises(ValueError, match=message):
        instance_flow(torch.zeros(flow), torch.zeros(ids, dtype=torch.long), reduce)


@pytest.mark.parametrize("bad", [256, -1])
def test_ids_must_fit(bad):
    with pytest.raises(ValueError, match=f"ids from .*{bad}.*expected 0 to 255"):
        instance_flow(torch.zeros(1, 2, 2, 2), torch.tensor([[0, 1], [2, bad]]))
    with pytest.raises(ValueError, match="float32"):
        instance_flow(torch.zeros(1, 2, 2, 2), torch.zeros(2, 2))


# ---------------------------------------------------------------------------------------------------- sparse flow


def test_sparse_flow_counts_and_values():
    flow, ids = random_clip(8)
    pixel = instance_flow(flow, ids, reduce="pixel")
    F = sparse_flow(flow, ids, 5, gen())
    chosen = (F != 0).any(1)
    assert chosen.sum((1, 2)).tolist() == [5, 5]
    assert torch.equal(F, pixel * chosen[:, None])
    assert (ids[:, 0][chosen] > 0).all()
    assert torch.equal(F, sparse_flow(flow, ids, 5, gen())) and not torch.equal(F, sparse_flow(flow, ids, 5, gen(1)))
    assert sparse_flow(flow[0], ids[0, 0], 0).eq(0).all()
    for points in (40, 1000):  # more than there are moving pixels, more than there are pixels
        ids[0, 0, 2:] = 0
        pixel = instance_flow(flow, ids, reduce="pixel")
        assert torch.equal(sparse_flow(flow, ids, points)[0], pixel[0])
    with pytest.raises(ValueError, match="points is -1"):
        sparse_flow(flow, ids, -1)


def test_sparse_flow_picks_moving_pixels_with_equal_chance():
    ids = torch.ones(2, 3, dtype=torch.long)
    flow = torch.ones(400, 1, 2, 2, 3)
    flow[..., 0, 0] = 0  # an object's pixel that stands still
    rate = (sparse_flow(flow, ids.expand(400, 2, 3), 2, gen()) != 0).any(1).float().mean(0)
    assert rate[0, 0] == 0
    assert (rate.flatten()[1:] - 0.4).abs().max() < 0.1  # 4 standard deviations


# ---------------------------------------------------------------------------------------- Eq. 9: random masking


@pytest.mark.parametrize("p", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("unit, channels, size", [("element", 2, 4000), ("pixel", 1, 2000), ("instance", 1, 1600)])
def test_masked_share_is_p(unit, channels, size, p):
    F = torch.randn(8, 2, 25, 10, generator=gen())
    ids = torch.arange(1, 251).view(1, 25, 10).expand(8, -1, -1)
    masked, mask = random_mask(F, p, unit, ids, gen(1))
    assert mask.shape == (8, channels, 25, 10)
    assert torch.equal(masked, F * mask)
    hidden = (mask == 0).float().mean().item()
    assert abs(hidden - p) <= 4 * math.sqrt(p * (1 - p) / size)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    single, one = random_mask(F[0], p, unit, ids[0], gen(1))
    assert single.shape == F[0].shape and one.shape == (channels, 25, 10)
    assert torch.equal(one, mask[0])  # sample 0 does not depend on the rest of the batch


def test_elements_and_pixels_are_independent():
    F = torch.ones(1, 2, 50, 80)
    _, mask = random_mask(F, 0.5, "element", None, gen())
    assert abs((mask[:, 0] == mask[:, 1]).float().mean() - 0.5) < 0.04
    _, mask = random_mask(F, 0.5, "pixel", None, gen())
    assert abs((mask[..., 1:] == mask[..., :-1]).float().mean() - 0.5) < 0.04


def test_instances_are_hidden_as_a_whole_and_by_themselves():
    _, ids = random_clip(9, batch=400, frames=1, height=4, width=5)
    ids = ids[:, 0]
    F = torch.ones(400, 2, 4, 5)
    _, mask = random_mask(F, 0.5, "instance", ids, gen())
    kept = torch.full((400, 256), math.nan)
    for b in range(400):
        for i in ids[b].unique().tolist():
            values = mask[b, 0][ids[b] == i].unique()
            assert len(values) == 1
            kept[b, i] = values[0]
    both = ~kept[:, 1].isnan() & ~kept[:, 4].isnan()
    assert abs((kept[both, 1] == kept[both, 4]).float().mean() - 0.5) < 0.1


def test_masks_follow_the_generator_not_the_content():
    flow, ids = random_clip(10)
    F, ids = flow[:, 0], ids[:, 0]
    for unit in ("element", "pixel", "instance"):
        first = random_mask(F, 0.5, unit, ids, gen(3))[1]
        assert torch.equal(first, random_mask(F, 0.5, unit, ids, gen(3))[1])
        assert any(not torch.equal(first, random_mask(F, 0.5, unit, ids, gen(s))[1]) for s in (4, 5, 6))
        other = torch.stack([F[0] * 0, F[1]]), torch.stack([ids[0] * 0, ids[1]])
        for keep_one in (False, True):
            now = random_mask(F, 0.9, unit, ids, gen(3), keep_one)[1]
            assert torch.equal(random_mask(other[0], 0.9, unit, other[1], gen(3), keep_one)[1][1], now[1])
        assert random_mask(F.half(), 0.5, unit, ids)[0].dtype == torch.half


def test_keep_one_keeps_a_random_mover():
    """Objects 1 and 2 move, 3 stands still; all are to be hidden."""
    ids = torch.tensor([[0, 1, 1], [2, 3, 3]]).expand(600, 2, 3)
    F = torch.zeros(600, 2, 2, 3)
    F[:, 0][ids == 1], F[:, 1][ids == 2] = 1, -1
    masked, mask = random_mask(F, 1.0, "instance", ids, gen(), keep_one=True)
    first, second = mask[:, 0, 0, 1], mask[:, 0, 1, 0]
    assert (first + second == 1).all()
    assert abs(first.mean() - 0.5) < 0.09
    assert (mask[:, 0, 1, 1] == 0).all() and (mask[:, 0, 0, 0] == 0).all()
    assert (masked != 0).flatten(1).any(1).all()
    assert random_mask(F, 1.0, "instance", ids, gen())[0].eq(0).all()
    F[..., 0, 0] = 5  # a background that moves is no object
    assert torch.equal(random_mask(F, 1.0, "instance", ids, gen(), keep_one=True)[1], mask)
    assert random_mask(F * 0, 1.0, "instance", ids, gen(), keep_one=True)[1].eq(0).all()  # nobody moves


def test_keep_one_changes_nothing_else():
    flow, ids = random_clip(11, batch=200, frames=1)
    F = instance_flow(flow, ids)
    plain, mask = random_mask(F, 0.6, "instance", ids[:, 0], gen(), keep_one=False)
    kept, mask_one = random_mask(F, 0.6, "instance", ids[:, 0], gen(), keep_one=True)
    some = plain.flatten(1).any(1)
    assert 0 < (~some).sum() < 200
    assert torch.equal(mask[some], mask_one[some])
    for b in (~some).nonzero()[:, 0]:
        assert len({*ids[b, 0][kept[b].any(0)].tolist()}) == 1
    single = random_mask(F[3], 1.0, "instance", ids[3, 0], gen(), keep_one=True)[0]
    assert len({*ids[3, 0][single.any(0)].tolist()}) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.5, "pixel"), "p is 1.5"),
        ((math.nan, "pixel"), "p is nan"),
        ((0.5, "object"), "unit is 'object'"),
        ((0.5, "instance"), r"needs segmentation \[1, 3, 4\], got None"),
        ((0.5, "instance", torch.zeros(3, 4, dtype=torch.long)), r"got \[3, 4\]"),
    ],
)
def test_random_mask_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_mask(torch.zeros(1, 2, 3, 4), *arguments)


def test_motion_mask_is_strict():
    F = torch.zeros(2, 2, 2, 2)
    F[0, :, 0, 0] = torch.tensor([3.0, -4.0])  # length 5
    F[1, :, 1, 0] = torch.tensor([0.0, -5.001])
    M = motion_mask(F, 5.0)
    assert M.shape == (2, 1, 2, 2)
    assert M[0].sum() == 0 and M[1].sum() == 1 and M[1, 0, 1, 0] == 1
    assert motion_mask(F, 4.999).sum() == 2
    assert motion_mask(F, 0.0).sum() == 2  # what does not move is never in it


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
}


def test_arrows_round_trip(tmp_path):
    path = tmp_path / "arrows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FULL).encode())  # with the mark that some editors write
    arrows = Arrows.load(path)
    assert arrows.arrows[0] == Arrow((4.0, 6.5), (-7.0, 60.0))
    assert arrows.segmentation == str(tmp_path / "ids.png") and arrows.arrows[4].mask == str(tmp_path / "object.png")
    assert arrows.depth == str(tmp_path / "maps" / "depth.png")
    assert arrows.camera == (0.5, -1.0) and arrows.delta == 0.0667
    assert Arrows.from_dict(json.loads(json.dumps(arrows.to_dict()))) == arrows
    assert json.loads(json.dumps(Arrows.from_dict(FULL).to_dict())) == FULL
    assert Arrows.from_dict({"arrows": [], "delta": None}).to_dict() == {"arrows": [], "camera": (0.0, 0.0)}


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
        ({**here, "mask": str(text)}, "mask .*text.png: is not an image"),
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


# ---------------------------------------------------------------------------------------------- region growing


def overlap(region, truth):
    return (region & truth).sum() / (region | truth).sum()


def scene(texture=0.0, noise=4.0, seed=0):
    """A disc with stripes of `texture` gray levels and a bar 3 pixels wide on a gray ramp, 64x96."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :96]
    image = np.repeat((90 + 0.4 * x)[..., None], 3, 2)
    disc, bar = (x - 30) ** 2 + (y - 32) ** 2 < 180, (abs(x - 70) < 2) & (abs(y - 30) < 25)
    image[disc] = (190, 80, 60)
    image[disc & (x // 3 % 2 == 0)] += texture
    image[bar] = (40, 60, 160)
    return (image + random.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8), disc, bar


@pytest.mark.parametrize("texture, noise", [(0, 0), (0, 6), (20, 4), (0, 20), (40, 8)])
def test_grow_region_finds_objects(texture, noise):
    for seed in range(4):
        image, disc, bar = scene(texture, noise, seed)
        for x, y in ((30, 32), (24, 36)):
            assert overlap(grow_region(image, (x, y)), disc) > 0.88
        if noise < 10:  # three pixels wide
            assert overlap(grow_region(image, (70.5, 30)), bar) > 0.8


def test_grow_region_fills_holes_and_reaches_the_border():
    image, disc, _ = scene(noise=2)
    image[30:34, 33:37] = 255  # a highlight
    assert overlap(grow_region(image, (25, 30)), disc) > 0.9
    image[(abs(np.mgrid[:64, :96] - np.array([32, 30])[:, None, None]) <= 4).all(0)] = (20, 90, 200)  # another colour
    region = grow_region(image, (22, 32))
    assert region[28:37, 26:35].all() and overlap(region, disc) > 0.9
    image = np.full((30, 40, 3), 60, np.uint8)
    image[:12, :9] = (30, 160, 60)
    region = grow_region(image, (0, 0))
    assert overlap(region, (image[..., 1] == 160)) > 0.95 and region.shape == (30, 40)


def test_grow_region_is_not_stopped_by_specks():
    image, disc, _ = scene(noise=0)
    image[np.random.default_rng(0).random((64, 96)) < 0.08] = 255
    image[31:34, 29:32] = (190, 80, 60)
    assert overlap(grow_region(image, (30, 32)), disc) > 0.95
    image = np.full((40, 50, 3), 77, np.uint8)
    image[0, :2] = 200
    with pytest.raises(ValueError, match="nothing stands out"):
        grow_region(image, (0, 0))


def test_grow_region_finds_blurred_objects():
    image, disc, _ = scene()
    image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    image = (image + np.random.default_rng(0).normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
    for point in ((30, 32), (24, 32), (33, 25)):
        assert overlap(grow_region(image, point), disc) > 0.8


def test_grow_region_follows_shading():
    """A ball that goes from light to dark by many times the step at its outline's weakest place."""
    y, x = np.mgrid[:64, :64]
    ball = (x - 32) ** 2 + (y - 32) ** 2 < 400
    image = np.full((64, 64, 3), 40.0)
    image[ball] = np.stack([120 + 2.2 * (x - 32), 90 + 1.6 * (x - 32), 60 + x - 32], -1)[ball]
    assert overlap(grow_region(image.astype(np.uint8), (32, 32)), ball) > 0.9


@pytest.mark.parametrize("kind", ["even", "background", "gradient", "noisy gradient", "glow", "noise"])
def test_grow_region_refuses_to_swallow_the_image(kind):
    if kind == "even":
        image = np.full((40, 50, 3), 77, np.uint8)
    elif kind == "background":
        image = scene()[0]
    elif kind == "noise":
        image = np.random.default_rng(0).normal(120, 20, (64, 96, 3)).astype(np.uint8)
    else:
        y, x = np.mgrid[:40, :90]
        gray = (3 * np.hypot(x - 48, y - 8) if kind == "glow" else 2.5 * x)[..., None].repeat(3, 2)
        gray += np.random.default_rng(0).normal(0, 4, gray.shape) * (kind == "noisy gradient")
        image = gray.clip(0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match=r"nothing stands out around \(45, 5\), or it is more than 50%"):
        grow_region(image, (45, 5))


# -------------------------------------------------------------------------------------------------- pictures


def test_flow_colours():
    flow = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, 0]]).T.reshape(2, 1, 5)
    right, down, left, up, still = flow_to_rgb(flow)[0].astype(int)
    assert still.tolist() == [255, 255, 255]
    assert right.tolist() == [255, 0, 0]
    assert down[0] > 200 and down[1] > 200 and down[2] == 0  # yellow
    assert left[0] == 0 and left[1] > 180 and left[2] == 255  # cyan
    assert up[2] == 255 and up[1] == 0 and 0 < up[0] < 255  # violet
    nearly = flow_to_rgb(torch.tensor([1.0, -1e-6]).view(2, 1, 1)).astype(int)  # the wheel closes
    assert abs(nearly - right).max() <= 1


def test_flow_colours_depend_on_length_in_one_scale():
    flow = torch.randn(2, 3, 2, 5, 7, generator=gen()).double()
    rgb = flow_to_rgb(flow)
    assert rgb.shape == (2, 3, 5, 7, 3) and rgb.dtype == np.uint8
    assert (flow_to_rgb(flow * 8) == rgb).all()  # the longest vector sets the scale
    most = flow.norm(dim=2).max().item()
    assert abs(flow_to_rgb(flow[0, 0], most).astype(int) - rgb[0, 0]).max() <= 1
    white = 255 - flow_to_rgb(flow, 4 * most).astype(int)  # distance to white grows with length
    assert abs(white - (255 - rgb.astype(int)) / 4).max() <= 1
    full = flow / flow.norm(dim=2, keepdim=True)
    assert abs(flow_to_rgb(full * 3, 1.0) - 0.75 * flow_to_rgb(full, 1.0 + 1e-6)).max() <= 1  # beyond the scale: darker
    assert (flow_to_rgb(torch.zeros(2, 4, 4)) == 255).all()
    for bad in (math.nan, math.inf):
        flow[0, 0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="flow holds 1 vectors that are not finite"):
            flow_to_rgb(flow)
    with pytest.raises(ValueError, match="max_magnitude is 0"):
        flow_to_rgb(torch.ones(2, 1, 1), 0.0)


def test_colour_wheel():
    wheel = color_wheel(65)
    assert wheel.shape == (65, 65, 3) and (wheel[0, 0] == 255).all() and (wheel[32, 32] > 250).all()
    assert wheel[32, 63].tolist()[0] == 255 and wheel[32, 63].max() - wheel[32, 63].min() > 240
    assert np.ptp(wheel[32, 2:63].astype(int), axis=0).min() > 0


@pytest.mark.parametrize("scale", [1, 4])
def test_draw_arrows_near_not_far(scale):
    image = np.random.default_rng(0).integers(100, 150, (48, 64, 3), dtype=np.uint8)
    arrows = make({"start": [10, 12], "end": [40, 12], "instance": 1}, {"start": [50, 40], "end": [50, 40]})
    F = torch.zeros(2, 48, 64)
    F[0, 30:34, 5:9] = 2
    picture = draw_arrows(image, arrows, F, scale)
    assert picture.shape == (48 * scale, 64 * scale, 3) and picture.dtype == np.uint8
    same = (picture == image.repeat(scale, 0).repeat(scale, 1)).all(-1)[::scale, ::scale]
    y, x = np.mgrid[:48, :64]
    far = (abs(y - 12) > 8) & ~((x > 3) & (x < 10) & (y > 28) & (y < 35)) & (np.hypot(x - 50, y - 40) > 8)
    assert same[far].all() and far.mean() > 0.4
    assert not same[12, 12:38].any() and not same[30:34, 5:9].any() and not same[40, 50]
    assert same[12, 48:].all()  # nothing beyond the tip
    assert picture[12 * scale, 20 * scale].min() > 200  # a white shaft
    tint = picture[31 * scale, 6 * scale].astype(int)
    assert tint[0] > 160 and tint[1] < 80  # to the right: red
    assert (image >= 100).all() and (image < 150).all()


def test_draw_arrows_leaves_the_image_and_may_end_outside():
    image = np.full((20, 20, 3), 128, np.uint8)
    picture = draw_arrows(image, make({"start": [10, 10], "end": [500, -90]}))
    assert (picture != 128).any() and (picture[12:, :6] == 128).all()
    assert (draw_arrows(image, make()) == image).all()
