"""The command line: `surgery inspect | plan | convert | train | eval | report | export | push | generate | ...`."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from .. import __version__
from ..console import show, write_json
from ..errors import CheckpointError, RecipeError, SurgeryError
from ..train import command as training
from . import bench, composing, doctor, exporting, judging
from .answers import Answer, answer_of
from .common import (
    MergeAdapter,
    Model,
    Overwrite,
    RecipeOption,
    Seed,
    SetOption,
    WindowLength,
    open_libraries,
    recipe_names,
    refuse_unread,
    text_option,
)
from .verbs import BROKEN, DONE, INTERRUPTED, REFUSED, Group, Interrupted, verb

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the attention of a pretrained language model so that its KV cache gets small.",
    epilog="surgery demo --fast\n"
    "surgery plan ./my-model -r gqa-2x\n"
    "surgery convert ./my-model -r gqa-2x --calibration text.jsonl -o ./smaller\n"
    "surgery eval ./smaller --baseline ./my-model --text held-out.jsonl",
)


READERS = ("inspect", "plan", "doctor")
"""Commands that write no model, and may know their answer without torch."""


def run() -> None:
    """The program `surgery`: `main`, in a process of its own."""
    gc.set_threshold(20_000, 20, 20)  # importing torch makes millions of objects, and hardly any garbage
    try:
        main()
    except SystemExit as end:
        command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        if command in READERS and isinstance(end.code, int):
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code)  # taking torch down piece by piece takes a second
        raise


def main() -> None:
    """Run a command, and end with one of `verbs.EXIT_CODES`."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False, prog_name="surgery")
        if code == INTERRUPTED:  # Ctrl-C outside of a command, which typer turns into an exit code without a word
            raise Interrupted("Nothing was written.")
    except SurgeryError as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}")
        code = REFUSED
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        _fail(f"Interrupted. {error}")
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            _fail_usage(error)
            code = REFUSED
        elif debug:
            raise
        else:
            _fail(f"{type(error).__name__}: {error} (this is a bug; run again with --debug for the traceback)")
            code = BROKEN
    sys.exit(code or DONE)


def _fail(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(" ".join(message.split()), style="red", markup=False)


def _fail_usage(error: Any) -> None:
    message = error.format_message()
    if message.startswith("Usage:"):  # the help itself, of a command without arguments
        sys.stderr.write(message.rstrip() + "\n")
        return
    path = getattr(getattr(error, "ctx", None), "command_path", "surgery")
    end = "" if message.endswith((".", "?")) else "."
    _fail(f"{message}{end} See: {path} --help")


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"surgery {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; may stand anywhere in the command.")
    ] = False,
) -> None:
    """`--debug` is taken by `main`, wherever it stands; it is declared here for the help text."""
    if context.invoked_subcommand not in READERS:
        open_libraries()


@verb(
    app,
    "inspect",
    examples=(
        "surgery inspect ./my-model",
        "surgery inspect ./config.json --json anatomy.json",
        "surgery inspect --gates ./dms-4x --text held-out.jsonl --plot gates.png",
    ),
)
def inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, its config.json, GGUF, or Hub id.")
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Instead of MODEL: folder of a model made by dms or dmc; shows what its gates do to --text.",
        ),
    ] = None,
    text: Annotated[Path | None, text_option("Text for --gates")] = None,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows of that text at most; one forward pass over each.")
    ] = 64,
    length: WindowLength = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw tokens per slot by layer and head (.png, .svg); with --gates."),
    ] = None,
) -> None:
    """Show how every attention layer of a model is built.

    Reads the config and no weights, but for --gates.
    """
    if gates is not None:
        if model is not None:
            raise CheckpointError(f"inspect: {model} and --gates {gates}: give one of them.")
        open_libraries()
        if text is None:
            raise CheckpointError("--gates: needs --text, a file of text that the gates are to decide on.")
        _inspect_gates(gates, text, samples, length, plot)
        return
    if model is None:
        raise CheckpointError("inspect: name a model, or --gates DIR --text FILE.")
    refuse_unread(
        "is for --gates. Add that, or leave it out.",
        text=text is not None, samples=samples != 64, length=length is not None, plot=plot is not None,
    )  # fmt: skip

    def read() -> Answer:
        from ..anatomy import examine

        anatomy = examine(model)
        return Answer(parts=anatomy.tables(), data=anatomy.to_dict())

    answer = answer_of(read, "inspect", model)
    show(*answer.parts)
    write_json(answer.data)


def _inspect_gates(folder: str, text: Path, samples: int, length: int | None, plot: Path | None) -> None:
    from ..calibration.text import read_windows, tokenizer_of
    from ..checkpoints.storage import load
    from ..measure.gates import read_gates
    from ..report.figures import check_figure_file, save_figure
    from ..report.plots import gate_map

    check_figure_file(plot)
    model = load(folder)
    tokenizer = tokenizer_of(model.config)
    windows = read_windows(
        model.config, text, tokenizer, length=length, samples=samples, every_window=True, where=str(text)
    )
    found = read_gates(model, windows, tokenizer)
    show(*found.tables())
    if plot is not None:
        save_figure(gate_map(found), plot)
    write_json(found.to_dict())


