"""Attention of a converted layer that caches one latent per token instead of K and V."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn

from .attention import Inputs, Shapes, SurgeryAttention, SurgeryHeadNorm, norm_heads
from .calling import CallingConvention
from .functions import angles_of, turn_halves
from .layout import AttentionSite, Latent, LayerPlan, position_numbers


class AskedLatent(NamedTuple):
    """What one call asks of a latent cache."""

    q_BTNH: Tensor
    """Before any rotation."""
    q_rope_BTNF: Tensor | None
    """Queries of the rotated part, rotated; None where there is none, as `angles`, its cos and sin [B or 1, T, F]."""
    angles: tuple[Tensor, Tensor] | None
    positions_BT: Tensor


class SurgeryLatentAttention(SurgeryAttention):
    """`SurgeryAttention` under a `Latent` plan.

    Score of query head h with KV head a = h // (N / K): (q_hᵀ k_up[a] c + rot(q_rope[a] q_h)ᵀ rot(k_r)) * scale;
    output v_up[a] of the mean of c, then `o_proj`. With `rotate_on_read`: rot(q_h)ᵀ rot(k_up[a] c) * scale, turned, and
    normed if it norms, as the parent does.

    The cache keeps [c ; rot(k_r)] of each token as ONE head of keys [B, 1, S, R + rope_dims] and values of width 0:
    every cache layer of transformers, dynamic, static or sliding, stores, crops and reorders that as it is. One new
    token reads it as it lies there (queries are mapped into the latent space, nothing of the cache is expanded; with
    `rotate_on_read` only K is); more tokens at once expand K and V, which costs less arithmetic then.

    With `rotate_on_read` the values are the positions of the tokens (see `positions_as_numbers`). Places in the cache
    would not do: positions start again in packed sequences, and padding has places but no positions of its own.

    Parameters beside q, o and sinks: `kv_down` [R + rope_dims, D], `k_up` [K, H, R_k], `v_up` [K, V, R_v], `q_rope`
    [K, rope_dims, H]; R_k and R_v are R, or its two parts where the plan has a `k_rank`. Those of size 0 are absent.
    `rope_freq_bits` [rope_dims / 2] are the angles per position of the rotated part, float32 seen as int32: chosen by
    the conversion, so they travel in the state dict, and `.to(torch.bfloat16)` cannot round them. `k_mean` [K, H] is
    added to k_up c where the plan has `means`.

    Source: the absorbed form of DeepSeek-V2, arXiv:2405.04434; Palu, arXiv:2407.21118, for `rotate_on_read`.
    """

    linears = ("q_proj", "kv_down", "o_proj")
    norms = ("q_norm", "k_norm")
    tensors = (*SurgeryAttention.tensors, "k_up", "k_mean", "v_up", "q_rope")
    k_norm: SurgeryHeadNorm | None
    kv_down: nn.Linear
    k_up: nn.Parameter | None
    k_mean: nn.Parameter | None
    v_up: nn.Parameter
    q_rope: nn.Parameter | None
    rope_freq_bits: Tensor

    def __init__(
        self, config: Any, site: AttentionSite, plan: LayerPlan, call: CallingConvention, shapes: Shapes
    ) -> None:
        super().__init__(config, site, plan, call, shapes)
        assert isinstance(plan.project, Latent)
        self.latent = plan.project
        check_latent_site(site, self.latent)
        self.keeps_positions = self.latent.rotate_on_read and site.rotary is not None
        if self.latent.rope_dims:
            self.register_buffer("rope_freq_bits", torch.zeros(self.latent.rope_dims // 2, dtype=torch.int32))
        self.build_tables()
        self.reset()

    def reset(self) -> None:
        super().reset()
        for name in ("k_up", "v_up", "q_rope"):
            tensor = getattr(self, name)
            if tensor is not None:
                init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
        if self.k_mean is not None:
            init.zeros_(self.k_mean)
        if self.latent.rope_dims:
            init.zeros_(self.rope_freq_bits)

    def _needs_frequencies(self) -> bool:
        return isinstance(self.plan.project, Latent) and self.plan.project.rotate_on_read

    def _absorbs(self, hidden_states: Tensor) -> bool:
        return hidden_states.shape[1] == 1 and self.config._attn_implementation in ("sdpa", "eager", "surgery")

    def held(self, dtype: torch.dtype) -> tuple[int, int, int]:
        # Plans of early versions do not count the positions, which are cached all the same.
        return 1, self.latent.dims, position_numbers(dtype.itemsize) if self.keeps_positions else 0

    def _query_key_value(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        asked = self._latent_queries(inputs)
        if self.owns_cache:
            entry, beside = self._entry(inputs.hidden_BTD, asked)
            cached, beside = self._store(self._turned_entry(entry, asked), beside, inputs)
        else:
            cached, beside = self._borrow(inputs)
        absorbs = self._absorbs(inputs.hidden_BTD)
        # Means are taken over whole entries and cut afterwards: sdpa copies nothing where K and V are equally wide.
        value = cached if absorbs else self._values_of(cached)
        if absorbs and not self.latent.rotate_on_read:
            return self._absorbed(asked.q_BTNH, asked.q_rope_BTNF).transpose(1, 2), cached, value
        return self._query(asked), self._keys_of(cached, beside), value

    def _latent_queries(self, inputs: Inputs) -> AskedLatent:
        """Queries of the new tokens, and what turns their entries."""
        q, positions = self._queries(inputs.hidden_BTD), self._positions(inputs)
        if self.q_rope is None:
            return AskedLatent(q, None, None, positions)
        angles = cos, sin = angles_of(positions, self.rope_freq_bits, 1.0, q.dtype)
        q_rope = torch.einsum("btkgh,kfh->btkgf", self._by_kv_head(q), self.q_rope).flatten(2, 3)
        q_rope = turn_halves(q_rope, cos.unsqueeze(2), sin.unsqueeze(2)).to(q.dtype)
        return AskedLatent(q, q_rope, angles, positions)

    def _entry(self, hidden_BTD: Tensor, asked: AskedLatent) -> tuple[Tensor, Tensor]:
        """What the cache keeps of new tokens, [B, 1, T, .]: [c ; k_r] before its rotation, and what lies beside."""
        entry = self.kv_down(hidden_BTD)[:, None]
        if not self.keeps_positions:
            return entry, entry[..., :0]
        return entry, positions_as_numbers(asked.positions_BT, entry.dtype).expand(len(entry), -1, -1)[:, None]

    def _turned_entry(self, entry_B1TW: Tensor, asked: AskedLatent) -> Tensor:
        """Entries with k_r rotated to the positions of this call."""
        if asked.angles is None:
            return entry_B1TW
        rank, (cos, sin) = self.latent.rank, asked.angles
        k_rope = turn_halves(entry_B1TW[..., rank:], cos[:, None], sin[:, None]).to(entry_B1TW.dtype)
        return torch.cat((entry_B1TW[..., :rank], k_rope), dim=-1)

    def _query(self, asked: AskedLatent) -> Tensor:
        """Queries [B, N, T, .] of the keys that `_keys_of` makes."""
        if self.latent.rotate_on_read:
            query = asked.q_BTNH.transpose(1, 2)
            return self._turned(query, asked.positions_BT) if self.keeps_positions else query
        parts = [asked.q_BTNH] if self.k_up is not None else []
        parts += [] if asked.q_rope_BTNF is None else [asked.q_rope_BTNF]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).transpose(1, 2)

    def _keys_of(self, cached_B1SW: Tensor, beside_B1SP: Tensor) -> Tensor:
        """Keys [B, K, S, .] of every KV head from cached entries and what lies beside them."""
        c_BSR, rope_dims = cached_B1SW[:, 0, :, : self.latent.rank], self.latent.rope_dims
        if self.latent.rotate_on_read:
            key = self._expand(c_BSR, self.k_up, False)
            if self.k_mean is not None:
                key = key + self.k_mean.unsqueeze(1)
            key = norm_heads(self.k_norm, key.transpose(1, 2), False).transpose(1, 2)
            return self._turned(key, numbers_as_positions(beside_B1SP[:, 0])) if self.keeps_positions else key
        parts = [self._expand(c_BSR, self.k_up, False)] if self.k_up is not None else []
        if rope_dims:
            parts.append(cached_B1SW[..., self.latent.rank :].expand(-1, self.latent.kv_heads, -1, rope_dims))
        return torch.cat(parts, dim=-1)

    def _values_of(self, cached_B1SW: Tensor) -> Tensor:
        """Values [B, K, S, V] of every KV head."""
        return self._expand(cached_B1SW[:, 0, :, : self.latent.rank], self.v_up, True)

    def _absorbed(self, q_BTNH: Tensor, q_rope_BTNF: Tensor | None) -> Tensor:
        """Queries in the space of the cached tensor, [B, T, N, R + rope_dims]."""
        rank, key_rank = self.latent.rank, self.latent.key_rank
        if self.k_up is None:
            q = q_BTNH.new_zeros(*q_BTNH.shape[:-1], rank)
        else:
            q = torch.einsum("btkgh,khr->btkgr", self._by_kv_head(q_BTNH), self.k_up).flatten(2, 3)
            if key_rank < rank:
                q = F.pad(q, (0, rank - key_rank))
        return q if q_rope_BTNF is None else torch.cat((q, q_rope_BTNF), dim=-1)

    def _values(self, mean_BTNR: Tensor) -> Tensor:
        rank = self.latent.rank
        mean = self._by_kv_head(mean_BTNR[..., rank - self.latent.value_rank : rank])
        return torch.einsum("btkgr,kvr->btkgv", mean, self.v_up).flatten(2, 3)

    def _expand(self, c_BSR: Tensor, up_KHR: Tensor | None, values: bool) -> Tensor:
        """K or V of every head, [B, K, S, H or V]."""
        assert up_KHR is not None
        c = c_BSR[..., -self.latent.value_rank :] if values else c_BSR[..., : self.latent.key_rank]
        return torch.einsum("bsr,khr->bksh", c, up_KHR)

    def _turned(self, x_BNTH: Tensor, positions_BT: Tensor) -> Tensor:
        """q or K after the parent's rotation at `positions_BT`."""
        assert self.site.rotary is not None
        cos, sin = angles_of(positions_BT, self.inv_freq_bits, self.site.rotary.scaling, x_BNTH.dtype)
        return self._turn(x_BNTH, cos.unsqueeze(1), sin.unsqueeze(1))

    def _by_kv_head(self, x_BTNH: Tensor) -> Tensor:
        """[B, T, K, G, .]: the query heads of each KV head."""
        return x_BTNH.unflatten(2, (self.latent.kv_heads, -1))


