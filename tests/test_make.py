"""demo/make.py: from nothing to a model folder, and what happens when a part fails. demo/measure.py: what it prints."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, moving_squares

import train
from clips import encode
from motion_dreamer import MotionDreamer
from svd import VAE
from training import cache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import make  # noqa: E402
import measure  # noqa: E402


@contextmanager
def two_squares(arguments):
    """In the place of workers that simulate: a few clips at once."""
    for seed in range(arguments.first):
        moving_squares(seed, arguments.frames, 16, 32).save(Path(arguments.out) / "clips" / f"{seed}.safetensors")
    yield None


def test_from_nothing_to_a_model_in_half_precision_and_on_from_it(tmp_path, monkeypatch, capsys):
    """Its own commands for train.py, run one after the other in this process."""
    run = []

    def popen(words, **_):
        run.append(words)
        with monkeypatch.context() as during:
            during.setattr(sys, "argv", words[1:])
            during.setattr(cache, "encode_clips", None)  # it finds all its latents
            train.main()
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    def called(words, **_):
        run.append(["--stage", "latents", *words[2:]])
        monkeypatch.setattr(sys, "argv", words[2:])
        encode.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setattr(make, "simulating", two_squares)
    monkeypatch.setattr(make.subprocess, "Popen", popen)
    monkeypatch.setattr(make.subprocess, "run", called)
    told = ["--minutes", 0.01, "--preset", "tiny", "--frames", 3, "--first", 4, "--workers", 1]
    monkeypatch.setattr(make, "measured", lambda _, model: f"figures of {model.name}")

    def made(*words):
        monkeypatch.setattr(sys, "argv", list(map(str, ["make.py", *told, *words])))
        make.main()

    made("--out", tmp_path / "out", "--export", tmp_path / "shipped")
    assert [words[words.index("--stage") + 1] for words in run] == ["vae", "latents", "1", "2"]
    record = json.loads((tmp_path / "out" / "make.json").read_text())
    assert record["clips"] == 4 and all(record[name]["steps"] for name in ("vae", "stage1", "stage2"))
    assert [record[name]["draws"] / record[name]["steps"] for name in ("vae", "stage1", "stage2")] == [1, 4, 4]
    card = (tmp_path / "shipped" / "card.md").read_text()
    assert "4 distinct clips, 3 frames of 128x64" in card and "figures of shipped" in card
    assert f"| stage2 | {record['stage2']['steps']} | {record['stage2']['draws']} |" in card
    stages = [MotionDreamer.from_pretrained(tmp_path / "shipped", f"stage{i}") for i in (1, 2)]
    vae = VAE.from_pretrained(tmp_path / "shipped", "vae")
    assert {value.dtype for part in (*stages, vae) for value in part.parameters()} == {torch.float16}
    assert stages[0].config.told and stages[1].config.draft and stages[0].config.frames == 3
    run.clear()
    made("--out", tmp_path / "more", "--start", tmp_path / "shipped")
    assert [words[words.index("--stage") + 1] for words in run] == ["latents", "1", "2"]
    assert [words[words.index("--start") + 1] for words in run[1:]] == [str(tmp_path / "shipped")] * 2
    kept = VAE.from_pretrained(tmp_path / "more", "vae", dtype=torch.float16)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in kept.state_dict().items())
    assert "| vae | 0 | 0 | as it was |" in (tmp_path / "more" / "card.md").read_text()


def test_workers_simulate_until_the_block_ends(tmp_path):
    words = {"scenario": "dominoes,collide", "size": "16x8", "frames": 1, "seed": 0, "workers": 1}
    arguments = SimpleNamespace(out=str(tmp_path), first=2, clips=1000, start=None, **words)
    with make.simulating(arguments) as simulator:
        make.wait_for_clips(arguments, simulator)
    assert simulator.poll() is not None
    assert {path.name.split("_")[0] for path in make.clips_of(arguments)} <= {"dominoes", "collide"}
    assert len(make.clips_of(arguments)) >= 2


def test_latents_are_made_while_clips_come(tmp_path, monkeypatch):
    """Where the VAE is known, from the first clip on, until there are enough."""
    (tmp_path / "clips").mkdir()
    seen = []

    def encode(arguments):
        seen.append(len(make.clips_of(arguments)))
        moving_squares(seen[-1], 2).save(tmp_path / "clips" / f"{seen[-1]}.safetensors")

    def sleep(_):
        if not seen:
            moving_squares(9, 2).save(tmp_path / "clips" / "9.safetensors")

    monkeypatch.setattr(make, "encode", encode)
    monkeypatch.setattr(make.time, "sleep", sleep)
    make.wait_for_clips(SimpleNamespace(out=str(tmp_path), first=3, start="demo"), SimpleNamespace(poll=lambda: None))
    assert seen == [1, 2]


def process(words):
    return subprocess.Popen([sys.executable, "-c", words])


def test_where_one_training_fails_the_others_are_told_to_end():
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        make.finish([process("import time; time.sleep(60)"), process("raise SystemExit(2)")])
    assert stop.value.code and time.monotonic() - started < 30


def test_where_this_program_fails_trainings_are_told_to_end():
    """In what is done before the next round, say."""
    going = [process("import time; time.sleep(60)")]
    with pytest.raises(SystemExit) as stop:
        make.finish(going, seconds=0, before=lambda: sys.exit(7))
    assert stop.value.code == 7 and going[0].poll() is not None


def test_a_round_ends_with_a_save_and_without_an_error():
    """SIGTERM is what train.py saves for. What the next round needs is made while this one goes on."""
    done = []
    words = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntime.sleep(60)"
    started = time.monotonic()
    going = [process(words), process(words)]
    make.finish(going, seconds=2, before=lambda: done.append([training.poll() for training in going]))
    assert 2 <= time.monotonic() - started < 30 and done == [[None, None]]


def test_killed_it_leaves_nothing_that_goes_on(tmp_path):
    """Started in another folder than the repository's: its clips come to be where it looks for them."""
    told = ["--out", "runs/x", "--clips", "5000", "--first", "4000", "--size", "16x8", "--frames", "1"]
    with open(tmp_path / "said", "w") as said:
        words = [sys.executable, make.__file__, *told]
        whole = subprocess.Popen(words, cwd=tmp_path, stdout=said, stderr=said, start_new_session=True)
    clips = SimpleNamespace(out=str(tmp_path / "runs" / "x"))
    try:
        end = time.monotonic() + 60
        while not make.clips_of(clips) and time.monotonic() < end:
            time.sleep(0.1)
        assert make.clips_of(clips)
        whole.send_signal(signal.SIGTERM)
        assert whole.wait(30)
        before = len(make.clips_of(clips))
        time.sleep(0.5)
        assert len(make.clips_of(clips)) == before
    finally:
        whole.terminate()


