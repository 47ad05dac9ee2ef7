"""Evaluations on one page: `report.html` in one file, and `report.md` with its plots."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..checkpoints.writing import check_output, new_folder
from ..console import count
from ..errors import CheckpointError
from .data import Measured, Report, markdown, quality_table, recall_table, serving_table, table_cells, tasks_table


def write_report(
    reports: Sequence[Report],
    out: str | Path,
    *,
    title: str = "surgery report",
    sensitivity: Mapping[int, float] | None = None,
    sensitivity_label: str = "",
    samples: Iterable[tuple[str, str, str]] = (),
    overwrite: bool = False,
) -> Path:
    """Write `report.html`, one file with all in it, and `report.md` with `plots/*.png`, complete or not at all.

    Args:
        sensitivity: layer -> nats per token that converting it alone costs; `sensitivity_label` says how.
        samples: (model, prompt, what the model continued it with).
        overwrite: replace an older report in `out`; a folder that holds other things is never replaced.

    Returns:
        The path of `report.html`.

    Raises:
        CheckpointError: no report; reports whose numbers do not compare; `out` is taken or cannot be written.
    """
    out = Path(out)
    check_comparable(reports)
    check_report_folder(out, overwrite)
    blocks = _page(told_apart(reports), sensitivity or {}, sensitivity_label, list(samples))
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
    blocks = _page(list(reports), {}, "", [])
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
        if report.baseline is not None and parent.baseline is not None and not _same(parent.baseline, report.baseline):
            raise CheckpointError(
                f"{parent.model.name} and {report.model.name}: measured against different baselines "
                f"({_fingerprint(parent.baseline)}; {_fingerprint(report.baseline)}). "
                "Evaluate both with the same --baseline."
            )


def _same(a: Measured, b: Measured) -> bool:
    """By the numbers, not the name: that is how the user spelt a path."""
    # Another device, or another version of torch, moves the last digits.
    near = math.isclose(a.nats_per_token, b.nats_per_token, rel_tol=1e-3)
    near |= math.isnan(a.nats_per_token) and math.isnan(b.nats_per_token)
    return near and (a.parameters, a.cache.bytes) == (b.parameters, b.cache.bytes)


def _fingerprint(m: Measured) -> str:
    return f"{m.name}: {count(m.parameters)} parameters, {m.nats_per_token:.4f} nats/token"


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
class _Picture:
    name: str
    says: str
    png: bytes
    width: int
    """Pixels of a screen at 100 %."""

    @property
    def file(self) -> str:
        return f"plots/{self.name}.png"


@dataclass(frozen=True)
class _Sample:
    model: str
    prompt: str
    text: str


def _page(
    reports: list[Report], sensitivity: Mapping[int, float], label: str, samples: list[tuple[str, str, str]]
) -> list[Any]:
    """What the page says, in order: headings, paragraphs, tables, pictures, samples."""
    from . import plots

    baseline = next((r.baseline for r in reports if r.baseline is not None), None)
    models = [*([] if baseline is None else [baseline]), *(r.model for r in reports)]
    page: list[Any] = [
        _Heading("Quality"),
        quality_table(reports),
        "nats/token: loss, lower is better. prefill: the same in one forward pass, which never reads the cache. "
        "change: of the loss against the baseline, with its 95 % interval over windows of the text. KL: nats/token "
        "from the baseline. same top: share of tokens at which both find the same next token likeliest. "
        "KV B/token: bytes that the cache holds per token, measured.",
        _picture("quality", "Loss against bytes per token of the KV cache", plots.pareto(reports)),
    ]
    if baseline is not None:
        says = "Change of the loss in the early, middle and late third of the context"
        page.append(_picture("position", says, plots.loss_by_position(reports)))
    if any(m.recall for m in models):
        page += [_Heading("Recall"), recall_table(models), "Share answered exactly; nats of the right answer."]
        page.append(_picture("recall", "Recall by depth and length", plots.recall_maps(models)))
    page += [_Heading("Memory and speed"), serving_table(reports)]
    if any(r.model.speed for r in reports):
        page.append(_picture("speed", "Decoded tokens per second", plots.decode_speed(reports)))
    if sensitivity:
        page.append(_Heading("Sensitivity of the layers"))
        says = "Change of the loss where one layer is converted"
        page.append(_picture("sensitivity", says, plots.sensitivity(sensitivity, label)))
    tasks = {name: scores for report in reports for name, scores in report.tasks.items()}
    gated = [m for m in models if m.gates is not None]
    if gated:
        page += [
            _Heading("Tokens per slot"),
            "By layer and KV head: gates decide which tokens keep a slot of the cache.",
        ]
    for i, m in enumerate(gated):
        says = f"Tokens per slot by layer and KV head: {m.name}"
        page += [m.name, _picture(f"gates-{i + 1}", says, plots.gate_map(m.gates))]  # type: ignore[arg-type]
    if tasks:
        page += [_Heading("Tasks of lm-eval"), tasks_table(tasks)]
    if samples:
        page += [_Heading("Samples"), *(_Sample(*sample) for sample in samples)]
    page.append(_Heading("How this was measured"))
    page += dict.fromkeys(note for report in reports for note in report.notes())
    page += dict.fromkeys(f"on {r.device} with {', '.join(f'{k} {v}' for k, v in r.versions.items())}" for r in reports)
    return page


def _picture(name: str, says: str, figure: Any) -> _Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return _Picture(name, says, file.getvalue(), round(100 * figure.get_figwidth()))


def _as_markdown(title: str | None, blocks: Iterable[Any]) -> str:
    parts = [] if title is None else [f"# {title}"]
    for block in blocks:
        match block:
            case _Heading(text):
                parts.append(f"## {text}")
            case _Picture():
                parts.append(f"![{block.says}]({block.file})")
            case _Sample(model, prompt, text):
                quoted = f"*{model}*\n\n**{prompt.strip()}**{text}"
                parts.append("\n".join(f"> {line}".rstrip() for line in quoted.splitlines()))
            case _:
                parts.append(markdown(block))
    return "\n\n".join(parts) + "\n"


def _as_html(title: str, blocks: Iterable[Any]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case _Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case _Picture():
                data = base64.b64encode(block.png).decode()
                says = html.escape(block.says)
                parts.append(f'<img alt="{says}" width="{block.width}" src="data:image/png;base64,{data}">')
            case _Sample():
                model, prompt, text = (html.escape(part) for part in (block.model, block.prompt, block.text))
                parts.append(f"<blockquote><cite>{model}</cite><b>{prompt}</b>{text}</blockquote>")
            case Table():
                parts.append(_html_table(block))
            case _:
                parts.append(f"<p>{html.escape(str(block))}</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    header, *rows = ([html.escape(cell) for cell in row] for row in table_cells(table))
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    caption = f"<p>{html.escape(str(table.caption))}</p>" if table.caption else ""
    return '<div class="table"><table>\n' + "\n".join(lines) + f"\n</table></div>{caption}"


_CSS = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p { color: var(--soft); font-size: 0.9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
img { display: block; max-width: 100%; height: auto; margin: 1.5rem 0; background: white; border-radius: 6px; }
blockquote { margin: 1rem 0; padding: 0.2rem 1rem; border-left: 3px solid var(--line); white-space: pre-wrap; }
cite { display: block; color: var(--soft); font-size: 0.9rem; }
"""
