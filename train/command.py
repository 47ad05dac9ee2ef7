"""The arguments of `surgery train` and of `accelerate launch -m surgery.train.uptrain`: one function, two doors.

Nothing heavy is imported before a run begins.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from surgery.console import show, write_json
from surgery.errors import RecipeError

if TYPE_CHECKING:
    from .run import Run

EXAMPLES = (
    "surgery train --model ./smaller --data text.jsonl -o ./trained --dry-run",
    "surgery train --model ./smaller --data text/ --held-out valid.jsonl -o ./trained --set tokens=2e6",
    "surgery train --model ./smaller --data text/ -o ./control --control",
    "accelerate launch --config_file train/configs/fsdp2.yaml -m surgery.train.uptrain --model ./smaller "
    "--data text/ -o ./trained",
)


def train(
    model: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the converted model.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text: .jsonl, .txt, .parquet, a folder of them, or the name of a Hub dataset."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for checkpoints; the result is OUT/model.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The parent, folder or Hub id; default: as the model says.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Recipe whose uptrain section counts; default: the model's own."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with these options and an uptrain section.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override an option of uptrain; may be given several times."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to score before and after, given like --data.")
    ] = None,
    held_out_windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sequences of it at most; default: 64.")
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Also score it every N steps.")] = None,
    control: Annotated[
        bool | None, typer.Option("--control", help="Train the parent on the same tokens instead, by cross-entropy.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="HOW", help="auto, no, or the folder of a checkpoint; default: auto.")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Resume although options changed; take a parent that differs.")
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps between checkpoints; default: 200.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, metavar="N", help="Checkpoints to keep; default: 2.")] = None,
    log_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps between log entries; default: 10.")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sequences per forward pass and device; default: all at once."),
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Recompute activations: less memory, a third slower.")
    ] = None,
    keep_logits: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Keep the parent's N likeliest tokens on disk: later epochs need no parent."
        ),
    ] = None,
    share_parent: Annotated[
        bool | None, typer.Option(help="Share frozen weights with the parent; default: where they are equal.")
    ] = None,
    bf16: Annotated[bool | None, typer.Option(help="Compute in bfloat16; default: on a GPU.")] = None,
    nonfinite_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N steps with NaN or inf; default: 3.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of text order and everything random; default: 0.")
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(metavar="NAME", help="tensorboard, wandb, trackio and the like; default: none.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan: parameters, steps, memory.")] = False,
) -> None:
    """Train a converted model briefly against its parent. Resumes by itself; writes OUT/model."""
    given = {name: value for name, value in locals().items() if name not in ("config", "set_", "dry_run")}
    run = make_run(config, given, tuple(set_ or ()))
    main_process = int(os.environ.get("RANK", "0")) == 0
    from .prepare import prepare
    from .tables import plan_data, plan_tables, summary_tables
    from .uptrain import leave
    from .uptrain import train as carry_out

    setup = prepare(run)
    if main_process:
        show(*plan_tables(setup))
    if dry_run:
        summary = plan_data(setup)
    else:
        summary = carry_out(setup)
        if main_process:
            show(*summary_tables(summary), f"[bold]written to {run.out / 'model'}[/bold]")
    if main_process:
        write_json(summary)
    leave()


def make_run(config: Path | None, given: dict[str, Any], overrides: tuple[str, ...]) -> Run:
    """The run that a YAML file and the command line describe together; the command line wins.

    Raises:
        RecipeError: a key of the file is unknown, or model, data or out is missing.
    """
    from .run import Run

    known = [f.name for f in dataclasses.fields(Run) if f.name != "overrides"]
    values: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise RecipeError(f"{config}: no such file.")
        values = yaml.safe_load(config.read_text()) or {}
        if not isinstance(values, dict):
            raise RecipeError(f"{config}: holds {type(values).__name__}, needs a mapping.")
        for key in values:
            if key not in known:
                raise RecipeError(f"{config}: unknown key {key!r}. Known: {', '.join(known)}.")
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("model", "data", "out"):
        if not values.get(name):
            raise RecipeError(f"--{name} is missing. Pass it, or name it in --config.")
    if values.get("resume") in ("no", False):
        values["resume"] = None
    return Run(**{**values, "out": Path(values["out"]), "overrides": overrides})
