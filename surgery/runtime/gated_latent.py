"""Attention of a converted layer that caches latents, which leave or are averaged by the decisions of a gate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .attention import Inputs, norm_heads
from .gated import SurgeryGatedAttention
from .latent import AskedLatent, SurgeryLatentAttention
from .layout import Latent
from .paged_attention import attend
from .paged_cache import PagedLayer
from .queries import Queries
from .slots import Chunk, New


class SurgeryGatedLatentAttention(SurgeryGatedAttention, SurgeryLatentAttention):
    """One latent per token, and one decision for it: K is 1 in what the gate and the cache see.

    A slot holds an entry of the latent cache, [c ; k_r], and beside it, with `rotate_on_read`, the position of its
    token. Averaged entries (`Pool`) are those of averaged K and V, for both are linear in the entry; k_r is averaged
    before its rotation, and turned to the position of the newest token, as keys of heads are. One new token reads
    slots as they lie in their pages; several expand K and V of the slots that they see.
    """

    def _asked(self, inputs: Inputs) -> AskedLatent:
        return self._latent_queries(inputs)

    def _new(self, inputs: Inputs, asked: AskedLatent, real_BT: Tensor | None) -> New:
        entry, beside = self._entry(inputs.hidden_BTD, asked)
        logits, weight = self._decide(inputs.hidden_BTD, asked.q_BTNH, self._key_of_gate(entry))
        return New(
            key_BKTH=entry,
            value_BKTV=beside,
            logits_BKT=logits,
            weight_BKT=weight,
            real_BT=real_BT,
            turn=lambda x: self._turned_entry(x, asked),
            queries=self._queries_of(self._query(asked), real_BT) if self._ranks(entry.shape[2]) else None,
        )

    def _queries_of(self, query_BNTH: Tensor, real_BT: Tensor | None) -> Queries:
        return replace(super()._queries_of(query_BNTH, real_BT), expand=self._expanded)

    def _expanded(self, key_B1SW: Tensor, beside_B1SP: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of every KV head from what slots hold."""
        return self._keys_of(key_B1SW, beside_B1SP), self._values_of(key_B1SW)

    def _key_of_gate(self, entry_B1TW: Tensor) -> Tensor:
        """[B, T, 1, .]: the keys of all heads side by side where a score may read them, else the entry."""
        if self.retain.decided_by != "score":
            return entry_B1TW.transpose(1, 2)
        keys = keys_before_rotation(self.latent, entry_B1TW[:, 0], self.k_up, self.q_rope, self.k_mean)
        return norm_heads(self.k_norm, keys, False).flatten(2)[:, :, None]

    def _spread(
        self, asked: AskedLatent, key: Tensor, value: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._query(asked), self._keys_of(key, value), self._values_of(key), keep

    def _attend_seen(self, asked: AskedLatent, seen: PagedLayer | Chunk) -> Tensor:
        if isinstance(seen, PagedLayer) and not self.latent.rotate_on_read:
            query, rank = self._absorbed(asked.q_BTNH, asked.q_rope_BTNF).transpose(1, 2), self.latent.rank
            # Keys of slots are their values as well, cut to the part that never turns.
            mean = attend(self, query, seen, self.scaling, self._plain, view=lambda k, v: (k, k[..., :rank]))
            return self._values(mean)
        return attend(
            self, self._query(asked), seen, self.scaling, self._plain,
            expand=self._expanded,
        )  # fmt: skip


def keys_before_rotation(
    latent: Latent, entry_BTW: Tensor, k_up: Tensor | None, q_rope: Tensor | None, k_mean: Tensor | None
) -> Tensor:
    """Keys [B, T, K, H] of every KV head that queries of the token itself meet, from [c ; k_r] before any rotation.

    Args:
        k_up, q_rope, k_mean: parameters of a `SurgeryLatentAttention`.
    """
    keys = entry_BTW.new_zeros(*entry_BTW.shape[:2], latent.kv_heads, latent.head_dim)
    if k_up is not None:
        keys = keys + torch.einsum("btr,khr->btkh", entry_BTW[..., : latent.key_rank], k_up)
    if q_rope is not None:
        keys = keys + torch.einsum("btf,kfh->btkh", entry_BTW[..., latent.rank :], q_rope)
    return keys if k_mean is None else keys + k_mean
