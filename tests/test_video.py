"""clips/video.py: frames of a video by their times, upright and with square pixels; shots."""

import numpy as np
import pytest
from films import ffmpeg, gray_levels, retimed, write_video

from clips import video

LEVELS = np.arange(20, 220, 5)  # of 40 frames
TIMES = np.array([40 * n if n < 20 else 800 + 100 * (n - 20) for n in range(40)])  # ms; a phone in the dark


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 frames, 20 a second."""
    return write_video(tmp_path_factory.mktemp("films") / "even.mp4", gray_levels(LEVELS), 20)


def numbers_in(path, fps):
    """Which of the 40 frames `read_video` gives."""
    return [round((frame.mean() - 20) / 5) for frame in video.read_video(path, fps)]


@pytest.mark.parametrize("fps", [20, 19, 10, 8.5, 7, 3])
def test_the_frame_that_is_nearest_in_time(source, fps):
    kept = numbers_in(source, fps)
    assert kept[0] == 0 and len(set(kept)) == len(kept)
    for k, number in enumerate(kept):
        assert abs(number / 20 - k / fps) <= 0.5 / 20 + 1e-6
    assert abs(len(kept) / fps - 2) <= 1 / fps


@pytest.mark.parametrize("name", ["phone.mp4", "phone.mkv", "phone.gif"])
@pytest.mark.parametrize("fps", [10, 7])
def test_a_variable_frame_rate(source, tmp_path, name, fps):
    """Whoever counts frames at the mean rate of this file reads its second half at half speed."""
    path = retimed(source, tmp_path / name, TIMES)
    kept = numbers_in(path, fps)
    step = TIMES[-1] / 39  # the mean
    for k, number in enumerate(kept):
        now, soon = (np.flatnonzero(1000 * k / fps + late >= TIMES)[-1] for late in (0, step / 2 + 1))
        assert now <= number <= soon, k
    assert abs(len(kept) - TIMES[-1] / 1000 * fps) <= 2


def test_no_frame_is_repeated_before_a_picture_that_begins_after_the_sound(source, tmp_path):
    late = tmp_path / "late.mp4"
    sound = ["-f", "lavfi", "-i", "sine=d=3"]
    ffmpeg("-itsoffset", 0.5, "-i", source, *sound, "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", late)
    assert numbers_in(late, 10) == numbers_in(source, 10)


def test_a_turned_video_is_upright(tmp_path, caplog):
    """A phone writes how it was held beside the frames: here a quarter turn to the left."""
    frames = gray_levels([60] * 4)
    frames[:, :12, :18] = 220
    flat = write_video(tmp_path / "flat.mp4", frames, 10)
    ffmpeg("-display_rotation", 90, "-i", flat, "-c", "copy", tmp_path / "turned.mp4")
    (seen, *_), (upright, *_) = (list(video.read_video(tmp_path / f"{n}.mp4", 10)) for n in ("flat", "turned"))
    assert upright.shape == (36, 24, 3)
    np.testing.assert_allclose(upright.astype(int), np.rot90(seen).astype(int), atol=12)
    assert not caplog.records  # stderr is for what is wrong


@pytest.mark.parametrize(("words", "size"), [((), (72, 24)), (("-display_rotation", 90), (12, 36))])
def test_pixels_that_are_not_square(source, tmp_path, words, size):
    """Twice as wide as high. After a quarter turn, twice as high as wide."""
    wide, path = tmp_path / "wide.mp4", tmp_path / "v.mp4"
    ffmpeg("-i", source, "-vf", "setsar=2/1", wide)
    ffmpeg(*words, "-i", wide, "-c", "copy", path)
    assert {frame.shape for frame in video.read_video(path, 10)} == {(size[1], size[0], 3)}
    assert numbers_in(path, 10) == numbers_in(source, 10)


def test_a_recording_that_changes_its_size(source, tmp_path):
    """As a shared screen does. All frames have the size of the first, and none is lost."""
    for name, size in (("a", "36:24"), ("b", "72:48")):
        ffmpeg("-i", source, "-vf", f"scale={size}", "-c:v", "libx264", "-f", "h264", tmp_path / f"{name}.h264")
    both = tmp_path / "both.h264"
    both.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    frames = list(video.read_video(both, 10))
    assert {frame.shape for frame in frames} == {(24, 36, 3)}
    assert numbers_in(both, 10) == numbers_in(source, 10) * 2


def test_a_file_without_a_rate(source, monkeypatch):
    """What a browser records does not say one: its frames are counted."""
    first = {"fps": 0, "size": (36, 24)}
    read = video.imageio_ffmpeg.read_frames

    def silent(path, **told):
        stream = read(path, **told)
        yield next(stream) | first
        yield from stream

    expected = numbers_in(source, 10)
    monkeypatch.setattr(video.imageio_ffmpeg, "read_frames", silent)
    assert video.frames_a_second(source) == pytest.approx(20, rel=0.06)
    assert len(numbers_in(source, 10)) == len(expected)


def test_read_video_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mp4: no such file$"):
        list(video.read_video(tmp_path / "a.mp4", 5))
    (tmp_path / "b.mp4").write_text("no video" * 99)
    with pytest.raises(ValueError, match=r"b\.mp4: not a video \([^\n]*\)$"):
        list(video.read_video(tmp_path / "b.mp4", 5))
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", tmp_path / "sound.wav")
    with pytest.raises(ValueError, match=r"sound\.wav: not a video \([^\n]*\)$"):
        list(video.read_video(tmp_path / "sound.wav", 5))
    path = write_video(tmp_path / "c.mp4", gray_levels([9, 99, 200]), 5)
    with pytest.raises(ValueError, match=r"c\.mp4: has 5 frames a second, --fps 7 asks for more"):
        list(video.read_video(path, 7))


def test_29_97_counts_as_30(tmp_path):
    """Otherwise every hundredth frame would be repeated."""
    path = write_video(tmp_path / "v.mp4", gray_levels([*LEVELS, *LEVELS]), 20)
    assert numbers_in(path, 20.2) == [*range(40), *range(40)]


def test_pieces_end_at_scene_cuts():
    scenes = [np.full((6, 10, 3), level, np.uint8) for level in (10, 200, 90)]
    frames = [scenes[i] for i in [0] * 7 + [1] * 4 + [2] * 3]
    found = [(start, len(rgb), int(rgb[0, 0, 0, 0])) for start, rgb in video.pieces(frames, 3)]
    assert found == [(0, 3, 10), (3, 3, 10), (6, 1, 10), (7, 3, 200), (10, 1, 200), (11, 3, 90)]
    assert list(video.pieces([], 3)) == []


def test_a_cut_is_where_most_pixels_change_their_color_class():
    random = np.random.default_rng(1)
    still = np.zeros((10, 10, 3), np.uint8)
    for changed in (10, 49, 50, 51, 80):
        other = still.copy().reshape(100, 3)
        other[random.permutation(100)[:changed]] = (255, 0, 128)
        count = len(list(video.pieces([still, other.reshape(10, 10, 3)], 5)))
        assert count == (2 if changed > 50 else 1)
    moved = random.integers(256, size=(10, 10, 3), dtype=np.uint8)
    assert len(list(video.pieces([moved, np.roll(moved, 5, 1)], 5))) == 1  # motion is no cut
