"""One attention computed plainly from its per-head tensors: what refits and tests measure with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .maths import angles, apply_norm, attention_probs, finish_heads, project_heads
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


def attend(
    weights: AttentionWeights, x_BTD: Tensor, time: Tensor | None = None, positions: Tensor | None = None
) -> Attended:
    """The attention of `weights` over whole sequences.

    Keys to the left of a window and to the right of the query are masked; padding must stand on the right. A gate on
    the outputs is not applied.

    Args:
        time: places whose queries are wanted, [m]; all where None. Scores and outputs then have m rows.
        positions: rotary positions, [T] or [B, T]; 0..T-1 where None. Masks count places.
    """
    q, k, v = project(weights, x_BTD, time, positions)
    kv_of = weights.kv_of()
    scores, probs = probabilities(weights, q, k[:, kv_of], time)
    return Attended(q, k, scores, probs, (probs @ v[:, kv_of]).transpose(1, 2))


def head_outputs(weights: AttentionWeights, x_BTD: Tensor) -> Tensor:
    """`attend(...).out_BTNV` without its scores: several times faster."""
    q, k, v = project(weights, x_BTD)
    kv_of = weights.kv_of()
    return causal_heads(weights, q, k[:, kv_of], v[:, kv_of]).transpose(1, 2)


def project(
    weights: AttentionWeights, x_BTD: Tensor, time: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q_BNTH (of tokens `time`, all where None), k_BKTH and v_BKTV as scores and means read them.

    Args:
        positions: rotary positions of the tokens, [T] or [B, T]; 0..T-1 where None.
    """
    cos, sin = rotation(weights, x_BTD.shape[1], x_BTD, positions)
    at = slice(None) if time is None else time
    clip, turning = weights.clip_qkv, weights.rotary
    q = project_heads(x_BTD[:, at], weights.q_NHD, weights.q_bias_NH, clip)
    q = finish_heads(
        q, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH, turning, cos[..., at, :], sin[..., at, :]
    )
    k = project_heads(x_BTD, weights.k_KHD, weights.k_bias_KH, clip)
    k = finish_heads(k, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH, turning, cos, sin)
    v = project_heads(x_BTD, weights.v_KVD, weights.v_bias_KV, clip)
    if weights.v_norm is not None:
        v = apply_norm(v, weights.v_norm, None, None)
    return q, k, v


def probabilities(
    weights: AttentionWeights, q_BNTH: Tensor, k_BNTH: Tensor, time: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_probs` under the scale, window, cap, sinks and slopes of `weights`."""
    return attention_probs(
        q_BNTH,
        k_BNTH,
        scale=weights.scale,
        softcap=weights.softcap,
        window=weights.window,
        alibi_slopes=weights.alibi_slopes,
        sinks_N=weights.sinks_N,
        time=time,
    )


def causal_heads(weights: AttentionWeights, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTV: Tensor) -> Tensor:
    """Head outputs [B, N, T, V] under the scale, window, cap, sinks and slopes of `weights`; K may be wider than V."""
    if weights.softcap is not None or weights.alibi_slopes is not None or weights.sinks_N is not None:
        return probabilities(weights, q_BNTH, k_BNTH)[1] @ v_BNTV
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


def rotation(
    weights: AttentionWeights, tokens: int, like: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] of the first positions, or of `positions`; in float64, then in the dtype of `like`."""
    cos, sin = angles(weights.rotary, torch.arange(tokens) if positions is None else positions)
    return cos.to(like), sin.to(like)
