"""The result of an evaluation: plain data, tables for a terminal, Markdown for a model card, a page with plots."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..checkpoints.files import check_output, new_folder
from ..console import count, human_bytes, render
from ..errors import CheckpointError
from ..measure.memory import CacheSize
from ..measure.recall import RecallCell
from ..measure.speed import Rate, Speed
from ..measure.statistics import Difference, Estimate, Quality


@dataclass(frozen=True, kw_only=True)
class GateRatios:
    """Tokens per slot that the gates of a model reach on the text, at the ends of its windows."""

    total: float
    layers: tuple[int, ...]
    by_head: tuple[tuple[float, ...], ...]
    """One row per layer."""

    @property
    def ratio(self) -> dict[int, tuple[float, ...]]:
        """By layer."""
        return dict(zip(self.layers, self.by_head, strict=True))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on one text."""

    name: str
    parameters: int
    quality: dict[str, Quality]
    """By path: `prefill`, `decode`."""
    cache: CacheSize
    max_batch: int
    """Sequences of `context` tokens whose caches fit into the report's memory beside the weights."""
    context: int
    recall: tuple[RecallCell, ...] = ()
    speed: Speed | None = None
    gates: GateRatios | None = None

    @property
    def path(self) -> str:
        """The path that numbers are quoted from: through the cache where that was measured."""
        return "decode" if "decode" in self.quality else "prefill"

    @property
    def nats_per_token(self) -> float:
        return self.quality[self.path].nats_per_token.value

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def cache_gap(self) -> float | None:
        """Nats per token lost by reading the cache: decode minus prefill. 0 but for rounding where nothing is lost."""
        if len(self.quality) < 2:
            return None
        return self.quality["decode"].nats_per_token.value - self.quality["prefill"].nats_per_token.value

    @property
    def kv_bytes_per_token(self) -> float:
        """Measured."""
        return self.cache.bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model, and its baseline on the same text. `print(report)` is the table."""

    model: Measured
    baseline: Measured | None
    differences: dict[str, Difference]
    """By path; empty without a baseline."""
    tokens: int
    """Predicted tokens."""
    windows: int
    length: int
    """Tokens per window."""
    text_digest: str
    memory_bytes: int
    seed: int
    problems: tuple[str, ...]
    """Why numbers are NaN, where they are."""
    versions: dict[str, str]
    device: str
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores of lm-eval by model and task, where asked for."""
    window_start: tuple[str, ...] | None = None
    """Tokens that every window starts with because the tokenizer starts a text so; None where token ids were given."""

    @property
    def difference(self) -> Difference | None:
        """The difference that is quoted: through the cache where that was measured."""
        return self.differences.get(self.model.path)

    @property
    def gap(self) -> float | None:
        """Nats per token that the model lost against the baseline."""
        return None if self.difference is None else self.difference.gap.value

    @property
    def kl(self) -> float | None:
        """KL(baseline || model) in nats per token."""
        return None if self.difference is None else self.difference.kl.value

    @property
    def agreement(self) -> float | None:
        """Share of tokens at which both find the same next token likeliest."""
        return None if self.difference is None else self.difference.agreement.value

    @property
    def measured(self) -> list[Measured]:
        """Baseline first."""
        return [m for m in (self.baseline, self.model) if m is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None, as JSON has none."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Undo `to_dict`.

        Raises:
            CheckpointError: a field is missing or unknown: not a report, or of another version.
        """
        try:
            return _build(cls, data)
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"not an evaluation report of this version ({error}).") from None

    @classmethod
    def load(cls, file: str | Path) -> Report:
        """Read what `surgery eval --json` wrote."""
        try:
            return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, CheckpointError) as error:
            raise CheckpointError(f"{file}: {error}") from None

    def __str__(self) -> str:
        return render(self.tables())

    def tables(self) -> list[Any]:
        """What `print(report)` shows, as rich renderables."""
        parts: list[Any] = [quality_table([self])]
        if any(m.recall for m in self.measured):
            parts.append(recall_table(self.measured))
        parts.append(serving_table([self]))
        if self.tasks:
            parts.append(_tasks_table(self.tasks))
        return [*parts, *(Text(line) for line in self._notes())]

    def _notes(self) -> list[str]:
        """What was measured on, and what went wrong."""
        where = "one token at a time through the cache" if self.model.path == "decode" else "in one forward pass"
        notes = [
            f"{self.tokens:,} predicted tokens in {self.windows} windows of {self.length}, {where}; "
            f"text {self.text_digest}, seed {self.seed}"
        ]
        if self.window_start is not None:
            notes.append(f"every window starts with {' '.join(self.window_start) or 'no special token'}")
        notes.append("perplexity: " + ", ".join(f"{m.perplexity:,.4g} ({m.name})" for m in self.measured))
        if self.model.cache_gap is not None:
            costs = (f"{m.cache_gap:+.5f} ({m.name})" for m in self.measured)
            notes.append(f"reading the cache costs {', '.join(costs)} nats/token: decode minus prefill")
        if self.model.gates is not None:
            rows = [ratio for row in self.model.gates.by_head for ratio in row]
            notes.append(
                f"gates keep one of {self.model.gates.total:.2f} tokens at the ends of the windows: heads from "
                f"{min(rows):.1f} to {max(rows):.1f}"
            )
        return [*notes, *(f"NaN: {problem}" for problem in self.problems)]

    def to_markdown(self) -> str:
        """The same tables in Markdown."""
        return "\n\n".join(markdown(part) for part in self.tables()) + "\n"


def quality_table(reports: Iterable[Report]) -> Table:
    """Loss beside bytes: each baseline once, then the models."""
    reports = list(reports)
    both = any(len(m.quality) > 1 for r in reports for m in r.measured)
    columns = ("change", "95 %", "KL", "same top", "KV B/token", "saved")
    table = _table("model", "nats/token", *(["prefill"] if both else []), *columns)
    seen = set()
    for report in reports:
        base, d, m = report.baseline, report.difference, report.model
        if base is not None and base.name not in seen:
            seen.add(base.name)
            table.add_row(Text(base.name), *_losses(base, both), "", "", "", "", f"{base.kv_bytes_per_token:,.0f}", "")
        cells, saved = ["", "", "", ""], ""
        if base is not None and d is not None:
            b = base.nats_per_token or math.nan  # a share of nothing
            cells = [
                _number(d.gap.value / b, "+.1%"),
                _interval(d.gap, b),
                _number(d.kl.value, ".4f"),
                _number(d.agreement.value, ".1%"),
            ]
            saved = f"{1 - m.kv_bytes_per_token / base.kv_bytes_per_token:.0%}" if base.kv_bytes_per_token else ""
        table.add_row(Text(m.name), *_losses(m, both), *cells, f"{m.kv_bytes_per_token:,.0f}", saved)
    return table


def recall_table(models: Iterable[Measured]) -> Table:
    """Right answers and nats of the right answer by task, over all lengths and depths."""
    models = [m for m in models if m.recall]
    tasks = list(dict.fromkeys(cell.task for m in models for cell in m.recall))
    table = _table("recall: exact (nats)", *(task.replace("_", " ") for task in tasks))
    for m in models:
        by_task = {task: [c for c in m.recall if c.task == task] for task in tasks}
        table.add_row(Text(m.name), *(_recalled(cells) for cells in by_task.values()))
    return table


def serving_table(reports: Iterable[Report]) -> Table:
    """Memory, and speed where it was measured: each baseline once, then the models."""
    reports = list(reports)
    timed = any(m.speed for r in reports for m in r.measured)
    rooms = {(m.context, r.memory_bytes) for r in reports for m in r.measured}
    table = _table(
        "model", "params", "KV cache", "planned", "batch", *(["prefill tok/s", "decode tok/s"] if timed else [])
    )
    seen = set()
    for report in reports:
        for m in report.measured:
            if m is report.baseline:
                if m.name in seen:
                    continue
                seen.add(m.name)
            planned = "?" if m.cache.predicted_bytes is None else human_bytes(m.cache.predicted_bytes)
            batch = f"{m.max_batch:,}" + (
                "" if len(rooms) == 1 else f" of {m.context} in {human_bytes(report.memory_bytes)}"
            )
            cells = [count(m.parameters), human_bytes(m.cache.bytes), planned, batch]
            if timed and m.speed is not None:
                base = None if report.baseline is None or m is report.baseline else report.baseline.speed
                cells.append(_rate(m.speed.prefill, None if base is None else base.prefill))
                cells.append(_rate(m.speed.decode, None if base is None else base.decode))
            table.add_row(Text(m.name), *cells)
    tokens = sorted({m.cache.tokens for r in reports for m in r.measured})
    notes = [f"KV cache: of {' or '.join(map(str, tokens))} tokens, measured; planned: as predicted"]
    if len(rooms) == 1:
        context, memory = rooms.pop()
        notes.append(f"batch: sequences of {context:,} tokens that fit into {human_bytes(memory)} beside the weights")
    if timed:
        notes.append("in brackets: ratio to the baseline in the same run")
    table.caption = Text("; ".join(notes))
    return table


def markdown(part: Any) -> str:
    """A table or a line of text in Markdown."""
    if not isinstance(part, Table):
        return str(part)
    header, *rows = _cells(part)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "|".join("---:" if c.justify == "right" else "---" for c in part.columns) + "|")
    return "\n".join([*lines, *(["", str(part.caption)] if part.caption else [])])


def _cells(table: Table) -> list[list[str]]:
    """Header and rows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


_BREAKABLE = ("95 %", "same top", "KV B/token", "prefill tok/s", "decode tok/s")
"""Columns whose header or cells may take two lines at a space: on 80 columns the names would have no room."""


def _table(*names: str) -> Table:
    """The first column names things and folds; the numbers behind it stay on one line where they can."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left", caption_style="")
    table.add_column(names[0], overflow="fold", min_width=8)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=name not in _BREAKABLE)
    return table


def _losses(m: Measured, both: bool) -> list[str]:
    """The quoted loss, and the prefill loss where `both` have a column."""
    losses = [f"{m.nats_per_token:.4f}"]
    if both:
        losses.append(f"{m.quality['prefill'].nats_per_token.value:.4f}" if len(m.quality) > 1 else "")
    return losses


def _number(value: float, form: str) -> str:
    return "nan" if math.isnan(value) else format(value, form)


def _interval(gap: Estimate, base: float) -> str:
    return "" if math.isnan(gap.low) else f"{gap.low / base:+.1%} {gap.high / base:+.1%}"


def _recalled(cells: Sequence[RecallCell]) -> str:
    if not cells:
        return ""
    exact, nats = statistics.fmean(c.exact for c in cells), statistics.fmean(c.nats for c in cells)
    return "nan" if math.isnan(nats) else f"{exact:.0%} ({nats:.2f})"


def _rate(rate: Rate, first: Rate | None) -> str:
    spread = (rate.high - rate.low) / 2 / rate.median
    ratio = "" if first is None else f" ({rate.median / first.median:.2f}x)"
    return f"{rate.median:,.0f} ±{spread:.0%}{ratio}"


def _tasks_table(tasks: Mapping[str, Mapping[str, float]]) -> Table:
    """A row per task: there may be many, and their names are long."""
    table = _table("lm-eval", *tasks)
    for name in dict.fromkeys(name for scores in tasks.values() for name in scores):
        table.add_row(Text(name), *(f"{scores[name]:.3f}" if name in scores else "" for scores in tasks.values()))
    for column in table.columns:
        column.no_wrap = False  # these headers are names of models
        column.overflow = "fold"
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(kind: Any, value: Any) -> Any:
    """Undo `dataclasses.asdict` and JSON by the types of the fields."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{key: _build(hints[key], v) for key, v in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_build(arguments[0], v) for v in value)
    if origin is dict:
        return {key: _build(arguments[1], v) for key, v in value.items()}
    return math.nan if kind is float and value is None else value


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
    """The reports with one name for the baseline, and a number behind a model's name that was there before."""
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
        page += [_Heading("Tasks of lm-eval"), _tasks_table(tasks)]
    if samples:
        page += [_Heading("Samples"), *(_Sample(*sample) for sample in samples)]
    page.append(_Heading("How this was measured"))
    page += dict.fromkeys(note for report in reports for note in report._notes())
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
    header, *rows = ([html.escape(cell) for cell in row] for row in _cells(table))
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
