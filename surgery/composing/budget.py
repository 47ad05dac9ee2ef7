"""Budgets in the words of users: bytes per token, a part of the parent's, or a memory that a batch has to fit into."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..console import human_bytes
from ..errors import PlanError, RecipeError
from ..measure.memory import parse_bytes
from ..plan import Plan
from ..runtime.store import itemsize_of

CONTEXT = 1024
"""Tokens at which caches are compared where nobody says; the model's context where that is shorter."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the cache of one sequence may take."""

    bytes: int
    """Of all layers, once `context` tokens have come."""
    context: int

    @property
    def bytes_per_token(self) -> float:
        """Mean over the tokens of the context; what a cache keeps in full of few tokens is shared out over them."""
        return self.bytes / self.context

    def __str__(self) -> str:
        return f"{human_bytes(self.bytes_per_token)} per token at {self.context:,} tokens"


def budget_of(
    parent: Plan,
    *,
    per_token: str | float | None = None,
    ratio: float | None = None,
    memory: str | int | None = None,
    batch: int = 1,
    context: int | str | None = None,
) -> Budget:
    """The budget that a user has named in one of three ways.

    Args:
        parent: the plan that changes nothing.
        per_token: bytes per token, such as `4KiB/token`.
        ratio: how many times smaller than the parent's cache.
        memory: bytes for the weights and the caches of `batch` sequences, such as `80GiB`; activations are not counted.
        context: tokens per sequence, such as `128k`; by default the model's own, at most 1024.

    Raises:
        PlanError: none of the three is given, or several, or the weights alone do not fit.
        RecipeError: a size cannot be read.
    """
    given = [name for name, value in (("budget", per_token), ("ratio", ratio), ("memory", memory)) if value is not None]
    if len(given) != 1:
        raise PlanError(
            f"give one of a budget per token, a ratio and a memory; {' and '.join(given) or 'none'} came. For example "
            "4KiB/token, 6, or 80GiB."
        )
    if batch != 1 and memory is None:
        raise PlanError(
            f"batch: {batch} sequences are for a memory that is to hold them. Name a memory, or leave it out."
        )
    tokens = _context(context, parent.anatomy.max_positions)
    whole = parent.cache_bytes(tokens)
    if per_token is not None:
        found = parse_bytes(re.sub(r"\s*/\s*tok(en)?s?\s*$", "", str(per_token))) * tokens
    elif ratio is not None:
        if not ratio > 0:
            raise PlanError(f"ratio: {ratio:g} must be above 0: it is how many times smaller the cache is to be.")
        found = int(whole / ratio)
    else:
        assert memory is not None
        if batch < 1:
            raise PlanError(f"batch: {batch} must be at least 1.")
        total, weights = parse_bytes(memory), parent.parameters * itemsize_of(parent.anatomy.dtype)
        found = (total - weights) // batch
        if found <= 0:
            raise PlanError(
                f"memory: {human_bytes(total)} do not hold the weights of the model ({human_bytes(weights)}) and a "
                "cache. Give more."
            )
    if found >= whole:
        raise PlanError(
            f"the parent's own cache takes {human_bytes(whole)} at {tokens:,} tokens, and the budget is "
            f"{human_bytes(found)}: nothing is to be done. Name a smaller budget, or a longer context."
        )
    return Budget(bytes=found, context=tokens)


def _context(given: int | str | None, most: int | None) -> int:
    if given is None:
        return min(CONTEXT, most or CONTEXT)
    match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", str(given))
    if match is None:
        raise RecipeError(f"context: {given!r} is no number of tokens. Write it as 4096 or 128k.")
    tokens = int(match[1]) * (1024 if match[2] else 1)
    if tokens < 2:
        raise PlanError(f"context: {tokens} must be at least 2 tokens.")
    return tokens
