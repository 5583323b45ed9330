"""data.py: the clip file, codecs, pictures that a user brings, dataset order, `data.py check`."""

import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import data
from data import Clip, ClipDataset, ResumableSampler

ROOT = Path(__file__).parent.parent


def random_clip(seed: int = 0, frames: int = 5, height: int = 7, width: int = 9) -> Clip:
    random = np.random.default_rng(seed)
    return Clip(
        rgb=random.integers(256, size=(frames, height, width, 3), dtype=np.uint8),
        flow=random.normal(size=(frames, 2, height, width)).astype(np.float32) * 4,
        segmentation=random.integers(4, size=(frames, height, width), dtype=np.uint8),
        depth=random.uniform(1, 9, size=(frames, height, width)).astype(np.float32),
        camera=np.array([0.5, -1], np.float32),
        fps=12.5,
        meta={"scenario": "noise", "motion_bucket": 50},
    )


# ----------------------------------------------------------------------------------------------------------- clip files


def test_save_and_load_keep_everything(tmp_path):
    clip = random_clip()
    clip.save(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file stays
    loaded = Clip.load(tmp_path / "a.safetensors")
    for name in ("rgb", "segmentation", "camera"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(clip, name))
    for name in ("flow", "depth"):  # half precision on disk
        np.testing.assert_array_equal(getattr(loaded, name), getattr(clip, name).astype(np.float16).astype(np.float32))
    assert (loaded.fps, loaded.meta) == (clip.fps, clip.meta)


def test_a_mirrored_clip_has_left_and_right_exchanged_and_nothing_else():
    clip = random_clip()
    image, width = clip.mirrored(), clip.rgb.shape[2]
    for name in ("rgb", "segmentation", "depth"):
        for x in range(width):
            assert (getattr(image, name)[:, :, x] == getattr(clip, name)[:, :, width - 1 - x]).all()
    for x in range(width):
        assert (image.flow[:, 0, :, x] == -clip.flow[:, 0, :, width - 1 - x]).all()
        assert (image.flow[:, 1, :, x] == clip.flow[:, 1, :, width - 1 - x]).all()
    assert image.camera.tolist() == [0.5, 1] and image.fps == 12.5
    assert image.meta == {"scenario": "noise", "motion_bucket": 50, "mirrored": True}
    image.tensors()  # torch takes no negative strides


def test_load_reads_a_window(tmp_path):
    clip = random_clip(frames=6)
    clip.save(tmp_path / "a.safetensors")
    window = Clip.load(tmp_path / "a.safetensors", start=2, frames=3)
    np.testing.assert_array_equal(window.rgb, clip.rgb[2:5])
    np.testing.assert_array_equal(window.segmentation, clip.segmentation[2:5])
    with pytest.raises(ValueError, match="has 6 frames, 7 are needed"):
        Clip.load(tmp_path / "a.safetensors", start=4, frames=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": np.zeros((5, 2, 7, 8), np.float32)}, "flow has shape"),
        ({"rgb": np.zeros((5, 7, 9, 3), np.float32)}, "rgb is float32"),
        ({"flow": np.full((5, 2, 7, 9), np.nan, np.float32)}, "flow holds a value that is not finite"),
        ({"depth": np.zeros((5, 7, 9), np.float32)}, "depth holds 0"),
        ({"fps": 0.0}, "fps is 0"),
        ({"camera": np.array([0, np.inf], np.float32)}, "camera holds"),
    ],
)
def test_a_wrong_clip_is_refused(change, message):
    parts = vars(random_clip()) | change
    with pytest.raises(ValueError, match=message):
        Clip(**parts)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="a.safetensors"):
        Clip.load(path)
    random_clip().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a.safetensors"):
        Clip.load(path)
    random_clip().save(path)
    tensors = load_file(path)
    del tensors["depth"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="a.safetensors: has no depth"):
        Clip.load(path)


def test_tensors_have_the_stated_units():
    clip = random_clip()
    tensors = clip.tensors()
    assert tensors["rgb"].shape == (5, 3, 7, 9) and tensors["rgb"].abs().max() <= 1
    assert tensors["rgb"][1, 2, 3, 4] == pytest.approx(clip.rgb[1, 3, 4, 2] / 127.5 - 1, abs=1e-6)
    assert (tensors["fps"], tensors["motion_bucket"]) == (12.5, 50)


# --------------------------------------------------------------------------------------------------------------- codecs


def test_flow_codec_is_invertible():
    flow = torch.randn(2, 3, 2, 5, 7) * torch.logspace(-3, 1.6, 7)
    picture = data.flow_to_picture(flow)
    torch.testing.assert_close(data.picture_to_flow(picture), flow, rtol=1e-4, atol=1e-5)
    u, v = flow[0, 1, :, 2, 3].tolist()
    scale = math.asinh(data.FLOW_RANGE)
    expected = [math.asinh(u) / scale, math.asinh(v) / scale, 2 * math.asinh(math.hypot(u, v)) / scale - 1]
    torch.testing.assert_close(picture[0, 1, :, 2, 3], torch.tensor(expected))


