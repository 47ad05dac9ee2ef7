"""One progress bar for all long work: on a terminal a bar on stderr, elsewhere nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` steps while the block runs; the yielded function advances it.

    Args:
        shown: None shows it where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda steps: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)
