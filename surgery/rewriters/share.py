"""The `share` step: layers read the cache of an earlier layer, and learn to by closed forms on calibration text.

Readers are converted in order, each on the converted prefix. What is fitted on one part of the text is kept only where
another part confirms it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..attention.forward import head_outputs
from ..attention.weights import AttentionWeights
from ..calibration.shared_copy import SharedCopy
from ..calibration.statistics import Activations
from ..calibration.text import Windows
from ..planning.share_layouts import SEARCHED, kept_layers, sharable
from ..recipe import ShareStep
from ..runtime.layout import Latent, LayerPlan
from .common.gains import tune_gains
from .common.refit import OutputFit, QueryFit
from .layers.latent import share_latents
from .layers.maps import least_squares, map_values, mean_weights, pair_moments
from .layers.search import kvsharer_pairs, search_pairs

QUERY_TOKENS = 6_000
SEARCH_WINDOWS = 12
"""Check windows that inits are compared on; refits are accepted on all of them."""


class Share:
    """Gives readers their owners, by a layout or by a search, and fits them."""

    def __init__(self, step: ShareStep, seed: int = 0) -> None:
        self.step = step
        self.orders: dict[int, list[int]] = {}
        """The query head, before, of each of a reader's."""
        del seed  # nothing here is random

    def convert(self, copy: SharedCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Convert all readers, and in latent form their owners. In place; None asks for the data-free form."""
        self.merged = set(copy.converted)
        owners = self.owners(copy, plans, windows)
        if self.step.init == "latent":
            assert windows is not None
            ranks = {plan.project.rank for plan in plans if isinstance(plan.project, Latent)}
            share_latents(copy, owners, min(ranks), windows, self._refit)
        else:
            originals = {layer: copy.read(layer) for layer in copy.sites}
            for reader, owner in sorted(owners.items()):
                self._share_heads(copy, reader, owner, originals, windows)
            for plan in plans:
                if plan.value_owner is not None:
                    self._share_values(copy, plan.layer, plan.value_owner, windows)
        if windows is not None and self.step.gain_fit:
            tune_gains(copy, {*copy.owners, *copy.value_owners, *copy.latents}, windows)

    def owners(self, copy: SharedCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> dict[int, int]:
        """Reader -> owner: the plan's, or what the text says is cheapest."""
        planned = {plan.layer: plan.owner for plan in plans if plan.owner != plan.layer}
        if self.step.layout not in SEARCHED:
            return planned
        assert windows is not None
        chosen = [layer for layer in sorted(copy.sites) if self.step.selects(layer)]
        alone = {
            layer: LayerPlan(layer=layer, project=copy.project(layer), owner=layer, window=copy.sites[layer].window)
            for layer in chosen
        }
        readers = len(chosen) - kept_layers(self.step.kv_layers, len(chosen), "kv_layers")
        possible = sharable(chosen, copy.sites, alone)
        if self.step.layout == "kvsharer":
            return kvsharer_pairs(copy, possible, readers, windows)
        return search_pairs(copy, possible, readers, windows, latent=self.step.init == "latent")

    def _share_heads(
        self,
        copy: SharedCopy,
        reader: int,
        owner: int,
        originals: dict[int, AttentionWeights],
        windows: Windows | None,
    ) -> None:
        before, kept = originals[reader], copy.read(owner)
        copy.owners[reader] = owner
        moments = None if windows is None else pair_moments(copy, reader, owner, windows)

        def mean() -> AttentionWeights:
            members = [owner, *(r for r, o in copy.owners.items() if o == owner)]
            copy.write(owner, mean_weights(copy, {layer: originals[layer] for layer in members}, owner))
            return before

        def mapped() -> AttentionWeights:
            assert moments is not None
            made, self.orders[reader] = least_squares(before, moments)
            return made

        forms: dict[str, Callable[[], AttentionWeights]] = {
            "replace": lambda: before,
            "mean": mean,
            "least_squares": mapped,
        }
        if self.step.init != "best":
            forms = {self.step.init: forms[self.step.init]}
        tried = []
        for name, make in forms.items():
            copy.write(owner, kept)
            copy.write(reader, make())
            loss = _search_loss(copy, windows) if len(forms) > 1 else 0.0
            tried.append((loss, name, copy.read(reader), copy.read(owner)))
        _, name, chosen, made = min(tried, key=lambda found: found[0])
        if name != "least_squares":
            self.orders.pop(reader, None)
        copy.write(owner, made)
        copy.write(reader, chosen)
        if windows is not None:
            self._refit(copy, reader, before, windows)

    def _share_values(self, copy: SharedCopy, reader: int, owner: int, windows: Windows | None) -> None:
        """Own K, another layer's V (SVFormer, arXiv:2410.17897, here from pretrained weights)."""
        before = copy.read(reader)
        copy.value_owners[reader] = owner
        if windows is None:
            return
        if self.step.init in ("best", "least_squares"):
            loss = _search_loss(copy, windows)
            copy.write(reader, map_values(before, pair_moments(copy, reader, owner, windows)))
            if self.step.init == "best" and _search_loss(copy, windows) > loss:
                copy.write(reader, before)
        self._refit(copy, reader, before, windows)

    def _refit(self, copy: SharedCopy, layer: int, target: AttentionWeights, windows: Windows) -> None:
        """W_q by the scores of `target`, then W_o by the parent's output, on what the layer now reads; kept if better.

        Args:
            target: the layer before it was to read others' K and V.
        """
        fit, check = windows.split()
        best = copy.read(layer)
        fits = [self._fit_output] if self.step.refit_output else []
        if self.step.refit_queries and best.q_norm is None and best.softcap is None:
            fits.insert(0, self._fit_queries)
        if not fits:
            return
        loss, batches = copy.divergence(check), copy.activations(layer, fit)
        for solve in fits:
            copy.write(layer, solve(copy, layer, target, batches, fit.tokens))
            found = copy.divergence(check)
            if found < loss:
                best, loss = copy.read(layer), found
            else:
                copy.write(layer, best)

    def _fit_queries(
        self, copy: SharedCopy, layer: int, target: AttentionWeights, batches: Iterable[Activations], tokens: int
    ) -> AttentionWeights:
        student = copy.read(layer)
        found = QueryFit(target, student, self.orders.get(layer, range(student.heads)))
        for a in batches:
            k, _ = copy.keys_values(layer)
            # Merged heads have no scores of the parent's to meet: theirs are those of the layer after merging.
            x_target = a.x_student_BTD if layer in self.merged else a.x_parent_BTD
            found.add(x_target, a.x_student_BTD, a.mask_BT, max(1, tokens // QUERY_TOKENS), k)
        return found.solve()

    def _fit_output(
        self, copy: SharedCopy, layer: int, target: AttentionWeights, batches: Iterable[Activations], tokens: int
    ) -> AttentionWeights:
        student, parent, found = copy.read(layer), copy.parent(layer), OutputFit()
        for a in batches:
            y = torch.einsum("btnv,dnv->btd", head_outputs(parent, a.x_parent_BTD), parent.o_DNV)
            found.add(copy.head_outputs(layer, copy.tensor), y + a.gap_BTD, a.mask_BT)
        return found.solve(student)


def _search_loss(copy: SharedCopy, windows: Windows | None) -> float:
    assert windows is not None
    return copy.divergence(windows.split()[1].take(SEARCH_WINDOWS))
