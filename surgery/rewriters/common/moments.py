"""Second moments of the queries, keys and values of one layer: what a rewriter needs to know of the text.

Moments stand where the score reads: after q/k norms, before rotation, biases included, uncentred, float64. `Block`s are
their cuts by kind of channel (rotated pairs, keys without position, values), each with the metric of what reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.linalg import hermitian, to_double
from ...attention.maths import apply_norm
from ...attention.weights import AttentionWeights
from ...calibration.processes import total
from ...calibration.visit import Visit


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments where the score reads them: after q/k norms, before rotation, biases included, uncentred."""

    k_KHKH: Tensor
    """E[k_a k_bᵀ], [K, H, K, H]."""
    q_NHH: Tensor
    """E[q_h q_hᵀ]"""
    v_KVKV: Tensor
    """E[v_a v_bᵀ], before a v norm."""
    k_rms_K: Tensor | None = None
    """Root mean square of each head's keys *before* its k norm; needed only there."""

    @classmethod
    def of_weights(cls, weights: AttentionWeights, cov_DD: Tensor | None = None) -> Moments:
        """Moments from those of the projections' input, exact where there is no q/k norm.

        Args:
            cov_DD: E[x xᵀ], or E[x~ x~ᵀ] with x~ = [x; 1] where q, k or v has a bias. None: the identity.

        With a q/k norm this is what the norm would give if every head's rms were its mean over tokens; where there is
        text, `visit_moments` has the normed moments themselves.
        """
        q, k, v = (weights.with_bias(name) for name in "qkv")
        if cov_DD is not None and cov_DD.shape[0] != q.shape[-1]:
            bias = " plus one for the bias coordinate" if weights.has_bias else ""
            raise ValueError(f"moments of the input are {tuple(cov_DD.shape)}, need {q.shape[-1]} (model dim{bias})")
        if cov_DD is None:  # no text to be exact about: in float32, which halves what takes most of a data-free run
            k_PP, v_PP, q_NHH = (w @ w.mT for w in (k.flatten(0, 1).float(), v.flatten(0, 1).float(), q.float()))
            k_PP, v_PP, q_NHH = k_PP.double(), v_PP.double(), q_NHH.double()
        else:
            cov = hermitian(to_double(cov_DD))
            k_PP, v_PP, q_NHH = (w @ cov @ w.mT for w in (k.flatten(0, 1), v.flatten(0, 1), q))
        (K, H, _), V = k.shape, v.shape[1]
        k_KHKH = k_PP.reshape(K, H, K, H)
        k_rms = k_PP.diagonal().reshape(K, H).mean(-1).sqrt()
        if weights.k_norm is not None:
            gain = _mean_norm(k_KHKH.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1), weights.k_norm.span)
            gain = gain * (1 if weights.k_norm_KH is None else weights.k_norm_KH.double())
            k_KHKH = k_KHKH * gain[:, :, None, None] * gain
        if weights.q_norm is not None:
            gain = _mean_norm(q_NHH.diagonal(dim1=1, dim2=2), weights.q_norm.span)
            gain = gain * (1 if weights.q_norm_NH is None else weights.q_norm_NH.double())
            q_NHH = q_NHH * gain[:, :, None] * gain[:, None, :]
        return cls(k_KHKH=k_KHKH, q_NHH=q_NHH, v_KVKV=v_PP.reshape(K, V, K, V), k_rms_K=k_rms)


def visit_moments(visit: Visit, weights: AttentionWeights) -> Moments:
    """Moments of q, k, v over the calibration text as the score reads them: after q/k norms, before rotation.

    Where the layer reads nothing but zeros, those of a layer without text.
    """
    if weights.q_norm is None and weights.k_norm is None:
        cov = input_moments(visit, weights.has_bias)
        return Moments.of_weights(weights, cov if cov.any() else None)
    sums: list[Tensor] = []
    for x_PD in visit.inputs():
        q, k, v = normed_heads(weights, x_PD)
        parts = [
            torch.einsum("pah,pbj->ahbj", k, k),
            torch.einsum("pnh,pnj->nhj", q, q),
            torch.einsum("pah,pbj->ahbj", v, v),
        ]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    sums = [total(s) for s in sums]
    if not any(s.any() for s in sums):
        return Moments.of_weights(weights)
    k_KHKH, q_NHH, v_KVKV = (s / visit.tokens for s in sums)
    return Moments(k_KHKH=k_KHKH, q_NHH=q_NHH, v_KVKV=v_KVKV)


