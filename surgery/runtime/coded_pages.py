"""Pages of packed codes, for layers whose slots leave by their rank: which tokens stay, and in how many bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .coded_layer import require_finite
from .coded_rows import rows_of
from .paged_cache import PagedLayer
from .ranked_cache import RankedLayer
from .slots import Chunk, New, Slots
from .store import Codec


class CodedRankedLayer(RankedLayer):
    """A `RankedLayer` whose pages hold rows of bytes (`Rows`).

    Codes of all slots lie in the pages, made once: slots that move take their rows along. The first `sinks` slots of
    each row of the cache and its newest `recent` ones are read from full copies beside them, `first_*` and `ring_*`
    [B, K, ., W], the ring at the slot's place modulo its size.
    """

    def __init__(self, *args: Any, store: Codec, **kwargs: Any) -> None:
        self.store = store
        super().__init__(*args, **kwargs)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = rows_of(self.store, (key_states.shape[-1], value_states.shape[-1]), key_states.dtype)
        super().lazy_initialization(key_states, value_states)
        for letter, x in (("k", key_states), ("v", value_states)):
            shape = partial(x.new_zeros, *x.shape[:2])
            self.state[f"first_{letter}"] = shape(self.store.sinks, x.shape[-1])
            self.state[f"ring_{letter}"] = shape(self.store.recent, x.shape[-1])

    def add(self, new: New) -> PagedLayer | Chunk:
        for name, x in (("keys", new.key_BKTH), ("values", new.value_BKTV)):
            require_finite(self.layer, name, self.store, x.isfinite().all())
        return super().add(new)

    def _as_held(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows[0].encode(key), self.rows[1].encode(value)

    def _as_read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows[0].decode(keys), self.rows[1].decode(values)

    def _as_slots(self, slots: Slots) -> Slots:
        keys, values = self._as_held(slots.key_BKSH, slots.value_BKSV)
        return replace(slots, key_rows_BKSR=keys, value_rows_BKSR=values)

    def _held(self, slots: Slots) -> tuple[Tensor, Tensor]:
        assert slots.key_rows_BKSR is not None and slots.value_rows_BKSR is not None
        return slots.key_rows_BKSR, slots.value_rows_BKSR

    def slots(self) -> Slots:
        slots = super().slots()
        keys, values = self._in_pages(len(slots))
        return replace(slots, key_rows_BKSR=keys, value_rows_BKSR=values)

    @property
    def has_plain_pages(self) -> bool:
        return False

    def side_by_side(self) -> tuple[Tensor, Tensor, Tensor]:
        key, value, there = super().side_by_side()
        count, ring, newest = key.shape[2], self.store.recent, self._newest()
        # Places before the first slot: behind the last one, where nobody looks, each for itself.
        newest = torch.where(newest < 0, newest + ring, newest)[..., None]
        for letter, x in (("k", key), ("v", value)):
            held, first = self.state[f"ring_{letter}"], self.state[f"first_{letter}"]
            if count <= ring:
                x.copy_(held[:, :, :count])
            else:
                x.scatter_(2, newest.expand(-1, -1, -1, x.shape[-1]), held)
            x[:, :, : self.store.sinks] = first[:, :, :count]
        return key, value, there

    def _newest(self) -> Tensor:
        """[B, K, recent] int64: the slot that lies at each place of the ring; below 0 where there is none yet."""
        last = self.lengths[..., None].long() - 1
        places = torch.arange(self.store.recent, device=self.device)
        return last - (last - places) % max(1, self.store.recent)

    def _store(self, slots: Slots) -> Slots:
        slots = super()._store(slots)
        newest = self._newest()
        first = torch.arange(self.store.sinks, device=self.device).expand(*newest.shape[:2], -1)
        for name, places in (("ring", newest), ("first", first)):
            index = places.clamp(0, max(0, len(slots) - 1))[..., None]
            for letter, x in (("k", slots.key_BKSH), ("v", slots.value_BKSV)):
                if len(slots):
                    found = x.detach().gather(2, index.expand(-1, -1, -1, x.shape[-1]))
                    self._set(f"{name}_{letter}", found.to(self.dtype))
        return slots

    def _write(self, slot_BK: Tensor, key_BKH: Tensor, value_BKV: Tensor) -> None:
        super()._write(slot_BK, key_BKH, value_BKV)
        slot = slot_BK.long()
        for letter, x in (("k", key_BKH), ("v", value_BKV)):
            self._put(f"ring_{letter}", slot % max(1, self.store.recent), torch.ones_like(slot, dtype=torch.bool), x)
            self._put(f"first_{letter}", slot, slot < self.store.sinks, x)

    def _put(self, name: str, place_BK: Tensor, there_BK: Tensor, x_BKW: Tensor) -> None:
        """Write one vector per row of `state[name]`, where `there_BK`."""
        held = self.state[name]
        if not held.shape[2]:
            return
        index = place_BK.clamp_max(held.shape[2] - 1)[..., None, None].expand(-1, -1, 1, held.shape[3])
        new = x_BKW.detach().to(held.dtype)[:, :, None]
        held.scatter_(2, index, torch.where(there_BK[..., None, None], new, held.gather(2, index)))
