"""A recorded step is the step itself. A CPU has no CUDA graphs: here one runs the step again when it is replayed, and
writes what comes out where the recording has left it, as a graph would."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from tiny import TINY, moving_squares, tiny_tower, tiny_vae

import train
from training import processes, recorded


class Graph:
    recorder = None

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        recorder = Graph.recorder
        for value in recorder.weights:
            value.grad = None
        figures = recorder.compute(recorder.batch)
        for name, value in figures.items():
            recorder.figures[name].copy_(value)
        for value, place in zip(recorder.weights, recorder.gradients, strict=True):
            place.copy_(value.grad)


@contextmanager
def capture(graph, **_):
    before = graph.generator.get_state()
    yield
    graph.generator.set_state(before)  # nothing is drawn while a graph is recorded


@pytest.fixture
def fake_graphs(monkeypatch):
    recorders, record = [], recorded.Recorded.record

    def watched(self, batch):
        Graph.recorder = self
        recorders.append(self)
        record(self, batch)
        for place in (*self.figures.values(), *self.gradients):
            place.fill_(torch.nan)  # recording computes nothing

    monkeypatch.setattr(recorded.Recorded, "record", watched)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(processes.Machine, "on_gpu", True)
    monkeypatch.setattr(train, "peak_memory", lambda on_gpu: 0)
    monkeypatch.setattr(train, "hold", lambda *told: None)
    monkeypatch.setattr(train, "free_memory", lambda device: 0)
    return recorders


def run(monkeypatch, data, out, *words):
    tiny_vae().save_pretrained(out / "vae")
    tiny_tower().save_pretrained(out / "image_encoder")
    told = ("--stage", 1, "--preset", "tiny", "--data", data, "--out", out, "--batch", 2, "--steps", 7, "--quiet")
    told += ("--sample-every", 0, "--save-every", 5, "--warmup", 2, *words)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, told)])
    train.main()
    lines = [json.loads(line) for line in (out / "training" / "stage1" / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - {"seconds", "memory"}} for line in lines]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    for seed in range(5):
        moving_squares(seed).save(tmp_path / "data" / f"{seed}.safetensors")
    return tmp_path / "data"


def test_a_recorded_step_trains_as_a_step_does(fake_graphs, monkeypatch, data, tmp_path):
    plain = run(monkeypatch, data, tmp_path / "plain")
    assert not fake_graphs
    graphed = run(monkeypatch, data, tmp_path / "graphed", "--cuda-graph")
    assert len(fake_graphs) == 1 and len(plain) == 7
    assert graphed == plain
    weights = [(tmp_path / name / "stage1").glob("*.safetensors") for name in ("plain", "graphed")]
    assert len({next(files).read_bytes() for files in weights}) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--cuda-graph: of one process on a GPU"),
        (["--accumulate", 2], "without --accumulate"),
        (["--checkpointing"], "without --checkpointing"),
        (["--no-cache"], "with cached latents"),
    ],
)
def test_what_cannot_be_recorded_is_refused(fake_graphs, monkeypatch, data, tmp_path, capsys, words, said):
    if not words:
        monkeypatch.setattr(processes.Machine, "on_gpu", False)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, data, tmp_path / "out", "--cuda-graph", *words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in line
