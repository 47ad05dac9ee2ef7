"""Refits: closed forms on calibration activations, per layer, for the weights that face a rewritten K and V."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...attention.linalg import ridge_regression, to_double
from ...attention.weights import AttentionWeights
from ...calibration.processes import total
from ...calibration.visit import Visit

RIDGE, CAREFUL_RIDGE = 1e-3, 0.1
Fit = Callable[[Visit, AttentionWeights], AttentionWeights]
"""Refits the visited layer, whose weights are given."""


def keep_what_helps(visit: Visit, fits: Iterable[Fit]) -> None:
    """Refit the visited layer by one closed form after the other, each kept only where windows that it has not seen
    confirm it: least squares on scores can win on its own text and still lose after the softmax."""
    copy, layer = visit.copy, visit.layer
    best, error = copy.read(layer), visit.error()
    for fit in fits:
        copy.write(layer, fit(visit, best))
        found = visit.error()
        if found < error:
            best, error = copy.read(layer), found
        else:
            copy.write(layer, best)


def fit_output(visit: Visit, weights: AttentionWeights, repairs: bool = True) -> AttentionWeights:
    """W_o by ridge regression to what the layer's attention should give.

    Args:
        repairs: whether that makes up for what the layers before have lost. Where they have lost much, it is little of
            that which other text confirms, and later layers lose more; without it the fit stays nearer to what W_o is.
    """
    found = OutputFit()
    for a in visit.activations():
        wanted = a.wanted_BTD if repairs or a.lost_BTD is None else a.wanted_BTD - a.lost_BTD
        found.add(visit.copy.head_outputs(visit.layer, a.inputs), wanted, a.mask_BT)
    return found.solve(weights, RIDGE if repairs else CAREFUL_RIDGE)


OUTPUT_FITS: tuple[Fit, ...] = (partial(fit_output, repairs=False), fit_output)
"""For `keep_what_helps`, in this order. The second alone, on little text, helps layers of `cla2` and not the model."""


class OutputFit:
    """Streams what the ridge refit of `o` needs; add batches, then `solve`.

    The target is the parent's attention output; where a layer is to repair its predecessors, plus whatever the residual
    stream has lost in them: y = o_parent(x_parent) + (h_parent - h_student).
    """

    def __init__(self) -> None:
        self.cross_DP = torch.zeros((), dtype=torch.float64)
        self.moment_PP = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, out_BTNV: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> None:
        """Head outputs of the student (input of `o`), the wanted output without `o`'s bias, True at real tokens."""
        o, y = out_BTNV.flatten(2)[mask_BT], target_BTD[mask_BT]
        self.cross_DP = self.cross_DP + to_double(y.T @ o)
        self.moment_PP = self.moment_PP + to_double(o.T @ o)
        self.tokens += len(o)

    def solve(self, weights: AttentionWeights, ridge: float = RIDGE) -> AttentionWeights:
        """`weights` with `o` refitted; see `refit_output`."""
        tokens = int(total(torch.tensor(self.tokens)))
        return refit_output(weights, total(self.cross_DP) / tokens, total(self.moment_PP) / tokens, ridge)


def refit_output(
    weights: AttentionWeights, cross_DP: Tensor, moment_PP: Tensor, ridge: float = RIDGE
) -> AttentionWeights:
    """W_o ← (E[y oᵀ] + μ W_o)(E[o oᵀ] + μ I)⁻¹, P = N·Hv: shrinks to the folded W_o, not to 0.

    `ridge` is μ relative to the mean energy of o. Needs many more tokens than N·Hv. A gated output is fitted just as
    well, if o is taken after the gate.
    """
    prior = weights.o_DNV
    new = ridge_regression(cross_DP, moment_PP, ridge, prior.flatten(1))
    return replace(weights, o_DNV=new.reshape(prior.shape).to(prior.dtype))
