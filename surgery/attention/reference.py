"""Attention from its description alone: the reference that every description is proved against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModel
from ..runtime.layout import AttentionSite, HeadNorm, Projection, Rotary


def project_qkv(
    site: AttentionSite, params: Mapping[str, Tensor], x_BTD: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer, from its description and its weights.

    Factors that the model itself puts on queries or keys are left out: `site.scale` holds them.

    Args:
        site: the description.
        params: state dict of the model, or as much of it as the site names.
        x_BTD: what the projections read.
        positions: [T] or [B, T]; 0..T-1 where None.

    Returns:
        q_BNTH, k_BKTH, v_BKTH in the dtype of `x_BTD`.
    """
    if positions is None:
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    q = heads_of(site.q, params, x_BTD, site.head_dim, site.clip_qkv)
    k = heads_of(site.k, params, x_BTD, site.head_dim, site.clip_qkv)
    v = heads_of(site.v, params, x_BTD, site.value_dim, site.clip_qkv)
    q = finish_heads(q, params, site.q_norm, site.rotary, positions)
    k = finish_heads(k, params, site.k_norm, site.rotary, positions)
    return q, k, finish_heads(v, params, site.v_norm, None, positions)


def heads_of(
    projection: Projection, params: Mapping[str, Tensor], x_BTD: Tensor, dim: int, clip: float | None = None
) -> Tensor:
    """The projection's heads, clamped where `clip` is given: [B, heads, T, dim]."""
    rows = torch.tensor(projection.head_rows)[:, None] + torch.arange(dim)
    weight = params[projection.weight]
    rows = rows.flatten().to(weight.device)
    weight = weight[:, rows].T if projection.transposed else weight[rows]
    bias = params[projection.bias][rows].to(x_BTD) if projection.bias is not None else None
    y = F.linear(x_BTD, weight.to(x_BTD), bias).unflatten(-1, (-1, dim)).transpose(1, 2)
    return y if clip is None else y.clamp(-clip, clip)


def finish_heads(
    y_BNTH: Tensor, params: Mapping[str, Tensor], norm: HeadNorm | None, rotary: Rotary | None, positions: Tensor
) -> Tensor:
    """Norm and rotation of projected heads, in the order that the norm says."""
    if norm is not None and not norm.after_rotary:
        y_BNTH = apply_norm(norm, params, y_BNTH)
    if rotary is not None:
        y_BNTH = apply_rotary(rotary, y_BNTH, positions)
    if norm is not None and norm.after_rotary:
        y_BNTH = apply_norm(norm, params, y_BNTH)
    return y_BNTH


def apply_norm(norm: HeadNorm, params: Mapping[str, Tensor], y_BNTH: Tensor) -> Tensor:
    """q or k norm over each head or over all heads together, statistics in float32 at least."""
    heads, dim = y_BNTH.shape[1], y_BNTH.shape[3]
    y = normalise(norm, y_BNTH.to(torch.promote_types(y_BNTH.dtype, torch.float32)))
    if norm.weight is not None:
        y = y * (norm.weight_offset + per_head(norm.weight, params, heads, dim).to(y))[:, None]
    if norm.bias is not None:
        y = y + per_head(norm.bias, params, heads, dim).to(y)[:, None]
    return y.to(y_BNTH.dtype)


def normalise(norm: HeadNorm, y_BNTH: Tensor) -> Tensor:
    """What a norm does before its gain: over each head's dims, or over all heads' together."""
    dims = (-1,) if norm.span == "head" else (1, 3)
    if norm.kind == "layer":
        y_BNTH = y_BNTH - y_BNTH.mean(dims, keepdim=True)
    return y_BNTH * (y_BNTH.square().mean(dims, keepdim=True) + norm.eps).rsqrt()


def per_head(names: str | tuple[str, ...], params: Mapping[str, Tensor], heads: int, dim: int) -> Tensor:
    """A norm's gain or bias as [heads, dim], or [1, dim] where the heads share it."""
    if not isinstance(names, str):
        return torch.stack([params[n].reshape(dim) for n in names])
    return params[names].reshape(-1, dim)


def apply_rotary(rotary: Rotary, y_BNTH: Tensor, positions: Tensor) -> Tensor:
    """Turn the rotary channels by their angle at each position; angles in float32 as transformers has them."""
    wide = torch.promote_types(y_BNTH.dtype, torch.float32)
    inv_freq = torch.tensor(rotary.inv_freq, dtype=wide, device=y_BNTH.device)
    angle = positions.to(wide)[..., None] * inv_freq
    angle = angle[:, None] if positions.ndim == 2 else angle
    cos, sin = angle.cos() * rotary.scaling, angle.sin() * rotary.scaling
    return rotate_pairs(rotary, y_BNTH.to(wide), cos, sin).to(y_BNTH.dtype)


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


def turn(rotary: Rotary | None, y_BNTH: Tensor, positions: Tensor) -> Tensor:
    """What heads at position 0 become elsewhere: rotated, and not scaled once more."""
    if rotary is None:
        return y_BNTH
    return apply_rotary(dataclasses.replace(rotary, scaling=1.0), y_BNTH, positions)


def attend_heads(
    site: AttentionSite, params: Mapping[str, Tensor], q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor
) -> Tensor:
    """Causal softmax attention of whole sequences (positions 0..T-1), as the description has it: [B, N, T, H]."""
    k = k_BKSH.repeat_interleave(q_BNTH.shape[1] // k_BKSH.shape[1], 1)
    v = v_BKSH.repeat_interleave(q_BNTH.shape[1] // v_BKSH.shape[1], 1)
    _, probs = attention_probs(
        q_BNTH,
        k,
        scale=site.scale,
        softcap=site.softcap,
        window=site.window,
        alibi_slopes=site.alibi_slopes,
        sinks_N=None if site.sinks is None else params[site.sinks],
    )
    return probs @ v


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


def attend(site: AttentionSite, params: Mapping[str, Tensor], x_BTD: Tensor, positions: Tensor | None = None) -> Tensor:
    """Output of one attention layer, output projection included, from its description and its weights.

    Args:
        site: the description.
        params: state dict of the model, or as much of it as the site names.
        x_BTD: what the projections read.
        positions: rotary positions, [T] or [B, T]; 0..T-1 where None.

    Returns:
        [B, T, D].

    Raises:
        UnsupportedModel: the output is gated; the description does not hold the gate.
    """
    if site.gated_output:
        raise UnsupportedModel(f"module {site.module}: its output is gated; the gate is not part of the description.")
    q, k, v = project_qkv(site, params, x_BTD, positions)
    return project_out(site, params, attend_heads(site, params, q, k, v))


def project_out(site: AttentionSite, params: Mapping[str, Tensor], heads_BNTH: Tensor) -> Tensor:
    """The output projection of head outputs: [B, T, D]."""
    weight = params[site.o.weight]
    weight = weight.T if site.o.transposed else weight
    columns = (torch.tensor(site.o.head_rows)[:, None] + torch.arange(site.value_dim)).flatten().to(weight.device)
    bias = params[site.o.bias].to(heads_BNTH) if site.o.bias is not None else None
    return F.linear(heads_BNTH.transpose(1, 2).flatten(2), weight[:, columns].to(heads_BNTH), bias)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where anything is not finite."""
    if got.shape != wanted.shape or not (got.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
