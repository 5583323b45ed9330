"""Whatever a model folder or a motion.safetensors holds: it is read, or sample.py says in one line what is wrong with
which file, and ends with 2. Nothing is ever asked of the hub for a path."""

import filecmp
import json
import os
import pickle
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import clips_in, save_tiny_model, tiny_stage, tiny_tower, tiny_vae

import sample
import train
from motion_dreamer import STAGE1, Motion, MotionDreamer
from sources.find import is_hub_id, weights_in
from svd import VAE, ImageEncoder

WIDTH, HEIGHT, FRAMES = 24, 16, 3
STEM = "diffusion_pytorch_model"
PARTS = {"vae": VAE, "image_encoder": ImageEncoder, "stage1": MotionDreamer, "stage2": MotionDreamer}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, WIDTH, HEIGHT, FRAMES)
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    told = {"svd": None, "model": model, "offload": False, "device": "cpu", "precision": "fp32", "compile": False}
    return sample.load_models(types.SimpleNamespace(**told, stage="both"))


@pytest.fixture
def own(model, tmp_path):
    """A copy of the model that a test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "own"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def asked(source, **_):
        raise AssertionError(f"the hub was asked for {source}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


def only_what_changed(patch, model, loaded):
    """Parts as they are in `model` are not built again: that takes most of the time."""
    there = {"vae": loaded.vae, "image_encoder": loaded.tower, **loaded.stages}
    for cls in set(PARTS.values()):

        def opened(source, name=None, *rest, load=cls.from_pretrained, **settings):
            here = Path(source) / (name or "")
            if not here.is_dir() or name not in there:
                return load(source, name, *rest, **settings)
            differs = filecmp.dircmp(here, model / name)
            changed = differs.left_only or differs.right_only or differs.diff_files
            return load(source, name, *rest, **settings) if changed else there[name]

        patch.setattr(cls, "from_pretrained", opened)


@pytest.fixture
def loads(monkeypatch, capsys, model, loaded):
    """sample.py up to where it would compute -> None, or the line that says why it does not."""
    only_what_changed(monkeypatch, model, loaded)
    monkeypatch.setattr(sample, "run_task", lambda *_: None)
    monkeypatch.setattr(sample, "check_output", lambda *_: None)
    return lambda *told: outcome(monkeypatch, capsys, model / "image.png", *told)


def outcome(monkeypatch, capsys, *told):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, told)])
    capsys.readouterr()
    try:
        sample.main()
    except SystemExit as stop:
        assert stop.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("sample.py: ") and len(line) < 1000
        return line
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------- folders of other tools


def shard(folder, stem=STEM, ending="", index="{}.safetensors.index.json", name="{}-0000{}-of-00002{}.safetensors"):
    """Two files and their index, as diffusers and transformers write them for large networks."""
    path = folder / f"{stem}.safetensors"
    tensors, where = load_file(path), {}
    for part in (1, 2):
        file = name.format(stem, part, ending)
        held = {key: value for i, (key, value) in enumerate(tensors.items()) if i % 2 == part - 1}
        save_file(held, folder / file)
        where |= dict.fromkeys(held, file)
    path.unlink()
    (folder / index.format(stem)).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def rename(folder, change):
    path = folder / f"{STEM}.safetensors"
    save_file({change(key): value for key, value in load_file(path).items()}, path)


def move(folder, name, stem=STEM):
    (folder / f"{stem}.safetensors").rename(folder / name)


INDEX = "{}.safetensors.index.json"
LAYOUTS = {
    "shards": ("vae", shard),
    "shards of transformers": ("image_encoder", lambda f: shard(f, "model")),
    "shards of a variant": ("vae", lambda f: shard(f, ending=".fp16", index=INDEX.replace(".json", ".fp16.json"))),
    "another order": (
        "stage1",
        lambda f: shard(f, name="{}.fp16-0000{}-of-00002{}.safetensors", index=INDEX.replace(".json", ".fp16.json")),
    ),
    "shards of any name": ("stage2", lambda f: shard(f, name="part{1}.safetensors")),
    "fp16": ("vae", lambda f: move(f, f"{STEM}.fp16.safetensors")),
    "another variant": ("vae", lambda f: move(f, f"{STEM}.non_ema.safetensors")),
    "bf16 of transformers": ("image_encoder", lambda f: move(f, "model.bf16.safetensors", "model")),
    "the only file": ("stage1", lambda f: move(f, "svd_motion.safetensors")),
    "beside a pickle": ("vae", lambda f: (f / f"{STEM}.bin").write_bytes(b"\x80\x04")),
    "beside a variant": (
        "vae",
        lambda f: shutil.copy(f / "../stage1" / f"{STEM}.safetensors", f / "m.ema.safetensors"),
    ),
    "byte order mark": (
        "vae",
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
    ),
    "compiled part": ("stage1", lambda f: rename(f, lambda key: key.replace("unet.", "unet._orig_mod."))),
    "compiled stage": ("stage2", lambda f: rename(f, lambda key: f"_orig_mod.{key}")),
    "DDP, compiled": ("vae", lambda f: rename(f, lambda key: f"module._orig_mod.{key}")),
    "checkpointed blocks": (
        "stage2",
        lambda f: rename(f, lambda key: key.replace("resnets.0.", "resnets.0._checkpoint_wrapped_module.")),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_other_tools_are_read(own, model, loads, layout):
    part, change = LAYOUTS[layout]
    change(own / part)
    assert loads("--model", own) is None
    theirs, ours = (PARTS[part].from_pretrained(folder, part).state_dict() for folder in (own, model))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def write(name, content):
    return lambda folder: (folder / "vae" / name).write_bytes(content)


def without_weights(folder, *files):
    (folder / "vae" / f"{STEM}.safetensors").unlink()
    for name in files:
        (folder / "vae" / name).write_bytes(b"\x80\x02}q\x00.")


def two_variants(folder):
    move(folder / "vae", "a.safetensors")
    shutil.copy(folder / "vae/a.safetensors", folder / "vae/b.safetensors")


def lose_a_shard(folder):
    shard(folder / "vae")
    (folder / "vae" / f"{STEM}-00002-of-00002.safetensors").unlink()


def lose_the_index(folder):
    shard(folder / "vae")
    (folder / "vae" / f"{STEM}.safetensors.index.json").unlink()


def change_index(content):
    def change(folder):
        shard(folder / "vae")
        (folder / "vae" / f"{STEM}.safetensors.index.json").write_text(content)

    return change


def twice(folder):
    path = folder / "stage1" / f"{STEM}.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"_orig_mod.unet.conv_in.bias": tensors["unet.conv_in.bias"] + 1}, path)


def whole_numbers(folder):
    path = folder / "stage1" / f"{STEM}.safetensors"
    save_file(load_file(path) | {"unet.conv_in.bias": torch.zeros(8, dtype=torch.int8)}, path)


def swap(folder):
    (folder / "stage1").rename(folder / "other")
    (folder / "stage2").rename(folder / "stage1")
    (folder / "other").rename(folder / "stage2")


def another_vae(folder):
    config = replace(tiny_vae().config, latent_channels=2)
    torch.manual_seed(0)
    VAE(config).save_pretrained(folder / "vae")


def another_tower(folder):
    torch.manual_seed(0)
    ImageEncoder(replace(tiny_tower().config, projection_dim=8)).save_pretrained(folder / "image_encoder")


def setting(value, part, *names):
    """Another value in a config.json; "gone": none."""

    def change(folder):
        path = folder / part / "config.json"
        config = inner = json.loads(path.read_text())
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        if value == "gone":
            del inner[names[-1]]
        path.write_text(json.dumps(config))

    return change


def less_motion(folder):
    sizes = {"vae_factor": 2, "frames": FRAMES, "width": WIDTH, "height": HEIGHT}
    tiny_stage(replace(STAGE1, predict=("flow", "segmentation"), **sizes)).save_pretrained(folder / "stage1")


WEIGHTS = f"vae/{STEM}.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 391\n"
REFUSED = {
    "pointer": (write(f"{STEM}.safetensors", POINTER), f"{WEIGHTS}: a git-lfs pointer"),
    "pointer as config": (write("config.json", POINTER), "vae/config.json: a git-lfs pointer"),
    "page": (write(f"{STEM}.safetensors", b"\n<!DOCTYPE html><html>" + b" " * 999), f"{WEIGHTS}: a page of HTML"),
    "page as config": (write("config.json", b"<html>Sign in"), "vae/config.json: a page of HTML"),
    "pickle of that name": (write(f"{STEM}.safetensors", pickle.dumps({"a": 1})), f"{WEIGHTS}: a pickle"),
    "zip of that name": (write(f"{STEM}.safetensors", b"PK\x03\x04" + b"\0" * 99), f"{WEIGHTS}: a pickle"),
    "empty": (write(f"{STEM}.safetensors", b""), f"{WEIGHTS}: is empty"),
    "empty config": (write("config.json", b""), "vae/config.json: is empty"),
    "deep config": (write("config.json", b"[" * 100_000), "vae/config.json: no JSON"),
    "list as config": (write("config.json", b"[1]"), "vae/config.json: holds [1]"),
    "no weights": (without_weights, f"{WEIGHTS}: no such file"),
    ".bin": (lambda f: without_weights(f, f"{STEM}.bin"), f"vae/{STEM}.bin: a pickle, which may run any code"),
    ".ckpt": (lambda f: without_weights(f, "vae.ckpt"), "vae/vae.ckpt: a pickle"),
    "two variants": (two_variants, "vae: has a.safetensors, b.safetensors: which is meant?"),
    "a shard less": (lose_a_shard, f"vae/{STEM}-00002-of-00002.safetensors: no such file"),
    "no index": (lose_the_index, f"vae/{STEM}.safetensors.index.json: no such file"),
    "bad index": (change_index('{"weight_map": 3}'), f"vae/{STEM}.safetensors.index.json: "),
    "numbers in an index": (change_index('{"weight_map": {"a": 1}}'), "weight_map names no files"),
    "empty index": (change_index('{"weight_map": {}}'), "weight_map names no files"),
    "index that leaves": (change_index('{"weight_map": {"a": "../x.safetensors"}}'), "weight_map names no files"),
    "twice": (twice, "1 there twice (unet.conv_in.bias)"),
    "whole numbers": (whole_numbers, "1 not of real numbers (unet.conv_in.bias torch.int8)"),
    "true as a number": (setting(True, "vae", "layers_per_block"), "config.json: layers_per_block is True, expected 1"),
    "no layer": (setting(0, "image_encoder", "num_hidden_layers"), "num_hidden_layers is 0, expected 1"),
    "endless layers": (setting(10**9, "vae", "layers_per_block"), "layers_per_block is 1000000000, expected 1 to 256"),
    "NaN": (setting(float("nan"), "vae", "scaling_factor"), "scaling_factor is nan, expected a number"),
    "a word": (setting("2", "stage1", "unet", "layers_per_block"), "layers_per_block is '2', expected 1"),
    "a field less": (setting("gone", "stage1", "stage", "vae_factor"), "stage1/config.json: vae_factor is missing"),
    "a section less": (setting("gone", "stage1", "unet"), "stage1/config.json: 'unet' is missing"),
    "a field more": (setting(1, "stage2", "stage", "magic"), "magic is 1; there is no such setting here"),
    "unknown modality": (setting(["sound"], "stage1", "stage", "predict"), "predict is ['sound'], expected some of"),
    "odd factor": (setting(3, "stage1", "stage", "vae_factor"), "vae_factor a power of 2"),
    "stages swapped": (swap, "stage1 predicts rgb: it is the other stage"),
    "another VAE": (another_vae, "stage1 was trained with another VAE than that in vae/"),
    "another tower": (another_tower, "image_encoder/ makes a token of 8 numbers, the UNet takes 16"),
    "less motion": (less_motion, "stage2 paints from flow, segmentation, depth, stage1 predicts flow, segmentation"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_one_line_that_names_the_file(own, loads, what):
    spoil, words = REFUSED[what]
    spoil(own)
    line = loads("--model", own)
    assert words in line and str(own) in line


def test_a_pickle_is_never_opened(own, loads):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(own / "opened"),)

    (own / WEIGHTS).unlink()
    for name in (f"{STEM}.bin", f"{STEM}.safetensors"):
        (own / "vae" / name).write_bytes(pickle.dumps(Trap()))
        assert "a pickle" in loads("--model", own)
    assert not (own / "opened").exists()


def test_the_files_name_comes_before_a_variants(tmp_path):
    for name in ("m.ema", "m.fp16", "m"):
        (tmp_path / f"{name}.safetensors").touch()
    for name in ("m", "m.fp16", "m.ema"):
        assert weights_in(tmp_path, "m") == [tmp_path / f"{name}.safetensors"]
        (tmp_path / f"{name}.safetensors").unlink()


class Wrapped(torch.nn.Module):
    """What torch.compile makes of a part, as far as its names go (test_compiled.py)."""

    def __init__(self, part):
        super().__init__()
        self._orig_mod = part

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["_orig_mod"], name)


def test_a_stage_saved_while_parts_are_compiled_can_be_read(tmp_path):
    stage = tiny_stage(replace(STAGE1, vae_factor=2))
    expected = {name: value.clone() for name, value in stage.state_dict().items()}
    stage.unet.mid_block, stage.camera = Wrapped(stage.unet.mid_block), Wrapped(stage.camera)
    stage.unet = Wrapped(stage.unet)
    assert any("unet._orig_mod.mid_block._orig_mod." in name for name in stage.state_dict())
    stage.save_pretrained(tmp_path)
    assert load_file(tmp_path / f"{STEM}.safetensors").keys() == expected.keys()  # as every other tool knows them
    loaded = MotionDreamer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_settings_that_no_config_can_hold_are_not_written(tmp_path):
    vae = tiny_vae()
    vae.scaling_factor = float("nan")
    with pytest.raises(ValueError):
        vae.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- paths and the hub

PATHS = ["runs/more", "./more", "../more", "more", "a/b/c", "/no/such", "~/more", "~nobody/more", ".hidden/x"]
PATHS += ["..\\more", "runs\\more", "C:\\more", "C:/more", "new/svd_xt.safetensors", "svd_xt.safetensors"]
PATHS += ["new/svd.ckpt", "a b/c", "\u00e4/b"]


@pytest.mark.parametrize("flag", ["--model", "--svd"])
def test_a_path_is_never_sent_to_the_hub(loads, monkeypatch, tmp_path, flag):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "runs").mkdir()
    assert "no such folder" in loads(flag, "runs/more/") and "no such folder" in loads(flag, ".")
    for path in PATHS + ["some/model"] * (flag == "--model"):  # --model is a folder, whatever it looks like
        line = loads(flag, path)
        assert "no such file" in line or "no such folder" in line, line
        assert str(Path(os.path.expanduser(path))) in line
    assert loads("--svd", "svd_xt.safetensors") == "sample.py: svd_xt.safetensors: no such file"


@pytest.mark.parametrize("stage", ["1", "vae"])
def test_train_sends_no_path_to_the_hub(loads, monkeypatch, capsys, tmp_path, stage):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    clips = clips_in(tmp_path, 1)
    for flag, path in [("--start", "some/model"), ("--start", "~/more"), ("--start", "..\\x"), ("--init", "runs/more")]:
        told = ["--stage", stage, flag, path, "--data", str(clips), "--out", "out", "--steps", "1", "--quiet"]
        monkeypatch.setattr(sys, "argv", ["train.py", *told])
        with pytest.raises(SystemExit) as stop:
            train.main()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and ("no such folder" in line or (stage == "vae" and flag == "--init")), line
    assert not (tmp_path / "out").exists()


def test_encode_sends_no_path_to_the_hub(monkeypatch, capsys, tmp_path):
    from clips import encode

    monkeypatch.setattr(sys, "argv", ["encode", str(clips_in(tmp_path, 1)), "--model", "some/model"])
    with pytest.raises(SystemExit):
        encode.main()
    assert capsys.readouterr().err == "clips.encode: some/model: no such folder\n"


def test_nor_does_it_where_out_has_the_encoders(own, monkeypatch, capsys):
    """Then --start is asked for the stage alone."""
    clips_in(own, 1)
    told = ["--stage", "1", "--start", "some/model", "--data", own, "--out", own, "--steps", 1, "--quiet"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, told)])
    with pytest.raises(SystemExit):
        train.main()
    assert capsys.readouterr().err == "train.py: some/model: no such folder\n"


def test_only_owner_and_name_may_be_the_hubs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("stabilityai/stable-video-diffusion-img2vid") and is_hub_id("runs/more")
    assert not is_hub_id(Path("stabilityai/stable-video-diffusion-img2vid"))
    (tmp_path / "runs").mkdir()
    assert not is_hub_id("runs/more")
    assert not any(map(is_hub_id, PATHS))


def test_home_is_found_in_every_path(own, loads, monkeypatch):
    monkeypatch.setenv("HOME", str(own.parent))
    assert loads("--model", "~/own") is None and loads("--model=~/own", "--out=~/out") is None
    monkeypatch.setattr(sys, "argv", ["sample.py", "~/a.png", "~/b.json", "--out=~/out", "--svd", "~/svd.safetensors"])
    told = sample.parse_arguments()
    found = [told.image, *told.arrows, told.out, told.svd]
    assert found == [str(own.parent / name) for name in ("a.png", "b.json", "out", "svd.safetensors")]
    assert VAE.from_pretrained("~/own", "vae").config == tiny_vae().config


# ---------------------------------------------------------------------------------------------------------- fuzz tests

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def quick(examples):
    checks = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


numbers = st.integers(-2, 40) | st.sampled_from([1 << 16, 1 << 40, 10**400, 1e-9, 1e9, 1e400, 0.5]) | st.floats()
words = st.text(max_size=5) | st.sampled_from(["v", "x0", "none", "rgb", "flow", "depth", "true"])
anything = numbers | words | st.booleans() | st.none() | st.lists(numbers | words, max_size=4)
anything |= st.dictionaries(st.text(max_size=3), numbers, max_size=2)


def configs(models):
    return [part.config for part in (models.vae, models.tower, *models.stages.values())]


@quick(30)
@hypothesis.given(data=st.data())
def test_any_config(model, loaded, tmp_path_factory, data):
    """Where a change of the settings is read, it also runs."""
    folder = tmp_path_factory.getbasetemp() / "any_config"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    part = data.draw(st.sampled_from(sorted(PARTS)))
    config = json.loads((folder / part / "config.json").read_text())
    inner = data.draw(st.sampled_from([config, *(value for value in config.values() if isinstance(value, dict))]))
    for key in data.draw(st.lists(st.sampled_from([*sorted(inner), "extra"]), min_size=1, max_size=2)):
        if data.draw(st.integers(0, 4)) == 0:
            inner.pop(key, None)
        else:
            inner[key] = data.draw(anything)
    (folder / part / "config.json").write_text(json.dumps(config))
    run, usual = sample.run_task, configs(loaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "check_output", lambda *_: None)
        patch.setattr(sample, "write_all", lambda *_: None)
        patch.setattr(sample, "written_whole", lambda *_: None)
        only_what_changed(patch, model, loaded)
        patch.setattr(sample, "run_task", lambda a, models, task: configs(models) == usual or run(a, models, task))
        ends_well(patch, model / "image.png", "--model", folder, "--steps", 1, "--size", "24x16", "--frames", FRAMES)


def ends_well(patch, *told):
    """0, or 2 and one line."""
    lines = []
    patch.setattr(sys, "argv", ["sample.py", *map(str, told)])
    patch.setattr(sample, "tqdm", lambda steps, **_: steps)
    patch.setattr(
        sample, "print", lambda text, file=sys.stdout: lines.append(text) if file is sys.stderr else None, raising=False
    )
    try:
        sample.main()
    except SystemExit as stop:
        assert stop.code == 2
        (line,) = lines
        assert "\n" not in line
        return line
    assert not lines


@quick(60)
@hypothesis.given(
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 999)
)
def test_any_bytes(model, tmp_path_factory, places, cut):
    """A file of weights that was cut or changed, mostly in its list of names, shapes and types."""
    content = bytearray((model / WEIGHTS).read_bytes())
    for place, value in places:
        content[place] = value
    folder = tmp_path_factory.getbasetemp() / "any_bytes"
    folder.mkdir(exist_ok=True)
    shutil.copy(model / "vae/config.json", folder)
    (folder / f"{STEM}.safetensors").write_bytes(content[: len(content) - cut * (cut % 2)])
    try:
        VAE.from_pretrained(folder)
    except ValueError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error)


FINE = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32]
FINE += [torch.int64, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FINE, torch.bool, torch.complex64, torch.float8_e4m3fn]


def paint(loaded, model, tensors, *told):
    """sample.py --stage 2 of a motion file with these tensors -> None, or its line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "check_output", lambda *_: None)
        stages = {"stage2": loaded.stages["stage2"]}
        patch.setattr(sample, "load_models", lambda _: sample.Models(loaded.vae, loaded.tower, None, stages))
        patch.setattr(sample, "written_whole", lambda *_: None)
        patch.setattr(sample, "write_all", lambda folder, inputs, videos, motion, fps: motion.save(folder / "again"))
        (model / "out").mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, model / "out" / "motion.safetensors")
        told = ["--stage", 2, "--steps", 1, "--out", model / "out", *told]
        line = ends_well(patch, model / "image.png", *told)
    assert line is None or str(model / "out" / "motion.safetensors") in line
    return line


