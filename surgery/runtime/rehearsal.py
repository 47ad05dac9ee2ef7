"""Prompts are read a second time, behind themselves, for scores that ask which slots that would need (KVzip)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .calling import CACHE_NAMES, by_name, cache_argument, cache_of
from .ranked_cache import RankedLayer

_OF_THE_PASS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
    "labels",
    *CACHE_NAMES,
)
"""Arguments that are others when tokens come once more; tensors among the rest belong to the tokens: images."""


def rehearse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A forward hook: after several tokens, run `model` on them again where the layers of its cache wait for that.

    Slots leave in the second pass, which leaves no tokens of its own.

    Raises:
        ValueError: the cache has layers that would keep the tokens, or the attention mask is none of tokens.
    """
    cache = cache_of(output)
    layers = list(getattr(cache, "layers", ()))
    waiting = [layer for layer in layers if isinstance(layer, RankedLayer) and layer.ranker.rehearses]
    if not waiting or waiting[0].rehearsing:
        return
    came = by_name(model, args, kwargs)
    name = "inputs_embeds" if came.get("inputs_embeds") is not None else "input_ids"
    given = came[name]
    T = given.shape[1]
    if T == 1:
        return
    others = [place for place, layer in enumerate(layers) if layer not in waiting and layer.is_initialized]
    if others:
        raise ValueError(
            f"{waiting[0].retain.scorer} reads each prompt again, and layer {others[0]} of this cache would keep the "
            "tokens twice. Use another scorer."
        )
    beside = {key: value for key, value in came.items() if key not in _OF_THE_PASS and _holds_tensors(value)}
    mask, position_ids = _behind(came.get("attention_mask"), given, int(waiting[0].get_seq_length()))
    for layer in waiting:
        layer.rehearsing = True
    try:
        with torch.no_grad():
            again = {name: given, "attention_mask": mask, "position_ids": position_ids, "use_cache": True}
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                again["logits_to_keep"] = 1
            model(**beside, **again, **{cache_argument(model): cache})
    finally:
        for layer in waiting:
            layer.rehearsing = False


def _holds_tensors(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return bool(parts) and all(isinstance(part, Tensor) for part in parts)


def _behind(mask: Any, given: Tensor, seen: int) -> tuple[Tensor | None, Tensor]:
    """Attention mask and positions of the last tokens when they come once more.

    Args:
        mask: of all tokens so far; None without padding.
        seen: tokens so far, padding included.
    """
    B, T = given.shape[:2]
    if mask is None:
        return None, (seen + torch.arange(T, device=given.device)).expand(B, -1)
    if not isinstance(mask, Tensor) or mask.shape != (B, seen):
        raise ValueError(
            f"kvzip reads each prompt again, which asks for an attention mask of shape {[B, seen]}, 0 at padding."
        )
    both = torch.cat((mask, mask[:, -T:]), dim=1)
    return both, (both.long().cumsum(-1) - 1)[:, -T:].clamp_min(0)
