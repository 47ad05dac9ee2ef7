"""The commands `surgery bench decode | capacity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import show, write_json
from ..errors import RecipeError
from .common import Model, Recipes, refuse_unread
from .verbs import Group, verb

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure what a cache layout gives, in speed and in sequences.",
)


@verb(
    app,
    "decode",
    examples=(
        "surgery bench decode ./smaller",
        "surgery bench decode --shape llama-3-8b -r identity -r mla-4x",
        "surgery bench decode --shape small --device cpu --dtype float32 --context 2048 --batch 1",
        "surgery bench decode ./smaller -r identity -r mqa --context 512 --context 8192 --plot speed.png",
    ),
)
def bench_decode(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Checkpoint whose shape is taken and whose caches come first; default: --shape."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="llama-2-7b, llama-3-8b or small; weights are random. Default: llama-3-8b.")
    ] = None,
    recipe: Recipes = None,
    variant: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Sequences; may be given several times. Default: 1, 16, 64.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="Cached tokens; may be given several times. Default: 4096, 32768."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fewer layers than the shape has.")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Timed steps; the median counts.")] = 32,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: a GPU where there is one.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Do not time transformers beside it.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tokens per second over context, as an image (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """Time compiled decode steps of cache layouts, beside transformers and the memory's speed.

    Weights are random. Without -r: identity (the shape's own layout), mqa, mla-4x and cla2; identity for a MODEL.
    """
    from ..measure.decode_bench import decode
    from ..report.figures import check_figure_file

    check_figure_file(plot)
    if variant:
        raise RecipeError(
            f"--variant {variant[0]}: layouts are given as recipes now. Use --recipe with a shipped name (identity, "
            "mqa, gqa-2x, mla-4x, cla2, ...) or a YAML file."
        )
    if model is not None:
        refuse_unread("a model has a shape of its own. Give one of them.", shape=shape is not None)
    result = decode(
        shape or "llama-3-8b",
        recipe or (("identity", "mqa", "mla-4x", "cla2") if model is None else ("identity",)),
        model=model,
        batches=batch or (1, 16, 64),
        contexts=context or (4096, 32768),
        layers=layers,
        steps=steps,
        dtype=dtype,
        device=device,
        compiled=not eager,
        transformers=not alone,
    )
    show(*result.tables())
    if plot is not None:
        from ..report.figures import save_figure
        from ..report.speed_plot import speed_over_context

        save_figure(speed_over_context(result), plot)
    write_json(result.to_dict())


@verb(
    app,
    "capacity",
    examples=(
        "surgery bench capacity ./my-model",
        "surgery bench capacity ./my-model -r cla2 -r gqa-4x --memory 24GB --context 8192",
    ),
)
def bench_capacity(
    model: Model,
    recipe: Recipes = None,
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="For weights and caches, such as 80GiB or 24GB.")
    ] = "80GiB",
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens per sequence; may be given several times. Default: 4096, 32768, 131072.",
        ),
    ] = None,
) -> None:
    """Count the sequences that fit into a memory, for the model and for what recipes make of it.

    Reads no weights. Without -r: cla2, gqa-2x and cla2-gqa-2x.
    """
    from ..measure.capacity import capacity
    from ..measure.memory import parse_bytes
    from ..planning.table import CONTEXTS

    result = capacity(
        model,
        recipe or ("cla2", "gqa-2x", "cla2-gqa-2x"),
        memory=parse_bytes(memory),
        contexts=context or tuple(CONTEXTS.values()),
    )
    show(*result.tables())
    write_json(result.to_dict())