def test_flow_that_two_channels_tell_apart_has_the_geometric_mean_of_their_lengths():
    flow = torch.tensor([3.0, 4.0]).view(2, 1, 1)  # 5 pixels
    picture = data.flow_to_picture(flow)
    picture[2] = data.flow_to_picture(4 * flow)[2]  # says 20
    torch.testing.assert_close(data.picture_to_flow(picture), 2 * flow)
    picture[2] = -1.1  # says less than nothing
    assert data.picture_to_flow(picture).eq(0).all()


def test_noise_in_a_picture_of_no_motion_is_next_to_no_motion():
    still = data.flow_to_picture(torch.zeros(2, 50, 50))
    picture = still + 0.005 * torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    direction = (picture[:2] * math.asinh(data.FLOW_RANGE)).sinh().norm(dim=0).mean()  # 0.03 pixels
    assert data.picture_to_flow(picture).norm(dim=0).mean() < direction / 2


def test_flow_within_range_stays_within_the_picture():
    angle = torch.linspace(0, 6.3, 50)
    flow = data.FLOW_RANGE * torch.stack([angle.cos(), angle.sin()])[..., None]
    assert data.flow_to_picture(flow).abs().max() <= 1 + 1e-6
    assert data.flow_to_picture(torch.zeros(2, 1, 1)).flatten().tolist() == [0, 0, -1]


def test_palette_colors_differ():
    distance = torch.cdist(data.PALETTE, data.PALETTE) + 9 * torch.eye(256)
    assert data.PALETTE.shape == (256, 3) and data.PALETTE[0].tolist() == [-1, -1, -1]
    assert distance.min() > 0.3  # 255 colours in a cube of side 2
    assert distance[:8, :8].min() >= 1.9  # the first eight are the corners


def test_color_order_against_a_loop():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, 6, (5, 8), generator=generator) * torch.randint(1, 40, (1,), generator=generator)
        present = [i for i in first.unique().tolist() if i > 0]
        center = {i: ((first == i).nonzero().double().mean(0).flip(0)).tolist() for i in present}
        expected = sorted(present, key=lambda i: center[i])
        order = data.color_order(first)
        assert [order[i].item() for i in expected] == list(range(1, len(expected) + 1))
        assert order[0] == 0 and sorted(order.tolist()) == list(range(256))


@pytest.mark.parametrize("ids", [[3, 200, 17], [1], [5, 4]])
def test_segmentation_codec_is_invertible_and_stands_noise(ids):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0, *ids])
    segmentation = values[torch.randint(len(values), (4, 6, 11), generator=generator)]
    first = segmentation[0]
    picture = data.segmentation_to_picture(segmentation, first)
    noisy = picture + 0.5 * torch.rand(picture.shape, generator=generator)
    assert (data.picture_to_segmentation(picture, first) == segmentation).all()
    assert (data.picture_to_segmentation(noisy, first) == segmentation).all()


def test_segmentation_decodes_to_ids_of_the_first_frame_only():
    first = torch.tensor([[0, 7, 9]])
    decoded = data.picture_to_segmentation(torch.rand(3, 3, 4, 5) * 2 - 1, first)
    assert set(decoded.unique().tolist()) <= {0, 7, 9}
    whole = torch.full((2, 2), 4)  # no background in sight: it still may appear later
    assert data.picture_to_segmentation(torch.full((1, 3, 2, 2), -1.0), whole).eq(0).all()


def test_segmentation_without_first_frame_uses_the_ids_as_they_are():
    segmentation = torch.arange(8).view(1, 2, 4)
    picture = data.segmentation_to_picture(segmentation, None)
    assert (data.picture_to_segmentation(picture, None) == segmentation).all()


def test_depth_codec_is_invertible_also_beyond_the_first_frame():
    depth = torch.rand(4, 5, 6) * 4 + 2
    depth[2] *= 0.8  # nearer than anything in frame 0
    first = depth[0]
    picture = data.depth_to_picture(depth, first)
    torch.testing.assert_close(data.picture_to_depth(picture, first), depth, rtol=1e-4, atol=1e-4)
    assert picture[0].abs().max() <= 1
    assert picture[0].flatten(1).max(1).values.allclose(picture[0].max())  # gray: three equal channels
    flat = torch.full((1, 2, 2), 3.0)
    torch.testing.assert_close(data.picture_to_depth(data.depth_to_picture(flat, flat[0]), flat[0]), flat)
    assert torch.isfinite(data.picture_to_depth(torch.full((1, 3, 2, 2), -5.0), first)).all()


def test_depth_picture_does_not_depend_on_the_unit():
    depth = torch.rand(3, 5, 6) + 1
    torch.testing.assert_close(
        data.depth_to_picture(depth, depth[0]), data.depth_to_picture(depth * 1000, depth[0] * 1000)
    )


# --------------------------------------------------------------------------------------------- pictures that users have


