"""Maps and bars of a page as plain values: its template makes them of HTML, which any width and colour scheme suits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.scoring import BUCKETS
from .data import GateRatios, Measured, Report


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One square of a map."""

    text: str
    small: str = ""
    """A second line."""
    shade: float | None
    """From 0, as the page, to 1, full colour; None where nothing is known."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """Squares in rows and columns."""

    title: str
    corner: str
    """What rows and columns are."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A named bar; `share` is its part of the longest."""

    name: str
    share: float
    text: str
    is_baseline: bool


NOTHING = Cell(text="", shade=None)


def recall(m: Measured, models: Sequence[Measured]) -> list[Map]:
    """A map for each task of one among several models, by depth and length: exact match, and nats below.

    Colour shows exact match, or the nats where no model answers a single question, as small ones do.
    """
    asked = [cell for m in models for cell in m.recall]
    answered = any(cell.exact > 0 for cell in asked)
    worst = max((cell.nats for cell in asked if math.isfinite(cell.nats)), default=1.0) or 1.0
    lengths, depths = sorted({c.length for c in asked}), sorted({c.depth for c in asked})
    maps = []
    for task in dict.fromkeys(cell.task for cell in m.recall):
        cells = {(c.length, c.depth): c for c in m.recall if c.task == task}
        rows = []
        for depth in depths:
            row = []
            for length in lengths:
                found = cells.get((length, depth))
                if found is None:
                    row.append(NOTHING)
                elif not math.isfinite(found.nats):
                    row.append(Cell(text="nan", shade=None))
                else:
                    shade = found.exact if answered else 1 - found.nats / worst
                    row.append(Cell(text=f"{found.exact:.0%}", small=f"{found.nats:.2f}", shade=shade))
            rows.append((f"{depth:.0%}", tuple(row)))
        maps.append(
            Map(
                title=task.replace("_", " "),
                corner="depth, tokens",
                columns=tuple(f"{length:,}" for length in lengths),
                rows=tuple(rows),
            )
        )
    return maps


def by_position(reports: Sequence[Report]) -> Map:
    """Change of the loss in each third of the context, a row per model that has a baseline."""
    found = {r.model.name: r.difference.gap_by_position for r in reports if r.difference is not None}
    worst = max((abs(v) for values in found.values() for v in values if math.isfinite(v)), default=1.0) or 1.0
    rows = (
        (name, tuple(Cell(text=f"{v:+.4f}", shade=abs(v) / worst if math.isfinite(v) else None) for v in values))
        for name, values in found.items()
    )
    return Map(title="", corner="third of the context", columns=tuple(BUCKETS), rows=tuple(rows))


def gates(ratios: GateRatios) -> Map:
    """Tokens per slot of each layer and KV head; darker heads keep more tokens."""
    heads = max(len(row) for row in ratios.by_head)
    rows = (
        (f"{layer}", tuple(Cell(text=f"{r:.1f}", shade=1 / r) for r in row) + (NOTHING,) * (heads - len(row)))
        for layer, row in ratios.ratio.items()
    )
    return Map(
        title=f"{ratios.total:.2f} tokens per slot overall",
        corner="layer / KV head",
        columns=tuple(map(str, range(heads))),
        rows=tuple(rows),
    )


def decoding(reports: Sequence[Report]) -> list[Bar]:
    """Decoded tokens per second: each model, and below it the baseline of the same run."""
    found = []
    for report in reports:
        mine, base = report.model.speed, None if report.baseline is None else report.baseline.speed
        if mine is None:
            continue
        ratio = "" if base is None else f" ({mine.decode.median / base.decode.median:.2f}x)"
        found.append((report.model.name, mine.decode.median, ratio, False))
        if base is not None and report.baseline is not None:
            found.append((report.baseline.name, base.decode.median, "", True))
    most = max((value for _, value, _, _ in found), default=1.0)
    return [
        Bar(name=name, share=value / most, text=f"{value:,.0f} tokens/s{ratio}", is_baseline=is_baseline)
        for name, value, ratio, is_baseline in found
    ]
