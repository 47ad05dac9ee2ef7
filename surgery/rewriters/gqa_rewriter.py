"""The `gqa` step: which heads merge, how, and what is refitted around them."""

from __future__ import annotations

from dataclasses import replace

import torch

from surgery.calibrate import OutputMoments, input_moments, normed_projections, output_moments, projection_inputs
from surgery.recipe import GqaStep
from surgery.rewriters.attention_weights import AttentionWeights
from surgery.rewriters.gqa import Groups, Moments, neighbour_groups, pool_heads, rank1_cost, search_groups
from surgery.runtime.layout import Heads
from surgery.text import Windows
from surgery.working_copy import WorkingCopy


class Gqa:
    """Merges KV heads layer by layer, each on statistics of the already converted prefix (error compensation)."""

    def __init__(self, step: GqaStep, seed: int = 0) -> None:
        self.step, self.seed = step, seed

    def convert_layer(self, copy: WorkingCopy, layer: int, heads: Heads, windows: Windows | None) -> None:
        """Merge the heads of one layer, and refit its output."""
        weights = copy.read(layer)
        moments = None if windows is None else stream_moments(copy, layer, weights, windows)
        merged = self.rewrite(weights, heads, moments)
        copy.write(layer, merged)
        if windows is not None and self.step.refit_output and not weights.gated_output:
            statistics = output_moments(copy.model, copy.teacher, copy.sites[layer], windows)
            copy.write(layer, refit_output(merged, statistics))

    def rewrite(self, weights: AttentionWeights, heads: Heads, moments: Moments | None) -> AttentionWeights:
        """`weights` with `heads.kv_heads` KV heads; without moments as if the input were white."""
        moments = moments or Moments.of_weights(weights)
        return pool_heads(
            weights,
            moments,
            self._groups(weights, heads.kv_heads, moments),
            self.step.init,
            renorm=self.step.renorm and self.step.init == "aligned",
            seed=self.seed,
        )

    def _groups(self, weights: AttentionWeights, kv_heads: int, moments: Moments) -> Groups:
        if self.step.groups is not None:
            return self.step.groups
        if self.step.grouping == "neighbour" or not weights.permutable:
            return neighbour_groups(weights.kv_heads, kv_heads)
        return search_groups(rank1_cost(weights, moments), weights.kv_heads, kv_heads, seed=self.seed)

    def finish(self, copy: WorkingCopy, windows: Windows | None) -> None:
        """Fit the gains of all layers together."""


def stream_moments(copy: WorkingCopy, layer: int, weights: AttentionWeights, windows: Windows) -> Moments:
    """Moments of q, k, v over the calibration text, as the score reads them."""
    site = copy.sites[layer]
    if weights.q_norm is None and weights.k_norm is None:
        return Moments.of_weights(weights, input_moments(copy.model, site, windows, weights.has_bias))
    sums: list[torch.Tensor] = []
    for x_PD in projection_inputs(copy.model, site, windows):
        q, k, v = normed_projections(weights, x_PD)
        parts = [
            torch.einsum("pah,pbj->ahbj", k, k),
            torch.einsum("pnh,pnj->nhj", q, q),
            torch.einsum("pah,pbj->ahbj", v, v),
        ]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    k_KHKH, q_NHH, v_KVKV = (s / windows.tokens for s in sums)
    return Moments(k_KHKH=k_KHKH, q_NHH=q_NHH, v_KVKV=v_KVKV)


def refit_output(weights: AttentionWeights, moments: OutputMoments, ridge: float = 1e-3) -> AttentionWeights:
    """`o` by ridge regression to the parent's attention output, shrinking to the folded `o` and not to zero."""
    D, N, V = weights.o_DNV.shape
    o_DP = weights.o_DNV.reshape(D, N * V).double()
    mu = ridge * moments.oo_PP.diagonal().mean()
    eye = torch.eye(N * V, dtype=torch.float64)
    new_DP = torch.linalg.solve(moments.oo_PP + mu * eye, (moments.yo_DP + mu * o_DP).T).T
    return replace(weights, o_DNV=new_DP.reshape(D, N, V).to(weights.o_DNV.dtype))
