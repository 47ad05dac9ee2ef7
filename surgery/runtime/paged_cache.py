"""Cache layers of gated attention: KV heads keep different numbers of slots, in pages.

Row (b, k), a sequence's KV head, has `lengths[b, k]` slots; slot s lies at place s % page of page
`tables[b, k, s // page]` of the pool. Slots of one row are in no order: attention does not ask for any.
`get_seq_length()` counts tokens seen, which positions and masks follow, not slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decisions import at_end, hard_decisions
from .layout import AHEAD, Retain
from .page_pool import PagePool
from .reading import Few
from .retained import table_width
from .slots import NEVER, Chunk, New, Slots
from .whole_layer import WholeLayer

_SPARE = 1 / 64
"""Slots that a row gets at once when its pool grows, as a part of those it has: little slack, and few copies."""


class PagedLayer(WholeLayer):
    """What both methods share: pages, tables, selection of sequences, accounting.

    Args:
        retain: of the layer's plan.
        layer: its index, for messages.
        pool: pages, fixed or growing; shared by the layers of a static cache.
        max_length: tokens that may come; None: any number.
    """

    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, retain: Retain, layer: int, pool: PagePool | None = None, max_length: int | None = None) -> None:
        super().__init__()
        self.retain, self.layer, self.max_length = retain, layer, max_length
        self.pool = pool or PagePool(retain.page)
        # A step of one token with a fixed pool asks the device nothing.
        self.is_compileable = not self.pool.grows
        self._clear()

    def _clear(self) -> None:
        # Counted on the device where steps may be compiled, lest each be another program.
        self.seen: int | Tensor = 0
        self._room = 0
        self.state: dict[str, Tensor] = {}
        self.has_padding = False
        """Whether some of the tokens seen were padding, as far as steps that are not compiled know."""
        self.passed_over = False
        """Whether tokens came in training, which writes none."""
        self.is_initialized = False

    # What `state` holds, [B, ...]: `tables` [B, K, M] int32, `held` [B, K] int32 (pages that are there), `lengths`
    # [B, K] int32, `tokens` [B] int32 (of each sequence, padding not counted), and what the method adds.

    @property
    def tables(self) -> Tensor:
        return self.state["tables"]

    @property
    def held(self) -> Tensor:
        return self.state["held"]

    @property
    def lengths(self) -> Tensor:
        return self.state["lengths"]

    @property
    def tokens(self) -> Tensor:
        return self.state["tokens"]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, K = key_states.shape[:2]
        if self.retain.page != self.pool.page:
            raise ValueError(f"layer {self.layer}: pages of {self.retain.page} slots, its pool has {self.pool.page}")
        self.pool.allocate(*self._as_held(key_states[:, :, :1], value_states[:, :, :1]))
        width = 0 if self.max_length is None else self.retain.static_table(self.max_length)
        self.state = {
            "tables": key_states.new_zeros(B, K, width, dtype=torch.int32),
            "held": key_states.new_zeros(B, K, dtype=torch.int32),
            "lengths": key_states.new_zeros(B, K, dtype=torch.int32),
            "tokens": key_states.new_zeros(B, dtype=torch.int32),
        }
        if not self.pool.grows:
            self.seen = torch.zeros((), dtype=torch.int64, device=key_states.device)
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, B
        self.is_initialized = True

    def add(self, new: New) -> PagedLayer | Chunk:
        """Store new tokens; returns what they see: this layer after one token, a `Chunk` after several.

        Gradients do not flow through the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(new.key_BKTH, new.value_BKTV)
            if isinstance(self.seen, Tensor) and not torch.compiler.is_compiling():
                for tensor in (self.seen, *self.tensors()):
                    torch._dynamo.mark_static_address(tensor)  # CUDA graphs change it in place
        batch, T = len(new.key_BKTH), new.key_BKTH.shape[2]
        if batch != self.batch_size:
            raise ValueError(f"layer {self.layer}: the cache holds {self.batch_size} sequences, {batch} came")
        if self.max_length is not None:
            self._require_room(self.seen, T, self.max_length)
        if new.real_BT is not None and not torch.compiler.is_compiling():
            self.has_padding = True
        if T == 1:
            self._add_step(new)
            seen: PagedLayer | Chunk = self
        else:
            seen = self._add_chunk(new)
        self.seen += T
        return seen

    def _add_step(self, new: New) -> None:
        """One token per sequence. A fixed pool is not asked anything, so that the step can be compiled."""
        if not self.pool.grows:
            self._add_page()
        else:
            if self._room == 0:
                self._fit(_SPARE)
            self._room -= 1
        dec = hard_decisions(new.logits_BKT, self.tokens[:, None], self.retain.protected)[..., 0]
        if new.real_BT is None:
            self._add_token(new, dec)
            self.tokens.add_(1)
            return
        # Padding is written where the next token of its row will be, and the row stays as it was.
        real = new.real_BT[:, 0]
        before = {name: t.clone() for name, t in self.state.items() if name not in ("tables", "held")}
        self._add_token(new, dec & real[:, None])
        self.tokens.add_(1)
        for name, t in before.items():
            self.state[name].copy_(torch.where(real.view(-1, *[1] * (t.ndim - 1)), self.state[name], t))

    def _add_token(self, new: New, dec_BK: Tensor) -> None:
        """Write the slot of one token per sequence; the method's own state and `lengths` move on, `tokens` after it."""
        raise NotImplementedError

    def _new_slots(self, new: New, dec_BKT: Tensor, order_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of the slot that each new token leaves; the method's own state moves on."""
        raise NotImplementedError

    def _expiry(self, old: Slots, dec_BKT: Tensor, order_BT: Tensor, count_B: Tensor) -> tuple[Slots, Tensor]:
        """`old` as the new tokens see it, and the expiry of theirs; the `count_B` real ones stand at the end."""
        raise NotImplementedError

    def _left(self, slots: Slots, new: New) -> Slots:
        """`slots`, of which some are to leave now that the new tokens have attended to them: they expire with these."""
        return slots

    @torch.compiler.disable(reason="what is left of a chunk decides about shapes")
    def _add_chunk(self, new: New) -> Chunk:
        real, (B, K, T) = new.real_BT, new.logits_BKT.shape
        before = self.tokens
        order = before[:, None] + torch.arange(T, device=before.device, dtype=torch.int32)
        if real is None:
            count = torch.full_like(before, T)
        else:
            order = before[:, None] + real.cumsum(-1, dtype=torch.int32) - 1
            count = real.sum(-1, dtype=torch.int32)
        dec = hard_decisions(new.logits_BKT, order, self.retain.protected)
        if real is not None:
            dec = dec & real[:, None]
        old = self.slots()
        key, value = self._new_slots(new, dec, order)
        in_step = real is None or not bool((real[:, :-1] & ~real[:, 1:]).any())
        new_order = order
        if not in_step:
            assert real is not None
            key, value, dec, new_order = (at_end(t, real) for t in (key, value, dec, order))
        old, expires = self._expiry(old, dec, new_order, count)
        if real is not None:
            padding = torch.arange(T, device=before.device) < T - count[:, None]
            expires = expires.masked_fill(padding[:, None], -1)
        born = new_order[:, None].expand(B, K, T)
        added = self._as_slots(Slots(key_BKSH=key, value_BKSV=value, expires_BKS=expires, born_BKS=born))
        self._set("tokens", before + count)
        self._store(self._left(old.and_(added), new))
        return Chunk(old=old, new=added, order_BT=order, new_order_BT=new_order, real_BT=real, in_step=in_step)

    def _as_held(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What pages hold of keys and values [..., .]."""
        return key, value

    def _as_read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what pages hold."""
        return keys, values

    def _as_slots(self, slots: Slots) -> Slots:
        """Slots of new tokens, with what pages will hold of them where that is something else."""
        return slots

    def _in_pages(self, count: int) -> tuple[Tensor, Tensor]:
        """What pages hold of the first `count` slots of each row; copies."""
        pages = self.tables[..., : -(-count // self.retain.page)].long()
        keys, values = (t[pages].flatten(2, 3)[:, :, :count] for t in (self.pool.keys, self.pool.values))
        return keys, values

    def _held(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """What pages hold of slots [B, K, S, .]."""
        return slots.key_BKSH, slots.value_BKSV

    @property
    def has_plain_pages(self) -> bool:
        """Whether pages hold keys and values as numbers, which operators read where they lie."""
        return True

    def side_by_side(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all slots [B, K, longest, .], copies, and where there is one [B, K, longest]."""
        longest = self.tables.shape[2] * self.retain.page
        if not torch.compiler.is_compiling():
            longest = int(self.lengths.max()) if self.lengths.numel() else 0
        key, value = self._as_read(*self._in_pages(longest))
        return key, value, torch.arange(longest, device=self.device) < self.lengths[..., None]

    def heavy(self) -> tuple[int, Tensor] | None:
        """Place in each row of the slot that counts as several tokens, and how many beside its own, float32 [B, K];
        None where there is none."""
        return None

    def chosen(self, query_BN1H: Tensor, kv_of_query: Tensor | None, scale: float) -> PagedLayer | Few:
        """What a step of one token reads of the slots that are there."""
        return self

    def slots(self) -> Slots:
        """All slots as new tokens may see them; copies."""
        key, value, there = self.side_by_side()
        expires = torch.where(there, NEVER, -1).int()
        born = torch.full_like(expires, -1)
        return Slots(key_BKSH=key, value_BKSV=value, expires_BKS=expires, born_BKS=born)

    def _store(self, slots: Slots) -> Slots:
        """Fill the pages anew with what the newest token sees of `slots`, and return that."""
        last = self.tokens - 1
        slots = slots.live(last)
        there = slots.expires_BKS > last[:, None, None]
        self._set("lengths", there.sum(-1, dtype=torch.int32))
        self._release()
        self._fit()
        b, k, s = there.nonzero(as_tuple=True)
        page = self.tables[b, k, s // self.retain.page].long()
        key, value = self._held(slots)
        self.pool.keys[page, s % self.retain.page] = key.detach()[b, k, s]
        self.pool.values[page, s % self.retain.page] = value.detach()[b, k, s]
        return slots

    def _write(self, slot_BK: Tensor, key_BKH: Tensor, value_BKV: Tensor) -> None:
        slot, page = slot_BK.long(), self.retain.page
        numbers = self.tables.gather(2, (slot // page)[..., None])[..., 0]
        place = (numbers * page + slot % page).flatten()
        held = self._as_held(key_BKH, value_BKV)
        for slots, new in zip((self.pool.keys, self.pool.values), held, strict=True):
            slots.flatten(0, 1).index_copy_(0, place, new.detach().flatten(0, 1).to(slots.dtype))

    def _fit(self, spare: float = 0.0) -> None:
        """Pages for all slots of each row, and a few steps more.

        Args:
            spare: where a growing pool grows, its rows get this part of their slots more.
        """
        page, lengths, held = self.retain.page, self.lengths, self.held
        ends = (lengths + AHEAD + page - 1) // page
        if not self.pool.grows:
            places = torch.arange(self.tables.shape[2], device=self.device)
            wanted = (places >= held[..., None]) & (places < ends[..., None])
            self.tables.copy_(torch.where(wanted, self._take(wanted), self.tables))
            held.copy_(torch.maximum(held, ends))
            return
        if bool((ends > held).any()):
            self._grow(torch.maximum(held, (lengths + AHEAD + (lengths * spare).int() + page - 1) // page))
        self._room = int((held * page - lengths).min())

    def _grow(self, ends_BK: Tensor) -> None:
        """All pages move, so that rows stay whole stretches, which a CPU reads without copying them."""
        missing = int(ends_BK.max()) - self.tables.shape[2]
        if missing > 0:
            self.state["tables"] = torch.nn.functional.pad(self.tables, (0, table_width(missing)))
        places = torch.arange(self.tables.shape[2], device=self.device)
        there = places < ends_BK[..., None]
        self.pool.rebuild(torch.where(places < self.held[..., None], self.tables, 0)[there].long())
        self.tables.zero_()
        self.tables[there] = torch.arange(self.pool.pages, dtype=torch.int32, device=self.device)
        self.held.copy_(ends_BK)

    def _add_page(self) -> None:
        """A page of a fixed pool for each row whose pages are full."""
        full = (self.lengths >= self.held * self.retain.page)[..., None]
        if not torch.compiler.is_compiling() and not bool(full.any()):
            return
        place = self.held.clamp_max(self.tables.shape[2] - 1).long()[..., None]
        self.tables.scatter_(2, place, torch.where(full, self._take(full), self.tables.gather(2, place)))
        self.held.add_(full[..., 0])

    def _release(self) -> None:
        """Give all pages back, so that those taken next are neighbours."""
        there = torch.arange(self.tables.shape[2], device=self.device) < self.held[..., None]
        if self.pool.grows:
            self.pool.rebuild(self.tables.new_zeros(0))
            self.state["tables"] = self.tables[..., :0]
        else:
            self.pool.give(self.tables[there])
        self.held.zero_()
        self.tables.zero_()  # entries after a row's pages are read as well, and hidden

    def _take(self, wanted: Tensor) -> Tensor:
        self._require(
            self.pool.has(wanted),
            f"layer {self.layer}: the static cache is full: all of its {self.pool.pages} pages of {self.retain.page} "
            f"slots are taken; it was sized for a mean of {self.pool.ratio:g} tokens per slot. Use a dynamic cache, "
            "which grows, or make a static one for the ratio that the gates reach: "
            "model.static_cache(max_cache_len, ratio=...).",
            self._reached,
        )
        return self.pool.take(wanted)

    def _reached(self) -> str:
        kept, seen = float(self.lengths.float().mean()), float(self.tokens.float().mean())
        return f" KV heads hold {kept:.0f} slots of {seen:.0f} tokens here: {seen / max(kept, 1):.2f}x fewer."

    def _set(self, name: str, value: Tensor) -> None:
        """Change an entry of `state`; in place where it fits, for compiled steps know where it lies."""
        if self.state[name].shape == value.shape:
            self.state[name].copy_(value)
        else:
            self.state[name] = value

    def tensors(self) -> list[Tensor]:
        """All that the layer keeps on the device; layers of a static cache name the same pool."""
        return [*self.pool.tensors(), *self.state.values()]

    def why_whole(self) -> str:
        return f"whose tokens are averaged or leave ({self.retain.kind}) has no {{}} by token"

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the cache of a gated attention is written by that attention alone")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.pool.grows:
            return int(self.seen) + query_length, 0
        assert self.max_length is not None
        return self.max_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; where steps may be compiled a tensor, which later ones leave as it is."""
        return self.seen.clone() if isinstance(self.seen, Tensor) else self.seen  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"layer {self.layer}: tokens cannot be taken back from a cache that merges or drops them "
                f"({self.retain.kind}). Decode without what takes them back (assistants, prompt lookup, contrastive "
                "search that saves memory), and keep copy.deepcopy(cache) where turns are tried out."
            )

    def reset(self) -> None:
        self.passed_over = self.has_padding = False
        if self.pool.grows:
            self.pool = PagePool(self.retain.page)
            self._clear()
        elif self.is_initialized:
            self._release()
            for tensor in (self.seen, *self.state.values()):
                tensor.zero_()  # type: ignore[union-attr]

    def offload(self) -> None:
        raise ValueError(f"layer {self.layer}: a cache of pages cannot be offloaded. Use a dynamic or static cache.")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats) if self.is_initialized else None)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.batch_size)[indices.cpu()] if self.is_initialized else None)

    def _select(self, rows_B: Tensor | None) -> None:
        """Go on with these sequences; pages are copied, for sequences of one origin part ways."""
        if rows_B is None or not self.is_initialized:
            return
        index = rows_B.to(self.device)
        if len(index) == self.batch_size and bool((index == torch.arange(self.batch_size, device=self.device)).all()):
            return
        places = torch.arange(self.tables.shape[2], device=self.device)
        there = (places * self.retain.page < self.lengths[..., None]).index_select(0, index)
        flat = self.tables.index_select(0, index)[there].long()
        keys, values = self.pool.keys[flat], self.pool.values[flat]
        self._release()
        for name, t in list(self.state.items()):
            self._set(name, t.index_select(0, index))
        self.batch_size = len(index)
        self._fit()
        # Tables may have another width; what is there stands at their beginning.
        width = min(self.tables.shape[2], there.shape[2])
        to = self.tables[..., :width][there[..., :width]].long()
        self.pool.keys[to], self.pool.values[to] = keys, values
