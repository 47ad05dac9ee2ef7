"""Which setting each layer gets: least cost in all within the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNITS = 8192
"""The budget is counted in so many units; bytes are rounded up to whole ones, so that it is never exceeded."""


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The place of the setting that each layer takes; None where no choice fits.

    Dynamic programming over the bytes: the sum of costs is least among all choices whose sizes, rounded up to units,
    fit.

    Args:
        costs: of each layer's settings.
        sizes: of each layer's settings, bytes.
        budget: bytes of all layers.
    """
    unit = max(1, -(-budget // UNITS))
    room = budget // unit
    best = np.zeros(room + 1)
    taken = []
    for layer_costs, layer_sizes in zip(costs, sizes, strict=True):
        found, choice = np.full(room + 1, np.inf), np.full(room + 1, -1)
        for place, (cost, size) in enumerate(zip(layer_costs, layer_sizes, strict=True)):
            units = -(-size // unit)
            if units > room:
                continue
            total = best[: room + 1 - units] + cost
            better = total < found[units:]
            found[units:][better] = total[better]
            choice[units:][better] = place
        best = found
        taken.append(choice)
    if not np.isfinite(best[room]):
        return None
    places, left = [], room
    for choice, layer_sizes in zip(reversed(taken), reversed(sizes), strict=True):
        place = int(choice[left])
        places.append(place)
        left -= -(-layer_sizes[place] // unit)
    return places[::-1]