def positions_as_numbers(positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, numbers] that `dtype` holds to the last bit: the position itself, or its three digits to the base 256."""
    if position_numbers(dtype.itemsize) == 1:
        return positions_BT[..., None].to(dtype)
    digits = [positions_BT // 65536, positions_BT // 256 % 256, positions_BT % 256]
    return torch.stack(digits, dim=-1).to(dtype)


def numbers_as_positions(numbers_BTP: Tensor) -> Tensor:
    """[B, T] float32: what `positions_as_numbers` was given."""
    numbers = numbers_BTP.float()
    if numbers.shape[-1] == 1:
        return numbers[..., 0]
    return 65536 * numbers[..., 0] + 256 * numbers[..., 1] + numbers[..., 2]


def check_latent_site(site: AttentionSite, latent: Latent) -> None:
    """Refuse plans of impossible shape, and attentions that no latent can stand for.

    Raises:
        ValueError: says the layer and the reason.
    """
    where = f"{site.module} (layer {site.layer})"
    reason = latent.supports(site)
    if reason:
        raise ValueError(f"{where}: {reason}")
    if (latent.kv_heads, latent.head_dim, latent.value_dim) != (site.kv_heads, site.head_dim, site.value_dim):
        raise ValueError(
            f"{where}: plans maps to {latent.kv_heads} KV heads of {latent.head_dim} + {latent.value_dim}; the parent "
            f"has {site.kv_heads} of {site.head_dim} + {site.value_dim}"
        )
    if latent.rope_dims % 2 or latent.rope_dims < 0:
        raise ValueError(f"{where}: rope_dims {latent.rope_dims} must be even")
    if latent.value_rank < 1 or not 0 <= latent.key_rank <= latent.rank or latent.key_rank + latent.rope_dims < 1:
        raise ValueError(f"{where}: a latent of {latent.rank} numbers with k_rank {latent.k_rank} leaves K or V none")
    if latent.rotate_on_read and (latent.rope_dims or not latent.key_rank):
        raise ValueError(f"{where}: a latent that is rotated at read caches no rotated part, and K must read it")
