"""Latent KV: the weights of one attention that caches a latent instead of K and V, and its reference forward.

Two meanings share one form. Where `rotate_on_read` is False (MLA, arXiv:2405.04434, and the `freq` layout) the cache
holds c and the rotated k_r, and queries are mapped into the latent space: nothing is expanded. Where it is True
(Palu, EigenAttention and their kin) the cache holds c alone; k = k_up c is made at read and then rotated as the parent
rotates it, so the rotary embedding is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, UnsupportedModel
from ..runtime.functions import as_bits
from ..runtime.layout import AttentionSite, Latent, Rotary
from ..runtime.project import latent_refusal
from .forward import causal_heads, rotation
from .maths import apply_norm, rotate_pairs
from .weights import AttentionWeights, halves


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


def latent_outputs(weights: AttentionWeights, latent: LatentWeights, x_BTD: Tensor) -> Tensor:
    """Head outputs [B, T, N, Hv] of `latent` over whole sequences; q, scale, window, cap, sinks, slopes of `weights`.

    K and V per head are made first, as a long prefill does; decoding maps queries into the latent space instead, which
    gives the same numbers. Padding must stand on the right; a gate on the outputs is not applied.
    """
    c, k_r = cached_entries(latent, x_BTD)
    left, right = score_sides(weights, latent, x_BTD, c, k_r)
    v = torch.einsum("btr,kvr->bktv", c, latent.v_up_KVR.to(c))[:, weights.kv_of()]
    out = causal_heads(weights, left, right, v).transpose(1, 2)
    return out if latent.v_mean_KV is None else out + latent.v_mean_KV.to(out)[weights.kv_of()]


def score_sides(
    weights: AttentionWeights, latent: LatentWeights, x_BTD: Tensor, c_BTR: Tensor, k_rope_BTF: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides of the score product, [B, N, T, width] each, from the layer's input and what its cache keeps of it."""
    x, c, kv_of = x_BTD, c_BTR, weights.kv_of()
    q = latent_queries(weights, x)
    k = torch.einsum("btr,khr->bkth", c, latent.k_up_KHR.to(x))
    if latent.rotate_on_read:
        cos, sin = rotation(weights, x.shape[1], x)
        if latent.k_mean_KH is not None:
            k = k + latent.k_mean_KH.to(k)[:, None]
        if weights.k_norm is not None:
            k = apply_norm(k, weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH)
        return rotate_pairs(weights.rotary, q, cos, sin), rotate_pairs(weights.rotary, k[:, kv_of], cos, sin)
    q_r = torch.einsum("bnth,nfh->bntf", q, latent.q_rope_KFH.to(x)[kv_of])
    q_r = rotate_pairs(shared_rotary(latent), q_r, *latent_angles(latent, x))
    return torch.cat([q, q_r], -1), torch.cat([k[:, kv_of], k_rope_BTF[:, None].expand(-1, len(kv_of), -1, -1)], -1)


def latent_queries(weights: AttentionWeights, x_BTD: Tensor) -> Tensor:
    """Queries [B, N, T, H] after their norm, before any rotation."""
    q = torch.einsum("btd,nhd->bnth", x_BTD, weights.q_NHD.to(x_BTD))
    if weights.q_bias_NH is not None:
        q = q + weights.q_bias_NH.to(x_BTD)[:, None]
    if weights.q_norm is not None:
        q = apply_norm(q, weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH)
    return q


