"""The mathematics of codecs that are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...calibration.visit import Visit
from ...runtime.layout import Codec
from .directions import directions_of_layer
from .levels import levels_of_layer
from .samples import Fitted
from .turns import turns_of_layer

FITS: dict[str, Callable[[Visit, Codec], Sequence[Fitted]]] = {
    "metric": directions_of_layer,
    "kvquant": levels_of_layer,
    "oscar": turns_of_layer,
}
"""Name of a calibrated codec -> what the text says of a layer's keys, and of its values where they are encoded."""
