"""Queries of new tokens, for scores of slots that read what attention pays to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Ahead(Protocol):
    """The mean rotation over positions to come."""

    def __call__(self, x_BNXH: Tensor, offsets: Sequence[int]) -> Tensor:
        """Turn `x_BNXH` by the mean rotation over positions behind the newest token of each sequence: 0 the next."""


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What the new tokens of one layer ask, as its attention asks it."""

    query_BNTH: Tensor
    """Rotated."""
    real_BT: Tensor | None
    """False at padding; None where there is none."""
    scale: float
    softcap: float | None = None
    sinks_N: Tensor | None = None
    """Logits of attention sinks, which take a part of the sum."""
    row_of_query: Tensor | None = None
    """[N] KV head of each query head where groups are unequal; None: groups of one size, side by side."""
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """From what slots hold, [B, 1, S, .] each, the K and V of several heads (latents)."""
    output_norms: Callable[[Tensor], Tensor] | None = None
    """From values [B, heads, S, V], for each query head, |W_o v|_1 [B, N, S]; None where nobody tells, as below."""
    plain_BNTH: Tensor | None = None
    """Before any rotation."""
    ahead: Ahead | None = None
    separators_BT: Tensor | None = None
    """Which of the tokens separate parts of the text; None where nobody asked, or their ids are not known."""
    pair_norms: Callable[[Tensor], Tensor] | None = None
    """From [..., H] the length of each pair of channels that turn together, and of each channel that does not turn."""

    def newest(self, x_BNTH: Tensor, count: int) -> Tensor:
        """The newest `count` tokens [B, N, count, H], in order; undefined before the first token of a sequence."""
        if self.real_BT is None:
            return x_BNTH[:, :, x_BNTH.shape[2] - count :]
        index = torch.argsort(self.real_BT.byte(), dim=-1, stable=True)[:, -count:]
        return x_BNTH.gather(2, index[:, None, :, None].expand(-1, x_BNTH.shape[1], -1, x_BNTH.shape[3]))

    @property
    def count_B(self) -> Tensor:
        """New tokens of each sequence, padding left out."""
        B, _, T, _ = self.query_BNTH.shape
        if self.real_BT is None:
            return torch.full((B,), T, device=self.query_BNTH.device)
        return self.real_BT.sum(-1)
