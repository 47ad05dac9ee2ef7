"""The `gqa` step: pool KV heads layer by layer, refit what closed forms can, and fit gains over the whole model.

A refit or gain is kept only where it brings the model nearer to its parent on calibration text that it was not fitted
on: least squares on scores can win there and still lose behind the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..attention.forward import attend
from ..attention.weights import AttentionWeights
from ..calibration.statistics import Activations, layer_activations
from ..calibration.text import Windows
from ..calibration.working_copy import WorkingCopy
from ..recipe import GqaStep
from ..runtime.layout import AttentionSite, Heads
from .common.gains import tune_gains
from .common.layerwise import Layerwise
from .common.moments import Moments, stream_moments
from .common.refit import OutputFit, QueryFit
from .heads.grouping import (
    Groups,
    check_divides,
    cluster_heads,
    evolve_groups,
    neighbour_groups,
    rank1_cost,
    search_groups,
    share_queries,
)
from .heads.pooling import pool_heads, source_queries

QUERY_TOKENS = 10_000
"""Calibration tokens for the query refit: it keeps N·H·(H+1) numbers for each."""


class Gqa(Layerwise):
    """Merges KV heads, each layer on statistics of the already converted prefix (error compensation)."""

    def __init__(self, step: GqaStep, seed: int = 0) -> None:
        self.step, self.seed = step, seed

    def convert_layer(self, copy: WorkingCopy, layer: int, heads: Heads, windows: Windows | None) -> None:
        """Merge the heads of one layer, and refit its queries and output to the parent's."""
        parent, site = copy.read(layer), copy.sites[layer]
        if windows is None:
            copy.write(layer, self.rewrite(parent, heads))
            return
        moments = stream_moments(copy, layer, parent, windows)
        groups = self.choose_groups(parent, moments, heads.kv_heads)
        pooled = self.pool(parent, moments, groups)
        copy.write(layer, pooled)
        if self._refits(site):
            fit, check = windows.split()
            before = copy.divergence(check)
            activations = partial(layer_activations, copy, site, fit)
            copy.write(layer, self.refit(parent, pooled, groups, activations, fit.tokens))
            if copy.divergence(check) > before:
                copy.write(layer, pooled)

    def rewrite(self, parent: AttentionWeights, heads: Heads) -> AttentionWeights:
        """The data-free form: as if the input of the projections were white."""
        moments = Moments.of_weights(parent)
        return self.pool(parent, moments, self.choose_groups(parent, moments, heads.kv_heads))

    def finish(self, copy: WorkingCopy, windows: Windows | None) -> None:
        """Fit one gain per query head on q and on o, in all converted layers together, by KL to the parent."""
        if windows is not None and self.step.gain_fit:
            tune_gains(copy, copy.converted, windows)

    def choose_groups(self, weights: AttentionWeights, moments: Moments, kv_heads: int) -> Groups:
        """The source KV heads of each new one."""
        step = self.step
        if step.groups is not None:
            return step.groups
        if step.init in ("asym", "qcqa") and not step.equal_groups and weights.permutable:
            if step.init == "asym":
                return cluster_heads(weights, moments, kv_heads)
            return evolve_groups(weights, kv_heads, seed=self.seed)
        check_divides(weights.kv_heads, kv_heads)
        if step.grouping == "neighbour" or step.init == "key_norm" or not weights.permutable:
            return neighbour_groups(weights.kv_heads, kv_heads)
        return search_groups(rank1_cost(weights, moments), weights.kv_heads, kv_heads, seed=self.seed)

    def pool(self, weights: AttentionWeights, moments: Moments, groups: Groups) -> AttentionWeights:
        """One KV head per group, before refits."""
        step, queries = self.step, None
        if step.init == "key_norm" and not step.equal_groups and len(groups) < weights.kv_heads:
            queries = share_queries(moments, groups, weights.heads)
        renorm = step.renorm and step.init == "aligned"
        return pool_heads(weights, moments, groups, step.init, renorm=renorm, seed=self.seed, query_groups=queries)

    def refit(
        self,
        parent: AttentionWeights,
        pooled: AttentionWeights,
        groups: Groups,
        activations: Callable[[], Iterable[Activations]],
        tokens: int,
    ) -> AttentionWeights:
        """W_q by the parent's logits, then W_o by its output.

        Leaves a layer alone that pooling left alone, and query rows behind a norm or a soft cap.

        Args:
            activations: called once per refit; `tokens` is their number.
        """
        if pooled is parent:
            return parent
        student = pooled
        linear = student.q_norm is None and student.softcap is None and self.step.init != "key_norm"
        if self.step.refit_queries and linear:
            queries = QueryFit(parent, student, source_queries(parent, groups))
            for a in activations():
                queries.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT, stride=max(1, tokens // QUERY_TOKENS))
            student = queries.solve()
        if self.step.refit_output:
            output = OutputFit()
            for a in activations():
                y = torch.einsum("btnv,dnv->btd", attend(parent, a.x_parent_BTD).out_BTNV, parent.o_DNV)
                output.add(attend(student, a.x_student_BTD).out_BTNV, y + a.gap_BTD, a.mask_BT)
            student = output.solve(student)
        return student

    def _refits(self, site: AttentionSite) -> bool:
        """Whether the recipe asks for refits and `attend` computes what the site does."""
        plain = site.clip_qkv is None and not site.gated_output and site.v_norm is None
        return plain and (self.step.refit_queries or self.step.refit_output)
