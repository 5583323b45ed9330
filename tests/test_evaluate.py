"""The measures against hand-computed cases, loops, scipy and the simulator; evaluate.py through its command line."""

import argparse
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sensitivity import blurred, degraded
from tiny import UNET_CONFIG, moving_squares, randomize, tiny_stage, tiny_tower, tiny_vae

import evaluate
import metrics
from clips import Clip
from evaluate import truth_of
from instance_flow import instance_flow
from metrics import frechet, frozen
from metrics.trackers import Pips, chain_flow, lucas_kanade
from motion_dreamer import ONE_STAGE, STAGE1, STAGE2, MotionDreamer, SmallStageConfig, stage_class
from training import sampler as sampler_room
from training import tables

simulate = pytest.importorskip("clips.simulate")
from tracking import object_pixels, simulated, tracking_errors  # noqa: E402 (it needs the simulator)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three rows of dominoes: all fall, one falls, and nobody pushes."""
    folder = tmp_path_factory.mktemp("clips")
    for i, seed in enumerate((2000000, 2000002, 2000001)):
        simulate.simulate("dominoes", seed, 16, (96, 48)).save(folder / f"{i}.safetensors")
    return [truth_of(path, 16, "cpu") for path in sorted(folder.glob("*"))]


# ------------------------------------------------------------------------------------------------- figures of one clip


def value(sums):
    return metrics.combine(np.array(sums, float))


def test_flow_error_by_hand():
    truth = torch.zeros(1, 2, 1, 4)
    truth[0, 0, 0] = torch.tensor([3.0, 0.0, 0.05, 0.0])
    truth[0, 1, 0] = torch.tensor([4.0, 2.0, 0.0, 0.0])  # lengths 5, 2, 0.05 (rests), 0
    flow = truth.clone()
    flow[0, 0, 0] += torch.tensor([1.0, 0.0, 2.0, 0.0])
    found = metrics.flow_error(flow, truth)
    assert value(found["epe_all"]) == pytest.approx(3 / 4)
    assert value(found["epe_moving"]) == pytest.approx(1 / 2)
    assert value(found["epe_relative"]) == pytest.approx(1 / 7)


def test_overlap_by_hand():
    truth = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 1, 2]]])
    ids = torch.tensor([[[0, 1, 1, 2]], [[0, 1, 1, 0]]])
    found = metrics.id_overlap(ids, truth)
    assert value(found["iou_frame_0"]) == 1
    assert value(found["iou_last"]) == pytest.approx((1 / 2 + 0) / 2)
    assert value(found["silhouette_last"]) == pytest.approx(1 / 3)
    assert value(found["ids_miou"]) == pytest.approx((2 / 4 + 3 / 4 + 1 / 2) / 3)


def test_centroids_by_hand_and_the_lost_stay():
    truth = torch.zeros(3, 4, 8, dtype=torch.long)
    ids = truth.clone()
    for t in range(3):
        truth[t, 1, 2 + t] = 1
    ids[0, 1, 2] = ids[1, 2, 3] = 1  # gone in the last frame
    found = metrics.centroid_error(ids, truth, [1])
    assert value(found["centroid_ade"]) == pytest.approx((0 + 1 + math.sqrt(2)) / 3)
    assert value(found["centroid_fde"]) == pytest.approx(math.sqrt(2))
    assert value(metrics.permanence(ids, truth)["permanence"]) == pytest.approx(2 / 3)
    for count, kept in ((20, 1), (21, 0)):  # two of so many pixels: a tenth is enough, less is not
        row = torch.ones(1, 1, count, dtype=torch.long)
        assert value(metrics.permanence(row * (row.cumsum(2) <= 2), row)["permanence"]) == kept


def test_depth_psnr_and_half_time_by_hand():
    ids, truth = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[2.0, 4.0, 8.0]]])
    found = metrics.depth_error(torch.tensor([[[1.0, 5.0, 10.0]]]), truth, ids)
    assert value(found["depth_absrel"]) == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert value(found["depth_absrel_objects"]) == pytest.approx(1 / 4)
    assert metrics.psnr(torch.full((2, 3, 4, 4), 0.2), torch.zeros(2, 3, 4, 4)) == pytest.approx(20, abs=1e-4)
    flow = torch.zeros(4, 2, 2, 2)
    flow[1, 0], flow[2, 0] = 1.0, 3.0  # half of 4 is done 1/3 into the third step
    assert metrics.half_time(flow) == pytest.approx(2 + 1 / 3)
    assert math.isnan(metrics.half_time(flow * 0))


def test_two_classes_and_summary():
    assert value(metrics.two_classes({1, 2, 9}, {1, 3}, {1, 2, 3, 4, 5})) == pytest.approx((1 / 2 + 2 / 3) / 2)
    rows = [{"a": (1.0, 2.0)}, {"a": (3.0, 2.0), "b": (1, 1, 0, 0)}, {"a": (0.0, 0.0)}]
    summary = metrics.summarise(rows)
    assert summary["a"]["value"] == 1 and summary["a"]["clips"] == 2
    assert 0.5 <= summary["a"]["interval"][0] <= 1 <= summary["a"]["interval"][1] <= 1.5
    assert math.isnan(summary["b"]["value"])  # nothing of the other class


def test_colors_give_the_ids_back():
    for seed, lost in ((0, 0), (7, 0), (11, 0), (3, 4)):  # in the last, a tip of two pixels looks out from behind
        clip = moving_squares(seed).tensors()
        seen = metrics.ids_by_color(clip["rgb"], clip["segmentation"][0])
        assert (seen != clip["segmentation"]).sum() == lost


def test_ids_by_color_know_both_sides_of_a_box_and_forgive_lone_pixels():
    ids = torch.zeros(9, 16, dtype=torch.long)
    ids[2:8, 3:11] = 5
    picture = torch.full((3, 9, 16), -0.5)
    picture[:, :, 8:] = -0.3  # a floor of two colours; the mean of the box's two sides would be a floor's
    picture[:, 2:8, 3:7], picture[:, 2:8, 7:11] = -0.9, 0.1
    second = picture.clone()
    second[:, 0, 14], second[:, 4, 9] = 0.1, -0.3  # noise
    seen = metrics.ids_by_color(torch.stack([picture, second]), ids)
    assert torch.equal(seen, torch.stack([ids, ids]))
    mean = torch.stack([picture[:, ids == i].mean(1) for i in (0, 5)])
    plain = torch.cdist(picture.movedim(0, -1), mean).argmin(-1)
    assert not torch.equal(plain * 5, ids)  # what the nearest mean colour says


# ------------------------------------------------------------------------------------- against the simulator's truth


def test_fallen_by_masks_and_by_flow(clips):
    fallen = [set(clip.meta["arrow"]["fallen"]) for clip in clips]
    assert any(fallen) and not all(fallen)
    for clip, true in zip(clips, fallen, strict=True):
        maps = clip.truth["arrow"]
        assert metrics.fallen_ids(maps["segmentation"][0], maps["segmentation"][-1]) == true
        assert metrics.fallen_points(*metrics.carry(maps["flow"], maps["segmentation"][0])) == true


def test_truth_scores_full_marks_and_nothing_moves_does_not(clips, tmp_path):
    clip = clips[0]
    evaluate.add_other_pushes(clip, tmp_path, "cpu")
    own = {"rgb_own": clip.truth["arrow"]["rgb"], "told": clip.truth["arrow"]["segmentation"]}
    truth = clip.truth | {"arrow": clip.truth["arrow"] | own}
    still = {push: frozen(maps) for push, maps in clip.truth.items()}
    still["arrow"] = still["arrow"] | {"rgb_own": still["arrow"]["rgb"], "told": own["told"]}
    right, wrong = (metrics.demo_figures(v, clip) | metrics.physics_figures(v, clip) for v in (truth, still))
    full = {"ids_miou", "iou_last", "silhouette_last", "both_ways", "both_all_right", "standing", "sooner"}
    full |= {"all_right_carried", "all_right_ids", "permanence", "control_length", "painted_ids"}
    assert {name: value(right[name]) for name in full} == pytest.approx(dict.fromkeys(full, 1.0))
    none = {"epe_relative", "epe_all", "quiet", "depth_absrel", "centroid_ade", "centroid_fde"}
    assert {name: value(right[name]) for name in none} == pytest.approx(dict.fromkeys(none, 0.0), abs=1e-6)
    assert value(wrong["painted_ids"]) < 0.6
    assert right["fallen_video"] == (4, 4, 0, 0) and wrong["fallen_video"] == (0, 4, 0, 0)
    for name in ("hit", "hit_video"):
        assert right[name] == (3, 3, 0, 0) and wrong[name] == (0, 3, 0, 0)
    assert value(wrong["epe_relative"]) == pytest.approx(1)
    for name in ("both_ways", "all_right_carried", "all_right_ids", "sooner", "control_length"):
        assert value(wrong[name]) == 0
    assert value(wrong["standing"]) == 1


