"""training/log.py: one line and one point of each curve a step, also after a run was killed."""

import json
import sys
from types import ModuleType

import pytest

from training.log import Log


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture
def writers(monkeypatch):
    """A stand-in for torch.utils.tensorboard that keeps what its writers are told."""
    made = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step, flush_secs):
            self.log_dir, self.purge_step, self.points, self.closed = log_dir, purge_step, [], False
            made.append(self)

        def add_scalar(self, tag, scalar_value, global_step):
            self.points.append((tag, scalar_value, global_step))

        def close(self):
            self.closed = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_written(no_tensorboard, tmp_path):
    with Log(tmp_path / "training" / "stage1", 0) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 0.5 / step})
            assert lines(tmp_path / "training" / "stage1")[-1] == {"step": step, "loss": 0.5 / step}
    assert [path.name for path in (tmp_path / "training" / "stage1").iterdir()] == ["log.jsonl"]
    assert log.lines.closed


def test_steps_after_the_checkpoint_are_logged_once(writers, tmp_path):
    for start, last in ((0, 5), (3, 6)):
        with Log(tmp_path, start) as log:
            for step in range(start + 1, last + 1):
                log.write({"step": step, "loss": start + step / 100})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 0.01), (2, 0.02), (3, 0.03), (4, 3.04), (5, 3.05), (6, 3.06)
    ]  # fmt: skip
    assert [writer.purge_step for writer in writers] == [1, 4]  # the first step that is done again
    assert not list(tmp_path.glob("*.partial"))


def test_curves_have_the_figures_of_the_lines(writers, tmp_path):
    with Log(tmp_path, 6) as log:
        log.write({"step": 7, "loss": 0.25, "skipped": 0})
        log.write({"step": 8, "loss": 0.5, "skipped": 1, "val_loss": 2.0})
        assert not writers[0].closed
    assert len(writers) == 1 and writers[0].closed and writers[0].log_dir == str(tmp_path)
    assert sorted(writers[0].points) == [
        ("loss", 0.25, 7), ("loss", 0.5, 8), ("skipped", 0, 7), ("skipped", 1, 8), ("val_loss", 2.0, 8)
    ]  # fmt: skip
    assert lines(tmp_path) == [
        {"step": 7, "loss": 0.25, "skipped": 0}, {"step": 8, "loss": 0.5, "skipped": 1, "val_loss": 2.0}
    ]  # fmt: skip


def test_a_run_that_fails_closes_the_curves(writers, tmp_path):
    with pytest.raises(ZeroDivisionError), Log(tmp_path, 0) as log:
        log.write({"step": 1, "loss": 1 / 0})
    assert writers[0].closed


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError])
def test_a_broken_tensorboard_is_as_good_as_none(monkeypatch, tmp_path, error):
    class Broken(ModuleType):
        def __getattr__(self, name):
            if name == "SummaryWriter":
                raise error("for another NumPy")
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    with Log(tmp_path, 0) as log:
        log.write({"step": 1, "loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_line_that_was_cut_off_goes(no_tensorboard, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with Log(tmp_path, 2) as log:
        log.write({"step": 3, "loss": 3.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
