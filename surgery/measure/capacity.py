"""How many sequences fit into a given memory, before and after: what a smaller cache buys without a faster step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..console import human_bytes
from ..errors import PlanError
from ..plan import Plan, plan
from ..recipe import Recipe
from .memory import max_batch


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in the given memory."""

    name: str
    weight_bytes: int
    cache_bytes_per_token: int
    batches: tuple[int, ...]
    """Largest batch at each context; 0 where not even one sequence fits."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Largest batches of a model and of what recipes make of it. `print` shows the table."""

    memory: int
    """Bytes for weights and caches; activations and the runtime's own are not counted."""
    contexts: tuple[int, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Any]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(("", "weights", "cache/token", *(f"{c:,} tokens" for c in self.contexts))):
            table.add_column(name, justify="right" if i else "left")
        parent = self.rows[0]
        for row in self.rows:
            cells = []
            for now, before in zip(row.batches, parent.batches, strict=True):
                more = f" ({now / before:.1f}x)" if before and row is not parent else ""
                cells.append(f"{now:,}{more}" if now else "none fits")
            table.add_row(row.name, human_bytes(row.weight_bytes), human_bytes(row.cache_bytes_per_token), *cells)
        return [
            f"[bold]Sequences that fit into {human_bytes(self.memory)}[/bold] beside the weights",
            table,
            "Activations are not counted. Layers that share a cache save memory, not reads:",
            "a step of the same batch is no faster, but more sequences fit.",
        ]


def capacity(model_or_path: Any, recipes: Sequence[Any], *, memory: int, contexts: Sequence[int]) -> Capacity:
    """Largest batch of the parent and of each recipe's result.

    Args:
        model_or_path: model, config, Anatomy, folder or Hub id; only its config is read.
        recipes: what `Recipe.load` takes.
        memory: bytes.
        contexts: tokens per sequence.

    Raises:
        PlanError: no context, or one below 1. Others as `plan`.
    """
    if not contexts or min(contexts) < 1:
        raise PlanError(f"contexts: {list(contexts)} must be whole numbers of tokens, at least 1.")
    plans = [plan(model_or_path, "identity")]
    plans += [plan(plans[0].anatomy, recipe) for recipe in map(Recipe.load, recipes)]
    rows = [_row("parent" if i == 0 else p.recipe.name, p, memory, contexts) for i, p in enumerate(plans)]
    return Capacity(memory=memory, contexts=tuple(contexts), rows=tuple(rows))


def _row(name: str, plan: Plan, memory: int, contexts: Sequence[int]) -> Row:
    weights = plan.parameters * getattr(torch, plan.anatomy.dtype).itemsize
    return Row(
        name=name,
        weight_bytes=weights,
        cache_bytes_per_token=plan.bytes_per_token,
        batches=tuple(max_batch(memory, weights, plan.cache_bytes(tokens)) for tokens in contexts),
    )
