"""The result of an evaluation: plain data, and its tables for a terminal or a model card."""

from __future__ import annotations

import dataclasses
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
    continued: dict[str, str] = field(default_factory=dict)
    """By prompt: what the model goes on with, the likeliest token each time."""

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
    """A model, and its baseline on the same text. `print(report)` is the table.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> report = surgery.evaluate(surgery.load(SMALL), text=["Once upon a time there was a girl. " * 40], length=64)
        >>> round(report.model.quality["decode"].nats_per_token.value, 1) < 7
        True
    """

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
    prompt: int = 1
    """Tokens of each window that came at once, where the others were decoded: slots leave behind several."""

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
            parts.append(tasks_table(self.tasks))
        for prompt in self.model.continued:
            parts.append(Text(prompt, "bold"))
            parts += [Text.assemble((m.name, "italic"), " ", m.continued[prompt]) for m in self.measured]
        return [*parts, *(Text(line) for line in self.notes())]

    def notes(self) -> list[str]:
        """What was measured on, and what went wrong."""
        where = "one token at a time through the cache" if self.model.path == "decode" else "in one forward pass"
        if self.model.path == "decode" and self.prompt > 1:
            where = f"the first {self.prompt:,} at once, then {where}"
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
    header, *rows = table_cells(part)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "|".join("---:" if c.justify == "right" else "---" for c in part.columns) + "|")
    return "\n".join([*lines, *(["", str(part.caption)] if part.caption else [])])


def table_cells(table: Table) -> list[list[str]]:
    """Header and rows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


_BREAKABLE = ("95 %", "same top", "KV B/token", "prefill tok/s", "decode tok/s")
"""Columns whose header or cells may take two lines at a space: on 80 columns the names would have no room."""


def _table(*names: str) -> Table:
    """The first column names things and folds; the numbers after it stay on one line where they can."""
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


def tasks_table(tasks: Mapping[str, Mapping[str, float]]) -> Table:
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
