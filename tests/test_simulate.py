"""clips/simulate.py against physics and geometry: flow by warping, depth by ray and plane, pushes by re-simulation."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clips import CAMERA_YAW_UNIT, Clip
from clips import simulate as simulate_script
from clips.scenes import BY_THEMSELVES
from clips.simulate import (
    SCENARIOS,
    draw_scene,
    is_still,
    jobs_of,
    parse_arguments,
    project,
    simulate,
    tracks,
    write_clip,
)
from clips.traffic import CASES

SIZE = (96, 48)


@pytest.fixture(scope="module")
def clips():
    return {name: simulate(name, 3, 8, SIZE) for name in SCENARIOS}


def sample(values, x, y):
    """Nearest value of [H, W, ...] at (x, y), and whether that is inside."""
    height, width = values.shape[:2]
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return values[row.clip(0, height - 1), column.clip(0, width - 1)], inside


def test_same_seed_same_bytes_and_other_seed_other_scene(tmp_path):
    simulate("dominoes", 5, 3, SIZE).save(tmp_path / "a.safetensors")
    simulate("dominoes", 5, 3, SIZE).save(tmp_path / "b.safetensors")
    simulate("dominoes", 6, 3, SIZE).save(tmp_path / "c.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_frames_warped_by_the_flow_meet_the_next_frame(clips, scenario):
    """Where frame t's pixel is still in sight at t+1, the same thing with the same colour is there; without it, not."""
    clip = clips[scenario]
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    right, warped, still = 0, [], []
    total = 0
    for t in range(7):
        flow, ids = clip.flow[t], clip.segmentation[t]
        moving = np.linalg.norm(flow, axis=0) > 0.7
        there, inside = sample(clip.segmentation[t + 1], x + flow[0], y + flow[1])
        color, _ = sample(clip.rgb[t + 1].astype(float), x + flow[0], y + flow[1])
        seen = moving & inside & (there == ids)
        right, total = right + seen.sum(), total + (moving & inside).sum()
        warped.append(np.abs(color - clip.rgb[t])[seen].mean() if seen.any() else 0)
        still.append(np.abs(clip.rgb[t + 1].astype(float) - clip.rgb[t])[seen].mean() if seen.any() else 0)
    assert total > 50
    assert right > 0.8 * total  # the others went behind something
    assert np.mean(warped) < (0.95 if scenario == "driving" else 0.75) * np.mean(still)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ids_are_those_of_the_scene_and_stay(clips, scenario):
    clip = clips[scenario]
    known = set(range(len(clip.meta["poses"][0]) + 1))
    assert set(np.unique(clip.segmentation)) <= known
    assert set(np.unique(clip.segmentation[0])) >= known - {0} or scenario in ("driving", "contain")
    assert clip.flow.dtype == np.float32 and clip.rgb.shape == (8, *SIZE[::-1], 3)


def test_depth_of_the_floor_is_where_the_ray_meets_the_plane(clips):
    for scenario in ("dominoes", "drop"):
        clip = clips[scenario]
        position, right, down, forward = np.array(clip.meta["camera"][0])
        floor = clip.segmentation[0] == 0
        y, x = np.nonzero(floor)
        focal = clip.meta["focal"]
        rays = (
            forward
            + ((x - (SIZE[0] - 1) / 2) / focal)[:, None] * right
            + ((y - (SIZE[1] - 1) / 2) / focal)[:, None] * down
        )
        expected = -position[2] / rays[:, 2]  # z of position + depth * ray is 0
        near = expected < 50
        np.testing.assert_allclose(clip.depth[0][floor][near], expected[near], rtol=1e-4)


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "driving"])
@pytest.mark.parametrize("seed", [3, 8])
def test_energy_never_grows(scenario, seed):
    energy = np.array(simulate(scenario, seed, 16, (16, 8)).meta["energy"])
    gain = energy - np.minimum.accumulate(energy)
    assert gain.max() <= 1e-2 * energy[0]  # soft contacts give back what they stored
    assert energy[-1] < energy[0]


