"""Tables of `oscar`: rotations to what attention looks for in calibration text, with a Hadamard matrix behind.

Source: OSCAR (FutureMLS-Lab). Keys are turned, after their own rotation, to the eigenvectors of Q'Q; values to those of
V'V, tokens weighted by the attention that they get.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.forward import probabilities, project
from ...attention.linalg import hermitian
from ...calibration.processes import total
from ...calibration.visit import Visit
from ...runtime.layout import Codec
from ...runtime.packing import hadamard
from .samples import TOKENS, as_tables, back_of, uniform_error

_ROWS = 256
"""Queries whose attention is computed at once."""


@dataclass(frozen=True, kw_only=True)
class StreamTurn:
    """Of keys or values of one layer."""

    letter: str
    turn_KWW: Tensor

    def tables(self, bits: float) -> dict[str, Tensor]:
        """By the names of `Codec.table_shapes`."""
        return as_tables(self.letter, {"turn": self.turn_KWW})

    def error(self, bits: float) -> float:
        """As of even steps."""
        return uniform_error(bits)


def turns_of_layer(visit: Visit, store: Codec) -> list[StreamTurn]:
    """Of the keys of one layer, and of its values where `store` encodes them."""
    weights = visit.copy.read(visit.layer)
    groups, kv_of = weights.groups, weights.kv_of()
    H, V = visit.site.head_dim, visit.site.value_dim
    queries, values = (torch.zeros(len(groups), width, width, dtype=torch.float64) for width in (H, V))
    for found in visit.activations(TOKENS):
        x, mask = found.x_student_BTD, found.mask_BT
        q, k, v = project(weights, x)
        seen_BNT = torch.zeros(q.shape[:3])
        for start in range(0, x.shape[1], _ROWS):
            time = torch.arange(start, min(start + _ROWS, x.shape[1]))
            probs = probabilities(weights, q[:, :, time], k[:, kv_of], time)[1]
            seen_BNT += (probs * mask[:, None, time, None]).sum(2)
        q, v = (q * mask[:, None, :, None]).double(), v.double()
        for at, group in enumerate(groups):
            own = q[:, list(group)].flatten(0, 2)
            queries[at] += own.mT @ own
            weight = seen_BNT[:, list(group)].sum(1).double()
            values[at] += torch.einsum("btv,bt,btw->vw", v[:, at], weight, v[:, at])
    back = back_of(visit.site)
    queries = total(queries)[:, back][:, :, back]
    made = [StreamTurn(letter="k", turn_KWW=_turn(queries))]
    if store.v_bits is not None:
        made.append(StreamTurn(letter="v", turn_KWW=_turn(total(values))))
    return made


def _turn(moment_KWW: Tensor) -> Tensor:
    vectors = torch.linalg.eigh(hermitian(moment_KWW)).eigenvectors.flip(-1)
    return vectors @ hadamard(vectors.shape[-1]).double()
