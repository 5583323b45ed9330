"""Videos of any model beside the truth, what such a model is told, and the comparison of two rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from films import ffmpeg, gray_levels, retimed, write_video
from PIL import Image
from sensitivity import degraded, write_degraded

import evaluate
import metrics
from clips import Clip
from inputs import Arrows, arrows_to_flow
from metrics import Row, frechet, videos
from metrics.trackers import sample_at
from motion_dreamer import STAGE1
from show import to_uint8
from training.prompts import prompt_of
from training.sampler import in_halves, one_arrow
from training.scenes import truth_of

simulate = pytest.importorskip("clips.simulate")

SIZE = (64, 32)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--quiet"])
    evaluate.main()


def seen_changes(video, points):
    """A tracker that costs nothing: a point goes to the right by how much the picture changes below it."""
    change = (video[1:] - video[:-1]).abs().mean(dim=1, keepdim=True)
    way = sample_at(change, points.expand(len(change), -1, -1), "border")[:, 0].cumsum(dim=0) * 30
    way = torch.cat([torch.zeros_like(way[:1]), way])
    return points + torch.stack([way, torch.zeros_like(way)], dim=-1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three rows of dominoes: all fall, one falls, and nobody pushes."""
    folder = tmp_path_factory.mktemp("data")
    for i, seed in enumerate((2000000, 2000002, 2000001)):
        simulate.simulate("dominoes", seed, 16, SIZE).save(folder / f"{i}.safetensors")
    return [truth_of(path, 16, "cpu") for path in sorted(folder.glob("*"))]


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """By what was done to them, folders of the clips' videos: pictures, and as mp4 the clips as they are."""
    out = tmp_path_factory.mktemp("made")
    for scene in clips:
        for how, maps in degraded(scene.truth["arrow"]).items():
            if how == "as it is":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sensitivity.degraded", lambda true: {"as it is": true})
                    write_degraded(scene, out)
                continue
            folder = out / how.split()[0] / scene.path.stem
            folder.mkdir(parents=True)
            for t, pixels in enumerate(to_uint8(maps["rgb"])):
                Image.fromarray(pixels).save(folder / f"{t}.png")
    return out


# ------------------------------------------------------------------------------------------------------ command line


