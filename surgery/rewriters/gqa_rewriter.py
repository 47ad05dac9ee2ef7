"""The `gqa` step: merge KV heads layer by layer, refit what closed forms can, and fit gains over the whole model.

A refit or gain is kept only where it brings the model nearer to its parent on calibration text that it was not fitted
on: least squares on scores can win there and still lose behind the softmax.
"""

from __future__ import annotations

import torch

from surgery.calibrate import input_moments, layer_activations, projection_inputs
from surgery.recipe import GqaStep
from surgery.rewriters.attention_weights import AttentionWeights, apply_norm
from surgery.rewriters.gqa import GroupHeads, Moments, Pooled, fit_gains
from surgery.runtime.layout import Heads
from surgery.text import Windows
from surgery.working_copy import WorkingCopy

GAIN_WINDOWS = 64
GAIN_BATCH = 8


class Gqa:
    """Merges KV heads, each layer on statistics of the already converted prefix (error compensation)."""

    def __init__(self, step: GqaStep, seed: int = 0) -> None:
        self.step, self.seed = step, seed

    def convert_layer(self, copy: WorkingCopy, layer: int, heads: Heads, windows: Windows | None) -> None:
        """Merge the heads of one layer, and refit its queries and output to the parent's."""
        weights = copy.read(layer)
        method = self._method(heads, weights)
        if windows is None:
            copy.write(layer, method.rewrite(weights, Moments.of_weights(weights)).weights)
            return
        pooled: Pooled = method.rewrite(weights, stream_moments(copy, layer, weights, windows))
        copy.write(layer, pooled.weights)
        site = copy.sites[layer]
        plain = site.clip_qkv is None and not site.gated_output and site.v_norm is None  # what `attend` computes
        if (self.step.refit_queries or self.step.refit_output) and plain:
            fit, check = windows.split()
            before = copy.divergence(check)
            copy.write(layer, method.refit(weights, pooled, lambda: layer_activations(copy, site, fit)))
            if copy.divergence(check) > before:
                copy.write(layer, pooled.weights)

    def rewrite(self, weights: AttentionWeights, heads: Heads) -> AttentionWeights:
        """The data-free form: as if the input of the projections were white."""
        return self._method(heads, weights).rewrite(weights, Moments.of_weights(weights)).weights

    def finish(self, copy: WorkingCopy, windows: Windows | None) -> None:
        """Fit one gain per query head on q and on o, in all converted layers together, by KL to the parent."""
        if windows is None or not self.step.gain_fit or not copy.converted:
            return
        fit, check = windows.take(GAIN_WINDOWS).split()
        batches = [{"input_ids": ids, "attention_mask": mask.long()} for ids, mask in fit.batches(GAIN_BATCH)]
        sites = [site for site in map(copy.sites.__getitem__, copy.converted) if not site.gated_output]
        before, kept = copy.divergence(check), copy.state()
        fit_gains(copy.model, copy.teacher, batches, sites)
        if copy.divergence(check) > before:
            copy.restore(kept)

    def _method(self, heads: Heads, weights: AttentionWeights) -> GroupHeads:
        step = self.step
        return GroupHeads(
            kv_heads=heads.kv_heads,
            init=step.init,
            grouping=step.grouping,
            groups=step.groups,
            equal_groups=step.equal_groups,
            renorm=step.renorm and step.init == "aligned",
            seed=self.seed,
            query_ridge=1e-3 if step.refit_queries and not weights.gated_output else None,
            output_ridge=1e-3 if step.refit_output else None,
        )


def stream_moments(copy: WorkingCopy, layer: int, weights: AttentionWeights, windows: Windows) -> Moments:
    """Moments of q, k, v over the calibration text as the score reads them: behind q/k norms, before rotation."""
    site = copy.sites[layer]
    if weights.q_norm is None and weights.k_norm is None:
        return Moments.of_weights(weights, input_moments(copy.model, site, windows, weights.has_bias))
    sums: list[torch.Tensor] = []
    for x_PD in projection_inputs(copy.model, site, windows):
        q, k, v = _normed(weights, x_PD)
        parts = [
            torch.einsum("pah,pbj->ahbj", k, k),
            torch.einsum("pnh,pnj->nhj", q, q),
            torch.einsum("pah,pbj->ahbj", v, v),
        ]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    k_KHKH, q_NHH, v_KVKV = (s / windows.tokens for s in sums)
    return Moments(k_KHKH=k_KHKH, q_NHH=q_NHH, v_KVKV=v_KVKV)


def _normed(weights: AttentionWeights, x_PD: torch.Tensor) -> list[torch.Tensor]:
    """q [P, N, H], k [P, K, H], v [P, K, Hv] in float64."""
    x = x_PD.double()
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    found = []
    for name, norm, gain, shift in (
        ("q", weights.q_norm, weights.q_norm_NH, weights.q_norm_bias_NH),
        ("k", weights.k_norm, weights.k_norm_KH, weights.k_norm_bias_KH),
        ("v", None, None, None),
    ):
        y_BNTH = torch.einsum("pd,nhd->nph", x, weights.with_bias(name))[None]
        if norm is not None:
            y_BNTH = apply_norm(y_BNTH, norm, gain, shift)
        found.append(y_BNTH[0].transpose(0, 1))
    return found
