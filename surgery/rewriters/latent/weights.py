"""Latent KV: the weights of one attention that caches a latent instead of K and V, and its reference forward.

Two meanings share one form. Where `rotate_on_read` is False (MLA, arXiv:2405.04434, and the `freq` layout) the cache
holds c and the rotated k_r, and queries are mapped into the latent space: nothing is expanded. Where it is True
(Palu, EigenAttention and their kin) the cache holds c alone; k = k_up c is made at read and then rotated as the parent
rotates it, so the rotary embedding is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...attention.forward import apply_norm, causal_heads, rotation
from ...attention.reference import attention_probs, rotate_pairs
from ...attention.weights import AttentionWeights
from ...errors import UnsupportedModel
from ...runtime.layout import AttentionSite, Rotary
from ...runtime.project import latent_refusal


@dataclass(frozen=True, kw_only=True)
class LatentWeights:
    """One attention layer in latent form; q (with its bias and norm) and o stay beside it, in `AttentionWeights`.

    Score of query head h with KV head a = a(h), before the parent's soft cap and ALiBi:
    (q_hᵀ k_up[a] c + rot(q_rope[a] q_h)ᵀ rot(k_r)) · scale; output v_up[a] Σ_n p_n c_n. `R` is the latent rank, `F'`
    the number of rotated components. Channels of H are in halves (see `AttentionWeights`); `in_site_order` brings
    them to where an interleaved parent has them. A factor on the parent's cos and sin is folded into q_rope and k_up;
    with `rotate_on_read` it stays with the rotation.
    """

    down_RD: Tensor
    """[R, D], or [R, D+1] with the bias as last column: c = down x, cached, never rotated."""
    rope_FD: Tensor
    """[2F', D(+1)]: shared rotated key part k_r in rotate-half order (j, j+F'); cached after rotation."""
    inv_freq_F: Tensor
    """[F'] angle per position of each rotated component, float64."""
    k_up_KHR: Tensor
    """[K, H, R]; mean phases of the components that lost their rotation are folded in."""
    q_rope_KFH: Tensor
    """[K, 2F', H]"""
    v_up_KVR: Tensor
    """[K, Hv, R]"""
    rotate_on_read: bool = False
    k_rank: int | None = None
    """Set where K and V have latents of their own: k_up reads the first `k_rank` entries of c, v_up the others."""
    k_mean_KH: Tensor | None = None
    """Added to k_up c before the rotation, with `rotate_on_read`; elsewhere softmax would not see it."""
    v_mean_KV: Tensor | None = None
    """Added to the head outputs: softmax weighs it with 1 in all, so it costs the cache nothing."""

    @property
    def rank(self) -> int:
        """R: cached numbers that never turn."""
        return self.down_RD.shape[0]

    @property
    def rope_dims(self) -> int:
        """2F': cached numbers that are rotated."""
        return self.rope_FD.shape[0]

    @property
    def numbers(self) -> int:
        """Numbers per cached token."""
        return self.rank + self.rope_dims

    def to(self, dtype: torch.dtype) -> LatentWeights:
        """All tensors but the frequencies in `dtype`."""
        names = ("down_RD", "rope_FD", "k_up_KHR", "q_rope_KFH", "v_up_KVR", "k_mean_KH", "v_mean_KV")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(dtype) for name, t in tensors.items() if t is not None})


class LatentAttended(NamedTuple):
    """What `attend_latent` computes on B sequences of T tokens that start at position 0."""

    c_BTR: Tensor
    """Latents, as cached."""
    k_rope_BTF: Tensor
    """The rotated part, as cached."""
    q_BNTH: Tensor
    """Queries after their norm, before any rotation."""
    scores_BNTT: Tensor
    probs_BNTT: Tensor
    out_BTNV: Tensor
    """Head outputs, the input of `o`."""


def attend_latent(
    weights: AttentionWeights,
    latent: LatentWeights,
    x_BTD: Tensor,
    form: Literal["absorbed", "expanded"] = "absorbed",
    time: Tensor | None = None,
) -> LatentAttended:
    """The attention of `latent` over whole sequences, with q, scale, window, cap, sinks and slopes of `weights`.

    `absorbed` maps queries into the latent space and averages latents (what decoding does); `expanded` makes K and V
    per head first (what a long prefill does). Same numbers. With `rotate_on_read` only the values can be absorbed.
    Padding must stand on the right; a gate on the outputs is not applied.

    Args:
        time: positions whose queries are wanted, [m]; all where None. Queries, scores and outputs then have m rows.
    """
    c, k_r, q, left, right = _sides(weights, latent, x_BTD, form, time)
    scores, probs = attention_probs(
        left,
        right,
        scale=weights.scale,
        softcap=weights.softcap,
        window=weights.window,
        alibi_slopes=weights.alibi_slopes,
        sinks_N=weights.sinks_N,
        time=time,
    )
    v_up = latent.v_up_KVR.to(c)
    if form == "absorbed":
        out = torch.einsum("bntr,nvr->btnv", probs @ c[:, None], v_up[weights.kv_of()])
    else:
        out = (probs @ torch.einsum("btr,kvr->bktv", c, v_up)[:, weights.kv_of()]).transpose(1, 2)
    return LatentAttended(c, k_r, q, scores, probs, out + _mean_output(weights, latent, out))


