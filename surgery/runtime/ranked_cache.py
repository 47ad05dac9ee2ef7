"""Cache of a layer whose slots leave by their rank once a budget is full (`Ranked`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .budgets import BUDGETS, Claim, OverLayers, rank
from .merging import MERGES
from .page_pool import PagePool
from .paged_cache import PagedLayer
from .queries import Queries
from .ranked import Ranked
from .rankers import RANKERS
from .ranking import Ranking
from .reading import READERS, Few, Query
from .slots import NEVER, Chunk, New, Shift, Slots


class RankedLayer(PagedLayer):
    """Slots of each row lie in the order of their tokens, so that sinks are the first and newest tokens the last.

    Several tokens see all slots, and each other; then slots leave. One token is appended, and slots leave when heads
    hold a page more than their budget on average, where the score follows decoding; the token sees what is left. Of a
    sequence that gets one token at most beside longer ones, slots leave as behind one token. A static cache only
    appends while decoding.

    `gathered` [B, K, M * page] float32 is what the score has summed up for each slot, where it does; `born`, int32, the
    order of its token, where attention asks how far it is away.
    """

    retain: Ranked

    def __init__(self, retain: Ranked, layer: int, pool: PagePool | None = None, max_length: int | None = None) -> None:
        super().__init__(retain, layer, pool, max_length)
        self.ranker, self.budget = RANKERS[retain.scorer], BUDGETS[retain.budget]
        self.merge = None if retain.merge is None else MERGES[retain.merge]
        self.reader = None if retain.read is None else READERS[retain.read]
        self.peers: Sequence[RankedLayer] = [self]
        """Layers of the cache that share a budget over layers, this one among them, in order: see `join`."""
        self.claim: Claim | None = None
        """While a pass divides a budget over layers."""
        self.whole_B: Tensor | None = None
        """In a pass of several tokens: the sequences of which no slot leaves, for they got one token at most."""
        self.shift: Shift | None = None
        """Of this pass, while the budget is divided: see `New.shift`."""
        self.rehearsing = False
        """Whether the tokens that come are those of the prompt once more, and are not to stay: see `rehearsal`."""

    def _clear(self) -> None:
        super()._clear()
        self._unasked = 0
        """Steps in which no row can reach its budget: lengths are not read from the device."""
        self._sharing: list[int] = []
        """KV heads that do not keep all of their tokens."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._sharing = [k for k in range(key_states.shape[1]) if k not in self.retain.whole]
        if self.merge is not None and self.merge.counts:
            self.state["more"] = key_states.new_zeros(key_states.shape[:2], dtype=torch.float32)
        if self.reader is not None:
            self.state |= self.reader.state(key_states, value_states)
        if self.ranker.gathers:
            self.state["gathered"] = key_states.new_zeros(*key_states.shape[:2], 0, dtype=torch.float32)
        if self.retain.caps_distance:
            self.state["born"] = key_states.new_zeros(*key_states.shape[:2], 0, dtype=torch.int32)

    def _new_slots(self, new: New, dec_BKT: Tensor, order_BT: Tensor) -> tuple[Tensor, Tensor]:
        return new.turn(new.key_BKTH), new.value_BKTV

    def _expiry(self, old: Slots, dec_BKT: Tensor, order_BT: Tensor, count_B: Tensor) -> tuple[Slots, Tensor]:
        return old, torch.full(dec_BKT.shape, NEVER, dtype=torch.int32, device=dec_BKT.device)

    def add(self, new: New) -> PagedLayer | Chunk:
        seen = super().add(new)
        if self.rehearsing:
            self.seen -= new.key_BKTH.shape[2]
        return seen

    def _add_token(self, new: New, dec_BK: Tensor) -> None:
        self._write(self.lengths, new.turn(new.key_BKTH)[:, :, 0], new.value_BKTV[:, :, 0])
        self.lengths.add_(1)

    def _add_step(self, new: New) -> None:
        super()._add_step(new)
        if self.reader is not None:
            came = torch.ones_like(self.tokens, dtype=torch.bool) if new.real_BT is None else new.real_BT[:, 0]
            self.reader.note(self, came)
        if not self.ranker.while_decoding:
            return
        assert new.queries is not None
        if self.retain.caps_distance:
            slots = self.slots()
            newest = torch.arange(len(slots), device=self.device) == (self.lengths - 1)[..., None]
            newest = newest if new.real_BT is None else newest & new.real_BT[:, :, None]
            self._write_beside("born", torch.where(newest, (self.tokens - 1)[:, None, None], slots.born_BKS))
        if self.ranker.gathers:
            self._write_beside("gathered", self.ranker.gather(self._ranking(self.slots(), new.queries)))
        self._unasked -= 1
        if self._unasked > 0:
            return
        over_B = self._over(self.lengths)
        self._unasked = int(-over_B.max()) // max(1, len(self._sharing))
        if self._unasked <= 0:
            slots = self.slots()
            keep = self._keep(self._ranking(slots, new.queries)) | (over_B < 0)[:, None, None]
            self._store(self._without(slots, keep, new.shift, of_prompt=False))

    def _left(self, slots: Slots, new: New) -> Slots:
        assert new.queries is not None
        self._unasked, self.whole_B = 0, None
        slots = slots.live(self.tokens - 1)
        if self.ranker.rehearses and not self.rehearsing:
            return slots
        ranking, count_B = self._ranking(slots, new.queries), new.queries.count_B
        whole_B = count_B <= 1
        if self.ranker.gathers:
            gathered = self.ranker.gather(ranking)
            if not self.ranker.while_decoding:
                gathered = torch.where(whole_B[:, None, None], ranking.gathered_BKS, gathered)
            slots = replace(slots, gathered_BKS=gathered)
        if self.ranker.while_decoding:
            whole_B = whole_B & ((count_B == 0) | (self._over(ranking.count_BK) < 0))
        if self.rehearsing:
            slots = self._without_newest(slots, count_B)
        self.whole_B = whole_B if bool(whole_B.any()) else None
        self.shift = new.shift
        left = self._without(slots, self._keep(self._ranking(slots, new.queries)), new.shift)
        if self.claim is None:
            self._end_pass()
        return left

    def _end_pass(self) -> None:
        self.claim = self.whole_B = None
        self.shift = None  # it knows the model, which copies of a cache are not to take along

    def _over(self, lengths_BK: Tensor) -> Tensor:
        """[B]: slots beyond the budget and a page per head, of all heads that share."""
        heads = len(self._sharing)
        return lengths_BK[:, self._sharing].sum(-1) - heads * (self._budget() + self.retain.page)

    def _without_newest(self, slots: Slots, count_B: Tensor) -> Slots:
        """`slots` without those of the newest tokens, which are not counted any more."""
        lengths_BK1 = (slots.expires_BKS > 0).sum(-1, keepdim=True) - count_B[:, None, None]
        self._set("tokens", self.tokens - count_B.int())
        slots = slots.cut(0, max(1, int(lengths_BK1.max())))
        gone = torch.arange(len(slots), device=self.device) >= lengths_BK1
        return replace(slots, expires_BKS=slots.expires_BKS.masked_fill(gone, -1))

    def _without(self, slots: Slots, keep_BKS: Tensor, shift: Shift | None, of_prompt: bool = True) -> Slots:
        """`slots`, where those that are not kept expire, merged into others or closed up as the plan says."""
        goes = (slots.expires_BKS > (self.tokens - 1)[:, None, None]) & ~keep_BKS
        merge = self.merge
        if merge is not None and (merge.of_prompts or not of_prompt) and bool(goes.any()):
            into = keep_BKS & ~goes & (slots.expires_BKS > 0)
            into[..., : self.retain.sinks] = False
            if merge.counts and slots.more_BKS is None:  # the first tokens
                slots = replace(slots, more_BKS=torch.zeros_like(slots.expires_BKS, dtype=torch.float32))
            slots = merge.fold(slots, goes, into, self.tokens)
        if self.retain.positions == "cache" and bool(goes.any()):
            assert shift is not None
            behind = goes.flip(-1).cumsum(-1).flip(-1)
            slots = replace(slots, key_BKSH=shift(slots.key_BKSH, behind))
        return replace(slots, expires_BKS=slots.expires_BKS.masked_fill(~keep_BKS, -1))

    def _budget(self) -> Tensor:
        """[B] slots per head of this layer."""
        return self._by_head().float().mean(-1).long()

    def _by_head(self) -> Tensor:
        """[B, K] slots of each head of this layer; [B, 1] where all are given as many."""
        K = len(self.retain.shares) or 1
        slots = [(self.retain.slots_by_head(tokens) * K)[:K] for tokens in self.tokens.tolist()]
        return torch.tensor(slots, device=self.device)

    def _ranking(self, slots: Slots, queries: Queries) -> Ranking:
        retain = self.retain
        count = (slots.expires_BKS > (self.tokens - 1)[:, None, None]).sum(-1)
        if self.ranker.gathers and slots.gathered_BKS is None:
            slots = replace(slots, gathered_BKS=torch.zeros_like(slots.expires_BKS, dtype=torch.float32))
        slots_BK = self._by_head()
        newest = (self.ranker.newest * slots_BK).long().clamp_min(retain.window or 0)
        if self.whole_B is not None:
            newest = newest.masked_fill(self.whole_B[:, None], NEVER)
        return Ranking(
            slots=slots, count_BK=count, queries=queries, observe=retain.observe, pool=retain.pool,
            sinks=retain.protected, tokens_B=self.tokens, slots_BK=slots_BK, newest_BK=newest,
        )  # fmt: skip

    def _keep(self, ranking: Ranking) -> Tensor:
        """[B, K, S]: which slots stay."""
        score, keep = ranking.ranked(self.ranker.score(ranking))[:, self._sharing], ranking.there_BKS.clone()
        slots_B = ranking.slots_BK[:, 0]
        if self.retain.shares:
            mine = self._or_whole((rank(score) < ranking.slots_BK[..., None]) & keep, score)
        elif not isinstance(self.budget, OverLayers):
            mine = self._or_whole(self.budget.keep(score, slots_B), score)
        else:
            opened = (ranking.there_BKS & ~ranking.stays_BKS)[:, self._sharing]
            self.claim = Claim(
                score_BKS=score, open_BKS=opened, measure_B=self.budget.measure(ranking),
                mass_B=score.masked_fill(~opened, 0.0).sum((1, 2)),
            )  # fmt: skip
            always_B = (ranking.there_BKS & ranking.stays_BKS)[:, self._sharing].sum(-1).amax(-1)
            given_B = self._divided(slots_B - always_B, always_B)
            mine = self._or_whole(self.budget.keep(score, always_B + given_B), score)
            self.claim = self.claim.of(mine)
            if self is self.peers[-1]:
                for peer in self.peers:
                    peer._end_pass()
        keep[:, self._sharing] = mine
        return keep

    def _or_whole(self, keep_BKS: Tensor, score_BKS: Tensor) -> Tensor:
        """`keep_BKS`, and all slots of the sequences of which none leaves."""
        if self.whole_B is None:
            return keep_BKS
        return keep_BKS | ((score_BKS > -torch.inf) & self.whole_B[:, None, None])

    def _divided(self, open_B: Tensor, always_B: Tensor) -> Tensor:
        """[B]: open slots per head of this layer. Those before it give back what it takes from them.

        Args:
            open_B: slots per head and layer, on average, beyond the `always_B` that always stay.
        """
        there = self.peers[: 1 + next(i for i, peer in enumerate(self.peers) if peer is self)]
        claims = [peer.claim for peer in there if peer.claim is not None]
        to_come = (len(self.peers) - len(there)) * claims[-1].heads
        slots_B = open_B.clamp_min(0) * (sum(claim.heads for claim in claims) + to_come)
        assert isinstance(self.budget, OverLayers)
        given_BL = self.budget.divide(claims, slots_B)
        for peer, given_B in zip(there[:-1], given_BL.unbind(-1), strict=False):
            peer._give_back(always_B + given_B)
        return given_BL[:, -1]

    def _give_back(self, slots_B: Tensor) -> None:
        """Keep so many of the slots that are there, by the scores of this pass."""
        assert self.claim is not None
        slots = self.slots()
        keep = slots.expires_BKS > 0
        mine = self._or_whole(self.budget.keep(self.claim.score_BKS, slots_B), self.claim.score_BKS)
        keep[:, self._sharing, : mine.shape[2]] = mine  # heads that keep everything may reach further than these
        if bool((self.claim.open_BKS & ~mine).any()):
            self._store(self._without(slots, keep, self.shift))
            self.claim = self.claim.of(mine)

    def slots(self) -> Slots:
        slots = super().slots()
        if "more" in self.state:
            at = torch.arange(len(slots), device=self.device) == self.retain.sinks
            slots = replace(slots, more_BKS=self.state["more"][..., None] * at)
        for name in ("gathered", "born"):
            if name in self.state:
                beside = self.state[name][..., : len(slots)]
                missing = len(slots) - beside.shape[2]  # of a token that was just written
                slots = replace(slots, **{f"{name}_BKS": torch.nn.functional.pad(beside, (0, missing))})
        return slots

    def _store(self, slots: Slots) -> Slots:
        slots = super()._store(slots)
        if self.reader is not None:
            self.reader.note(self)
        if slots.more_BKS is not None and len(slots) > self.retain.sinks:
            self._set("more", slots.more_BKS[..., self.retain.sinks])
        gone = slots.expires_BKS < 0  # behind the slots of short rows, where new ones will be
        if slots.gathered_BKS is not None:
            self._write_beside("gathered", slots.gathered_BKS.masked_fill(gone, 0.0))
        if "born" in self.state:
            self._write_beside("born", slots.born_BKS.masked_fill(gone, 0))
        return slots

    def chosen(self, query_BN1H: Tensor, kv_of_query: Tensor | None, scale: float) -> PagedLayer | Few:
        if self.reader is None:
            return self
        N, K = query_BN1H.shape[1], self.lengths.shape[1]
        heads = torch.arange(N, device=self.device) * K // N if kv_of_query is None else kv_of_query
        always = self.retain.sinks + (self.retain.window or 0)
        slots_BK = torch.ceil(self.lengths / self.retain.read_ratio).int().clamp_min(always)
        found = self.reader.choose(self, Query(query_BN1H[:, :, 0].detach().float(), heads, slots_BK, scale))
        if isinstance(found, Few):
            return found
        few = copy.copy(self)
        few.state = {**self.state, "tables": found[0], "lengths": found[1]}
        return few

    def heavy(self) -> tuple[int, Tensor] | None:
        return (self.retain.sinks, self.state["more"]) if "more" in self.state else None

    def _write_beside(self, name: str, x_BKS: Tensor) -> None:
        width = self.tables.shape[2] * self.retain.page
        self._set(name, torch.nn.functional.pad(x_BKS, (0, width - x_BKS.shape[2])))


def join(layers: Iterable[Any]) -> None:
    """Let those layers of one cache know each other that share a budget over layers: all options are the same."""
    groups: dict[Ranked, list[RankedLayer]] = {}
    for layer in layers:
        if isinstance(layer, RankedLayer) and isinstance(layer.budget, OverLayers):
            groups.setdefault(replace(layer.retain, depth=0.0, whole=()), []).append(layer)
    for group in groups.values():
        for layer in group:
            layer.peers = group
