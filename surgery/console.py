"""What users see in a terminal: results, progress, numbers in short; and what a command was told to show of them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .errors import CheckpointError

LINE_SECONDS = 10.0
"""Between two lines about progress, where there is no terminal to draw a bar in."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command shows. The default is what a library shows: tables where they are printed, bars on a terminal."""

    quiet: bool = False
    """Neither tables nor progress."""
    json_file: Path | None = None
    """Where the result goes as JSON; `-` is standard output, which then holds nothing else."""
    json_stream: TextIO | None = None
    """Standard output, for `-`."""

    @property
    def shows_tables(self) -> bool:
        """Whether standard output is for people."""
        return not self.quiet and self.json_stream is None


_OUTPUT: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039  # frozen


@contextmanager
def output(*, quiet: bool = False, json_file: Path | None = None) -> Iterator[None]:
    """Inside, results and progress are shown as a command was told.

    Into a file or pipe, progress is written to stderr as lines. With `json_file` `-`, whatever else is printed, also
    by other libraries, goes to stderr.
    """
    with contextlib.ExitStack() as stack:
        stream = None
        if json_file == Path("-"):
            stream = sys.stdout
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        token = _OUTPUT.set(Output(quiet=quiet, json_file=json_file, json_stream=stream))
        stack.callback(_OUTPUT.reset, token)
        if not quiet and not sys.stderr.isatty():
            logger, handler = logging.getLogger("surgery"), logging.StreamHandler()
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        yield


def stdout() -> Console:
    """Where results are printed: as wide as the terminal, 100 columns into a file or pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100, quiet=not _OUTPUT.get().shows_tables)


def show(*parts: object, always: bool = False) -> None:
    """Print strings and rich renderables to standard output.

    Args:
        always: also under `--quiet`.
    """
    console = stdout()
    console.quiet = console.quiet and not (always and _OUTPUT.get().json_stream is None)
    for part in parts:
        console.print(part)


def write_json(data: Any) -> None:
    """Write the result of a command, plain data, where `--json` says; nowhere without it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    asked = _OUTPUT.get()
    if asked.json_file is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if asked.json_stream is None:
        write_text(asked.json_file, text)
    else:
        asked.json_stream.write(text)


def write_text(path: Path | None, text: str) -> None:
    """Write `text` where a path was given.

    Raises:
        CheckpointError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}).") from None


@contextmanager
def progress(
    title: str, total: int, shown: bool | None = None, *, lines: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` steps while the block runs; the yielded function advances it.

    Where there is no bar, a line with the time left goes to the log every `LINE_SECONDS`.

    Args:
        shown: None shows the bar where stderr is a terminal.
        lines: False where the caller tells more in lines of its own.
    """
    if _OUTPUT.get().quiet:
        yield lambda steps: None
        return
    if not (sys.stderr.isatty() if shown is None else shown):
        yield _lines(title, total) if lines else lambda steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what is done while the block runs, where its steps cannot be counted: on a terminal, else in the log."""
    if _OUTPUT.get().quiet:
        yield
    elif sys.stderr.isatty():
        with Console(stderr=True).status(title):
            yield
    else:
        _log.info("%s", title)
        yield


def _lines(title: str, total: int) -> Callable[[int], None]:
    began = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= LINE_SECONDS and 0 < done < total:
            last = now
            left = time_left((now - began) / done * (total - done))
            _log.info("%s: %s of %s, %s", title, f"{done:,}", f"{total:,}", left)

    return advance


def time_left(seconds: float) -> str:
    """83.4 to `about 1:23 left`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"about {minutes}:{rest:02d} left"


def render(parts: list[Any], width: int = 100) -> str:
    """Rich renderables as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False)
    for part in parts:
        console.print(part, highlight=False)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] to `0-2,5`, the form that `layers:` takes."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs)


def count(number: float) -> str:
    """7240000000 to `7.24B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def human_bytes(count: float) -> str:
    """`1536` to `1.5 KiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