def test_what_rests_has_exactly_zero_flow(clips):
    clip = clips["dominoes"]
    assert (clip.flow[:, :, :][np.broadcast_to((clip.segmentation == 0)[:, None], clip.flow.shape)] == 0).all()
    quiet = simulate("dominoes", 3, 6, SIZE, push={"strength": 0.0})
    assert (quiet.flow == 0).all()
    assert quiet.meta["pushed"] == 0 and quiet.meta["fallen"] == []
    assert (quiet.rgb[0] == simulate("dominoes", 3, 6, SIZE).rgb[0]).all()


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in BY_THEMSELVES])
def test_all_rest_in_a_still_scene(scenario):
    for seed in range(8):
        clip = simulate(scenario, seed, 16, (24, 12), still=True)
        poses = np.array(clip.meta["poses"])
        assert (clip.flow == 0).all() and (poses == poses[0]).all() and (clip.rgb == clip.rgb[0]).all(), seed
        assert clip.meta["pushed"] == 0 and clip.meta["push"] == [0, 0, 0] and clip.meta["still"] is True
        assert clip.meta["fallen"] == []
        assert "still" not in simulate(scenario, seed, 1, (8, 8)).meta


@pytest.mark.parametrize("scenario", ["drop", "roll"])
def test_what_falls_or_rolls_does_so_without_a_push(scenario):
    for seed in range(4):
        clip = simulate(scenario, seed, 8, (24, 12), still=True)
        assert clip.meta["pushed"] == 0 and (clip.flow != 0).any()
        assert clip.meta["poses"] == simulate(scenario, seed, 8, (24, 12), {"strength": 0.0}).meta["poses"]


def test_driving_knows_no_push():
    clips = [simulate("driving", 3, 2, (16, 8), still=still) for still in (False, True)]
    assert clips[0].meta == clips[1].meta and (clips[0].flow == clips[1].flow).all()


def test_a_crate_is_still_with_what_lies_in_it():
    """In the pushed scene, things still fall into it."""
    for seed in range(6):
        falling, lying = (np.array(simulate("contain", seed, 16, (8, 8), still=still).meta["poses"])
                          for still in (False, True))  # fmt: skip
        assert lying[0, :, 2].max() <= falling[0, :, 2].max() + 1e-3
        assert np.linalg.norm(lying[0, :, :2], axis=1).max() < 0.8  # nothing lies outside


def test_still_clips_are_a_share_that_grows():
    for scenario in ("dominoes", "tower"):
        few, many = ([is_still(scenario, seed, share) for seed in range(2000)] for share in (0.15, 0.4))
        assert 0.12 < np.mean(few) < 0.18 and 0.36 < np.mean(many) < 0.44
        assert (np.array(many) >= few).all()
    assert not any(is_still("dominoes", seed, 0.0) for seed in range(100))
    assert all(is_still("dominoes", seed, 1.0) for seed in range(100))


def branches(clip):
    """Ids of the row, and of the two branches from their first domino on, by where they stand."""
    place = np.array(clip.meta["poses"][0])[:, :2]
    order = np.argsort(place[:, 0])
    row = order[:-4]
    left, right = ([int(i) + 1 for i in order[-4:] if side * place[i, 1] > 0] for side in (1, -1))
    assert np.abs(place[row, 1]).max() < 0.1 and len(left) == len(right) == 2
    return [int(i) + 1 for i in row], left, right


def test_a_domino_hits_two_and_a_wide_gap_stops_one_branch():
    both = stopped = 0
    for seed in range(40):
        clip = simulate("branch", seed, 16, (16, 8))
        row, left, right = branches(clip)
        place, fallen = np.array(clip.meta["poses"][0])[:, :2], set(clip.meta["fallen"])
        if clip.meta["pushed"] != row[0]:
            assert clip.meta["pushed"] or not fallen
            continue
        reached = set(row)
        for branch in (left, right):
            step = np.linalg.norm(place[branch[1] - 1] - place[branch[0] - 1])
            reached |= set(branch if step < 1.3 * clip.meta["height"] else branch[:1])
        assert fallen == reached, seed
        assert clip.meta["wide_gap"] == (len(reached) < len(row) + 4)
        both, stopped = both + (not clip.meta["wide_gap"]), stopped + clip.meta["wide_gap"]
    assert both >= 10 and stopped >= 5


