"""clips/annotate.py: videos to clips. Each formula against an independent statement of it."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from films import ffmpeg, gray_levels, retimed, write_video
from PIL import Image

from clips import Clip, ClipDataset, annotate
from clips.annotate import Pictures

ROOT = Path(__file__).parent.parent


def command(*words) -> int:
    """What `python -m clips.annotate WORDS` does, but for the printing of errors: how many videos failed."""
    return annotate.run_annotate(annotate.parse_arguments([str(word) for word in words]))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------- sizes of pictures


@pytest.mark.parametrize("size", [(9, 7), (5, 11), (31, 4), (18, 14)])
def test_crop_is_central_and_keeps_the_aspect(size):
    left, top, right, bottom = annotate.crop_box(37, 23, size)
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
    assert (left + right, top + bottom) == (pytest.approx(37), pytest.approx(23))
    assert min(left, top) == pytest.approx(0) and min(left, top) >= -1e-9  # the largest one
    values = noise(2, 23, 37)
    fitted = annotate.fit_nearest(values, size)
    for row in range(size[1]):
        for column in range(size[0]):
            x, y = left + (column + 0.5) * (right - left) / size[0], top + (row + 0.5) * (bottom - top) / size[1]
            np.testing.assert_array_equal(fitted[:, row, column], values[:, int(y), int(x)])
    assert annotate.fit(noise(23, 37, 3), size).shape == (size[1], size[0], 3)


# ------------------------------------------------------------------------------------------------------ a user's folder


def test_a_folder_is_read_by_frame_number(tmp_path):
    folder, read = tmp_path / "v", annotate.Folder("--depth", tmp_path)
    folder.mkdir()
    depth = np.random.default_rng(0).uniform(1, 9, size=(6, 5, 7)).astype(np.float32)
    for number in range(2, 6):
        np.save(folder / f"{number:06d}.npy", depth[number])
    told = read(Pictures("v", 2, noise(4, 5, 7, 3)))
    np.testing.assert_array_equal(told, depth[2:])
    with pytest.raises(ValueError, match=r"--depth .*v: has no 000006\.npy or \.png"):
        read(Pictures("v", 3, noise(4, 5, 7, 3)))
    with pytest.raises(ValueError, match=r"000002\.npy: is 7x5, the frames are 8x5"):
        read(Pictures("v", 2, noise(4, 5, 8, 3)))
    np.save(folder / "000003.npy", depth[3] * 0)
    with pytest.raises(ValueError, match=r"^[^:]*000003\.npy: holds the depth 0"):
        read(Pictures("v", 2, noise(4, 5, 7, 3)))
    (folder / "000004.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000004\.npy: "):
        read(Pictures("v", 4, noise(1, 5, 7, 3)))


@pytest.mark.parametrize(
    ("option", "there", "message"),
    [
        ("--depth", range(6), None),
        ("--flow", range(6), None),
        ("--flow", range(5), None),  # the last frame has none
        ("--depth", range(5), r"has 5 files \(000000\.npy or \.png ...\), the video 6 frames at --fps 7"),
        ("--flow", range(4), r"has 4 files \(000000\.npy or \.flo ...\), the video 6 frames at --fps 7"),
        ("--flow", range(20), "has 20 files .*, the video 6 frames at --fps 7"),
        ("--depth", range(1, 7), r"has no 000000\.npy or \.png"),  # other tools count from 1
        ("--depth", [0, 1, 2, 4, 5, 6], r"has no 000003\.npy or \.png"),
        ("--flow", range(0), "has 0 files"),
    ],
)
def test_a_folder_has_as_many_files_as_the_video_has_frames(tmp_path, option, there, message):
    (tmp_path / "v").mkdir()
    for number in there:
        (tmp_path / "v" / f"{number:06d}.npy").touch()
    (tmp_path / "v" / "000009.txt").touch()
    (tmp_path / "v" / "notes.npy").touch()
    if message is None:
        annotate.Folder(option, tmp_path).check("v", 6, 7)
        return
    with pytest.raises(ValueError, match=f"^{option} {tmp_path}/v: {message}$" if "files" not in message else message):
        annotate.Folder(option, tmp_path).check("v", 6, 7)


# ----------------------------------------------------------------------------------------------------------------- flow


class FlowStandIn(torch.nn.Module):
    """RAFT's interface: a list of refinements; the last one tells what both pictures hold at a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, first, second, num_flow_updates=12):
        height, width = first.shape[-2:]
        assert first.shape == second.shape and height % 8 == width % 8 == 0 and min(height, width) >= 128
        assert max(first.abs().max(), second.abs().max()) <= 1
        return [torch.zeros(1, 2, height, width), torch.stack([first[:, 0], second[:, 2]], dim=1) * self.weight]


@pytest.mark.parametrize("shape", [(3, 45, 61), (2, 128, 136), (2, 129, 200)])
def test_raft_sees_padded_pairs_in_order(shape):
    rgb = noise(*shape, 3)
    flow = annotate.raft_flow(Pictures("v", 0, rgb), FlowStandIn())
    expected = np.stack([rgb[:-1, ..., 0], rgb[1:, ..., 2]], axis=1) / 127.5 - 1
    np.testing.assert_allclose(flow, expected, atol=1e-6)


