"""Retain axis: which tokens keep a slot of their own in the cache, decided per token and KV head, or latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from .budgets import BUDGETS
from .merging import MERGES
from .project import Latent, Project
from .rankers import RANKERS
from .scorers import SCORERS
from .site import AttentionSite

AHEAD = 4
"""Slots for which a paged cache takes pages before they are needed: lengths are read from the device less often."""
TABLE_STEP = 8
"""Block tables of paged caches widen by so many pages at once."""
MARGIN = 0.1
"""Slots beyond those of the planned ratio that a static cache has room for."""


@dataclass(frozen=True, kw_only=True)
class Retain:
    """What the values of the axis share; decisions are counted from the first token of a sequence.

    `RETAINS` names each class by its `kind`, `caches.CACHE_LAYERS` the cache layer that holds it.
    """

    ratio: float
    """Tokens seen per slot kept, at the length that was trained on or calibrated for; what plans predict with."""
    window: int | None
    """Newest tokens that are never dropped, the query's own included; of `Pool`, newest tokens of the open run that
    its slot is the mean of, None for all."""
    sinks: int = 4
    """First tokens of a sequence that are never dropped or averaged, nor averaged into."""
    page: int = 16
    """Slots per page of the cache."""
    kind: str = ""

    @property
    def decided_by(self) -> str:
        """What makes the decisions: `adapter`, `borrowed` or `score` (see `gates.py`), or `rank`: there are none, and
        the slots that stay are chosen from those that are there (`Ranked`)."""
        raise NotImplementedError

    @property
    def reads_plain_queries(self) -> bool:
        """Whether what is kept depends on queries before their rotation."""
        return False

    @property
    def moves_slots(self) -> bool:
        """Whether slots are turned to other positions when some before them have left."""
        return False

    @property
    def waits_for_prompts(self) -> bool:
        """Whether tokens leave only after several came at once."""
        return False

    def unknown(self) -> str | None:
        """What the value names that no registry has, with what there is; None where all is known."""
        return None

    @property
    def averages(self) -> bool:
        """Whether tokens are averaged into the slot before them, rather than dropped."""
        return False

    @property
    def is_trained(self) -> bool:
        """Whether training can teach a gate its ratio."""
        return False

    @property
    def is_fixed(self) -> bool:
        """Whether the number of slots is known from the number of tokens alone."""
        return False

    @property
    def protected(self) -> int:
        """First tokens of a sequence whose decision is 0 whatever the gate says: the first token has no slot before
        it, and the one after the sinks would be averaged into the last of them."""
        return self.sinks + 1 if self.averages else max(1, self.sinks)

    @property
    def always_kept(self) -> int:
        """Tokens of any sequence that keep a slot of their own whatever the gate says, the window included."""
        return self.protected if self.averages else self.protected + (self.window or 0)

    @property
    def has_static(self) -> bool:
        """Whether a static cache can hold its slots."""
        return True

    @property
    def fills_evenly(self) -> bool:
        """Whether heads hold the same number of slots, known from the number of tokens alone."""
        return self.is_fixed

    def slots_at(self, tokens: int) -> float:
        """Slots that a KV head is expected to hold after `tokens` tokens."""
        kept = float(min(tokens, self.always_kept))
        return kept if self.is_fixed else max(tokens / self.ratio, kept)

    def drop_rate(self, tokens: int, ratio: float) -> float:
        """Part of the decisions to be 1 for `tokens` tokens to take `tokens / ratio` slots; above 1 where none can."""
        return (tokens - tokens / ratio) / max(tokens - self.always_kept, 1e-9)

    def label(self) -> str:
        """Kind, ratio and window."""
        window = "" if self.window is None else f" window {self.window}"
        return f"{self.kind} {self.ratio:.3g}x{window}"

    def supports(self, site: AttentionSite) -> str | None:
        """Why tokens of this attention cannot be averaged or dropped; None where they can."""
        if site.window is not None:
            return (
                f"it sees the newest {site.window} tokens only, and its cache is bounded already. Select the other "
                "layers."
            )
        if site.sees_ahead:
            return "its tokens of an image see later ones, and slots are filled in the order of the text."
        if site.alibi_slopes is not None:
            return "ALiBi asks for the position of every slot at every step, which a paged cache does not keep."
        if site.rotary is not None and site.rotary.length_dependent:
            return "its rotation changes with the length, and slots are rotated once."
        return None

    def supports_project(self, project: Project) -> str | None:
        """Why tokens that are cached in this form cannot be averaged or dropped; None where they can."""
        if isinstance(project, Latent) and self.decided_by == "borrowed":
            return (
                "a borrowed channel is the last one of each key and its queries, and a latent is no key: all channels "
                "of it make K and V of every head. Use `gate: adapter`."
            )
        return None

    def newest_bytes(self, width: int, itemsize: int) -> int:
        """Bytes per KV head of what is kept of the newest tokens beside their slots."""
        return 4 * (self.window or 0)

    def bytes_at(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        """Expected bytes of a dynamic cache of one sequence after `tokens` tokens.

        Args:
            heads: KV heads, or 1 for a latent.
            width: numbers of a key and a value together, of `itemsize` bytes each.
        """
        pages = self.pages_at(tokens)
        return self.bytes_of_pages(pages * heads, table_width(pages), heads, width, itemsize)

    def pages_at(self, tokens: int) -> float:
        """Pages of a KV head after `tokens` tokens, as far as they can be foretold."""
        slots = self.slots_at(tokens)
        # The last page of a head is half empty on average; known where the gate leaves no choice.
        known = slots >= tokens or self.fills_evenly
        return ceil((slots + AHEAD) / self.page) if known else (slots + AHEAD + (self.page - 1) / 2) / self.page

    def ratio_of(self, heads: int) -> float:
        """Tokens seen per slot kept in a layer of so many KV heads, or one latent."""
        return self.ratio

    def bytes_of_pages(self, pages: float, table: int, heads: int, width: int, itemsize: int) -> int:
        """Bytes of one sequence with so many pages in all, and tables with `table` entries per KV head."""
        lengths_and_table, tokens = 8 + 4 * table, 4
        slots = round(pages * self.page * width * itemsize)
        return slots + heads * (self.newest_bytes(width, itemsize) + lengths_and_table) + tokens

    def static_pages(self, tokens: int, heads: int, ratio: float | None = None) -> int:
        """Pages that one sequence of `tokens` tokens gets in a static cache; `ratio` in the place of the planned."""
        sized = self if ratio is None else replace(self, ratio=ratio)
        slots = min(sized.slots_at(tokens) * (1 + MARGIN), tokens) + AHEAD
        return heads * (ceil(slots / self.page) + 1)

    def static_bytes(self, tokens: int, heads: int, width: int, itemsize: int, ratio: float | None = None) -> int:
        """Bytes that a static cache allocates at once for one sequence of `tokens` tokens, its share of the pool."""
        pages = self.static_pages(tokens, heads, ratio)
        return 4 * pages + self.bytes_of_pages(pages, self.static_table(tokens), heads, width, itemsize)

    def static_table(self, tokens: int) -> int:
        """Entries of a block table that has room for `tokens` tokens, should all of them stay."""
        return ceil((tokens + AHEAD) / self.page)


@dataclass(frozen=True, kw_only=True)
class Trained(Retain):
    """What the values share whose decisions a trained gate makes."""

    gate: Literal["adapter", "borrowed"] = "adapter"
    """`adapter`: a linear map of the layer's input; `borrowed`: the last channel of q and k."""
    gain: float = 30.0
    """Factor on the adapter's output."""
    offset: float = -5.0
    """Logit of an untrained gate: the decision is 1 where the logit is above 0."""

    @property
    def is_trained(self) -> bool:
        return True

    @property
    def decided_by(self) -> str:
        return self.gate