def test_fewer_clips_than_it_waits_for_are_enough(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make.py", "--clips", "20", "--out", "~/x"])
    arguments = make.parse_arguments()
    assert arguments.first == 20 and arguments.out == str(Path.home() / "x") and arguments.start is None


def test_a_model_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure.py", "--model", str(tmp_path), "--data", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as stop:
        measure.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"measure.py: {tmp_path}/stage2/config.json: ")


def test_a_simulator_that_ends_is_said(tmp_path):
    arguments = SimpleNamespace(out=str(tmp_path), first=1)
    (tmp_path / "clips").mkdir()
    ended = process("pass")
    ended.wait()
    with pytest.raises(SystemExit, match="simulate.txt: the simulator ended"):
        make.wait_for_clips(arguments, ended)


# ------------------------------------------------------------------------------------------------------ demo/measure.py


def figures(value, **others):
    """Of every source, each figure with this value."""
    names = {name for _, _, name, *_ in measure.ROWS} | {name for _, name, _ in measure.CODEC}
    found = {name: {"value": value, "interval": [value, value], "clips": 7} for name in names}
    found |= {name: {"value": v, "interval": [v, v], "clips": 7} for name, v in others.items()}
    return {source: found for source in measure.COLUMNS}


def cells(text):
    rows = [[part.strip() for part in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    assert len({len(row) for row in rows[:14]}) == len({len(row) for row in rows[14:]}) == 1
    return {row[0]: row[1:] for row in rows}


def test_the_table_says_what_is_reached():
    """Bars are read at the value; an error must be small, all else large."""
    scenarios = {"mean": figures(0.8, epe_relative=0.5, hit=0.92, psnr=25.9), "driving": figures(0.5, epe_relative=0.1)}
    scenarios["dominoes"] = figures(0.95, standing=None, ids_miou=0.98, psnr=31.0, epe_relative=0.09)
    scenarios["driving"]["codec"] = scenarios["dominoes"]["codec"] | {"psnr": {"value": 29.0, "interval": [28.0, 30.0]}}
    rows = cells(measure.table(scenarios, 49.99))
    reached = {label: row[-1] for label, row in rows.items()}
    assert reached["flow error of zero flow, mean"] == "must" and reached["driving: flow error of zero flow"] == "aim"
    assert (
        reached["will it be hit, balanced accuracy, mean"] == reached["mask IoU per object, last frame, mean"] == "aim"
    )
    assert reached["dominoes: push and opposite push go the right way"] == "must"
    assert reached["dominoes: all right by carried ids"] == "aim"
    assert reached["dominoes: all told to stay, standing"] == "not asked"
    assert reached["driving: pairs of ego motions, right for the other"] == "MISSED"
    assert reached["Stage II told the true motion, PSNR in dB, mean"] == "MISSED" and reached["weights, MB"] == "must"
    assert reached["dominoes"] == "must" and reached["driving"] == "MISSED"
    assert rows["flow error of zero flow, mean"][2] == "0.500 [0.500, 0.500]"
    assert cells(measure.table(scenarios, 50.01))["weights, MB"][-1] == "MISSED"
    assert len(rows) == 6 + len(measure.ROWS) and "collide" not in rows


def test_measuring_simulates_all_worlds_and_runs_evaluate_once(tmp_path, monkeypatch, capsys):
    """Its own commands; what they would write is there."""
    run = []

    def call(words, **_):
        run.append(list(map(str, words[1:])))
        if "evaluate.py" in run[-1]:
            result = {
                "scenarios": {"mean": figures(0.5)},
                "settings": {"clips": 3, "sampling_steps": 2, "weights": "w"},
            }
            Path(run[-1][run[-1].index("--json") + 1]).write_text(json.dumps(result))
        return SimpleNamespace(returncode=3 if "broken" in run[-1][2] else 0)

    monkeypatch.setattr(measure.subprocess, "run", call)
    told = ["measure.py", "--data", "{}", "--clips", "3", "--seed", "8", "--json", str(tmp_path / "m.json")]
    monkeypatch.setattr(sys, "argv", [word.format(tmp_path / "data") for word in told])
    measure.main()
    first, second, last = run
    size = json.loads((ROOT / "demo" / "stage2" / "config.json").read_text())["stage"]
    for words, clips in ((first, "12"), (second, "27")):
        assert words[words.index("--clips") + 1] == clips and words[words.index("--seed") + 1] == "8"
        assert words[words.index("--size") + 1] == f"{size['width']}x{size['height']}"
    worlds = [first[first.index("--scenario") + 1], *second[second.index("--scenario") + 1].split(",")]
    assert sorted(worlds) == sorted(make.SCENARIOS)
    assert last[:2] == ["evaluate.py", "--model"] and last[last.index("--metrics") + 1] == "demo"
    assert "| weights, MB | 50 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [word.format(tmp_path / "broken") for word in told])
    with pytest.raises(SystemExit) as stop:
        measure.main()
    assert stop.value.code == 3