def stand_in_torchvision(monkeypatch) -> list:
    asked = []
    build = {
        name: lambda weights, name=name: asked.append((name, weights)) or FlowStandIn()
        for name in ("raft_large", "raft_small")
    }
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", SimpleNamespace(**build))
    return asked


def test_raft_weights_come_from_a_file_or_the_package(tmp_path, monkeypatch):
    asked = stand_in_torchvision(monkeypatch)
    torch.save({"weight": torch.full((1,), 3.0)}, tmp_path / "w.pth")
    model = annotate.flow_annotator("raft-small", str(tmp_path / "w.pth")).keywords["model"]
    assert model.weight.item() == 3 and not model.training
    annotate.flow_annotator("raft", None)
    assert asked == [("raft_small", None), ("raft_large", "DEFAULT")]
    torch.save({"other": torch.ones(1)}, tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", tmp_path / "none.pth", Path(__file__)):
        with pytest.raises(ValueError, match=f"--flow-weights {path}: "):
            annotate.flow_annotator("raft", str(path))
    with pytest.raises(ValueError, match="goes with --flow raft"):
        annotate.flow_annotator(str(tmp_path), "w.pth")


def test_the_real_raft():
    try:
        from torchvision.models.optical_flow import raft_small
    except (ImportError, RuntimeError):  # missing, or compiled for another torch
        pytest.skip("torchvision does not import here")
    flow = annotate.raft_flow(Pictures("v", 0, noise(2, 45, 61, 3)), raft_small(weights=None).eval())
    assert flow.shape == (1, 2, 45, 61) and np.isfinite(flow).all()


@pytest.mark.parametrize(
    ("hidden", "ask", "message"),
    [
        ("torchvision.models.optical_flow", lambda: annotate.flow_annotator("raft", None),
         "--flow raft needs torchvision: pip install torchvision"),
        ("transformers", lambda: annotate.segmentation_annotator("sam2", "x"),
         "--segmentation sam2 needs transformers: pip install transformers"),
        ("transformers", lambda: annotate.depth_annotator("depth-anything", "x"),
         "--depth depth-anything needs transformers: pip install transformers"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line(monkeypatch, hidden, ask, message):
    monkeypatch.setitem(sys.modules, hidden, None)  # importing it raises ImportError
    with pytest.raises(ValueError) as error:
        ask()
    assert str(error.value) == message


def test_a_broken_or_old_package_is_one_line(monkeypatch):
    def broken(name):
        raise RuntimeError("operator nms does not exist\nmore")

    with pytest.raises(ValueError, match=r"^--x needs a json that has loud \(pip install -U json\): .*$"):
        annotate.need("json", "--x", "json", "loads", "loud")
    monkeypatch.setattr(annotate.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"^--x needs y, but the installed one fails: operator nms does not exist$"):
        annotate.need("y", "--x", "y")


@pytest.mark.parametrize("ask", [
    lambda: annotate.flow_annotator("raff", None),
    lambda: annotate.segmentation_annotator("sam", "x"),
    lambda: annotate.depth_annotator("anything", "x"),
])  # fmt: skip
def test_an_unknown_annotator_is_no_folder(ask):
    with pytest.raises(ValueError, match=r"^--\w+ (raff|sam|anything): expected .* or a folder$"):
        ask()


# --------------------------------------------------------------------------------------------------------- segmentation


def test_masks_are_painted_small_over_large():
    random = np.random.default_rng(0)
    masks = [random.random((20, 30)) < share for share in (0.3, 0.05, 0.8, 0.15)] + [np.zeros((20, 30), bool)]
    ids = annotate.paint_masks(masks, 20, 30)
    for y in range(20):
        for x in range(30):
            over = [number for number, i in ((3, 1), (2, 3), (1, 0)) if masks[i][y, x]]  # 0.8 is background, 0 a speck
            assert ids[y, x] == (over or [0])[0]
    assert not annotate.paint_masks([], 20, 30).any()


def transformers_or_skip():
    transformers = pytest.importorskip("transformers")
    try:
        _ = transformers.Sam2VideoModel, transformers.DepthAnythingForDepthEstimation
    except (ImportError, AttributeError):  # beside a torchvision that does not load, or old
        pytest.skip("transformers cannot load its models here")
    return transformers


@pytest.fixture(scope="module")
def sam2():
    """The real class, tiny, with random weights."""
    transformers = transformers_or_skip()
    back = transformers.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[128, 128], blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[8, 4, 4, 4], global_attention_blocks=[],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=back, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=128,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )  # fmt: skip
    config = transformers.Sam2VideoConfig(
        vision_config=vision, image_size=128, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        prompt_encoder_config={"hidden_size": 128, "image_size": 128},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    try:
        return transformers.Sam2VideoModel(config).eval()
    except AttributeError as error:  # 5.17 misses a field of its own prompt config
        pytest.skip(f"this transformers cannot build a small SAM 2: {error}")


def two_objects() -> np.ndarray:
    first = np.zeros((45, 61), np.uint8)
    first[5:20, 5:30], first[22:40, 30:55] = 3, 7
    return first


def test_sam2_follows_the_first_frame(sam2, tmp_path, monkeypatch):
    """Also from a folder in the published layout; the proposals are a stand-in."""
    transformers, first, rgb = transformers_or_skip(), two_objects(), noise(4, 45, 61, 3)
    sam2.save_pretrained(tmp_path)
    ids = annotate.propagate(rgb, first, sam2)
    assert (ids.shape, ids.dtype) == (rgb.shape[:3], np.uint8)
    np.testing.assert_array_equal(ids[0], first)
    assert set(np.unique(ids)) <= {0, 3, 7} and (ids[1:] > 0).any()
    np.testing.assert_array_equal(annotate.propagate(rgb[:2], first, sam2), ids[:2])  # causal
    library = SimpleNamespace(
        Sam2VideoModel=transformers.Sam2VideoModel,
        Sam2VideoInferenceSession=transformers.Sam2VideoInferenceSession,
        pipeline=lambda task, model, device: lambda picture: {"masks": [first == 7, torch.from_numpy(first == 3)]},
    )
    monkeypatch.setattr(annotate, "need", lambda *names: library)
    told = annotate.segmentation_annotator("sam2", str(tmp_path))(Pictures("v", 0, rgb))
    np.testing.assert_array_equal(told[0], np.where(first == 7, 1, np.where(first == 3, 2, 0)))  # by area
    assert (told == np.where(ids == 7, 1, np.where(ids == 3, 2, 0))).mean() > 0.9
    with pytest.raises(ValueError, match="--segmentation-model .*none: "):
        annotate.segmentation_annotator("sam2", str(tmp_path / "none"))


def test_the_largest_positive_logit_wins():
    transformers_or_skip()
    logits = torch.randn(3, 2, 1, 45, 61, generator=torch.Generator().manual_seed(0))
    sessions = []

    def iterate(session, start_frame_idx):
        sessions.append(session)
        return (SimpleNamespace(object_ids=[3, 7], pred_masks=values, frame_idx=t) for t, values in enumerate(logits))

    model = SimpleNamespace(
        config=SimpleNamespace(image_size=64), device="cpu", dtype=torch.float32, propagate_in_video_iterator=iterate
    )
    ids = annotate.propagate(noise(3, 45, 61, 3), two_objects(), model)
    for t in (1, 2):
        a, b = logits[t, :, 0].numpy()
        np.testing.assert_array_equal(ids[t], np.where((a > 0) & (a >= b), 3, np.where(b > 0, 7, 0)))
    assert sessions[0].obj_with_new_inputs == [3, 7] and sessions[0].mask_inputs_per_obj[1][0].shape == (1, 1, 64, 64)
    assert not annotate.propagate(noise(3, 45, 61, 3), two_objects() * 0, model).any() and len(sessions) == 1


def test_the_real_mask_proposals(sam2, tmp_path):
    try:
        import torchvision  # noqa: F401
        from transformers import Sam2ImageProcessor
    except (ImportError, RuntimeError):
        pytest.skip("transformers or torchvision does not import here")
    sam2.save_pretrained(tmp_path)
    size = {"height": 128, "width": 128}
    Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    rgb = noise(2, 45, 61, 3)
    ids = annotate.segmentation_annotator("sam2", str(tmp_path))(Pictures("v", 0, rgb))
    assert ids.shape == rgb.shape[:3]


# ---------------------------------------------------------------------------------------------------------------- depth


def test_relative_depth_has_one_scale_for_the_clip():
    nearness = np.random.default_rng(0).uniform(-4, 90, size=(3, 5, 7)).astype(np.float32)
    depth = annotate.relative_depth(nearness)
    assert depth.min() == pytest.approx(1) and depth.max() == pytest.approx(50, rel=1e-3)
    slope, offset = np.polyfit(nearness.ravel(), 1 / depth.ravel(), 1)
    np.testing.assert_allclose(1 / depth, slope * nearness + offset, atol=1e-5)
    assert depth[0].min() > 1.0 or depth[1].min() > 1.0  # not each frame for itself
    np.testing.assert_allclose(annotate.relative_depth(nearness * 3 + 5), depth, rtol=1e-4)
    assert np.isfinite(annotate.relative_depth(nearness * 0 + 2)).all()


def test_depth_anything_from_a_folder(tmp_path):
    transformers = transformers_or_skip()
    back = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=back, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    size = {"height": 28, "width": 42}
    transformers.DPTImageProcessor(size=size, ensure_multiple_of=14).save_pretrained(tmp_path)
    try:
        transformers.AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError:  # of some versions
        pytest.skip("this transformers reads pictures by torchvision, which is not here")
    rgb = noise(3, 23, 31, 3)
    estimate = annotate.depth_annotator("depth-anything", str(tmp_path))
    depth = estimate(Pictures("v", 0, rgb))
    assert (depth.shape, depth.dtype) == ((3, 23, 31), np.float32)
    assert depth.min() == pytest.approx(1) and depth.max() == pytest.approx(50, rel=1e-3)
    same = estimate(Pictures("v", 0, rgb[[1, 1, 0, 2]]))
    np.testing.assert_allclose(same, depth[[1, 1, 0, 2]], rtol=1e-4)
    with pytest.raises(ValueError, match="--depth-model .*none: "):
        annotate.depth_annotator("depth-anything", str(tmp_path / "none"))


def test_a_path_that_is_not_there_is_never_sent_to_the_hub(monkeypatch):
    """tests/none could be somebody's repository."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(Path(__file__).parent.parent)
    for annotator, choice in ((annotate.depth_annotator, "depth-anything"), (annotate.segmentation_annotator, "sam2")):
        with pytest.raises(ValueError, match="-model tests/none: no such folder"):
            annotator(choice, "tests/none")


# --------------------------------------------------------------------------------------------------------------- camera


def moving_camera_flow(depth: np.ndarray, focal: float, forward: float, yaw: float) -> np.ndarray:
    """Points in the world, a camera that turns to the right about the vertical and then goes ahead: [2, H, W]."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width].astype(float)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    world = np.stack([x / focal * depth, y / focal * depth, depth], axis=-1)  # right, down, ahead
    ahead, right = np.array([np.sin(yaw), 0, np.cos(yaw)]), np.array([np.cos(yaw), 0, -np.sin(yaw)])
    seen = world - forward * ahead
    z = seen @ ahead
    return np.stack([focal * (seen @ right) / z - x, focal * seen[..., 1] / z - y]).astype(np.float32)


@pytest.mark.parametrize(("forward", "yaw"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.06), (1.1, -0.09), (-0.4, 0.2)])
def test_camera_motion_of_a_known_camera(forward, yaw):
    random = np.random.default_rng(3)
    depth = random.uniform(4, 40, size=(41, 67))
    fov = 47.0
    focal = 41 / 2 / math.tan(math.radians(fov / 2))
    flow = moving_camera_flow(depth, focal, forward, yaw)
    still = np.ones(depth.shape, bool)
    assert annotate.camera_step(flow, depth, still, focal) == pytest.approx((forward, yaw), abs=1e-4)
    flow[:, 10:25, 10:30] += 9  # an object moves by itself, and nobody says so
    assert annotate.camera_step(flow, depth, still, focal) == pytest.approx((forward, yaw), abs=0.01)
    flow[:, 10:25, 10:30] = random.normal(size=(2, 15, 20)) * 50  # one that the ids tell
    ids = np.zeros((3, 41, 67), np.uint8)
    ids[:, 10:25, 10:30] = 5
    camera = annotate.camera_motion(np.stack([flow, flow]), np.stack([depth] * 3), ids, fov)
    assert camera.shape == (2, 2) and camera.dtype == np.float32
    np.testing.assert_allclose(camera, [[forward, yaw / 0.1]] * 2, atol=1e-3)
    with pytest.raises(ValueError, match="is background, too little"):
        annotate.camera_motion(np.stack([flow, flow]), np.stack([depth] * 3), ids * 0 + 1, fov)


def test_camera_motion_of_a_plane_and_of_the_simulator():
    rows = np.arange(30)[:, None] + np.zeros(50)
    plane = 60 / (rows + 4)  # a ground plane, seen from above
    flow = moving_camera_flow(plane, 40.0, 0.3, 0.02)
    assert annotate.camera_step(flow, plane, plane > 0, 40.0) == pytest.approx((0.3, 0.02), abs=1e-4)
    simulate = pytest.importorskip("clips.simulate")
    for seed in range(3):
        clip = simulate.simulate("driving", seed, frames=4, size=(48, 32))
        camera = annotate.camera_motion(clip.flow[:-1], clip.depth, clip.segmentation, 50.0)
        np.testing.assert_allclose(camera, clip.camera[:-1], rtol=0.03, atol=0.01)  # its camera looks down a little


def test_windows_of_an_annotated_clip_have_their_own_camera_motion(tmp_path):
    """Four steps ahead, then three that turn: the last row is unknown and repeats the one before."""
    random, fov = np.random.default_rng(7), 47.0
    depth = random.uniform(4, 40, size=(21, 33)).astype(np.float32)
    focal = 21 / 2 / math.tan(math.radians(fov / 2))
    flow = np.stack([moving_camera_flow(depth, focal, *step) for step in [(0.7, 0)] * 4 + [(0, -0.09)] * 3])
    ids, depths = np.zeros((8, 21, 33), np.uint8), np.stack([depth] * 8)
    for name, told in (("moves", fov), ("stands", None)):
        annotators = annotate.Annotators(lambda _: flow, lambda _: ids, lambda _: depths, told)
        annotators.clip(Pictures("v", 0, noise(8, 21, 33, 3)), 7, {}).save(tmp_path / f"{name}.safetensors")
    clips = ClipDataset(tmp_path, frames=4)
    for start, expected in enumerate([(0.7, 0), (0.525, -0.225), (0.35, -0.45), (0.175, -0.675), (0, -0.9)]):
        np.testing.assert_allclose(clips[(0, start)]["camera"], expected, atol=2e-3)
        assert clips[(1, start)]["camera"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------ videos -> clips


def test_motion_bucket_by_hand():
    def bucket(scale: float) -> int:
        flow = np.zeros((3, 2, 20, 31), np.float32)
        flow[:, 0], flow[:, 1] = 0.3 * scale, 0.4 * scale  # 0.5 px a frame, 4 frames a second, 20 px high: 0.1 heights
        clip = Clip(noise(3, 20, 31, 3), flow, noise(3, 20, 31), np.ones((3, 20, 31), np.float32), fps=4, meta={"a": 1})
        told = annotate.with_bucket(clip).meta
        assert told["a"] == 1 and clip.meta == {"a": 1}
        return told["motion_bucket"]

    assert [bucket(scale) for scale in (0, 1, 3, 1e6)] == [0, 127, 191, 254]


@pytest.fixture
def user_folders(tmp_path):
    """A video of three shots (9, 4 and 6 frames at 10 fps) and folders of flow, ids and depth for it."""
    video = write_video(tmp_path / "v.mp4", gray_levels([30] * 9 + [220] * 4 + [120] * 6), 10)
    random, arrays = np.random.default_rng(0), {}
    for name, shape in (("flow", (2, 12, 18)), ("ids", (12, 18)), ("depth", (12, 18))):
        (tmp_path / name / "v").mkdir(parents=True)
        arrays[name] = random.uniform(1, 4, size=(19, *shape)).astype(np.float32 if name != "ids" else np.uint8)
        for number, values in enumerate(arrays[name]):
            np.save(tmp_path / name / "v" / f"{number:06d}.npy", values)
    words = [video, "--size", "18x12", "--fps", 10, "--frames", 4, "--camera", "none"]
    words += ["--flow", tmp_path / "flow", "--segmentation", tmp_path / "ids", "--depth", tmp_path / "depth"]
    return SimpleNamespace(
        words=[*words, "--out", tmp_path / "out"], arrays=arrays, out=tmp_path / "out", root=tmp_path
    )


def names_in(folder: Path) -> list[str]:
    """Without .videos, which annotate.py keeps for itself."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".videos")


def failure(capsys) -> str:
    """The one line on stderr, beside progress bars."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.strip() and not re.match(r"\S+: \d+frame \[", line))
    return line


def test_annotate_writes_clips_between_cuts_and_resumes(user_folders, capsys):
    command(*user_folders.words)
    starts, out = (0, 4, 9, 13), user_folders.out
    assert names_in(out) == [f"v_{start:06d}.safetensors" for start in starts]
    assert "4 clips written, 0 were there; 3 frames at ends of shots are in none" in capsys.readouterr().out
    for start in starts:
        clip = Clip.load(out / f"v_{start:06d}.safetensors")
        window = slice(start, start + 4)
        np.testing.assert_array_equal(clip.segmentation, user_folders.arrays["ids"][window])
        np.testing.assert_allclose(clip.depth, user_folders.arrays["depth"][window], rtol=1e-3)
        np.testing.assert_allclose(clip.flow[:3], user_folders.arrays["flow"][start : start + 3], rtol=1e-3)
        np.testing.assert_array_equal(clip.flow[3], clip.flow[2])
        assert (clip.fps, clip.meta["start"], clip.meta["source"]) == (10, start, "v.mp4")
        assert clip.camera.tolist() == [[0, 0]] * 4
        assert clip.meta["motion_bucket"] == annotate.with_bucket(clip).meta["motion_bucket"] > 127
    before = (out / "v_000000.safetensors").stat().st_mtime_ns
    (out / "v_000009.safetensors").unlink()
    command(*user_folders.words)
    assert "1 clips written, 3 were there" in capsys.readouterr().out
    assert len(names_in(out)) == 4 and (out / "v_000000.safetensors").stat().st_mtime_ns == before


def test_annotate_with_nothing_but_flow(user_folders):
    words = [*user_folders.words, "--segmentation", "none", "--depth", "none", "--camera", "flow", "--fov", 60]
    command(*words)
    clip = Clip.load(user_folders.out / "v_000004.safetensors")
    assert not clip.segmentation.any() and (clip.depth == 1).all() and (clip.camera != 0).all()
    annotators = {"segmentation": "none", "depth": "none", "camera": "flow", "fov": 60.0}
    assert annotators.items() <= clip.meta["annotators"].items()


def test_a_bad_file_of_a_folder_ends_the_video_with_its_name_and_leaves_whole_clips(user_folders, capsys):
    right = user_folders.root / "ids" / "v" / "000005.npy"
    content = right.read_bytes()
    np.save(right, np.zeros((12, 17), np.uint8))
    assert command(*user_folders.words) == 1
    line = r"clips\.annotate: v, frames from 4 on: .*000005\.npy: is 17x12, the frames are 18x12"
    assert re.fullmatch(line, failure(capsys))
    assert names_in(user_folders.out) == ["v_000000.safetensors"]
    Clip.load(user_folders.out / "v_000000.safetensors")
    right.write_bytes(content)
    assert command(*user_folders.words) == 0
    assert "3 clips written, 1 were there" in capsys.readouterr().out


def test_a_video_that_is_done_is_not_read_again(user_folders, capsys, monkeypatch):
    command(*user_folders.words)
    with monkeypatch.context() as during:
        during.setattr(annotate, "read_video", None)
        assert command(*user_folders.words) == 0
    assert capsys.readouterr().out.endswith("v.mp4: skipped, its 4 clips were there\n")


@pytest.mark.parametrize("half", [False, True])
def test_clips_of_other_settings_are_not_mixed(user_folders, capsys, half):
    """Neither where the video is done nor where it is half done."""
    if half:
        np.save(user_folders.root / "ids" / "v" / "000005.npy", np.zeros((12, 17), np.uint8))
    command(*user_folders.words)
    before, out = names_in(user_folders.out), user_folders.out
    capsys.readouterr()
    for words, told in ((("--frames", 3), "frames = 4, now frames = 3"), (("--fov", 60), "fov = 50.0, now fov = 60.0")):
        assert command(*user_folders.words, *words) == 1
        line = f"clips.annotate: {user_folders.words[0]}: its clips in {out} were made with {told}: take another --out"
        assert failure(capsys) == line
    assert names_in(out) == before
    for name in before:
        (out / name).unlink()
    command(*user_folders.words, "--frames", 3, "--segmentation", "none")
    assert "v_000003.safetensors" in names_in(out)


def test_clips_without_a_record_are_not_mixed_either(user_folders, capsys):
    """What they were made with is written in themselves."""
    command(*user_folders.words)
    (user_folders.out / ".videos" / "v.json").unlink()
    before = names_in(user_folders.out)
    assert command(*user_folders.words, "--segmentation", "none") == 1
    assert f"were made with segmentation = {user_folders.root}/ids, now segmentation = none" in failure(capsys)
    assert names_in(user_folders.out) == before


def test_clips_of_another_video_of_the_same_name_are_not_taken_for_its_own(user_folders, capsys):
    command(*user_folders.words)
    other = user_folders.root / "other"
    other.mkdir()
    write_video(other / "v.mp4", gray_levels([90] * 19, 36, 50), 10)
    (other / "v.mkv").write_bytes((user_folders.root / "v.mp4").read_bytes())
    for name, told in (("v.mp4", r"bytes = \d+, now bytes = \d+"), ("v.mkv", "source = v.mp4, now source = v.mkv")):
        assert command(other / name, *user_folders.words[1:]) == 1
        assert re.search(f"{name}: its clips in .* were made with {told}: take another --out", failure(capsys))


def test_a_foreign_clip_of_the_same_name_is_named(user_folders, capsys):
    """Nobody knows what it was made of."""
    user_folders.out.mkdir()
    file = user_folders.out / "v_000004.safetensors"
    file.write_bytes(b"mine")
    assert command(*user_folders.words) == 1
    assert failure(capsys).startswith(f"clips.annotate: {file}: ") and names_in(user_folders.out) == [file.name]


def test_a_damaged_record_is_named(user_folders, capsys):
    command(*user_folders.words)
    record = user_folders.out / ".videos" / "v.json"
    record.write_text("{}")
    capsys.readouterr()
    assert command(*user_folders.words) == 1
    assert failure(capsys) == f"clips.annotate: {record}: 'clips'; delete it, it will be made again"
    record.unlink()
    assert command(*user_folders.words) == 0 and "0 clips written, 4 were there" in capsys.readouterr().out


@pytest.mark.parametrize(("fps", "count"), [(5, 10), (7, 13)])
def test_folders_of_another_rate_are_a_line(user_folders, capsys, fps, count):
    """Made for 10 frames a second."""
    assert command(*user_folders.words, "--fps", fps) == 1
    folder = user_folders.root / "flow" / "v"
    told = f"has 19 files (000000.npy or .flo ...), the video {count} frames at --fps {fps}"
    assert failure(capsys) == f"clips.annotate: --flow {folder}: {told}"
    assert not user_folders.out.exists()


def everywhere(value: float, *shape: int) -> np.ndarray:
    return np.full((*shape, 12, 18), value)


UNKNOWN = "unknown flow, at 216 of 216 pixels: every pixel needs one"


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("flow", everywhere(1.7e9, 2), rf"holds 1\.7e\+09, {UNKNOWN}"),
        ("flow", everywhere(np.nan, 2), f"holds nan, {UNKNOWN}"),
        ("flow", everywhere(7e4, 2), None),
        ("depth", everywhere(7e4), None),
        ("depth", everywhere(1e-9), None),
        ("depth", everywhere(np.nan), "holds the depth nan, expected positive numbers"),
        ("depth", noise(12, 18, 3), "is a colour picture, and colours are no distances: .*"),
        ("ids", noise(12, 18, 3), r"is a colour picture \(RGB\), expected gray or palette: value = id"),
        ("ids", noise(12, 18, 2), "has half transparent pixels: an id is there or not"),
    ],
)
def test_what_has_no_clear_meaning_is_a_line_and_leaves_nothing(user_folders, capsys, option, content, message):
    file = user_folders.root / option / "v" / "000002.npy"
    if content.dtype == np.uint8:
        file.unlink()
        file = file.with_suffix(".png")
        Image.fromarray(content).save(file)
    else:
        np.save(file, content)
    assert command(*user_folders.words) == 1
    line = f"v, frames from 0 on: {file}: {message}" if message else ".*, which half precision .*"
    assert re.fullmatch(rf"clips\.annotate: {line}", failure(capsys))
    assert not user_folders.out.exists()


@pytest.fixture
def many(tmp_path):
    """Five videos of one clip each, b of them damaged, in a folder with a file that is no video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, name in enumerate("abcde"):
        write_video(folder / f"{name}.mp4", gray_levels([20 + 10 * number] * 4), 10)
    (folder / "b.mp4").write_bytes(b"no video" * 99)
    (folder / "notes.txt").write_text("mine")
    plain = ("--segmentation", "none", "--depth", "none", "--camera", "none", "--flow", tmp_path / "flow")
    for name in "abcde":
        (tmp_path / "flow" / name).mkdir(parents=True)
        for number in range(4):
            np.save(tmp_path / "flow" / name / f"{number:06d}.npy", np.zeros((2, 12, 18), np.float32))
    sizes = ("--size", "18x12", "--fps", 10, "--frames", 4, "--out", tmp_path / "out")
    return SimpleNamespace(folder=folder, out=tmp_path / "out", words=[*plain, *sizes])


def clips_of(names: str) -> list[str]:
    return [f"{name}_000000.safetensors" for name in names]


def test_one_damaged_video_is_a_line_and_the_others_are_done(many, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clips.annotate", *map(str, [many.folder, *many.words])])
    with pytest.raises(SystemExit) as stopped:
        annotate.main()
    assert stopped.value.code == 2
    assert failure(capsys).startswith(f"clips.annotate: {many.folder}/b.mp4: not a video")
    assert names_in(many.out) == clips_of("acde")


def test_videos_of_folders_and_lists(many, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{many.folder}/notes.txt\n\n{many.folder}\n")
    names = [str(many.folder / f"{name}.mp4") for name in "abcde"]
    assert annotate.videos_of(["x.mp4"], str(listing)) == ["x.mp4", f"{many.folder}/notes.txt", *names]
    (tmp_path / "phone").mkdir()
    for name in ("a.gif", "b.MOV", "c.3gp", "d.jpg"):
        (tmp_path / "phone" / name).touch()
    assert annotate.videos_of([f"{tmp_path}/phone"], None) == [
        f"{tmp_path}/phone/{n}" for n in ("a.gif", "b.MOV", "c.3gp")
    ]
    (tmp_path / "empty").mkdir()
    for words, message in (
        (("--list", tmp_path / "gone"), "gone"),
        ((tmp_path / "empty",), f"{tmp_path}/empty: no videos \\(.3gp, .*\\) here"),
        ((), "no videos: name some, or --list FILE"),
        ((tmp_path / "gone.mp4",), "gone.mp4: no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            command(*words, *many.words)
    assert not many.out.exists()


def test_processes_share_the_videos_without_a_group(many, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert command(many.folder, *many.words) == 0 and names_in(many.out) == clips_of("ace")
    monkeypatch.setenv("RANK", "1")
    assert command(many.folder, *many.words) == 1 and names_in(many.out) == clips_of("acde")


def test_each_process_has_its_gpu_or_a_part_of_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [annotate.device()]
    for place in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        found.append(annotate.device())
    assert found == ["cuda:0", "cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert annotate.device() == "cpu"


def test_torchrun_does_not_end_a_process_at_work_when_another_has_failed(many, tmp_path):
    """The second process has the damaged video and soon nothing more to do; the first is slow."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, time\nfrom clips import annotate\nfast = annotate.annotate_video\n"
        "def slow(*told):\n    time.sleep(0.7 * (os.environ['RANK'] == '0'))\n    return fast(*told)\n"
        "annotate.annotate_video = slow\nannotate.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in (*launch, many.folder, *many.words)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200)
    assert done.returncode and "3 of 3 videos done" in done.stdout and "1 of 2 videos done" in done.stdout
    assert done.stderr.count("clips.annotate: ") == 1 and names_in(many.out) == clips_of("acde")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", 1], "--frames 1: expected 2 at least"),
        (["--size", "18"], "--size 18: expected WIDTHxHEIGHT"),
        (["--size", "18x4"], "--size 18x4: expected WIDTHxHEIGHT, 8 pixels at least"),
        (["--fps", 0], "--fps 0.0: expected 1 at least"),
        (["--fps", "nan"], "--fps nan: expected 1 at least"),
        (["--fov", 180], "--fov 180: expected degrees below 180"),
        (["--depth", "nowhere"], "--depth nowhere: expected depth-anything, none or a folder"),
    ],
)
def test_annotate_refuses(user_folders, words, message):
    with pytest.raises(ValueError, match=message):
        command(*user_folders.words, *words)
    assert not user_folders.out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", 10], "no shot of its 19 frames (--fps 10) has 10"),
        (["--fps", 30], "has 10 frames a second, --fps 30 asks for more"),
    ],
)
def test_a_video_that_does_not_fit_the_options_is_a_line(user_folders, capsys, words, message):
    assert command(*user_folders.words, *words) == 1
    assert failure(capsys) == f"clips.annotate: {user_folders.words[0]}: {message}"
    assert not user_folders.out.exists()