def test_the_truth_has_full_marks_and_worse_videos_lose(clips, made, monkeypatch, capsys, tmp_path):
    """And what went through an mp4 is as near to the truth as metrics/videos.py says."""
    for name, value in {"FEWEST": 2, "SET_RESAMPLES": 20}.items():
        monkeypatch.setattr(frechet, name, value)
    monkeypatch.setattr(metrics.motion, "RESAMPLES", 50)
    monkeypatch.setattr(metrics.paired, "FEWEST", 2)
    monkeypatch.setattr(metrics.features, "lucas_kanade", seen_changes)
    worse = ["frozen", "shuffled", "delayed", "blurred"]
    folders = [f"mp4={made / 'as_it_is'}", *(made / how for how in worse)]
    told = ["--videos", *folders, "--data", clips[0].path.parent, "--metrics", "physics,fvmd"]
    told += ["--clips", 2]  # those that move: in the third, a frozen video is right
    run(monkeypatch, *told, "--json", tmp_path / "v.json")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "v.json").read_text())
    value = {row: {n: f["value"] for n, f in found.items()} for row, found in result["figures"].items()}
    fvmd = "FVMD (Lucas-Kanade) ↓"
    full = {"psnr_video": 99, "ids_video": 1, "moved_video": 1, "hit_video": 1, "fallen_video": 1, fvmd: 0}
    assert value["truth"] == pytest.approx(full, abs=1e-6)
    mp4 = value["mp4"]
    assert mp4["psnr_video"] >= 26 and mp4["ids_video"] >= 0.85
    assert all(mp4[name] >= 0.95 for name in ("moved_video", "hit_video", "fallen_video"))
    assert mp4[fvmd] < 0.1 * max(value[how][fvmd] for how in worse)
    assert value["still"] == pytest.approx(value["frozen"], rel=1e-3)
    for name in ("moved_video", "hit_video", "fallen_video"):
        assert value["frozen"][name] < 0.8
    for how in worse:
        found = result["differences"][f"{how} - mp4"]
        names = {"psnr_video", fvmd} if how != "blurred" else {"psnr_video"}
        assert {name: found[name]["better"] for name in names} == dict.fromkeys(names, False), how
        assert found["ids_video"]["value"] < 0 or how == "blurred"
        assert found["ids_video"]["value"] == pytest.approx(value[how]["ids_video"] - mp4["ids_video"])
    lines = printed.splitlines()
    assert lines[0] == (
        "| figure | mp4 | frozen | shuffled | delayed | blurred | nothing moves | truth | "
        "half of the truth and the other | clips |"
    )
    (line,) = (line for line in lines if line.startswith("| PSNR") and "worse" in line)
    assert line.count("worse") == 4 and "99.0" in printed and metrics.RULES in printed
    assert result["settings"]["clips"] == 2 and result["settings"]["frames"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "has no video of 1 of 3 clips; the first is 1: expected 1.mp4, .gif or a folder 1 of pictures"),
        ("twice", "holds 1 and 1.gif, expected one video of 1"),
        ("short", "holds 12 pictures, the clip has 16 frames"),
        ("odd", "is 50x32, the clip 64x32, of another shape: --stretch resizes it all the same"),
        ("mixed", "is 32x32, the first picture of its folder 64x32"),
        ("nowhere", "there is no folder"),
        ("same name", "the name frozen is taken"),
        ("demo", "--metrics demo"),
        ("few", "3 clips, a Frechet distance (--metrics fvd,fvmd) needs 8 at least"),
        ("frames", "clips have 15 frames, FVMD (--metrics fvmd) needs 16"),
    ],
)
def test_a_foreign_folder_is_one_clear_line(clips, made, monkeypatch, capsys, tmp_path, change, message):
    folder, data = tmp_path / "foreign", clips[0].path.parent
    for name in "012":
        (folder / name).mkdir(parents=True)
        for t in range(16):
            (folder / name / f"{t}.png").hardlink_to(made / "frozen" / name / f"{t}.png")
    files = sorted((folder / "1").iterdir())
    told = ["--videos", folder, "--data", data, "--metrics", "physics", "--json", tmp_path / "v.json"]
    monkeypatch.setattr(metrics, "video_figures", lambda *_: pytest.fail("measured before all were read"))
    if change == "missing":
        (folder / "1").rename(folder / "other")
    elif change == "twice":
        (folder / "1.gif").write_bytes(b"")
    elif change == "short":
        [file.unlink() for file in files[:4]]
    elif change in ("odd", "mixed"):
        for file in files if change == "odd" else files[-1:]:
            file.unlink()
            Image.new("RGB", (50 if change == "odd" else 32, 32)).save(file)
    elif change in ("few", "frames"):
        monkeypatch.setattr(frechet, "FEWEST", 3 if change == "frames" else 8)
        told += ["--metrics", "fvd,fvmd", "--frames", "15" if change == "frames" else "16"]
    else:
        told += {
            "nowhere": ["--videos", tmp_path / "nowhere"],
            "same name": ["--videos", made / "frozen", f"frozen={folder}"],
            "demo": ["--metrics", "demo"],
        }[change]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *told)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("evaluate.py: ") and message in line
    assert not (tmp_path / "v.json").exists()


