"""KV heads repeated in the places of those that they replace: the same function in the parent's own attention."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..attention.weights import AttentionWeights
from ..errors import PlanError


def expand(weights: AttentionWeights, kv_heads: int, layer: int) -> AttentionWeights:
    """Repeat KV heads until `kv_heads` equal groups of consecutive queries read them: the same function.

    Raises:
        PlanError: a group of queries would have to be split between two slots.
    """
    size = weights.heads // kv_heads
    kv_of = weights.kv_of()
    sources = kv_of[::size]
    if any(kv_of[h] != sources[h // size] for h in range(weights.heads)):
        sizes = [len(group) for group in weights.groups]
        raise PlanError(
            f"layer {layer}: groups of {sizes} query heads do not fall on the parent's {kv_heads} groups of {size}. "
            "Use an init whose groups are made of whole KV heads."
        )
    groups = tuple(tuple(range(a * size, (a + 1) * size)) for a in range(kv_heads))
    return _select(weights, sources, groups)


def collapse(weights: AttentionWeights, groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """Undo `expand`: keep one copy of each KV head."""
    kv_of = weights.kv_of()
    return _select(weights, [kv_of[group[0]] for group in groups], groups)


def _select(weights: AttentionWeights, sources: list[int], groups: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """KV heads `sources`, in that order, read by `groups`."""

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[sources]

    return replace(
        weights,
        k_KHD=weights.k_KHD[sources],
        v_KVD=weights.v_KVD[sources],
        k_bias_KH=take(weights.k_bias_KH),
        v_bias_KV=take(weights.v_bias_KV),
        k_norm_KH=take(weights.k_norm_KH),
        k_norm_bias_KH=take(weights.k_norm_bias_KH),
        groups=groups,
    )