def latent_outputs(weights: AttentionWeights, latent: LatentWeights, x_BTD: Tensor) -> Tensor:
    """`attend_latent(...).out_BTNV` without its scores: several times faster."""
    c, _, _, left, right = _sides(weights, latent, x_BTD, "expanded")
    v = torch.einsum("btr,kvr->bktv", c, latent.v_up_KVR.to(c))[:, weights.kv_of()]
    out = causal_heads(weights, left, right, v).transpose(1, 2)
    return out + _mean_output(weights, latent, out)


def _mean_output(weights: AttentionWeights, latent: LatentWeights, like: Tensor) -> Tensor | float:
    """[N, Hv]: what every head output has in common."""
    return 0.0 if latent.v_mean_KV is None else latent.v_mean_KV.to(like)[weights.kv_of()]


def _sides(
    weights: AttentionWeights,
    latent: LatentWeights,
    x_BTD: Tensor,
    form: Literal["absorbed", "expanded"],
    time: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c_BTR and the rotated k_r as cached, q_BNTH, and both sides of the score product, [B, N, ., width]."""
    x, at, kv_of = x_BTD, slice(None) if time is None else time, weights.kv_of()
    c, k_r = cached_entries(latent, x)
    q = torch.einsum("btd,nhd->bnth", x[:, at], weights.q_NHD.to(x))
    if weights.q_bias_NH is not None:
        q = q + weights.q_bias_NH.to(x)[:, None]
    if weights.q_norm is not None:
        q = apply_norm(q, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)
    k_up, q_rope = latent.k_up_KHR.to(x), latent.q_rope_KFH.to(x)[kv_of]
    if latent.rotate_on_read:
        cos, sin = rotation(weights, x.shape[1], x)
        k = torch.einsum("btr,khr->bkth", c, k_up)
        if latent.k_mean_KH is not None:
            k = k + latent.k_mean_KH.to(k)[:, None]
        if weights.k_norm is not None:
            k = apply_norm(k, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)
        k = k[:, kv_of]
        left = rotate_pairs(weights.rotary, q, cos[at], sin[at])
        return c, k_r, q, left, rotate_pairs(weights.rotary, k, cos, sin)
    cos, sin = _angles(latent, x)
    q_r = rotate_pairs(shared_rotary(latent), torch.einsum("bnth,nfh->bntf", q, q_rope), cos[at], sin[at])
    k_r_BNTF = k_r[:, None].expand(-1, len(kv_of), -1, -1)
    if form == "absorbed":
        left = torch.cat([torch.einsum("bnth,nhr->bntr", q, k_up[kv_of]), q_r], -1)
        right = torch.cat([c[:, None].expand(-1, len(kv_of), -1, -1), k_r_BNTF], -1)
    else:
        left = torch.cat([q, q_r], -1)
        right = torch.cat([torch.einsum("btr,khr->bkth", c, k_up)[:, kv_of], k_r_BNTF], -1)
    return c, k_r, q, left, right


def cached_entries(latent: LatentWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """What the cache keeps of each token: c_BTR and the rotated k_r [B, T, 2F']; positions 0..T-1."""
    x = x_BTD
    if latent.down_RD.shape[1] == x.shape[-1] + 1:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    k_r = rotate_pairs(shared_rotary(latent), x @ latent.rope_FD.T.to(x), *_angles(latent, x))
    return x @ latent.down_RD.T.to(x), k_r


def shared_rotary(latent: LatentWeights) -> Rotary | None:
    """The rotated part as one head in halves."""
    if not latent.rope_dims:
        return None
    return Rotary(dims=latent.rope_dims, inv_freq=tuple(latent.inv_freq_F.tolist()))


def _angles(latent: LatentWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F'] of the rotated part at positions 0..T-1."""
    angle = torch.arange(x_BTD.shape[1], dtype=torch.float64)[:, None] * latent.inv_freq_F.double().cpu()
    return angle.cos().to(x_BTD), angle.sin().to(x_BTD)


def in_site_order(latent: LatentWeights, site: AttentionSite) -> LatentWeights:
    """`latent` with the channels of H where the site's own q has them: pairs (2j, 2j+1) if it is interleaved."""
    if site.rotary is None or not site.rotary.interleaved:
        return latent
    start, end = site.rotary.start, site.rotary.start + site.rotary.dims
    halves = [*range(start), *range(start, end, 2), *range(start + 1, end, 2), *range(end, site.head_dim)]
    back = [halves.index(j) for j in range(site.head_dim)]
    return replace(
        latent,
        k_up_KHR=latent.k_up_KHR[:, back],
        q_rope_KFH=latent.q_rope_KFH[:, :, back],
        k_mean_KH=None if latent.k_mean_KH is None else latent.k_mean_KH[:, back],
    )


def check_latent(weights: AttentionWeights, site: AttentionSite | None = None, rotate_on_read: bool = False) -> None:
    """Refuse attentions that a latent cannot stand for; see `latent_refusal`, which plans ask before.

    Raises:
        UnsupportedModel: K or V are not linear in the layer's input (norms, clamps), or the rotation is not fixed.
    """
    described: Any = weights if site is None else site
    reason = latent_refusal(described, rotate_on_read, fixed_rotary=not rotate_on_read)
    if reason:
        raise UnsupportedModel(f"{'attention' if site is None else f'layer {site.layer}'}: {reason}")
