"""clips/pictures.py: every codec against a plain statement of it, and back."""

import math

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


def test_color_order_against_a_loop():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, 6, (5, 8), generator=generator) * torch.randint(1, 40, (1,), generator=generator)
        present = [i for i in first.unique().tolist() if i > 0]
        center = {i: ((first == i).nonzero().double().mean(0).flip(0)).tolist() for i in present}
        expected = sorted(present, key=lambda i: center[i])
        order = pictures.color_order(first)
        assert [order[i].item() for i in expected] == list(range(1, len(expected) + 1))
        assert order[0] == 0 and sorted(order.tolist()) == list(range(256))


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


def test_depth_picture_does_not_depend_on_the_unit():
    depth = torch.rand(3, 5, 6) + 1
    torch.testing.assert_close(
        pictures.depth_to_picture(depth, depth[0]), pictures.depth_to_picture(depth * 1000, depth[0] * 1000)
    )
