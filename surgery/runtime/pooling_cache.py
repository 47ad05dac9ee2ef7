"""Cache of a layer that averages tokens into the slot before them (`Pool`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .decisions import at_end, from_end, pooled
from .ops import AVAILABLE, merge_append_forward
from .paged_cache import PagedLayer
from .slots import NEVER, New, Slots, pick


def _has_operator(device: torch.device) -> bool:
    """Whether one launch does a step. On a CPU the operator works in float64, and takes twice the time of torch."""
    return AVAILABLE and device.type != "cpu"


class PoolingLayer(PagedLayer):
    """A merging token overwrites the newest slot of its row with the mean of its run, rotated to its own position.

    Beside the slots each row keeps what its open run needs: where all terms count, their sums `sums_k` [B, K, H],
    `sums_v` [B, K, V] and weight `z` [B, K] in float32; where the newest W count, the terms themselves, token t at
    t % W: `terms` [B, K, W, H + V], keys before rotation and values, and `weights` [B, K, W] float32, 0 where a term is
    not of this run. Sums are then taken anew at every step: subtracting the oldest term would cancel.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        (B, K, _, H), V, W = key_states.shape, value_states.shape[-1], self.retain.window
        if W is None:
            self.state |= {
                "sums_k": key_states.new_zeros(B, K, H, dtype=torch.float32),
                "sums_v": key_states.new_zeros(B, K, V, dtype=torch.float32),
                "z": key_states.new_zeros(B, K, dtype=torch.float32),
            }
        else:
            self.state |= {
                "terms": key_states.new_zeros(B, K, W, H + V),
                "weights": key_states.new_zeros(B, K, W, dtype=torch.float32),
            }

    def _add_token(self, new: New, dec_BK: Tensor) -> None:
        assert new.weight_BKT is not None
        key, value, weight = new.key_BKTH.detach()[:, :, 0], new.value_BKTV.detach()[:, :, 0], new.weight_BKT[..., 0]
        state = self.state
        if self.retain.window is not None:
            key, value = self._mean_of_terms(key, value, weight, dec_BK)
        elif new.angles is not None and _has_operator(key.device):
            merge_append_forward(
                key, value, dec_BK, weight, new.angles, self.tables, self.pool.keys, self.pool.values, state
            )
            return
        else:
            merges = dec_BK[..., None]
            for name, x in (("sums_k", key), ("sums_v", value)):
                state[name].mul_(merges).add_(weight[..., None] * x.float())
            state["z"].mul_(dec_BK).add_(weight)
            # A slot with one token holds it to the last bit.
            mean_k, mean_v = (state[name] / state["z"][..., None] for name in ("sums_k", "sums_v"))
            key = torch.where(merges, mean_k.to(key.dtype), key)
            value = torch.where(merges, mean_v.to(value.dtype), value)
        slot = self.lengths - dec_BK.int()
        self._write(slot, new.turn(key[:, :, None])[:, :, 0], value)
        self.lengths.copy_(slot + 1)

    def _mean_of_terms(self, key: Tensor, value: Tensor, weight: Tensor, dec_BK: Tensor) -> tuple[Tensor, Tensor]:
        terms, weights, W = self.state["terms"], self.state["weights"], self.retain.window
        assert W is not None
        merges, new = dec_BK[..., None], torch.cat((key, value), dim=-1)
        place = (self.tokens % W).long()[:, None, None].expand(*dec_BK.shape, 1)
        weights.mul_(merges).scatter_(2, place, weight[..., None])
        terms.scatter_(2, place[..., None].expand(*place.shape, terms.shape[-1]), new[:, :, None].to(terms.dtype))
        mean = torch.matmul((weights / weights.sum(-1, keepdim=True))[..., None, :], terms.float())[..., 0, :]
        # A slot with one token holds it to the last bit.
        key, value = torch.where(merges, mean.to(new.dtype), new).split((key.shape[-1], value.shape[-1]), dim=-1)
        return key, value

    def _new_slots(self, new: New, dec_BKT: Tensor, order_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Prefixes: what the open slot holds after each token."""
        assert new.weight_BKT is not None
        x, weight, merges, there = [new.key_BKTH, new.value_BKTV], new.weight_BKT.float(), dec_BKT, new.real_BT
        before = 0
        if self.seen:
            old_x, old_weight, old_there = self._open_run()
            before = old_weight.shape[2]
            # The terms of before are a run that begins with the first of them; what is not there is a run each.
            begins = old_there & ~F.pad(old_there[..., :-1], (1, 0))
            x = [torch.cat((old, t.float()), dim=2) for old, t in zip(old_x, x, strict=True)]
            weight, merges = torch.cat((old_weight, weight), dim=2), torch.cat((old_there & ~begins, merges), dim=2)
            there = None if there is None else F.pad(there, (before, 0), value=True)
        if there is not None:
            # Padding stands before all terms: earlier runs go on after it.
            x, weight, merges = [at_end(t, there) for t in x], at_end(weight, there), at_end(merges, there)
        prefixes = [pooled(t, weight, merges, self.retain.window) for t in x]
        self._keep_open_run(x, weight, merges, order_BT)
        if there is not None:
            prefixes = [from_end(t, there) for t in prefixes]
        key, value = (t[:, :, before:].to(new.key_BKTH.dtype) for t in prefixes)
        return new.turn(key), value

    def _open_run(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Its terms, oldest first: K and V [B, K, C, .] in float32, weights and which are there [B, K, C].

        Where all terms count, they are handed on as one: their mean with their whole weight.
        """
        state, W = self.state, self.retain.window
        if W is None:
            there = self.lengths > 0
            weight = torch.where(there, state["z"], 1.0)[..., None]
            x = [(state[name] / weight)[:, :, None] for name in ("sums_k", "sums_v")]
            return x, weight, there[..., None]
        age = torch.arange(W - 1, -1, -1, device=self.device)
        place = ((self.tokens[:, None] - 1 - age) % W).long()[:, None].expand(-1, self.lengths.shape[1], -1)
        widths = self.pool.keys.shape[-1], self.pool.values.shape[-1]
        weight = state["weights"].gather(2, place)
        there = weight > 0
        return list(pick(state["terms"], place).float().split(widths, dim=-1)), torch.where(there, weight, 1.0), there

    def _keep_open_run(self, x: Sequence[Tensor], weight: Tensor, merges: Tensor, order_BT: Tensor) -> None:
        """`x`: all terms of K and of V [B, K, C, .], oldest first."""
        state, W, weight = self.state, self.retain.window, weight.detach()
        appends = (~merges).int()
        open_run = appends.flip(-1).cumsum(-1).flip(-1) - appends == 0
        if W is None:
            longest = int(open_run.sum(-1).max())
            w = torch.where(open_run, weight, 0.0)[..., -longest:]
            for name, t in zip(("sums_k", "sums_v"), x, strict=True):
                self._set(name, torch.matmul(w[..., None, :], t.detach()[:, :, -longest:].float())[..., 0, :])
            self._set("z", w.sum(-1))
            return
        count = min(W, weight.shape[-1])
        newest = order_BT.amax(-1, keepdim=True)
        place = ((newest - torch.arange(count - 1, -1, -1, device=self.device)) % W).long()
        rows = torch.arange(len(place), device=self.device)[:, None]
        terms = torch.cat([t.detach()[:, :, -count:] for t in x], dim=-1)
        weight = torch.where(open_run, weight, 0.0)[..., -count:]
        for name, t in (("terms", terms), ("weights", weight)):
            state[name][rows, :, place] = t.transpose(1, 2).to(state[name].dtype)

    def _expiry(self, old: Slots, dec_BKT: Tensor, order_BT: Tensor, count_B: Tensor) -> tuple[Slots, Tensor]:
        """A slot is seen no more once the next token has merged into it: it is then that token's."""
        T = dec_BKT.shape[-1]
        expires = torch.where(F.pad(dec_BKT[..., 1:], (0, 1)), (order_BT + 1)[:, None], NEVER)
        first = (T - count_B).clamp_max(T - 1).long()[:, None, None].expand(*dec_BKT.shape[:2], 1)
        b, k = (dec_BKT.gather(2, first)[..., 0] & (count_B > 0)[:, None]).nonzero(as_tuple=True)
        old.expires_BKS[b, k, self.lengths[b, k].long() - 1] = self.tokens[b]
        return old, expires
