"""Evaluations on one page: `report.html` in one file, and `report.md` with its plots."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from ..checkpoints.writing import check_output, new_folder
from ..console import count
from ..errors import CheckpointError
from . import maps
from . import samples as sampled
from .data import (
    GateRatios,
    Measured,
    Report,
    markdown,
    quality_table,
    recall_table,
    serving_table,
    table_cells,
    tasks_table,
)


def write_report(
    reports: Sequence[Report],
    out: str | Path,
    *,
    title: str = "surgery report",
    sensitivities: Mapping[str, Mapping[int, float]] | None = None,
    samples: Iterable[tuple[str, str, str]] = (),
    overwrite: bool = False,
) -> Path:
    """Write `report.html`, one file with all in it, and `report.md` with `plots/*.png`, complete or not at all.

    Args:
        sensitivities: by conversion in words, layer -> nats per token that converting that layer alone costs.
        samples: (model, prompt, what the model continued it with), beside those that the reports hold.
        overwrite: replace an older report in `out`; a folder that holds other things is never replaced.

    Returns:
        The path of `report.html`.

    Raises:
        CheckpointError: no report; reports whose numbers do not compare; `out` is taken or cannot be written.
    """
    out = Path(out)
    check_comparable(reports)
    check_report_folder(out, overwrite)
    named = told_apart(reports)
    blocks = _page(named, sensitivities or {}, sampled.side_by_side([*samples, *continued(named)]))
    with new_folder(out, overwrite) as folder:
        (folder / "plots").mkdir()
        for block in blocks:
            if isinstance(block, _Picture):
                (folder / block.file).write_bytes(block.png)
        (folder / "report.md").write_text(_as_markdown(title, blocks), encoding="utf-8")
        (folder / "report.html").write_text(_as_html(title, blocks), encoding="utf-8")
    return out / "report.html"


def markdown_page(reports: Sequence[Report]) -> tuple[str, dict[str, bytes]]:
    """What `report.md` says below its title, and the pictures by the paths that it names."""
    blocks = _page(list(reports), {}, [])
    return _as_markdown(None, blocks).rstrip(), {b.file: b.png for b in blocks if isinstance(b, _Picture)}


_OUTPUTS = ("plots", "report.html", "report.md")


def check_report_folder(out: str | Path, overwrite: bool = False) -> None:
    """Raise CheckpointError where `write_report` would refuse `out`: asked before long work is begun."""
    out = Path(out)
    check_output(out, overwrite)
    others = sorted(p.name for p in out.iterdir() if p.name not in _OUTPUTS) if out.is_dir() else []
    if others:  # the folder is replaced as a whole; results and checkpoints may lie in it
        raise CheckpointError(f"{out}: holds {others[0]}, which no report wrote. Choose another folder.")


def check_comparable(reports: Sequence[Report]) -> None:
    """Raise CheckpointError where the numbers of two reports do not compare."""
    if not reports:
        raise CheckpointError("report: no results given. Make some with: surgery eval ... --json result.json")
    first = reports[0]
    parent = next((r for r in reports if r.baseline is not None), first)
    for report in reports[1:]:
        pair = f"{first.model.name} and {report.model.name}"
        mine, theirs = (f"text {r.text_digest}, {r.windows} windows of {r.length} tokens" for r in (first, report))
        if mine != theirs:
            raise CheckpointError(
                f"{pair}: measured on different texts ({mine}; {theirs}), so their losses do not compare. "
                "Evaluate both with the same --text, --length and --samples."
            )
        if first.model.path != report.model.path:
            raise CheckpointError(
                f"{pair}: one was measured by {first.model.path}, the other by {report.model.path}. "
                "Evaluate both with the same --path."
            )
        if first.model.path == "decode" and first.prompt != report.prompt:
            raise CheckpointError(
                f"{pair}: one was given {first.prompt} tokens of each window at once, the other {report.prompt}, and "
                f"decoded the rest. Evaluate both with --at-once {max(first.prompt, report.prompt)}."
            )
        if report.baseline is not None and parent.baseline is not None and not _same(parent.baseline, report.baseline):
            raise CheckpointError(
                f"{parent.model.name} and {report.model.name}: measured against different baselines "
                f"({_fingerprint(parent.baseline)}; {_fingerprint(report.baseline)}). "
                "Evaluate both with the same --baseline."
            )
    known: dict[str, tuple[str, str]] = {}
    for report in reports:
        for task, asked in _asked(report).items():
            name, before = known.setdefault(task, (report.model.name, asked))
            if before != asked:
                raise CheckpointError(
                    f"{name} and {report.model.name}: asked other questions of {task} ({before}; {asked}), so their "
                    "answers do not compare. Evaluate both with the same --questions and --seed."
                )


def _asked(report: Report) -> dict[str, str]:
    """Which recall questions, by task."""
    found = {}
    for task in dict.fromkeys(cell.task for cell in report.model.recall):
        cells = [cell for cell in report.model.recall if cell.task == task]
        lengths, depths, questions = (
            ", ".join(f"{value:g}" for value in sorted({getattr(cell, name) for cell in cells}))
            for name in ("length", "depth", "questions")
        )
        found[task] = f"{questions} in {lengths} tokens at depths {depths}, seed {report.seed}"
    return found


def _same(a: Measured, b: Measured) -> bool:
    """By the numbers, not the name: that is how the user spelt a path."""
    # Another device, or another version of torch, moves the last digits.
    near = math.isclose(a.nats_per_token, b.nats_per_token, rel_tol=1e-3)
    near |= math.isnan(a.nats_per_token) and math.isnan(b.nats_per_token)
    return near and (a.parameters, a.cache.bytes) == (b.parameters, b.cache.bytes)


def _fingerprint(m: Measured) -> str:
    return f"{m.name}: {count(m.parameters)} parameters, {m.nats_per_token:.4f} nats/token"


def continued(reports: Sequence[Report]) -> list[tuple[str, str, str]]:
    """(model, prompt, continuation) of all models, the baseline first and once."""
    found = {(m.name, prompt): text for r in reports for m in r.measured for prompt, text in m.continued.items()}
    return [(name, prompt, text) for (name, prompt), text in found.items()]


def told_apart(reports: Sequence[Report]) -> list[Report]:
    """The reports with one name for the baseline, and a number after a model's name that was there before."""
    parents = [r.baseline.name for r in reports if r.baseline is not None]
    taken = set(parents[:1])
    named = []
    for report in reports:
        name, number = report.model.name, 1
        while name in taken:
            number += 1
            name = f"{report.model.name} ({number})"
        taken.add(name)
        renamed = {report.model.name: name}
        baseline = report.baseline
        if baseline is not None:
            renamed = {baseline.name: parents[0], **renamed}
            baseline = dataclasses.replace(baseline, name=parents[0])
        named.append(
            dataclasses.replace(
                report,
                model=dataclasses.replace(report.model, name=name),
                baseline=baseline,
                tasks={renamed.get(key, key): scores for key, scores in report.tasks.items()},
            )
        )
    return named


