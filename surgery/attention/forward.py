"""One attention computed plainly from its per-head tensors: what refits and tests measure with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.layout import HeadNorm
from .reference import attention_probs, normalise, rotate_pairs
from .weights import AttentionWeights


class Attended(NamedTuple):
    """What one attention does with an input; B sequences of T tokens that start at position 0."""

    q_BNTH: Tensor
    """Queries as the score reads them: normed and rotated."""
    k_BKTH: Tensor
    scores_BNTT: Tensor
    """Logits before the mask; sinks not among them."""
    probs_BNTT: Tensor
    out_BTNV: Tensor
    """Head outputs, the input of `o`."""


def attend(weights: AttentionWeights, x_BTD: Tensor, time: Tensor | None = None) -> Attended:
    """The attention of `weights` over whole sequences.

    Keys to the left of a window and to the right of the query are masked; padding must stand on the right. A gate on
    the outputs and clamped projections are not applied.

    Args:
        time: positions whose queries are wanted, [m]; all where None. Scores and outputs then have m rows.
    """
    q, k, v = project(weights, x_BTD, time)
    kv_of = weights.kv_of()
    scores, probs = attention_probs(
        q,
        k[:, kv_of],
        scale=weights.scale,
        softcap=weights.softcap,
        window=weights.window,
        alibi_slopes=weights.alibi_slopes,
        sinks_N=weights.sinks_N,
        time=time,
    )
    return Attended(q, k, scores, probs, (probs @ v[:, kv_of]).transpose(1, 2))


def head_outputs(weights: AttentionWeights, x_BTD: Tensor) -> Tensor:
    """`attend(...).out_BTNV` without its scores: several times faster."""
    q, k, v = project(weights, x_BTD)
    kv_of = weights.kv_of()
    return causal_heads(weights, q, k[:, kv_of], v[:, kv_of]).transpose(1, 2)


def project(weights: AttentionWeights, x_BTD: Tensor, time: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q_BNTH (at positions `time`, all where None), k_BKTH and v_BKTV as scores and means read them."""
    cos, sin = rotation(weights, x_BTD.shape[1], x_BTD)

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = torch.einsum("btd,nhd->bnth", x, w)
        return y if b is None else y + b[:, None]

    def place(
        y: Tensor, norm: HeadNorm | None, gain: Tensor | None, shift: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        if norm is not None and not norm.after_rotary:
            y = apply_norm(y, norm, gain, shift)
        y = rotate_pairs(weights.rotary, y, cos, sin)
        return apply_norm(y, norm, gain, shift) if norm is not None and norm.after_rotary else y

    at = slice(None) if time is None else time
    q = linear(x_BTD[:, at], weights.q_NHD, weights.q_bias_NH)
    q = place(q, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH, cos[at], sin[at])
    k = linear(x_BTD, weights.k_KHD, weights.k_bias_KH)
    k = place(k, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH, cos, sin)
    v = linear(x_BTD, weights.v_KVD, weights.v_bias_KV)
    if weights.v_norm is not None:
        v = apply_norm(v, weights.v_norm, None, None)
    return q, k, v


def causal_heads(weights: AttentionWeights, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTV: Tensor) -> Tensor:
    """Head outputs [B, N, T, V] under the scale, window, cap, sinks and slopes of `weights`; K may be wider than V."""
    if weights.softcap is not None or weights.alibi_slopes is not None or weights.sinks_N is not None:
        _, probs = attention_probs(
            q_BNTH,
            k_BNTH,
            scale=weights.scale,
            softcap=weights.softcap,
            window=weights.window,
            alibi_slopes=weights.alibi_slopes,
            sinks_N=weights.sinks_N,
        )
        return probs @ v_BNTV
    T, width, V = q_BNTH.shape[2], q_BNTH.shape[3], v_BNTV.shape[3]
    # The fused kernel of the CPU wants K and V equally wide, and is worth their padding.
    q, k = (F.pad(x, (0, max(0, V - width))) for x in (q_BNTH, k_BNTH))
    v = F.pad(v_BNTV, (0, max(0, width - V)))
    mask = None
    if weights.window is not None and weights.window < T:
        token = torch.arange(T, device=q.device)
        behind = token[:, None] - token
        mask = (behind >= 0) & (behind < weights.window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=weights.scale)
    return out[..., :V]


def rotation(weights: AttentionWeights, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] of the first positions, the attention factor included."""
    if weights.rotary is None:
        return like.new_ones(tokens, 0), like.new_ones(tokens, 0)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.tensor(
        weights.rotary.inv_freq, dtype=torch.float64
    )
    return (angle.cos() * weights.rotary.scaling).to(like), (angle.sin() * weights.rotary.scaling).to(like)


def apply_norm(y_BNTH: Tensor, norm: HeadNorm, gain_NH: Tensor | None, shift_NH: Tensor | None) -> Tensor:
    """A q, k or v norm with its effective gain and bias per head."""
    y_BNTH = normalise(norm, y_BNTH)
    y_BNTH = y_BNTH if gain_NH is None else y_BNTH * gain_NH[:, None]
    return y_BNTH if shift_NH is None else y_BNTH + shift_NH[:, None]