def test_annotate_refuses_missing_and_ambiguous_videos(user_folders):
    with pytest.raises(ValueError, match="gone.mp4: no such file"):
        command(user_folders.root / "v.mp4", "gone.mp4", *user_folders.words[1:])
    other = user_folders.root / "other"
    other.mkdir()
    (other / "v.mp4").write_bytes((user_folders.root / "v.mp4").read_bytes())
    with pytest.raises(ValueError, match=r"other/v\.mp4: clips of .*v\.mp4 would have the same names"):
        annotate.by_stem([str(user_folders.root / "v.mp4"), str(other / "v.mp4")])
    assert annotate.by_stem(["tests/../README.md", "tests/../README.md"]) == [Path("tests/../README.md")]


def test_output_that_is_no_folder(user_folders):
    user_folders.out.write_text("mine")
    with pytest.raises(ValueError, match="out: is not a folder"):
        command(*user_folders.words)
    assert user_folders.out.read_text() == "mine"


def test_a_phones_video(tmp_path):
    """Held upright, in the dark (25 frames a second, then 10), with pixels that are not square."""
    frames = gray_levels(range(20, 200, 6))
    frames[:, :12] //= 2  # the top, which the phone writes to the right
    words = ["-vf", "transpose=clock,setsar=2/1", "-c:v", "libx264", "-qp", 0]
    ffmpeg("-i", write_video(tmp_path / "even.mp4", frames, 20), *words, tmp_path / "turned.mp4")
    times = [40 * n if n < 15 else 600 + 100 * (n - 15) for n in range(len(frames))]
    retimed(tmp_path / "turned.mp4", tmp_path / "times.mp4", times)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "times.mp4", "-c", "copy", tmp_path / "v.mp4")
    assert command(tmp_path / "v.mp4", "--size", "9x12", "--fps", 7, "--export", tmp_path / "f") == 0
    pictures = [np.array(Image.open(tmp_path / "f" / "v" / name)) for name in names_in(tmp_path / "f" / "v")]
    assert abs(len(pictures) - times[-1] / 1000 * 7) <= 2
    for number, picture in enumerate(pictures):
        top, bottom = picture[:5].mean(), picture[7:].mean()
        assert top == pytest.approx(bottom / 2, abs=3)
        shown = round((bottom - 20) / 6)
        now, soon = (np.flatnonzero(np.array(times) <= 1000 * number / 7 + late)[-1] for late in (0, 40))
        assert now <= shown <= soon, number


