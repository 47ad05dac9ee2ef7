"""Retain axis: slots leave by the rank that a score gives them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from .budgets import BUDGETS
from .coded_rows import has_rows
from .merging import MERGES
from .project import Latent, Project
from .rankers import RANKERS
from .reading import READERS
from .retained import AHEAD, Retain, table_width, unknown_name
from .site import AttentionSite
from .store import Codec, Store


@dataclass(frozen=True, kw_only=True)
class Ranked(Retain):
    """A score that nothing was trained for orders the slots of a layer, and a budget keeps the best ones.

    After several tokens came at once, and attended to all that was there, a head keeps `slots_at(tokens seen)` slots on
    average. Keys stay rotated as they were, to the positions of their tokens, unless `positions` says otherwise. While
    tokens come one by one, scores that follow decoding keep to the budget of the tokens seen, evicting when a head
    holds a page more than that on average; others keep all of them until several come at once again. A sequence that
    gets one token, or none, where others of its batch get several, is treated as it would be alone.
    """

    scorer: str
    """Name in `rankers.RANKERS`."""
    budget: str = "uniform"
    """Name in `budgets.BUDGETS`."""
    slots: int | None = None
    """Slots per head, on average, whatever the length; None: as many as `ratio` leaves."""
    whole: tuple[int, ...] = ()
    """KV heads of this layer that keep all of their tokens; the budget is that of the others."""
    part: float = 0.0
    """Part of the KV heads of all layers that will keep all of theirs, while nobody has found out which."""
    shares: tuple[float, ...] = ()
    """Of each KV head of this layer: slots beyond those that always stay, in units of the mean over all layers."""
    depth: float = 0.5
    """Of this layer among those that share a budget: 0 the first, 1 the last."""
    observe: int = 32
    """Newest queries that the score observes, where it observes some only."""
    pool: int = 5
    """Neighbours that share their scores, where the score pools; odd."""
    merge: str | None = None
    """Name in `merging.MERGES`: slots that leave are folded into others; None: they are dropped."""
    positions: Literal["text", "cache", "capped"] = "text"
    """`cache`: slots close up when others leave, so that distances are those in the cache, not in the text. `capped`:
    slots that lie more than `distance` tokens back are seen at that distance."""
    distance: int = 0
    separators: tuple[int, ...] = ()
    """Ids of the tokens that separate parts of the text, for scores that ask for them."""
    read: str | None = None
    """Name in `reading.READERS`: what a step of one token reads of the slots that are there; None: all."""
    read_ratio: float = 4.0
    """Slots that are there per slot that such a step reads."""
    kind: str = "ranked"

    @property
    def decided_by(self) -> str:
        return "rank"

    @property
    def is_fixed(self) -> bool:
        return self.slots is not None

    @property
    def reads_plain_queries(self) -> bool:
        return RANKERS[self.scorer].plain_queries

    @property
    def reads_separators(self) -> bool:
        """Whether what is kept depends on which tokens separate parts of the text."""
        return RANKERS[self.scorer].separators

    @property
    def moves_slots(self) -> bool:
        return self.positions == "cache"

    @property
    def turns_keys(self) -> bool:
        return self.positions != "text"

    @property
    def caps_distance(self) -> bool:
        """Whether slots know the order of their tokens, and none is seen further away than `distance`."""
        return self.positions == "capped"

    @property
    def waits_for_prompts(self) -> bool:
        return not RANKERS[self.scorer].while_decoding

    @property
    def protected(self) -> int:
        return self.sinks + self._counts

    @property
    def _counts(self) -> bool:
        """Whether the slot behind the sinks stays, for it stands for all that leave."""
        return self.merge is not None and MERGES[self.merge].counts

    @property
    def has_static(self) -> bool:
        return self.waits_for_prompts and not RANKERS[self.scorer].gathers and self.read is None

    @property
    def fills_evenly(self) -> bool:
        return BUDGETS[self.budget].even

    def slots_at(self, tokens: int) -> float:
        by_head = self.slots_by_head(tokens)
        return sum(by_head) / len(by_head)

    def slots_by_head(self, tokens: int) -> list[int]:
        """Slots of each KV head after `tokens` tokens where heads have `shares`; otherwise of any of them."""
        always = self.always_kept
        if tokens <= always:
            return [tokens]
        in_all = tokens / self.ratio if self.slots is None else self.slots
        mean, most = max(0.0, in_all - always), float(tokens - always)
        kept = BUDGETS[self.budget].of_layer(mean, most, self.depth)
        return [always + ceil(min(kept * share, most)) for share in self.shares or (1.0,)]

    def label(self) -> str:
        budget = "" if self.budget == "uniform" else f"{self.budget} "
        size = f"{self.ratio:.3g}x" if self.slots is None else f"{self.slots} slots"
        whole = f", all of heads {', '.join(map(str, self.whole))}" if self.whole else ""
        whole = f", all of {self.part:.0%} of the heads" if self.part else whole
        merge = "" if self.merge is None else f", {self.merge} merges"
        read = "" if self.read is None else f", {self.read} reads 1 of {self.read_ratio:.3g}"
        positions = {"text": "", "cache": ", positions in the cache", "capped": f", seen at most {self.distance} away"}[
            self.positions
        ]
        return f"{budget}{self.scorer} {size}{merge}{positions}{read}{whole}"

    def supports(self, site: AttentionSite) -> str | None:
        if self.reads_plain_queries and site.q_norm is not None and site.q_norm.after_rotary:
            return f"its queries are normed behind their rotation, and {self.scorer} turns means of them. Use snapkv."
        if RANKERS[self.scorer].rehearses and site.rotary is None:
            return f"{self.scorer} reads prompts again, at positions behind them, which it may not have. Use snapkv."
        if self.turns_keys and site.k_norm is not None and site.k_norm.after_rotary:
            return "its keys are normed behind their rotation, and cannot be turned further. Use positions: text."
        if self.turns_keys and site.rotary is not None and site.rotary.axes is not None:
            return f"a token has several positions, and positions: {self.positions} turns by one. Use positions: text."
        capped = site.softcap is not None or site.sinks is not None
        if self.read is not None and READERS[self.read].plain and capped:
            return f"its scores are capped or have sinks, of which {self.read} knows nothing. Use read: quest."
        if self.caps_distance and site.rotary is None:
            return "its scores know no distance that could be capped. Use positions: text."
        return super().supports(site)

    def supports_project(self, project: Project) -> str | None:
        if isinstance(project, Latent) and BUDGETS[self.budget].finds != "nothing":
            return f"{self.budget} tells KV heads apart, and the layer caches a latent for all of them. Use uniform."
        if self.reads_plain_queries and isinstance(project, Latent):
            return f"{self.scorer} turns queries of heads ahead, and the layer caches a latent. Use snapkv or h2o."
        widths = {width for width in project.entry(2)[1:] if width}
        if self.read is not None and (isinstance(project, Latent) or len(widths) > 1):
            return f"read: {self.read} asks for keys and values of heads, of one width. Leave the option out."
        if isinstance(project, Latent) and (self.merge is not None or self.turns_keys):
            option = f"merge: {self.merge} folds" if self.merge is not None else f"positions: {self.positions} turns"
            return f"{option} keys and values, and the layer caches a latent. Leave the option out."
        return super().supports_project(project)

    def supports_store(self, store: Store) -> str | None:
        if not isinstance(store, Codec):
            return super().supports_store(store)
        if store.k_channels is not None:
            return "its slots leave one by one, each a whole key, and think leaves channels out. Leave think out."
        if not has_rows(store):
            return (
                f"its slots leave one by one, and {store.label()} packs several tokens together, or keys before their "
                "rotation. Use the codec int8, fp8, fp16, int4 or turbo."
            )
        if self.read is not None:
            return f"read: {self.read} asks for slots as numbers, and pages hold codes. Leave the option out."
        if self.moves_slots or self.merge is not None:
            option = "positions: cache turns keys" if self.moves_slots else f"merge: {self.merge} changes slots"
            return f"{option} when slots leave, and codes would be rounded each time. Leave the option out."
        return None

    def newest_bytes(self, width: int, itemsize: int) -> int:
        return 0

    def static_pages(self, tokens: int, heads: int, ratio: float | None = None) -> int:
        """As of others, but for all tokens where no ratio is given: how many will be decoded, and stay, nobody knows.

        Raises:
            ValueError: slots leave while tokens are decoded.
        """
        if not self.has_static:
            if not self.waits_for_prompts:
                why = "slots leave while tokens are decoded, which no step of a static cache does"
            elif self.read is not None:
                why = "a step of a static cache does not ask which slots to read"
            else:
                why = "prompts are read twice, and no static cache has room for that"
            raise ValueError(f"{self.label()}: {why}. Use a dynamic cache (cache_implementation='dynamic').")
        if self.slots is not None:
            return replace(self, slots=None).static_pages(tokens, heads, ratio)
        return super().static_pages(tokens, heads, ratio or 1.0)

    def bytes_at(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        if self.shares:
            each = [ceil((slots + AHEAD) / self.page) for slots in self.slots_by_head(tokens)]
            in_all = sum(each) * heads / len(each)
            return self.bytes_of_pages(in_all, table_width(max(each)), heads, width, itemsize)
        pages, whole, count = self.pages_at(tokens), ceil((tokens + AHEAD) / self.page), self._whole_of(heads)
        table = table_width(max(pages, whole) if count else pages)
        return self.bytes_of_pages(pages * (heads - count) + whole * count, table, heads, width, itemsize)

    def _whole_of(self, heads: int) -> float:
        """Of so many KV heads those that keep all of their tokens, as far as is known."""
        return self.part * heads or len(self.whole)

    def ratio_of(self, heads: int) -> float:
        whole, share = self._whole_of(heads) / max(1, heads), sum(self.shares or (1.0,)) / len(self.shares or (1.0,))
        return 1 / (whole + (1 - whole) * share / self.ratio)

    def bytes_of_pages(self, pages: float, table: int, heads: int, width: int, itemsize: int) -> int:
        gathered = 4 * heads * table * self.page * (RANKERS[self.scorer].gathers + self.caps_distance)
        more = 4 * heads if self._counts else 0
        if self.read is not None:
            more += READERS[self.read].bytes_beside(table, heads, width // 2, itemsize)
        return super().bytes_of_pages(pages, table, heads, width, itemsize) + gathered + more

    def unknown(self) -> str | None:
        merge = None if self.merge is None else unknown_name("merging", self.merge, MERGES)
        merge = merge or (None if self.read is None else unknown_name("reading", self.read, READERS))
        return unknown_name("score", self.scorer, RANKERS) or unknown_name("budget", self.budget, BUDGETS) or merge
