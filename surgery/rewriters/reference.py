"""One attention computed plainly from its per-head tensors: what refits and tests measure with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..anatomy.proof import attention_probs, normalise, rotate_pairs
from ..runtime.layout import HeadNorm
from .attention_weights import AttentionWeights


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


def attend(weights: AttentionWeights, x_BTD: Tensor) -> Attended:
    """The attention of `weights` over whole sequences.

    Keys to the left of a window and to the right of the query are masked; padding must stand on the right. A gate on
    the outputs and clamped projections are not applied.
    """

    def project(w: Tensor, b: Tensor | None) -> Tensor:
        y = torch.einsum("btd,nhd->bnth", x_BTD, w)
        return y if b is None else y + b[:, None]

    cos, sin = rotation(weights, x_BTD.shape[1], x_BTD)

    def place(y: Tensor, norm: HeadNorm | None, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        if norm is not None and not norm.after_rotary:
            y = apply_norm(y, norm, gain, shift)
        y = rotate_pairs(weights.rotary, y, cos, sin)
        return apply_norm(y, norm, gain, shift) if norm is not None and norm.after_rotary else y

    q = place(project(weights.q_NHD, weights.q_bias_NH), weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)
    k = place(project(weights.k_KHD, weights.k_bias_KH), weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)
    v = project(weights.v_KVD, weights.v_bias_KV)
    if weights.v_norm is not None:
        v = apply_norm(v, weights.v_norm, None, None)
    kv_of = weights.kv_of()
    scores, probs = attention_probs(
        q,
        k[:, kv_of],
        scale=weights.scale,
        softcap=weights.softcap,
        window=weights.window,
        alibi_slopes=weights.alibi_slopes,
        sinks_N=weights.sinks_N,
    )
    return Attended(q, k, scores, probs, (probs @ v[:, kv_of]).transpose(1, 2))


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
