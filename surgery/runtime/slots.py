"""What goes into a paged cache, and what attention of several tokens at once sees of it.

`order` counts the tokens before one in its sequence, padding left out. Every slot has an order at which it expires:
that rules the masks of a chunk, and what stays of it, for both methods alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .queries import Queries

NEVER = 2**31 - 1
Shift = Callable[[Tensor, Tensor], Tensor]
"""Turns rotated keys [B, K, S, H] onwards by so many positions [B, K, S]."""


@dataclass(frozen=True, kw_only=True)
class New:
    """New tokens of one layer, on their way into its cache."""

    key_BKTH: Tensor
    """Before any rotation."""
    value_BKTV: Tensor
    logits_BKT: Tensor
    """Of the gate: above 0 where a token is to be dropped (`dms`) or merged (`dmc`)."""
    weight_BKT: Tensor | None
    """float32, above 0: of each token in its slot (`dmc`)."""
    real_BT: Tensor | None
    """False at padding; None where there is none."""
    turn: Callable[[Tensor], Tensor]
    """Rotates keys [B, K, T, H] to the positions of these tokens, as attention reads them."""
    shift: Shift | None = None
    """Where slots move when others leave."""
    queries: Queries | None = None
    """Where slots leave by a rank."""
    angles: tuple[Tensor, Tensor, bool, int] | None = None
    """cos and sin [B or 1, T, F], whether pairs are interleaved, and the first channel that turns, for operators that
    rotate keys themselves; None where `turn` does more than that."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Slots side by side. A query of order s (tokens before it in its sequence) sees those of which s < expires."""

    key_BKSH: Tensor
    value_BKSV: Tensor
    expires_BKS: Tensor
    """int32; `NEVER` where no query to come is denied the slot, at most 0 where there is none (padding)."""
    born_BKS: Tensor
    """int32: order of the token that the slot holds; -1 where nobody asks any more."""
    gathered_BKS: Tensor | None = None
    """float32: what a score has gathered of each slot so far (`Ranked`)."""
    more_BKS: Tensor | None = None
    """float32: tokens that a slot stands for beside its own, for all of which it counts in attention; None: none."""
    key_rows_BKSR: Tensor | None = None
    """uint8: what pages of codes hold of the keys; None where pages hold them as they are."""
    value_rows_BKSR: Tensor | None = None

    def __len__(self) -> int:
        return self.key_BKSH.shape[2]

    def cut(self, begin: int, end: int) -> Slots:
        """A stretch of them."""
        return self._each(lambda t: t[:, :, begin:end])

    def and_(self, other: Slots) -> Slots:
        """These and those behind them, of which a score has gathered nothing yet, and which stand for themselves."""
        if len(self) == 0:
            return other
        nothing = torch.zeros_like(other.born_BKS, dtype=torch.float32)
        both = {
            name: (t, nothing if getattr(other, name) is None else getattr(other, name))
            for name, t in vars(self).items()
            if t is not None
        }
        return Slots(**{name: torch.cat(pair, dim=2) for name, pair in both.items()})

    def live(self, last_B: Tensor) -> Slots:
        """Without those that queries of order `last_B` and later do not see; rows stay in order, live slots first."""
        dead = self.expires_BKS <= last_B[:, None, None]
        if not bool(dead.any()):
            return self
        longest = int((~dead).sum(-1).max())
        index = torch.argsort(dead, dim=-1, stable=True)[..., :longest]
        return self._each(lambda t: t.gather(2, index) if t.ndim == 3 else pick(t, index))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Slots:
        return Slots(**{name: function(t) for name, t in vars(self).items() if t is not None})


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What several new tokens attend to: slots of before, and their own."""

    old: Slots
    new: Slots
    order_BT: Tensor
    """int32: tokens before each query in its sequence."""
    new_order_BT: Tensor
    """The same of the new slots."""
    real_BT: Tensor | None
    """False at padding; None where there is none."""
    in_step: bool
    """Slot t is that of query t. Otherwise (padding behind tokens) slots stand later than queries."""


def pick(x_BKSH: Tensor, index_BKT: Tensor) -> Tensor:
    """[B, K, T, H]: the slots of each row that `index_BKT` names."""
    B, K, S, H = x_BKSH.shape
    rows = torch.arange(B * K, device=x_BKSH.device).view(B, K, 1) * S  # whole rows: faster than gather by element
    return x_BKSH.reshape(B * K * S, H).index_select(0, (rows + index_BKT).flatten()).view(*index_BKT.shape, H)