def motion_of(**changes):
    maps = torch.ones(1, FRAMES, HEIGHT, WIDTH)
    return {"flow": torch.zeros(1, FRAMES, 2, HEIGHT, WIDTH), "segmentation": maps.long(), "depth": maps} | changes


@pytest.mark.parametrize("kind", FINE, ids=str)
def test_ids_and_numbers_of_any_type_are_fine(loaded, model, kind):
    maps = (torch.arange(WIDTH) // 9).expand(1, FRAMES, HEIGHT, WIDTH)  # ids 0, 1, 2
    edited = {"segmentation": maps.to(kind), "depth": (maps + 1).to(kind), "flow": motion_of()["flow"].to(kind)}
    assert paint(loaded, model, edited) is None
    again = Motion.load(model / "out" / "again")
    assert torch.equal(again.segmentation, maps) and again.segmentation.dtype == torch.int64
    assert torch.equal(again.depth, maps + 1.0) and again.flow.dtype == again.depth.dtype == torch.float32


def holding(name, value, kind=torch.float32):
    tensors = motion_of()
    tensors[name] = tensors[name].to(kind)
    tensors[name][..., 3, 4] = value
    return tensors


EDITS = {
    "half an id": (holding("segmentation", 1.5), "segmentation holds 1.5, expected ids"),
    "id 256": (holding("segmentation", 256, torch.int32), "segmentation holds 256, expected ids"),
    "id -1": (holding("segmentation", -1, torch.int8), "segmentation holds -1, expected ids"),
    "id NaN": (holding("segmentation", float("nan")), "segmentation holds nan"),
    "depth 0": (holding("depth", 0), "depth holds 0, expected a distance above 0"),
    "depth -1": (holding("depth", -1, torch.int16), "depth holds -1, expected a distance above 0"),
    "depth NaN": (holding("depth", float("nan"), torch.float16), "depth holds nan"),
    "depth inf": (holding("depth", float("inf")), "depth holds inf"),
    "no inverse": (holding("depth", 2.0**-140), "depth holds 7.17465e-43"),
    "flow NaN": (holding("flow", float("nan")), "flow holds nan"),
    "flow inf": (holding("flow", -float("inf")), "flow holds -inf"),
    "unknown flow": (holding("flow", 1.666666752e9), "flow holds 1.66667e+09"),
    "float64 beyond float32": (holding("flow", 1e300, torch.float64), "flow holds 1e+300"),
    "yes and no": (motion_of(segmentation=torch.ones(1, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)), "is of torch.bool"),
    "three channels": (motion_of(flow=torch.zeros(1, FRAMES, 3, HEIGHT, WIDTH)), "flow has shape [1, 3, 3, 16, 24]"),
    "channels last": (motion_of(flow=torch.zeros(1, FRAMES, HEIGHT, WIDTH, 2)), "flow has shape [1, 3, 16, 24, 2]"),
    "no batch": (motion_of(depth=torch.ones(FRAMES, HEIGHT, WIDTH)), "depth has shape [3, 16, 24], expected"),
    "two videos": ({name: torch.cat([value] * 2) for name, value in motion_of().items()}, "has 2 videos of 3 frames"),
    "one frame": ({name: value[:, :1] for name, value in motion_of().items()}, "has 1 videos of 1 frames"),
    "no frame": ({name: value[:, :0] for name, value in motion_of().items()}, "flow has shape [1, 0, 2, 16, 24]"),
    "a frame less": (motion_of(depth=torch.ones(1, FRAMES - 1, HEIGHT, WIDTH)), "depth 1 x 2 frames of 24x16"),
    "sizes differ": (motion_of(depth=torch.ones(1, FRAMES, HEIGHT, 8)), "depth 1 x 3 frames of 8x16"),
    "another size": ({name: value[..., :8] for name, value in motion_of().items()}, "flow is 8x16, the image 24x16"),
    "turned": ({name: value.mT for name, value in motion_of().items()}, "flow is 16x24, the image 24x16"),
    "a part less": ({"flow": motion_of()["flow"]}, "has no segmentation, depth, which this model paints from"),
    "a part more": (motion_of(ids=torch.ones(1)), "holds depth, flow, ids, segmentation, expected flow, segmentation"),
    "nothing": ({}, "holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_without_a_meaning_is_one_line(loaded, model, edit):
    tensors, words = EDITS[edit]
    assert words in paint(loaded, model, tensors)


def test_another_length_than_frames_says(loaded, model):
    assert "has 3 frames, --frames says 4" in paint(loaded, model, motion_of(), "--frames", 4)
    assert paint(loaded, model, motion_of(), "--frames", 3) is None


sides = st.sampled_from([0, 1, 2, 3, HEIGHT, WIDTH]) | st.integers(0, 5)
values = st.sampled_from([0, 1, 2, 255, 256, -1, 0.5, 1e-39, 1e38, 1e9, float("nan"), float("inf")])


@quick(50)
@hypothesis.given(data=st.data())
def test_any_motion_file(loaded, model, data):
    tensors = motion_of()
    for name in data.draw(st.lists(st.sampled_from([*tensors, "extra"]), max_size=3)):
        action, value = data.draw(st.integers(0, 5)), tensors.get(name, torch.ones(2))
        if action == 0:
            tensors.pop(name, None)
        elif action == 1:
            tensors[name] = torch.zeros(data.draw(st.lists(sides, max_size=6)))
        elif action == 2:
            frames = data.draw(st.integers(1, 4))
            tensors = {key: part[:, :1].repeat(1, frames, *[1] * (part.ndim - 2)) if part.ndim > 2 else part
                       for key, part in tensors.items()}  # fmt: skip
        elif value.numel():
            kind = data.draw(st.sampled_from(DTYPES))
            filled = value.to(torch.complex64 if value.is_complex() else torch.float64).clone()
            filled.flatten()[data.draw(st.integers(0, value.numel() - 1)) :] = data.draw(values)
            tensors[name] = filled.to(kind)
    paint(loaded, model, tensors)
