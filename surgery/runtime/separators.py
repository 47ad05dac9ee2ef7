"""Which tokens separate parts of the text, told to the attentions whose caches keep those (SepLLM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def mark_separators(base_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the model around the attentions."""
    found: dict[tuple[int, ...], Tensor | None] = {}
    for attention in base_model.surgery_attentions:  # type: ignore[union-attr]
        if attention.plan.asks_separators:
            ids = attention.retain.separators
            if ids not in found:
                found[ids] = separators_among(ids, args, kwargs)
            attention.separators_BT = found[ids]


def separators_among(separators: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """[B, T] which tokens of a forward pass are separators; None where it was given embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        return None
    return torch.isin(ids, torch.tensor(separators, dtype=ids.dtype, device=ids.device))