@dataclass(frozen=True, kw_only=True)
class Gate(Trained):
    """A trained gate drops tokens: one whose own decision is 1 goes once it is `window` tokens old.

    Source: Dynamic Memory Sparsification, arXiv:2506.05345.
    """

    kind: str = "dms"


@dataclass(frozen=True, kw_only=True)
class Pool(Trained):
    """A trained gate averages tokens: one whose decision is 1 goes into the slot before it.

    The key of a slot is rotated at the position of its newest token.

    Source: Dynamic Memory Compression, arXiv:2403.09636.
    """

    kind: str = "dmc"

    @property
    def averages(self) -> bool:
        return True

    def supports_project(self, project: Project) -> str | None:
        if isinstance(project, Latent) and project.keeps_positions:
            return (
                "K is rotated at read by the position that lies beside each latent, and a slot of several tokens would "
                "hold the mean of their positions. Use dms, or mla in the place of lowrank."
            )
        return super().supports_project(project)

    def newest_bytes(self, width: int, itemsize: int) -> int:
        """The open run: its running sum and weight, or the terms of its newest tokens."""
        return 4 * (width + 1) if self.window is None else self.window * (width * itemsize + 4)


@dataclass(frozen=True, kw_only=True)
class Evict(Retain):
    """A score that nothing was trained for drops tokens once they are `window` tokens old."""

    scorer: str
    """Name in `scorers.SCORERS`."""
    kind: str = "evict"

    @property
    def decided_by(self) -> str:
        return "score"

    @property
    def is_fixed(self) -> bool:
        """Where every token goes at the end of the window."""
        return self.scorer == "window"

    def label(self) -> str:
        return f"window {self.window}" if self.is_fixed else f"{self.scorer} {self.ratio:.3g}x window {self.window}"

    def unknown(self) -> str | None:
        return _unknown("score", self.scorer, SCORERS)


