"""training/checkpoint.py: whole or not at all, found damaged when it is, and read by another number of processes."""

import shutil

import pytest
import torch

from training import checkpoint, processes
from training.checkpoint import load_checkpoint, save_checkpoint


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "model.a.weight": (5, 3),
        "average.a.weight": (1, 2, 2),
        "optimizer.a.exp_avg": (12,),
        "optimizer.a.step": (),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}


def told(step, **settings):
    return {"step": step, "clips": 8 * step, "skipped": 0, "settings": settings}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_saved_is_read_into_the_tensors_that_are_there(tmp_path):
    save_checkpoint(tmp_path, tensors(1), told(3, seed=0), 2)
    into = tensors(2)
    places = {name: value.data_ptr() for name, value in into.items()}
    assert load_checkpoint(tmp_path, into, {"seed": 0}) == (told(3, seed=0), [])
    assert same(into, tensors(1)) and places == {name: value.data_ptr() for name, value in into.items()}
    assert load_checkpoint(tmp_path / "other", into, {}) == (None, [])


def test_tensors_of_other_names_and_sizes_are_refused(tmp_path):
    save_checkpoint(tmp_path, tensors(), told(3), 2)
    more, fewer, other = tensors() | {"model.b": torch.ones(2)}, tensors(), tensors()
    del fewer["optimizer.a.step"]
    other["model.a.weight"] = torch.ones(5, 4)
    for wrong, words in ((more, "model.b is not there"), (fewer, "step is \\[\\] there and unknown here")):
        with pytest.raises(ValueError, match=f"step_00000003: .*{words}"):
            load_checkpoint(tmp_path, wrong, {})
    with pytest.raises(ValueError, match=r"model.a.weight is \[5, 3\] there and \[5, 4\] here"):
        load_checkpoint(tmp_path, other, {})


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1), (2, 3), (7, 2)])
def test_any_number_of_processes_reads_what_any_other_has_written(tmp_path, monkeypatch, wrote, reads):
    """One after the other, here: 7 are more than there are rows."""

    def act_as(rank, count):
        for module in (checkpoint, processes):
            monkeypatch.setattr(module, "rank_and_count", lambda: (rank, count))

    for rank in range(wrote):
        act_as(rank, wrote)
        checkpoint.write_rows(tmp_path, tensors(1))
    for rank in range(reads):
        act_as(rank, reads)
        into = tensors(2)
        checkpoint.read_rows(tmp_path, into)
        assert same(into, tensors(1))
    (first, *_) = sorted(tmp_path.glob("rows_*"))
    first.unlink()
    with pytest.raises(ValueError, match="is not there, or not all of it"):
        checkpoint.read_rows(tmp_path, tensors(2))


def test_files_have_a_size_that_memory_has_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE", 100)
    save_checkpoint(tmp_path, tensors(1), told(3), 2)
    assert len(list((tmp_path / "step_00000003").glob("rows_*"))) > 1
    into = tensors(2)
    load_checkpoint(tmp_path, into, {})
    assert same(into, tensors(1))


def test_checkpoints_are_whole_and_only_the_newest_stay(tmp_path, monkeypatch):
    for step in range(1, 5):
        save_checkpoint(tmp_path, tensors(step), told(step), 2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]

    def crash(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(checkpoint.os, "replace", crash)  # between writing and naming
    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, tensors(5), told(5), 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000005.partial"]
    into = tensors()
    assert load_checkpoint(tmp_path, into, {})[0]["step"] == 4
    assert same(into, tensors(4)) and names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_run_with_other_settings_and_one_of_a_former_version_are_refused(tmp_path):
    save_checkpoint(tmp_path, tensors(), told(3, seed=0), 2)
    with pytest.raises(ValueError, match="was trained with seed = 0, now seed = 7"):
        load_checkpoint(tmp_path, tensors(), {"seed": 7})
    (tmp_path / "step_00000002.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="step_00000002.pt: of a former version, not read any more"):
        load_checkpoint(tmp_path, tensors(), {"seed": 0})


def flip(raw, place):
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


DAMAGES = {
    "nothing left": lambda raw: b"",
    "a byte left": lambda raw: raw[:1],
    "half": lambda raw: raw[: len(raw) // 2],
    "the last byte": lambda raw: raw[:-1],
    "a changed number": lambda raw: flip(raw, len(raw) // 2),
    "not ours": lambda raw: b"\xff" + raw[::-1],
    "gone": None,
}


@pytest.mark.parametrize("file", ["rows_0000_0000.safetensors", "state.json", "sums.json"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_last_whole_one(tmp_path, name, file):
    for step in (1, 2):
        save_checkpoint(tmp_path, tensors(step), told(step), 2)
    damaged = tmp_path / "step_00000002" / file
    if name == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(DAMAGES[name](damaged.read_bytes()))
    into = tensors()
    state, lines = load_checkpoint(tmp_path, into, {})
    assert state == told(1) and same(into, tensors(1))
    assert len(lines) == 1 and lines[0].startswith(f"{damaged.parent}: cannot be read (")
    save_checkpoint(tmp_path, tensors(2), told(2), 2)
    assert load_checkpoint(tmp_path, into, {}) == (told(2), []) and same(into, tensors(2))
    shutil.rmtree(tmp_path / "step_00000001")
    (damaged.parent / "sums.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000002: cannot be read .*; delete it"):
        load_checkpoint(tmp_path, into, {})


def test_a_damaged_checkpoint_is_gone_with_the_next_one(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, tensors(), told(step), 2)
    (tmp_path / "step_00000009" / "state.json").write_bytes(b"")
    save_checkpoint(tmp_path, tensors(), told(3), 2)  # the 9 does not count among the two
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_checkpoint_that_may_not_be_read_ends_the_run(tmp_path, monkeypatch):
    """It is not damaged: an older one would lose steps, and with the next save the newest."""
    for step in (1, 2):
        save_checkpoint(tmp_path, tensors(), told(step), 2)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="step_00000002"):
        load_checkpoint(tmp_path, tensors(), {})