def test_a_ball_fells_a_tower_that_it_hits_hard_and_no_other():
    hit = missed = 0
    for seed in range(30):
        meta = simulate("tower", seed, 16, (8, 8)).meta
        ball = meta["pushed"]
        touched = any(ball in pair[:2] for pair in meta["contacts"])
        blocks = {*range(1, len(meta["poses"][0]) + 1)} - {ball}
        assert touched or not blocks & set(meta["fallen"]), seed
        hit, missed = hit + touched, missed + (not touched)
        if touched and meta["strength"] > 3:
            assert blocks & set(meta["fallen"]), seed
            soft = simulate("tower", seed, 16, (8, 8), {"strength": 0.3}).meta
            assert not blocks & set(soft["fallen"]), seed
    assert missed >= 3 and hit >= 15


def driving_seed(case):
    """The first seed of this case."""
    return next(seed for seed in range(200) if draw_scene("driving", seed, 1, {})[0].truth["case"] == case)


@pytest.mark.parametrize("case", [case for case in CASES if case != "follow"])
def test_another_ego_motion_ends_a_drive_differently_for_the_other(case):
    seed = driving_seed(case)
    first, second = (simulate("driving", seed, 16, SIZE, {"order": order}) for order in ("first", "second"))
    assert first.meta["order"] == ["ego", "other"] and second.meta["order"] == ["other", "ego"]
    assert (first.rgb[0] == second.rgb[0]).all() and (first.depth[0] == second.depth[0]).all()
    other = first.meta["other"]
    ends = [np.array(clip.meta["poses"])[-1, other - 1, :2] for clip in (first, second)]
    assert np.linalg.norm(ends[0] - ends[1]) > 0.5
    assert first.camera[:, 0].sum() > second.camera[:, 0].sum() + 2
    assert (first.segmentation[0] == other).any()
    faster = simulate("driving", seed, 16, SIZE, {"ego": 1})
    assert (faster.flow == first.flow).all() and faster.meta["told"] == first.meta["told"]


def test_a_lead_car_goes_where_it_is_told():
    seed = driving_seed("follow")
    ends = []
    for told in ({"lead_speed": -1}, {"lead_speed": 1}, {"lead_lane": 1}, {"lead_lane": -1}):
        meta = simulate("driving", seed, 16, (16, 8), told).meta
        ends.append(np.array(meta["poses"])[-1, meta["other"] - 1])
        assert meta["told"].items() >= told.items()
    forth = np.array([ends[0][0], ends[1][0]])
    assert forth[1] > forth[0] + 1 and ends[2][1] > ends[3][1] + 2


def falls(seed, **push):
    clip = simulate("dominoes", seed, 16, (32, 16), push or None)
    return clip.meta, clip.meta["fallen"]


def test_a_wide_gap_stops_the_chain_and_a_bridgeable_one_does_not():
    stopped = went_on = 0
    for seed in range(60):
        meta, fallen = falls(seed)
        if not meta["pushed"]:
            assert not fallen
            continue
        position = np.array(meta["poses"][0])[:, 0]
        row = (np.argsort(position) + 1).tolist()  # ids from one end to the other
        ahead = row[row.index(meta["pushed"]) :] if meta["side"] > 0 else row[: row.index(meta["pushed"]) + 1][::-1]
        reached = [ahead[0]]
        for a, b in pairwise(ahead):
            if abs(position[b - 1] - position[a - 1]) > 1.25 * meta["height"]:
                stopped += 1
                break
            reached.append(b)
        else:
            went_on += len(ahead) > 1
        assert set(fallen) == set(reached), f"seed {seed}"
    assert stopped >= 4 and went_on >= 15


def test_opposite_push_of_the_same_scene_falls_to_the_other_side():
    for seed in (5, 8, 11):
        side = falls(seed)[0]["side"]
        clips = [simulate("dominoes", seed, 8, SIZE, {"side": s}) for s in (side, -side)]
        assert (clips[0].rgb[0] == clips[1].rgb[0]).all() and (clips[0].depth[0] == clips[1].depth[0]).all()
        moves = []
        for clip in clips:
            poses = np.array(clip.meta["poses"])
            moves.append(poses[-1, clip.meta["pushed"] - 1, 0] - poses[0, clip.meta["pushed"] - 1, 0])
        assert np.sign(moves[0]) == side and np.sign(moves[1]) == -side


