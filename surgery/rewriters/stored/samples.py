"""Keys and values of calibration text, and the metrics in which their errors are felt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...attention.forward import project
from ...attention.weights import halves
from ...calibration.processes import gathered
from ...calibration.visit import Visit
from ...errors import PlanError
from ...runtime.layout import AttentionSite, Codec
from ..latent.moments import MomentSums

TOKENS = 4096
"""Tokens of text whose K and V are looked at."""


class Fitted(Protocol):
    """What the text says of the keys, or values, of one layer; tables for any number of bits follow from it."""

    @property
    def letter(self) -> str:
        """`k` or `v`."""

    def tables(self, bits: float) -> dict[str, Tensor]:
        """By the names of `Codec.table_shapes`; int32, floats seen as their bits."""

    def error(self, bits: float) -> float:
        """Squared error of codes, up to a factor."""


def tables_of(fits: Sequence[Fitted], store: Codec) -> dict[str, Tensor]:
    """The tables of one layer by the names of `Codec.table_shapes`."""
    bits = {"k": store.k_bits, "v": store.v_bits}
    return {name: t for found in fits for name, t in found.tables(bits[found.letter] or 0).items()}


def as_tables(letter: str, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables as checkpoints have them: float32 seen as int32, so that no cast rounds them."""
    return {
        f"{letter}_{name}_bits": t.float().contiguous().view(torch.int32) if t.is_floating_point() else t.int()
        for name, t in tables.items()
    }


def uniform_error(bits: float) -> float:
    """Squared error of codes in even steps over a range, up to a factor."""
    return (2.0**bits - 1) ** -2


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Channels stand where the runtime has them."""

    k_KPH: Tensor
    """Before their rotation."""
    v_KPV: Tensor
    key_metric_KHH: Tensor
    """E[q q'] of the queries that read them, turned to the places of the keys."""
    value_metric_KVV: Tensor
    """W_o'W_o."""


def back_of(site: AttentionSite) -> list[int]:
    """Of each channel of the runtime its place in `AttentionWeights`."""
    order = halves(site.rotary, site.head_dim)
    return [order.index(j) for j in range(site.head_dim)]


def sampled(visit: Visit, store: Codec) -> Samples:
    """K and V of the tokens behind the first ones.

    Raises:
        PlanError: the text has too few of them.
    """
    weights = visit.copy.read(visit.layer)
    plain = replace(weights, rotary=None)
    sums, keys, values = MomentSums(weights), [], []
    for found in visit.activations(TOKENS):
        x, mask = found.x_student_BTD, found.mask_BT
        sums.add(x, x, mask)
        _, k, v = project(plain, x, torch.tensor([0]))
        behind = behind_first(mask, store)
        keys.append(k.transpose(1, 2)[behind])
        values.append(v.transpose(1, 2)[behind])
    k_KPH, v_KPV = (gathered(torch.cat(parts)).transpose(0, 1) for parts in (keys, values))
    check_enough(visit, store, *k_KPH.shape[1:])
    back = back_of(visit.site)
    read_NHH = sums.finish().q_read_NHH[:, back][:, :, back]
    o_KDGV = [weights.o_DNV[:, list(group)].double() for group in weights.groups]
    return Samples(
        k_KPH=k_KPH[..., back], v_KPV=v_KPV,
        key_metric_KHH=torch.stack([read_NHH[list(group)].sum(0) for group in weights.groups]),
        value_metric_KVV=torch.stack([torch.einsum("dgv,dgw->vw", o, o) for o in o_KDGV]),
    )  # fmt: skip


def behind_first(mask_BT: Tensor, store: Codec) -> Tensor:
    """[B, T]: real tokens that are packed once they are old; the first ones never are."""
    return mask_BT & (torch.arange(mask_BT.shape[1]) >= store.sinks)


def check_enough(visit: Visit, store: Codec, tokens: int, width: int) -> None:
    """Refuse text with fewer tokens than twice the directions.

    Raises:
        PlanError: names the layer and both numbers.
    """
    if tokens < 2 * width:
        raise PlanError(
            f"layer {visit.layer}: {tokens} tokens of text behind the first {store.sinks} are too few for {width} "
            "directions. Give more text, or longer windows."
        )
