"""clips/clip.py: the clip file, dataset order."""

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

import evaluate
from clips import Clip, ClipDataset, ResumableSampler, annotate, physion, simulate
from clips.clip import clip_header


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
    assert image.camera.tolist() == [[0.5, 1]] * 5 and image.fps == 12.5
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
        ({"camera": np.array([0, 1e300])}, "camera holds"),
        ({"camera": np.zeros((4, 2), np.float32)}, r"camera has shape \(4, 2\), expected \(5, 2\)"),
        ({"camera": np.zeros(3, np.float32)}, r"camera has shape \(3,\)"),
        ({"camera": np.zeros((1, 2), np.float32)}, r"camera has shape \(1, 2\)"),
        ({"camera": np.zeros((5, 2), complex)}, "camera is complex128, expected floats"),
        ({"flow": np.zeros((5, 2, 7, 9), complex)}, "flow is complex128, expected floats"),
        ({"depth": np.full((5, 7, 9), "1")}, "depth is <U1, expected floats"),
        ({"rgb": np.zeros((0, 7, 9, 3), np.uint8)}, r"rgb has shape \(0, 7, 9, 3\), expected \[T, H, W, 3\]"),
        ({"rgb": np.zeros((5, 7, 0, 3), np.uint8)}, r"rgb has shape \(5, 7, 0, 3\), expected"),
        ({"rgb": np.zeros((5, 7), np.uint8)}, r"rgb has shape \(5, 7\), expected"),
        ({"fps": "7"}, "fps is '7'"),
        ({"fps": None}, "fps is None"),
        ({"fps": 10**400}, "fps is 1000"),
        ({"meta": [1]}, r"meta is \[1\], expected a dict"),
        ({"meta": {"motion_bucket": None}}, "meta is {'motion_bucket': None}, expected a dict, with a number"),
    ],
)
def test_a_wrong_clip_is_refused(change, message):
    parts = vars(random_clip()) | change
    with pytest.raises(ValueError, match=message):
        Clip(**parts)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flow", -70000.0, "flow holds -70000, which half precision cannot hold"),
        ("flow", 65520.0, "flow holds 65520"),  # the first that rounds to infinity
        ("depth", 65535.0, "depth holds 65535"),  # the farthest of a 16 bit picture
        ("depth", 2e-8, "depth holds 2e-08, which half precision makes 0"),
    ],
)
def test_what_reading_would_refuse_is_not_written(tmp_path, name, value, message):
    clip, path = random_clip(), tmp_path / "a.safetensors"
    getattr(clip, name)[3, ..., 2, 4] = value
    with pytest.raises(ValueError, match=f"a.safetensors: {message}"):
        clip.save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flow", np.full((5, 2, 7, 9), np.nan, np.float32), "flow holds a value that is not finite"),
        ("depth", np.full((5, 7, 9), -1, np.float32), "depth holds -1"),
        ("depth", np.ones((5, 7, 8), np.float32), "depth has shape"),
        ("segmentation", np.zeros((5, 7, 9), np.int64), "segmentation is int64"),
        ("camera", np.full((5, 2), 1e300), "camera holds a value that is not finite"),
        ("fps", float("nan"), "fps is nan"),
        ("meta", None, "meta is None"),
        ("meta", {"a": np.float32(1)}, "meta is no JSON: Object of type float32"),
        ("meta", {1: 2, "a": 3}, "meta is no JSON: "),
    ],
)
def test_a_part_that_was_changed_is_checked_before_it_is_written(tmp_path, name, value, message):
    clip, path = random_clip(), tmp_path / "a.safetensors"
    setattr(clip, name, value)
    with pytest.raises(ValueError, match=f"a.safetensors: {message}"):
        clip.save(path)
    assert not list(tmp_path.iterdir())


def test_what_half_precision_holds_is_written(tmp_path):
    clip, path = random_clip(), tmp_path / "a.safetensors"
    clip.flow[1, 0, 2], clip.flow[1, 1, 2], clip.depth[2, 3], clip.depth[2, 4] = 65519, -65504, 65504, 6e-8
    clip.save(path)
    loaded = Clip.load(path)
    assert loaded.flow[1, :, 2, 0].tolist() == [65504, -65504]
    assert loaded.depth[2, 3, 0] == 65504 and loaded.depth[2, 4, 0] == pytest.approx(6e-8, rel=0.01)


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
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):  # numpy knows neither
        some = {name: torch.from_numpy(part) for name, part in tensors.items()}
        save_torch_file(some | {"depth": torch.ones(5, 7, 9).to(dtype)}, path)
        with pytest.raises(ValueError, match="a.safetensors: .*(bfloat16|float8)"):
            Clip.load(path)
    tensors["depth"] = np.ones((9, 7, 9), np.float16)  # of another video: the first frames of it are not ours
    save_file(tensors, path)
    for window in ((0, None), (1, 2)):
        with pytest.raises(ValueError, match="a.safetensors: depth has 9 frames, rgb 5"):
            Clip.load(path, *window)


def test_tensors_have_the_stated_units():
    clip = random_clip()
    tensors = clip.tensors()
    assert tensors["rgb"].shape == (5, 3, 7, 9) and tensors["rgb"].abs().max() <= 1
    assert tensors["rgb"][1, 2, 3, 4] == pytest.approx(clip.rgb[1, 3, 4, 2] / 127.5 - 1, abs=1e-6)
    assert (tensors["fps"], tensors["motion_bucket"]) == (12.5, 50)