def test_stronger_pushes_topple_sooner():
    for seed in (5, 8):
        times = []
        for strength in (0.6, 1.8):
            meta, fallen = falls(seed, strength=strength)
            poses = np.array(meta["poses"])[:, meta["pushed"] - 1]
            leaning = np.abs(poses[:, 4:6]).max(axis=1) > 0.3  # x, y of the quaternion
            assert meta["pushed"] in fallen
            times.append(int(np.argmax(leaning)))
        assert times[1] < times[0]


def test_contacts_are_symmetric_unique_and_only_when_near(clips):
    for scenario, clip in clips.items():
        pairs = [tuple(pair[:2]) for pair in clip.meta["contacts"]]
        assert len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
        poses = np.array(clip.meta["poses"])
        for a, b, t in clip.meta["contacts"]:
            assert np.linalg.norm(poses[t, a - 1, :3] - poses[t, b - 1, :3]) < 2.0, scenario


def test_objects_fill_about_a_quarter_of_the_picture():
    covers = [(simulate("dominoes", seed, 1, (128, 64)).segmentation[0] > 0).mean() for seed in range(24)]
    assert np.mean(covers) > 0.22 and min(covers) > 0.1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tracks_follow_the_flow_and_the_things(clips, scenario):
    clip, random = clips[scenario], np.random.default_rng(0)
    points = np.stack([random.integers(0, SIZE[0], 80), random.integers(0, SIZE[1], 80)], axis=1)
    followed = tracks(clip, points.astype(float))
    assert followed.shape == (8, 80, 2)
    np.testing.assert_allclose(followed[0], points, atol=1e-3)
    x, y = points.T
    step = clip.flow[0][:, y, x].T
    usual = clip.depth[0, y, x] < 90
    np.testing.assert_allclose((followed[1] - followed[0])[usual], step[usual], atol=0.02)
    ids = clip.segmentation[0, y, x]
    there, inside = sample(clip.segmentation[5], *followed[5].T)
    same = (there == ids)[inside & (ids > 0)]
    assert len(same) == 0 or same.mean() > 0.5  # the rest is hidden


def test_driving_flow_of_the_background_is_that_of_the_camera():
    """The still world, reprojected by hand from depth and the two cameras; forward and yaw agree with the clip's c."""
    for seed in range(6):
        clip = simulate("driving", seed, 4, SIZE)
        cameras, focal = np.array(clip.meta["camera"]), clip.meta["focal"]
        y, x = np.mgrid[: SIZE[1], : SIZE[0]]
        local = np.stack([(x - (SIZE[0] - 1) / 2) / focal, (y - (SIZE[1] - 1) / 2) / focal, np.ones_like(x)], axis=-1)
        world = cameras[0, 0] + (clip.depth[0][..., None] * local) @ cameras[0, 1:]
        expected = project(world, cameras[1], focal, SIZE)[..., :2] - np.stack([x, y], axis=-1)
        still = (clip.segmentation[0] == 0) & (clip.depth[0] < 90)
        np.testing.assert_allclose(clip.flow[0].transpose(1, 2, 0)[still], expected[still], atol=0.02)
        assert clip.camera.shape == (4, 2)
        np.testing.assert_allclose(clip.camera[:, 0], np.linalg.norm(np.diff(cameras[:, 0], axis=0), axis=1), atol=1e-3)
        turns = np.diff(np.arctan2(*cameras[:, 3, :2].T))  # from y towards x: to the right
        np.testing.assert_allclose(clip.camera[:, 1] * CAMERA_YAW_UNIT, turns, atol=1e-4)


def test_windows_of_a_drive_have_their_own_camera_motion(tmp_path):
    """Whoever drives must brake for who is ahead."""
    change = []
    for seed in range(6):
        path = tmp_path / f"{seed}.safetensors"
        simulate("driving", seed, 12, (16, 8)).save(path)
        first, last = Clip.load(path, 0, 3), Clip.load(path, 9, 3)
        way = np.linalg.norm(np.diff(np.array(first.meta["camera"])[:, 0], axis=0), axis=1)  # of the whole clip
        for window, told in ((first, way[:3]), (last, way[9:])):
            assert window.tensors()["camera"][0].item() == pytest.approx(told.mean(), abs=1e-4)
        change.append(abs(way[:3].mean() - way[9:].mean()))
    assert max(change) > 0.05


