"""The result of an evaluation: plain data, tables for a terminal, Markdown for a model card."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .errors import CheckpointError
from .measure.memory import CacheSize
from .measure.recall import RecallCell
from .measure.speed import Rate, Speed
from .measure.statistics import Difference, Estimate, Quality
from .show import count, human_bytes, render


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
        parts.append(serving_table(self.measured, self.memory_bytes))
        if self.tasks:
            parts.append(_tasks_table(self.tasks))
        where = "one token at a time through the cache" if self.model.path == "decode" else "in one forward pass"
        parts.append(
            f"{self.tokens:,} predicted tokens in {self.windows} windows of {self.length}, {where}; "
            f"text {self.text_digest}, seed {self.seed}"
        )
        return [*parts, *(f"NaN: {problem}" for problem in self.problems)]

    def to_markdown(self) -> str:
        """The same tables in Markdown."""
        return "\n\n".join(markdown(part) for part in self.tables()) + "\n"


def quality_table(reports: Iterable[Report]) -> Table:
    """Loss beside bytes: each baseline once, then the models."""
    table = _table("model", "nats/token", "prefill", "change", "95 %", "KL", "same top", "KV B/token", "saved")
    seen = set()
    for report in reports:
        base, d, m = report.baseline, report.difference, report.model
        if base is not None and base.name not in seen:
            seen.add(base.name)
            table.add_row(base.name, *_losses(base), "", "", "", "", f"{base.kv_bytes_per_token:,.0f}", "")
        cells, saved = ["", "", "", ""], ""
        if base is not None and d is not None:
            b = base.nats_per_token
            cells = [
                f"{d.gap.value / b:+.1%}",
                _interval(d.gap, b),
                f"{d.kl.value:.4f}",
                f"{d.agreement.value:.1%}",
            ]
            saved = f"{1 - m.kv_bytes_per_token / base.kv_bytes_per_token:.0%}" if base.kv_bytes_per_token else ""
        table.add_row(m.name, *_losses(m), *cells, f"{m.kv_bytes_per_token:,.0f}", saved)
    return table


def recall_table(models: Iterable[Measured]) -> Table:
    """Right answers and nats of the right answer by task, over all lengths and depths."""
    models = [m for m in models if m.recall]
    tasks = list(dict.fromkeys(cell.task for m in models for cell in m.recall))
    table = _table("recall: exact (nats)", *(task.replace("_", " ") for task in tasks))
    for m in models:
        by_task = {task: [c for c in m.recall if c.task == task] for task in tasks}
        table.add_row(
            m.name,
            *(
                f"{statistics.fmean(c.exact for c in cells):.0%} ({statistics.fmean(c.nats for c in cells):.2f})"
                if cells
                else ""
                for cells in by_task.values()
            ),
        )
    return table


def serving_table(models: list[Measured], memory: int) -> Table:
    """Memory, and speed where it was measured."""
    timed = any(m.speed for m in models)
    first = models[0]
    headers = ["model", "parameters", "cache measured", "planned", f"batch of {first.context} in {human_bytes(memory)}"]
    table = _table(*headers, *(["prefill tok/s", "decode tok/s"] if timed else []))
    for m in models:
        planned = "?" if m.cache.predicted_bytes is None else human_bytes(m.cache.predicted_bytes)
        cells = [m.name, count(m.parameters), human_bytes(m.cache.bytes), planned, f"{m.max_batch:,}"]
        if timed and m.speed is not None and first.speed is not None:
            cells += [_rate(m.speed.prefill, first.speed.prefill), _rate(m.speed.decode, first.speed.decode)]
        table.add_row(*cells)
    return table


def markdown(part: Any) -> str:
    """A table or a line of text in Markdown."""
    if not isinstance(part, Table):
        return str(part)
    columns = [list(column.cells) for column in part.columns]
    rows = [[str(column.header) for column in part.columns], *zip(*columns, strict=True)]
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("---:" if c.justify == "right" else "---" for c in part.columns) + "|")
    return "\n".join(lines)


def _table(*names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    return table


def _losses(m: Measured) -> tuple[str, str]:
    """The quoted loss, and the prefill loss where both were measured."""
    both = len(m.quality) > 1
    return f"{m.nats_per_token:.4f}", f"{m.quality['prefill'].nats_per_token.value:.4f}" if both else ""


def _interval(gap: Estimate, base: float) -> str:
    return "" if math.isnan(gap.low) else f"{gap.low / base:+.1%} {gap.high / base:+.1%}"


def _rate(rate: Rate, first: Rate) -> str:
    spread = (rate.high - rate.low) / 2 / rate.median
    ratio = "" if rate is first else f" ({rate.median / first.median:.2f}x)"
    return f"{rate.median:,.0f} ±{spread:.0%}{ratio}"


def _tasks_table(tasks: dict[str, dict[str, float]]) -> Table:
    names = list(dict.fromkeys(name for scores in tasks.values() for name in scores))
    table = _table("lm-eval", *names)
    for model, scores in tasks.items():
        table.add_row(model, *(f"{scores[name]:.3f}" if name in scores else "" for name in names))
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
