"""show.py: flow colours and arrows on a picture."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_arrows import make
from test_instance_flow import gen

from show import color_wheel, draw_arrows, flow_to_rgb, write_grid, write_videos


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert not same[12, 12:38].any() and not same[40, 50]
    moved = (picture == image.repeat(scale, 0).repeat(scale, 1)).all(-1)[30 * scale : 34 * scale, 5 * scale : 9 * scale]
    assert not moved[[0, -1]].any() and not moved[:, [0, -1]].any()
    assert moved[2:-2, 2:-2].any() or scale == 1  # only outlined: a tint would change its colour
    assert same[31:33, 6:8].all()
    assert same[12, 48:].all()  # nothing beyond the tip
    assert picture[12 * scale, 20 * scale].min() > 200  # a white shaft
    assert picture[30 * scale, 6 * scale].tolist() == [255, 0, 0]  # to the right: red
    assert (image >= 100).all() and (image < 150).all()


@pytest.mark.parametrize("scale", [1, 3])
def test_draw_arrows_outlines_what_is_marked(scale):
    image = np.full((12, 16, 3), 100, np.uint8)
    ids = torch.zeros(12, 16, dtype=torch.long)
    ids[2:8, 3:8], ids[2:8, 8:12] = 1, 2  # two that touch
    ids[11, 15] = 3
    picture = draw_arrows(image, make(), None, scale, ids)
    inside, rim = torch.zeros(12 * scale, 16 * scale), torch.zeros(12 * scale, 16 * scale)
    for top, bottom, left, right in ((2, 8, 3, 8), (2, 8, 8, 12)):
        rim[top * scale : bottom * scale, left * scale : right * scale] = 1
        inside[top * scale + 1 : bottom * scale - 1, left * scale + 1 : right * scale - 1] = 1
    rim[11 * scale, 15 * scale :] = rim[11 * scale :, 15 * scale] = 1  # in a corner, the picture's edge is none
    white = (picture == 255).all(-1)
    assert np.array_equal(white, (rim - inside).bool()) and (picture[~white] == 100).all()
    assert (image == 100).all()


def test_draw_arrows_leaves_the_image_and_may_end_outside():
    image = np.full((20, 20, 3), 128, np.uint8)
    picture = draw_arrows(image, make({"start": [10, 10], "end": [500, -90]}))
    assert (picture != 128).any() and (picture[12:, :6] == 128).all()
    assert (draw_arrows(image, make()) == image).all()


def frames_of(path):
    """uint8 [T, H, W, 3], and milliseconds."""
    with Image.open(path) as picture:
        frames, pauses = [], []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
            pauses.append(picture.info["duration"])
    return np.stack(frames), pauses


def test_what_stands_still_in_a_grid_does_not_flicker(tmp_path):
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(256, size=(1, 32, 64, 3), dtype=np.uint8), 6, axis=0)
    pale = np.full_like(still, 255)
    pale[:, ::2] = rng.integers(250, 256, size=pale[:, ::2].shape)  # more of it than of white
    moving = still // 2 + 20 * np.arange(6, dtype=np.uint8)[:, None, None, None]
    write_grid(tmp_path / "a.gif", {"arrow": still, "flow": pale, "video": moving}, 10)
    frames, pauses = frames_of(tmp_path / "a.gif")
    assert frames.shape == (6, 4 * 32 + 16, 3 * 256, 3) and pauses == [100] * 5 + [1100]
    assert (frames[:, 16:, :256] == frames[:1, 16:, :256]).all()
    assert (frames[:, 20:24, 256:512] == 255).all() and len(np.unique(frames[0].reshape(-1, 3), axis=0)) <= 256
    assert np.abs(frames[0, 16::4, :256:4].astype(int) - still[0]).mean() < 16
    bar = frames[0, :16]
    assert set(np.unique(bar)) == {0, 255}
    for panel in range(3):  # a word at the left of each
        part = bar[:, 256 * panel : 256 * panel + 256]
        assert (part[:, :60] == 255).any() and not part[:, 60:].any()


def test_a_panel_of_an_earlier_run_goes(tmp_path):
    video = np.zeros((2, 8, 8, 3), np.uint8)
    write_videos(tmp_path, {"flow": video, "video": video}, 7)
    (tmp_path / "mine.mp4").touch()
    write_videos(tmp_path, {"flow": video, "depth": video}, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"flow.mp4", "depth.mp4", "mine.mp4"}