@dataclass(frozen=True)
class _Heading:
    text: str


@dataclass(frozen=True)
class _List:
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A plot: as an image for Markdown, and in the form that the template of the page has for it."""

    name: str
    says: str
    png: bytes
    kind: str
    """`plots`, `maps` or `bars`."""
    shown: Callable[[], list[Any]]
    """What the template is given; maps as (name, maps that stand side by side below it)."""

    @property
    def file(self) -> str:
        return f"plots/{self.name}.png"


def _page(
    reports: list[Report], changes: Mapping[str, Mapping[int, float]], samples: Sequence[sampled.Sample]
) -> list[Any]:
    """What the page says, in order: headings, paragraphs, tables, pictures, samples."""
    from . import interactive, plots

    baseline = next((r.baseline for r in reports if r.baseline is not None), None)
    models = [*([] if baseline is None else [baseline]), *(r.model for r in reports)]
    page: list[Any] = [
        _Heading("Quality against bytes"),
        _picture("quality", "Loss against bytes per token of the KV cache", plots.pareto(reports), "plots",
                 lambda: interactive.fronts(reports)),
        "Further down and further left is better. The grey line joins the models that no other beats in both; dashed "
        "lines: the baseline. Bars: 95 % intervals.",
        quality_table(reports),
        _List(
            (
                "nats/token: loss, lower is better",
                "prefill: the same in one forward pass, which never reads the cache",
                "change: of the loss against the baseline, with its 95 % interval over windows of the text",
                "KL: nats/token from the baseline",
                "same top: share of tokens at which both find the same next token likeliest",
                "KV B/token: bytes that the cache holds per token, measured",
            )
        ),
    ]  # fmt: skip
    if baseline is not None:
        says = "Change of the loss in the early, middle and late third of the context"
        page += [
            f"{says}, nats/token.",
            _picture(
                "position", says, plots.loss_by_position(reports), "maps", lambda: [("", [maps.by_position(reports)])]
            ),
        ]
    if any(m.recall for m in models):
        page += [
            _Heading("Recall"),
            recall_table(models),
            "Share answered exactly; nats of the right answer. The maps show both by the depth of the fact in the text "
            "and the length of the text in tokens.",
            _picture("recall", "Recall by depth and length", plots.recall_maps(models), "maps",
                     lambda: [(m.name, maps.recall(m, models)) for m in models if m.recall]),
        ]  # fmt: skip
    page += [_Heading("Memory and speed"), serving_table(reports)]
    if any(r.model.speed for r in reports):
        drawn = plots.decode_speed(reports)
        page.append(_picture("speed", "Decoded tokens per second", drawn, "bars", lambda: maps.decoding(reports)))
    if changes:
        says = "Change of the loss where one layer is converted"
        page += [
            _Heading("Sensitivity of the layers"),
            f"{says} and the others are as they were, nats/token.",
            _picture("sensitivity", says, plots.sensitivities(changes), "plots",
                     lambda: [interactive.over_layers(changes, says)]),
        ]  # fmt: skip
    tasks = {name: scores for report in reports for name, scores in report.tasks.items()}
    gated = [(m.name, m.gates) for m in models if m.gates is not None]
    if gated:
        page += [
            _Heading("Tokens per slot"),
            "By layer and KV head: gates decide which tokens keep a slot of the cache.",
        ]
    for i, (name, gates) in enumerate(gated):
        says = f"Tokens per slot by layer and KV head: {name}"
        page.append(_picture(f"gates-{i + 1}", says, plots.gate_map(gates), "maps", partial(_gate_maps, name, gates)))
    if tasks:
        page += [_Heading("Tasks of lm-eval"), tasks_table(tasks)]
    if samples:
        page += [
            _Heading("Samples"),
            f"Marked: where a model says something else than {samples[0].answers[0].model}.",
            *samples,
        ]
    page.append(_Heading("How this was measured"))
    where = (f"on {r.device} with {', '.join(f'{k} {v}' for k, v in r.versions.items())}" for r in reports)
    page.append(_List(tuple(dict.fromkeys([*(note for r in reports for note in r.notes()), *where]))))
    return page


def _gate_maps(name: str, gates: GateRatios) -> list[Any]:
    return [(name, [maps.gates(gates)])]


def _picture(name: str, says: str, figure: Any, kind: str, shown: Callable[[], list[Any]]) -> _Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return _Picture(name=name, says=says, png=file.getvalue(), kind=kind, shown=shown)


def _as_markdown(title: str | None, blocks: Iterable[Any]) -> str:
    parts = [] if title is None else [f"# {title}"]
    for block in blocks:
        match block:
            case _Heading(text):
                parts.append(f"## {text}")
            case _List(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case _Picture():
                parts.append(f"![{block.says}]({block.file})")
            case sampled.Sample():
                parts.append(_sample_as_markdown(block))
            case _:
                parts.append(markdown(block))
    return "\n\n".join(parts) + "\n"


def _sample_as_markdown(sample: sampled.Sample) -> str:
    """A quotation for each model, words that differ in bold."""
    parts = [f"*{' '.join(sample.prompt.split())}*"]
    for answer in sample.answers:
        text = "".join(f"**{piece}**" if differs else piece for piece, differs in answer.pieces)
        parts.append("\n".join(f"> {line}".rstrip() for line in f"`{answer.model}`\n{text}".splitlines()))
    return "\n\n".join(parts)


def _as_html(title: str, blocks: Iterable[Any]) -> str:
    """The template `page.html` with the blocks and Bokeh's script in it."""
    from jinja2 import Environment, StrictUndefined

    from . import interactive

    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        title=title, blocks=[_for_template(block) for block in blocks], script=interactive.script()
    )


def _for_template(block: Any) -> tuple[str, Any]:
    """The kind by which the template knows a block, and what it shows of it."""
    match block:
        case _Heading(text):
            return "heading", text
        case _List(items):
            return "list", items
        case _Picture():
            return block.kind, block.shown()
        case sampled.Sample():
            return "sample", block
        case Table():
            return "table", {"cells": table_cells(block), "caption": str(block.caption or "")}
        case _:
            return "text", str(block)
