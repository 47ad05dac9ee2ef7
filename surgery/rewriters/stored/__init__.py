"""The mathematics of codecs that are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...calibration.visit import Visit
from ...runtime.layout import Codec
from .channels import mask_of_layer
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


def fits_of(visit: Visit, store: Codec) -> list[Fitted]:
    """What the text says of one layer: for its codec, and for the channels that its keys keep."""
    found = list(FITS[store.codec](visit, store)) if store.codec in FITS else []
    return found if store.k_channels is None else [*found, mask_of_layer(visit, store)]
