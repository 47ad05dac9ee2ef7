"""Attention from its description and a model's parameters: what every description is proved by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModel
from ..runtime.layout import AttentionSite, HeadNorm, Projection, Rotary
from . import forward
from .maths import angles, attention_probs, finish_heads, project_heads, rotate_pairs
from .weights import AttentionWeights, halves, read_attention, read_norm, read_rows


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
        q_BNTH, k_BKTH, v_BKTH in the dtype of `x_BTD`, channels as the model has them.
    """
    q, k, v = forward.project(_weights(site, params, x_BTD), x_BTD, positions=positions)
    order = halves(site.rotary, site.head_dim)
    back = [order.index(j) for j in range(site.head_dim)]
    return q[..., back], k[..., back], v


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
    heads = forward.attend(_weights(site, params, x_BTD), x_BTD, positions=positions).out_BTNV
    return project_out(site, params, heads.transpose(1, 2))


def _weights(site: AttentionSite, params: Mapping[str, Tensor], like: Tensor) -> AttentionWeights:
    return read_attention(site, lambda name: params[name].to(like))


def role_heads(
    projection: Projection, params: Mapping[str, Tensor], x_BTD: Tensor, dim: int, clip: float | None = None
) -> Tensor:
    """The heads of one projection alone, clamped where `clip` is given: [B, heads, T, dim]."""
    w, b = read_rows(projection, dim, lambda name: params[name].to(x_BTD))
    return project_heads(x_BTD, w, b, clip)


def finished_role(
    y_BNTH: Tensor, params: Mapping[str, Tensor], norm: HeadNorm | None, rotary: Rotary | None, positions: Tensor
) -> Tensor:
    """`role_heads` behind their norm and rotation, channels as the model has them."""
    gain = shift = None
    if norm is not None:
        gain, shift = read_norm(norm, y_BNTH.shape[1], y_BNTH.shape[3], lambda name: params[name].to(y_BNTH))
    return finish_heads(y_BNTH, norm, gain, shift, rotary, *_model_angles(rotary, y_BNTH, positions))


def turn(rotary: Rotary | None, y_BNTH: Tensor, positions: Tensor) -> Tensor:
    """What heads at position 0 become elsewhere: rotated, and not scaled once more."""
    if rotary is None:
        return y_BNTH
    return rotate_pairs(rotary, y_BNTH, *_model_angles(dataclasses.replace(rotary, scaling=1.0), y_BNTH, positions))


def _model_angles(rotary: Rotary | None, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Angles in float32 as transformers has them: far from the start they differ from exact ones."""
    return angles(rotary, positions.to(like.device), torch.promote_types(like.dtype, torch.float32))


def attend_heads(site: AttentionSite, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    """Causal softmax attention of whole sequences (positions 0..T-1), as the description has it: [B, N, T, H]."""
    k, v = (x.repeat_interleave(q_BNTH.shape[1] // x.shape[1], 1) for x in (k_BKSH, v_BKSH))
    _, probs = attention_probs(
        q_BNTH,
        k,
        scale=site.scale,
        softcap=site.softcap,
        window=site.window,
        alibi_slopes=site.alibi_slopes,
        sinks_N=None,  # a parameter, which a graph that computes its scores itself has not
    )
    return probs @ v


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