def test_worse_video_gets_worse_figures(clips):
    clip = clips[0]
    true = clip.truth["arrow"]
    right = metrics.physics_figures({"arrow": true}, clip)
    worse = degraded(true)
    del worse["as it is"]
    assert len(worse) == 4
    for how, maps in worse.items():
        found = metrics.physics_figures({"arrow": maps}, clip)
        less = ("epe_moving", "epe_relative", "depth_absrel_objects")
        less += () if how == "blurred" else ("centroid_ade",)
        assert all(value(found[name]) > value(right[name]) for name in less), how
        if how != "blurred":
            assert value(found["iou_mean"]) < value(right["iou_mean"])
            assert metrics.psnr(maps["rgb"], true["rgb"]) < 40
    assert metrics.psnr(blurred(true["rgb"]), true["rgb"]) < 40


# -------------------------------------------------------------------------------------------------- Frechet distances


def test_histogram_against_a_loop():
    random = np.random.default_rng(0)
    tracks = np.cumsum(random.normal(size=(2, 16, 400, 2)) * random.gamma(1, 4, (2, 1, 400, 1)), axis=1)
    tracks = tracks.astype(np.float32)
    expected = np.zeros((2, 2, 4, 4, 4, 8))
    for m in range(2):
        for n in range(400):
            previous = np.zeros(2, np.float32)
            for t in range(1, 16):
                velocity = tracks[m, t, n] - tracks[m, t - 1, n]
                for kind, vector in ((0, velocity), (1, velocity - previous if t > 1 else velocity * 0)):
                    angle = math.atan2(vector[0], vector[1]) + math.pi
                    weight = math.ceil(min(8, math.log2(min(255, math.hypot(*vector)) + 1))) / 8
                    expected[m, kind, t // 4, n // 20 // 5, n % 20 // 5, min(7, int(angle // (math.pi / 4)))] += weight
                previous = velocity
    found = metrics.motion_histogram(torch.from_numpy(tracks))
    assert found.shape == (2, 1024)
    np.testing.assert_allclose(found.numpy(), expected.reshape(2, -1), atol=1e-9)


@pytest.mark.parametrize(
    "vector, direction",
    [((1, 0), 5), ((0, 1), 4), ((-1, 0), 2), ((0, -1), 7), ((1, 1), 5), ((-1, -1), 1), ((1, -1), 7), ((-1, 1), 2)],
)
def test_directions_on_the_edge_of_a_bin(vector, direction):
    """What the published package gives in single precision."""
    tracks = torch.zeros(1, 16, 400, 2)
    tracks[0, 1:, 0] = torch.tensor(vector).float()
    velocity = metrics.motion_histogram(tracks)[0, :512]
    assert velocity.nonzero().flatten().tolist() == [direction]
    assert velocity.max() == 1 / 8 * math.ceil(math.log2(math.hypot(*vector) + 1))


def test_histogram_refuses_other_shapes():
    with pytest.raises(ValueError, match="expected"):
        metrics.motion_histogram(torch.zeros(1, 15, 400, 2))


def features(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + seed


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_distance_against_scipy(eps, ddof):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(80, 6, 1).numpy(), features(50, 6, 2).numpy()
    s, r = np.cov(x.T, ddof=ddof), np.cov(y.T, ddof=ddof)
    root = linalg.sqrtm((s + eps * np.eye(6)) @ (r + eps * np.eye(6))).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * root)
    found = metrics.frechet_distance(torch.from_numpy(x), torch.from_numpy(y), eps, ddof)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_frechet_distance_in_closed_form(count):
    """y = c x + d: the covariances commute, so that it is |difference of means|^2 + (c - 1)^2 tr S; any N and D."""
    x = features(count, 12, 3)
    y = 2.5 * x + 1
    gap = (y.mean(0) - x.mean(0)).square().sum()
    expected = gap + 1.5**2 * x.var(0).sum()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x, eps=1e-3) == pytest.approx(-2 * 12 * 1e-3, rel=1e-6)
    assert metrics.frechet_distance(x, y, 1e-9) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_refuses():
    x = features(4, 3, 0)
    for bad in (x[:1], x[:, :2], x[0], torch.full_like(x, math.nan)):
        with pytest.raises(ValueError):
            metrics.frechet_distance(x, bad)


def sets_of(count, seed, scale=1.0):
    """Of each clip the features of two windows."""
    return list((features(2 * count, 3, seed) * scale).view(count, 2, 3))


def test_the_distance_of_sets_of_clips_by_hand():
    """Pooled over windows, in the mean over extractors; the draws of the clips lie around it."""
    pairs = [(sets_of(9, 1), sets_of(9, 2)), (sets_of(9, 3), sets_of(9, 4))]
    pooled = [[torch.cat(side).numpy() for side in pair] for pair in pairs]
    for scaled in (False, True):
        units = [y.std(axis=0, ddof=1) if scaled else 1.0 for _, y in pooled]
        expected = [
            metrics.frechet_distance(torch.from_numpy(x / unit), torch.from_numpy(y / unit))
            for (x, y), unit in zip(pooled, units, strict=True)
        ]
        value, drawn, count = metrics.distance_draws(pairs, scaled=scaled)
        assert value == pytest.approx(np.mean(expected)) and count == 9
        assert drawn.shape == (300,) and drawn.mean() == pytest.approx(value) and drawn.std() > 0.01 * value
    same = metrics.set_distance([(pairs[0][0], pairs[0][0])])  # both sets are drawn alike
    assert np.allclose([same["value"], *same["interval"]], 0, atol=1e-9)
    larger = [tuple([1000 * clip for clip in side] for side in pair) for pair in pairs]
    assert metrics.set_distance(larger, scaled=True)["value"] == pytest.approx(value)
    still = [(sets_of(9, 1), [clip * torch.tensor([1, 1, 0]) for clip in sets_of(9, 2)])]
    assert math.isfinite(metrics.set_distance(still, scaled=True)["value"])  # a feature that never differs


def test_one_half_of_the_clips_against_the_other():
    """Each clip is in one of the halves: of far groups of four and five, exactly one distance tells who was where."""
    clips = sets_of(9, 1)
    found = metrics.set_distance([(clips, clips)], halves=True)
    splits = [(left, [k for k in range(9) if k not in left]) for left in combinations(range(9), 5)]
    all_of = [metrics.frechet_distance(*(torch.cat([clips[k] for k in half]) for half in split)) for split in splits]
    assert found["clips"] == 4 and np.isclose(all_of, found["value"]).sum() == 1


def test_points_of_fvmd_and_their_scale_by_hand():
    points = frechet.query_points(256, 512).tolist()
    expected = [[8 + k * 496 / 19, 8 + n * 240 / 19] for n in range(20) for k in range(20)]
    np.testing.assert_allclose(points, expected, rtol=1e-6)
    # Edges of the picture, half a pixel out, stay edges.
    corners = torch.tensor([[-0.5, -0.5], [511.5, 255.5], [0.0, 0.0]])
    scaled = frechet.rescale(corners, (256, 512), (64, 1024))
    np.testing.assert_allclose(scaled, [[-0.5, -0.5], [1023.5, 63.5], [0.5, -0.375]])


def test_stand_ins_for_motion_see_differences_alone():
    generator = torch.Generator().manual_seed(0)
    levels, picture = (torch.randint(0, 100, (n, 3, 16, 24), generator=generator) for n in (6, 1))
    one, other = levels / 127.5 - 1, (levels + picture) / 127.5 - 1  # the same picture added to every frame
    for motion in (True, False):
        found = [metrics.random_features(video, 0, motion) for video in (one, other)]
        assert found[0].std() > 0 and torch.allclose(*found, atol=1e-5) == motion
    assert (metrics.random_features(one[:1].expand(6, -1, -1, -1), 0, True) == 0).all()