def test_export_again_does_not_leave_frames_of_another_rate(user_folders, capsys):
    words = [user_folders.root / "v.mp4", "--size", "18x12", "--export", user_folders.root / "f"]
    assert command(*words, "--fps", 10) == 0 and command(*words, "--fps", 10) == 0
    assert command(*words, "--fps", 5) == 1
    told = "the frames from 000010.png on are of an earlier export: delete the folder"
    assert failure(capsys) == f"clips.annotate: {user_folders.root}/f/v: {told}"


def test_ctrl_c_is_one_line(user_folders, capsys, monkeypatch):
    def stopped(self, path):
        assert self.rgb.shape == (4, 12, 18, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(Clip, "save", stopped)
    monkeypatch.setattr(sys, "argv", ["clips.annotate", *map(str, user_folders.words)])
    with pytest.raises(SystemExit) as end:
        annotate.main()
    assert end.value.code == 130 and not user_folders.out.exists()
    assert failure(capsys) == "clips.annotate: stopped; the same command goes on from here"


def test_export_writes_what_annotators_see(user_folders):
    words = [
        user_folders.root / "v.mp4",
        "--size",
        "18x12",
        "--fps",
        5,
        "--export",
        user_folders.root / "f",
    ]
    command(*words)
    frames = list(annotate.progress(user_folders.root / "v.mp4", (18, 12), 5))
    assert names_in(user_folders.root / "f" / "v") == [f"{n:06d}.png" for n in range(len(frames))]
    for n, frame in enumerate(frames):
        np.testing.assert_array_equal(np.array(Image.open(user_folders.root / "f" / "v" / f"{n:06d}.png")), frame)
