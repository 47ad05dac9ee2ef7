"""Options that several commands take, and how commands print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import stdout
from ..errors import CheckpointError

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or Hub id (owner/name, owner/name@revision).")]
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