def test_nothing_is_written_where_nobody_asked_and_quick_is_few(clips, made, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(clips[0].path.parent.rglob("*"))
    run(monkeypatch, "--videos", made / "frozen", "--data", clips[0].path.parent, "--metrics", "physics", "--clips", 1)
    assert list(tmp_path.iterdir()) == [] and sorted(clips[0].path.parent.rglob("*")) == before
    printed = capsys.readouterr().out
    assert printed.count("\n\n") == 1 and "half of" not in printed  # one row: no differences, and no distances
    for words, told in (
        (["--model", "m"], (200, 10, ["physics", "demo"])),
        (["--model", "m", "--quick"], (8, 4, ["physics"])),
        (["--model", "m", "--quick", "--clips", "3", "--metrics", "demo"], (3, 4, ["demo"])),
        (["--videos", "v", "--quick"], (8, 4, ["physics", "fvd", "fvmd"])),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--data", "d"])
        arguments = evaluate.parse_arguments()
        evaluate.fill_in(arguments)
        assert (arguments.clips, arguments.sampling_steps, arguments.metrics) == told and arguments.json is None
    assert evaluate.QUICK["clips"] >= metrics.FEWEST  # so that a first look may have Frechet distances


# ------------------------------------------------------------------------------------------ the rules of reading


def levels(video):
    """The gray level of every frame, of 255."""
    return ((video.mean(dim=(1, 2, 3)) + 1) * 127.5).round().int().tolist()


def test_frames_by_number_or_by_time(tmp_path):
    shades = [20 * t for t in range(12)]
    film = write_video(tmp_path / "film.mp4", gray_levels(shades), 30)
    near = dict(abs=3)
    size = (24, 36)
    assert levels(metrics.read_fitted(film, 12, 10.0, size)) == pytest.approx(shades, **near)  # whatever its rate
    uneven = retimed(film, tmp_path / "uneven.mp4", [100 * t + 100 * max(0, t - 6) for t in range(12)])
    assert levels(metrics.read_fitted(uneven, 12, 10.0, size)) == pytest.approx(shades, **near)  # nor its frames' times
    assert levels(metrics.read_fitted(film, 4, 10.0, size)) == pytest.approx(shades[::3], **near)
    assert levels(metrics.read_fitted(film, 6, 15.0, size)) == pytest.approx(shades[::2], **near)
    assert levels(metrics.read_fitted(film, 5, 30.0, size)) == pytest.approx(shades[:5], **near)
    for frames, fps in ((5, 10.0), (13, 30.0), (5, 40.0)):  # it ends before; one is missing; it is slower
        with pytest.raises(ValueError, match=f"film.mp4: has 12 frames, 30 a second, the clip {frames}, {fps:g} a"):
            metrics.read_fitted(film, frames, fps, size)
    ffmpeg("-i", film, tmp_path / "film.webm")
    assert levels(metrics.read_fitted(tmp_path / "film.webm", 4, 10.0, size)) == pytest.approx(shades[::3], **near)


def write_plain_gif(path, frames):
    """As Pillow writes it, ten frames a second."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=100, loop=0)


def test_a_gif_whose_equal_frames_were_joined(tmp_path):
    shades = [0, 0, 0, 60, 60, 120, 180, 240]
    write_plain_gif(tmp_path / "a.gif", gray_levels(shades, 16, 256))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5
    size = (16, 256)
    assert levels(metrics.read_fitted(tmp_path / "a.gif", 8, 7.0, size)) == shades  # by number: all eight
    assert levels(metrics.read_fitted(tmp_path / "a.gif", 4, 5.0, size)) == shades[::2]
    assert levels(metrics.read_fitted(tmp_path / "a.gif", 6, 10.0, size)) == shades[:6]
    write_plain_gif(tmp_path / "still.gif", gray_levels([60] * 8, 16, 256))
    assert levels(metrics.read_fitted(tmp_path / "still.gif", 16, 10.0, size)) == [60] * 16
    with pytest.raises(ValueError, match="a.gif: has 8 frames, 10 a second, the clip 9"):
        metrics.read_fitted(tmp_path / "a.gif", 9, 10.0, size)


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    for t in range(12):
        Image.new("L", (36, 24), 20 * t).save(tmp_path / f"frame{t}.png")  # frame10 after frame9
    (tmp_path / "notes.txt").write_text("no picture")
    assert levels(metrics.read_fitted(tmp_path, 11, 10.0, (24, 36))) == [20 * t for t in range(11)]


def test_sizes():
    random = np.random.default_rng(0).integers(256, size=(2, 6, 8, 3), dtype=np.uint8)
    video = videos.resized(random, (6, 8), False, Path("v"))
    assert torch.equal(video, torch.from_numpy(random).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.equal(videos.resized(np.pad(random, ((0, 0), (0, 1), (0, 1), (0, 0))), (6, 8), False, "v"), video)
    stripes = np.zeros((1, 24, 32, 3), np.uint8)
    stripes[:, :, ::4] = 255  # a quarter is white: who picks one or two pixels of four sees black
    assert (videos.resized(stripes, (6, 8), False, Path("v")) + 0.5).abs().max() < 0.3
    flat = np.full((2, 60, 81, 3), 51, np.uint8)
    assert videos.resized(flat, (6, 8), False, Path("v")).shape == (2, 3, 6, 8)  # 1.25 % off
    assert torch.allclose(videos.resized(flat[:, :50], (6, 8), True, Path("v")), torch.tensor(-0.6))
    with pytest.raises(ValueError, match="v: is 81x50, the clip 8x6, of another shape: --stretch"):
        videos.resized(flat[:, :50], (6, 8), False, Path("v"))


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v/1.png"])
@pytest.mark.parametrize("content", [b"", b"no video", b"GIF89a\x01\x00"])
def test_what_is_no_video_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as error:
        metrics.read_fitted(path if path.suffix != ".png" else path.parent, 1, 10.0, (6, 8))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ prompts


def test_prompts_say_what_our_models_are_told(clips, monkeypatch, capsys, tmp_path):
    """By arrows.json's own reader: the exported arrows are the flow that evaluate.py gives to a stage."""
    run(monkeypatch, "--export-prompts", tmp_path / "p", "--data", clips[0].path.parent)
    assert "prompts of 3 clips, 16 frames of 64x32" in capsys.readouterr().out
    told = []
    for scene in clips:
        prompt = json.loads((tmp_path / "p" / f"{scene.path.stem}.json").read_text())
        maps = scene.truth["arrow"]
        ids = np.asarray(Image.open(tmp_path / "p" / prompt["masks"]))
        assert (ids == maps["segmentation"][0].numpy()).all()
        assert (np.asarray(Image.open(tmp_path / "p" / prompt["first_frame"])) == to_uint8(maps["rgb"][:1])[0]).all()
        assert (prompt["width"], prompt["height"], prompt["frames"], prompt["fps"]) == (*SIZE, 16, 10)
        arrows = Arrows.from_dict({"arrows": prompt["arrows"], "rest": prompt["rest"], "camera": prompt["camera"]})
        F = one_arrow(scene, "arrow", replace(STAGE1, reduce="start"))[0]
        assert torch.allclose(arrows_to_flow(arrows, maps["segmentation"][0], 16), F, atol=1e-4)
        told.append((len(arrows.arrows), arrows.rest))
        for instance, path in prompt["trajectories"].items():
            points, owner = metrics.carry_seen(maps["flow"], maps["segmentation"], maps["segmentation"][0])
            way = metrics.displacement(points, owner, scene.pushed)
            assert len(path) == 16 and int(instance) == scene.pushed
            y, x = (maps["segmentation"][0] == scene.pushed).nonzero().double().mean(dim=0).tolist()
            assert path[0] == pytest.approx([x + 0.5, y + 0.5], abs=1e-3)
            assert np.subtract(path[-1], path[0]) == pytest.approx(way.tolist(), abs=1e-3)
    assert told == [(1, None), (1, None), (0, "still")]
    for path in tmp_path.glob("p/*.json"):  # a model that only repeats the picture
        Image.open(path.with_suffix(".png")).save(path.with_suffix(".gif"))
    monkeypatch.setattr(metrics, "video_figures", lambda *_: {})
    run(monkeypatch, "--videos", tmp_path / "p", "--data", clips[0].path.parent, "--metrics", "physics")


def test_a_drive_tells_of_every_car_and_of_the_camera(tmp_path):
    simulate.simulate("driving", 9_000_101, 16, SIZE).save(tmp_path / "d.safetensors")
    scene = truth_of(tmp_path / "d.safetensors", 16, "cpu")
    prompt = prompt_of(scene)
    assert prompt["camera"][0] > 0 and [arrow["instance"] for arrow in prompt["arrows"]] == scene.objects
    arrows = Arrows.from_dict({"arrows": prompt["arrows"]})
    F = arrows_to_flow(arrows, scene.truth["arrow"]["segmentation"][0], 16)
    assert torch.allclose(F, one_arrow(scene, "arrow", replace(STAGE1, reduce="start"))[0], atol=1e-4)


# --------------------------------------------------------------------------------------------- two rows compared


def rows_of(values):
    return [{"hit": (float(value), 1.0), "epe_all": (float(value), 1.0)} for value in values]


def test_a_paired_difference_leaves_zero_out_where_intervals_overlap():
    """Clips differ by much more than rows do: each row's interval holds the other's value."""
    hard = np.random.default_rng(0).normal(size=40)
    a, b = Row([rows_of(hard + 0.1)], [{}]), Row([rows_of(hard)], [{}])
    low, high = metrics.average(b)["hit"]["interval"]
    assert low < metrics.average(a)["hit"]["value"] < high
    found = metrics.differences(a, b)
    assert found["hit"]["value"] == pytest.approx(0.1) and found["hit"]["interval"] == pytest.approx([0.1, 0.1])
    assert found["hit"]["better"] is True and found["epe_all"]["better"] is False  # less error is better
    back = metrics.differences(b, a)
    assert back["hit"]["better"] is False and back["hit"]["value"] == pytest.approx(-0.1)
    assert metrics.change(found["hit"]) == "0.100 [0.100, 0.100] better"
    noisy = Row([rows_of(hard + np.random.default_rng(1).normal(size=40))], [{}])
    unsure = metrics.differences(noisy, b)["hit"]
    assert unsure["better"] is None and unsure["interval"][0] < 0 < unsure["interval"][1]
    few = metrics.differences(Row([rows_of(range(2, 7))], [{}]), Row([rows_of([0] * 5)], [{}]))["hit"]
    assert few["interval"][0] > 0 and few["better"] is None  # five say nothing yet


def test_the_interval_of_a_difference_by_hand():
    """Of independent differences it is that of their mean: 1.96 standard errors."""
    change = np.random.default_rng(2).normal(size=100)
    found = metrics.differences(Row([rows_of(change)], [{}]), Row([rows_of(0 * change)], [{}]))["hit"]
    error = change.std() / 10
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_seeds_are_drawn_too():
    """Two seeds that disagree leave the difference open, however sure each is over clips."""
    hard = np.random.default_rng(0).normal(size=40)
    zero = Row([rows_of(hard)], [{}])
    up, down = Row([rows_of(hard + 0.3)], [{}]), Row([rows_of(hard - 0.1)], [{}])
    both = metrics.differences(up + down, zero + zero)["hit"]
    assert both["value"] == pytest.approx(0.1) and both["better"] is None
    assert both["interval"] == pytest.approx([-0.1, 0.3])
    assert metrics.differences(up + up, zero + zero)["hit"]["better"] is True
    assert metrics.average(up + down)["hit"]["value"] == pytest.approx(hard.mean() + 0.1)


def test_distances_are_paired_by_the_same_draws():
    """The same features have no difference in any draw; those that lie further off are worse in all."""
    generator = torch.Generator().manual_seed(0)
    true = [torch.randn(1, 4, generator=generator) for _ in range(12)]
    features = metrics.Features({"FVMD (x) ↓": [("rgb_own", lambda x: x)]})
    scene = None
    for i, x in enumerate(true):
        for name, by in (("truth", 0.0), ("a", 0.5), ("b", 0.5), ("c", 1.0 + i / 50)):
            features.add(name, {"rgb_own": x + by}, scene)
    row = {name: Row([[{}] * 12], [features.draws(name)]) for name in "abc"}
    same, far = (metrics.differences(row[name], row["a"])["FVMD (x) ↓"] for name in "bc")
    assert same["value"] == 0 and same["interval"] == [0, 0] and same["better"] is None
    assert far["interval"][0] > 0 and far["better"] is False
    assert far["value"] == pytest.approx(features.distances("c")["FVMD (x) ↓"]["value"] - 1.0, abs=1e-6)


def test_twins_are_compared_with_the_clips_that_they_are_of():
    """Every second clip has none, as mirror images; the truth's other half lies far off."""
    features = metrics.Features({"FVMD (x) ↓": [("rgb_own", lambda x: x)]})
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        scene, x = metrics.Scene(Path(str(i)), {}, {}), torch.randn(1, 4, generator=generator)
        features.add("truth", {"rgb_own": x + 9 * (i % 2)}, scene)
        if i % 2 == 0:
            features.add("twin", {"rgb_own": x}, scene)
    assert features.distances("twin")["FVMD (x) ↓"]["value"] == pytest.approx(0, abs=1e-6)


def test_what_one_row_lacks_in_a_clip_counts_for_neither():
    a, b = rows_of([1, 2, 3] * 4), rows_of([0, 0, 0] * 4)
    del b[2]["hit"], a[2]["epe_all"]
    found = metrics.differences(Row([a], [{}]), Row([b], [{}]))
    assert found["hit"]["clips"] == found["epe_all"]["clips"] == 11
    assert found["hit"]["value"] == pytest.approx((24 - 3) / 11)


# ------------------------------------------------------------------------------------------------------ memory


def test_a_batch_that_does_not_fit_is_halved(clips):
    tried = []

    def sample(scenes, motion):
        tried.append(len(scenes))
        if len(scenes) > 1:
            raise torch.OutOfMemoryError("too much")
        assert motion is None
        return {"flow": scenes[0].truth["arrow"]["flow"][None]}

    made = in_halves(sample, clips, None)
    assert tried == [3, 1, 2, 1, 1]
    assert torch.equal(made["flow"], torch.stack([scene.truth["arrow"]["flow"] for scene in clips]))

    def never(scenes, motion):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(ValueError, match="0.safetensors: sampling this clip alone"):
        in_halves(never, clips, None)


def test_what_colours_cannot_tell_is_not_asked(clips):
    """A thing that moves and has the background's colour, and one that stays and is seen to stay."""
    ids, video = torch.zeros(16, 24, 48, dtype=torch.long), torch.full((16, 3, 24, 48), -0.5)
    for t in range(16):
        ids[t, 4:10, 2 + 2 * t : 10 + 2 * t] = 1
        ids[t, 14:20, 4:12] = 2
    video[:, 0][ids == 2] = 0.9
    maps = {"rgb": video, "segmentation": ids, "flow": torch.zeros(16, 2, 24, 48)}
    scene = metrics.Scene(Path("x"), {"arrow": maps}, {"arrow": {"pushed": 0}})
    assert metrics.video_figures(video, scene)["moved_video"] == (0, 0, 1, 1)


def test_what_has_left_the_picture_has_moved():
    """One that goes out to the right, and one that stays; a video in which both stay is right of the second alone."""
    ids = torch.zeros(8, 24, 48, dtype=torch.long)
    for t in range(8):
        ids[t, 4:10, 10 + 6 * t : 18 + 6 * t] = 1
        ids[t, 14:20, 4:12] = 2
    assert not (ids[-1] == 1).any()
    video = torch.tensor([[-0.9, -0.9, -0.9], [0.9, -0.5, 0.0], [0.0, 0.9, -0.5]])[ids].movedim(-1, 1)
    maps = {"rgb": video, "segmentation": ids, "flow": torch.zeros(8, 2, 24, 48)}
    scene = metrics.Scene(Path("x"), {"arrow": maps}, {"arrow": {"pushed": 0}})
    assert metrics.video_figures(video, scene)["moved_video"] == (1, 1, 1, 1)
    assert metrics.video_figures(video[:1].expand_as(video), scene)["moved_video"] == (0, 1, 1, 1)


def test_clips_of_any_origin_have_the_figures_that_they_allow(clips):
    """Without ids, without the simulator's truth, without motion."""
    clip = Clip.load(clips[0].path)
    bare = replace(clip, segmentation=clip.segmentation * 0, meta={})
    scene = metrics.Scene(Path("x"), {"arrow": bare.tensors()}, {"arrow": {"pushed": 0}})
    assert metrics.video_figures(scene.truth["arrow"]["rgb"], scene).keys() == {"psnr_video"}
    some = metrics.Scene(Path("x"), {"arrow": clip.tensors()}, {"arrow": {"pushed": 1}})
    assert metrics.video_figures(clip.tensors()["rgb"], some).keys() == {"psnr_video", "ids_video", "moved_video"}
    assert "psnr_video" not in metrics.video_figures(clips[2].truth["arrow"]["rgb"], clips[2])
