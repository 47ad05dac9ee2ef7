"""The `lowrank` step: latents of K and V apart, before rotation, or K cached rotated in the `freq` layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..anatomy import Anatomy
from ..errors import PlanError, RecipeError
from ..planning.latent_size import aligned_rank, input_columns, kept_numbers
from ..runtime.layout import AttentionSite, Latent, LayerPlan
from .latent import Layout, LowrankInit
from .latent.fit import Candidate, freq_candidates, lowrank_candidates
from .latent.low_rank import LOWRANK_INITS
from .latent.method import LatentMethod
from .latent.options import SPLIT_NOTE, LatentStep, plan_latents, rounding_notes

SHARES = (0.34, 0.38, 0.42, 0.46)
"""Parts of a `lowrank` budget tried for K: V needs the larger one."""


@dataclass(frozen=True, kw_only=True)
class LowrankStep(LatentStep):
    """Cache latents of K and of V before rotation; K is rotated at read, exactly. Needs calibration text.

    `rank` counts all numbers per token, K's and V's together.
    """

    rewriter: Literal["lowrank"] = "lowrank"
    layout: Layout = "joint"
    """One latent over all KV heads, one per `group` of them, one per head; `freq`: K cached rotated, not expanded."""
    group: int = 4
    """KV heads per latent in the `grouped` layout."""
    k_share: float | None = None
    """Part of the numbers that K gets; by default the text decides per layer."""
    init: LowrankInit = "qw"
    """Ours, weighted by queries and outputs, or a published form: `whitened` (Palu), `plain` (SVD of the weights)."""

    @property
    def splits_mean(self) -> bool:
        return self.init == "qw" if self.mean_split is None else self.mean_split

    def unread(self) -> dict[str, str]:
        if self.layout == "grouped":
            return {}
        return {"group": "only layout: grouped reads it. Set that, or leave it out."}

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.group < 1:
            raise RecipeError(f"{where}.group: {self.group} must be at least 1.")
        if self.k_share is not None and not 0 < self.k_share < 1:
            raise RecipeError(f"{where}.k_share: {self.k_share:g} must lie between 0 and 1.")
        if self.layout == "freq" and self.init != "qw":
            raise RecipeError(f"{where}.init: {self.init!r} has no `freq` layout. Use layout: joint, grouped or head.")


class Lowrank(LatentMethod):
    """Latents of K and V apart; K is rotated at read, or cached rotated in the `freq` layout."""

    Options = LowrankStep
    step: LowrankStep

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """Some parts of the parent's bytes."""
        return [[{"keep": keep}] for keep in (0.5, 0.3)]

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """Latents of K and V in each selected layer."""
        on_read = self.step.layout != "freq"
        return plan_latents(self.step, anatomy, layers, where, self._planned, rotate_on_read=on_read)

    def notes(self, plan: Any) -> list[str]:
        """Roundings, and what is left to the text."""
        searches = self.step.k_share is None
        return rounding_notes(self.step, plan.changed(self.step), lambda p: p.dims) + [SPLIT_NOTE] * searches

    def _planned(self, at: str, site: AttentionSite) -> Latent:
        step = self.step
        inputs = input_columns(site)
        full = min(site.kv_heads * site.head_dim, inputs) + min(site.kv_heads * site.value_dim, inputs)
        if step.rank is not None and step.rank > min(full, site.kv_dims):
            raise PlanError(f"{at}: rank {step.rank} is more than the {full} numbers of K and V. Use less.")
        numbers = aligned_rank(step.rank, 0, full) if step.rank is not None else kept_numbers(step.keep or 0, site)
        if step.layout == "grouped" and site.kv_heads % step.group:
            raise PlanError(
                f"{at}: groups of {step.group} do not divide {site.kv_heads} KV heads. Set group to a divisor."
            )
        share = 0.42 if step.k_share is None else step.k_share
        if step.layout == "freq":
            if site.rotary is None or site.rotary.dims != site.head_dim:
                turning = 0 if site.rotary is None else site.rotary.dims
                raise PlanError(
                    f"{at}: layout freq caches rotated keys, and {site.head_dim - turning} of {site.head_dim} key "
                    "channels do not turn. Use layout joint, or mla."
                )
            rope_dims = min(site.kv_heads * site.head_dim, max(2, round(numbers * share / 2) * 2))
            if numbers - rope_dims < 1:
                raise PlanError(f"{at}: {numbers} numbers per token leave none for V. Raise keep or rank.")
            return Latent.of(site, numbers - rope_dims, rope_dims, k_rank=0)
        if numbers < 2:
            raise PlanError(
                f"{at}: {numbers} numbers per token are too few: K and V need one each. Raise keep or rank."
            )
        k_rank = min(numbers - 1, max(1, round(numbers * share)))
        return Latent.of(site, numbers, 0, rotate_on_read=True, k_rank=k_rank)

    def candidates(self, site: AttentionSite, project: Latent) -> list[list[Candidate]]:
        step, numbers = self.step, project.dims
        shares = SHARES if step.k_share is None else (step.k_share,)
        if step.layout == "freq":
            return [freq_candidates(numbers, shares, site, step.splits_mean)]
        options = replace(LOWRANK_INITS[step.init], mean_split=step.splits_mean)
        return [lowrank_candidates(numbers, shares, options, step.layout, step.group)]
