"""Instance flow and masking, each against a plain statement of it."""

import math

import numpy as np
import pytest
import torch

from instance_flow import (
    instance_flow,
    marked_objects,
    motion_mask,
    paint_arrows,
    random_mask,
    sparse_flow,
    sparse_points,
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


def test_sparse_points_keep_the_vectors_of_a_painted_flow():
    """What `dream` makes of a user's F for a stage with sparse control."""
    flow, ids = random_clip(12)
    F = instance_flow(flow, ids)
    few = sparse_points(F, 3, gen())
    kept = (few != 0).any(dim=1, keepdim=True)
    assert kept.flatten(1).sum(dim=1).tolist() == [3, 3]
    assert torch.equal(few, F * kept) and torch.equal(sparse_points(F[0], 3, gen()), few[0])
    assert torch.equal(sparse_points(F, 10**4, gen()), F)


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
        now = random_mask(F, 0.9, unit, ids, gen(3))[1]
        assert torch.equal(random_mask(other[0], 0.9, unit, other[1], gen(3))[1][1], now[1])
        assert random_mask(F.half(), 0.5, unit, ids)[0].dtype == torch.half


def test_all_movers_may_be_hidden_at_once():
    """F = 0, nothing is told, occurs with probability p^2 where two objects move; with p = 1 always."""
    ids = torch.tensor([[0, 1, 1], [2, 3, 3]]).expand(4000, 2, 3)
    F = torch.zeros(4000, 2, 2, 3)
    F[:, 0][ids == 1], F[:, 1][ids == 2] = 1, -1
    masked, _ = random_mask(F, 0.5, "instance", ids, gen())
    nothing = masked.flatten(1).eq(0).all(1).float().mean().item()
    assert nothing == pytest.approx(0.25, abs=0.03)
    assert random_mask(F, 1.0, "instance", ids, gen())[0].eq(0).all()


def test_first_mask_is_the_loop_over_the_first_frame_s_mask():
    """S_0 of Eq. 1 in every frame: what has left the mask counts as what the mask shows then."""
    flow, ids = random_clip(21, batch=2, frames=3)
    F = instance_flow(flow, ids, reduce="first_mask")
    for b in range(2):
        for i in ids[b, 0].unique().tolist():
            M = ids[b, 0] == i
            expected = flow[b][:, :, M].mean(dim=(0, 2)) if i else torch.zeros(2)
            torch.testing.assert_close(F[b][:, M], expected[:, None].expand(-1, int(M.sum())))
    assert torch.equal(F, instance_flow(flow, ids[:, 0], reduce="first_mask"))
    assert torch.equal(F, instance_flow(flow, ids[:, 0]))  # one frame's ids: there is nothing to follow
    assert not torch.allclose(F, instance_flow(flow, ids), atol=1e-3)


def test_marked_are_the_fastest_and_a_random_number_of_others():
    """Objects 2, 5, 7, 9 of which 7 moves at once; 3 only appears later."""
    ids = torch.tensor([[0, 2, 5], [7, 9, 9]]).repeat(3, 1, 1)
    ids[1:, 0, 0] = 3
    flow = torch.zeros(3, 2, 2, 3)
    flow[0, 1, 1, 0], flow[1:, 0, 0, 1] = -3.0, 9.0  # 2 is faster, but later
    found = [marked_objects(flow, ids, gen(seed)).nonzero().flatten().tolist() for seed in range(800)]
    assert all(7 in marked and set(marked) <= {2, 5, 7, 9} for marked in found)
    for count in (1, 2, 3, 4):  # as often each
        assert np.mean([len(marked) == count for marked in found]) == pytest.approx(0.25, abs=0.06)
    for other in (2, 5, 9):
        assert np.mean([other in marked for marked in found]) == pytest.approx(0.5, abs=0.07)
    assert torch.equal(marked_objects(flow, ids, gen(5)), marked_objects(flow, ids, gen(5)))
    assert not marked_objects(flow, ids * 0, gen()).any()  # no object, none marked
    assert marked_objects(flow * 0, ids, gen()).any()


def test_paint_arrows_is_eq_4():
    ids = torch.tensor([[0, 1, 1, 4], [2, 2, 0, 4]])
    vectors = torch.tensor([[6.0, -3.0], [0.0, 9.0]])
    F = paint_arrows(vectors, torch.tensor([4, 1]), ids, delta=1 / 3)
    expected = torch.zeros(2, 2, 4)
    for v, i in zip(vectors.tolist(), (4, 1), strict=True):
        for y in range(2):
            for x in range(4):
                for c in range(2):
                    expected[c, y, x] += (ids[y, x] == i) * v[c] / 3
    torch.testing.assert_close(F, expected)
    assert (paint_arrows(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), ids, 1.0) == 0).all()  # nothing is told
    for wrong in ([3, 1], [0, 1]):
        with pytest.raises(ValueError, match=f"no object {wrong[0]}"):
            paint_arrows(vectors, torch.tensor(wrong), ids, 1.0)
    with pytest.raises(ValueError, match="each object once"):
        paint_arrows(vectors, torch.tensor([1, 1]), ids, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.5, "pixel"), "p is 1.5"),
        ((math.nan, "pixel"), "p is nan"),
        ((0.5, "object"), "unit is 'object'"),
        ((0.5, "instance"), r"segmentation is of type NoneType, expected a tensor \[1, 3, 4\]"),
        ((0.5, "instance", torch.zeros(3, 4, dtype=torch.long)), r"segmentation has shape \[3, 4\], expected"),
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
