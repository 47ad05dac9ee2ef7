"""Attention functions in plain torch, the masks that they need, and rotation: pure functions, no parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calling import CallingConvention
from .layout import AttentionSite, Latent
from .ops import decodes, latent_attention_forward

LIKE_SDPA = ("sdpa", "surgery")
"""Attention functions that take sdpa's masks, and neither soft caps nor sinks."""
GATE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
"""What an output gate may make of its projection."""


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, softmax in float32: soft cap, sinks, additive or boolean (True is visible) mask.

    query [B, N, T, H], key and value [B, K, S, H]; returns [B, T, N, H] and the weights [B, N, T, S].
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sinks = None if s_aux is None else s_aux.reshape(1, -1, 1, 1)
    weights = _probabilities(query, key, attention_mask, scaling, softcap, sinks)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def grouped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One new token against few KV heads: query heads that share one stand in the place of tokens, nothing is repeated.

    query [B, N, 1, H], key [B, K, S, H], value [B, 1, S, R] shared by all heads; returns [B, 1, N, R] and, unless
    computed by sdpa or an operator, the weights [B, N, 1, S].
    """
    B, N, K, S = query.shape[0], query.shape[1], key.shape[1], key.shape[2]
    folded = query.reshape(B, K, N // K, -1)
    mask = attention_mask
    if mask is not None and mask.shape[1] > 1:  # of every query head: ALiBi
        mask = mask.reshape(-1, K, N // K, S)
    weights_asked = module.gives_weights(kwargs)  # type: ignore[operator]
    implementation = "eager" if weights_asked else module.config._attn_implementation  # type: ignore[union-attr]
    latent: Latent = module.latent  # type: ignore[assignment]
    plain = softcap is None and s_aux is None and not latent.rotate_on_read
    if implementation == "surgery" and plain and decodes(query, attention_mask, dropout):
        return latent_attention_forward(query, key, attention_mask, scaling, latent.rank), None
    sdpa = implementation in LIKE_SDPA
    if K == 1 and sdpa and softcap is None and s_aux is None:
        out = nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        return out.reshape(B, 1, N, -1), None
    sinks = None if s_aux is None else s_aux.reshape(1, K, N // K, 1)
    weights = _probabilities(folded, key, mask, scaling, softcap, sinks).reshape(B, 1, N, S)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).reshape(B, 1, N, -1), weights.transpose(1, 2)


def _probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """`weights_of` the scores of `query` and `key`, [B, N, T, S] in the dtype of `query`."""
    return weights_of(torch.matmul(query, key.transpose(2, 3)) * scaling, mask, softcap, sinks)


def weights_of(scores: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """[B, N, T, S] in the dtype of `scores`; what a sink [1, N, T or 1, 1] takes is missing from the sum."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
    return weights if sinks is None else weights[..., :-1]


def complete_mask(
    site: AttentionSite,
    call: CallingConvention,
    owner: int,
    slope_bits: Tensor | None,
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    cache: Any,
    skippable: bool,
    is_causal: bool = True,
) -> Tensor | None:
    """The mask that eager and sdpa need: the parent's, with causality, window and ALiBi added where it lacks them.

    Args:
        owner: layer whose cache is read.
        slope_bits: slopes of ALiBi as `as_bits` keeps them, where `site` has any.
        skippable: the attention function is causal of its own where there is no mask.
        is_causal: no mask means causality; False where all tokens then see each other.
    """
    tokens, length = query.shape[2], key.shape[2]
    if mask is not None:
        mask = mask[..., :length]
        if mask.dtype == torch.bool and call.mask_true_hides:
            mask = ~mask
    elif skippable and site.alibi_slopes is None:
        return None
    # Some parents keep the window inside their attention (GPT-Neo); the masks of others have it, unless they are a
    # user's own, which count as they are. A sliding cache layer drops old keys, and its mask knows which are left.
    sliding = cache is not None and getattr(cache.layers[owner], "is_sliding", False)
    window = None if sliding or length <= (site.window or length) else site.window
    if mask is not None and site.window_in_mask:
        window = None
    if site.alibi_slopes is None and window is None and (mask is not None or tokens == 1 or not is_causal):
        return mask
    past = 0 if cache is None else cache.get_seq_length(owner) - tokens
    positions = past + torch.arange(tokens, device=key.device)
    distance = positions[:, None] - torch.arange(length, device=key.device)
    visible = distance >= 0
    if site.sees_ahead and mask is not None:
        visible = torch.ones_like(visible)  # the parent's mask decides
    if window is not None:
        visible = visible & (distance < window)
    low = torch.finfo(query.dtype).min
    if mask is not None:
        # Half of the lowest number: parents that write ALiBi into the mask (Falcon) keep small numbers there.
        visible = visible & (mask if mask.dtype == torch.bool else mask > low / 2)
    else:
        visible = visible[None, None]
    if site.alibi_slopes is None:
        if mask is None or mask.dtype == torch.bool:
            return visible
        return torch.where(visible, mask, low)
    if mask is not None and call.alibi_skips_padding:
        # Every token sees itself: what no query sees is padding.
        order = visible.any(dim=-2).cumsum(-1)  # [B, 1, S]
        distance = order.index_select(-1, positions)[..., None] - order[..., None, :]
    assert slope_bits is not None
    bias = -slope_bits.view(torch.float32)[:, None, None] * distance
    return torch.where(visible, bias.to(query.dtype), low)


def as_bits(values: Sequence[float]) -> Tensor:
    """float32 numbers as int32, which no cast to another float type can round; `.view(torch.float32)` undoes it."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(torch.int32)


def angles_of(positions: Tensor, bits_F: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., F] of positions [...] times frequencies that are kept as bits."""
    angles = positions[..., None].float() * bits_F.view(torch.float32)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply pairs (j, j + F) of the last dimension, read as a + ib, by cos + i sin."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
