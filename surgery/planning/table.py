"""A plan as tables: what a user decides from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..checkpoints.restored import facts_in
from ..console import count, human_bytes, spans
from ..runtime.layout import AttentionSite, LayerPlan

if TYPE_CHECKING:
    from ..plan import Plan

CONTEXTS = {"4k": 4096, "32k": 32768, "128k": 131072}
"""Lengths that the table of cache sizes has a column for, in tokens."""


def headline(plan: Plan) -> str:
    """Recipe, class, parameters and dtype."""
    a = plan.anatomy
    return f"[bold]{plan.recipe.name}[/bold] on {a.architecture}, {count(a.parameters)} parameters, {a.dtype}"


def layers_table(plan: Plan) -> Table:
    """What each layer caches before and after; equal layers share a row."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("layers", "attention", "KV heads", "window", "bytes/token", "saved"):
        table.add_column(name, justify="left" if name in ("layers", "attention") else "right")

    def row(site: AttentionSite, b: LayerPlan, a: LayerPlan) -> tuple[str, ...]:
        saved = 1 - a.bytes_per_token / b.bytes_per_token if b.bytes_per_token else 0
        return (
            f"{site.heads} q heads x {site.head_dim}",
            f"{b.project.label()}{'' if a.project.kind == b.project.kind else ' heads'} → {a.project.label()}"
            + (f", {a.retain.label()}" if a.retain else "")
            + (f", {'V ' if a.value_owner is not None else ''}of layer {a.lenders[0]}" if a.lenders else "")
            + (f", {a.store.label()}" if a.store.label() else ""),
            "all" if site.window is None else str(site.window),
            f"{b.bytes_per_token:,} → {a.bytes_per_token:,}",
            f"{saved:.0%}",
        )

    rows: dict[tuple[str, ...], list[int]] = {}
    for site, b, a in zip(plan.anatomy.sites, plan.before, plan.after, strict=True):
        rows.setdefault(row(site, b, a), []).append(site.layer)
    for cells, layers in rows.items():
        table.add_row(spans(layers), *cells)
    return table


def totals_table(plan: Plan) -> Table:
    """Bytes of the cache of one sequence at several lengths, before and after."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = {"1 token": 1, **CONTEXTS}
    for i, name in enumerate(("KV cache, one sequence", *columns)):
        table.add_column(name, justify="right" if i else "left")
    for name, parent in (("before", True), ("after", False)):
        table.add_row(name, *(human_bytes(plan.cache_bytes(tokens, parent)) for tokens in columns.values()))
    retained = [layer.retain for layer in plan.after if layer.retain]
    if retained and all(retain.has_static for retain in retained):
        # Its pool of pages is sized by the ratio: what the gates do not reach does not fit.
        static = (plan.static_cache_bytes(tokens) for tokens in columns.values())
        table.add_row("after, static", *map(human_bytes, static))
    ratios = (plan.cache_bytes(t, True) / max(plan.cache_bytes(t), 1) for t in columns.values())
    table.add_row("smaller by", *(f"{ratio:.2f}x" for ratio in ratios))
    return table


def notes(plan: Plan) -> list[str]:
    """What else a user wants to know before converting."""
    lines = [f"parameters: {count(plan.anatomy.parameters)} → {count(plan.parameters)}", f"loads in: {plan.engines}"]
    if plan.needs_calibration:
        lines.append("needs: calibration text (a few hundred documents)")
    elif plan.wants_calibration:
        lines.append("asks for: calibration text (a few hundred documents); without it, quality falls")
    for method in plan.methods():
        lines += method.notes(plan)
    lines += plan.skipped
    for name, layers in plan.left_out.items():
        lines.append(
            f"left out: {layers} layer{'s' * (layers > 1)} that {name} counts; {plan.anatomy.architecture} loads none"
        )
    for note in (facts_in(plan.anatomy.config.name_or_path) or {}).get("notes", ()):
        lines.append(f"the GGUF: {note}")
    if plan.recipe.uptrain:
        lines.append(f"uptraining afterwards: {count(plan.recipe.uptrain.tokens)} tokens suggested")
    return list(dict.fromkeys(lines))