def test_bad_arguments_are_named():
    for told, words in (
        ({"scenario": "jump", "seed": 0}, "jump"),
        ({"scenario": "drop", "seed": -1}, "-1"),
        ({"scenario": "drop", "seed": 0, "size": 4}, "4"),
        ({"scenario": "drop", "seed": 0, "push": {"speed": 1}}, "speed"),
        ({"scenario": "drop", "seed": 0, "push": {"side": 2}}, "side is 2"),
        ({"scenario": "drop", "seed": 0, "push": {"side": 1}, "still": True}, "still"),
        ({"scenario": "drop", "seed": 0, "push": {"ego": 1}}, "ego"),
        ({"scenario": "driving", "seed": 0, "push": {"side": 1}}, "side"),
        ({"scenario": "driving", "seed": 0, "push": {"order": "third"}}, "third"),
    ):
        with pytest.raises(ValueError, match=words):
            simulate(**told)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "clips.simulate", *map(str, arguments)], capture_output=True, text=True
    )


class Here:
    """A pool of no processes: starting one takes seconds."""

    map = map


def run_here(monkeypatch, *arguments):
    monkeypatch.setattr(simulate_script, "processes", lambda count: contextlib.nullcontext(Here))
    monkeypatch.setattr(sys, "argv", ["clips.simulate", *map(str, arguments)])
    simulate_script.main()


def test_command_line_writes_clips_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """With processes of its own, then twice without."""
    told = (
        tmp_path / "clips",
        "--clips",
        3,
        "--scenario",
        "drop,roll",
        "--size",
        "24x16",
        "--frames",
        2,
        "--workers",
        1,
    )
    done = run(*told, "--seed", 7)
    assert done.returncode == 0 and not re.search("Exception|Traceback", done.stderr)  # of workers that end
    names = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert names == ["drop_00000007.safetensors", "drop_00000009.safetensors", "roll_00000008.safetensors"]
    clip = Clip.load(tmp_path / "clips" / "roll_00000008.safetensors")
    assert clip.rgb.shape == (2, 16, 24, 3) and clip.fps == pytest.approx(10) and clip.meta["scenario"] == "roll"
    kept = tmp_path / "clips" / names[0]
    written = kept.stat().st_mtime_ns
    (tmp_path / "clips" / names[1]).unlink()
    run_here(monkeypatch, *told, "--seed", 7)
    assert kept.stat().st_mtime_ns == written and (tmp_path / "clips" / names[1]).exists()
    kept.unlink()
    run_here(monkeypatch, *told, "--seed", 7, "--mirror")
    assert len(list((tmp_path / "clips").iterdir())) == 6
    image = Clip.load(tmp_path / "clips" / "roll_00000008_mirrored.safetensors")
    assert (image.rgb == clip.rgb[:, :, ::-1]).all() and image.meta["seed"] == 8


def test_command_line_leaves_out_pushes(tmp_path, monkeypatch):
    told = ("--clips", 3, "--scenario", "dominoes", "--size", "24x16", "--frames", 2, "--workers", 1, "--seed", 5)
    run_here(monkeypatch, tmp_path, *told, "--still", 1)
    clips = [Clip.load(path) for path in sorted(tmp_path.iterdir())]
    assert len(clips) == 3 and all(clip.meta["still"] and not clip.flow.any() for clip in clips)


