"""clips: what its four commands say about themselves."""

import argparse
import sys

import pytest

from clips import annotate, check, physion

simulate = pytest.importorskip("clips.simulate")


@pytest.mark.parametrize("module", [simulate, annotate, physion, check])
def test_help_explains_every_option_and_shows_its_default(module, monkeypatch, capsys):
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda it, *a: parsers.append(it) or parse(it, *a))
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    monkeypatch.setenv("COLUMNS", "300")  # one line an option
    with pytest.raises(SystemExit) as stopped:
        module.main()
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and told.startswith(f"usage: python -m {module.__name__} ")
    for action in parsers[0]._actions:
        text = parsers[0]._get_formatter()._expand_help(action) if action.help else ""
        assert text and text in told, action.dest
        if action.option_strings and action.dest not in ("help", "out", "export"):
            shown = "" if action.default in (None, False) else str(action.default)
            assert text.endswith(")") and shown in text[text.index("(default") :], text
