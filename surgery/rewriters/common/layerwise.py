"""Rewriters that convert one layer after another, each on statistics of the already converted prefix."""

from __future__ import annotations

from collections.abc import Sequence

from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...runtime.layout import LayerPlan


class Layerwise:
    """`convert` in terms of `convert_layer` and `without_text`."""

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Carry out the step: `plans` has the layers that it changes, in order. In place.

        Args:
            windows: calibration text; None asks for the data-free form.
        """
        if windows is None:
            for plan in plans:
                self.without_text(copy, plan)
            return
        plan_of = {plan.layer: plan for plan in plans}
        for visit in copy.visits(windows, plan_of, kept={}):
            self.convert_layer(visit, plan_of[visit.layer])
        self.finish(copy, windows)

    def convert_layer(self, visit: Visit, plan: LayerPlan) -> None:
        """Convert the layer that is visited."""
        raise NotImplementedError

    def without_text(self, copy: WorkingCopy, plan: LayerPlan) -> None:
        """Convert one layer by its weights alone."""
        raise NotImplementedError

    def finish(self, copy: WorkingCopy, windows: Windows) -> None:
        """What is done to all converted layers together."""
