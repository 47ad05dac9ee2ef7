"""Tables of `kvquant`: levels of codes by k-means on calibration text, weighted by how much an error is felt.

KVQuant (arXiv:2401.18079) weights by gradients of the whole model's loss, and has levels by layer; here they are by KV
head, and an error counts by the diagonal of the metric in which the layer's own output feels it: E[q q'] for keys,
W_o'W_o for values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.visit import Visit
from ...runtime.calibrated_forms import OUTLIERS
from ...runtime.codecs import CODECS
from ...runtime.layout import Codec
from .samples import as_tables, sampled, uniform_error

_BINS = 1024
_ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class StreamLevels:
    """Of keys or values of one layer: levels by bits, and what else codes refer to."""

    letter: str
    levels: dict[int, Tensor]
    """By bits: [K, 2^bits]."""
    channels: dict[str, Tensor]

    def tables(self, bits: float) -> dict[str, Tensor]:
        """By the names of `Codec.table_shapes`."""
        return as_tables(self.letter, {"levels": self.levels[int(bits)], **self.channels})

    def error(self, bits: float) -> float:
        """As of even steps."""
        return uniform_error(bits)


def levels_of_layer(visit: Visit, store: Codec) -> list[StreamLevels]:
    """Of the keys of one layer, and of its values where `store` encodes them."""
    seen, known = sampled(visit, store), [int(bits) for bits in CODECS[store.codec].bits]
    felt = [m.diagonal(dim1=-2, dim2=-1).float()[:, None] for m in (seen.key_metric_KHH, seen.value_metric_KVV)]
    k, v = seen.k_KPH.float(), seen.v_KPV.float()
    ends = torch.tensor([OUTLIERS / 2, 1 - OUTLIERS / 2])
    low, high = torch.quantile(k, ends, dim=1)
    middle, reach = (high + low) / 2, ((high - low) / 2).clamp_min(1e-12)
    z = (k - middle[:, None]) / reach[:, None]
    weight = (felt[0] * reach[:, None].square()).expand_as(z)
    levels = {bits: k_means(z, weight, bits, -1.0) for bits in known}
    made = [StreamLevels(letter="k", levels=levels, channels={"middle": middle, "reach": reach})]
    if store.v_bits is not None:
        low, high = torch.quantile(v, ends, dim=-1, keepdim=True)
        span = (high - low).clamp_min(1e-12)
        levels = {bits: k_means((v - low) / span, felt[1] * span.square(), bits, 0.0) for bits in known}
        made.append(StreamLevels(letter="v", levels=levels, channels={}))
    return made


def k_means(z_KPW: Tensor, weight_KPW: Tensor, bits: int, least: float) -> Tensor:
    """[K, 2^bits] levels in rising order that minimise the weighted squared error of numbers from `least` to 1.

    Numbers outside stand apart. On a histogram, from evenly spread levels.
    """
    width = (1 - least) / _BINS
    bins = ((z_KPW - least) / width).floor().long().flatten(1)
    inside = (bins >= 0) & (bins < _BINS)
    weight = torch.where(inside, weight_KPW.flatten(1).double(), 0.0)
    mass = torch.zeros(len(z_KPW), _BINS, dtype=torch.float64).scatter_add_(1, bins.clamp(0, _BINS - 1), weight)
    place = least + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    count = 2**bits
    levels = (least + (1 - least) * (torch.arange(count, dtype=torch.float64) + 0.5) / count).repeat(len(mass), 1)
    for _ in range(_ROUNDS):
        own = (place[None, :, None] > ((levels[:, 1:] + levels[:, :-1]) / 2)[:, None]).sum(-1)
        total = torch.zeros_like(levels).scatter_add_(1, own, mass)
        moved = torch.zeros_like(levels).scatter_add_(1, own, mass * place)
        levels = torch.where(total > 0, moved / total.clamp_min(1e-300), levels).sort(-1).values
    return levels.float()
