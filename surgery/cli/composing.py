"""`surgery plan` with a budget: its options, and what it does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import show, write_json, write_text
from ..errors import PlanError
from .common import open_libraries, text_option

Budget = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Bytes per token that the cache may take, such as 4KiB/token.")
]
Ratio = Annotated[
    float | None, typer.Option(metavar="TIMES", help="Instead of --budget: how many times smaller than the parent's.")
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Instead of --budget: memory for weights and caches, such as 80GiB."),
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that --memory is to hold.")]
Context = Annotated[
    str | None,
    typer.Option(metavar="TOKENS", help="Per sequence, such as 128k; default: the model's context, at most 1024."),
]
Calibration = Annotated[Path | None, text_option("Text to fit and measure on, with a budget")]
Axes = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="What may change: project, retain, store, with commas between; default: all."),
]
KeepLayers = Annotated[str | None, typer.Option(metavar="LAYERS", help="Layers that stay as they are, such as 0,1.")]
NativeOnly = Annotated[
    bool, typer.Option("--native-only", help="Only what the parent's own class can say; one form for all layers.")
]
Engine = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only what this engine runs (vLLM, llama.cpp); one form for all layers."),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Windows of text to fit on; default: 8. Time grows with them: every form of the cache is fitted on them "
        "in every layer.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=8, metavar="TOKENS", help="Tokens per window; default: the model's context, at most 4096."),
]
WithRace = Annotated[bool, typer.Option("--race/--no-race", help="Convert the winner and compare it.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw KL over bytes for all budgets (.png, .svg).")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write the recipe to (.yaml).")]


def compose_command(
    model: str,
    *,
    calibration: Path | None,
    axes: str | None,
    keep_layers: str | None,
    race: bool,
    plot: Path | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Compose, show, and write."""
    if calibration is None:
        raise PlanError(
            "plan: give a recipe (-r gqa-2x), or a budget with --calibration text: what a form of the cache costs is "
            "measured on text."
        )
    from ..report.figures import check_figure_file

    check_figure_file(plot)
    open_libraries()
    from ..composing.compose import compose
    from ..recipe import parse_layers
    from ..rewriters import AXES

    kept = None if out is None else out.with_name(f"{out.name}.unfinished")
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
        from ..report.figures import save_figure
        from ..report.plots import composition_front

        save_figure(composition_front(found.to_dict()), plot)
    write_json(found.to_dict())
    if out is not None:
        write_text(out, found.to_yaml())
        assert kept is not None
        kept.unlink(missing_ok=True)
        show(f"[bold]written to {out}[/bold]: surgery convert {model} -r {out} --calibration {calibration} -o DIR")
