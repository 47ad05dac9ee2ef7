"""Rewriters that convert one layer after another, each on statistics of the already converted prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...calibration.text import Windows
from ...runtime.layout import LayerPlan


class Layerwise:
    """`convert` in terms of `convert_layer` and `finish`."""

    def convert(self, copy: Any, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Carry out the step: `plans` has the layers that it changes, in order. In place.

        Args:
            windows: calibration text; None asks for the data-free form.
        """
        for plan in plans:
            self.convert_layer(copy, plan.layer, plan.project, windows)
        self.finish(copy, windows)

    def convert_layer(self, copy: Any, layer: int, project: Any, windows: Windows | None) -> None:
        """Convert one layer."""
        raise NotImplementedError

    def finish(self, copy: Any, windows: Windows | None) -> None:
        """Tune all converted layers together."""
        raise NotImplementedError
