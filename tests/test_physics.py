"""Who will be hit, twins and figures by scenario: against loops, cases made by hand, and the simulator."""

import json
import math
import sys
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from other_device import elsewhere, other_device
from tiny import moving_squares, tiny_stage, tiny_tower, tiny_vae

import evaluate
import metrics
from evaluate import truth_of
from metrics import Scene, frozen
from motion_dreamer import STAGE1, STAGE2
from training.sampler import one_arrow
from training.scenes import first_of

simulate = pytest.importorskip("clips.simulate")
from clips import Clip  # noqa: E402 (after the simulator, without which nothing here runs)

# Of the model that is measured.
SIZES = {"vae_factor": 4, "latent_channels": 16, "frames": 16, "width": 32, "height": 16, "sigma_max": 80.0}

# ------------------------------------------------------------------------------------------------ who will be hit


def meta_of(ways, contacts, touching=(), fixed=(), pushed=0, first_steps=None):
    """Things in a row, 10 m from a camera of focal length 100: 0.1 m is a pixel. ways: metres to the right till the
    end; first_steps: those of the first frame step (default: none)."""
    poses = np.zeros((9, len(ways), 7))
    poses[:, :, 0], poses[..., 3] = np.arange(len(ways)), 1
    poses[1:, :, 0] += 0 if first_steps is None else first_steps
    poses[4:, :, 0] = np.arange(len(ways)) + ways
    camera = [[[0, 0, -10], [1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 9
    told = {"contacts": contacts, "touching": list(touching), "fixed": list(fixed), "pushed": pushed}
    return told | {"poses": poses.tolist(), "camera": camera, "focal": 100.0}


@pytest.mark.parametrize(
    "meta, among, hit",
    [
        (meta_of([5, 3, 0], [[1, 2, 1]], pushed=1), {2, 3}, {1, 2}),  # what is pushed is not asked
        (meta_of([5, 3, 0], [[1, 2, 1]], touching=[[2, 3]], pushed=1), set(), {1, 2}),
        (meta_of([5, 3, 0], [[1, 2, 1]], touching=[[2, 3]], fixed=[3], pushed=1), {2}, {1, 2}),  # it lies on a ramp
        (meta_of([5, 0, 0], [[1, 2, 1]], fixed=[2], pushed=1), {3}, set()),  # a wall is neither hit nor asked
        (meta_of([5, 0.19, 0], [[1, 2, 1]], pushed=1), {3}, {1, 2}),  # 1.9 pixels do not show
        (meta_of([5, 0.21, 0], [[1, 2, 1]], pushed=1), {2, 3}, {1, 2}),
        (meta_of([5, 3, 0], [[1, 2, 3]], first_steps=[0.1, 0.1, 0]), {3}, {1, 2}),  # both fall by themselves
        (meta_of([5, 3, 0], [[1, 2, 0]], first_steps=[0.1, 0.1, 0], pushed=1), {2, 3}, {1, 2}),  # hit in the first step
    ],
)
def test_who_is_asked_by_hand(meta, among, hit):
    assert metrics.asked(meta, 5) == (among, hit)


def test_what_comes_after_the_last_frame_does_not_count():
    """The thing is there at frame 4: of four frames, the last is 3. Step 3 leads out of them."""
    meta = meta_of([5, 3, 0], [[1, 2, 2], [2, 3, 3]], pushed=1)
    assert metrics.asked(meta, 5) == ({2}, {1, 2, 3})  # 3 is hit and does not move
    assert metrics.asked(meta, 4) == ({3}, {1, 2})  # 2 is hit and has not moved yet


def test_what_moves_after_its_hit_does_not_move_by_itself():
    meta = meta_of([5, 3, 0], [[1, 2, 1]], pushed=1)
    for t in (2, 3):
        meta["poses"][t][1][0] += 0.1
    assert metrics.asked(meta, 5) == ({2, 3}, {1, 2})


def passing(frames=8):
    """A block of id 1 passes in front of id 2, which rests; flow and ids are exact."""
    ids, flow = torch.zeros(frames, 12, 40, dtype=torch.long), torch.zeros(frames, 2, 12, 40)
    for t in range(frames):
        ids[t, 4:8, 16:22] = 2
        ids[t, 2:10, 4 * t : 4 * t + 8] = 1
        flow[t, 0][ids[t] == 1] = 4
    return flow, ids


def test_what_is_hidden_stays_with_its_object():
    """A loop over points says where they go; plain chained flow drags the hidden thing along."""
    flow, ids = passing()
    points, owner = metrics.carry_seen(flow, ids, ids[0])
    place, expected = points[0].clone(), [points[0]]
    for t in range(7):
        steps = [None] * len(place)
        for k, (x, y) in enumerate(place.round().long().tolist()):
            if 0 <= x < 40 and ids[t, y, x] == owner[k]:
                steps[k] = torch.tensor([4.0 if owner[k] == 1 else 0.0, 0.0])
        for i in (1, 2):
            seen = [step for k, step in enumerate(steps) if owner[k] == i and step is not None]
            mean = torch.stack(seen).mean(0) if seen else torch.zeros(2)
            steps = [mean if owner[k] == i and step is None else step for k, step in enumerate(steps)]
        place = place + torch.stack(steps)
        expected.append(place)
    inside = metrics.displacement(torch.stack(expected), owner, 2)
    assert inside.norm() == 0 and metrics.displacement(points, owner, 2).norm() < 1  # a pixel at the edge mixes flows
    dragged = metrics.displacement(*metrics.carry(flow, ids[0]), 2)
    assert dragged.norm() > 2
    gone = metrics.displacement(points, owner, 1) - metrics.displacement(torch.stack(expected), owner, 1)
    assert gone.norm() < 2
    assert torch.equal(metrics.carry_seen(flow, None, ids[0])[0], metrics.carry(flow, ids[0])[0])


def test_what_leaves_by_the_last_column_is_seen_until_then():
    flow, ids = torch.zeros(3, 2, 8, 6), torch.zeros(3, 8, 6, dtype=torch.long)
    for t in range(3):
        ids[t, t : t + 2, 5], flow[t, 1, t : t + 2, 5] = 1, 1
    assert metrics.displacement(*metrics.carry_seen(flow, ids, ids[0]), 1)[1] > 1.5


def bar(width, height, degrees=0.0):
    """Points of a bar that is turned."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    points = torch.stack([x, y], dim=-1).flatten(0, 1) - torch.tensor([width - 1, height - 1]) / 2
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ torch.tensor([[c, s], [-s, c]])


@pytest.mark.parametrize(
    ("after", "lies"),
    [
        (bar(8, 20), False),
        (bar(8, 20, 28), False),  # turned by less than 30 degrees, or by more: it is as high as before in both
        (bar(8, 20, 32), True),
        (bar(8, 20, -32), True),
        (bar(8, 17), False),  # 0.85 of its height, or less
        (bar(8, 16), True),
        (torch.cat([bar(8, 20), torch.tensor([[0.0, 90.0]])]), False),  # a stray point
        (torch.cat([bar(8, 16), torch.tensor([[0.0, 90.0]])]), True),
        (torch.cat([bar(8, 16), torch.tensor([[0.0, -90.0]])]), True),
        (bar(1, 2), True),  # it has vanished
    ],
)
def test_what_lies_by_hand(after, lies):
    assert metrics.physics.lies(bar(8, 20), after) == lies


def sliding(x, y):
    """Id 1 and all around it move by (x, y) pixels in each of two steps."""
    ids, flow = torch.zeros(3, 31, 31, dtype=torch.long), torch.tensor([x, y]).float().view(1, 2, 1, 1)
    for t in range(3):
        ids[t, 14 + y * t : 17 + y * t, 14 + x * t : 17 + x * t] = 1
    return {"flow": flow.repeat(3, 1, 31, 31), "segmentation": ids}


@pytest.mark.parametrize(
    ("way", "angle", "length", "moved"),
    [
        ((3, 0), 0, 1, True),
        ((-6, 0), 180, 2, True),
        ((0, -3), 90, 1, True),
        ((2, 2), 45, math.sqrt(8) / 3, True),
        ((-1, 2), 180 - math.degrees(math.atan(2)), math.sqrt(5) / 3, True),
        ((0, 0), 90, 0, False),  # what does not move has no direction
    ],
)
def test_how_the_pushed_obeys_its_arrow_by_hand(way, angle, length, moved):
    scene = Scene(None, {"arrow": sliding(3, 0)}, {"arrow": {"pushed": 1}})
    found = metrics.physics.object_motion(sliding(*way), scene)
    assert found["control_angle"] == (pytest.approx(angle), 1)
    assert found["control_length"] == (pytest.approx(length), 1)
    assert found["moved"] == (int(moved), 1, 0, 0)


def test_will_it_be_hit_by_hand():
    """1 passes in front of 2 and hits nothing: whoever says that 2 moves is wrong."""
    flow, ids = passing()
    color = torch.tensor([[-0.8, -0.8, -0.8], [0.9, -0.5, 0.0], [0.0, 0.9, -0.5]])
    rgb = color[ids].movedim(-1, 1)
    meta = meta_of([2.8, 0], [], pushed=1)
    made = {"flow": flow, "segmentation": ids, "rgb_own": rgb}
    scene = Scene(None, {"arrow": made | {"rgb": rgb}}, {"arrow": meta})
    assert metrics.hit_figures(made, scene) == {"hit": (0, 0, 1, 1), "hit_video": (0, 0, 1, 1)}
    later = ids.clone()
    later[1:, 0:2, 30:34] = 3  # what comes into the picture later is not asked
    true, others = made | {"rgb": rgb, "segmentation": later}, meta_of([2.8, 0, 0], [], pushed=1)
    scene = Scene(None, {"arrow": true}, {"arrow": others})
    assert metrics.hit_figures(made, scene) == {"hit": (0, 0, 1, 1), "hit_video": (0, 0, 1, 1)}
    scene = Scene(None, {"arrow": made | {"rgb": rgb}}, {"arrow": meta})
    moved = ids.clone()
    moved[-1, 4:8, 16:22], moved[-1, 4:8, 8:14] = 0, 2
    wrong = flow.clone()
    wrong[:, 0][ids == 2] = 1.0
    made = {"flow": wrong, "segmentation": ids, "rgb_own": color[moved].movedim(-1, 1)}
    assert metrics.hit_figures(made, scene) == {"hit": (0, 0, 0, 1), "hit_video": (0, 0, 0, 1)}
    scene.meta["arrow"] = meta_of([2.8, 1], [[1, 2, 3]], pushed=1)  # now it is hit
    assert metrics.hit_figures(made, scene) == {"hit": (0, 0, 0, 0), "hit_video": (0, 0, 0, 0)}  # no truth shows it
    scene = Scene(None, {"arrow": made | {"rgb": made["rgb_own"]}}, scene.meta)
    assert metrics.hit_figures(made, scene) == {"hit": (1, 1, 0, 0), "hit_video": (1, 1, 0, 0)}
    assert "hit" not in metrics.hit_figures({"rgb_own": rgb}, scene)


def hit_sums(scenario, seeds):
    right, still = np.zeros(4), np.zeros(4)
    for seed in seeds:
        clip = simulate.simulate(scenario, seed, 16, (128, 64))
        maps = clip.tensors()
        scene = Scene(None, {"arrow": maps}, {"arrow": clip.meta})
        right += metrics.hit_figures(maps, scene)["hit"]
        still += metrics.hit_figures(frozen(maps), scene)["hit"]
    return right, still


@pytest.mark.parametrize("scenario", ["collide", "roll"])
def test_the_truth_knows_who_is_hit_and_a_still_picture_does_not(scenario):
    right, still = hit_sums(scenario, range(9_000_100, 9_000_110))
    assert right[1] >= 2 and right[3] >= 2
    assert metrics.combine(right) == 1 and metrics.combine(still) == 0.5


def test_what_a_measure_cannot_tell_of_the_truth_it_does_not_ask():
    """A domino that fell although the clip does not show it, by flow, ids or colour: everything else is asked."""
    scene = dominoes()
    meta = scene.meta["arrow"]
    shown, (hidden, *_) = set(meta["fallen"]), sorted(set(scene.objects) - set(meta["fallen"]))
    meta["fallen"] = [*meta["fallen"], hidden]
    true = scene.truth["arrow"]
    arrow = true | {"rgb_own": true["rgb"], "told": true["segmentation"]}
    scene.truth |= {"opposite": true, "stronger": true, "none": frozen(true)}
    scene.meta |= {"opposite": meta}
    physics, demo = all_figures(scene.truth | {"arrow": arrow}, scene)
    count = len(scene.objects) - 1
    for name in ("fallen_carried", "fallen_ids"):
        assert physics[name] == (len(shown), len(shown), count - len(shown), count - len(shown))
    assert physics["all_right_carried"] == physics["all_right_ids"] == demo["both_all_right"] == (1, 1)
    assert "sooner" not in demo  # the harder push is the same one here
    still = {"arrow": frozen(arrow) | {"rgb_own": frozen(arrow)["rgb"], "told": arrow["told"]}}
    wrong, painted = all_figures(still, scene)
    assert wrong["all_right_carried"] == wrong["all_right_ids"] == (0, 1)
    assert physics["control_angle"] == (0, 1) and wrong["control_angle"] == (90, 1)
    assert demo["painted_ids"] == (1, 1) and painted["painted_ids"][0] < 0.9


def dominoes():
    """A row of which some fall."""
    clip = simulate.simulate("dominoes", 2000002, 16, (96, 48))
    return Scene(None, {"arrow": clip.tensors()}, {"arrow": dict(clip.meta)})


def test_clips_of_a_former_simulator_are_refused(tmp_path):
    clip = simulate.simulate("dominoes", 2000002, 4, (48, 24))
    poses = np.array(clip.meta["poses"])
    for name, other in (("moved", poses + 0.1), ("more", poses.repeat(2, axis=1))):
        replace(clip, meta=clip.meta | {"poses": other.tolist()}).save(tmp_path / f"{name}.safetensors")
        scene = truth_of(tmp_path / f"{name}.safetensors", 4, "cpu")
        with pytest.raises(ValueError, match=f"{name}.safetensors: is of another version of clips.simulate"):
            evaluate.add_other_pushes(scene, tmp_path / "cache", "cpu")
        with pytest.raises(ValueError, match="another version"):
            evaluate.add_twin(scene, tmp_path / "cache", "cpu")
    assert not list(tmp_path.glob("cache/*/*"))
    kept = tmp_path / "cache" / "opposite-48x24x4" / "now.safetensors"  # of the former simulator, in the cache
    replace(clip, meta=clip.meta | {"poses": (poses + 0.1).tolist()}).save(kept)
    clip.save(tmp_path / "now.safetensors")
    evaluate.add_other_pushes(truth_of(tmp_path / "now.safetensors", 4, "cpu"), tmp_path / "cache", "cpu")
    assert np.array_equal(np.array(Clip.load(kept).meta["poses"])[0], poses[0])


def test_pairs_that_touch_and_things_that_are_fixed():
    """Of balls and boxes, touching is a matter of distances."""
    meta = simulate.simulate("support", 1, 1, (16, 8)).meta
    height = np.array(meta["poses"])[0, :, 2]
    order = (np.argsort(height) + 1).tolist()
    assert meta["touching"] == sorted(sorted(pair) for pair in pairwise(order))
    assert meta["fixed"] == []
    for seed in range(3):
        meta = simulate.simulate("dominoes", seed, 1, (16, 8)).meta
        assert meta["touching"] == []  # they stand apart
    meta = simulate.simulate("link", 1, 1, (16, 8)).meta
    place = np.array(meta["poses"])[0, :, :3]
    pairs = {(a, b): np.linalg.norm(place[a - 1] - place[b - 1]) for a, b in combinations(range(1, len(place) + 1), 2)}
    nearest = min(pairs.values())
    assert meta["touching"] == [list(pair) for pair, far in pairs.items() if far < 1.1 * nearest]
    meta = simulate.simulate("roll", 1, 1, (16, 8)).meta
    assert len(meta["fixed"]) == 1 and [sorted([meta["pushed"], *meta["fixed"]])] == meta["touching"]


# ----------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("scenario", ["collide", "support"])
def test_a_twin_looks_the_same_and_goes_another_way(scenario):
    clip = simulate.simulate(scenario, 9_000_001, 8, (48, 24))
    twins = [simulate.simulate(scenario, 9_000_001, 8, (48, 24), {"hidden": k}) for k in (0, 0, 1)]
    assert twins[0].meta == twins[1].meta and twins[0].meta["hidden"] != twins[2].meta["hidden"]
    for twin in twins:
        assert (twin.rgb[0] == clip.rgb[0]).all() and (twin.segmentation[0] == clip.segmentation[0]).all()
        for name in ("push", "pushed", "side", "strength", "camera", "focal", "fixed", "touching"):
            assert twin.meta[name] == clip.meta[name]
        np.testing.assert_allclose(twin.meta["poses"][0], clip.meta["poses"][0], atol=1e-4)
        assert twin.meta["hidden"]["friction"] != clip.meta["hidden"]["friction"]
        assert np.abs(np.array(twin.meta["poses"])[-1] - np.array(clip.meta["poses"])[-1]).max() > 0.01


def test_a_twin_has_friction_and_densities_of_its_scenario(monkeypatch):
    scene = simulate.SCENARIOS["collide"]

    def with_densities(rng, frames):
        made = scene(rng, frames)
        for thing in made.things:
            thing.density = rng.uniform(200, 600)
        return made

    monkeypatch.setitem(simulate.SCENARIOS, "collide", with_densities)
    told = [simulate.simulate("collide", 3, 1, (16, 8), {"hidden": k}).meta["hidden"] for k in range(8)]
    densities = [density for hidden in told for density in hidden["density"]]
    assert len(set(densities)) > 8 and 200 < min(densities) < max(densities) < 600
    friction = [hidden["friction"] for hidden in told]
    assert len(set(friction)) == 8 and 0.15 < min(friction) < max(friction) < 0.3
    for k in range(4):  # one thing of a tower is heavy, the ball
        twin, clip = (simulate.simulate("tower", k, 1, (16, 8), push).meta["hidden"] for push in ({"hidden": k}, {}))
        assert twin["density"] == clip["density"] and twin["friction"] != clip["friction"]
        assert sorted(twin["density"])[-2:] == [300, 1500]


def test_scenes_get_their_twin_once(tmp_path, monkeypatch):
    for scenario in ("collide", "driving"):
        simulate.simulate(scenario, 9_000_002, 6, (32, 16)).save(tmp_path / f"{scenario}.safetensors")
    moving_squares(0, 6, 16, 32).save(tmp_path / "foreign.safetensors")
    mirrored = Clip.load(tmp_path / "collide.safetensors").mirrored()
    mirrored.save(tmp_path / "mirrored.safetensors")
    scenes = {path.stem: truth_of(path, 4, "cpu") for path in tmp_path.glob("*.safetensors")}  # the first 4 frames
    for scene in scenes.values():
        evaluate.add_twin(scene, tmp_path / "cache", "cpu")
    assert {name for name, scene in scenes.items() if "twin" in scene.truth} == {"collide", "driving"}
    twin = scenes["collide"].truth["twin"]
    assert len(scenes["collide"].meta["twin"]["poses"]) == 7  # the whole scene again
    expected = simulate.simulate("collide", 9_000_002, 6, (32, 16), {"hidden": 0}).tensors()
    assert torch.equal(twin["segmentation"], expected["segmentation"][:4])
    monkeypatch.setattr(simulate, "simulate", None)
    again = truth_of(tmp_path / "collide.safetensors", 4, "cpu")
    evaluate.add_twin(again, tmp_path / "cache", "cpu")
    assert torch.equal(again.truth["twin"]["flow"], twin["flow"])


def test_a_clip_simulated_anew_with_another_push_has_another_twin(tmp_path):
    """Of the same name and place, and in which the same things begin where they began."""
    path, twins = tmp_path / "a.safetensors", []
    for push in ({"strength": 2.5}, {"strength": 0.0}):
        simulate.simulate("collide", 9_000_002, 6, (32, 16), push).save(path)
        scene = truth_of(path, 6, "cpu")
        evaluate.add_twin(scene, tmp_path / "cache", "cpu")
        twins.append(scene.meta["twin"]["strength"])
    assert twins == [2.5, 0.0]


def test_the_first_clips_are_of_every_scenario_in_turn(tmp_path):
    for name, scenario in {"a0": "collide", "a1": "collide", "a2": "collide", "b0": "drop", "c0": None}.items():
        clip = moving_squares(0, 2)
        replace(clip, meta={"scenario": scenario} if scenario else {}).save(tmp_path / f"{name}.safetensors")
    paths = sorted(tmp_path.glob("*.safetensors"))
    names = {count: [path.stem for path in first_of(paths, count)] for count in (1, 2, 3, 4, 5, 9)}
    assert names[1] == ["a0"] and names[2] == ["a0", "b0"] and names[3] == ["a0", "b0", "c0"]
    assert names[4] == ["a0", "a1", "b0", "c0"] and names[5] == names[9] == [path.stem for path in paths]


@pytest.mark.parametrize("told", [{}, {"strength": 2.5, "side": -1}, {"strength": 0.0}, {"still": True}])
def test_the_twin_of_a_clip_is_told_what_the_clip_is_told(tmp_path, told):
    still = told.pop("still", False)
    clip = simulate.simulate("collide", 9_000_004, 6, (32, 16), told, still)
    clip.save(tmp_path / "clip.safetensors")
    scene = truth_of(tmp_path / "clip.safetensors", 6, "cpu")
    evaluate.add_twin(scene, tmp_path / "cache", "cpu")
    twin = scene.meta["twin"]
    assert {name: twin[name] for name in ("push", "side", "strength", "pushed")} == {
        name: clip.meta[name] for name in ("push", "side", "strength", "pushed")
    }
    assert twin.get("still") == clip.meta.get("still") and twin["hidden"] != clip.meta["hidden"]


def test_a_twin_of_a_drive_has_its_picture_its_ego_motion_and_other_wishes():
    for seed in (9_000_005, 9_000_006):
        told = {"ego": 1}
        clip = simulate.simulate("driving", seed, 8, (48, 24), told)
        twins = [simulate.simulate("driving", seed, 8, (48, 24), told | {"hidden": k}) for k in (0, 0, 1)]
        assert twins[0].meta == twins[1].meta and twins[0].meta["hidden"] != twins[2].meta["hidden"]
        assert len(clip.meta["hidden"]["tempers"]) == len(clip.meta["poses"][0])
        assert clip.meta["hidden"]["tempers"][0].keys() == {"pace", "headway", "polite", "gap", "brakes"}
        for twin in twins:
            assert (twin.rgb[0] == clip.rgb[0]).all() and (twin.depth[0] == clip.depth[0]).all()
            assert twin.meta["told"] == clip.meta["told"] and twin.meta["other"] == clip.meta["other"]
            assert np.abs(twin.camera.mean(0) - clip.camera.mean(0)).max() < 0.1
            assert twin.meta["hidden"] != clip.meta["hidden"]
        assert any(twin.meta["poses"] != clip.meta["poses"] for twin in twins)


def test_wishes_are_kept_by_id():
    """Ids are shuffled; the one car that brakes is the other one."""
    for seed in (21, 28):
        scene = simulate.draw_scene("driving", seed, 1, {})[0]
        assert scene.truth["case"] == "brake" and scene.other > 0
        assert [temper["brakes"] for temper in scene.hidden["tempers"]].index(True) == scene.other


# ----------------------------------------------------------------------------------- what became of the other car


def drives(way, rival, case="merge", frames=4, depth=10.0):
    """A scene with two drives of car 2, by their ways to the left in metres; the camera stands at 0 and looks along x,
    at 10 m a metre is 4 pixels. And its maps by kind."""
    camera = [[[0, 0, 0], [0, -1, 0], [0, 0, -1], [1, 0, 0]]] * (frames + 1)
    truth, meta = {}, {}
    for kind, aside in (("arrow", way), ("opposite", rival)):
        ids, poses = torch.zeros(frames, 9, 41, dtype=torch.long), np.zeros((frames + 1, 2, 7))
        poses[:, 1, 0] = depth
        for t in range(frames + 1):
            poses[t, 1, 1] = aside * t / (frames - 1)
            x = round(20 - 4 * poses[t, 1, 1])
            if t < frames and x > 0:
                ids[t, 3:6, x - 1 : x + 2] = 2
        truth[kind] = {"segmentation": ids, "depth": torch.full((frames, 9, 41), depth)}
        meta[kind] = {"poses": poses.tolist(), "camera": camera, "focal": 40.0, "other": 2, "case": case, "told": {}}
    return Scene(None, truth, meta)


def test_where_the_other_car_goes_by_hand():
    scene = drives(2.0, -1.0)
    said = {way: drives(way, way).truth["arrow"] for way in (2.0, 0.75, 0.25, -1.0)}

    def right(arrow, opposite):
        return metrics.drive_figures({"arrow": said[arrow], "opposite": said[opposite]}, scene)["ego_pairs"]

    assert right(2.0, -1.0) == right(0.75, 0.25) == (1, 1)  # nearer to its own than to the rival's, in both
    assert right(0.25, -1.0) == right(2.0, 0.75) == right(2.0, 2.0) == right(-1.0, 2.0) == (0, 1)
    lead = drives(2.0, -1.0, "follow")
    found = metrics.drive_figures({"arrow": said[2.0], "opposite": said[2.0]}, lead)
    assert found == {"lead_way": (1, 2)}
    assert metrics.drive_figures(scene.truth, scene) == {"ego_pairs": (1, 1)}
    assert metrics.drive_figures(drives(0.2, -0.2).truth, drives(0.2, -0.2)) == {}  # not apart
    flow = {"flow": torch.zeros(1)}
    assert metrics.drive_figures({"arrow": said[2.0], "opposite": flow}, scene) == {}
    for kind in ("arrow", "opposite"):
        scene.truth[kind]["segmentation"][0] = 0  # the first frame does not show it yet
    assert metrics.drive_figures(scene.truth, scene) == {}


def test_a_place_on_the_ground_is_where_the_camera_saw_it():
    scene = drives(3.0, 0.0)
    meta, maps = scene.meta["arrow"], scene.truth["arrow"]
    for t in range(4):
        np.testing.assert_allclose(metrics.physics.place(maps, meta, 2, t), meta["poses"][t][1][:2], atol=1e-6)
    for left, there in ((8, True), (7, False)):  # seven pixels are too few
        maps["segmentation"][0] = 0
        maps["segmentation"][0, 4, :left] = 2
        assert (metrics.physics.place(maps, meta, 2, 0) is not None) == there


def test_depth_says_how_far_the_other_car_is_and_a_lost_one_is_wrong():
    scene = drives(0.0, 0.0)
    for kind, depth in (("arrow", 12.0), ("opposite", 9.0)):  # at the last frame
        scene.meta[kind]["poses"][3][1][0] = depth
        scene.truth[kind]["depth"][3] = depth
    assert metrics.drive_figures(scene.truth, scene) == {"ego_pairs": (1, 1)}
    swapped = {"arrow": scene.truth["opposite"], "opposite": scene.truth["arrow"]}
    assert metrics.drive_figures(swapped, scene) == {"ego_pairs": (0, 1)}
    gone = scene.truth["arrow"] | {"segmentation": torch.zeros_like(scene.truth["arrow"]["segmentation"])}
    assert metrics.drive_figures(scene.truth | {"arrow": gone}, scene) == {"ego_pairs": (0, 1)}


def test_a_car_that_has_left_counts_where_it_was_seen_last():
    scene = drives(6.5, 3.0)  # after 20 pixels, 5 m, it is out: in frame 2, it is 4.33 m to the left
    assert not (scene.truth["arrow"]["segmentation"][3] == 2).any()
    assert metrics.drive_figures(scene.truth, scene) == {"ego_pairs": (1, 1)}
    wrong = drives(3.0, 3.0).truth["arrow"]
    assert metrics.drive_figures(scene.truth | {"arrow": wrong}, scene) == {"ego_pairs": (0, 1)}


def test_the_truth_knows_what_becomes_of_the_other_and_a_still_picture_does_not(tmp_path):
    sums = {source: {} for source in ("truth", "still", "twin", "swapped")}
    for seed in range(9_000_100, 9_000_106):
        simulate.simulate("driving", seed, 16, (64, 32)).save(tmp_path / "clip.safetensors")
        scene = truth_of(tmp_path / "clip.safetensors", 16, "cpu")
        evaluate.add_other_pushes(scene, tmp_path / str(seed), "cpu")
        evaluate.add_twin(scene, tmp_path / str(seed), "cpu")
        if scene.meta["opposite"] is scene.meta["arrow"]:
            assert scene.meta["arrow"]["case"] == "follow" and "twin_opposite" not in scene.truth
            continue
        pairs = {"truth": scene.truth, "still": {kind: frozen(scene.truth[kind]) for kind in ("arrow", "opposite")}}
        pairs["twin"] = {"arrow": scene.truth["twin"], "opposite": scene.truth["twin_opposite"]}
        pairs["swapped"] = {"arrow": scene.truth["opposite"], "opposite": scene.truth["arrow"]}
        for source, made in pairs.items():
            for name, figure in metrics.drive_figures(made, scene).items():
                sums[source][name] = np.add(sums[source].get(name, 0), figure)
    assert sums["truth"].keys() == {"ego_pairs", "lead_way"} and sums["truth"]["ego_pairs"][1] >= 2
    rate = {source: {name: a / b for name, (a, b) in found.items()} for source, found in sums.items()}
    assert set(rate["truth"].values()) == {1.0} and min(rate["twin"].values()) > 0.7
    assert rate["still"]["ego_pairs"] < 0.5 and rate["still"]["lead_way"] <= 0.8
    assert rate["swapped"]["lead_way"] < 0.5


# ---------------------------------------------------------------------------------------- what is defined everywhere


def test_overlap_where_nothing_is_left():
    empty, some = torch.zeros(2, 3, 4, dtype=torch.long), torch.ones(2, 3, 4, dtype=torch.long)
    assert metrics.mean_iou(empty, empty) == 1 and metrics.mean_iou(some, empty) == 0
    leaving = torch.stack([some[0], empty[0]])
    found = metrics.id_overlap(leaving, leaving)
    assert {metrics.combine(np.array(found[name])) for name in ("iou_last", "iou_mean", "silhouette_last")} == {1.0}
    found = metrics.id_overlap(some, leaving)
    assert found["iou_last"] == (0, 1) and found["iou_mean"] == (0.5, 1)
    assert metrics.centroid_error(empty, empty, [])["centroid_ade"] == (0, 0)  # says nothing


def test_who_falls_is_asked_of_dominoes_alone():
    for scenario in ("dominoes", "collide"):
        clip = simulate.simulate(scenario, 9_000_001, 8, (48, 24))
        maps = clip.tensors()
        scene = Scene(None, {"arrow": maps}, {"arrow": clip.meta})
        figures = metrics.physics_figures({"arrow": maps | {"rgb_own": maps["rgb"]}}, scene)
        asked = {name for name in figures if name.startswith(("fallen", "all_right"))}
        assert bool(asked) == (scenario == "dominoes") and "hit" in figures


def test_of_every_car_the_first_step_is_told(tmp_path):
    simulate.simulate("driving", 9_000_003, 4, (96, 48)).save(tmp_path / "drive.safetensors")
    scene = truth_of(tmp_path / "drive.safetensors", 4, "cpu")
    flow, ids = (scene.truth["arrow"][name] for name in ("flow", "segmentation"))
    F, mask = one_arrow(scene, "arrow", STAGE1)
    assert torch.equal(mask, (ids[:1] > 0).float()) and (ids[0] > 0).any()
    for i in range(1, int(ids.max()) + 1):
        where = ids[0] == i
        if where.any():
            assert (F[:, where] - flow[0][:, where].mean(dim=1, keepdim=True)).abs().max() < 1e-4
    assert F.norm(dim=0).max() > 0.1 and (F[:, ids[0] == 0] == 0).all()


def test_figures_by_scenario_and_their_mean_by_hand():
    none = {"b": (1, 1, 0, 0), "c": (1, 1, 0, 0)}  # of two classes, one
    rows = {"model": [{"a": (1.0, 2.0), "b": (1, 1, 1, 2)}, {"a": (4.0, 4.0)}, {"a": (3.0, 4.0)}, none, {"a": (9, 1)}]}
    rows["model"].append({"a": (7.0, 1.0)})
    found = metrics.by_scenario(rows, ["roll", "drop", "roll", "link", "driving", "branch"])
    value = {name: sources["model"].get("a", {}).get("value") for name, sources in found.items()}
    assert value == {
        "roll": pytest.approx(4 / 6),
        "drop": 1,
        "link": None,
        "driving": 9,
        "branch": 7,
        "mean": pytest.approx(5 / 6),
    }
    mean = found["mean"]["model"]
    assert mean["a"]["clips"] == 3 and np.isnan(mean["c"]["value"])
    assert mean["b"]["value"] == 0.75 and mean["b"]["clips"] == 1 and np.isnan(found["link"]["model"]["b"]["value"])
    low, high = mean["a"]["interval"]  # drop is 1; roll, of two clips, is 1/2, 2/3 or 3/4
    assert (low, high) == (pytest.approx(3 / 4), pytest.approx(7 / 8))
    assert metrics.summarise(rows["model"][:1])["a"] == {"value": 0.5, "interval": [0.5, 0.5], "clips": 1}


def test_tables_by_scenario_from_the_command_line(tmp_path, monkeypatch, capsys):
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    tiny_tower().save_pretrained(tmp_path / "model" / "image_encoder")
    for name, config in (("stage1", STAGE1), ("stage2", STAGE2)):
        tiny_stage(replace(config, **SIZES), scale=0.02).save_pretrained(tmp_path / "model" / name)
    for scenario in ("collide", "roll", "driving"):
        simulate.simulate(scenario, 5, 16, (32, 16)).save(tmp_path / "data" / f"{scenario}.safetensors")
    told = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--json", tmp_path / "all.json", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, told), "--sampling-steps", "1"])
    evaluate.main()
    printed = capsys.readouterr().out.splitlines()
    tables = [line for line in printed if line.endswith("| twin | truth |")]
    assert len(tables) == 4 and tables[3].startswith("| Stage II given true motion: PSNR")
    head = printed.index("| flow error on moving pixels / that of zero flow ↓ | model | nothing moves | "
                         "truth through the VAE | twin | truth |")  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in printed[head + 2 : head + 6]}
    assert lines.keys() == {"collide", "driving", "roll", "mean"}
    assert lines["mean"][1].startswith("1.000") and lines["mean"][4].startswith("0.000")
    assert "-" not in (lines["driving"][3], lines["collide"][3])
    result = json.loads((tmp_path / "all.json").read_text())["scenarios"]
    parts = [result[name]["twin"]["epe_relative"]["value"] for name in ("collide", "roll")]
    assert result["mean"]["twin"]["epe_relative"]["value"] == pytest.approx(sum(parts) / 2)
    assert result["driving"]["model"]["psnr"]["clips"] == 1  # nobody is pushed, but all moves
    assert "psnr" not in result["collide"]["twin"] and result["collide"]["twin"]["psnr_own"]["value"] > 10


# ------------------------------------------------------------------------------- clips that are not from clips.simulate


def scene_of(clip, **meta):
    """A scene with every push, of a clip that stands for all of them."""
    maps = clip.tensors()
    maps["rgb_own"], maps["told"] = maps["rgb"], maps["segmentation"]
    return Scene(None, dict.fromkeys(evaluate.PUSHES, maps), dict.fromkeys(evaluate.PUSHES, {"pushed": 0} | meta))


def value(sums):
    return metrics.combine(np.array(sums, float))


def all_figures(made, scene):
    return metrics.physics_figures(made, scene), metrics.demo_figures(made, scene)


@pytest.mark.parametrize("shown", ["always", "at first", "at last", "never"])
def test_figures_of_ids_that_vanish_or_never_were(shown):
    clip = moving_squares(3)
    if shown != "always":
        clip.segmentation[{"at first": slice(1, None), "at last": slice(0, 3), "never": slice(None)}[shown]] = 0
    scene = scene_of(clip, scenario="dominoes", fallen=[1])
    for figures in all_figures(scene.truth, scene):
        ids = {"iou_last", "iou_mean", "ids_miou", "silhouette_last"}
        if shown == "never":  # a mean over clips must not count "no ids, none shown" as right
            assert not figures.keys() & (ids | {"permanence", "centroid_ade", "painted_ids"})
        else:
            assert {name: value(figures[name]) for name in ids} == pytest.approx(dict.fromkeys(ids, 1))
        objects = {"fallen_carried", "all_right_carried", "all_right_ids", "standing", "painted_ids"} & figures.keys()
        assert bool(objects) == (shown in ("always", "at first"))
        assert value(figures["epe_all"]) == 0
    assert scene.lacks(["physics"]) == ["ids"] * (shown == "never") + ["who is hit"]
    assert scene.lacks(["fvd"]) == []  # pictures alone need no truth
    with pytest.raises(ValueError, match="None: is not from clips.simulate, whose exact tracks --trackers exact needs"):
        evaluate.exact_features(scene)


def test_depth_that_nobody_measured_is_not_judged():
    clip = moving_squares(3)
    scene = scene_of(replace(clip, depth=np.ones_like(clip.depth)))
    made = {"arrow": clip.tensors()}
    assert not {"depth_absrel", "depth_absrel_objects"} & metrics.physics_figures(made, scene).keys()
    assert scene.lacks(["physics", "demo"]) == ["who is hit", "depth", "other pushes"]
    assert metrics.physics_figures(made, scene_of(clip))["depth_absrel"] == (0, clip.depth.size)


def test_a_clip_that_does_not_say_who_was_pushed(tmp_path):
    clip = moving_squares(3)
    steps = {i: np.linalg.norm(clip.flow[0][:, clip.segmentation[0] == i].mean(axis=1)) for i in (1, 2)}
    for told in ({}, {"pushed": None}, {"pushed": "the left one"}):
        replace(clip, meta=told).save(tmp_path / "a.safetensors")
        scene = truth_of(tmp_path / "a.safetensors", 4, "cpu", "pushed")
        assert scene.pushed == max(steps, key=steps.get) and scene.objects == [scene.pushed]


def test_a_pushed_object_that_is_not_seen_has_no_way():
    for pushed, asked in ((1, True), (9, False)):
        scene = scene_of(moving_squares(3), pushed=pushed, scenario="dominoes", fallen=[])
        physics, demo = all_figures(scene.truth, scene)
        assert ("control_angle" in physics, "both_ways" in demo, "both_all_right" in demo) == (asked,) * 3


@pytest.mark.parametrize("truth", ["of the simulator", "of another clip"])
def test_on_a_gpu_nothing_meets_a_tensor_of_the_cpu(truth, tmp_path):
    clip = simulate.simulate("dominoes", 2000002, 4, (48, 24))
    clip = clip if truth == "of the simulator" else replace(clip, meta={"scenario": "physion", "contacts": []})
    clip.save(tmp_path / "a.safetensors")
    scene = truth_of(tmp_path / "a.safetensors", 4, "cpu")
    evaluate.add_other_pushes(scene, tmp_path / "cache", "cpu")
    told = {"rgb_own": scene.truth["arrow"]["rgb"].flip(0), "told": scene.truth["arrow"]["segmentation"]}
    made = {push: maps | told for push, maps in scene.truth.items()}
    expected = all_figures(made, scene)
    if truth == "of the simulator":
        assert {"hit_video", "fallen_video", "both_ways", "standing"} <= expected[0].keys() | expected[1].keys()
    with other_device():
        there = Scene(scene.path, elsewhere(scene.truth), scene.meta)
        found = all_figures(elsewhere(made), there)
        with pytest.raises(AssertionError, match="CPU tensor"):
            all_figures(made, there)
        told = one_arrow(there, "arrow", STAGE1)
        assert {maps.device.type for maps in told} == {"meta"}
        assert there.lacks(["physics", "demo"]) == scene.lacks(["physics", "demo"])
    for figures, others in zip(found, expected, strict=True):
        assert figures.keys() == others.keys()
        assert {name: sums for name, sums in figures.items() if sums != pytest.approx(others[name], nan_ok=True)} == {}
