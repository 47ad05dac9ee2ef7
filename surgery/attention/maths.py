"""The operations that attention is made of, each once: projection, norms, rotation, probabilities.

Functions of tensors and of the small descriptions in `runtime.layout`; they know no model and no parameter names. The
runtime, which is copied into exports and imports nothing from here, has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.layout import HeadNorm, Rotary


def project_heads(x_BTD: Tensor, w_NHD: Tensor, bias_NH: Tensor | None, clip: float | None = None) -> Tensor:
    """Heads [B, N, T, H] of an input, clamped to [-clip, clip] where `clip` is given."""
    y = torch.einsum("btd,nhd->bnth", x_BTD, w_NHD)
    y = y if bias_NH is None else y + bias_NH[:, None]
    return y if clip is None else y.clamp(-clip, clip)


def finish_heads(
    y_BNTH: Tensor,
    norm: HeadNorm | None,
    gain_NH: Tensor | None,
    shift_NH: Tensor | None,
    rotary: Rotary | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Norm and rotation of projected heads, in the order that the norm says."""
    if norm is not None and not norm.after_rotary:
        y_BNTH = apply_norm(y_BNTH, norm, gain_NH, shift_NH)
    y_BNTH = rotate_pairs(rotary, y_BNTH, cos, sin)
    return apply_norm(y_BNTH, norm, gain_NH, shift_NH) if norm is not None and norm.after_rotary else y_BNTH


def apply_norm(y_BNTH: Tensor, norm: HeadNorm, gain_NH: Tensor | None, shift_NH: Tensor | None) -> Tensor:
    """A q, k or v norm with its effective gain and bias per head, computed in float32 at least."""
    y = normalise(norm, y_BNTH.to(torch.promote_types(y_BNTH.dtype, torch.float32)))
    y = y if gain_NH is None else y * gain_NH[:, None]
    y = y if shift_NH is None else y + shift_NH[:, None]
    return y.to(y_BNTH.dtype)


def normalise(norm: HeadNorm, y_BNTH: Tensor) -> Tensor:
    """What a norm does before its gain: over each head's dims, or over all heads' together."""
    dims = (-1,) if norm.span == "head" else (1, 3)
    if norm.kind == "layer":
        y_BNTH = y_BNTH - y_BNTH.mean(dims, keepdim=True)
    return y_BNTH * (y_BNTH.square().mean(dims, keepdim=True) + norm.eps).rsqrt()


def angles(rotary: Rotary | None, positions: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin [..., F] of positions, computed in `dtype`, the attention factor included; F is 0 without rotation.

    Positions [B, T] give [B, 1, T, F], which goes with heads.
    """
    inv_freq, scaling = ((), 1.0) if rotary is None else (rotary.inv_freq, rotary.scaling)
    angle = positions.to(dtype)[..., None] * torch.tensor(inv_freq, dtype=dtype, device=positions.device)
    angle = angle[:, None] if positions.ndim == 2 else angle
    return angle.cos() * scaling, angle.sin() * scaling


def rotate_pairs(rotary: Rotary | None, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the rotary channels of y [..., H], as complex pairs, by cos + i sin [..., F]."""
    if rotary is None:
        return y
    before, pairs, after = y.split([rotary.start, rotary.dims, y.shape[-1] - rotary.start - rotary.dims], -1)
    if rotary.interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = pairs.chunk(2, -1)
        pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([before, pairs, after], -1)


def attention_probs(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    alibi_slopes: tuple[float, ...] | None,
    sinks_N: Tensor | None,
    time: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores before the mask, and causal attention weights, of whole sequences (positions 0..T-1): [B, N, T, T] each.

    A sink takes its share of the weights and is not among them. `time` [m]: the positions of the queries, if not all.
    """
    scores = q_BNTH @ k_BNTH.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    token = torch.arange(k_BNTH.shape[2], device=q_BNTH.device)
    behind = (token if time is None else time.to(token.device))[:, None] - token
    if alibi_slopes is not None:
        slopes = torch.tensor(alibi_slopes, dtype=scores.dtype, device=scores.device)
        scores = scores - slopes[:, None, None] * behind
    hidden = behind < 0
    if window is not None:
        hidden = hidden | (behind >= window)
    masked = scores.masked_fill(hidden, -torch.inf)
    if sinks_N is None:
        return scores, masked.softmax(-1)
    sinks = sinks_N.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return scores, torch.cat([masked, sinks], -1).softmax(-1)[..., :-1]