def failure(capsys, monkeypatch, *words):
    """The one line on stderr of a command that ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["clips.simulate", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        simulate_script.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (("--scenario", "jump"), "--scenario jump: expected some of dominoes, .*"),
        (("--size", "x"), "--size x: expected WIDTHxHEIGHT, such as 128x64, or one number"),
        (("--size", "4"), "--size 4: expected 8 pixels at least"),
        (("--size", "64x4"), "--size 64x4: expected 8 pixels at least"),
        (("--clips", "0"), "--clips 0: expected 1 at least"),
        (("--frames", "-3"), "--frames -3: expected 1 at least"),
        (("--workers", "0"), "--workers 0: expected 1 at least"),
        (("--seed", "-1"), "--seed -1: expected 0 at least"),
        (("--still", "1.5"), "--still 1.5: expected a share from 0 to 1"),
        (("--still", "nan"), "--still nan: expected a share from 0 to 1"),
    ],
)
def test_command_line_mistakes_are_one_line(tmp_path, capsys, monkeypatch, told, line):
    assert re.fullmatch(f"clips.simulate: {line}", failure(capsys, monkeypatch, tmp_path / "clips", *told))
    assert not (tmp_path / "clips").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    told = failure(capsys, monkeypatch, tmp_path / "file" / "clips", "--clips", 1)
    assert told.startswith("clips.simulate: ") and "file/clips" in told


@pytest.mark.parametrize(
    ("told", "was"),
    [
        (("--frames", 3), "2 frames of 24x16, now 3 of 24x16"),
        (("--size", "16x24"), "2 frames of 24x16, now 2 of 16x24"),
    ],
)
def test_clips_of_other_settings_are_not_mixed(tmp_path, capsys, monkeypatch, told, was):
    file = tmp_path / "dominoes_00000001.safetensors"
    simulate("dominoes", 1, frames=2, size=(24, 16)).save(file)
    line = failure(capsys, monkeypatch, tmp_path, "--clips", 2, "--size", "24x16", "--frames", 2, *told)
    assert line == f"clips.simulate: {file}: was made with {was}: take another DIR"
    assert list(tmp_path.iterdir()) == [file]


def test_clips_with_and_without_a_push_are_not_mixed(tmp_path, capsys, monkeypatch):
    words = tmp_path, "--clips", 4, "--scenario", "dominoes,driving", "--size", "16x8", "--frames", 2, "--mirror"
    arguments = parse_arguments([str(word) for word in (*words, "--still", 1)])
    for job in jobs_of(arguments):
        write_clip(job)
    assert jobs_of(arguments) == []  # drives and mirror images do not say whether they are still
    line, file = failure(capsys, monkeypatch, *words), tmp_path / "dominoes_00000000.safetensors"
    assert line == f"clips.simulate: {file}: was made with another --still: take another DIR"


def started(folder, workers):
    """clips.simulate of many clips, in a process group of its own, when it has written a clip."""
    words = ["--clips", "2000", "--size", "24x16", "--frames", "2", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "clips.simulate", folder, *words], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background would not hear it
    )  # fmt: skip
    while not list(folder.glob("*.safetensors")):
        time.sleep(0.05)
        assert process.poll() is None
    return process


def said_at_the_end(process):
    """What it said, when nobody is left that could say more; without the bar."""
    try:
        told = process.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return [line for line in re.split(r"[\r\n]", told) if line.strip() and not re.search(r"clip(/s)?\]", line)]


STOPPED = "clips.simulate: stopped; the same command goes on from here"
KILLED = "clips.simulate: a worker was killed; the same command goes on from here"


@pytest.mark.parametrize(
    ("number", "reached", "workers", "code", "lines"),
    [
        (signal.SIGINT, "all", 2, 130, [STOPPED]),  # as a terminal sends it; the second worker may not be ready yet
        (signal.SIGTERM, "first", 1, 130, [STOPPED]),
        (signal.SIGKILL, "first", 1, -9, None),  # its workers end by themselves
        (signal.SIGKILL, "worker", 1, 2, [KILLED]),
    ],
)
def test_ctrl_c_and_its_like_are_one_line_and_leave_whole_clips(tmp_path, number, reached, workers, code, lines):
    process = started(tmp_path / "clips", workers)
    if reached == "worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(children.read_text().split()[-1]) if children.exists() else pytest.skip("of Linux"), number)
    else:
        (os.killpg if reached == "all" else os.kill)(process.pid, number)
    told = said_at_the_end(process)
    assert (lines is None or told == lines) and process.returncode == code
    if number != signal.SIGKILL:
        assert {path.suffix for path in (tmp_path / "clips").iterdir()} == {".safetensors"}
