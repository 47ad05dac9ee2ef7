"""What the options and plans of `mla` and `lowrank` have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ...anatomy import Anatomy
from ...console import spans
from ...errors import PlanError, RecipeError
from ...planning.latent_size import kept_numbers
from ...recipe import Text
from ...runtime.layout import AttentionSite, Latent, LayerPlan
from ...runtime.project import latent_refusal
from ..common.gains import GainFit
from ..common.options import RefinedStep


@dataclass(frozen=True, kw_only=True)
class LatentStep(RefinedStep):
    """What `mla` and `lowrank` share: a budget of cached numbers, and what is fitted around the latent."""

    keep: float | None = None
    """Part of the parent's KV bytes per token, never exceeded; above 0, at most 1. Or `rank`."""
    rank: int | None = None
    refit_queries: bool = True
    """Refit `q_proj` by least squares to the parent's attention scores."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output."""
    gain_fit: GainFit = False
    """Fit one factor per query head on q and on o, then fold: `true` in closed form, layer by layer; `global` by the
    loss of the whole model, which has to be in memory. Little is left to gain after refits."""
    mean_split: bool | None = None
    """Keep the means of K and V apart from the latent: no bytes, better below half of them. None: where `init` is
    `lowrank`'s own; not in `mla`, whose native export would need a bias on o that not every engine has."""

    ranks: Literal["uniform", "sensitivity"] = "uniform"
    """All layers alike, or more numbers where the text says that they are missed most; the same bytes in all."""

    @property
    def splits_mean(self) -> bool:
        """`mean_split`, decided."""
        return bool(self.mean_split)

    @property
    def text(self) -> Text:
        return "needed"

    def validate(self, where: str) -> None:
        super().validate(where)
        if (self.keep is None) == (self.rank is None):
            raise RecipeError(
                f"{where}: needs one of `keep` (part of the parent's KV bytes, such as 0.5) and `rank`, and not both."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"{where}.keep: {self.keep:g} must be above 0 and at most 1.")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"{where}.rank: {self.rank} must be at least 1.")


def plan_latents(
    step: LatentStep,
    anatomy: Anatomy,
    layers: tuple[LayerPlan, ...],
    where: str,
    make: Callable[[str, AttentionSite], Latent],
    rotate_on_read: bool,
) -> tuple[LayerPlan, ...]:
    """`layers` with a latent in each that `step` selects.

    Args:
        make: the latent of one attention, and the start of messages about it.
        rotate_on_read: of the latents that `make` gives.

    Raises:
        PlanError: an attention that no latent can stand for.
    """
    if step.ranks == "sensitivity" and sum(step.selects(site.layer) for site in anatomy.sites) == 1:
        raise PlanError(
            f"{where}.ranks: sensitivity shares numbers out between layers, and one is selected. Select more, or leave "
            "it out."
        )
    done = []
    for site, layer in zip(anatomy.sites, layers, strict=True):
        if not step.selects(site.layer):
            done.append(layer)
            continue
        at = f"layer {site.layer}"
        reason = latent_refusal(site, rotate_on_read)
        if reason:
            raise PlanError(f"{at}: {where} asks for {step.rewriter}, but {reason}")
        if step.mean_split and site.sinks is not None:
            raise PlanError(f"{at}: {where}.mean_split: sinks take a part of each softmax. Set mean_split: false.")
        made = make(at, site)
        done.append(replace(layer, project=replace(made, means=step.splits_mean and site.sinks is None)))
    return tuple(done)


def rounding_notes(
    step: LatentStep, changed: list[tuple[AttentionSite, LayerPlan]], counted: Callable[[Latent], int]
) -> list[str]:
    """Where latents are not as large as the recipe says, so that cache entries fill whole aligned loads.

    Args:
        changed: the layers of the step.
        counted: what `rank` counts of a latent.
    """
    notes: dict[str, list[int]] = {}
    for site, layer in changed:
        project = layer.project
        assert isinstance(project, Latent)
        rank = counted(project)
        allowed = None if step.keep is None else int(step.keep * site.kv_dims + 1e-9)
        if step.rank is not None and rank != step.rank:
            notes.setdefault(f"rank {step.rank} → {rank}: entries of whole 16 bytes", []).append(site.layer)
        elif allowed is not None and allowed != kept_numbers(step.keep or 0, site):
            text = f"keep {step.keep:g}: {allowed} → {project.dims} numbers per token, whole 16 bytes"
            notes.setdefault(text, []).append(site.layer)
    return [f"layers {spans(layers)}: {text}" for text, layers in notes.items()]


SPLIT_NOTE = "the text decides per layer how the numbers are split; their sum stays"
