"""`surgery plan` with a budget: its options, and what it does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import PlanError
from .common import logged_progress, open_libraries, show, write_json, write_text

Budget = Annotated[str | None, typer.Option(help="Bytes per token that the cache may take, such as 4KiB/token.")]
Ratio = Annotated[float | None, typer.Option(help="Instead: how many times smaller than the parent's cache.")]
Memory = Annotated[str | None, typer.Option(help="Instead: memory for weights and caches, such as 80GiB.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences that --memory is to hold.")]
Context = Annotated[str | None, typer.Option(help="Tokens per sequence, such as 128k; default: at most 1024.")]
Calibration = Annotated[
    Path | None, typer.Option(help="Text (.txt, .jsonl with field text, .parquet) to fit and measure on.")
]
Axes = Annotated[str | None, typer.Option(help="Axes that may change: project, retain, store, with commas between.")]
KeepLayers = Annotated[str | None, typer.Option(help="Layers that stay as they are, such as 0,1.")]
NativeOnly = Annotated[
    bool, typer.Option("--native-only", help="Only what the parent's own class can say; one form for all layers.")
]
Engine = Annotated[str | None, typer.Option(help="Only what this engine runs (vLLM, llama.cpp); one form for all.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Windows of text to fit on; default: 8.")]
Length = Annotated[int | None, typer.Option(min=8, help="Tokens per window; default: the context, at most 4096.")]
WithRace = Annotated[bool, typer.Option("--race/--no-race", help="Convert the winner and compare it.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw KL over bytes for all budgets (.png, .svg).")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write the recipe to (.yaml).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def compose_command(
    model: str,
    *,
    calibration: Path | None,
    axes: str | None,
    keep_layers: str | None,
    race: bool,
    plot: Path | None,
    out: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Compose, show, and write."""
    if calibration is None:
        raise PlanError(
            "plan: give a recipe (-r gqa-2x), or a budget with --calibration text: what a form of the cache costs is "
            "measured on text."
        )
    open_libraries()
    from ..composing.compose import compose
    from ..recipe import parse_layers
    from ..rewriters import AXES

    kept = None if out is None else out.with_name(f"{out.name}.unfinished")
    with logged_progress("surgery"):
        found = compose(
            model,
            calibration=calibration,
            axes=AXES if axes is None else tuple(axis.strip() for axis in axes.split(",")),
            keep_layers=() if keep_layers is None else parse_layers(keep_layers, "--keep-layers"),
            with_race=race,
            kept=kept,
            **options,
        )
    show(*found.tables())
    if plot is not None:
        from ..report.plots import composition_front, save_figure

        save_figure(composition_front(found.to_dict()), plot)
    write_json(json_file, found.to_dict())
    if out is not None:
        write_text(out, found.to_yaml())
        assert kept is not None
        kept.unlink(missing_ok=True)
        show(f"[bold]written to {out}[/bold]: surgery convert {model} -r {out} --calibration {calibration} -o DIR")