def test_read_rgb_formats(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "plain.png")
    np.testing.assert_array_equal(data.read_rgb(tmp_path / "plain.png"), pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(data.read_rgb(tmp_path / "turned.png"), np.rot90(pixels, -1))
    clear = np.dstack([pixels, np.zeros((4, 6), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (data.read_rgb(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((2, 3), 0x8040, np.uint16)).save(tmp_path / "deep.png")
    assert (data.read_rgb(tmp_path / "deep.png") == 0x80).all()


def test_read_segmentation_gray_and_colour(tmp_path):
    ids = np.array([[0, 3, 200], [3, 3, 0]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(data.read_segmentation(tmp_path / "gray.png"), ids)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[np.array([[0, 1, 2], [1, 1, 0]])]
    Image.fromarray(colors).save(tmp_path / "color.png")
    np.testing.assert_array_equal(data.read_segmentation(tmp_path / "color.png"), [[0, 2, 1], [2, 2, 0]])
    Image.fromarray(colors[:1, 1:]).save(tmp_path / "full.png")  # nothing is black: no object becomes the background
    np.testing.assert_array_equal(data.read_segmentation(tmp_path / "full.png"), [[2, 1]])
    noise = np.random.default_rng(0).integers(256, size=(30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo.png: has 901 colours"):
        data.read_segmentation(tmp_path / "photo.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.png: holds the id 300"):
        data.read_segmentation(tmp_path / "large.png")


def test_read_depth(tmp_path):
    depth = np.array([[1000, 2500], [40000, 1]], np.uint16)
    Image.fromarray(depth).save(tmp_path / "d.png")
    np.testing.assert_array_equal(data.read_depth(tmp_path / "d.png"), depth)
    np.save(tmp_path / "d.npy", depth / 1000)
    np.testing.assert_allclose(data.read_depth(tmp_path / "d.npy"), depth / 1000, rtol=1e-6)
    Image.fromarray(depth * 0).save(tmp_path / "zero.png")
    with pytest.raises(ValueError, match="zero.png: holds the depth 0"):
        data.read_depth(tmp_path / "zero.png")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.npy"):
        data.read_depth(tmp_path / "bad.npy")


@pytest.mark.parametrize("read", [data.read_rgb, data.read_segmentation, data.read_depth])
def test_not_a_picture(read, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png: not an image"):
        read(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        read(tmp_path / "none.png")


# ------------------------------------------------------------------------------------------------ dataset and its order


def test_dataset_windows(tmp_path):
    for i, frames in enumerate((5, 8)):
        random_clip(i, frames).save(tmp_path / f"{i}.safetensors")
    clips = ClipDataset(tmp_path, frames=5)
    assert len(clips) == 2 and not clips.whole
    starts = {clips[(1, draw)]["rgb"].sum().item() for draw in range(20)}
    assert len(starts) == 4  # 8 frames have four windows of 5
    assert {clips[(0, draw)]["rgb"].sum().item() for draw in range(5)} == {clips[(0, 0)]["rgb"].sum().item()}


def test_dataset_names_the_clip_that_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="no clips"):
        ClipDataset(tmp_path)
    random_clip(0).save(tmp_path / "a.safetensors")
    random_clip(1, width=8).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors: is 8x7, the first clip of its folder 9x7"):
        ClipDataset(tmp_path)
    random_clip(1, frames=3).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors: has 3 frames, 5 are needed"):
        ClipDataset(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="b.safetensors"):
        ClipDataset(tmp_path)


def take(sampler: ResumableSampler, count: int) -> list:
    return list(islice(sampler, count))


def test_sampler_visits_every_clip_once_an_epoch_and_resumes():
    whole = take(ResumableSampler(7, seed=3), 21)
    for epoch in range(3):
        assert sorted(index for index, _ in whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert whole[:7] != whole[7:14]
    assert take(ResumableSampler(7, seed=3, start=10), 11) == whole[10:]
    assert take(ResumableSampler(7, seed=4), 21) != whole


def test_ranks_share_one_order():
    whole = take(ResumableSampler(7, seed=3), 20)
    for rank in range(2):
        assert take(ResumableSampler(7, seed=3, rank=rank, world_size=2), 10) == whole[rank::2]
        assert take(ResumableSampler(7, seed=3, rank=rank, world_size=2, start=4), 6) == whole[rank::2][4:]


# --------------------------------------------------------------------------------------------------------- command line


def run_check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "data.py", "check", folder], capture_output=True, text=True)


def test_check_names_every_bad_clip(tmp_path):
    random_clip(0).save(tmp_path / "a.safetensors")
    assert run_check(tmp_path).returncode == 0
    random_clip(1, width=8).save(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"")
    result = run_check(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2
    assert "b.safetensors: " in result.stderr and "c.safetensors: " in result.stderr
    empty = run_check(tmp_path / "nothing")
    assert empty.returncode == 2 and "no clips" in empty.stderr and len(empty.stderr.splitlines()) == 1
