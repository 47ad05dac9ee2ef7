"""Cache of a layer that drops tokens which are out of the window, where a gate or a score said so (`Gate`, `Evict`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .paged_cache import PagedLayer
from .slots import NEVER, New, Slots


class EvictingLayer(PagedLayer):
    """Every token gets a slot; one that its gate gave up leaves it to the token that is `window` tokens younger.

    So decoding moves nothing. `window` [B, K, W] int32 holds for the newest W tokens of a row, token t at t % W, where
    they lie and whether they go: 2 * (slot + 1) + goes; 0 before there were W.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.retain.window is not None
        B, K = key_states.shape[:2]
        self.state["window"] = key_states.new_zeros(B, K, self.retain.window, dtype=torch.int32)

    def _add_token(self, new: New, dec_BK: Tensor) -> None:
        window = self.state["window"]
        place = (self.tokens % window.shape[-1]).long()[:, None, None].expand(*dec_BK.shape, 1)
        leaving = window.gather(2, place)[..., 0]
        takes_over = (leaving & 1).bool()
        slot = torch.where(takes_over, (leaving >> 1) - 1, self.lengths)
        self._write(slot, new.turn(new.key_BKTH)[:, :, 0], new.value_BKTV[:, :, 0])
        window.scatter_(2, place, (2 * (slot + 1) + dec_BK.int())[..., None])
        self.lengths.add_(~takes_over)

    def _new_slots(self, new: New, dec_BKT: Tensor, order_BT: Tensor) -> tuple[Tensor, Tensor]:
        return new.turn(new.key_BKTH), new.value_BKTV

    def _expiry(self, old: Slots, dec_BKT: Tensor, order_BT: Tensor, count_B: Tensor) -> tuple[Slots, Tensor]:
        assert self.retain.window is not None
        return old, torch.where(dec_BKT, (order_BT + self.retain.window)[:, None], NEVER)

    def slots(self) -> Slots:
        slots = super().slots()
        window = self.state["window"]
        W = window.shape[-1]
        newest = self.tokens[:, None] - 1
        token = newest - (newest - torch.arange(W, device=self.device, dtype=torch.int32)) % W
        b, k, w = (window > 0).nonzero(as_tuple=True)
        entry = window[b, k, w]
        token, slot = token[b, w], entry // 2 - 1
        slots.born_BKS[b, k, slot] = token
        slots.expires_BKS[b, k, slot] = torch.where(entry % 2 == 1, token + W, NEVER).int()
        return slots

    def _store(self, slots: Slots) -> Slots:
        slots = super()._store(slots)
        window = self.state["window"].zero_()
        W, newest = window.shape[-1], self.tokens[:, None, None] - 1
        b, k, s = ((slots.born_BKS > newest - W) & (slots.expires_BKS > newest)).nonzero(as_tuple=True)
        goes = slots.expires_BKS[b, k, s] != NEVER
        window[b, k, slots.born_BKS[b, k, s].long() % W] = 2 * (s.int() + 1) + goes.int()
        return slots