@verb(
    app,
    "plan",
    examples=(
        "surgery plan ./my-model -r gqa-2x",
        "surgery plan ./my-model -r gqa-4x --set kv_heads=2",
        "surgery plan ./my-model --budget 4KiB/token --calibration text.jsonl -o composed.yaml",
        "surgery plan ./my-model --memory 80GiB --context 128k --batch 32 --calibration text.jsonl -o composed.yaml",
    ),
)
def plan(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            autocompletion=recipe_names,
            help="Shipped name (gqa-2x, kv-3bit) or path to a YAML file.",
        ),
    ] = None,
    set_: SetOption = None,
    budget: composing.Budget = None,
    ratio: composing.Ratio = None,
    memory: composing.Memory = None,
    batch: composing.Batch = 1,
    context: composing.Context = None,
    calibration: composing.Calibration = None,
    axes: composing.Axes = None,
    keep_layers: composing.KeepLayers = None,
    native_only: composing.NativeOnly = False,
    engine: composing.Engine = None,
    samples: composing.Samples = None,
    length: composing.Length = None,
    race: composing.WithRace = True,
    plot: composing.Plot = None,
    out: composing.Out = None,
    seed: Seed = 0,
) -> None:
    """Show what a recipe would do, or find the best recipe within a budget of bytes.

    With a recipe (-r): bytes per token before and after, and who can load the result. No weight is read.

    With a budget (--budget, --ratio or --memory) and --calibration text: measures what each form of the cache costs in
    each layer, converts the best composition within the budget, and compares it with the best recipe of a single
    method. Minutes for a small model.
    """  # fmt: skip
    if recipe is None:
        refuse_unread("overrides options of a recipe. Give one (-r), or leave it out.", set=bool(set_))
        composing.compose_command(
            model, budget=budget, ratio=ratio, memory=memory, batch=batch, context=context, calibration=calibration,
            axes=axes, keep_layers=keep_layers, native_only=native_only, engine=engine, samples=samples, length=length,
            race=race, plot=plot, out=out, seed=seed,
        )  # fmt: skip
        return
    if budget is not None or ratio is not None or memory is not None:
        raise RecipeError("plan: give a recipe (-r), or a budget (--budget, --ratio, --memory), not both.")
    refuse_unread(
        "is for a search within a budget, and a recipe is given. Give one of a recipe (-r) and a budget (--budget).",
        batch=batch != 1, context=context is not None, calibration=calibration is not None, axes=axes is not None,
        keep_layers=keep_layers is not None, native_only=native_only, engine=engine is not None,
        samples=samples is not None, length=length is not None, no_race=not race, plot=plot is not None,
        out=out is not None, seed=seed != 0,
    )  # fmt: skip

    def decide() -> Answer:
        from ..plan import plan as make_plan
        from ..recipe import Recipe

        made = make_plan(model, Recipe.load(recipe, set_ or ()))
        return Answer(parts=made.tables(), data=made.to_dict())

    answer = answer_of(decide, "plan", model, recipe, *(set_ or ()))
    show(*answer.parts)
    write_json(answer.data)


@verb(
    app,
    "convert",
    examples=(
        "surgery convert ./my-model -r gqa-2x --calibration text.jsonl -o ./smaller",
        "surgery convert ./my-model -r gqa-4x --set kv_heads=2 --set layers=8-31 -o ./smaller",
        "surgery convert ./model.gguf -r mla-2x --calibration text.jsonl -o ./smaller",
    ),
)
def convert(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write; must not exist, or be empty.")
    ],
    set_: SetOption = None,
    calibration: Annotated[Path | None, text_option("Text to calibrate on")] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows of that text at most. Time and memory grow with them: 4 to 9 forward passes over the text, "
            "and 8 bytes per token and channel of the hidden state.",
        ),
    ] = 256,
    length: WindowLength = None,
    seed: Seed = 0,
    streams: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(
            metavar="DTYPE",
            help="float32 or bfloat16: format of the hidden states over the text that are kept; bfloat16 takes half "
            "the memory.",
        ),
    ] = "float32",
    overwrite: Overwrite = False,
    merge_adapter: MergeAdapter = False,
) -> None:
    """Convert a checkpoint: a new folder that loads like its parent and caches less."""
    from ..calibration import processes
    from ..convert import convert_checkpoint
    from ..recipe import Recipe

    with processes.joined():
        made = convert_checkpoint(
            model,
            Recipe.load(recipe, set_ or ()),
            out,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            streams=streams,
            overwrite=overwrite,
            merge_adapter=merge_adapter,
        )
        if processes.rank() == 0:
            kl = _held_out_kl(out)
            told = [] if kl is None else [f"KL to the parent on held-out calibration text: {kl:.3g} nats/token"]
            show(*made.tables(), *told, f"[bold]written to {out}[/bold]")
            write_json({**made.to_dict(), "held_out_kl": kl, "written": str(out)})


def _held_out_kl(out: Path) -> float | None:
    """What the provenance of a result tells of its quality."""
    from ..checkpoints.files import read_json
    from ..checkpoints.provenance import FILE

    found: float | None = (read_json(out / FILE)["calibration"] or {}).get("held_out_kl")
    return found


verb(app, "eval", examples=judging.EVAL_EXAMPLES)(judging.evaluate)
verb(app, "report", examples=judging.REPORT_EXAMPLES)(judging.report)
verb(app, "generate", examples=judging.GENERATE_EXAMPLES)(judging.generate)
verb(app, "demo", examples=judging.DEMO_EXAMPLES)(judging.demo)
verb(
    app,
    "train",
    examples=training.EXAMPLES,
    interrupted="The last checkpoint in OUT stays, and the same command resumes from it.",
)(training.train)
verb(app, "export", cls=exporting.ExportCommand, examples=exporting.EXPORT_EXAMPLES)(exporting.export)
verb(app, "verify", examples=exporting.VERIFY_EXAMPLES)(exporting.verify)
verb(
    app,
    "push",
    examples=exporting.PUSH_EXAMPLES,
    interrupted="The Hub makes one commit of all files, at the end: without it, nothing but the repository is there.",
)(exporting.push)
app.add_typer(bench.app, name="bench")
verb(app, "doctor", examples=("surgery doctor", "surgery doctor --json -"))(doctor.doctor)
