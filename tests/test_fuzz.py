"""Whatever a user brings: a ValueError or FileNotFoundError of one line, or a finite instance flow. Nothing else."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from clips import Clip, ClipDataset
from inputs import Arrows, apply_shapes, arrows_to_flow
from inputs.photo import fit, read_inputs

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

quick = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same cases on every machine
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

numbers = st.integers(-5, 40) | st.floats(-5, 40) | st.floats() | st.integers() | st.none() | st.booleans()
anything = st.recursive(
    numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
places = st.tuples(st.floats(-3, 33), st.floats(-3, 33)).map(list)
entry_keys = ("start", "end", "instance", "box", "polygon", "mask")
entries = st.dictionaries(st.sampled_from(entry_keys), anything, max_size=4)
good_entries = st.fixed_dictionaries(
    {"start": places, "end": places | st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)).map(list)},
    optional={
        "instance": st.integers(-1, 257),
        "box": st.lists(st.floats(-3, 33), min_size=4, max_size=4),
        "polygon": st.lists(places, max_size=5),
    },
)
files = st.fixed_dictionaries(
    {"arrows": st.lists(good_entries | entries | anything, max_size=4)},
    optional={
        "camera": st.tuples(st.floats(), st.floats()).map(list) | anything,
        "delta": st.floats(1e-30, 1e6) | anything,
        "depth": anything,
        "segmentation": anything,
        "rest": st.just("still") | anything,
        "extra": anything,
    },
)
sizes = st.tuples(st.integers(1, 33), st.integers(1, 33))  # height, width


def picture(size, seed):
    """Noise, one colour or two halves."""
    rng = np.random.default_rng(seed)
    rgb = np.full((*size, 3), rng.integers(256), np.uint8)
    if seed % 3 == 1:
        rgb = rng.integers(256, size=rgb.shape, dtype=np.uint8)
    if seed % 3 == 2:
        rgb[: size[0] // 2, size[1] // 2 :] = rng.integers(256, size=3)
    return rgb


def told_or(action):
    """What `action` returns; None when it is told in one line why not. Everything else is a failure."""
    try:
        return action()
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip() and "\n" not in str(error), repr(str(error))
        return None


def flow_is_finite(arrows, ids, frames):
    F = told_or(lambda: arrows_to_flow(arrows, ids, frames))
    if F is not None:
        assert F.dtype == torch.float32 and F.shape[1:] == ids.shape and torch.isfinite(F).all()


@quick
@hypothesis.given(anything | files)
def test_any_json(content):
    arrows = told_or(lambda: Arrows.from_dict(content, "folder", "mine.json"))
    if arrows is not None:
        assert Arrows.from_dict(json.loads(json.dumps(arrows.to_dict()))) == arrows


@quick
@hypothesis.given(text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text)
    told_or(lambda: Arrows.load(path))
    path.write_bytes(b'{"arrows": [' + text + b"]}")
    told_or(lambda: Arrows.load(path))


@quick
@hypothesis.given(
    entries=st.lists(good_entries, max_size=4),
    delta=st.none() | st.floats(1e-30, 1e6),
    size=sizes,
    seed=st.integers(0, 99),
    ids=st.none() | st.integers(1, 255),
    frames=st.integers(-1, 30),
)
def test_any_arrows_on_any_picture_with_any_ids(entries, delta, size, seed, ids, frames):
    rng = np.random.default_rng(seed)
    segmentation = None if ids is None else rng.integers(ids + 1, size=size).astype(np.uint8)
    content = {"arrows": entries} if delta is None else {"arrows": entries, "delta": delta}
    arrows = told_or(lambda: Arrows.from_dict(content))
    made = arrows and told_or(lambda: apply_shapes(arrows, picture(size, seed), segmentation))
    if made:
        assert all(arrow.instance in made[1] for arrow in made[0].arrows)
        flow_is_finite(made[0], torch.from_numpy(made[1]).long(), frames)


@quick
@hypothesis.given(
    content=files,
    size=sizes,
    ids_size=st.none() | sizes,
    model=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 99),
    depth=st.none() | st.lists(st.floats(width=32), min_size=1, max_size=4),
)
def test_from_the_files_to_the_model(tmp_path_factory, content, size, ids_size, model, seed, depth):
    folder, rng = tmp_path_factory.getbasetemp(), np.random.default_rng(seed)
    arguments = {"image": str(folder / "image.png"), "segment": "auto", "segment_model": "x/y", "svd": None}
    arguments |= {"depth": "auto", "depth_model": "x/y", "segmentation": None}
    Image.fromarray(picture(size, seed)).save(folder / "image.png")
    if ids_size is not None:
        ids = rng.integers(256, size=size if seed % 2 else ids_size).astype(np.uint8)
        Image.fromarray(ids).save(folder / "ids.png")
        content |= {"segmentation": "ids.png"}
    if depth is not None:
        np.save(folder / "depth.npy", np.resize(np.float32(depth), size))
        content |= {"depth": "depth.npy"}
    (folder / "arrows.json").write_text(json.dumps(content))
    given = told_or(lambda: read_inputs(argparse.Namespace(**arguments), str(folder / "arrows.json"), "cpu"))
    fitted = given and told_or(lambda: fit(given, *model))
    if fitted:
        inputs, canvas = fitted
        flow_is_finite(inputs.arrows, inputs.ids, 4)
        told = {name: part for name, part in inputs.told(4, canvas, "cpu").items() if part is not None}
        assert all(torch.isfinite(part.float()).all() for part in told.values())
        assert told.pop("camera").shape == (1, 2)
        assert {"image", "F", "mask"} <= told.keys() <= {"image", "F", "mask", "segmentation", "depth"}
        assert all(part.shape[0] == 1 and part.shape[-2:] == model[::-1] for part in told.values())
        assert ((told["F"] == 0) | (told["mask"] == 1)).all()  # what moves is told
        assert inputs.depth is None or (inputs.depth > 0).all()


# -------------------------------------------------------------------------------------------------------- clips, trials

dtypes = st.sampled_from(["uint8", "int64", "float16", "float32", "float64", "bool", "S3"])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 12, 16]), max_size=4)


def array_of(dtype, shape, seed):
    """Noise, ones, or what is not finite."""
    rng = np.random.default_rng(seed)
    values = [100 * rng.normal(size=shape), np.ones(shape), np.full(shape, np.nan), np.full(shape, 1e30)]
    values = np.asarray(values[seed % 4])
    with np.errstate(all="ignore"):
        return np.asarray((np.nan_to_num(values) if dtype in ("uint8", "int64") else values).astype(dtype))


@pytest.fixture(scope="module")
def sound_trial(tmp_path_factory):
    from test_physion import Spheres, write_trial

    path = tmp_path_factory.mktemp("trial") / "sound.hdf5"
    return write_trial(path, Spheres(12, 16, False), frames=3, view=0)


@quick
@hypothesis.given(data=st.data(), dtype=dtypes, shape=shapes, seed=st.integers(0, 99))
@pytest.mark.filterwarnings("error")
def test_any_member_of_a_trial(sound_trial, data, dtype, shape, seed):
    """One member is gone, of another kind, cut off or of other numbers."""
    from clips import physion

    h5py = pytest.importorskip("h5py")
    path = sound_trial.with_name("any.hdf5")
    path.write_bytes(sound_trial.read_bytes())
    with h5py.File(path, "a") as file:
        members = []
        file.visit(members.append)
        name = data.draw(st.sampled_from(sorted(member for member in members if not member.startswith("frames/0003"))))
        held = file[name][()] if isinstance(file[name], h5py.Dataset) else np.zeros(0)
        change = data.draw(st.sampled_from(["gone", "group", "other", "same shape", "cut"]))
        del file[name]
        if change == "group":
            file.create_group(name)
        elif change != "gone":
            other = {"other": shape, "same shape": np.shape(held)}.get(change)
            file[name] = held[:5] if other is None and np.ndim(held) else array_of(dtype, other or [], seed)
    none = physion.depth_annotator("none", "")
    clip = told_or(lambda: physion.read_trial(path, physion.Cut(frames=2), None, none))
    if clip and told_or(lambda: clip.save(path.with_suffix(".safetensors")) or True):
        Clip.load(path.with_suffix(".safetensors")).tensors()


parts = st.sampled_from(["rgb", "flow", "segmentation", "depth", "camera"])
any_meta = st.dictionaries(st.text(max_size=3) | st.just("motion_bucket"), anything, max_size=2)


@quick
@hypothesis.given(
    part=parts,
    power=st.integers(-12, 12),
    dtype=dtypes,
    shape=shapes | st.none(),
    seed=st.integers(0, 9),
    fps=numbers | st.just(7.0),
    meta=any_meta,
)
@pytest.mark.filterwarnings("error")
def test_any_clip_that_is_written_can_be_read(tmp_path_factory, part, power, dtype, shape, seed, fps, meta):
    """By `check` and by training; what cannot is refused before a file is there."""
    from test_clip import random_clip

    from clips.check import check

    clip, folder = random_clip(frames=2, height=3, width=4), tmp_path_factory.mktemp("written")
    value = getattr(clip, part)
    changed = value * np.float32(10.0**power) if shape is None else array_of(dtype, shape, seed)
    for name, new in ((part, changed if value.dtype != np.uint8 or shape else value), ("fps", fps), ("meta", meta)):
        setattr(clip, name, new)
    if told_or(lambda: clip.save(folder / "a.safetensors") or True):
        assert check(folder) == []
        ClipDataset(folder)[(0, 0)]
    assert len(list(folder.iterdir())) <= 1


@quick
@hypothesis.given(part=parts, dtype=dtypes, shape=shapes | st.none(), seed=st.integers(0, 9), told=st.none() | anything)
@pytest.mark.filterwarnings("error")
def test_any_clip_file(tmp_path_factory, part, dtype, shape, seed, told):
    """Read, or one line that begins with the file."""
    from safetensors.numpy import load_file, save_file
    from test_clip import random_clip

    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    random_clip(frames=2, height=3, width=4).save(path)
    tensors = load_file(path)
    del tensors[part]
    if shape is not None and dtype != "S3":
        tensors[part] = array_of(dtype, shape, seed)
    save_file(tensors, path, {"clip": json.dumps(told)})
    for read in (lambda: Clip.load(path, 1, 1).tensors(), lambda: ClipDataset(path.parent)[(0, 0)]):
        try:
            read()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


figure_meta = st.fixed_dictionaries(
    {},
    optional={
        "scenario": st.sampled_from(["dominoes", "driving", "video"]) | anything,
        "fallen": st.just([1, 2]),
        "pushed": st.integers(0, 3) | anything,
        "contacts": st.just([[1, 2, 0]]),
        "motion_bucket": st.integers(0, 255),
    },
)


@hypothesis.settings(quick, max_examples=20)
@hypothesis.given(
    meta=figure_meta, frames=st.integers(1, 3), size=sizes, ids=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_any_clip_has_figures(tmp_path_factory, meta, frames, size, ids, seed):
    """Of truth against noise and against itself, whatever the first or the last frame shows: sums that are finite."""
    import metrics
    from training.scenes import add_other_pushes, truth_of

    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("figures")
    shape = frames, *size
    clip = Clip(
        rng.integers(256, size=(*shape, 3), dtype=np.uint8), rng.normal(size=(frames, 2, *size)) * (seed % 3),
        rng.integers(ids + 1, size=shape).astype(np.uint8), np.full(shape, 2.0) + rng.random(shape) * (seed % 2),
        meta=meta,
    )  # fmt: skip
    clip.segmentation[[slice(0), slice(1), slice(1, None)][seed % 3]] = 0
    clip.save(folder / "a.safetensors")
    scene = truth_of(folder / "a.safetensors", frames, "cpu", "pushed" if seed % 5 == 0 else "all")
    add_other_pushes(scene, folder, "cpu")
    true = scene.truth["arrow"]
    other = {name: value.roll(1, -1) for name, value in true.items() if value.ndim > 2}
    for maps in (true, other):
        made = {"arrow": maps | {"rgb_own": maps["rgb"], "told": maps["segmentation"]}}
        for figures in (metrics.physics_figures(made, scene), metrics.demo_figures(made, scene)):
            assert np.isfinite([value for sums in figures.values() for value in sums]).all()
            metrics.summarise([figures])
    assert "other pushes" in scene.lacks(["demo"])