# --------------------------------------------------------------------------------------------------------------- camera


def test_a_window_has_the_camera_of_its_frames(tmp_path):
    """A camera that changes half way: what a network is told is the mean over the frames that it sees."""
    camera = np.array([[0.2, 0], [0.4, 0], [0.6, 0], [0, -0.3], [0, -0.5], [0, -0.7], [0, -0.9]], np.float32)
    for name in "ab":
        replace(random_clip(frames=7), camera=camera).save(tmp_path / f"{name}.safetensors")
    np.testing.assert_array_equal(Clip.load(tmp_path / "a.safetensors").camera, camera)
    np.testing.assert_array_equal(Clip.load(tmp_path / "a.safetensors", 2, 3).camera, camera[2:5])
    clips = ClipDataset(tmp_path, frames=3)
    windows = [[(0, 0), (1, 4)], [(1, 2), (0, 3)]]  # a batch each: of the two clips, other frames
    told = torch.stack([torch.stack([clips[key]["camera"] for key in batch]) for batch in windows])
    expected = [[[0.4, 0], [0, -0.7]], [[0.2, -0.8 / 3], [0, -0.5]]]
    torch.testing.assert_close(told, torch.tensor(expected))


def test_a_former_camera_is_that_of_every_frame(tmp_path):
    path = tmp_path / "a.safetensors"
    random_clip().save(path)
    tensors = load_file(path)
    assert tensors["camera"].shape == (5, 2)
    save_file(tensors | {"camera": np.array([0.5, -1], np.float32)}, path)  # as files were
    for clip in (random_clip(), Clip.load(path), Clip.load(path, start=3, frames=2)):
        assert clip.camera.dtype == np.float32 and clip.camera.tolist() == [[0.5, -1]] * len(clip.rgb)
        assert clip.tensors()["camera"].tolist() == [0.5, -1]
    two = Clip.load(path, start=3, frames=2)  # two frames, two numbers: rows, not columns
    assert replace(two, camera=np.array([[1, 2], [3, 4]], np.float32)).camera.tolist() == [[1, 2], [3, 4]]


# ------------------------------------------------------------------------------------------------ dataset and its order


def test_dataset_windows(tmp_path):
    for i, frames in enumerate((5, 8)):
        random_clip(i, frames).save(tmp_path / f"{i}.safetensors")
    clips = ClipDataset(tmp_path, frames=5)
    assert len(clips) == 2 and not clips.whole
    starts = {clips[(1, draw)]["rgb"].sum().item() for draw in range(20)}
    assert len(starts) == 4  # 8 frames have four windows of 5
    assert {clips[(0, draw)]["rgb"].sum().item() for draw in range(5)} == {clips[(0, 0)]["rgb"].sum().item()}


def test_dataset_has_the_fps_of_most_of_its_clips(tmp_path):
    for i, fps in enumerate((4.0, 10.0, 7.5, 10.0)):
        replace(random_clip(i), fps=fps).save(tmp_path / f"{i}.safetensors")
    assert ClipDataset(tmp_path).fps == 10
    path = tmp_path / "0.safetensors"
    for told in ({}, {"clip": "{}"}):  # a file that does not say
        save_file(load_file(path), path, told)
        (tmp_path / "only").mkdir(exist_ok=True)
        (tmp_path / "only" / "0.safetensors").write_bytes(path.read_bytes())
        assert ClipDataset(tmp_path / "only").fps == Clip.load(path).fps == 7
    for told in ("[]", "{", '{"fps": "ten"}', '{"fps": null}'):
        save_file(load_file(path), path, {"clip": told})
        with pytest.raises(ValueError, match="0.safetensors: "):
            ClipDataset(tmp_path)


def test_dataset_names_the_clip_that_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="no clips"):
        ClipDataset(tmp_path)
    random_clip(0).save(tmp_path / "a.safetensors")
    random_clip(1, width=8).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors: is 8x7, the first clip of its folder 9x7"):
        ClipDataset(tmp_path)
    random_clip(1, frames=3).save(tmp_path / "b.safetensors")
    for frames in (0, -1):
        with pytest.raises(ValueError, match=f"frames is {frames}, expected 1 at least"):
            ClipDataset(tmp_path, frames)
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


def test_a_home_that_no_shell_has_written_out_is_one_everywhere(monkeypatch):
    """As in --out=~/x, which otherwise makes a folder called ~."""
    home = str(Path.home() / "x")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model=~/x", "--data=~/x"])
    assert (arguments := evaluate.parse_arguments()).model == arguments.data == home
    for module, first in ((annotate, ["a.mp4", "--out=~/x"]), (physion, ["a.hdf5", "--out=~/x"])):
        assert module.parse_arguments(first).out == home
    assert simulate.parse_arguments(["~/x"]).folder == home


def test_a_header_says_what_a_clip_is_without_its_pictures(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"rgb": np.zeros((2, 8, 12, 3), np.uint8)}, path, {"clip": '{"fps": 5, "meta": {"seed": 3}}'})
    assert clip_header(path) == ((2, 8, 12, 3), 5.0, {"seed": 3})
    save_file({"rgb": np.zeros((2, 8, 12, 3), np.uint8)}, path, {"clip": '{"meta": 3}'})
    with pytest.raises(ValueError, match=r"^.*a\.safetensors: meta is 3, expected a dict$"):
        clip_header(path)
