"""How commands are declared: the options that each of them takes, one form of help for all, and the exit codes."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ..console import output

DONE, BROKEN, REFUSED, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {
    DONE: "done",
    BROKEN: "a bug in surgery (please report it), or doctor found something that does not work",
    REFUSED: "refused: one line on stderr says what was found and what to do",
    INTERRUPTED: "interrupted, by Ctrl-C",
}
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"
GENERAL = "General options"
"""Heading of the options that every command takes."""
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print neither tables nor progress; errors still go to stderr.", rich_help_panel=GENERAL
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", rich_help_panel=GENERAL,
        help="Write the result to this JSON file; - writes it to standard output, in the place of the tables.",
    ),
]  # fmt: skip


class Interrupted(Exception):
    """Ctrl-C, with what is left behind by it in one sentence."""


class _Help:
    """Plain help within 80 columns: names of values as in `--length TOKENS`, flags alone, one example a line."""

    def get_help(self, ctx: Any) -> str:
        """The help; words with hyphens are not broken at them."""
        return str(super().get_help(ctx)).replace(_UNBROKEN, "-")  # type: ignore[misc]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """What the command does."""
        with formatter.indentation():
            formatter.write_paragraph()
            formatter.write_text((self.help or "").replace("-", _UNBROKEN))  # type: ignore[attr-defined]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`MODEL` for what is needed, `[MODEL]` for what is not."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options under their headings, those of all commands last; then the commands of a group."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        general: list[tuple[str, str]] = []
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            if param.hidden:
                continue
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            panel = getattr(param, "rich_help_panel", None) or kind
            last = panel == GENERAL or "--help" in param.opts
            (general if last else panels.setdefault(panel, [])).append(_row(param))
        if len(general) == 1:  # --help alone
            panels["Options"] += general
            general = []
        for title, rows in {**panels, GENERAL: general}.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if isinstance(self, TyperGroup):
            with formatter.section("Commands"):
                formatter.write_dl([(name, _summary(command)) for name, command in self.commands.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, and the exit codes of the program."""
        if self.epilog:  # type: ignore[attr-defined]
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():  # type: ignore[attr-defined]
                    formatter.write("".join(f"  {part}\n" for part in _broken(line, formatter.width - 2)))
        if ctx.parent is None:
            with formatter.section("Exit codes"):
                formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


class Command(_Help, TyperCommand):
    """A command of `surgery`."""


class Group(_Help, TyperGroup):
    """A command that has commands."""


def verb(
    app: typer.Typer,
    name: str,
    *,
    examples: Sequence[str],
    interrupted: str | None = None,
    cls: type[TyperCommand] = Command,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of `app`, with the options that every command takes.

    The function prints with `console.show` and hands its result to `console.write_json`; both do what the user asked
    for.

    Args:
        examples: command lines for the help.
        interrupted: what Ctrl-C leaves behind, where that is more than nothing or what lies in OUT.unfinished.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, quiet: bool = False, json_file: Path | None = None, **options: Any) -> None:
            with output(quiet=quiet, json_file=json_file):
                try:
                    function(*args, **options)
                except KeyboardInterrupt:
                    raise Interrupted(interrupted or _left_behind(options.get("out"))) from None

        hints = get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
        shared = [
            inspect.Parameter(shared_name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for shared_name, default, annotation in (("json_file", None, Json), ("quiet", False, Quiet))
        ]
        del run.__wrapped__  # typer would read the arguments of the function alone
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {**hints, "json_file": Json, "quiet": Quiet}
        app.command(name=name, cls=cls, epilog="\n".join(examples))(run)
        return function

    return register


def _left_behind(out: Path | None) -> str:
    from ..checkpoints.unfinished import SUFFIX

    kept = out and out.with_name(out.name + SUFFIX)
    if kept and kept.exists():
        return f"What was done is kept in {kept}, and the same command goes on from there."
    return "Nothing was written."


def _row(param: Any) -> tuple[str, str]:
    """How an argument or option is called, and its help."""
    value = param.metavar or str(param.name).upper()
    if param.param_type_name == "argument":
        called = value
    elif param.is_flag or getattr(param, "count", False):
        called = ", ".join(sorted(param.opts, key=len)) + "".join(f" / {name}" for name in param.secondary_opts)
    else:
        called = f"{', '.join(sorted(param.opts, key=len))} {value}"
    default = param.default
    if param.required and param.param_type_name == "option":
        more = "[required]"
    elif param.show_default and default is not None and not callable(default) and default is not False:
        shown = param.opts[0].lstrip("-") if default is True else default
        more = f"[default: {shown}]"
    else:
        more = ""
    return called, f"{param.help or ''} {more}".strip().replace("-", _UNBROKEN)


def _summary(command: Any) -> str:
    """The first sentence of a command's help."""
    first = " ".join((command.help or "").partition("\n\n")[0].split())
    return (first.partition(". ")[0].rstrip(".") + ".").replace("-", _UNBROKEN)


def _broken(example: str, width: int) -> list[str]:
    """An example in lines of at most `width` columns, as a shell takes them; options stay with their values."""
    units: list[str] = []
    for word in map(shlex.quote, shlex.split(example)):
        value = units and re.fullmatch(r"--?[\w-]+", units[-1]) and not word.startswith("-")
        units[-1:] = [f"{units[-1]} {word}"] if value else [*units[-1:], word]
    lines = [units[0]]
    for unit in units[1:]:
        if len(lines[-1]) + len(unit) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {unit}")
        else:
            lines[-1] += f" {unit}"
    return lines
