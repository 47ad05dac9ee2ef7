"""`surgery demo`: the bundled model converted in several ways; what each cost, saved, and still remembers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .anatomy import examine
from .bundled import SMALL
from .calibration.text import Windows, load_tokenizer, load_windows
from .checkpoints.storage import load
from .composing.compose import compose
from .console import progress, stdout
from .convert import convert
from .measure.evaluate import evaluate
from .plan import plan
from .recipe import Recipe
from .report.data import Report, quality_table, recall_table, serving_table
from .report.page import check_report_folder, continued, write_report

OURS = {"gain_fit": False}  # half the time, and of little use after the refits
PLAIN = {"grouping": "neighbour", "refit_queries": False, "refit_output": False, "gain_fit": False}
PROMPTS = (
    "It was late in the evening when the old man",
    "The red box holds the lamp. The blue box holds the key. The red box holds the",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion of the demo."""

    name: str
    recipe: str
    options: dict[str, Any]


ROWS = (
    Row(name="2x mean pooling", recipe="gqa-2x", options={"init": "mean", **PLAIN}),
    Row(name="2x surgery", recipe="gqa-2x", options=OURS),
    Row(name="4x mean pooling", recipe="gqa-4x", options={"init": "mean", **PLAIN}),
    Row(name="4x surgery", recipe="gqa-4x", options=OURS),
    Row(name="8x surgery", recipe="mqa", options=OURS),
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much text the demo reads; every window has 256 tokens."""

    rows: tuple[Row, ...]
    calibration: int
    held_out: int
    questions: int
    tasks: tuple[str, ...]


WHOLE = Effort(rows=ROWS, calibration=24, held_out=24, questions=4, tasks=("all",))
FAST = Effort(rows=ROWS[2:4], calibration=8, held_out=8, questions=2, tasks=("passkey",))
LENGTH = 256


def run(out: Path, *, fast: bool = False, overwrite: bool = False) -> list[Report]:
    """Inspect, plan, convert, evaluate, generate, and write the report to `out`.

    Raises:
        CheckpointError: `out` is not empty, or cannot be written.
    """
    check_report_folder(out, overwrite)
    begun = time.monotonic()
    effort = FAST if fast else WHOLE
    console = stdout()
    tokenizer = load_tokenizer(SMALL)
    parent = load(SMALL, dtype=torch.float32)
    calibration, held_out = topic_windows(tokenizer, parent.config.vocab_size, effort.calibration, effort.held_out)

    console.rule("[bold]the model[/bold] (bundled, pretrained on English prose)", align="left")
    console.print(*examine(parent).tables(), sep="\n")
    console.rule("[bold]a plan[/bold]", align="left")
    console.print(*plan(parent, "gqa-2x").tables(), sep="\n")

    console.rule("[bold]conversions[/bold], without any training", align="left")
    reports: list[Report] = []
    for row in effort.rows:
        started = time.monotonic()
        recipe = Recipe.load(row.recipe, [f"{key}={str(value).lower()}" for key, value in row.options.items()])
        child = convert(parent, recipe, calibration=calibration)
        converted = time.monotonic()
        reports.append(
            evaluate(
                child,
                baseline=parent,
                text=held_out,
                tokenizer=tokenizer,
                recall_tasks=effort.tasks,
                recall_lengths=(128, 384),
                questions=effort.questions,
                speed=not fast,
                prompts=PROMPTS,
                names=(row.name, "parent"),
            )
        )
        seconds = time.monotonic() - converted
        console.print(f"{row.name}: converted in {converted - started:.0f} s, evaluated in {seconds:.0f} s")
    halved = "half the KV heads in one layer alone, pooled without refits"
    sensitivities = None if fast else {halved: layer_sensitivity(parent, calibration, held_out.take(8))}

    models = [m for m in (reports[0].baseline, *(r.model for r in reports)) if m is not None]
    console.print(quality_table(reports), recall_table(models), serving_table(reports), sep="\n")
    if not fast:
        console.rule(
            "[bold]a budget[/bold]: a quarter of the parent's bytes, by whatever suits each layer", align="left"
        )
        found = compose(parent, ratio=4, calibration=calibration, context=LENGTH, axes=("project", "store"))
        console.print(*found.tables(), sep="\n")
    for name, prompt, text in continued(reports):
        if prompt is PROMPTS[0]:
            console.print(f"[bold]{name}[/bold]  {prompt}[italic]{text}[/italic]", soft_wrap=False)
    page = write_report(
        reports,
        out,
        title="surgery demo",
        sensitivities=sensitivities,
        overwrite=overwrite,
    )
    console.print(
        "\nMean pooling is the published form of GQA. Loss is on text that neither training nor calibration saw, "
        f"decoded through the cache. {time.monotonic() - begun:.0f} s in all.\nPlots and samples: [bold]{page}[/bold]\n"
        "Next: surgery convert YOUR-MODEL -r gqa-2x --calibration text.jsonl -o ./smaller\n"
        "or:   surgery plan YOUR-MODEL --ratio 4 --calibration text.jsonl -o composed.yaml"
    )
    return reports


def layer_sensitivity(parent: PreTrainedModel, calibration: Windows, held_out: Windows) -> dict[int, float]:
    """Nats per token that halving the heads of one layer alone costs, pooled without refits."""
    costs = {}
    sites = examine(parent).sites
    with progress("sensitivity", len(sites)) as advance:
        for site in sites:
            step = {"rewriter": "gqa", "kv_heads": "1/2", **PLAIN, "grouping": "search", "layers": str(site.layer)}
            child = convert(parent, {"steps": [step]}, calibration=calibration.take(16))
            costs[site.layer] = evaluate(child, baseline=parent, text=held_out, path="prefill").gap or 0.0
            advance(1)
    return costs


def topic_windows(tokenizer: Any, vocab_size: int, calibration: int, held_out: int) -> tuple[Windows, Windows]:
    """Calibration and held-out windows of English that every Python brings along: the topics of `help()`, by topic."""
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        parts[i % 2].append(topics[name])
    first, second = (
        load_windows(
            part, tokenizer, vocab_size=vocab_size, length=LENGTH, samples=samples, every_window=True, where="topics"
        )
        for part, samples in zip(parts, (calibration, held_out), strict=True)
    )
    return first, second
