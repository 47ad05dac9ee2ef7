"""What `inspect` and `plan` answer; the same question gets its last answer from the disk, without torch being imported.

An answer is found again only where nothing has changed that it depends on: the command and its options, every file in
the model's folder, the recipe, the code of torch, transformers and this library, the versions of all other packages,
the machine, and the environment variables that these libraries read. A process that has imported torch or transformers
before, and may have changed something in them, neither reads nor writes answers.

`SURGERY_CACHE=0` in the environment switches this off.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import answer_files
from .common import open_libraries, untouched

SWITCH = "SURGERY_CACHE"
"""Environment variable: 0 switches answers from the disk off."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command shows, and the data that `--json` writes."""

    parts: Sequence[str | Table]
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        parts = [_table_to_dict(part) if isinstance(part, Table) else part for part in self.parts]
        return {"parts": parts, "data": self.data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answer:
        """Read what `to_dict` wrote."""
        parts = [part if isinstance(part, str) else _table_from_dict(part) for part in data["parts"]]
        return cls(parts=parts, data=data["data"])


def answer_of(work_out: Callable[[], Answer], command: str, model: str, recipe: str = "", *options: str) -> Answer:
    """The answer of a command: from the disk where it is known, else worked out, and kept there.

    Args:
        work_out: gives the answer. What it raises is not kept, nor is an answer that comes with a warning.
        model: what the user named. Answers are kept for folders and their config.json, not for Hub ids.
        recipe: name or path of the recipe.
        options: what else the answer depends on.
    """

    def question() -> dict[str, Any] | None:
        found = answer_files.checkpoint(Path(model))
        steps = [recipe, answer_files.text(Path(recipe))]
        return found and {"model": found, "command": command, "recipe": steps, "options": options}

    asked = question() if untouched() and os.environ.get(SWITCH) != "0" else None
    key = asked and answer_files.digest([asked, answer_files.installation()])
    known = key and answer_files.read(key)
    if known:
        return Answer.from_dict(known)
    open_libraries()
    with _noticing() as notices:
        answer = work_out()
    if key and not notices and question() == asked:  # files that changed meanwhile may have been read before or after
        answer_files.write(key, answer.to_dict())
    return answer


@contextmanager
def _noticing() -> Iterator[list[str]]:
    """What is warned of, and what this library logs, while the block runs; it is shown as it would be without."""
    notices: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notices.append(record.getMessage())
            alone = logger.handlers == [self] and not logging.getLogger().handlers
            if logging.lastResort is not None and alone:
                logging.lastResort.handle(record)

    logger, listener = logging.getLogger("surgery"), Listener(logging.WARNING)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def look(message: Warning | str, *arguments: Any, **others: Any) -> None:
            notices.append(str(message))
            show(message, *arguments, **others)

        warnings.showwarning = look
        logger.addHandler(listener)
        try:
            yield notices
        finally:
            logger.removeHandler(listener)


def _table_to_dict(table: Table) -> dict[str, Any]:
    # All tables of anatomies and plans have this form.
    assert table.box is SIMPLE_HEAD and not table.pad_edge and table.title is None
    return {"columns": [[column.header, column.justify, list(column.cells)] for column in table.columns]}


def _table_from_dict(data: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header, justify, _ in data["columns"]:
        table.add_column(header, justify=justify)
    for row in zip(*(cells for _, _, cells in data["columns"]), strict=True):
        table.add_row(*row)
    return table
