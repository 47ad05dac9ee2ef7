"""Share one budget out among layers, by what each layer's own conversion costs the model."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Part = TypeVar("Part", bound=Hashable)
PARTS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Sizes at which a layer is tried, in parts of its uniform share."""


def share_out(
    cost: Callable[[int, int], float], uniform: Mapping[int, int], most: Mapping[int, int], unit: int = 1
) -> dict[int, int]:
    """Sizes of the layers' parts that minimise the sum of costs; in all as much as the uniform shares, where it fits.

    Args:
        cost: what a layer costs alone at a size (cached numbers, tokens of a window).
        uniform: layers with the size of an equal division.
        most: the size from which a layer gains nothing more.
        unit: sizes are moved between layers in pieces of this.

    Costs are made convex between the measured sizes; then giving each unit to the layer that gains most by it is
    optimal (Fox 1966). Layers are taken to add up, which holds for small losses only: the caller measures the outcome.
    """
    lines = {}
    for layer, sizes in tried_sizes(uniform, most, unit).items():
        lines[layer] = convex([(n, cost(layer, n)) for n in sizes])
    given = {layer: line[0][0] for layer, line in lines.items()}
    free = sum(uniform.values()) - sum(given.values())
    queue = [(-_gain(line, given[layer]), layer) for layer, line in lines.items()]
    heapq.heapify(queue)
    while queue and free >= unit:
        gain, layer = heapq.heappop(queue)
        if gain >= 0:
            break
        given[layer] += unit
        free -= unit
        if given[layer] + unit <= lines[layer][-1][0]:
            heapq.heappush(queue, (-_gain(lines[layer], given[layer]), layer))
    # What nobody gains by goes to all in turn: the budget was for them, and other text may ask for it.
    while free >= unit and (room := [layer for layer in given if given[layer] + unit <= most[layer]]):
        for layer in room[: free // unit]:
            given[layer] += unit
            free -= unit
    return given


def tried_sizes(uniform: Mapping[int, int], most: Mapping[int, int], unit: int = 1) -> dict[int, list[int]]:
    """The sizes at which each layer is tried; arguments as of `share_out`."""
    return {
        layer: sorted({min(most[layer], max(1, round(size * part / unit) * unit)) for part in PARTS})
        for layer, size in uniform.items()
    }


def convex(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of (size, cost) points, by size."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _gain(line: Sequence[tuple[int, float]], at: int) -> float:
    """What one more of it saves."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if at < x1:
            return (y0 - y1) / (x1 - x0)
    return 0.0


def choose(lines: Mapping[Part, Sequence[tuple[int, float]]], budget: int) -> dict[Part, int]:
    """One of the measured sizes of each part, that of the least cost in all; together at most `budget`.

    Parts begin at their smallest size, and go up their convex hulls where a unit of size saves most; what no longer
    fits is passed over. Within one step of a hull that is optimal (Fox 1966).

    Args:
        lines: (size, cost) of each part; costs of parts are taken to add up.
    """
    hulls = {part: convex(line) for part, line in lines.items()}
    given = {part: hull[0][0] for part, hull in hulls.items()}
    free = budget - sum(given.values())
    steps = sorted(
        ((y1 - y0) / (x1 - x0), number, i)
        for number, hull in enumerate(hulls.values())
        for i, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(hull))
    )
    parts, stopped = list(hulls), set()
    for slope, number, i in steps:
        part = parts[number]
        size = hulls[part][i + 1][0]
        if slope >= 0 or part in stopped:
            continue
        if size - given[part] > free:
            stopped.add(part)
            continue
        free -= size - given[part]
        given[part] = size
    return given
