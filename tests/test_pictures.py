"""clips/pictures.py: every codec against a plain statement of it, and back."""

import math
from fractions import Fraction

import pytest
import torch

from clips import pictures


def test_flow_codec_is_invertible():
    flow = torch.randn(2, 3, 2, 5, 7) * torch.logspace(-3, 1.6, 7)
    picture = pictures.flow_to_picture(flow)
    torch.testing.assert_close(pictures.picture_to_flow(picture), flow, rtol=1e-4, atol=1e-5)
    u, v = flow[0, 1, :, 2, 3].tolist()
    scale = math.asinh(pictures.FLOW_RANGE)
    expected = [math.asinh(u) / scale, math.asinh(v) / scale, 2 * math.asinh(math.hypot(u, v)) / scale - 1]
    torch.testing.assert_close(picture[0, 1, :, 2, 3], torch.tensor(expected))


def test_flow_that_two_channels_tell_apart_has_the_geometric_mean_of_their_lengths():
    flow = torch.tensor([3.0, 4.0]).view(2, 1, 1)  # 5 pixels
    picture = pictures.flow_to_picture(flow)
    picture[2] = pictures.flow_to_picture(4 * flow)[2]  # says 20
    torch.testing.assert_close(pictures.picture_to_flow(picture), 2 * flow)
    picture[2] = -1.1  # says less than nothing
    assert pictures.picture_to_flow(picture).eq(0).all()


def test_noise_in_a_picture_of_no_motion_is_next_to_no_motion():
    still = pictures.flow_to_picture(torch.zeros(2, 50, 50))
    picture = still + 0.005 * torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    direction = (picture[:2] * math.asinh(pictures.FLOW_RANGE)).sinh().norm(dim=0).mean()  # 0.03 pixels
    assert pictures.picture_to_flow(picture).norm(dim=0).mean() < direction / 2


def test_flow_within_range_stays_within_the_picture():
    angle = torch.linspace(0, 6.3, 50)
    flow = pictures.FLOW_RANGE * torch.stack([angle.cos(), angle.sin()])[..., None]
    assert pictures.flow_to_picture(flow).abs().max() <= 1 + 1e-6
    assert pictures.flow_to_picture(torch.zeros(2, 1, 1)).flatten().tolist() == [0, 0, -1]


def test_palette_colors_differ():
    distance = torch.cdist(pictures.PALETTE, pictures.PALETTE) + 9 * torch.eye(256)
    assert pictures.PALETTE.shape == (256, 3) and pictures.PALETTE[0].tolist() == [-1, -1, -1]
    assert distance.min() > 0.3  # 255 colours in a cube of side 2
    assert distance[:8, :8].min() >= 1.9  # the first eight are the corners


