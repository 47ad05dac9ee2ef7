"""Options that several methods have."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError
from ...recipe import Step


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

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.refine < 0:
            raise RecipeError(f"{where}.refine: {self.refine} must be a number of steps, such as 200, or 0 for none.")
