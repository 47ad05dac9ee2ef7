"""Fit one layer's latent on calibration text: candidates by what they lose, then refits that must earn their place.

What is fitted on one part of the text is accepted on another, and neither is ever text that a result is reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...attention.latent import LatentWeights, check_latent
from ...attention.weights import AttentionWeights
from ...calibration.text import Windows
from ...calibration.visit import Visit
from ...calibration.working_copy import WorkingCopy
from ...runtime.layout import AttentionSite
from ..common.gains import fit_gains
from ..common.options import why_queries_stay
from ..common.refit import keep_what_helps, output_fits
from . import LowrankInit, MlaInit
from .low_rank import Layout, LowrankOptions, lowrank
from .moments import LatentMoments, MomentSums
from .refit import fit_queries
from .rotary_split import MlaOptions, mla, mla_freq

Candidate = Callable[[AttentionWeights, LatentMoments], LatentWeights]
MOMENT_TOKENS = 25_000
SEARCH_BATCHES = 2
"""Batches of check windows that candidates are compared on; refits are accepted on all of them."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted around a latent by closed forms."""

    queries: bool = True
    """Rows of W_q to the parent's attention scores."""
    gains: bool = False
    """A factor per query head on q and on o."""
    output: bool = True
    """W_o to the parent's attention output, and to what the layers before have lost."""


def fit_layer(
    visit: Visit,
    candidates: Sequence[Candidate],
    options: FitOptions | None = None,
    variants: Sequence[Sequence[Candidate]] = (),
) -> int:
    """Convert the visited layer to the best of `candidates`, and refit q and o around it. In place.

    Args:
        candidates: in an order along which their loss falls and then rises (ranks, shares): the search walks it
            downhill from the choice of the layer before.
        variants: each made otherwise, in the same order; tried at the place that the walk ends at.

    Returns:
        The place of the candidate.
    """
    options = options or FitOptions()
    copy, layer = visit.copy, visit.layer
    parent = _parent(copy, layer)
    latent, choice = _choose(visit, [candidates, *variants], parent, visit_moments(visit, parent))
    copy.write_latent(layer, latent, parent)
    fits = [fit_queries(parent, latent)] if options.queries and why_queries_stay(visit.site) is None else []
    if options.gains:
        fits.append(fit_gains)
    keep_what_helps(visit, [*fits, *output_fits()] if options.output else fits)
    return choice


def visit_moments(visit: Visit, parent: AttentionWeights) -> LatentMoments:
    """`LatentMoments` of the visited layer over the calibration text, or as much of it as they need."""
    sums = MomentSums(parent)
    for a in visit.activations(MOMENT_TOKENS):
        sums.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT)
    return sums.finish()


def _parent(copy: WorkingCopy, layer: int) -> AttentionWeights:
    """The parent's weights of one layer.

    Raises:
        UnsupportedModel: no latent can stand for this attention.
    """
    found = copy.parent(layer)
    check_latent(found, copy.sites[layer], rotate_on_read=True)
    return found


def _choose(
    visit: Visit, lines: Sequence[Sequence[Candidate]], parent: AttentionWeights, moments: LatentMoments
) -> tuple[LatentWeights, int]:
    """The candidate of least error, and its place: the first line is walked downhill, the others are tried there."""
    tried: dict[tuple[int, int], tuple[float, LatentWeights]] = {}
    single, copy = len(lines) == len(lines[0]) == 1, visit.copy

    def loss(i: int, line: int = 0) -> float:
        if not 0 <= i < len(lines[line]):
            return float("inf")
        if (line, i) not in tried:
            made = lines[line][i](parent, moments)
            copy.write_latent(visit.layer, made)
            tried[line, i] = 0.0 if single else visit.error(SEARCH_BATCHES), made
        return tried[line, i][0]

    at = min(copy.choice, len(lines[0]) - 1) if copy.choice is not None else len(lines[0]) // 2
    for step in (1, -1):
        while loss(at + step) < loss(at):
            at += step
    copy.choice = at
    best = min(range(len(lines)), key=lambda line: loss(at, line))
    return tried[best, at][1], at


def errors_alone(
    copy: WorkingCopy,
    windows: Windows,
    candidate: Callable[[int, int], Candidate],
    sizes: Mapping[int, Sequence[int]],
) -> dict[int, dict[int, float]]:
    """`Visit.error` of each layer at some numbers of cached numbers, all other layers as they are.

    `copy` is left as it was.

    Args:
        candidate: the form of a layer at a number of cached numbers.
        sizes: by layer.
    """
    found: dict[int, dict[int, float]] = {}
    for visit in copy.visits(windows, sizes, kept=found):
        layer, before = visit.layer, copy.form(visit.layer)
        was_converted = layer in copy.converted
        parent = _parent(copy, layer)
        moments = visit_moments(visit, parent)
        found[layer] = {}
        for numbers in sizes[layer]:
            copy.write_latent(layer, candidate(layer, numbers)(parent, moments))
            found[layer][numbers] = visit.error(1)
        if was_converted:
            copy.take_form(layer, before)
        else:
            copy.drop_form(layer)
    return found


def mla_candidates(
    splits: Sequence[tuple[int, int]],
    betas: Sequence[float] = (1.0,),
    options: MlaOptions | MlaInit = "default",
) -> list[Candidate]:
    """`mla` for every split (rank, rope_dims) and balance."""

    def candidate(rank: int, rope_dims: int, beta: float) -> Candidate:
        return lambda weights, moments: mla(weights, moments, rank, rope_dims, options=options, beta=beta)

    return [candidate(rank, rope_dims, beta) for rank, rope_dims in splits for beta in betas]


def lowrank_candidates(
    numbers: int,
    shares: Sequence[float] = (0.36, 0.42, 0.48),
    options: LowrankOptions | LowrankInit = "qw",
    layout: Layout = "joint",
    group: int = 4,
) -> list[Candidate]:
    """`lowrank` with each share of `numbers` for K, the rest for V."""

    def candidate(share: float) -> Candidate:
        k_rank = min(numbers - 1, max(1, round(numbers * share)))
        return lambda weights, moments: lowrank(
            weights, moments, k_rank, numbers - k_rank, layout=layout, group=group, options=options
        )

    return [candidate(share) for share in shares]


def freq_candidates(
    numbers: int, shares: Sequence[float], site: AttentionSite, mean_split: bool = False
) -> list[Candidate]:
    """`mla_freq` with each share of `numbers` for K, all of it rotated, the rest for V."""

    def candidate(rope_dims: int) -> Candidate:
        return lambda weights, moments: mla_freq(
            weights, moments, numbers - rope_dims, rope_dims, mean_split=mean_split
        )

    full = site.kv_heads * site.head_dim
    wide = {min(full, max(2, round(numbers * share / 2) * 2)) for share in shares}
    return [candidate(rope_dims) for rope_dims in sorted(wide) if rope_dims < numbers]
