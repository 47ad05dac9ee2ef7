"""Options that several commands take, and how commands print and write."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..console import stdout
from ..errors import CheckpointError

Model = Annotated[
    str, typer.Argument(help="Folder of a checkpoint, GGUF, or Hub id (owner/name, owner/name@revision).")
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Shipped name (gqa-2x, gqa-4x, mqa, identity) or path to a YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option of the recipe; may be given several times."),
]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="Merge the adapter (LoRA and the like) that lies in the folder.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]

_COMMAND_LINE = ("surgery.cli", "surgery.console", "surgery.errors", "surgery.train", "surgery.versions")


def untouched() -> bool:
    """Whether this process has imported nothing yet that answers come from, so that nobody can have changed any of it.

    Methods, scores and targets of other people are registered in modules of this library, which counts as a change.
    """
    return all(
        name == "surgery" or name.startswith(_COMMAND_LINE)
        for name in sys.modules
        if name.partition(".")[0] in ("surgery", "torch", "transformers")
    )


def open_libraries() -> None:
    """Import what every command that works on models needs, and keep transformers off the user's screen."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers import PreTrainedModel  # noqa: F401
    from transformers.utils import logging as hf_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    enable_progress_bars()  # downloads keep theirs


@contextmanager
def logged_progress(name: str = "surgery.calibration") -> Iterator[None]:
    """Inside, lines about progress go to stderr where that is no terminal, which shows a bar.

    Args:
        name: of the part of this library whose lines they are.
    """
    logger, handler = logging.getLogger(name), logging.StreamHandler()
    if sys.stderr.isatty():
        yield
        return
    before, logger.propagate = (logger.level, logger.propagate), False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def show(*parts: object) -> None:
    """Print strings and rich renderables to standard output."""
    console = stdout()
    for part in parts:
        console.print(part)


def write_json(path: Path | None, data: dict[str, object]) -> None:
    """Write `data` where a path was given."""
    write_text(path, json.dumps(data, indent=2) + "\n")


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
