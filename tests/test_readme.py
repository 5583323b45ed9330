"""README.md says what is there: functions of the paper table, files of the tree, flags of the commands."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


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


def test_every_file_of_the_tree_is_there_and_every_module_in_the_tree():
    tree = section("Files").split("```")[1].split("\n")
    names = {line.split()[0].rstrip("/") for line in tree if line.strip()}
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= names
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= names


@functools.cache
def help_of(*words):
    told = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    return told.stdout


CLIPS = [f"-m clips.{name}" for name in ("simulate", "check", "annotate", "physion")]


@pytest.mark.parametrize("script", [*CLIPS, "train.py", "sample.py", "evaluate.py"])
def test_every_flag_of_every_command_is_known(script):
    commands = [
        line.split("#")[0]
        for line in README.splitlines()
        if re.search(rf"(python|torchrun).* {script}|^python {script}", line)
    ]
    assert commands
    for command in commands:
        words = command.split(script, 1)[1].split()
        told = help_of(*script.split())
        for flag in re.findall(r"--[a-z-]+", " ".join(words)):
            assert flag in told, f"{command}: {flag}"


def test_quick_start_is_two_commands():
    block = section("Quick start").split("```")[1].strip().splitlines()
    assert len(block) == 2 and block[0].endswith("python sample.py") and block[1].endswith("pytest")
