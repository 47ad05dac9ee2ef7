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


def fit_output(visit: Visit, weights: AttentionWeights) -> AttentionWeights:
    """W_o by ridge regression to what the layer's attention should give, and what the layers before have lost."""
    return OutputFit.of(visit).solve(weights)


def output_fits() -> tuple[Fit, Fit]:
    """For `keep_what_helps`, in this order: W_o to the parent's attention output alone, and `fit_output`.

    The second alone, on little text, helps layers of `cla2` and not the model. The text is read once for both.
    """
    seen: list[OutputFit] = []

    def fit(visit: Visit, weights: AttentionWeights, repairs: bool) -> AttentionWeights:
        if not seen:
            seen.append(OutputFit.of(visit))
        return seen[0].solve(weights, repairs)

    return partial(fit, repairs=False), partial(fit, repairs=True)


class OutputFit:
    """Streams what the ridge refits of `o` need; add batches, then `solve`.

    The target is the parent's attention output; where a layer is to repair its predecessors, plus whatever the residual
    stream has lost in them: y = o_parent(x_parent) + (h_parent - h_student).
    """

    def __init__(self) -> None:
        self.moment_PP = torch.zeros((), dtype=torch.float64)
        self.cross_DP = torch.zeros((), dtype=torch.float64)
        """With the repaired target."""
        self.own_cross_DP = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    @classmethod
    def of(cls, visit: Visit) -> OutputFit:
        """Of the visited layer as it is now, over the text to fit on; W_o may change afterwards, and nothing else."""
        found = cls()
        for a in visit.activations():
            found.add(visit.copy.head_outputs(visit.layer, a.inputs), a.wanted_BTD, a.mask_BT, a.lost_BTD)
        return found

    def add(self, out_BTNV: Tensor, target_BTD: Tensor, mask_BT: Tensor, lost_BTD: Tensor | None = None) -> None:
        """Head outputs of the student (input of `o`), the wanted output without `o`'s bias, True at real tokens.

        Args:
            lost_BTD: what of the wanted output makes up for the layers before.
        """
        o, y = out_BTNV.flatten(2)[mask_BT], target_BTD[mask_BT]
        cross = to_double(y.T @ o)
        self.cross_DP = self.cross_DP + cross
        self.own_cross_DP = self.own_cross_DP + (
            cross if lost_BTD is None else to_double((y - lost_BTD[mask_BT]).T @ o)
        )
        self.moment_PP = self.moment_PP + to_double(o.T @ o)
        self.tokens += len(o)

    def solve(self, weights: AttentionWeights, repairs: bool = True) -> AttentionWeights:
        """`weights` with `o` refitted; see `refit_output`.

        Args:
            repairs: whether the target makes up for what the layers before have lost. Where they have lost much, it is
                little of that which other text confirms, and later layers lose more; without it the fit stays nearer
                to what W_o is.
        """
        tokens = int(total(torch.tensor(self.tokens)))
        cross = self.cross_DP if repairs else self.own_cross_DP
        ridge = RIDGE if repairs else CAREFUL_RIDGE
        return refit_output(weights, total(cross) / tokens, total(self.moment_PP) / tokens, ridge)


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