@dataclass(frozen=True, kw_only=True)
class Ranked(Retain):
    """A score that nothing was trained for orders the slots of a layer, and a budget keeps the best ones.

    After several tokens came at once, and attended to all that was there, a head keeps `slots_at(tokens seen)` slots on
    average. Keys stay rotated as they were, to the positions of their tokens, unless `positions` says otherwise. While
    tokens come one by one, scores that follow decoding keep to the budget of the tokens seen, evicting when a head
    holds a page more than that on average; others keep all of them until several come at once again.
    """

    scorer: str
    """Name in `rankers.RANKERS`."""
    budget: str = "uniform"
    """Name in `budgets.BUDGETS`."""
    slots: int | None = None
    """Slots per head, on average, whatever the length; None: as many as `ratio` leaves."""
    whole: tuple[int, ...] = ()
    """KV heads of this layer that keep all of their tokens; the budget is that of the others."""
    depth: float = 0.5
    """Of this layer among those that share a budget: 0 the first, 1 the last."""
    observe: int = 32
    """Newest queries that the score observes, where it observes some only."""
    pool: int = 5
    """Neighbours that share their scores, where the score pools; odd."""
    merge: str | None = None
    """Name in `merging.MERGES`: slots that leave are folded into others; None: they are dropped."""
    positions: Literal["text", "cache"] = "text"
    """`cache`: slots close up when others leave, so that distances are those in the cache, not in the text."""
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
    def moves_slots(self) -> bool:
        return self.positions == "cache"

    @property
    def waits_for_prompts(self) -> bool:
        return not RANKERS[self.scorer].while_decoding

    @property
    def protected(self) -> int:
        return self.sinks

    @property
    def has_static(self) -> bool:
        return self.waits_for_prompts and not RANKERS[self.scorer].gathers

    @property
    def fills_evenly(self) -> bool:
        return BUDGETS[self.budget].even

    def slots_at(self, tokens: int) -> float:
        always = self.always_kept
        if tokens <= always:
            return tokens
        in_all = tokens / self.ratio if self.slots is None else self.slots
        mean, most = max(0.0, in_all - always), float(tokens - always)
        kept = BUDGETS[self.budget].of_layer(mean, most, self.depth)
        return always + ceil(min(kept, most))

    def label(self) -> str:
        budget = "" if self.budget == "uniform" else f"{self.budget} "
        size = f"{self.ratio:.3g}x" if self.slots is None else f"{self.slots} slots"
        whole = f", all of heads {', '.join(map(str, self.whole))}" if self.whole else ""
        merge = "" if self.merge is None else f", {self.merge} merges"
        return f"{budget}{self.scorer} {size}{merge}{', positions in the cache' if self.moves_slots else ''}{whole}"

    def supports(self, site: AttentionSite) -> str | None:
        if self.reads_plain_queries and site.q_norm is not None and site.q_norm.after_rotary:
            return f"its queries are normed behind their rotation, and {self.scorer} turns means of them. Use snapkv."
        if RANKERS[self.scorer].rehearses and site.rotary is None:
            return f"{self.scorer} reads prompts again, at positions behind them, which it may not have. Use snapkv."
        if self.moves_slots and site.k_norm is not None and site.k_norm.after_rotary:
            return "its keys are normed behind their rotation, and cannot be turned further. Use positions: text."
        if self.moves_slots and site.rotary is not None and site.rotary.axes is not None:
            return "a token has several positions, which do not close up as one. Use positions: text."
        return super().supports(site)

    def supports_project(self, project: Project) -> str | None:
        if self.reads_plain_queries and isinstance(project, Latent):
            return f"{self.scorer} turns queries of heads ahead, and the layer caches a latent. Use snapkv or h2o."
        if isinstance(project, Latent) and (self.merge is not None or self.moves_slots):
            option = f"merge: {self.merge} folds" if self.merge is not None else "positions: cache turns"
            return f"{option} keys and values, and the layer caches a latent. Leave the option out."
        return super().supports_project(project)

    def newest_bytes(self, width: int, itemsize: int) -> int:
        return 0

    def static_pages(self, tokens: int, heads: int, ratio: float | None = None) -> int:
        """As of others, but for all tokens where no ratio is given: how many will be decoded, and stay, nobody knows.

        Raises:
            ValueError: slots leave while tokens are decoded.
        """
        if not self.has_static:
            why = (
                "prompts are read twice, and no static cache has room for that"
                if self.waits_for_prompts
                else "slots leave while tokens are decoded, which no step of a static cache does"
            )
            raise ValueError(f"{self.label()}: {why}. Use a dynamic cache (cache_implementation='dynamic').")
        if self.slots is not None:
            return replace(self, slots=None).static_pages(tokens, heads, ratio)
        return super().static_pages(tokens, heads, ratio or 1.0)

    def bytes_at(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        pages, whole = self.pages_at(tokens), ceil((tokens + AHEAD) / self.page)
        in_all = pages * (heads - len(self.whole)) + whole * len(self.whole)
        table = table_width(max(pages, whole) if self.whole else pages)
        return self.bytes_of_pages(in_all, table, heads, width, itemsize)

    def ratio_of(self, heads: int) -> float:
        whole = len(self.whole) / max(1, heads)
        return 1 / (whole + (1 - whole) / self.ratio)

    def bytes_of_pages(self, pages: float, table: int, heads: int, width: int, itemsize: int) -> int:
        gathered = 4 * heads * table * self.page if RANKERS[self.scorer].gathers else 0
        return super().bytes_of_pages(pages, table, heads, width, itemsize) + gathered

    def unknown(self) -> str | None:
        merge = None if self.merge is None else _unknown("merging", self.merge, MERGES)
        return _unknown("score", self.scorer, RANKERS) or _unknown("budget", self.budget, BUDGETS) or merge


def _unknown(what: str, name: str, known: Mapping[str, object]) -> str | None:
    return None if name in known else f"the {what} {name!r}, which is not known here. Known: {', '.join(known)}."


RETAINS: dict[str, type[Retain]] = {"dms": Gate, "dmc": Pool, "evict": Evict, "ranked": Ranked}
"""`kind` -> class of the value."""


def table_width(pages: float) -> int:
    """Entries of a block table that has room for `pages`."""
    return ceil(pages / TABLE_STEP) * TABLE_STEP
