"""Channel masks of keys: each KV head keeps the channels where its queries and keys are largest in calibration text.

Source: ThinK (Xu et al., 2024), arXiv:2407.21018: a channel counts by the norm of its queries times that of its keys,
and packed tokens are without those that count least; a share of them is the same in all heads. Departures: masks are
chosen once, from calibration text, where ThinK chooses them in each prompt from its last 32 queries. Channels that turn
leave in rotary pairs, whose norms are those of no one position; the others leave two by two. Queries of all heads that
read a KV head count together; those of layers that read a shared cache do not, for they come after its owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.forward import project
from ...calibration.processes import total
from ...calibration.visit import Visit
from ...runtime.layout import Codec
from .samples import TOKENS, as_tables, back_of, behind_first, uniform_error


@dataclass(frozen=True, kw_only=True)
class KeyMask:
    """Of the keys of one layer."""

    letter: str = "k"
    mask_KH: Tensor

    def tables(self, bits: float) -> dict[str, Tensor]:
        """By the names of `Codec.table_shapes`."""
        return as_tables(self.letter, {"mask": self.mask_KH})

    def error(self, bits: float) -> float:
        """As of even steps: what is left out is lost with any bits."""
        return uniform_error(bits)


def mask_of_layer(visit: Visit, store: Codec) -> KeyMask:
    """Of the keys of one layer, as many channels as `store` says."""
    assert store.k_channels is not None
    weights = visit.copy.read(visit.layer)
    queries, keys = torch.zeros(2, *weights.k_KHD.shape[:2], dtype=torch.float64)
    for found in visit.activations(TOKENS):
        q, k, _ = project(weights, found.x_student_BTD)
        q, k = q.double().square(), k.double().square()
        q_NH = (q * found.mask_BT[:, None, :, None]).sum((0, 2))
        queries += torch.stack([q_NH[list(group)].sum(0) for group in weights.groups])
        keys += (k * behind_first(found.mask_BT, store)[:, None, :, None]).sum((0, 2))
    mask = channel_mask(total(queries), total(keys), weights.rotated(), store.k_channels)
    return KeyMask(mask_KH=mask[:, back_of(visit.site)])


def channel_mask(q_KH: Tensor, k_KH: Tensor, pairs: tuple[list[int], list[int]], count: int) -> Tensor:
    """[K, H] bool: the channels that are kept, `count` of each head, an even number.

    Args:
        q_KH: sums of squares of the queries, as `k_KH` of the keys.
        pairs: channels of the first and of the second halves of those that turn together.
    """
    first, second = pairs
    still = [j for j in range(q_KH.shape[1]) if j not in {*first, *second}]
    # The two of a pair turn into each other, so that each has half of the pair's energy on average.
    turning = (q_KH[:, first] + q_KH[:, second]) * (k_KH[:, first] + k_KH[:, second]) / 2
    ranked = (q_KH * k_KH)[:, still].sort(-1, descending=True)
    twos = len(still) // 2
    counts = torch.cat((turning, ranked.values[:, : 2 * twos].unflatten(-1, (twos, 2)).sum(-1)), -1)
    members = torch.cat(
        (
            torch.tensor([first, second]).T.expand(len(q_KH), -1, -1).reshape(len(q_KH), -1, 2).long(),
            torch.tensor(still, dtype=torch.long)[ranked.indices[:, : 2 * twos]].unflatten(-1, (twos, 2)),
        ),
        1,
    )
    best = counts.topk(count // 2, -1).indices
    kept = members.gather(1, best[..., None].expand(-1, -1, 2)).flatten(1)
    return torch.zeros(q_KH.shape, dtype=torch.bool).scatter_(1, kept, True)
