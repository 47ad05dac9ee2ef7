"""The `mla` step: one latent for K and V, and a small rotated key part that all heads share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..anatomy import Anatomy
from ..errors import PlanError, RecipeError
from ..planning.latent_size import aligned_rank, full_rank, kept_numbers, latent_budget, rope_splits, turning_numbers
from ..runtime.layout import AttentionSite, Latent, LayerPlan
from .latent import MlaInit, Rotation, Selector
from .latent.fit import Candidate, mla_candidates
from .latent.method import LatentMethod
from .latent.options import SPLIT_NOTE, LatentStep, plan_latents, rounding_notes
from .latent.rotary_split import MLA_INITS

BETAS = (1.0, 0.5, 2.0)
"""Balances of V against K that `beta: search` tries in each layer."""


@dataclass(frozen=True, kw_only=True)
class MlaStep(LatentStep):
    """Cache one latent for K and V and a small rotated key part (MLA). Needs calibration text.

    `rank` is the latent's; `rope_dims` numbers are cached beside it.
    """

    rewriter: Literal["mla"] = "mla"
    rope_dims: int | None = None
    """Cached numbers that are rotated, even. By default a quarter of all; beside `keep` the text decides per layer."""
    init: MlaInit = "default"
    """Ours, or a published form: `svd` (MHA2MLA), `whitened` (SVD-LLM, CARE), `transmla`."""
    rotation: Rotation | None = None
    """How heads are mixed within each rotary frequency. None: as `init` does (ours: `complex`, TransMLA: `real`)."""
    selector: Selector | None = None
    """Which components stay rotated. None: as `init` does (ours: `gain`, energy times phase sensitivity)."""
    fold: Literal[1, 2, 4, "auto"] = 1
    """Neighbouring frequencies that count as one; exact for 1 only. `auto`: what the text finds best in each layer."""
    beta: float | Literal["search"] = 1.0
    """V's error against K's, in parts of the default balance; `search` tries a few in each layer."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.rope_dims is not None and (self.rope_dims < 0 or self.rope_dims % 2):
            raise RecipeError(
                f"{where}.rope_dims: {self.rope_dims} must be even and not negative: numbers turn in pairs. "
                f"Use {max(0, self.rope_dims - 1)} or {self.rope_dims + 1}."
            )
        if self.beta != "search" and self.beta <= 0:
            raise RecipeError(f"{where}.beta: {self.beta:g} must be above 0, or `search`.")


class Mla(LatentMethod):
    """One latent for K and V, and a shared rotated key part."""

    Options = MlaStep
    step: MlaStep

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """Some parts of the parent's bytes."""
        return [[{"keep": keep}] for keep in (0.5, 0.25, 0.125)]

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A latent and a rotated part in each selected layer."""
        return plan_latents(self.step, anatomy, layers, where, self._planned, rotate_on_read=False)

    def notes(self, plan: Any) -> list[str]:
        """Roundings, and what is left to the text."""
        searches = self.step.keep is not None and self.step.rope_dims is None
        return rounding_notes(self.step, plan.changed(self.step), lambda p: p.rank) + [SPLIT_NOTE] * searches

    def _planned(self, at: str, site: AttentionSite) -> Latent:
        step = self.step
        pairs = 0 if site.rotary is None else site.rotary.dims // 2
        for name in ("rotation", "selector", "fold") if not pairs else ():
            if (value := getattr(step, name)) not in (None, 1):
                raise PlanError(f"{at}: {name}: {value} is about channels that turn, and no key has any. Leave it out.")
        if step.fold != "auto" and pairs % step.fold:
            raise PlanError(f"{at}: fold {step.fold} does not divide {pairs} rotary frequencies. Use 1, or auto.")
        if step.keep is not None:
            return Latent.of(site, *latent_budget(kept_numbers(step.keep, site), site, step.rope_dims))
        assert step.rank is not None
        turning, full, rope_dims = turning_numbers(site), full_rank(site), step.rope_dims
        if rope_dims is not None and rope_dims > turning:
            raise PlanError(
                f"{at}: rope_dims {rope_dims} is more than the {turning} rotated numbers of K. Use at most that."
            )
        if step.rank > full:
            raise PlanError(f"{at}: rank {step.rank} is more than the {full} that K and V have together. Use less.")
        if rope_dims is None:
            rope_dims = min(turning, max(2, step.rank // 6 * 2)) if turning else 0
        if step.rank + rope_dims > site.kv_dims:
            raise PlanError(
                f"{at}: rank {step.rank} + rope_dims {rope_dims} caches {step.rank + rope_dims} numbers per token "
                f"where the parent caches {site.kv_dims}. Use less."
            )
        return Latent.of(site, aligned_rank(step.rank, rope_dims, min(full, site.kv_dims - rope_dims)), rope_dims)

    def candidates(self, site: AttentionSite, project: Latent) -> list[list[Candidate]]:
        step = self.step
        splits = [(project.rank, project.rope_dims)]
        if step.keep is not None and step.rope_dims is None:
            splits = rope_splits(project.dims, site)
        options = MLA_INITS[step.init]
        options = replace(
            options,
            rotation=step.rotation or options.rotation,
            selector=step.selector or options.selector,
            mean_split=step.splits_mean,
        )
        pairs = 0 if site.rotary is None else site.rotary.dims // 2
        folds: list[Literal[1, 2, 4]] = [f for f in (1, 2, 4) if pairs % f == 0] if step.fold == "auto" else [step.fold]
        betas = BETAS if step.beta == "search" else (step.beta,)
        made = [replace(options, fold=fold) for fold in folds]
        return [mla_candidates(splits, (betas[0],), form) for form in made] + [
            mla_candidates(splits, (beta,), made[0]) for beta in betas[1:]
        ]