def cached_entries(latent: LatentWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """What the cache keeps of each token: c_BTR and the rotated k_r [B, T, 2F']; positions 0..T-1."""
    x = x_BTD
    if latent.down_RD.shape[1] == x.shape[-1] + 1:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    k_r = rotate_pairs(shared_rotary(latent), x @ latent.rope_FD.T.to(x), *latent_angles(latent, x))
    return x @ latent.down_RD.T.to(x), k_r


def shared_rotary(latent: LatentWeights) -> Rotary | None:
    """The rotated part as one head in halves."""
    if not latent.rope_dims:
        return None
    return Rotary(dims=latent.rope_dims, inv_freq=tuple(latent.inv_freq_F.tolist()))


def latent_angles(latent: LatentWeights, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F'] of the rotated part at positions 0..T-1."""
    angle = torch.arange(x_BTD.shape[1], dtype=torch.float64)[:, None] * latent.inv_freq_F.double().cpu()
    return angle.cos().to(x_BTD), angle.sin().to(x_BTD)


def in_site_order(latent: LatentWeights, site: AttentionSite) -> LatentWeights:
    """`latent` with the channels of H where the site's own q has them: pairs (2j, 2j+1) if it is interleaved."""
    if site.rotary is None or not site.rotary.interleaved:
        return latent
    order = halves(site.rotary, site.head_dim)
    back = [order.index(j) for j in range(site.head_dim)]
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


def expanded_weights(weights: AttentionWeights, latent: LatentWeights) -> AttentionWeights:
    """The same function in the parent's form: full K and V heads of low rank. For `rotate_on_read` only.

    What runs as an ordinary attention can be refitted, measured and compared as one.
    """
    if not latent.rotate_on_read:
        raise PlanError("only a latent that is rotated at read has keys in the parent's form.")
    k, k_bias = _expanded(weights, latent, latent.k_up_KHR, latent.k_mean_KH)
    v, v_bias = _expanded(weights, latent, latent.v_up_KVR, latent.v_mean_KV)
    return replace(weights, k_KHD=k, v_KVD=v, k_bias_KH=k_bias, v_bias_KV=v_bias)


def _expanded(
    weights: AttentionWeights, latent: LatentWeights, up_KHR: Tensor, mean_KH: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows [K, H, D] and bias [K, H] of K or V in the dtype and on the device of `weights`."""
    D, like = weights.q_NHD.shape[-1], weights.k_KHD
    w = up_KHR @ latent.down_RD
    bias = w[..., D] if weights.has_bias else None
    if mean_KH is not None:
        bias = mean_KH if bias is None else bias + mean_KH
    return w[..., :D].to(like), None if bias is None else bias.to(like)


def latent_of(latent: LatentWeights, site: AttentionSite) -> Latent:
    """The plan of a layer that runs `latent`."""
    return Latent.of(
        site,
        latent.rank,
        latent.rope_dims,
        rotate_on_read=latent.rotate_on_read,
        k_rank=_key_rank(latent),
        means=latent.v_mean_KV is not None,
    )


def canonical_latent(latent: LatentWeights, site: AttentionSite, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`latent` under the names and in the layout of `SurgeryLatentAttention`, in float32.

    Args:
        weights: the layer as `canonical_weights` gives it; q, o and sinks are taken from there.
    """
    latent = in_site_order(latent, site)
    kept = {name: t for name, t in weights.items() if not name.startswith(("k_proj", "v_"))}
    down = torch.cat([latent.down_RD, latent.rope_FD.to(latent.down_RD)])
    made = {"kv_down.weight": down[:, : site.hidden_size]}
    if down.shape[1] > site.hidden_size:
        made["kv_down.bias"] = down[:, site.hidden_size]
    k_rank = _key_rank(latent)
    made["k_up"] = latent.k_up_KHR if k_rank is None else latent.k_up_KHR[..., :k_rank]
    made["v_up"] = latent.v_up_KVR if k_rank is None else latent.v_up_KVR[..., k_rank:]
    made["q_rope"] = latent.q_rope_KFH
    if latent.k_mean_KH is not None:
        made["k_mean"] = latent.k_mean_KH
    if latent.v_mean_KV is not None:
        weight = weights["o_proj.weight"].double()
        common = latent.v_mean_KV.double().repeat_interleave(site.group_size, 0).flatten()
        made["o_proj.bias"] = weight @ common + weights.get("o_proj.bias", weight.new_zeros(len(weight)))
    kept |= {name: tensor.float().contiguous() for name, tensor in made.items() if tensor.numel()}
    if latent.rope_dims:
        kept["rope_freq_bits"] = as_bits(latent.inv_freq_F.tolist())
    return kept


def _key_rank(latent: LatentWeights) -> int | None:
    """0 where only the rotated part makes the keys (`freq`)."""
    if latent.k_rank is None and latent.rope_dims and not bool(latent.k_up_KHR.any()):
        return 0
    return latent.k_rank
