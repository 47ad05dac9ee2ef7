"""Options that several methods have."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError
from ...recipe import Step
from ...runtime.layout import AttentionSite


def why_queries_stay(site: AttentionSite) -> str | None:
    """Why `q_proj` cannot be refitted by least squares on scores; None where it can."""
    if site.q_norm is not None:
        return "queries are normed, so that scores are not linear in q_proj"
    if site.softcap is not None:
        return "scores are capped, and so not linear in q_proj"
    return None


@dataclass(frozen=True, kw_only=True)
class RefinedStep(Step):
    """A step whose layers can be trained one by one after the closed forms (`refine.refine`)."""

    refine: int = 0
    """Steps of training per layer, on its own new parameters, to the parent's output of the layer; a few hundred give
    what closed forms leave. Needs calibration text."""

    @property
    def fits_on_text(self) -> bool:
        """Whether an option asks for what only calibration text can give, so that there is no form without."""
        gains = getattr(self, "gain_fit", False)
        return self.refine > 0 or gains == "global" or (gains and gains != getattr(type(self), "gain_fit", False))

    def skipped(self, site: AttentionSite) -> dict[str, str]:
        """Fits of queries that norms or caps of scores forbid."""
        reason = why_queries_stay(site)
        asked = {"refit_queries": getattr(self, "refit_queries", False)}
        # A norm undoes factors before it; those of o_proj are fitted all the same.
        asked["gain_fit of q_proj"] = site.q_norm is not None and bool(getattr(self, "gain_fit", False))
        return {name: reason for name, is_asked in asked.items() if is_asked and reason is not None}

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.refine < 0:
            raise RecipeError(f"{where}.refine: {self.refine} must be a number of steps, such as 200, or 0 for none.")
