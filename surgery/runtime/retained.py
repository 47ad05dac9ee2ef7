"""What all values of the retain axis share: who keeps a slot, and how many pages that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from .project import Project
from .site import AttentionSite
from .store import Store

AHEAD = 4
"""Slots for which a paged cache takes pages before they are needed: lengths are read from the device less often."""
TABLE_STEP = 8
"""Block tables of paged caches widen by so many pages at once."""
MARGIN = 0.1
"""Slots beyond those of the planned ratio that a static cache has room for."""


@dataclass(frozen=True, kw_only=True)
class Retain:
    """What the values of the axis share; decisions are counted from the first token of a sequence.

    `retain.RETAINS` names each class by its `kind`, `caches.CACHE_LAYERS` the cache layer that holds it.
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
        """What makes the decisions: `adapter`, `mlp`, `borrowed`, `head` or `score` (see `gates.py`), or `rank`: there
        are none, and the slots that stay are chosen from those that are there (`Ranked`)."""
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
    def turns_keys(self) -> bool:
        """Whether keys that are rotated are turned further, to other positions than those of their tokens."""
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
        return None

    def supports_store(self, store: Store) -> str | None:
        """Why pages cannot hold slots in a format that is not dense; None where they can."""
        name = store.label() or store.kind
        return f"its tokens are averaged or leave, and its pages hold plain numbers, not {name}. Evict by a rank."

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


def unknown_name(what: str, name: str, known: Mapping[str, object]) -> str | None:
    """What to say of a name that a registry has not; None where it has it."""
    return None if name in known else f"the {what} {name!r}, which is not known here. Known: {', '.join(known)}."


def table_width(pages: float) -> int:
    """Entries of a block table that has room for `pages`."""
    return ceil(pages / TABLE_STEP) * TABLE_STEP
