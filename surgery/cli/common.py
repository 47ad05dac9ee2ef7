"""Options that several commands take, and what commands import."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes, for the completion of a shell: by their files, since reading them takes seconds."""
    folder = Path(__file__).parent.parent / "recipes"
    return sorted(file.stem for file in folder.glob("*.yaml") if file.stem.startswith(incomplete))


def text_option(purpose: str) -> Any:
    """An option that names text."""
    return typer.Option(metavar="FILE", help=f"{purpose} (.txt, .jsonl with a field text, or .parquet).")


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder of a checkpoint, GGUF, or Hub id (owner/name, owner/name@revision)."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", metavar="RECIPE", autocompletion=recipe_names,
        help="Shipped name (gqa-2x, gqa-4x, mqa, identity) or path to a YAML file.",
    ),
]  # fmt: skip
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", "-r", metavar="RECIPE", autocompletion=recipe_names,
        help="Shipped name or path to a YAML file; may be given several times.",
    ),
]  # fmt: skip
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option of the recipe; may be given several times."),
]
MergeAdapter = Annotated[
    bool, typer.Option("--merge-adapter", help="Merge the adapter (LoRA and the like) that lies in the folder.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")]
WindowLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="TOKENS", help="Tokens per window; default: the model's context, at most 512."),
]


def refuse_unread(why: str, **given: bool) -> None:
    """Refuse options that are given and that nothing reads.

    Args:
        why: a sentence, with what to do.
        given: option -> whether it is.

    Raises:
        RecipeError: names them.
    """
    names = [f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given]
    if names:
        raise RecipeError(f"{', '.join(names)}: {why}")


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
