"""The helps of all commands at 80 columns, as a person sees them: `tests/saved/help.txt`.

Where a help was changed on purpose, write the file again and look at the difference:

    SURGERY_RENEW=1 python -m pytest tests/test_help.py -n 0
"""

import os
import re
from pathlib import Path

import pytest
import typer

from surgery.cli import app

SAVED = Path(__file__).parent / "saved" / "help.txt"


def commands(group, path=()):
    """The words of every command, groups included."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))
NAMES = [" ".join(["surgery", *path]) for path in COMMANDS]


@pytest.fixture
def helped(call, monkeypatch):
    """The help of a command at so many columns."""

    def show(path, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, err = call(*path, "--help")
        assert (code, err) == (0, "")
        return out

    return show


def saved():
    """Command -> its help in the file."""
    parts = re.split(r"^\$ (.*) --help\n", SAVED.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_helps_are_those_of_the_file(helped):
    found = {name: helped(path).strip() + "\n\n" for name, path in zip(NAMES, COMMANDS, strict=True)}
    if os.environ.get("SURGERY_RENEW"):
        SAVED.write_text("".join(f"$ {name} --help\n{text}" for name, text in found.items()))
    was = saved()
    assert list(found) == list(was)
    for name, text in found.items():
        assert text == was[name], f"{name} --help has changed; see the head of this file"


@pytest.mark.parametrize("name", NAMES)
def test_a_help_fits_and_holds_no_markup(name):
    text = saved()[name]
    for line in text.splitlines():
        assert len(line) <= 80
        assert not re.search(r" $|\w-$|…", line), "a word is cut"
    assert not re.search(r"[<>{}`]|\[/?(bold|italic|dim)|x>=", text), "markup, or the name of a type"
    assert "..." not in re.sub(r"\[ARGS\]\.\.\.|RESULT\.\.\.", "", text)
    flags = re.findall(r"^  (?:-\w, )?--(?:overwrite|merge-adapter|fast|dry-run|quiet) .*", text, re.MULTILINE)
    assert all(re.match(r"  (-\w, )?--[a-z-]+  +[A-Z]", flag) for flag in flags), "a flag that takes a value"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "surgery bench"])
def test_a_help_has_examples_one_a_line(name):
    _, _, examples = saved()[name].partition("Examples:\n")
    lines = [line for line in examples.partition("\n\n")[0].splitlines() if not line.startswith("      ")]
    assert lines
    for line in lines:
        assert f"{line} ".startswith((f"  {name} ", "  accelerate launch "))


def test_every_command_takes_quiet_and_json():
    for name, text in saved().items():
        if name not in ("surgery", "surgery bench"):
            assert "--json FILE" in text and "--quiet" in text, name


def test_words_that_look_like_markup_stay(helped):
    assert "kv-surgery[eval]" in helped(("eval",))


def test_help_uses_no_more_than_80_columns_of_a_wide_terminal_and_fits_a_narrow_one(helped):
    assert helped(("plan",), 200) == helped(("plan",), 80)
    assert max(map(len, helped(("plan",), 60).partition("Examples")[0].splitlines())) <= 60
