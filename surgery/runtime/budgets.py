"""How many slots each layer and KV head keeps, and which, once all have a score."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Budget(Protocol):
    """One rule: slots are shared out over layers, then over the heads of a layer. By itself it gives all as many."""

    describes: str
    """What is shared out, and the source, for people."""
    even: bool = True
    """Whether all heads of a layer keep the same number."""

    def of_layer(self, mean: float, most: float, depth: float) -> float:
        """Slots per head of a layer beyond those that always stay.

        Args:
            mean: over all layers.
            most: tokens that there are.
            depth: 0 in the first of the layers that share, 1 in the last.
        """
        return mean

    def keep(self, score_BKS: Tensor, slots_B: Tensor) -> Tensor:
        """[B, K, S] bool: which slots stay.

        Args:
            score_BKS: infinite where a slot must stay, -infinite where there is none.
            slots_B: slots per head of this layer.
        """
        return (rank(score_BKS) < slots_B[:, None, None]) & (score_BKS > -torch.inf)


class Uniform(Budget):
    """Every head of every layer keeps the same number."""

    describes = "every head keeps as many"


class Pyramid(Budget):
    """Layers keep fewer slots the later they are: the first 1.95 times the mean, the last a twentieth of it.

    Slots that always stay are not shared out, and no layer is given more than there are tokens: what the first ones
    cannot take goes to the last, as in the authors' code.
    """

    describes = "later layers keep fewer, falling linearly (PyramidKV, arXiv:2406.02069)"
    steepness = 20

    def of_layer(self, mean: float, most: float, depth: float) -> float:
        first = min(2 * mean - mean / self.steepness, most)
        return first + (2 * (mean - first)) * depth


class Ada(Budget):
    """The heads of a layer share their slots: the best of all heads stay, and of each head a fifth of its share."""

    describes = "heads of a layer share their slots, a fifth of them safe for each (Ada-KV, arXiv:2407.11550)"
    even = False
    safe = 0.2

    def keep(self, score_BKS: Tensor, slots_B: Tensor) -> Tensor:
        there, heads = score_BKS > -torch.inf, score_BKS.shape[1]
        safe_B = (self.safe * slots_B).long().clamp_min(1)
        score = score_BKS.masked_fill((rank(score_BKS) < safe_B[:, None, None]) & there, torch.inf)
        best = rank(score.flatten(1)) < (heads * slots_B)[:, None]
        return best.view_as(score) & there


def rank(score: Tensor) -> Tensor:
    """Place of each entry of the last dimension by its score, from the largest; of equal ones the first comes first."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )


BUDGETS: dict[str, Budget] = {"uniform": Uniform(), "pyramid": Pyramid(), "ada": Ada()}
"""Name in recipes and plans -> rule."""