def ids_of_many_kinds(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Few large ids, every id, or a single one."""
    generator = torch.Generator().manual_seed(seed)
    most = [5, 255, 1][seed % 3]
    ids = torch.randint(0, most + 1, shape, generator=generator)
    return ids * torch.randint(1, 255 // most + 1, (1,), generator=generator)


def order_of(first: torch.Tensor) -> list[int]:
    """Palette index of every id of one frame, in exact fractions: by absence, centroid x, centroid y, id."""
    keys = []
    for i in range(1, 256):
        pixels = (first == i).nonzero().tolist()
        y, x = (Fraction(sum(axis), len(pixels)) for axis in zip(*pixels, strict=True)) if pixels else (0, 0)
        keys.append((not pixels, x, y, i))
    places = {key[-1]: place for place, key in enumerate(sorted(keys), 1)}
    return [0] + [places[i] for i in range(1, 256)]


@pytest.mark.parametrize("seed", range(6))
def test_color_order_against_exact_fractions(seed):
    first = ids_of_many_kinds((2, 3, 5, 7), seed)
    order = pictures.color_order(first)
    assert order.shape == (2, 3, 256)
    for b in range(2):
        for k in range(3):
            assert order[b, k].tolist() == order_of(first[b, k])
            assert (pictures.color_order(first[b, k]) == order[b, k]).all()  # one frame alone
    assert (pictures.color_order(first.byte()) == order).all()


def test_color_order_of_equal_centroids():
    first = torch.tensor([[[9, 4, 9], [0, 7, 0], [9, 4, 9]], [[2, 2, 2], [0, 0, 0], [1, 1, 1]]])
    order = pictures.color_order(first)
    assert order[0, [4, 7, 9]].tolist() == [1, 2, 3]  # the same place: by id
    assert order[1, [2, 1]].tolist() == [1, 2]  # one above the other: from top to bottom
    assert order[1, 3] == 3 and order[1, 255] == 255  # absent: last, by id
    assert pictures.color_order(None).tolist() == list(range(256))


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_pictures_of_a_batch(seed):
    segmentation = ids_of_many_kinds((3, 4, 5, 7), seed)
    picture = pictures.segmentation_to_picture(segmentation, segmentation[:, 0])
    assert picture.shape == (3, 4, 3, 5, 7)
    for b in range(3):
        order = order_of(segmentation[b, 0])
        assert (pictures.segmentation_to_picture(segmentation[b], segmentation[b, 0]) == picture[b]).all()
        for t in range(4):
            for y in range(5):
                for x in range(7):
                    color = pictures.PALETTE[order[segmentation[b, t, y, x]]]
                    assert (picture[b, t, :, y, x] == color).all()
    as_they_are = pictures.segmentation_to_picture(segmentation, None)
    assert (as_they_are == pictures.PALETTE[segmentation].movedim(-1, 2)).all()


def test_decoding_a_batch_asks_each_sample_for_its_own_ids():
    """Samples that show 1, 5 and 3 objects, decoded from noise by the nearest of their own colours."""
    shown = [[200], [3, 8, 41, 90, 255], [1, 2, 7]]
    first = torch.zeros(3, 5, 7, dtype=torch.long)
    for b, ids in enumerate(shown):
        first[b, 0, : len(ids)] = torch.tensor(ids).flip(0)
    picture = torch.rand(3, 2, 3, 5, 7, generator=torch.Generator().manual_seed(4)) * 2.4 - 1.2
    decoded = pictures.picture_to_segmentation(picture, first)
    assert decoded.shape == (3, 2, 5, 7)
    for b, ids in enumerate(shown):
        order, candidates = order_of(first[b]), [0, *ids]
        colors = pictures.PALETTE[[order[i] for i in candidates]].double()
        distance = (picture[b].movedim(1, -1)[..., None, :].double() - colors).square().sum(-1)
        assert (decoded[b] == torch.tensor(candidates)[distance.argmin(-1)]).all()
        assert set(decoded[b].unique().tolist()) == set(candidates)
        assert (pictures.picture_to_segmentation(picture[b], first[b]) == decoded[b]).all()
    without = pictures.picture_to_segmentation(picture, None)
    assert (without[1] == pictures.picture_to_segmentation(picture[1], None)).all() and without.max() == 7


@pytest.mark.parametrize("ids", [[3, 200, 17], [1], [5, 4]])
def test_segmentation_codec_is_invertible_and_stands_noise(ids):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0, *ids])
    segmentation = values[torch.randint(len(values), (4, 6, 11), generator=generator)]
    first = segmentation[0]
    picture = pictures.segmentation_to_picture(segmentation, first)
    noisy = picture + 0.5 * torch.rand(picture.shape, generator=generator)
    assert (pictures.picture_to_segmentation(picture, first) == segmentation).all()
    assert (pictures.picture_to_segmentation(noisy, first) == segmentation).all()


def test_segmentation_decodes_to_ids_of_the_first_frame_only():
    first = torch.tensor([[0, 7, 9]])
    decoded = pictures.picture_to_segmentation(torch.rand(3, 3, 4, 5) * 2 - 1, first)
    assert set(decoded.unique().tolist()) <= {0, 7, 9}
    whole = torch.full((2, 2), 4)  # no background in sight: it still may appear later
    assert pictures.picture_to_segmentation(torch.full((1, 3, 2, 2), -1.0), whole).eq(0).all()


def test_segmentation_without_first_frame_uses_the_ids_as_they_are():
    segmentation = torch.arange(8).view(1, 2, 4)
    picture = pictures.segmentation_to_picture(segmentation, None)
    assert (pictures.picture_to_segmentation(picture, None) == segmentation).all()


def test_depth_codec_is_invertible_also_beyond_the_first_frame():
    depth = torch.rand(4, 5, 6) * 4 + 2
    depth[2] *= 0.8  # nearer than anything in frame 0
    first = depth[0]
    picture = pictures.depth_to_picture(depth, first)
    torch.testing.assert_close(pictures.picture_to_depth(picture, first), depth, rtol=1e-4, atol=1e-4)
    assert picture[0].abs().max() <= 1
    assert picture[0].flatten(1).max(1).values.allclose(picture[0].max())  # gray: three equal channels
    flat = torch.full((1, 2, 2), 3.0)
    torch.testing.assert_close(pictures.picture_to_depth(pictures.depth_to_picture(flat, flat[0]), flat[0]), flat)
    assert torch.isfinite(pictures.picture_to_depth(torch.full((1, 3, 2, 2), -5.0), first)).all()
    wide = torch.tensor([[[0.5, 100.0]], [[1.0, 400.0]], [[1.0, 9.0]]])[:, None]  # a street: 200 times as far as near
    picture = pictures.depth_to_picture(wide, wide[:, 0])
    torch.testing.assert_close(pictures.picture_to_depth(picture, wide[:, 0]), wide, rtol=1e-4, atol=1e-4)
    beyond = pictures.picture_to_depth(torch.full_like(picture, -9.0), wide[:, 0])[:, 0, 0, 0]
    torch.testing.assert_close(beyond, torch.tensor([100, 400, 100 / (1 + 0.25 * 8 / 9)]))


def test_depth_pictures_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(3, 4, 5, 7, generator=generator) * torch.tensor([1, 30, 0.01]).view(3, 1, 1, 1) + 0.5
    picture = pictures.depth_to_picture(depth, depth[:, 0])
    back = pictures.picture_to_depth(picture, depth[:, 0])
    assert picture.shape == (3, 4, 3, 5, 7) and back.shape == depth.shape
    for b in range(3):
        near, far = 1 / depth[b, 0].min().item(), 1 / depth[b, 0].max().item()
        margin = 0.25 * max(near - far, 0.1 * near)
        low, high = max(far - margin, 0), near + margin
        gray = (1 / depth[b].double() - low) / (high - low) * 2 - 1
        torch.testing.assert_close(picture[b].double(), gray[:, None].expand(4, 3, 5, 7), rtol=1e-4, atol=1e-4)
        assert (pictures.depth_to_picture(depth[b], depth[b, 0]) == picture[b]).all()
        beyond = pictures.picture_to_depth(torch.full((1, 3, 5, 7), -1e4), depth[b, 0])
        torch.testing.assert_close(beyond, torch.full((1, 5, 7), 100 / high))
    torch.testing.assert_close(back, depth, rtol=1e-3, atol=1e-4)
    unknown = pictures.depth_to_picture(depth, None)
    torch.testing.assert_close(unknown, (2 / depth - 1)[:, :, None].expand_as(unknown))
    assert (pictures.picture_to_depth(unknown[1], None) == pictures.picture_to_depth(unknown, None)[1]).all()


def test_making_pictures_never_asks_for_a_value():
    """A tensor on the device "meta" has a shape and no values: whatever made a GPU wait for one would fail."""
    ids, real = torch.zeros(2, 3, 5, 7, dtype=torch.long, device="meta"), torch.ones(2, 3, 5, 7, device="meta")
    assert pictures.segmentation_to_picture(ids, ids[:, 0]).shape == (2, 3, 3, 5, 7)
    assert pictures.segmentation_to_picture(ids, None).shape == (2, 3, 3, 5, 7)
    for code in (pictures.depth_to_picture(real, real[:, 0]), pictures.depth_to_picture(real, None)):
        assert pictures.picture_to_depth(code, real[:, 0]).shape == (2, 3, 5, 7)
    assert pictures.flow_to_picture(real[:, :2]).shape == (2, 3, 5, 7)


def test_a_changed_picture_needs_another_codec_version():
    """Where this fails, raise CODEC_VERSION and write down what the new pictures are."""
    ids, depth = torch.tensor([[[0, 9, 5], [200, 9, 0]]]), torch.tensor([[[2.0, 4.0, 8.0]]])
    found = [
        pictures.flow_to_picture(torch.tensor([3.0, -4.0]).view(2, 1, 1)).flatten(),
        pictures.segmentation_to_picture(ids, ids[0]).flatten(),
        pictures.depth_to_picture(depth, depth[0])[0, 0].flatten(),
        pictures.PALETTE[[8, 9, 100, 255]].flatten(),
    ]
    known = {
        1: (
            [0.43722, -0.50364, 0.11198],
            [-1, -1, -1, 1, -1, -1, -1, 1, 1, -1, 1, -1, -1, 1, -1, -1, 1, -1],
            [2 / 3, -2 / 9, -2 / 3],
            [0, 0, 0, -1, -2 / 3, 0, 0, 1 / 3, 2 / 3, -2 / 3, 1, 0],
        )
    }
    for values, expected in zip(found, known[pictures.CODEC_VERSION], strict=True):
        torch.testing.assert_close(values, torch.tensor(expected).float(), rtol=0, atol=1e-4)


def test_depth_picture_does_not_depend_on_the_unit():
    depth = torch.rand(3, 5, 6) + 1
    torch.testing.assert_close(
        pictures.depth_to_picture(depth, depth[0]), pictures.depth_to_picture(depth * 1000, depth[0] * 1000)
    )
