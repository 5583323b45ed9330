"""README.md and docs/ say what is there: functions of the paper table, files of the tree, flags of the commands, links;
and the README stays short."""

import functools
import importlib
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from clips import Motion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES |= {"README.md": README, "demo/README.md": (ROOT / "demo" / "README.md").read_text()}
OF_FORMER_COMMITS = ("demo/README.md", "docs/results.md")  # their commands say how something was made, then
LONGEST = 1300  # words of the README outside of code blocks


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_readme_is_read_in_minutes():
    words = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).split()
    assert len(words) <= LONGEST


def test_every_function_of_the_paper_table_is_there_and_names_its_source():
    rows = [line.strip("| ").split(" | ") for line in section("Paper -> code").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] != "paper"]
    assert len(rows) >= 15
    for source, code in rows:
        equations = re.findall(r"\d+", source.split(" ", 1)[1].split("x0")[0]) if source.startswith("Eq.") else []
        docs = ""
        for name in code.split(", "):
            file, path = name.split(":")
            thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            docs += thing.__doc__
            for part in path.split("."):
                thing = getattr(thing, part)
            assert thing.__doc__, name
            docs += thing.__doc__
        for number in equations[:1]:
            assert re.search(rf"Eqs?\. (\d+(, | - |-|/))*{number}\b", docs), f"{source}: not named in {code}"


def tree():
    """Paths of the file tree: what is indented lies in the folder above."""
    paths, folder = [], ""
    for line in section("Files").split("```")[1].splitlines():
        if line.strip():
            name = line.split()[0]
            folder = folder if line.startswith(" ") else name if name.endswith("/") else ""
            paths.append(folder + name if line.startswith(" ") else name)
    return paths


def test_every_file_of_the_tree_is_there_and_every_module_in_the_tree():
    paths = tree()
    assert len(paths) == len(set(paths)) and all((ROOT / path).exists() for path in paths)
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in paths)
    assert {path.name for path in ROOT.glob("*.py")} <= set(paths)
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    assert {f"{package.name}/" for package in packages} <= set(paths)
    modules = {path.relative_to(ROOT).as_posix() for package in packages for path in package.glob("[!_]*.py")}
    assert modules <= set(paths), modules - set(paths)
    pages = {path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in (ROOT / "docs").iterdir()}
    assert pages - {"docs/__pycache__/"} <= set(paths)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if place:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@functools.cache
def help_of(*words):
    """What a command says of its flags, run in this process: a new one would load torch first."""
    path, told = Path(*words[-1].split(".")).with_suffix(".py") if "-m" in words else Path(*words), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [path.name, "--help"])
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert stop.value.code in (0, None)
    return told.getvalue()


CLIPS = [f"-m clips.{name}" for name in ("simulate", "check", "annotate", "physion", "encode")]


def commands_of(text, script):
    return [line.split("#")[0] for line in text.splitlines() if re.search(rf"(python|torchrun)[^`|]* {script}\b", line)]


@pytest.mark.parametrize("script", [*CLIPS, "train.py", "sample.py", "evaluate.py"])
def test_every_flag_of_every_command_is_known(script):
    assert commands_of(README, script)
    texts = [text for page, text in PAGES.items() if page not in OF_FORMER_COMMITS]
    for command in (command for text in texts for command in commands_of(text, script)):
        words = re.split(r"[`;]", command.split(script, 1)[1])[0]
        flags = set(re.findall(r"--\w+(?:-\w+)*", help_of(*script.split())))
        for flag in re.findall(r"--[a-z]\w*(?:-\w+)*", words):
            assert flag in flags, f"{command}: {flag}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_FORMER_COMMITS])
def test_every_flag_and_file_that_a_page_names_is_there(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    scripts = [*CLIPS, "train.py", "sample.py", "evaluate.py"]
    known = set(re.findall(r"--\w+(?:-\w+)*", " ".join(help_of(*script.split()) for script in scripts)))
    known |= {"--depth", "--start-method", "--shutdown-timeout"}  # of git and torchrun
    known |= {"--rounds", "--device", "--rows", "--compiled", "--tiny"}  # of tests/bench.py and tests/full_size.py
    for flag in re.findall(r"--[a-z]\w*(?:-\w+)*", text):
        assert flag in known, flag
    for file in re.findall(r"\b(?:clips|inputs|metrics|training|tests|demo|docs|page)/\w+\.\w+\b", text):
        assert (ROOT / file).exists(), file


def test_every_field_of_set_is_a_field_of_a_stage():
    from motion_dreamer import SmallStageConfig

    rows = PAGES["docs/training.md"].split("\n## `--set`\n")[1].split("\n## ")[0].splitlines()
    named = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)", row.split("|")[1])}
    for text in (text for page, text in PAGES.items() if page not in OF_FORMER_COMMITS):
        named |= {
            name for told in re.findall(r"--set((?: \w+=[\w.]+)+)", text) for name in re.findall(r"(\w+)=", told)
        } - {"NAME"}
    assert len(named) > 15 and named <= {*SmallStageConfig.__dataclass_fields__}


def test_quick_start_is_two_commands():
    block = section("Quick start").split("```")[1].strip().splitlines()
    assert len(block) == 2 and block[0].endswith("python sample.py") and block[1].endswith("pytest")


def test_the_python_runs_block_after_block(tmp_path, monkeypatch):
    """dream() from Python, then the motion that it gave changed as a file."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    changes, dreams = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec(dreams.replace("steps=10", "steps=1"), names)
    motion, video = names["motion"], names["video"]
    assert video.shape == (1, 16, 3, 64, 128) and video.isfinite().all()
    motion.save("out/motion.safetensors")
    exec(changes, {})
    held = Motion.load("out/motion.safetensors")
    assert (held.flow[:, 8:] == 0).all() and torch.equal(held.flow[:, :8], motion.flow[:, :8])
    assert (held.segmentation[:, 8:] == held.segmentation[:, 8:9]).all()