def test_stand_ins_and_fvmd_see_what_they_should(clips):
    """Of a set against itself nothing; appearance sees blur, motion sees frames in another order."""
    videos = [clip.truth["arrow"]["rgb"][:, :, ::2, ::2] for clip in clips[:2]]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def distance(motion, change):
        sets = [[metrics.random_features(f(v), 0, motion) for v in videos] for f in (lambda v: v, change)]
        return metrics.set_distance([(sets[1], sets[0])], scaled=True)["value"]

    assert distance(True, lambda v: v) == pytest.approx(0, abs=1e-6)
    assert distance(False, blurred) > 5 * distance(False, lambda v: v[order]) >= 0
    assert distance(True, lambda v: v[order]) > 1000
    flows = [clip.truth["arrow"]["flow"] for clip in clips[:2]]
    true = torch.cat([metrics.tracked_features(chain_flow, flow) for flow in flows])
    changes = {"frozen": lambda f: f * 0, "shuffled": lambda f: f[order], "fast": lambda f: 2 * f}
    for name, change in changes.items():
        other = torch.cat([metrics.tracked_features(chain_flow, change(flow)) for flow in flows])
        assert metrics.frechet_distance(other, true) > 100, name
    assert true.shape == (2, 1024)


def test_windows_of_longer_clips():
    flow = torch.zeros(18, 2, 32, 48)
    flow[:, 0] = 1.0  # of 32 pixels: 8 of 256
    found = metrics.tracked_features(chain_flow, flow)
    assert found.shape == (3, 1024)
    assert found[0, :512].sum() == pytest.approx(15 * 400 * 4 / 8)  # log2(9) rounded up
    with pytest.raises(ValueError, match="15 frames, FVMD needs 16"):
        metrics.tracked_features(chain_flow, flow[:15])


# ------------------------------------------------------------------------------------------------------------ trackers


def test_lucas_kanade_follows_a_texture():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    frames = []
    for t in range(6):
        a, b = x - 1.3 * t, y + 0.6 * t
        frames.append(torch.stack([(a / 3).sin() * (b / 4).cos(), (a / 5 + b / 3).sin(), (b / 3.5 - a / 6).cos()]))
    points = torch.cartesian_prod(torch.arange(20.0, 44, 4), torch.arange(16.0, 32, 4))
    tracks = lucas_kanade(torch.stack(frames) * 0.7, points)
    expected = points + torch.arange(6.0)[:, None, None] * torch.tensor([1.3, -0.6])
    assert (tracks - expected).norm(dim=-1).max() < 0.1


def texture(picture):
    """Smaller eigenvalue of the structure tensor: large at corners, small on plain faces and along edges."""
    across, down = ((picture.roll(-1, d) - picture.roll(1, d)) / 2 for d in (-1, -2))
    products = torch.stack([(across**2).sum(0), (down**2).sum(0), (across * down).sum(0)])
    a, b, c = torch.nn.functional.avg_pool2d(products, 7, 1, 3)
    return (a + b) / 2 - (((a - b) / 2) ** 2 + c**2).sqrt()


def test_lucas_kanade_against_exact_tracks_of_what_has_texture():
    """At the 10 frames a second of our clips, things move by several pixels, and plain faces are hard to follow."""
    found = []
    for scenario in ("collide", "link"):
        clip = simulated(scenario, 1, rate=10)
        x, y = object_pixels(clip).T
        corner = texture(clip.tensors()["rgb"][0])[y, x]
        found.append(tracking_errors(clip, object_pixels(clip)[corner > corner.quantile(0.7)]))
    errors, steps = torch.cat(found, dim=1)
    assert errors.median() < 0.5 < 1 < steps.median()


def test_lucas_kanade_against_exact_tracks_of_all_that_moves():
    """Every eighth pixel of every object that moves, in all scenarios, at the 30 frames a second of Physion."""
    clips = [simulated(scenario, seed, rate=30) for scenario in simulate.SCENARIOS for seed in (1, 101)]
    errors, steps = torch.cat([tracking_errors(clip, object_pixels(clip)[::8]) for clip in clips], dim=1)
    assert len(errors) > 2000 and errors.median() < 0.5 < steps.median()  # a tracker that stays at rest fails