def input_moments(visit: Visit, with_bias: bool = False) -> Tensor:
    """E[x xᵀ] of what the projections read; E[x~ x~ᵀ] with x~ = [x; 1] where `with_bias`. float64."""
    seen: Tensor | None = None
    for x_PD in visit.inputs():
        x = torch.cat([x_PD, torch.ones_like(x_PD[:, :1])], -1) if with_bias else x_PD
        part = to_double(x.T @ x)
        seen = part if seen is None else seen + part
    assert seen is not None
    return total(seen) / visit.tokens


def normed_heads(weights: AttentionWeights, x_PD: Tensor) -> list[Tensor]:
    """q [P, N, H], k [P, K, H], v [P, K, Hv] of inputs [P, D]: behind q/k norms, before rotation. float64."""
    x = x_PD.double()
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    found = []
    for name, norm, gain, shift in (
        ("q", weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH),
        ("k", weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH),
        ("v", None, None, None),
    ):
        y_BNTH = torch.einsum("pd,nhd->nph", x, weights.with_bias(name))[None]
        if norm is not None:
            y_BNTH = apply_norm(y_BNTH, norm, gain, shift)
        found.append(y_BNTH[0].transpose(0, 1))
    return found


def _mean_norm(energy_KH: Tensor, span: str) -> Tensor:
    """[K, 1] (or [1, 1]) factor 1/rms that a norm applies on average."""
    mean = energy_KH.mean(-1, keepdim=True) if span == "head" else energy_KH.mean().reshape(1, 1)
    return mean.clamp_min(1e-30).rsqrt()


class Block(NamedTuple):
    """Moments and output metrics of one kind of channels of all heads, before heads are chosen."""

    gram: Tensor
    """Rotated pairs: complex [F, K, K]. Others: [K, H', K, H']."""
    metric: Tensor
    """Rotated pairs: [K, F] energies of the reading queries. Others: [K, H', H']."""


def rotated_block(weights: AttentionWeights, moments: Moments) -> Block:
    """Gram_j[a, b] = E[k_a,j conj(k_b,j)] of the complex pairs, and λ_a,j = Σ_h E|q_h,j|² of the queries of a."""
    first, second = weights.rotated()
    k = to_double(moments.k_KHKH).permute(1, 3, 0, 2)  # [H, H, K, K]
    gram = torch.complex(
        k[first, first] + k[second, second],
        k[second, first] - k[first, second],
    )
    energy_NH = to_double(moments.q_NHH).diagonal(dim1=1, dim2=2)
    energy_NF = energy_NH[:, first] + energy_NH[:, second]
    return Block(gram, torch.stack([energy_NF[list(g)].sum(0) for g in weights.groups]))


def unrotated_block(weights: AttentionWeights, moments: Moments) -> Block:
    """The channels of keys without position: moments, and Σ_h E[q_h q_hᵀ] as the metric."""
    channels = weights.unrotated()
    k = to_double(moments.k_KHKH)[:, channels][:, :, :, channels]
    q = to_double(moments.q_NHH)[:, channels][:, :, channels]
    return Block(k, torch.stack([q[list(g)].sum(0) for g in weights.groups]))


def value_block(weights: AttentionWeights, moments: Moments) -> Block:
    """Values: moments, and Σ_h W_o,hᵀ W_o,h as the metric."""
    o = weights.o_DNV.double().transpose(0, 1)  # [N, D, V]
    metric = o.mT @ o
    return Block(to_double(moments.v_KVKV), torch.stack([metric[list(g)].sum(0) for g in weights.groups]))


def scalar_gram(block: Block, g: list[int]) -> tuple[Tensor, Tensor]:
    """([m, m], [m, m, m]): E<k_a, k_b> unweighted, and for each head c under the metric of c's queries."""
    if block.gram.is_complex():
        gram = block.gram[:, g][:, :, g].real
        return gram.sum(0), torch.einsum("fab,cf->cab", gram, block.metric[g])
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    return torch.einsum("aibi->ab", gram), torch.einsum("aibj,cij->cab", gram, metric)
