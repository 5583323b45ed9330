"""Folders and videos that users bring to clips.annotate: clips that clips.check accepts, or one line and code 2."""

import re
import shutil
import sys

import numpy as np
import pytest
from films import gray_levels, retimed, write_video
from PIL import Image

from clips import annotate
from clips.check import check
from clips.video import read_video

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def settings(examples):
    checks = list(hypothesis.HealthCheck)
    told = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": checks}
    return hypothesis.settings(max_examples=examples, **told)


FRAMES, HEIGHT, WIDTH = 5, 10, 14
SHAPES = {"flow": (2, HEIGHT, WIDTH), "ids": (HEIGHT, WIDTH), "depth": (HEIGHT, WIDTH)}
OPTIONS = {"flow": "--flow", "ids": "--segmentation", "depth": "--depth"}
numbers = [1, 2.5, 7, 0, -1, 255, 300, 7e4, 1e-9, 1e10, 1e300, np.nan, np.inf]
dtypes = ["float32", "float16", "float64", "uint8", "int64", "bool", "complex64", "U3"]
modes = ["L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "1", "CMYK"]
formats = ["PNG", "TIFF", "JPEG", "GIF", "WEBP", "BMP"]
shapes = [lambda a: a] * 6 + [lambda a: a[None], lambda a: a.T, lambda a: a[..., 1:], lambda a: a[:0]]
arrays = st.tuples(st.just("array"), st.sampled_from(numbers), st.sampled_from(dtypes), st.sampled_from(shapes))
pictures = st.tuples(
    st.just("picture"), st.sampled_from([1, 7, 200]), st.sampled_from(modes), st.sampled_from(formats), st.booleans()
)
broken = st.tuples(st.just("bytes"), st.binary(max_size=20), st.sampled_from([".npy", ".png", ".flo"]))
files = st.one_of(arrays, arrays, pictures, broken)


def write_file(path, shape, how):
    """One frame's file; what cannot be written so is written as a plain array."""
    kind, value, *told = how
    plain = np.ones(shape, np.float32)
    if kind == "array":
        with np.errstate(all="ignore"):
            np.save(path.with_suffix(".npy"), told[1]((plain * np.float64(value)).astype(told[0])))
    elif kind == "bytes":
        path.with_suffix(told[0]).write_bytes(value)
    else:
        mode, form, noisy = told
        gray = np.full(shape[-2:], value, np.uint8) - np.arange(shape[-1], dtype=np.uint8) * noisy
        try:
            Image.fromarray(gray).convert(mode).save(path.with_suffix(".png"), form)
        except (OSError, ValueError):  # a format without this mode
            np.save(path.with_suffix(".npy"), plain)


def run(capsys, words):
    """Exit code and lines of stderr of `python -m clips.annotate WORDS`."""
    sys.argv = ["clips.annotate", *map(str, words)]
    try:
        annotate.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, [line for line in capsys.readouterr().err.splitlines() if line.strip() and "frame [" not in line]


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    """What came of each example. The video is read without FFmpeg, which would take most of the time."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    frames = gray_levels([40, 42, 44, 46, 48], HEIGHT, WIDTH)
    monkeypatch.setattr(annotate, "read_video", lambda path, fps: iter(frames))
    (tmp_path / "v.mp4").write_text("read above")
    found = []
    yield found
    assert set(found) == {0, 2}  # the examples show both


def test_any_folders(outcomes, tmp_path, capsys):
    @settings(60)
    @hypothesis.given(
        st.sampled_from(["flow", "ids", "depth"]), files, files, st.sampled_from([5, 5, 5, 5, 4, 6]), st.booleans()
    )
    def try_one(name, most, one, count, camera):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name / "v").mkdir(parents=True)
        for number in range(count):
            write_file(tmp_path / name / "v" / f"{number:06d}", SHAPES[name], one if number == 3 else most)
        told = {"flow": tmp_path / "still", "ids": "none", "depth": "none"} | {name: tmp_path / name}
        words = [word for part, folder in told.items() for word in (OPTIONS[part], folder)]
        words += ["--size", f"{WIDTH}x{HEIGHT}", "--frames", 2, "--camera", "flow" if camera else "none"]
        code, lines = run(capsys, [tmp_path / "v.mp4", *words, "--out", tmp_path / "out"])
        outcomes.append(code)
        assert (code, len(lines)) in {(0, 0), (2, 1)}, lines
        assert all(re.match("clips.annotate: .", line) for line in lines)
        if (tmp_path / "out").exists():
            assert check(tmp_path / "out") == []
            assert {path.suffix for path in (tmp_path / "out").rglob("*.*")} <= {".safetensors", ".json", ""}

    (tmp_path / "still" / "v").mkdir(parents=True)
    for number in range(FRAMES):
        np.save(tmp_path / "still" / "v" / f"{number:06d}.npy", np.zeros(SHAPES["flow"], np.float32))
    try_one()


def test_any_times(tmp_path):
    """A frame is shown from its time on, whatever the steps; the video takes as long as it takes."""
    count = 12
    source = write_video(tmp_path / "even.mp4", gray_levels(range(20, 20 + 15 * count, 15)), 20)

    @settings(4)
    @hypothesis.given(
        st.lists(st.integers(2, 12), min_size=count - 1, max_size=count - 1),
        st.sampled_from([".mp4", ".gif"]),
        st.sampled_from([3, 4.5, 7]),
    )
    def try_one(steps, ending, fps):
        times = np.concatenate([[0], np.cumsum(steps)]) * 10
        path = retimed(source, tmp_path / f"v{ending}", times)
        shown = [round((frame.mean() - 20) / 15) for frame in read_video(path, fps)]
        late = times[-1] / (count - 1) / 2 + 20
        for k, number in enumerate(shown):
            first, last = (np.flatnonzero(times <= max(0, 1000 * k / fps + more))[-1] for more in (-1, late))
            assert first <= number <= last
        assert abs(len(shown) - times[-1] / 1000 * fps) <= 2

    try_one()