def test_pips_has_the_published_parameters(tmp_path):
    torch.manual_seed(0)
    model = Pips().eval()
    state = model.state_dict()
    assert len(state) == 82 and sum(v.numel() for v in state.values()) == 17_565_410
    assert state["delta_block.first_block_conv.conv.weight"].shape == (128, 718, 3)
    points = torch.tensor([[20.0, 30.0], [40.0, 33.0]])
    video = torch.rand(4, 3, 64, 64) * 2 - 1
    tracks = model(video, points)
    assert tracks.shape == (4, 2, 2) and torch.equal(tracks[0], points) and torch.isfinite(tracks).all()
    torch.save({"model_state_dict": {"fnet.conv1.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        Pips.load(tmp_path / "other.pth")


class Logits(torch.nn.Module):
    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.dtype == torch.uint8
        return x.float().mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]


def test_i3d_is_called_as_published(tmp_path):
    torch.jit.script(Logits()).save(tmp_path / "i3d_torchscript.pt")
    network = metrics.I3D(str(tmp_path / "i3d_torchscript.pt"))
    assert network(torch.ones(10, 3, 8, 8)).tolist() == [[255.0] * 400] and len(network.sha256) == 64
    with pytest.raises(ValueError, match="9 frames"):
        network(torch.ones(9, 3, 8, 8))
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt"):
        metrics.I3D(str(tmp_path / "text.pt"))


# -------------------------------------------------------------------------------------------------------- command line


# Of the models in `folders`.
SIZES = {"vae_factor": 4, "latent_channels": 16, "frames": 16, "width": 32, "height": 16, "sigma_max": 80.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder with random weights, clips of its size, and the models of two rows of Table 1."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("model", "one"):
        tiny_vae().save_pretrained(root / name / "vae")
        tiny_tower().save_pretrained(root / name / "image_encoder")
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        tiny_stage(replace(config, **SIZES), scale=0.02).save_pretrained(root / "model" / name)
    tiny_stage(replace(ONE_STAGE, **SIZES), scale=0.02).save_pretrained(root / "one" / "stage2")
    for seed in (1, 2, 3):
        simulate.simulate("dominoes", seed, 16, (32, 16)).save(root / "data" / f"{seed}.safetensors")
    return root


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_all_metrics_of_a_model_folder(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(frechet, "SET_RESAMPLES", 3)
    monkeypatch.setattr(frechet, "FEWEST", 2)
    monkeypatch.setattr(metrics.features, "lucas_kanade", partial(lucas_kanade, levels=1, iterations=1))
    told = ["--model", folders / "model", "--data", folders / "data", "--cache", tmp_path, "--sampling-steps", 1]
    told += ["--batch", 2, "--quiet", "--json", tmp_path / "all.json", "--clips", 2]
    run(monkeypatch, *told, "--metrics", "physics,fvd,fvmd,demo", "--samples", 2, "--trackers", "lk,flow,exact")
    printed = capsys.readouterr().out
    for text in ("nothing moves", "truth through the VAE", "best of 2", "FVMD (Lucas-Kanade)", "rfvd_mot (not FVD)"):
        assert text in printed
    assert printed.count("its tracks of the truth against exact tracks") == 2
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["settings"]["clips"] == 2 and len(result["settings"]["weights"]) == 12
    rules = result["settings"]["rules"]
    assert rules["SET_RESAMPLES"] == 3 and rules["MOVING"] == 0.1 and rules["TILT"] == 30  # what was counted by
    still = result["figures"]["still"]
    assert still["epe_relative"]["value"] == pytest.approx(1) and still["standing"]["value"] == 1
    assert result["figures"]["truth"]["all_right_ids"]["clips"] == 2
    for name in ("FVMD (Lucas-Kanade) ↓", "rfvd_mot (not FVD) ↓"):
        assert result["figures"]["truth"][name]["value"] == pytest.approx(0, abs=1e-6)
        assert name in result["figures"]["half"]
    demo = {"psnr", "psnr_own", "painted_ids", "both_ways", "hit", "fallen_carried"}
    stay = {"quiet", "standing"}  # this model cannot be told to stay
    for source in ("model", "still", "codec", "truth"):
        assert demo <= result["figures"][source].keys()
        assert result["figures"][source].keys() & stay == (set() if source == "model" else stay)
    (line,) = (line for line in printed.splitlines() if "objects that stay standing" in line)
    assert line.split(" | ")[1:4] == ["-", "-", "1.000 [1.000, 1.000]"]  # the model, its best of 2, nothing moves


# ------------------------------------------------------------------------------------- what a model is told of a clip


SETTINGS = {"sampling_steps": 1, "guidance": [1.0, 1.0], "seed": 0, "batch": 8, "marked": "all"}


@pytest.fixture
def told(monkeypatch):
    """Of every sample: what is predicted, Told, and the Condition that reaches the network."""
    calls, tell, control = [], MotionDreamer.tell, MotionDreamer.control

    def tell_and_record(self, told, *rest):
        calls.append([self.config.predict, told])
        return tell(self, told, *rest)

    def control_and_record(self, condition, frames):
        calls[-1].append(condition)
        return control(self, condition, frames)

    monkeypatch.setattr(MotionDreamer, "tell", tell_and_record)
    monkeypatch.setattr(MotionDreamer, "control", control_and_record)
    return calls


def sampler(cache, stage1=STAGE1, stage2=STAGE2, **settings):
    """A sampler of a model with random weights."""
    stages = []
    for config in (stage1, stage2):
        torch.manual_seed(0)
        config = replace(config, **SIZES)
        stages.append(randomize(stage_class(config)(config, UNET_CONFIG), scale=0.02))
    model = evaluate.Model(*stages, tiny_vae(), tiny_tower())
    return evaluate.Sampler(model, cache, SETTINGS | settings)


def told_stage(config, told=True):
    return SmallStageConfig(**vars(config), told=told)


def test_a_model_in_half_precision_makes_nearly_the_same(folders, tmp_path):
    """As on a GPU, where everything but the VAE's encoder takes half the memory."""
    scenes, made = [truth_of(folders / "data" / "1.safetensors", 16, "cpu")], []
    for half in (False, True):
        model = evaluate.Model.load(folders / "model", "cpu", half)
        kinds = [{value.dtype for value in part.parameters()} for part in (model.stage1, model.stage2, model.tower)]
        assert kinds == [{torch.bfloat16 if half else torch.float32}] * 3
        assert {value.dtype for value in model.vae.encoder.parameters()} == {torch.float32}
        some = evaluate.Sampler(model, tmp_path / str(half), SETTINGS)
        (motion,), (video,), (codec,) = (some.make(scenes, kind) for kind in ("arrow", "rgb_own", "codec/arrow"))
        made.append([motion["flow"], motion["depth"], video["rgb_own"], codec["rgb"], codec["flow"]])
    for full, half in zip(*made, strict=True):
        assert full.dtype == half.dtype == torch.float32
        assert not torch.equal(full, half) and (full - half).square().mean() < 0.01 * full.var()


def test_every_clip_of_a_batch_is_told_its_own(folders, tmp_path, told):
    """Frame rate and camera; the motion bucket only where the true motion is known anyway."""
    rates, buckets = torch.tensor([5.0, 12.0]), torch.tensor([40.0, 200.0])
    cameras = torch.tensor([[0.5, -1.0], [-0.25, 2.0]])
    for i in (0, 1):
        clip = Clip.load(folders / "data" / f"{i + 1}.safetensors")
        clip = replace(clip, fps=rates[i].item(), camera=cameras[i].numpy(), meta={"motion_bucket": buckets[i].item()})
        clip.save(tmp_path / f"{i}.safetensors")
    scenes = [truth_of(path, 16, "cpu") for path in sorted(tmp_path.glob("*.safetensors"))]
    some = sampler(tmp_path / "cache")
    for kind, bucket in (("arrow", [127, 127]), ("rgb", buckets.tolist()), ("rgb_own", [127, 127])):
        some.make(scenes, kind)
        *_, condition = told[-1]
        assert torch.equal(condition.camera, cameras)
        assert torch.equal(condition.added_ids[:, 0], rates - 1)
        assert condition.added_ids[:, 1].tolist() == bucket
    assert [predict for predict, *_ in told] == [STAGE1.predict, ("rgb",), ("rgb",)]


def test_of_both_drives_the_ego_motion_and_every_cars_first_step_are_told(tmp_path, told):
    """And both go through the VAE, with ids and depth, by which they are judged."""
    path = tmp_path / "driving.safetensors"
    simulate.simulate("driving", 9_000_101, 16, (32, 16), {"ego": 1}).save(path)
    scene, some = truth_of(path, 16, "cpu"), sampler(tmp_path / "cache")
    evaluate.add_other_pushes(scene, tmp_path, "cpu")
    assert scene.meta["opposite"]["told"]["ego"] == -1
    cameras = []
    for kind in ("arrow", "opposite"):
        maps = scene.truth[kind]
        some.make([scene], kind)
        _, given, condition = told[-1]
        cameras.append(condition.camera[0])
        assert torch.equal(cameras[-1], maps["camera"])
        first = instance_flow(maps["flow"], maps["segmentation"], "start")
        assert torch.equal(given.F[0], first) and torch.equal(given.mask[0], (maps["segmentation"][:1] > 0).float())
        assert {"segmentation", "depth"} <= some.make([scene], f"codec/{kind}")[0].keys()
    assert cameras[0][0] > cameras[1][0] + 0.1


def test_only_a_stage_that_sees_what_is_told_is_told_to_stay(clips, tmp_path, told):
    for clip in clips[:2]:
        evaluate.add_other_pushes(clip, tmp_path, "cpu")
    seeing, plain = (sampler(tmp_path / str(seen), told_stage(STAGE1, seen)) for seen in (True, False))
    for some in (plain, sampler(tmp_path / "paper"), seeing):
        views = evaluate.generated(clips[:2], some, evaluate.PUSHES, 0)
        pushes = {"arrow", "opposite", "stronger"} | ({"none"} if some is seeing else set())
        assert [view.keys() for view in views] == [pushes, pushes]
        figures = metrics.demo_figures(views[0], clips[0])
        assert {"both_ways", "sooner", "psnr_own"} <= figures.keys()
        assert figures.keys() & {"standing", "quiet"} == ({"standing", "quiet"} if some is seeing else set())
    _, none, condition = told[-3]  # then come two videos
    ids = torch.stack([clip.truth["arrow"]["segmentation"][0] for clip in clips[:2]])[:, None]
    assert (none.F == 0).all() and torch.equal(none.mask, (ids > 0).float())
    assert torch.equal(condition.first_pictures[:, 9:], none.mask)  # the network sees it
    _, arrow, _ = told[-6]
    pushed = ids == torch.tensor([clip.pushed for clip in clips[:2]]).view(2, 1, 1, 1)
    assert torch.equal(arrow.mask, pushed.float()) and torch.equal((arrow.F != 0).any(1, keepdim=True), pushed)


def test_where_nobody_pushes_all_are_told_to_stay(clips, tmp_path, told):
    assert clips[2].pushed == 0
    sampler(tmp_path, told_stage(STAGE1)).make(clips[2:], "arrow")
    ids = clips[2].truth["arrow"]["segmentation"][0]
    assert (told[-1][1].F == 0).all() and torch.equal(told[-1][1].mask[0, 0], (ids > 0).float())


def test_a_sparse_stage_gets_eight_points_of_the_pushed_object(clips, tmp_path, told):
    sparse = [replace(config, control="sparse_flow") for config in (STAGE1, STAGE2)]
    some = sampler(tmp_path, *sparse)
    for kind in ("arrow", "rgb_own"):
        some.make(clips, kind)
        for F, clip in zip(told[-1][2].F, clips, strict=True):
            ids, points = clip.truth["arrow"]["segmentation"][0], (F != 0).any(dim=0)
            assert points.sum() == (8 if clip.pushed else 0)
            assert (ids[points] == clip.pushed).all() and (ids == clip.pushed).sum() > 8
    assert len(told) == 2


def test_only_the_pushed_object_is_marked(folders, clips, monkeypatch, tmp_path, told):
    """S_0 and, of the true motion, S_t hold it alone; the arrow and all else stay."""
    scenes = [truth_of(clip.path, 16, "cpu", "pushed") for clip in clips]
    for scene, clip in zip(scenes, clips, strict=True):
        assert scene.meta == {"arrow": clip.meta["arrow"]}
        whole, alone = clip.truth["arrow"], scene.truth["arrow"]
        ids = whole["segmentation"]
        kept = ids == clip.pushed if clip.pushed else ids > 0
        assert torch.equal(alone["segmentation"], ids * kept) and all(
            torch.equal(alone[name], whole[name]) for name in whole.keys() - {"segmentation", "rgb_own", "told"}
        )
        for config in (STAGE1, replace(STAGE1, reduce="start")):
            arrows = (sampler_room.one_arrow(some, "arrow", config)[0] for some in (scene, clip))
            assert torch.equal(*arrows)
    assert clips[0].pushed and set(scenes[0].truth["arrow"]["segmentation"].unique().tolist()) == {0, clips[0].pushed}

    sampler(tmp_path).make(clips[:1], "codec/arrow")  # another marking, in the same cache
    some = sampler(tmp_path, marked="pushed")
    assert set(some.make(scenes[:1], "codec/arrow")[0]["segmentation"].unique().tolist()) == {0, clips[0].pushed}
    painted = []
    encode = MotionDreamer.encode
    monkeypatch.setattr(
        MotionDreamer, "encode", lambda self, name, maps, *rest: painted.append(maps) or encode(self, name, maps, *rest)
    )
    made = some.make(scenes[:1], "arrow")[0]
    assert torch.equal(told[-1][1].segmentation[0], scenes[0].truth["arrow"]["segmentation"][0])
    assert set(made["segmentation"].unique().tolist()) <= {0, clips[0].pushed}
    some.make(scenes[:1], "rgb")
    assert torch.equal(painted[-1]["segmentation"][0], scenes[0].truth["arrow"]["segmentation"])
    assert torch.equal(painted[-1]["flow"][0], clips[0].truth["arrow"]["flow"])


def test_marked_pushed_from_the_command_line(folders, monkeypatch, capsys, tmp_path):
    told = ["--model", folders / "model", "--data", folders / "data", "--cache", tmp_path, "--sampling-steps", 1]
    told += ["--batch", 2, "--quiet", "--json", tmp_path / "all.json", "--clips", 2, "--metrics", "demo,physics"]
    results = []
    for marked in ("all", "pushed"):  # with one cache
        run(monkeypatch, *told, "--marked", marked)
        assert f"objects marked: {marked};" in capsys.readouterr().out
        results.append(json.loads((tmp_path / "all.json").read_text()))
        truth = results[-1]["figures"]["truth"]
        assert truth["iou_mean"]["value"] == truth["all_right_ids"]["value"] == 1 and results[-1]["settings"]["marked"]
    for source in ("model", "codec", "still"):
        every, alone = (result["figures"][source] for result in results)
        assert every["ids_miou"]["value"] != alone["ids_miou"]["value"]
        assert every["epe_all"]["clips"] == alone["epe_all"]["clips"] == 2
    assert every["epe_all"] == alone["epe_all"]  # of "still": the flow's truth is the same
    assert every["iou_last"] != alone["iou_last"]


@pytest.mark.parametrize("stages", ["two", "one"])
def test_the_best_of_several_is_the_nearest(clips, monkeypatch, stages):
    """By flow, or by the video if there is no flow; the best is not the first, and another one for each clip."""
    scenes, names = clips[:2], ("flow", "rgb_own") if stages == "two" else ("rgb_own",)
    truth = [scene.truth["arrow"] | {"rgb_own": scene.truth["arrow"]["rgb"]} for scene in scenes]
    worse = [frozen(maps) for maps in truth]
    worse = [maps | {"rgb_own": maps["rgb"]} for maps in worse]
    tries = [[worse[0], worse[1]], [worse[0], truth[1]], [truth[0], worse[1]]]

    def generated(scenes, sampler, pushes, seed):
        return [{"arrow": {name: maps[name] for name in names} | {"told": None}} for maps in tries[seed]]

    monkeypatch.setattr(evaluate, "generated", generated)
    arguments = argparse.Namespace(metrics=["physics"], samples=3)
    rows = evaluate.measure(scenes, None, arguments, metrics.Features({}), alone=True)
    assert rows.keys() == {"model", "best of 3"}
    for scene, true, wrong, best, mean in zip(scenes, truth, worse, rows["best of 3"], rows["model"], strict=True):
        right, bad = (metrics.physics_figures({"arrow": {n: m[n] for n in names}}, scene) for m in (true, wrong))
        assert best == right != bad
        assert mean["fallen_video"] == tuple(np.add(right["fallen_video"], 2 * np.array(bad["fallen_video"])))


def test_the_best_where_nothing_moves_is_the_quietest(clips):
    flow = clips[2].truth["arrow"]["flow"]
    errors = [evaluate.error_of({"arrow": {"flow": flow + by}}, clips[2]) for by in (2.0, 1.0)]
    assert errors[1] < errors[0]


# ----------------------------------------------------------------------------------- clips that nobody simulated


def test_clips_of_any_origin(folders, monkeypatch, capsys, tmp_path):
    """A trial of Physion as clips.physion writes it, a video without ids and depth, squares that vanish, dominoes: what
    a clip lacks is left out and named; what it has is counted with the others'."""
    from test_physion import Spheres, trial, write_trial

    for part in ("vae", "image_encoder"):
        shutil.copytree(folders / "model" / part, tmp_path / "model" / part)
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        tiny_stage(replace(config, **SIZES | {"frames": 4}), scale=0.02).save_pretrained(tmp_path / "model" / name)
    data, path = tmp_path / "data", write_trial(tmp_path / "trial.hdf5", Spheres(16, 32, False), frames=5, view=0)
    trial(path, frames=4).save(data / "a.safetensors")
    squares = replace(moving_squares(3, 4, 16, 32), meta={"scenario": "video"})
    nothing = {"segmentation": squares.segmentation * 0, "depth": squares.depth * 0 + 1}
    replace(squares, **nothing).save(data / "b.safetensors")
    squares.segmentation[2:] = 0
    squares.save(data / "c.safetensors")
    simulate.simulate("dominoes", 1, 4, (32, 16)).save(data / "d.safetensors")

    monkeypatch.setattr(metrics.motion, "RESAMPLES", 20)
    told = ["--model", tmp_path / "model", "--data", data, "--sampling-steps", 1, "--quiet", "--batch", 4]
    run(monkeypatch, *told, "--json", tmp_path / "e.json")
    last = capsys.readouterr().out.splitlines()[-1]
    lacks = "depth (1 clip), ids (1 clip), other pushes (3 clips), who is hit (3 clips)"
    assert last.endswith(f"Left out where a clip lacks the truth: {lacks}.")
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["settings"]["lacking"] == {"ids": 1, "depth": 1, "who is hit": 3, "other pushes": 3}
    for source in ("model", "still", "codec", "truth"):
        figures = result["figures"][source]
        counts = {"epe_all": 4, "psnr": 4, "iou_last": 3, "painted_ids": 3, "depth_absrel": 3, "both_ways": 1}
        assert {name: figures[name]["clips"] for name in counts} == counts
    truth = result["figures"]["truth"]
    assert truth["iou_last"]["value"] == truth["both_ways"]["value"] == 1 and truth["depth_absrel"]["value"] == 0
    assert result["figures"]["still"]["iou_last"]["value"] < 1
    by_name = {name: found["truth"].keys() for name, found in result["scenarios"].items()}
    assert by_name.keys() == {"physion", "video", "dominoes", "mean"}
    assert {"both_ways", "hit"} <= by_name["dominoes"] and not {"both_ways", "hit"} & (
        by_name["physion"] | by_name["video"]
    )


# ------------------------------------------------------------------------------------------------ samples that are kept


def test_samples_are_kept(folders, monkeypatch, capsys, tmp_path):
    told = ["--model", folders / "model", "--data", folders / "data", "--cache", tmp_path, "--sampling-steps", 1]
    told += ["--batch", 2, "--quiet", "--metrics", "physics", "--json", tmp_path / "all.json"]
    run(monkeypatch, *told)
    printed = capsys.readouterr().out
    monkeypatch.setattr(sampler_room, "dream", None)
    run(monkeypatch, *told)
    assert capsys.readouterr().out == printed
    with pytest.raises(TypeError):  # other settings need other samples
        run(monkeypatch, *told, "--seed", 1)


def test_a_bar_moves_while_a_batch_is_sampled(folders, tmp_path, capsys):
    """The bar of the batches stands still meanwhile."""
    scenes = [truth_of(folders / "data" / "1.safetensors", 16, "cpu")]
    asked = sampler(tmp_path)
    asked.make(scenes, "arrow", 1)
    assert "arrow" not in capsys.readouterr().err  # --quiet
    asked.quiet = False
    asked.make(scenes, "arrow", 2)
    assert "arrow: " in capsys.readouterr().err


def test_another_stage_2_leaves_the_samples_of_stage_1(folders, monkeypatch, capsys, tmp_path):
    shutil.copytree(folders / "model", tmp_path / "model")
    told = ["--model", tmp_path / "model", "--data", folders / "data", "--cache", tmp_path, "--sampling-steps", 1]
    told += ["--quiet", "--metrics", "physics", "--clips", 1, "--json", tmp_path / "all.json"]
    run(monkeypatch, *told)
    stages, dream = [], sampler_room.dream
    monkeypatch.setattr(sampler_room, "dream", lambda *a, **k: stages.append(a[0] is None) or dream(*a, **k))
    for stage, config in (("stage2", STAGE2), ("stage1", STAGE1)):
        tiny_stage(replace(config, **SIZES), scale=0.03).save_pretrained(tmp_path / "model" / stage)
        run(monkeypatch, *told)
    assert stages == [True, False, True]  # only Stage II; then Stage I, and Stage II since its motion is another
    config = tmp_path / "model" / "stage1" / "config.json"  # the same weights, told another arrow
    config.write_text(config.read_text().replace('"reduce": "instance"', '"reduce": "start"'))
    run(monkeypatch, *told)
    assert stages[3:] == [False, True]


def test_table_1(folders, monkeypatch, capsys, tmp_path):
    commands = []

    def train(folder, stage, told, quiet):
        commands.append((folder.name, stage, told))
        source = folders / ("one" if folder.name.endswith("one_stage") else "model")
        shutil.copytree(source, folder, dirs_exist_ok=True)

    monkeypatch.setattr(tables, "train", train)
    monkeypatch.setattr(frechet, "SET_RESAMPLES", 3)
    monkeypatch.setattr(frechet, "FEWEST", 1)
    told = [
        "--trackers",
        "flow",
        "--data",
        folders / "data",
        "--val",
        folders / "data",
        "--cache",
        tmp_path,
        "--runs",
        tmp_path / "runs",
    ]
    run(monkeypatch, "--table", 1, *told, "--sampling-steps", 1, "--quiet", "--clips", 1, "--json", tmp_path / "t.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| method | paper: FVD ↓ | paper: FVMD ↓ |") and "FVMD (chained flow)" in lines[0]
    assert lines[2].startswith("| One-stage* | 173.0 | 224.3 | - | - |")  # it has neither flow nor ids
    assert lines[4].startswith("| Ours | 157.8 | 205.1 |")
    assert ("tiny-3000-0-one_stage", "one") in [c[:2] for c in commands]
    assert {c[1] for c in commands if c[0].endswith("sparse_flow")} == {"1", "2"}
    assert lines[5].startswith("| nothing moves |") and lines[8].startswith("| truth |")
    assert lines[9].startswith("| half of the truth and the other | ")
    assert lines[11].startswith("| difference from Ours | ") and lines[13].startswith("| One-stage* | - | ")
    found, wanted = (json.loads((tmp_path / "t.json").read_text())[name] for name in ("means", "differences"))
    assert wanted.keys() == {"one_stage", "sparse_flow"} and wanted["one_stage"]["hit_video"]["better"] is None
    means = [found[row]["epe_relative"]["value"] for row in ("sparse_flow", "motion_dreamer")]
    assert wanted["sparse_flow"]["epe_relative"]["value"] == pytest.approx(means[0] - means[1])


def test_rows_of_another_codec_are_not_taken(folders, monkeypatch, tmp_path):
    """Their stages know other latents."""
    shutil.copytree(folders / "model", tmp_path / "codec")
    words = ["evaluate.py", "--table", "1", "--data", "x", "--val", "x", "--runs", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--codec", str(tmp_path / "codec")])
    monkeypatch.setattr(tables, "train", lambda *_: None)
    arguments = evaluate.parse_arguments()
    evaluate.fill_in(arguments)
    for _ in range(2):
        folder = tables.train_row("motion_dreamer", arguments)
    config = tmp_path / "codec" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": ', '"scaling_factor": 1'))
    with pytest.raises(ValueError, match=rf"{folder}/vae: is another one than that of .*codec: take another --runs"):
        tables.train_row("motion_dreamer", arguments)


def test_rows_of_a_table_share_what_is_the_same(folders, monkeypatch, tmp_path):
    """The codec comes from --codec, and a Stage II that is configured as the full model's is that one."""
    commands = []

    def train(folder, stage, told, quiet):
        commands.append((folder.name, stage))
        assert ("--minutes" in told, "--steps" in told) == ((True, False) if "min" in folder.name else (False, True))
        assert "--set" in told and (folder / "vae").exists()
        shutil.copytree(folders / "model" / f"stage{stage}", folder / f"stage{stage}", dirs_exist_ok=True)

    monkeypatch.setattr(tables, "train", train)
    told = ["--table", 3, "--data", "data", "--val", "val", "--codec", folders / "model", "--runs", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, told), "--steps", "5", "--set", "mask_ratio=0.7"])
    arguments = evaluate.parse_arguments()
    folder = tables.train_row("without_motion_loss", arguments)
    full = "tiny-5-0-motion_dreamer"
    assert commands == [("tiny-5-0-without_motion_loss", "1"), (full, "1"), (full, "2")]
    assert (folder / "stage2" / "config.json").exists()
    tables.train_row("without_flow", arguments)
    assert [c[1] for c in commands[3:]] == ["1", "2"]
    arguments.minutes = 0.5
    assert tables.train_row("without_depth", arguments).name == "tiny-0.5min-0-without_depth"


def stand_in(monkeypatch, folder, rows_of):
    """In the place of what trains a row and measures it: figures of every clip, by the row's arguments and folder."""

    def evaluated(*told):
        rows = rows_of(*told)
        figures = {source: metrics.summarise(rows) for source in evaluate.BESIDE}
        return {"figures": figures, "settings": SETTLED, "row": metrics.Row([rows], [{}])}

    monkeypatch.setattr(evaluate, "train_row", lambda row, arguments: folder / row)
    monkeypatch.setattr(metrics, "check_sets", lambda *_: None)
    monkeypatch.setattr(evaluate, "ClipDataset", lambda _: HeldOut())
    monkeypatch.setattr(evaluate, "evaluate", evaluated)


def test_several_seeds_are_trained_and_averaged(monkeypatch, capsys, tmp_path):
    """Each seed of a row is compared with the same seed of ours."""
    asked = []

    def evaluated(arguments, folder, shared):
        asked.append((folder.name, arguments.seed))
        far = arguments.seed + 10 * (folder.name != "motion_dreamer")
        return [{"hit": (float(far), 1.0)}] * 9

    stand_in(monkeypatch, tmp_path, evaluated)
    told = ["--table", 1, "--data", "d", "--val", "v", "--runs", "r", "--seeds", 3, "--seed", 4]
    run(monkeypatch, *told, "--json", tmp_path / "t.json", "--minutes", 0.5)
    assert asked == [(row, seed) for row in ("one_stage", "sparse_flow", "motion_dreamer") for seed in (4, 5, 6)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| One-stage* | 173.0 | 224.3 | 15.0 [14.0, 16.0]")
    assert lines[-3].endswith("| 10.0 [10.0, 10.0] better |") and "0.5 minutes a stage, trainings: 3" in lines[-1]
    written = json.loads((tmp_path / "t.json").read_text())["rows"]["one_stage"]
    assert len(written) == 3 and all(found.keys() == {"figures", "settings"} for found in written)


def test_table_2_measures_the_same_models_told_and_told_nothing(monkeypatch, capsys, tmp_path):
    asked = []

    def evaluated(arguments, folder, shared):
        asked.append((folder.name, arguments.told))
        return [{"hit": (1.0 + (arguments.told == "arrow"), 1.0), "iou_last": (0.0, 0.0)}] * 9

    stand_in(monkeypatch, tmp_path, evaluated)
    run(monkeypatch, "--table", 2, "--data", "d", "--val", "v", "--runs", "r", "--seeds", 1)
    rows = ("one_stage", "sparse_flow", "motion_dreamer")
    assert asked == [(row, told) for told in ("arrow", "nothing") for row in rows]
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| Ours | 272.2 | 2913.0 | 2.000 ") and "Vista: 285.8, 3557" in lines[7]
    assert lines[0].count(" | ") == 3  # what is asked of no clip has no column
    assert lines[-3].endswith("| -1.000 [-1.000, -1.000] worse |") and "drives of its own" in lines[-1]


def test_told_nothing_is_no_arrow_and_no_camera(tmp_path, told):
    path = tmp_path / "driving.safetensors"
    simulate.simulate("driving", 9_000_101, 16, (32, 16)).save(path)
    scene, seen = truth_of(path, 16, "cpu"), []
    for settings in ({}, {"told": "nothing"}):  # with one cache
        some = sampler(tmp_path / "cache", told_stage(STAGE1), told_stage(STAGE2), **settings)
        seen.append(some.make([scene], "arrow")[0]["flow"])
        some.make([scene], "rgb_own")
    assert not torch.equal(*seen) and len(told) == 4
    for _, given, condition in told[:2]:
        assert given.F.any() and given.mask.any() and condition.camera.any()
    for _, given, condition in told[2:]:
        assert not (given.F.any() or given.mask.any() or condition.camera.any())


PAPERS = ["--data", "d", "--val", "v", "--init", "xt", "--dry-run", "--steps", 7200, "--runs", "runs/table"]


def trainings(monkeypatch, lines):
    """What train.py reads of its commands."""
    import train

    for line in (line for line in lines if "train.py" in line):
        monkeypatch.setattr(sys, "argv", ["train.py", *line.split("train.py ")[1].split()])
        found = train.parse_arguments()
        assert (found.frames, found.init, found.batch, found.steps) == (25, "xt", 1, 7200)
        yield found


@pytest.mark.parametrize("number", tables.TABLES)
def test_commands_at_the_papers_scale(monkeypatch, capsys, number):
    """Every command is one that its script reads; rows that share a stage share its training; and nothing is made."""
    told = ["--table", number, *PAPERS]
    run(monkeypatch, *told)
    lines = capsys.readouterr().out.splitlines()
    stages = [(Path(found.out).name, found.stage) for found in trainings(monkeypatch, lines)]
    names = [row for row in tables.TABLES[number] if not row.endswith(" untold")]
    assert len(set(stages)) == len(stages) and {name for name, _ in stages} == set(names)
    copied = [line for line in lines if line.startswith("cp ")]
    assert copied == ["cp -r runs/table/motion_dreamer/stage2 runs/table/without_motion_loss/"] * (number == 3)
    assert len(stages) == 2 * len(names) - ("one_stage" in names) - len(copied)
    assert lines[-1].startswith(f"Estimated: {len(stages) * 7200 * 0.5 * 25 / 14 / 3600:.0f} hours")
    for line in (line for line in lines if "evaluate.py" in line):
        monkeypatch.setattr(sys, "argv", line.split("python ")[1].split())
        evaluate.fill_in(evaluate.parse_arguments())
    with pytest.raises(SystemExit):
        run(monkeypatch, *told, "--frames", 14)
    assert "--frames 14: FVMD needs 16; SVD's 14 do not suffice" in capsys.readouterr().err


def test_commands_of_an_unseen_world(worlds, monkeypatch, capsys, tmp_path):
    """They are those of the rows, on folders of links that the first of them makes."""
    monkeypatch.chdir(tmp_path)
    told = [*PAPERS, "--data", worlds / "data", "--val", worlds / "val", "--runs", "r"]
    run(monkeypatch, "--leave-out", "drop", *told)
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())
    found = list(trainings(monkeypatch, lines))
    rows = [
        (f"r/{row}_drop/clips", f"r/{row}_drop/motion_dreamer", stage) for row in ("with", "without") for stage in "12"
    ]
    assert [(each.data, each.out, each.stage) for each in found] == rows
    assert {each.val for each in found} == {"r/only_drop/clips"}
    assert [line.split(" --metrics")[0] for line in lines if "evaluate.py" in line] == [
        f"python evaluate.py --model r/{row}_drop/motion_dreamer --data r/only_drop/clips"
        for row in ("with", "without")
    ]
    assert "4 trainings of 7200 steps" in lines[-1] and "meta names scenarios" in lines[-2]
    (made,) = (line for line in lines if line.startswith("python -c"))
    exec(made.split('"')[1])
    assert not any(name.startswith("drop") for name in names_in(tmp_path / "r" / "without_drop" / "clips"))


# ------------------------------------------------------------------------------------------------------ unseen worlds


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Clips of three scenarios to learn from, and of two to measure by; which one a clip is of, its meta says."""
    root = tmp_path_factory.mktemp("worlds")
    for folder, counts in (("data", {"roll": 6, "drop": 4, "tower": 2}), ("val", {"drop": 2, "roll": 1})):
        for k, name in enumerate(name for name, count in counts.items() for _ in range(count)):
            clip = moving_squares(k, 16, 16, 32)
            replace(clip, meta={"scenario": name}).save(root / folder / f"{name}{k}.safetensors")
    return root


def names_in(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_who_learns_from_which_clips(worlds, tmp_path):
    """As many clips for both; of the one that knows, all scenarios in their proportion."""
    told = ("drop", str(worlds / "data"), str(worlds / "val"))
    tables.link_clips(*told, str(tmp_path / "r"))
    found = {row: names_in(tmp_path / "r" / f"{row}_drop" / "clips") for row in ("with", "without", "only")}
    count = {
        row: [sum(n.startswith(s) for n in names) for s in ("roll", "drop", "tower")] for row, names in found.items()
    }
    assert count["without"] == [6, 0, 2] and count["only"] == [0, 2, 0]
    assert sum(count["with"]) == 8 and count["with"] == pytest.approx([4, 2.7, 1.3], abs=1)
    for row, source in (("with", "data"), ("without", "data"), ("only", "val")):
        folder = tmp_path / "r" / f"{row}_drop" / "clips"
        assert (folder / ".cache").resolve() == worlds / source / ".cache"  # latents and samples are made once
        assert all((folder / name).resolve() == worlds / source / name for name in found[row])
    tables.link_clips(*told, str(tmp_path / "r"))  # again: they are there
    (tmp_path / "r" / "without_drop" / "clips" / found["without"][0]).unlink()
    with pytest.raises(ValueError, match="without_drop/clips: was made of other clips .* take another --runs"):
        tables.link_clips(*told, str(tmp_path / "r"))


def test_a_world_of_one_clip_is_known(tmp_path):
    for k, name in enumerate(["tower"] + 5 * ["roll"]):
        replace(moving_squares(k, 2, 16, 32), meta={"scenario": name}).save(tmp_path / f"{k}.safetensors")
    assert tmp_path / "0.safetensors" in tables.leave_out("tower", str(tmp_path), str(tmp_path))["with"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--leave-out", "dropp"], "no clip of {data} is of that scenario; there are: drop (4), roll (6), tower (2)"),
        (["--leave-out", "tower"], "no clip of {val} is of that scenario; there are: drop (2), roll (1)"),
        (["--leave-out", "drop", "--data", "{drops}"], "all clips of {drops} are of that scenario"),
        (["--leave-out", "drop"], "measured are 2 clips, a Frechet distance (--metrics fvd,fvmd) needs 8 at least"),
        (["--leave-out", "drop", "--table", "1"], "got --table, --leave-out"),
    ],
)
def test_what_cannot_be_left_out(worlds, monkeypatch, capsys, tmp_path, change, message):
    (tmp_path / "drops").mkdir()
    for path in worlds.glob("data/drop*"):
        shutil.copy(path, tmp_path / "drops")
    places = {"data": worlds / "data", "val": worlds / "val", "drops": tmp_path / "drops"}
    told = ["--data", worlds / "data", "--val", worlds / "val", "--runs", tmp_path / "runs"]
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *told, *(text.format(**places) for text in change))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message.format(**places) in line and not (tmp_path / "runs").exists()


def test_an_unseen_world(worlds, folders, monkeypatch, capsys, tmp_path):
    """Nothing of the second row ever saw it, its VAE neither; all else is the same; killed, it goes on."""
    learned, codecs = {}, set()

    def train(folder, stage, told, quiet):
        words = dict(zip(told[::2], told[1::2], strict=False))
        learned[folder.parent.name, stage] = names_in(Path(words.pop("--data")))
        rest.setdefault(stage, []).append(words)
        if stage != "vae":
            codecs.add((folder / "vae" / "config.json").read_text())
        for part in ("vae", "image_encoder", *(["stage1", "stage2"] if stage != "vae" else [])):
            shutil.copytree(folders / "model" / part, folder / part, dirs_exist_ok=True)

    rest = {}
    monkeypatch.setattr(tables, "train", train)
    monkeypatch.setattr(metrics.motion, "RESAMPLES", 20)
    monkeypatch.setattr(frechet, "SET_RESAMPLES", 3)
    monkeypatch.setattr(frechet, "FEWEST", 2)
    monkeypatch.setattr(metrics.features, "random_features", lambda video, **_: video.double().flatten()[None, :8])
    told = ["--leave-out", "drop", "--data", worlds / "data", "--val", worlds / "val", "--runs", tmp_path / "r"]
    told += ["--trackers", "flow", "--sampling-steps", 1, "--quiet", "--minutes", 0.1, "--cache", tmp_path / "c"]
    run(monkeypatch, *told, "--json", tmp_path / "t.json")
    printed = capsys.readouterr().out
    assert learned.keys() == {("without_drop", "vae")} | {(f"{r}_drop", s) for r in ("with", "without") for s in "12"}
    for (row, _), names in learned.items():
        assert any(name.startswith("drop") for name in names) == (row == "with_drop") and len(names) == 8
    assert all(each == some[0] for some in rest.values() for each in some) and len(codecs) == 1
    lines = printed.splitlines()
    assert lines[0].startswith("| method | mask IoU") and "FVMD (chained flow)" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:9]] == [
        "| knew it", "| never saw it", "| nothing moves", "| truth through the VAE", "| twin", "| truth",
        "| half of the truth and the other",
    ]  # fmt: skip
    assert lines[10].startswith("| difference from knew it |") and lines[12].startswith("| never saw it | 0.000 [0.000")
    assert "2 clips of" in lines[-1] and "Left out: drop. Both rows learn from as many clips" in lines[-1]
    assert json.loads((tmp_path / "t.json").read_text())["differences"].keys() == {"without"}
    monkeypatch.setattr(sampler_room, "dream", None)
    run(monkeypatch, *told)
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, told), "--codec", "demo"])
    arguments = evaluate.parse_arguments()
    arguments.steps, count = 1, len(rest["vae"])
    assert tables.arguments_of("with", 0, arguments).codec == "demo" and len(rest["vae"]) == count
    assert "their VAE is that of demo, whatever it saw" in tables.meant(arguments)


# ------------------------------------------------------------------------------------------------- flags and refusals


class HeldOut(list):
    frames = 16


SETTLED = {
    "clips": 9, "val": "v", "frames": 16, "size": [32, 16], "sampling_steps": 10, "guidance": [1, 1], "seed": 4,
    "marked": "all", "told": "arrow", "weights": "w", "lacking": {},
}  # fmt: skip


def test_what_was_measured_for_one_model_serves_the_next(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(frechet, "SET_RESAMPLES", 3)
    monkeypatch.setattr(frechet, "FEWEST", 2)
    told = ["--data", folders / "data", "--cache", tmp_path, "--sampling-steps", 1, "--quiet", "--clips", 2]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, told), "--model", "x"])
    arguments = evaluate.parse_arguments()
    evaluate.fill_in(arguments)
    arguments.val, arguments.metrics, arguments.trackers = arguments.data, ["fvd", "physics"], ["flow"]
    shared = {}
    first = evaluate.evaluate(arguments, folders / "model", shared)["figures"]
    monkeypatch.setattr(evaluate.Sampler, "codec", None)
    second = evaluate.evaluate(arguments, folders / "one", shared)["figures"]
    for source in ("still", "codec", "truth"):
        assert str(second[source]) == str(first[source])  # nan too
    assert second["model"].keys() < first["model"].keys()
    alone = evaluate.evaluate(arguments, folders / "model", shared)["figures"]
    assert str(alone["model"]) == str(first["model"])


FLAGS = {
    "--val": "v", "--metrics": "physics", "--clips": 3, "--frames": 16, "--stretch": None, "--samples": 2,
    "--marked": "pushed", "--told": "nothing", "--i3d": "f", "--trackers": "lk", "--pips": "f", "--quick": None,
    "--sampling-steps": 3, "--guidance": "1 2", "--batch": 3, "--seed": 3, "--cache": "c", "--json": "j", "--steps": 3,
    "--minutes": 3, "--seeds": 2, "--train-batch": 3, "--preset": "demo", "--precision": "bf16", "--codec": "c",
    "--set": "a=1", "--runs": "r",
}  # fmt: skip
SAMPLES = {"--clips", "--samples", "--marked", "--told", "--i3d", "--trackers", "--pips", "--quick", "--sampling-steps"}
SAMPLES |= {"--guidance", "--batch", "--seed", "--cache", "--json"}
SEEN = {"--clips", "--frames", "--metrics", "--stretch", "--i3d", "--trackers", "--pips", "--quick", "--json"}
TABLE = SAMPLES | {"--val", "--steps", "--minutes", "--seeds", "--train-batch", "--preset", "--precision", "--codec"}
TABLE |= {"--set", "--runs"}


@pytest.mark.parametrize(
    "task, taken",
    [
        (["--model", "m"], SAMPLES | {"--metrics"}),
        (["--table", 1, "--val", "v", "--runs", "r"], TABLE),
        (["--leave-out", "drop", "--val", "v", "--runs", "r"], TABLE),
        (["--videos", "v"], SEEN),
        (["--export-prompts", "p"], {"--clips", "--frames", "--quick"}),
        (["--table", 1, *PAPERS], {"--val", "--frames", "--seed", "--steps", "--set", "--runs"}),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(monkeypatch, task, taken):
    refused = set()
    for flag, value in FLAGS.items():
        words = [*task, flag, *([] if value is None else str(value).split())]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--data", "d", "--quiet"])
        try:
            evaluate.parse_arguments()
        except ValueError as error:
            kind = "dry-run" if "--dry-run" in task else task[0][2:]
            assert str(error).startswith(f"{flag}: of --") and str(error).endswith(f"with --{kind} it would be ignored")
            refused.add(flag)
    assert refused == FLAGS.keys() - taken


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--data", "{empty}"], "no clips"),
        (["--data", "{mixed}"], "the first clip of its folder"),
        (["--data", "{short}"], "4 frames, 16 are needed"),
        (["--metrics", "fid"], "fid"),
        (["--clips", "0"], "1 at least"),
        (["--seed", "-1"], "--seed -1: expected 0 at least"),
        (["--metrics", "fvd", "--i3d", "missing.pt"], "missing.pt"),
        (["--metrics", "fvmd", "--trackers", "pips", "--pips", "missing.pth"], "missing.pth"),
        (["--trackers", "magic"], "magic"),
        (["--json", "nowhere/e.json"], "nowhere"),
        (["--table", "3"], "--table needs --val"),
        (["--table", "3", "--val", "{data}"], "and --runs, where its models are kept"),  # nowhere without being told
        (
            ["--table", "3", "--val", "{data}", "--runs", "r"],
            "3 clips, a Frechet distance (--metrics fvd,fvmd) needs 8",
        ),  # at once
        (["--metrics", "fvmd,fvd"], "3 clips, a Frechet distance (--metrics fvmd,fvd) needs 8"),
        (["--model", "x", "--videos", "x"], "got --model, --videos"),
        (["--table", "3", "--val", "v", "--runs", "r", "--minutes", "0"], "--minutes 0"),
        (["--init", "xt"], "--init SVD and --dry-run"),
        (["--i3d", "x.pt"], "--i3d: of --metrics fvd, without which it would be ignored"),
        (["--trackers", "lk"], "--trackers: of --metrics fvmd"),
        (["--metrics", "fvmd", "--pips", "x.pth"], "--pips: of --trackers pips"),
        (["--videos", "x", "--trackers", "flow"], "--trackers flow: --videos are followed by lk or pips"),
        (["--table", "1", "--val", "v", "--runs", "r", "--minutes", "3", "--steps", "9"], "--steps 9: with --minutes"),
        (
            ["--table", "2", "--val", "v", "--runs", "r", "--told", "nothing"],
            "--told nothing: --table 2 has rows of both",
        ),
    ],
)
def test_one_clear_line(folders, monkeypatch, capsys, tmp_path, change, message):
    if "--i3d" in change or "--pips" in change:
        monkeypatch.setattr(frechet, "FEWEST", 3)
    for name in ("empty", "mixed", "short", "foreign"):
        (tmp_path / name).mkdir()
    shutil.copy(folders / "data" / "1.safetensors", tmp_path / "mixed" / "1.safetensors")
    moving_squares(0, 16, 16, 24).save(tmp_path / "mixed" / "2.safetensors")
    moving_squares(0, 4, 16, 32).save(tmp_path / "short" / "1.safetensors")
    moving_squares(0, 16, 16, 32).save(tmp_path / "foreign" / "1.safetensors")
    told = [] if {"--table", "--videos"} & set(change) else ["--model", folders / "model"]
    told += ["--data", folders / "data", "--quiet"]
    told += ["--cache", tmp_path / "cache"] if "--videos" not in change else []
    places = {path.name: path for path in tmp_path.iterdir()} | {"data": folders / "data"}
    told += ["--json", tmp_path / "e.json", *(text.format(**places) for text in change)]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *told)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("evaluate.py: ") and message in errors[0]
    assert not Path(tmp_path / "e.json").exists()
