"""training/batch.py against loops over pixels and objects, draw by draw; and: training and sampling tell the same."""

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import tiny_stage, tiny_tower, tiny_vae

import motion_dreamer
import training.batch as batch_room
from clips import Clip, ClipDataset, Motion
from motion_dreamer import ONE_STAGE, STAGE1, STAGE2, MotionDreamer, SmallStageConfig, dream
from training.batch import Chances, training_batch
from training.cache import TrainingClips, encode_clips, with_marks

HEIGHT, WIDTH, FRAMES = 14, 22, 3  # 7 x 11 latent cells
SIZES = {"vae_factor": 2, "frames": FRAMES, "height": HEIGHT, "width": WIDTH}
ONE, TWO, SINGLE = (replace(config, **SIZES) for config in (STAGE1, STAGE2, ONE_STAGE))
ALL = Chances(drop=0.0, unmark=0.0)


def small(config, **extras):
    return SmallStageConfig(**(asdict(config) | extras))


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def tower():
    return tiny_tower()


def patchwork(seed, fps=7.0, camera=(0.0, 0.0), bucket=127):
    """Objects 1, 2, 5 and 9 in ragged patches that change from frame to frame, 7 from the second frame on; every
    pixel has a flow of its own, of a size that the object has (9: none in the first step, 5: never)."""
    random = np.random.default_rng(seed)
    ids = random.choice([0, 0, 1, 2, 5, 9], size=(FRAMES, HEIGHT // 2, WIDTH // 2)).repeat(2, 1).repeat(2, 2)
    ids[1:, :3, :3] = 7
    speed = np.zeros(10)
    speed[[1, 2, 9]] = 3, 1, 2
    flow = random.normal(size=(FRAMES, 2, HEIGHT, WIDTH)) * speed[ids][:, None] + speed[ids][:, None]
    flow[0, :, ids[0] == 9] = 0
    return Clip(
        rgb=random.integers(256, size=(FRAMES, HEIGHT, WIDTH, 3)).astype(np.uint8),
        flow=flow.astype(np.float32),
        segmentation=ids.astype(np.uint8),
        depth=random.uniform(2, 9, (FRAMES, HEIGHT, WIDTH)).astype(np.float32),
        camera=np.array(camera, np.float32),
        fps=fps,
        meta={"motion_bucket": bucket},
    )


def encoded(stage, vae, tower, *clips):
    batch = torch.utils.data.default_collate([with_marks(clip.tensors()) for clip in clips])
    return batch | encode_clips(batch, stage, vae, tower)


def many(batch, count):
    """`count` times the one clip of a batch: that many draws at once."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in batch.items()}


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def about(share, p, count):
    """Within four standard deviations."""
    return abs(float(share) - p) <= 4 * (p * (1 - p) / count) ** 0.5


def mean_flow(clip):
    """Eq. 1-3: over the pixels of an object, then over the frames that show it; painted over its first-frame mask."""
    F = np.zeros((2, HEIGHT, WIDTH))
    for i in set(clip.segmentation[0].flat) - {0}:
        means = []
        for t in range(FRAMES):
            pixels = [
                clip.flow[t, :, y, x] for y in range(HEIGHT) for x in range(WIDTH) if clip.segmentation[t, y, x] == i
            ]
            if pixels:
                means.append(np.mean(np.array(pixels, np.float64), axis=0))
        F[:, clip.segmentation[0] == i] = np.mean(means, axis=0)[:, None]
    return F


# -------------------------------------------------------------------------------------- instance flow, hidden and shown


@pytest.mark.parametrize("unit", ["instance", "pixel", "element"])
def test_a_batch_against_loops_over_pixels_and_objects(vae, tower, unit):
    stage = tiny_stage(replace(ONE, mask_unit=unit, mask_ratio=0.4, motion_threshold=1.2))
    clips = [patchwork(seed) for seed in range(3)]
    told = encoded(stage, vae, tower, *clips)
    batch = training_batch(stage, told, vae, drawn(), ALL)

    generator = drawn()
    torch.rand(3, generator=generator)  # who is shown with unmarked objects: none
    shape = {"instance": (3, 256), "pixel": (3, 1, HEIGHT, WIDTH), "element": (3, 2, HEIGHT, WIDTH)}[unit]
    lots = torch.rand(shape, generator=generator).numpy()
    moving = 0
    for b, clip in enumerate(clips):
        full = mean_flow(clip)
        for y in range(HEIGHT):
            for x in range(WIDTH):
                lot = lots[b, clip.segmentation[0, y, x]] if unit == "instance" else lots[b, :, y, x]
                vector = full[:, y, x] * (lot >= 0.4)  # Eq. 9
                np.testing.assert_allclose(batch.condition.F[b, :, y, x], vector, rtol=1e-5, atol=1e-6)
                assert batch.M[b, 0, y, x] == (np.hypot(*vector) > 1.2)  # Eq. 11
                moving += batch.M[b, 0, y, x]
    assert 0 < moving < batch.M.numel()
    expected = torch.cat([told[f"latents.{name}"] for name in ("flow", "segmentation", "depth")], dim=2)
    assert torch.equal(batch.x0, expected)


def test_nothing_is_told_now_and_then_although_objects_move(vae, tower):
    """F = 0 is what section 9 of the supplement samples with."""
    for p, share in ((0.5, 0.5**3), (0.0, 0.0), (1.0, 1.0)):  # three objects move: 1, 2 and 9
        stage = tiny_stage(replace(ONE, mask_ratio=p))
        told = many(encoded(stage, vae, tower, patchwork(0)), 600)
        nothing = (training_batch(stage, told, vae, drawn(), ALL).condition.F == 0).flatten(1).all(dim=1)
        assert about(nothing.float().mean(), share, 600), p


@pytest.mark.parametrize("config", [ONE, TWO, SINGLE])
def test_only_a_stage_that_is_given_the_motion_may_know_how_much_moves(vae, tower, config):
    stage = tiny_stage(config)
    told = many(encoded(stage, vae, tower, patchwork(0, bucket=30)), 600)
    buckets = training_batch(stage, told, vae, drawn(), Chances(drop=0.3, unmark=0.0)).condition.added_ids[:, 1]
    if config.given:
        assert set(buckets.tolist()) == {30, 127} and about((buckets == 127).float().mean(), 0.3, 600)
    else:
        assert set(buckets.tolist()) == {127}


def test_unmarked_objects_are_gone_from_everything_that_shows_objects(vae, tower):
    """As of a clip whose file has them as background, with the same draws; the flow of the scene stays."""
    stage = tiny_stage(small(ONE, told=True))
    clips = [patchwork(seed) for seed in range(5)]
    told = encoded(stage, vae, tower, *clips)
    some = training_batch(stage, told, vae, drawn(), Chances(drop=0.0, unmark=1.0))
    fewer = [replace(clip, segmentation=clip.segmentation.copy()) for clip in clips]
    for b, clip in enumerate(fewer):
        for i in range(256):
            if not told["marked"][b, i]:
                clip.segmentation[clip.segmentation == i] = 0
    assert any((a.segmentation[0] != b.segmentation[0]).any() for a, b in zip(clips, fewer, strict=True))
    expected = training_batch(stage, encoded(stage, vae, tower, *fewer), vae, drawn(), ALL)
    assert torch.equal(some.M, expected.M) and torch.equal(some.x0, expected.x0)
    for name, value in vars(expected.condition).items():
        torch.testing.assert_close(getattr(some.condition, name), value, rtol=0, atol=0, equal_nan=True, msg=name)
    whole = training_batch(stage, told, vae, drawn(), ALL)
    assert torch.equal(whole.x0[:, :, :4], some.x0[:, :, :4])  # O_t
    for part in (whole.x0 - some.x0, whole.condition.F - some.condition.F):
        assert part.abs().max() > 0.1
    assert (whole.condition.first_pictures - some.condition.first_pictures)[:, 3:6].abs().max() > 0.1


def test_some_clips_are_shown_with_unmarked_objects(vae, tower):
    stage = tiny_stage(replace(ONE, mask_ratio=0.0))
    told = many(encoded(stage, vae, tower, patchwork(0)), 600)
    told["marked"] = (torch.arange(256) == 1).expand(600, -1)
    F = training_batch(stage, told, vae, drawn(), Chances(drop=0.0, unmark=0.25)).condition.F
    second = F[:, :, torch.from_numpy(patchwork(0).segmentation[0] == 2)]
    hidden = (second == 0).all(dim=(1, 2))
    assert about(hidden.float().mean(), 0.25, 600) and (second[~hidden] != 0).all()


def test_a_mark_is_never_on_what_the_first_frame_does_not_show():
    """What moves first is marked always; of the others any number, none and all too."""
    counts, moved = set(), 0
    for seed in range(60):
        clip = patchwork(seed)
        marked = set(with_marks(clip.tensors())["marked"].nonzero().flatten().tolist())
        assert marked <= set(clip.segmentation[0].flat) - {0}
        speeds = {i: np.hypot(*clip.flow[0][:, clip.segmentation[0] == i].mean(axis=1)) for i in (1, 2, 5, 9)}
        assert max(speeds, key=speeds.get) in marked
        counts.add(len(marked))
        moved += 9 in marked
    assert counts == {1, 2, 3, 4} and 0 < moved < 60


def test_sparse_control_is_drawn_anew_on_what_is_told_and_leaves_the_motion_mask_alone(vae, tower):
    dense, sparse = tiny_stage(small(ONE, told=True)), tiny_stage(replace(ONE, control="sparse_flow"))
    clips = [patchwork(seed) for seed in range(4)]
    told = encoded(dense, vae, tower, *clips)
    seen = []
    for seed in range(6):
        a, b = (training_batch(stage, told, vae, drawn(seed), Chances(0.0, 0.5)) for stage in (dense, sparse))
        assert torch.equal(a.M, b.M)
        points = (b.condition.F != 0).any(dim=1)
        assert (points.sum(dim=(1, 2)) <= 8).all()
        for row in range(len(clips)):
            for y, x in points[row].nonzero().tolist():
                assert a.condition.first_pictures[row, 9, y, x] == 1  # an object, and not hidden
                assert torch.equal(b.condition.F[row, :, y, x], a.condition.F[row, :, y, x])  # one change at a time
        seen.append(points)
    assert max(points.sum(dim=(1, 2)).max() for points in seen) == 8
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


# ------------------------------------------------------------------------------------------------- what is left out


def test_each_part_is_left_out_by_itself(vae, tower):
    stage = tiny_stage(ONE)
    told = many(encoded(stage, vae, tower, patchwork(0)), 800)
    cond = training_batch(stage, told, vae, drawn(), Chances(drop=0.3, unmark=0.0)).condition
    absent = [(cond.first_pictures[:, i : i + 3] == 0).flatten(1).all(dim=1) for i in (0, 3, 6)]
    for i, gone in enumerate(absent):
        assert about(gone.float().mean(), 0.3, 800)
        assert about((gone & absent[i - 1]).float().mean(), 0.09, 800)
    image, *others = absent
    for part in (cond.token, cond.first_latents):
        assert (part[image] == 0).all() and (part[~image] != 0).flatten(1).any(dim=1).all()
    assert cond.known[image].isnan().all() and cond.known[:, :4].isnan().all()  # O_0 is never known
    for i, gone in enumerate(others, start=1):
        here = slice(4 * i, 4 * i + 4)
        assert (cond.first_latents[gone][:, :, here] == 0).all() and cond.known[gone][:, here].isnan().all()
        kept = ~gone & ~image
        assert (cond.first_latents[kept][:, :, here] != 0).any() and not cond.known[kept][:, here].isnan().any()
    assert (cond.F[image] != 0).any()  # arrows are not the image's


def test_noise_is_added_to_the_first_frame_before_it_is_encoded(vae, tower, monkeypatch):
    stage, heard = tiny_stage(TWO), []
    tell = MotionDreamer.tell
    monkeypatch.setattr(MotionDreamer, "tell", lambda self, *told: heard.append(told) or tell(self, *told))
    clips = many(encoded(stage, vae, tower, patchwork(0)), 400)
    cond = training_batch(stage, clips, vae, drawn(), ALL).condition
    told, *_, noise = heard[0]
    noisy = clips["rgb"][:, 0] + told.noise_aug[:, None, None, None] * noise
    torch.testing.assert_close(cond.first_latents[:, 0], vae.encode(noisy))  # the posterior mode, not scaled
    assert torch.equal(cond.added_ids[:, 2], told.noise_aug)
    assert abs(told.noise_aug.log().mean() + 3) < 0.1 and abs(told.noise_aug.log().std() - 0.5) < 0.1
    assert abs(noise.std() - 1) < 0.01 and abs(noise.mean()) < 0.01


def test_camera_and_fps_are_those_of_each_clip(vae, tower):
    stage = tiny_stage(ONE)
    clips = [patchwork(0, 5.0, (0.1, -0.2)), patchwork(1, 12.0, np.arange(6).reshape(3, 2))]
    cond = training_batch(stage, encoded(stage, vae, tower, *clips), vae, drawn(), ALL).condition
    assert cond.added_ids[:, 0].tolist() == [4, 11]
    torch.testing.assert_close(cond.camera, torch.tensor([[0.1, -0.2], [2.0, 3.0]]))


@pytest.mark.parametrize("config", [ONE, TWO])
def test_the_camera_motion_is_left_out_by_itself(vae, tower, config):
    stage = tiny_stage(config)
    told = many(encoded(stage, vae, tower, patchwork(0, camera=(0.4, -0.3), bucket=30)), 3000)
    cond = training_batch(stage, told, vae, drawn(), Chances(drop=0.3, unmark=0.0)).condition
    gone = (cond.camera == 0).all(dim=1)
    assert about(gone.float().mean(), 0.3, 3000)
    assert torch.equal(cond.camera[~gone], told["camera"][~gone])
    again = training_batch(stage, told, vae, drawn(), Chances(drop=0.3, unmark=0.0)).condition
    assert torch.equal(again.camera, cond.camera)  # a function of (seed, rank, step), as all draws
    others = [(cond.token == 0).flatten(1).all(dim=1), (cond.F == 0).flatten(1).all(dim=1)]
    others += [(cond.added_ids[:, 1] == 127)] if config.given else []
    for other in others:
        assert about((gone & other).float().mean(), 0.3 * other.float().mean().item(), 3000)


def test_a_camera_at_rest_leaves_training_as_it_is(vae, tower, monkeypatch):
    """Not a draw is another one: what train.py makes of clips without camera motion does not change."""
    stage = tiny_stage(TWO)
    clips = encoded(stage, vae, tower, *(patchwork(seed) for seed in range(6)))
    ends, found = [], []
    for always in (True, False):
        generator = drawn()
        if always:
            monkeypatch.setattr(batch_room, "sometimes_told", lambda camera, *_: camera)
        found.append(training_batch(stage, clips, vae, generator, Chances()).condition)
        ends.append(generator.get_state())
        monkeypatch.undo()
    assert torch.equal(*ends)
    for name, value in vars(found[0]).items():
        torch.testing.assert_close(getattr(found[1], name), value, rtol=0, atol=0, equal_nan=True, msg=name)


# ----------------------------------------------------------------------------------------------- extras of small models


@pytest.mark.parametrize(("speed", "expected", "share"), [(1, [1], 0.3), (2, [1, 2], 1.0)])  # 9 starts late
def test_a_share_of_clips_shows_the_arrows_of_what_moves_at_once_alone(vae, tower, speed, expected, share):
    stage = tiny_stage(small(replace(ONE, mask_ratio=0.0), mask_start=share, told=True))
    clip = patchwork(0)
    ids = clip.segmentation[0]
    clip.flow[0, :, ids == 2] *= speed
    told = many(encoded(stage, vae, tower, clip), 600)
    cond = training_batch(stage, told, vae, drawn(), ALL).condition
    speeds = {i: np.hypot(*clip.flow[0][:, ids == i].mean(axis=1)) for i in (1, 2, 5, 9)}
    at_once = [i for i, speed in speeds.items() if 2 * speed >= max(speeds.values())]
    assert at_once == expected and speeds[2] > 0 == speeds[9]
    alone = (cond.F[:, :, torch.from_numpy(ids == 9)] == 0).all(dim=(1, 2))
    assert about(alone.float().mean(), share, 600)
    for shown, rows in ((np.isin(ids, at_once), alone), (ids > 0, ~alone)):
        np.testing.assert_allclose(cond.F[rows], (mean_flow(clip) * shown)[None].repeat(int(rows.sum()), 0), rtol=1e-5)
        assert (cond.first_pictures[rows, 9] == torch.from_numpy(shown)).all()
    resting = replace(clip, flow=np.zeros_like(clip.flow))
    cond = training_batch(stage, many(encoded(stage, vae, tower, resting), 9), vae, drawn(), ALL).condition
    assert (cond.first_pictures[:, 9] == torch.from_numpy(ids > 0)).all()  # there is nothing to choose


def test_where_an_element_is_left_something_is_told(vae, tower):
    """Eq. 9 to the letter may hide one component of a pixel and not the other."""
    stage = tiny_stage(small(replace(ONE, mask_unit="element"), told=True))
    cond = training_batch(stage, many(encoded(stage, vae, tower, patchwork(0)), 50), vae, drawn(), ALL).condition
    told, moving = cond.first_pictures[:, 9] == 1, (cond.F != 0)
    assert (moving[:, 0] != moving[:, 1]).any() and told[moving.any(dim=1)].all()


def test_told_to_stay_is_not_the_same_as_not_told(vae, tower):
    clip = patchwork(0)
    ids = torch.from_numpy(clip.segmentation[0])
    for told, channels in ((False, 11), (True, 12)):
        stage = tiny_stage(small(ONE, show_flow=True, told=told))
        cond = training_batch(stage, many(encoded(stage, vae, tower, clip), 50), vae, drawn(), ALL).condition
        assert cond.first_pictures.shape[1] == channels
        torch.testing.assert_close(cond.first_pictures[:, 9:11], cond.F.asinh())
        resting = cond.first_pictures[:, 9:, ids == 5]  # it never moves: F is 0, whether it is told or not
        assert (len(resting.flatten(1).unique(dim=0)) == 2) == told
        assert (cond.F[:, :, ids == 5] == 0).all()
        if told:
            assert set(cond.first_pictures[:, 11].unique().tolist()) == {0, 1}
            assert (cond.first_pictures[:, 11, ids == 0] == 0).all()  # of the background nobody tells anything


# ---------------------------------------------------------------------------------- training and sampling tell the same


def as_dreamt(monkeypatch, stage, vae, tower, clip, told):
    """The Condition that `dream` makes of what a user tells who tells the truth about a clip [T, ...]."""
    conditions = []

    def caught(stage, cond, *, frames, **_):
        conditions.append(cond)
        return torch.zeros(len(cond.known), frames, *cond.known.shape[1:])

    monkeypatch.setattr(motion_dreamer, "sample", caught)
    one = {name: value[None] for name, value in clip.items()}
    motion = Motion(one["flow"], one["segmentation"], one["depth"]) if stage.config.predict == ("rgb",) else None
    dream(
        *((None, stage) if motion else (stage, None)), vae, tower, one["rgb"][:, 0], one["segmentation"][:, 0],
        one["depth"][:, 0], told["F"], one["camera"], frames=len(clip["rgb"]), generator=drawn(5), motion=motion,
        fps=float(clip["fps"]), motion_bucket=float(clip["motion_bucket"]), mask=told["mask"],
    )  # fmt: skip
    (condition,) = conditions
    return condition


SAME = {
    "Stage I": ONE,
    "Stage I, stacked latents": replace(ONE, vae_factor=4, latent_channels=16, height=12, width=20),
    "Stage I, first step": replace(ONE, reduce="start"),
    "Stage II": TWO,
    "One-stage*": SINGLE,
    "without depth": replace(ONE, predict=("flow", "segmentation")),
    "sparse": replace(ONE, control="sparse_flow"),
    "small Stage I": small(ONE, show_flow=True, told=True),
    "small Stage II": small(TWO, show_flow=True, told=True, draft=True),
    "small One-stage*": small(SINGLE, show_flow=True),
}


@pytest.mark.parametrize("name", SAME)
def test_training_and_sampling_tell_a_network_the_same(monkeypatch, vae, tower, name):
    """Element by element, for one clip of which everything is told, with no setting at its default. The noise on I_0,
    which is drawn, is arranged equal; nothing else is."""
    config = replace(SAME[name], mask_ratio=0.0)
    stage, tell = tiny_stage(config), MotionDreamer.tell

    def quiet(self, told, latents, token, vae, noise):
        return tell(
            self, replace(told, noise_aug=torch.full_like(told.noise_aug, 0.07)), latents, token, vae, 0 * noise
        )

    monkeypatch.setattr(MotionDreamer, "tell", quiet)
    whole = patchwork(0, 11.0, np.linspace(0.1, 0.9, 6).reshape(3, 2), bucket=30)
    maps = {name: getattr(whole, name)[..., : config.height, : config.width] for name in ("flow", "segmentation")}
    maps |= {"rgb": whole.rgb[:, : config.height, : config.width]}
    clip = replace(whole, **maps, depth=whole.depth[:, : config.height, : config.width]).tensors()
    batch = torch.utils.data.default_collate([with_marks(clip)])
    trained = training_batch(stage, batch | encode_clips(batch, stage, vae, tower), vae, drawn(), ALL).condition

    dense = tiny_stage(replace(config, control="instance_flow"))
    F = training_batch(dense, batch | encode_clips(batch, dense, vae, tower), vae, drawn(), ALL).condition.F
    told = {"F": F, "mask": (batch["segmentation"][:, :1] > 0).float()}
    sampled = as_dreamt(monkeypatch, stage, vae, tower, clip, told)
    for part, value in vars(trained).items():
        if part != "F" or config.control != "sparse_flow":
            other = getattr(sampled, part)
            assert other.shape == value.shape, part
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{name}: {part}")
    bucket = 30 if config.given else 127
    np.testing.assert_allclose(sampled.added_ids, [[10, bucket, 0.07]], rtol=1e-6)
    np.testing.assert_allclose(sampled.camera, [[0.42, 0.58]], rtol=1e-6)
    if config.control == "sparse_flow":
        for few in (sampled.F, trained.F):
            points = (few != 0).any(dim=1)
            assert points.sum() == 8 and torch.equal(few, F * points[:, None])


@pytest.mark.parametrize("config", [ONE, TWO, SINGLE])
def test_told_nothing_is_a_state_that_training_shows(monkeypatch, vae, tower, config):
    """Supplement, section 9: F = 0 and c = 0, and everything else is told."""
    stage, tell = tiny_stage(replace(config, mask_ratio=0.5)), MotionDreamer.tell
    monkeypatch.setattr(
        MotionDreamer,
        "tell",
        lambda self, told, latents, token, vae, noise: tell(
            self, replace(told, noise_aug=torch.full_like(told.noise_aug, 0.07)), latents, token, vae, 0 * noise
        ),
    )
    clip = patchwork(0, 11.0, (0.4, -0.3)).tensors()
    batch = torch.utils.data.default_collate([with_marks(clip)])
    clips = many(batch | encode_clips(batch, stage, vae, tower), 600)
    cond = training_batch(stage, clips, vae, drawn(), Chances(drop=0.2, unmark=0.0)).condition
    nothing = {"F": torch.zeros(1, 2, HEIGHT, WIDTH), "mask": torch.zeros(1, 1, HEIGHT, WIDTH)}
    sampled = as_dreamt(monkeypatch, stage, vae, tower, clip | {"camera": torch.zeros(2)}, nothing)

    def same(row):
        pairs = ((getattr(cond, name)[row], value[0]) for name, value in vars(sampled).items())
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True) for a, b in pairs)

    assert 1 <= sum(map(same, range(600))) < 60


def test_a_window_of_a_long_clip_carries_its_own_camera_motion(vae, tower, tmp_path):
    camera = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    parts = [patchwork(seed) for seed in range(3)]
    maps = {
        name: np.concatenate([getattr(part, name) for part in parts])[:7]
        for name in ("rgb", "flow", "segmentation", "depth")
    }
    Clip(**maps, camera=camera).save(tmp_path / "long.safetensors")
    clips, stage = TrainingClips(ClipDataset(tmp_path, FRAMES)), tiny_stage(ONE)
    for draw in range(5):
        batch = torch.utils.data.default_collate([clips[(0, draw)]])
        batch |= encode_clips(batch, stage, vae, tower)
        told = training_batch(stage, batch, vae, drawn(), ALL).condition.camera
        np.testing.assert_allclose(told[0], camera[draw : draw + FRAMES].mean(axis=0), rtol=1e-5)
